package speckit

import (
	"context"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/speckit/preflight"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// hungChecks counts when a task was taken for stuck.
type hungChecks struct {
	*Speckit
	// waits are the moments at which it waits for a program or a server, works those at
	// which it does not; stuckWaits and stuckWorks are those of them at which it is stuck.
	waits, stuckWaits, works, stuckWorks atomic.Int64
}

func (h *hungChecks) waiting() {
	h.waits.Add(1)
	if h.Stuck(0) != nil {
		h.stuckWaits.Add(1)
	}
}

// watchedRuns and watchedChecks look at it during a write and a check.
type watchedRuns struct {
	Runs
	seen *hungChecks
}

func (r *watchedRuns) WriteSpec(ctx context.Context, claim store.SpecClaim, write store.SpecWrite) error {
	r.seen.works.Add(1)
	if err := r.seen.Stuck(0); err != nil && strings.HasPrefix(err.Error(), "task apply_and_publish of run "+recordedRun+" has made no progress for ") {
		r.seen.stuckWorks.Add(1)
	}
	return r.Runs.WriteSpec(ctx, claim, write)
}

type watchedChecks struct {
	Preflight
	seen *hungChecks
}

func (c *watchedChecks) Check(ctx context.Context, request preflight.Request) (preflight.Report, error) {
	c.seen.waiting()
	return c.Preflight.Check(ctx, request)
}

// A task that waits for git, GitHub or a check is not stuck, and one that does anything else
// is, after a time.
func TestATaskThatWaitsIsNotStuck(t *testing.T) {
	t.Parallel()
	seen := &hungChecks{}
	p := newPublishChain(t, func(c *Config) {
		c.Runs, c.Preflight = &watchedRuns{c.Runs, seen}, &watchedChecks{c.Preflight, seen}
	})
	p.store("drei")
	seen.Speckit = p.speckit()
	p.server.Intercept(func(http.ResponseWriter, *http.Request) bool {
		seen.waiting()
		return false
	})
	p.pulls.after = seen.waiting
	if _, err := seen.publish(worker.ContextWithTask(t.Context(), &worker.Task{Message: &protocol.Message{ID: "task-1"}}), contextArgs{p.context(1)}); err != nil {
		t.Fatal(err)
	}
	if n := seen.waits.Load(); n < 5 || seen.stuckWaits.Load() > 0 {
		t.Errorf("of %d waits, %d are taken for stuck", n, seen.stuckWaits.Load())
	}
	if n := seen.works.Load(); n < 4 || seen.stuckWorks.Load() < n {
		t.Errorf("of %d writes, %d would be told", n, seen.stuckWorks.Load())
	}
	if err := seen.Stuck(0); err != nil {
		t.Errorf("after its end: %v", err)
	}
}
