package orchestrator

import (
	"context"
	"time"
)

// MoonMind's Python worker may consume the same queue. It says to nobody what
// it has in hand: the broker does not count a message that it has taken, and
// its transaction shows nothing before a step has ended. So nothing is found
// lost while anybody consumes the queue who is not known as a worker of this
// program. Who that is, is a difference: the broker's count of all consumers,
// less those that the workers of this program have noted in the database, each
// for itself and as the broker had them.
//
// The two are asked one after the other, so the difference may be wrong for a
// moment. It is too large after a worker of this program has come, until that
// notes itself: then the suspicion of a lost run only begins anew. It can be too
// small for consumersAge, when such a worker's connection ends just then: but it
// is asked in every sweep of LostGrace.
//
// Python's worker cancels its consumer when it stops, and then ends its steps;
// what it has taken besides goes back when it is gone. Its steps are known by
// their transactions, which last ([store.WorkspaceState]), by the locks of these
// ([store.ErrLocked]), and by what they commit.

// askTimeout bounds the question who consumes the queue.
const askTimeout = 2 * time.Second

// consumersAge is how long the count of a worker's consumers is good, in
// sweeps.
const consumersAge = 5

// foreignConsumers is what a sweeper knows of consumers that are no workers of
// this program.
type foreignConsumers struct {
	// known says that the last question was answered, and count how many there
	// are.
	known bool
	count int
	// told is what the log has said last: that there are some. changed is since
	// when it is otherwise, zero if it is not.
	told    bool
	changed time.Time
}

// none says that there are none for certain.
func (f foreignConsumers) none() bool { return f.known && f.count == 0 }

// findForeign asks who consumes the queue. The error is the database's; of a
// broker that does not answer the engine tells.
func (s *sweeper) findForeign(ctx context.Context) error {
	s.foreign.known = false
	ask, cancel := context.WithTimeout(ctx, askTimeout)
	found, err := s.broker.QueueConsumers(ask, s.config.Queue)
	cancel()
	if err != nil {
		return nil
	}
	count := found.Other
	if count > 0 {
		// A worker that is alone tells nobody: there is nobody to know.
		ours, err := s.config.Steps.CountOtherConsumers(ctx, s.config.Queue, found.Own, consumersAge*s.config.SweepInterval)
		if err != nil {
			return err
		}
		count -= ours
	}
	if count < 0 {
		return nil // a worker of ours has just lost its broker: its consumer may hide another one
	}
	s.foreign.known, s.foreign.count = true, count
	return nil
}

// tellForeign tells the operator once that lost runs are not found, and once
// that they are again; not of a worker of this program that has just come.
func (s *sweeper) tellForeign() {
	f := &s.foreign
	switch {
	case !f.known:
		return
	case f.told == (f.count > 0):
		f.changed = time.Time{}
		return
	case f.changed.IsZero():
		f.changed = time.Now()
	}
	if time.Since(f.changed) < consumersAge*s.config.SweepInterval {
		return
	}
	f.told, f.changed = f.count > 0, time.Time{}
	if f.told {
		s.log.Warn("no run is found lost for now: consumers that are not workers of this program are on the queue, and may have a run in hand",
			"queue", s.config.Queue, "consumers", f.count)
	} else {
		s.log.Info("lost runs are found again: all consumers of the queue are workers of this program", "queue", s.config.Queue)
	}
}
