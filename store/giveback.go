package store

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
)

// A claim can be left behind by a lost answer: the commit that gives it out, or
// the statement that gives it back, may have been done, and the database is away
// until the call has run out of tries. The row then names a worker that lives
// and runs nothing, for which all others would wait. So the Store remembers such
// claims and gives them back as soon as the database answers again.

// giveBackLater gives a claim back that nobody in this Store has any more. It
// returns at once. The claim need not exist.
func (s *Store) giveBackLater(runID string, token int64) {
	s.unregister(token)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return // the worker's lock is free: all that it has is free
	}
	s.owed[token] = runID
	if s.givingBack == nil {
		ctx, cancel := context.WithCancel(context.Background())
		s.givingBack, s.stopGivingBack = make(chan struct{}), cancel
		go s.giveBack(ctx, s.givingBack)
	}
}

// giveBack ends when nothing is owed any more, or when ctx does.
func (s *Store) giveBack(ctx context.Context, done chan struct{}) {
	defer close(done)
	for n := 0; ; {
		runID, token, any := s.nextOwed(ctx)
		if !any {
			return
		}
		freed, err := s.giveBackOnce(ctx, runID, token)
		if err == nil || errors.Is(err, ErrSchema) { // without the table there is no row
			n = 0
			s.mu.Lock()
			delete(s.owed, token)
			s.mu.Unlock()
			if freed {
				s.config.Logger.Info("the database answers again, and a step that this worker does not run is given back", "run_id", runID)
			}
			continue
		}
		select {
		case <-ctx.Done():
		case <-time.After(backoff(n)):
			n++
		}
	}
}

// nextOwed is one of what is owed. If there is nothing, or ctx is over, giveBack
// has ended for whoever holds the lock after this.
func (s *Store) nextOwed(ctx context.Context) (runID string, token int64, any bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ctx.Err() == nil {
		for token, runID := range s.owed {
			return runID, token, true
		}
	}
	s.stopGivingBack()
	s.givingBack = nil
	return "", 0, false
}

// giveBackOnce says whether the row was there. The run's lock comes first: the
// commit in question may still be on its way, and then holds it.
func (s *Store) giveBackOnce(ctx context.Context, runID string, token int64) (freed bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, s.config.TryTimeout)
	defer cancel()
	err = s.transaction(ctx, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, lockRun, runID); err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `
			UPDATE mm_orchestrator.claims SET holder = NULL, handed_back = handed_back + 1
			WHERE run_id = $1 AND token = $2 AND holder IS NOT NULL`, runID, token)
		freed = tag.RowsAffected() > 0
		return err
	})
	return freed, translate("give back a step of run "+runID, err)
}

// stopGiving ends giveBack and waits for it.
func (s *Store) stopGiving() {
	s.mu.Lock()
	s.closed = true
	done, stop := s.givingBack, s.stopGivingBack
	s.mu.Unlock()
	if done != nil {
		stop()
		<-done
	}
}
