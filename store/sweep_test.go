package store_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

func rollbackMessage(run store.Run, root, parent string) (string, protocol.Delivery, error) {
	return "rollback-1", protocol.Delivery{Body: []byte(root + " " + parent)}, nil
}

// suspect is what a sweep would say now of a run.
func suspect(t testing.TB, s *store.Store, run string, grace time.Duration) store.Suspect {
	t.Helper()
	found := store.Suspect{Workspace: "w", Queue: "q", RunID: run, Grace: grace}
	for _, w := range workspaces(t, s) {
		if w.RunID == run {
			found.Version = w.Version
		}
	}
	return found
}

func failLost(t testing.TB, s *store.Store, run string, grace time.Duration) *store.LostRun {
	t.Helper()
	lost, err := s.FailLost(t.Context(), suspect(t, s, run, grace), rollbackMessage)
	if err != nil {
		t.Fatal(err)
	}
	return lost
}

func workspaces(t testing.TB, s *store.Store, inHand ...string) []store.WorkspaceState {
	t.Helper()
	list, err := s.ListWorkspaces(t.Context(), "q", inHand)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func TestListWorkspaces(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	first, second := d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{})
	if list := workspaces(t, s); len(list) != 0 {
		t.Errorf("%+v", list)
	}
	claim := starts(t, s, shared("w", first, store.StepBuild, "1"))
	waits(t, s, shared("w", first, store.StepBuild, "1"), store.ParkedBusy)
	waits(t, s, shared("w", second, store.StepBuild, "2"), store.ParkedWorkspace)
	list := workspaces(t, s)
	if len(list) != 1 {
		t.Fatalf("%+v", list)
	}
	w := list[0]
	if w.Workspace != "w" || w.RunID != first || w.RunStatus != store.RunRunning || !w.RunGoesOn || !w.Working || !w.Parked || !w.Waiting ||
		w.Idle < 0 || w.Idle > 10*time.Second {
		t.Errorf("%+v", w)
	}
	finish(t, s, claim, good(store.StepBuild))
	d.Rows(t, `UPDATE mm_orchestrator.holds SET seen_at = now() - interval '1 hour' RETURNING queue`)
	if w := workspaces(t, s, second, "no id")[0]; w.Working || w.Idle < time.Hour {
		t.Errorf("%+v", w)
	}
	if w := workspaces(t, s, second, first)[0]; w.Idle > time.Minute {
		t.Errorf("unacknowledged, and %+v", w)
	}
	if other, err := s.ListWorkspaces(t.Context(), "other", nil); err != nil || len(other) != 0 {
		t.Errorf("%+v, %v", other, err)
	}
}

func TestLostRunIsFailedAndRolledBackOnce(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		dies  bool // in the step, not between two
		step  store.Step
		words string
	}{
		{"between two steps", false, store.StepRestart, "step restart did not begin"},
		{"in a step", true, store.StepBuild, "step build was in progress on worker dying"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			d := storetest.New(t)
			dying := d.Open(t, as("dying", time.Minute))
			run, next := d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{})
			pass := []store.Step{store.StepAnalyze, store.StepPatch, store.StepBuild}
			if c.dies {
				pass = pass[:2]
			}
			for _, step := range pass {
				finish(t, dying, starts(t, dying, shared("w", run, step, "t-"+string(step))), good(step))
			}
			var claim store.Claim
			if c.dies {
				claim = starts(t, dying, shared("w", run, store.StepBuild, "t-build"))
			}
			s := d.Open(t, as("successor", 0))
			waits(t, s, shared("w", next, store.StepAnalyze, "next"), store.ParkedWorkspace)
			if c.dies {
				if lost := failLost(t, s, run, 0); lost != nil {
					t.Errorf("a live worker's: %+v", lost)
				}
				dying.Close()
				waitFor(t, "the worker is seen dead", func() bool { return !workspaces(t, s)[0].Working })
			}
			if lost := failLost(t, s, run, time.Minute); lost != nil {
				t.Errorf("within the grace: %+v", lost)
			}
			if lost := failLost(t, s, next, 0); lost != nil {
				t.Errorf("one that waits: %+v", lost)
			}
			lost := failLost(t, s, run, 0)
			if lost == nil || lost.Step != c.step || !lost.RollbackSent || lost.Finished.Status != store.RunFailed || lost.Finished.RunEnded ||
				!strings.Contains(lost.Message, "run was lost: "+c.words) {
				t.Fatalf("%+v", lost)
			}
			records := goodTrail(t, s, run)
			if r := records[len(records)-2]; r.Kind != audit.Lost || r.Step != string(c.step) || r.Text != lost.Message || records[len(records)-1].Kind != audit.StepEnded {
				t.Errorf("record of the loss: %+v", r)
			}
			if again := failLost(t, s, run, 0); again != nil {
				t.Errorf("again: %+v", again)
			}
			state := d.State(t, run, c.step)
			equal(t, "state", []any{state["plan_step_status"], state["status"], state["celery_state"], state["message"]}, []any{"failed", "failed", "FAILURE", lost.Message})
			if c.dies {
				if _, err := s.FinishStep(t.Context(), claim, good(store.StepBuild)); !errors.Is(err, store.ErrClaimLost) {
					t.Errorf("a late end: %v", err)
				}
				if done, ok := ask(t, s, shared("w", run, store.StepBuild, "t-build")).(store.Done); !ok || done.Outcome.Status != store.StepFailed {
					t.Errorf("a late delivery: %+v", done)
				}
			}
			messages := take(t, s, "q")
			if len(messages) != 1 || messages[0].TaskID != "rollback-1" || messages[0].Why != store.ParkedLost || !strings.HasPrefix(string(messages[0].Body), "root-"+run) {
				t.Fatalf("%+v", messages)
			}
			claim = starts(t, s, shared("w", run, store.StepRollback, "rollback-1"))
			if err := s.DropParked(t.Context(), messages[0].ID); err != nil {
				t.Fatal(err)
			}
			if f := finish(t, s, claim, good(store.StepRollback)); f.Status != store.RunRolledBack || !f.ParkedReady {
				t.Errorf("%+v", f)
			}
			if done, ok := ask(t, s, shared("w", run, store.StepRollback, "another")).(store.Done); !ok {
				t.Errorf("a second rollback: %+v", done)
			}
			if ids := taken(t, s, "q"); ids != "next" {
				t.Errorf("published %q", ids)
			}
		})
	}
}

func TestLostRollbackIsSentAgain(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	run := d.Create(t, storetest.Seed{})
	finish(t, s, starts(t, s, shared("w", run, store.StepBuild, "b")), bad(store.StepBuild))
	before := d.State(t, run, store.StepBuild)
	if lost := failLost(t, s, run, 0); lost == nil || lost.Step != "" || !lost.RollbackSent {
		t.Fatalf("%+v", lost)
	}
	equal(t, "the failed step", d.State(t, run, store.StepBuild), before)
	if ids := taken(t, s, "q"); ids != "rollback-1" {
		t.Errorf("published %q", ids)
	}
	starts(t, s, shared("w", run, store.StepRollback, "rollback-1"))
}

func TestLostRunWithoutRollbackEnds(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	run, next := d.Create(t, storetest.Seed{Plan: []byte(`[{"name": "analyze"}, {"name": "build"}]`)}), d.Create(t, storetest.Seed{})
	finish(t, s, starts(t, s, shared("w", run, store.StepAnalyze, "a")), good(store.StepAnalyze))
	waits(t, s, shared("w", next, store.StepAnalyze, "n"), store.ParkedWorkspace)
	if lost := failLost(t, s, run, 0); lost == nil || lost.Step != store.StepBuild || lost.RollbackSent || !lost.Finished.RunEnded || !lost.Finished.ParkedReady {
		t.Fatalf("%+v", lost)
	}
	if ids := taken(t, s, "q"); ids != "n" {
		t.Errorf("published %q", ids)
	}
}

func TestPassWorkspace(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	holder, next := d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{})
	now := func() any {
		return d.Rows(t, `SELECT run_id FROM mm_orchestrator.holds`)[0]["run_id"]
	}
	pass := func(run string) any {
		if err := s.PassWorkspace(t.Context(), "w", run); err != nil {
			t.Fatal(err)
		}
		return now()
	}
	passPending := func(found store.Suspect) any {
		if err := s.PassPending(t.Context(), found); err != nil {
			t.Fatal(err)
		}
		return now()
	}
	claim := starts(t, s, shared("w", holder, store.StepBuild, "h"))
	waits(t, s, shared("w", next, store.StepBuild, "n"), store.ParkedWorkspace)
	equal(t, "a run at work", pass(holder), holder)
	equal(t, "a run at work is not pending", passPending(suspect(t, s, holder, 0)), holder)
	finish(t, s, claim, bad(store.StepBuild))
	equal(t, "a run that waits for its rollback", pass(holder), holder)
	before := suspect(t, s, holder, 0)
	d.Retry(t, holder, store.StepBuild, "")
	equal(t, "a retried run", pass(holder), holder)
	equal(t, "a retried run within the grace", passPending(suspect(t, s, holder, time.Minute)), holder)
	equal(t, "one that was retried after the look", passPending(before), holder)
	equal(t, "seen by somebody else", passPending(suspect(t, s, next, 0)), holder)
	equal(t, "a retried run whose message never came", passPending(suspect(t, s, holder, 0)), next)
	d.Rows(t, `DELETE FROM spec_workflow_task_states WHERE orchestrator_run_id = $1 RETURNING id`, next)
	d.Rows(t, `DELETE FROM orchestrator_runs WHERE id = $1 RETURNING id`, next)
	equal(t, "a run that is gone", pass(next), nil)
	equal(t, "nobody's, nobody waits", pass(""), nil)
	starts(t, s, shared("w", holder, store.StepBuild, "h2"))
}

// TestALongStepIsSeen: a worker that runs a step of one run may have a message of
// another run.
func TestALongStepIsSeen(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	run, other := d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{})
	finish(t, s, starts(t, s, shared("w", run, store.StepAnalyze, "a")), good(store.StepAnalyze))
	if w := workspaces(t, s)[0]; w.LongStep {
		t.Errorf("nobody is at a step: %+v", w)
	}
	tx, err := d.Pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(t.Context()) }()
	if _, err := tx.Exec(t.Context(), `UPDATE spec_workflow_task_states SET status = 'running' WHERE orchestrator_run_id = $1 AND plan_step = 'patch'`, other); err != nil {
		t.Fatal(err)
	}
	// A transaction that has just begun is no long one.
	waitFor(t, "the step of the other run is long", func() bool { return workspaces(t, s)[0].LongStep })
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if w := workspaces(t, s)[0]; w.LongStep {
		t.Errorf("the step is over: %+v", w)
	}
}

// TestARunInSomebodysHandIsNotLost: MoonMind's Python worker does a whole step
// in one transaction, of which nobody sees anything before the commit. While it
// lasts, and when it has just ended, the run is neither lost nor loses its
// workspace, and whoever looks does not wait.
func TestARunInSomebodysHandIsNotLost(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		// does is what the transaction does to the run $1.
		does string
		// retried runs are pending.
		retried bool
	}{
		{"its state is updated", `UPDATE spec_workflow_task_states SET status = 'running' WHERE orchestrator_run_id = $1 AND plan_step = 'patch'`, false},
		{"a state is inserted", `
			INSERT INTO spec_workflow_task_states (id, orchestrator_run_id, plan_step, attempt, task_name, status, plan_step_status)
			VALUES (gen_random_uuid(), $1, 'patch', 7, 'patch', 'running', 'in_progress')`, false},
		{"the run is updated", `UPDATE orchestrator_runs SET updated_at = now() WHERE id = $1`, false},
		{"a retried run begins", `UPDATE orchestrator_runs SET status = 'running' WHERE id = $1`, true},
		{"a state of a retried run is inserted", `
			INSERT INTO spec_workflow_task_states (id, orchestrator_run_id, plan_step, attempt, task_name, status, plan_step_status)
			VALUES (gen_random_uuid(), $1, 'analyze', 1, 'analyze', 'running', 'in_progress')`, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			d := storetest.New(t)
			s := d.Open(t)
			run, next := d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{})
			finish(t, s, starts(t, s, shared("w", run, store.StepAnalyze, "a")), good(store.StepAnalyze))
			waits(t, s, shared("w", next, store.StepAnalyze, "n"), store.ParkedWorkspace)
			if c.retried {
				finish(t, s, starts(t, s, shared("w", run, store.StepPatch, "p")), bad(store.StepPatch))
				d.Retry(t, run, store.StepAnalyze, "")
			}
			found := suspect(t, s, run, 0)
			rows := func() []map[string]any {
				return d.Rows(t, `SELECT r.status, h.run_id AS holder, (SELECT count(*) FROM mm_orchestrator.parked) AS parked
					FROM orchestrator_runs AS r, mm_orchestrator.holds AS h WHERE r.id = $1`, run)
			}
			end := func() error {
				if c.retried {
					return s.PassPending(t.Context(), found)
				}
				lost, err := s.FailLost(t.Context(), found, rollbackMessage)
				if lost != nil {
					t.Errorf("%+v", lost)
				}
				return err
			}
			before := rows()
			tx, err := d.Pool.Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = tx.Rollback(t.Context()) }()
			if _, err := tx.Exec(t.Context(), c.does, run); err != nil {
				t.Fatal(err)
			}
			// It must not wait for the one who, in this test, waits for it.
			if err := end(); !errors.Is(err, store.ErrLocked) {
				t.Errorf("while the transaction lasts: %v", err)
			}
			equal(t, "while the transaction lasts", rows(), before)
			if err := tx.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
			before = rows()
			if err := end(); err != nil {
				t.Errorf("after the commit: %v", err)
			}
			equal(t, "after the commit", rows(), before)
			// A suspicion that begins after it finds the run lost again.
			if !c.retried {
				if lost := failLost(t, s, run, 0); lost == nil {
					t.Error("it is never lost any more")
				}
			}
		})
	}
}
