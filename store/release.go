package store

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/internal/database"
)

// A lost answer can leave a claim behind. The commit that took the claim may have
// succeeded, or the statement that releases it may not, and the database stays
// unreachable until the call gives up. The row then names a worker that is alive
// and does not run the step, and all other workers would wait for it. So the
// Store remembers such claims and releases them once the database answers.

// releaseLater releases, in the background, a claim that no caller of this Store
// has any more. It returns at once. The claim need not exist.
func (s *Store) releaseLater(runID string, token int64) {
	s.unregister(token)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return // the worker's lock is free, so others can take over all its claims
	}
	s.pendingReleases[token] = runID
	if s.releasing == nil {
		ctx, cancel := context.WithCancel(context.Background())
		s.releasing, s.cancelReleasing = make(chan struct{}), cancel
		go s.releasePending(ctx, s.releasing)
	}
}

// releasePending returns when no release is pending, or when ctx ends.
func (s *Store) releasePending(ctx context.Context, done chan struct{}) {
	defer close(done)
	for n := 0; ; {
		runID, token, any := s.nextPendingRelease(ctx)
		if !any {
			return
		}
		released, err := s.tryRelease(ctx, runID, token)
		if err == nil || errors.Is(err, ErrSchema) { // without the table there is no claim
			n = 0
			s.mu.Lock()
			delete(s.pendingReleases, token)
			s.mu.Unlock()
			if released {
				s.config.Logger.Info("released the claim on a step that this worker does not run: an earlier answer of the database was lost", "run_id", runID)
			}
			continue
		}
		select {
		case <-ctx.Done():
		case <-time.After(database.Backoff(n)):
			n++
		}
	}
}

// nextPendingRelease returns any of the pending releases. If there is none, or
// ctx has ended, it marks releasePending as ended, under the same lock, so that
// the next releaseLater starts it again.
func (s *Store) nextPendingRelease(ctx context.Context) (runID string, token int64, any bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ctx.Err() == nil {
		for token, runID := range s.pendingReleases {
			return runID, token, true
		}
	}
	s.cancelReleasing()
	s.releasing = nil
	return "", 0, false
}

// tryRelease releases a claim and says whether there was one. It locks the run
// first: the commit of the claim may still be under way, and then has that lock.
func (s *Store) tryRelease(ctx context.Context, runID string, token int64) (released bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, s.config.TryTimeout)
	defer cancel()
	err = s.transaction(ctx, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, lockRun, runID); err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `
			UPDATE mm_orchestrator.claims SET holder = NULL, handed_back = handed_back + 1
			WHERE run_id = $1 AND token = $2 AND holder IS NOT NULL`, runID, token)
		released = tag.RowsAffected() > 0
		return err
	})
	return released, translate("release a step of run "+runID, err)
}

// stopReleasing ends releasePending and waits until it has returned.
func (s *Store) stopReleasing() {
	s.mu.Lock()
	s.closed = true
	done, stop := s.releasing, s.cancelReleasing
	s.mu.Unlock()
	if done != nil {
		stop()
		<-done
	}
}
