package speckit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/internal/spectest"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// queueState is what a broker says.
type queueState struct {
	ready   map[string]int
	err     error
	unacked []*protocol.Message
}

func (q *queueState) QueueDepth(_ context.Context, name string) (int, error) {
	return q.ready[name], q.err
}
func (q *queueState) Unacked() []*protocol.Message { return q.unacked }

// A run whose message was lost fails with the reason, and its feature is free again.
func TestARunThatIsStuckFails(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		// change makes the run one that is not stuck.
		change func(c *chain, q *queueState)
		stuck  bool
	}{
		"lost":               {func(*chain, *queueState) {}, true},
		"a message waits":    {func(_ *chain, q *queueState) { q.ready["codex-1"] = 1 }, false},
		"the broker is away": {func(_ *chain, q *queueState) { q.err = errors.New("no connection") }, false},
		"this worker has a message": {func(_ *chain, q *queueState) {
			q.unacked = []*protocol.Message{{Args: []json.RawMessage{json.RawMessage(`{"run_id":"` + recordedRun + `"}`)}}}
		}, false},
		"another run's message": {func(_ *chain, q *queueState) {
			q.unacked = []*protocol.Message{{Args: []json.RawMessage{json.RawMessage(`"other"`)}}}
		}, true},
		"its end was recorded": {func(c *chain, _ *queueState) {
			c.exec(`UPDATE spec_workflow_runs SET status = 'succeeded' RETURNING id`)
		}, false},
		"it goes on": {func(c *chain, _ *queueState) {
			c.exec(`UPDATE spec_workflow_task_states SET message = 'still at work' RETURNING id`)
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newChain(t, spectest.Tasks(), func(c *Config) { c.StuckAfter = time.Hour })
			c.ok(c.discover(discoverArgs{}))
			c.age(2 * time.Hour)
			queues := &queueState{ready: map[string]int{}}
			s := stuckSweeper{Speckit: c.speckit(), runs: c.db.Open(t), queues: queues, seen: map[string]time.Time{}}
			if err := s.sweep(t.Context()); err != nil {
				t.Fatal(err)
			}
			if run := c.run(); run["status"] != "running" {
				t.Errorf("after one sweep: %v", run["status"])
			}
			test.change(c, queues)
			if err := s.sweep(t.Context()); !errors.Is(err, queues.err) {
				t.Error(err)
			}
			run := c.run()
			if got := run["status"] == "failed"; got != test.stuck {
				t.Fatalf("failed: %v, want %v: %v", got, test.stuck, run)
			}
			if !test.stuck {
				return
			}
			state := c.state(store.SpecSubmit, 1)
			message := fmt.Sprint(state["message"])
			if run["finished_at"] == nil || state["status"] != "failed" || state["finished_at"] == nil || !strings.HasPrefix(message, "The run was lost: nothing has changed since ") || !strings.Contains(message, "spec retry "+recordedRun) {
				t.Errorf("run %v, row %v", run, state)
			}
			if code := c.exec(`SELECT payload->>'code' AS code FROM spec_workflow_task_states WHERE task_name = 'submit_codex_job'`)[0]["code"]; code != "run_lost" {
				t.Errorf("code %v", code)
			}
			if err := c.db.Open(t, func(config *store.Config) { config.URL = secret.New(c.db.OwnerURL) }).CreateSpecRun(t.Context(), store.NewSpecRun{ID: "7e5b9f7a-3d76-4cb2-9b1b-3f2f4e2b1a11", FeatureKey: feature}); err != nil {
				t.Errorf("the feature is not free: %v", err)
			}
		})
	}
}

// A run that a live worker is at is not stuck, however long that takes; after the end of
// that worker its message is delivered again, or else it is stuck.
func TestARunThatAWorkerIsAtIsNotStuck(t *testing.T) {
	t.Parallel()
	c := newChain(t, spectest.Tasks())
	at := c.db.Open(t)
	decision, err := at.BeginSpec(t.Context(), store.SpecRequest{RunID: recordedRun, Task: store.SpecDiscover, Attempt: 1, TaskID: "t"}, func(store.SpecStart) store.SpecWrite { return store.SpecWrite{Status: store.SpecRunRunning} })
	if err != nil {
		t.Fatal(err)
	}
	c.age(2 * time.Hour)
	other := c.db.Open(t)
	if list, err := other.ListStuckSpecRuns(t.Context(), time.Hour); err != nil || len(list) != 0 {
		t.Errorf("while the worker is alive: %v, %v", list, err)
	}
	if err := at.ReleaseSpec(t.Context(), decision.(store.SpecStart).Claim); err != nil {
		t.Fatal(err)
	}
	list, err := other.ListStuckSpecRuns(t.Context(), time.Hour)
	if err != nil || len(list) != 1 {
		t.Fatalf("after its end: %v, %v", list, err)
	}
	// A worker that takes the task meanwhile keeps the run.
	if _, err := at.BeginSpec(t.Context(), store.SpecRequest{RunID: recordedRun, Task: store.SpecDiscover, Attempt: 1, TaskID: "t"}, func(store.SpecStart) store.SpecWrite { return store.SpecWrite{} }); err != nil {
		t.Fatal(err)
	}
	if failed, err := other.FailStuckSpecRun(t.Context(), list[0], "lost"); failed || err != nil {
		t.Errorf("failed: %v, %v", failed, err)
	}
}

// age makes everything of the run older.
func (c *chain) age(by time.Duration) {
	c.t.Helper()
	for _, sql := range []string{
		`UPDATE mm_orchestrator.spec_claims SET started_at = started_at - $1::interval, finished_at = finished_at - $1::interval`,
		`ALTER TABLE spec_workflow_runs DISABLE TRIGGER USER`,
		`ALTER TABLE spec_workflow_task_states DISABLE TRIGGER USER`,
		`UPDATE spec_workflow_runs SET created_at = created_at - $1::interval, updated_at = updated_at - $1::interval`,
		`UPDATE spec_workflow_task_states SET created_at = created_at - $1::interval, updated_at = updated_at - $1::interval`,
		`ALTER TABLE spec_workflow_runs ENABLE TRIGGER USER`,
		`ALTER TABLE spec_workflow_task_states ENABLE TRIGGER USER`,
	} {
		var args []any
		if strings.Contains(sql, "$1") {
			args = []any{by}
		}
		if _, err := c.db.Pool.Exec(c.t.Context(), sql, args...); err != nil {
			c.t.Fatal(err)
		}
	}
}
