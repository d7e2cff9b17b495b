package orchestrator

import (
	"context"
	"time"
)

// MoonMind's Python worker may consume the same queue. Nobody can see which
// messages it has: the broker's count of ready messages does not include them, and
// its transaction is invisible before a step has ended. So no run counts as lost
// while the queue has a foreign consumer, which is one that is no worker of this
// program. Their number is a difference: the broker's count of all consumers, less
// those of this program's workers. Each of these records in the database how many
// consumers the broker has for it.
//
// Broker and database are queried one after the other, so the difference may be
// wrong for a moment. It is too large from the start of a worker of this program
// until that has recorded its consumers. Then the LostGrace of a suspect merely
// starts again. It can be too small for consumersAge after such a worker has lost
// its connection. But every sweep during LostGrace queries it.
//
// A Python worker that stops cancels its consumer first and then ends its steps.
// Other messages that it has taken return to the queue at its end. Its steps are
// recognised by their long transactions ([store.WorkspaceState]), by the locks of
// these ([store.ErrLocked]), and by what they commit.

// countTimeout bounds the query for the consumers of the queue.
const countTimeout = 2 * time.Second

// consumersAge is how long a worker's recorded number of consumers is valid, in
// sweeps.
const consumersAge = 5

// foreignConsumers is what a sweeper knows about consumers that are no workers of
// this program.
type foreignConsumers struct {
	// known says that the last query succeeded; count is its result.
	known bool
	count int
	// logged says that the last log line was about foreign consumers. changed is
	// since when that is no longer so, zero if it is.
	logged  bool
	changed time.Time
}

// none says that the queue certainly has no foreign consumer.
func (f foreignConsumers) none() bool { return f.known && f.count == 0 }

// countForeign counts the foreign consumers. It returns only errors of the
// database; package worker logs those of the broker.
func (s *sweeper) countForeign(ctx context.Context) error {
	s.foreign.known = false
	query, cancel := context.WithTimeout(ctx, countTimeout)
	found, err := s.broker.QueueConsumers(query, s.config.Queue)
	cancel()
	if err != nil {
		return nil
	}
	count := found.Other
	if count > 0 {
		// A worker without other consumers on its queue does not query the database
		// for them.
		ours, err := s.config.Steps.CountOtherConsumers(ctx, s.config.Queue, found.Own, consumersAge*s.config.SweepInterval)
		if err != nil {
			return err
		}
		count -= ours
	}
	if count < 0 {
		return nil // one of our workers has just lost its connection: its record may hide a foreign consumer
	}
	s.foreign.known, s.foreign.count = true, count
	return nil
}

// logForeign logs once that lost runs are not looked for, and once that they are
// again. It waits before it does, because a worker of this program that has just
// started looks like a foreign consumer.
func (s *sweeper) logForeign() {
	f := &s.foreign
	switch {
	case !f.known:
		return
	case f.logged == (f.count > 0):
		f.changed = time.Time{}
		return
	case f.changed.IsZero():
		f.changed = time.Now()
	}
	if time.Since(f.changed) < consumersAge*s.config.SweepInterval {
		return
	}
	f.logged, f.changed = f.count > 0, time.Time{}
	if f.logged {
		s.log.Warn("lost runs are not looked for: consumers that are not workers of this program are on the queue, and may have messages of any run",
			"queue", s.config.Queue, "consumers", f.count)
	} else {
		s.log.Info("lost runs are looked for again: all consumers of the queue are workers of this program", "queue", s.config.Queue)
	}
}
