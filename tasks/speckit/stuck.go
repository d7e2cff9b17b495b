package speckit

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// StuckRuns is the part of [store.Store] that Sweep uses. The methods are documented
// there.
type StuckRuns interface {
	ListStuckSpecRuns(ctx context.Context, quiet time.Duration) ([]store.StuckSpecRun, error)
	FailStuckSpecRun(ctx context.Context, run store.StuckSpecRun, reason string) (bool, error)
}

// Queues is the part of worker.Worker that Sweep uses.
type Queues interface {
	QueueDepth(ctx context.Context, queue string) (int, error)
	Unacked() []*protocol.Message
}

// depthTimeout is how long a queue may take to say how many messages it has.
const depthTimeout = 10 * time.Second

// Sweep fails runs that are stuck, until ctx ends: a run whose message was lost, or never
// published, would block its feature for ever (docs/spec-workflow.md#s4).
//
//   - A run is stuck if none of its rows has changed for Config.StuckAfter, no live worker
//     has a task of it, this worker has no message of it, and the queues of the chain are
//     empty, at two sweeps in a row.
//   - A message that turns up later is carried out all the same, and the run goes on.
//   - Several workers may sweep: what is done is one transaction that checks again.
//
// Messages that a Python worker holds are seen by nobody. StuckAfter is longer than any
// task of MoonMind's takes.
func (s *Speckit) Sweep(ctx context.Context, runs StuckRuns, queues Queues) {
	sweeper := stuckSweeper{Speckit: s, runs: runs, queues: queues, seen: map[string]time.Time{}}
	logged := ""
	for {
		err := sweeper.sweep(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			logged = ""
		case err.Error() != logged:
			logged = err.Error()
			s.log.Warn("cannot look for runs that are stuck, trying again", "error", err)
		}
		interval := min(s.config.StuckAfter/4, 5*time.Minute)
		timer := time.NewTimer(interval*3/4 + rand.N(interval/2+1))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}

type stuckSweeper struct {
	*Speckit
	runs   StuckRuns
	queues Queues
	// seen are the runs that seemed stuck at the last sweep, with the time at which they
	// have changed last.
	seen map[string]time.Time
}

func (s *stuckSweeper) sweep(ctx context.Context) error {
	list, err := s.runs.ListStuckSpecRuns(ctx, s.config.StuckAfter)
	before := s.seen
	s.seen = map[string]time.Time{}
	if err != nil || len(list) == 0 {
		return err
	}
	for _, name := range s.config.Queues() {
		if ready, err := s.depth(ctx, name); err != nil || ready > 0 {
			return err // a message may be that of any run
		}
	}
	mine := map[string]bool{}
	for _, m := range s.queues.Unacked() {
		mine[runOf(m)] = true
	}
	for _, run := range list {
		if mine[run.ID] {
			continue
		}
		if run.Queue != "" && !slices.Contains(s.config.Queues(), run.Queue) {
			if ready, err := s.depth(ctx, run.Queue); err != nil || ready > 0 {
				continue // another worker's queue
			}
		}
		if since, again := before[run.ID]; !again || !since.Equal(run.Since) {
			s.seen[run.ID] = run.Since
			continue
		}
		reason := fmt.Sprintf("The run was lost: nothing has changed since %s, no worker has a task of it, and its queues are empty. Its message was lost, or never published. Retry it with: mm-orchestrator spec retry %s",
			run.Since.UTC().Format("2006-01-02 15:04:05 UTC"), run.ID)
		failed, err := s.runs.FailStuckSpecRun(ctx, run, reason)
		if err != nil {
			return err
		}
		if failed {
			s.log.Error("run was lost", "run_id", run.ID, "feature", run.FeatureKey, "error", reason)
		}
	}
	return nil
}

func (s *stuckSweeper) depth(ctx context.Context, name string) (int, error) {
	limited, cancel := context.WithTimeout(ctx, depthTimeout)
	defer cancel()
	return s.queues.QueueDepth(limited, name)
}

// runOf returns the run of a message, or "".
func runOf(m *protocol.Message) string {
	if len(m.Args) == 0 {
		return ""
	}
	if context, err := parseObject(m.Args[0]); err == nil {
		return pythonText(context, "run_id")
	}
	id := newObject()
	id.setRaw("id", m.Args[0])
	return id.text("id")
}
