package store_test

import (
	"errors"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// A run that has not begun fails at once and for good, and its message is
// answered with the failure.
func TestRevokeBeforeTheFirstStep(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	run := d.Create(t, storetest.Seed{})
	got, err := s.RevokeRun(t.Context(), store.Revocation{RunID: run, Reason: "wrong\x00 branch", By: "ann@box"})
	if err != nil || !got.Ended || got.TooLate || got.PreviousStatus != store.RunPending {
		t.Fatalf("%+v %v", got, err)
	}
	row, err := s.FindRun(t.Context(), run)
	if err != nil || row.Status != store.RunFailed || row.CompletedAt == nil || row.StartedAt == nil {
		t.Errorf("run %+v %v", row, err)
	}
	const text = "Revoked by operator ann@box: wrong branch"
	detail, err := s.FindRunDetail(t.Context(), run)
	if err != nil {
		t.Fatal(err)
	}
	for _, state := range detail.States {
		want := ""
		if state.Step == store.StepAnalyze {
			want = text
			if state.Status != "failed" || state.StartedAt != nil || state.CeleryTaskID != "" {
				t.Errorf("%+v", state)
			}
		}
		if state.Message != want {
			t.Errorf("%s has message %q", state.Step, state.Message)
		}
	}
	done, is := begun(t, s, run, store.StepAnalyze, "a").(store.Done)
	if !is || done.Outcome.Message != text || done.Outcome.ErrorType != "TaskRevokedError" {
		t.Errorf("%+v", done)
	}
	if stop, is := begun(t, s, run, store.StepRollback, "r").(store.Stop); !is {
		t.Errorf("rollback: %+v", stop)
	}
	if got, err := s.RevokeRun(t.Context(), store.Revocation{RunID: run}); err != nil || !got.TooLate || got.PreviousStatus != store.RunFailed {
		t.Errorf("again: %+v %v", got, err)
	}
}

// A run that only Python workers have had stays running if its message is lost: no
// sweep finds it, and the API retries no run that is running. An operator ends it.
func TestRevokeALostRunOfAPythonWorker(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	run := d.Create(t, storetest.Seed{})
	d.Rows(t, `UPDATE orchestrator_runs SET status = 'running', started_at = now() + interval '1 hour' WHERE id = $1 RETURNING id`, run)
	d.Rows(t, `UPDATE spec_workflow_task_states SET plan_step_status = 'succeeded', status = 'succeeded', celery_task_id = 'py', started_at = now(), finished_at = now()
		WHERE orchestrator_run_id = $1 AND plan_step = 'analyze' RETURNING id`, run)
	if got, err := s.RevokeRun(t.Context(), store.Revocation{RunID: run}); err != nil || got.Ended {
		t.Fatalf("not lost: %+v %v", got, err)
	}

	lost := store.Revocation{RunID: run, Reason: "its worker is gone", By: "ann@box", Lost: true}
	tx, err := d.Pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), `UPDATE orchestrator_runs SET updated_at = now() WHERE id = $1`, run); err != nil {
		t.Fatal(err)
	}
	if _, err := s.RevokeRun(t.Context(), lost); !errors.Is(err, store.ErrLocked) {
		t.Errorf("during a step: %v", err)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}

	got, err := s.RevokeRun(t.Context(), lost)
	if err != nil || !got.Ended || got.PreviousStatus != store.RunRunning || len(got.Succeeded) != 1 {
		t.Fatalf("%+v %v", got, err)
	}
	row, err := s.FindRun(t.Context(), run)
	if err != nil || row.Status != store.RunFailed || row.CompletedAt == nil || !row.CompletedAt.Equal(*row.StartedAt) {
		t.Errorf("run %+v %v", row, err)
	}
	if patch := d.State(t, run, store.StepPatch); patch["plan_step_status"] != "failed" || patch["message"] != "Revoked by operator ann@box: its worker is gone" {
		t.Errorf("patch %+v", patch)
	}
	notRevoked(t, s, run)
	d.Retry(t, run, store.StepAnalyze, "")
	begin(t, s, run, store.StepAnalyze, "b")
}

// A role may have a lock_timeout. Only a run that is said to be lost must not be in use;
// any other revocation is tried again.
func TestRevokeWaitsForALockedRun(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t, func(c *store.Config) {
		c.URL, c.RetryFor = secret.New(d.URL+"?options=-clock_timeout%3D20ms"), 200*time.Millisecond
	})
	run := d.Create(t, storetest.Seed{})
	tx, err := d.Pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), `UPDATE orchestrator_runs SET updated_at = now() WHERE id = $1`, run); err != nil {
		t.Fatal(err)
	}
	if _, err := s.RevokeRun(t.Context(), store.Revocation{RunID: run}); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("while the row is locked: %v", err)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, err := s.RevokeRun(t.Context(), store.Revocation{RunID: run}); err != nil || !got.Ended {
		t.Errorf("afterwards: %+v %v", got, err)
	}
}

// A run that a worker of this program has is not lost: it is ended and rolled back.
func TestRevokeARunThatIsNotLost(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	run := d.Create(t, storetest.Seed{})
	start := begin(t, s, run, store.StepAnalyze, "a")
	for range 2 {
		if _, err := s.RevokeRun(t.Context(), store.Revocation{RunID: run, Lost: true}); !errors.Is(err, store.ErrNotLost) {
			t.Errorf("%v", err)
		}
		if start.Claim.TaskID != "" {
			finish(t, s, start.Claim, store.Outcome{Status: store.StepSucceeded, Message: "m"})
			start.Claim.TaskID = ""
		}
	}
	if row, err := s.FindRun(t.Context(), run); err != nil || row.Status != store.RunRunning {
		t.Errorf("run %+v %v", row, err)
	}
}

// A run that awaits approval, though a step of it was run before (a Python
// worker runs what it is sent), fails at once as well: nothing is under way
// that could end it.
func TestRevokeWhileTheRunAwaitsApproval(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	run := d.Create(t, storetest.Seed{Gate: true})
	d.Rows(t, `UPDATE spec_workflow_task_states SET plan_step_status = 'succeeded', status = 'succeeded', started_at = now(), finished_at = now()
		WHERE orchestrator_run_id = '`+run+`' AND plan_step = 'analyze' RETURNING id`)
	got, err := s.RevokeRun(t.Context(), store.Revocation{RunID: run, Reason: "not now"})
	if err != nil || !got.Ended || got.PreviousStatus != store.RunAwaitingApproval || len(got.Succeeded) != 1 || got.Succeeded[0] != store.StepAnalyze {
		t.Fatalf("%+v %v", got, err)
	}
	if row, err := s.FindRun(t.Context(), run); err != nil || row.Status != store.RunFailed || row.CompletedAt == nil {
		t.Errorf("run %+v %v", row, err)
	}
	if patch := d.State(t, run, store.StepPatch); patch["plan_step_status"] != "failed" || patch["message"] != "Revoked by operator: not now" {
		t.Errorf("patch %+v", patch)
	}
	if analyze := d.State(t, run, store.StepAnalyze); analyze["plan_step_status"] != "succeeded" {
		t.Errorf("analyze %+v", analyze)
	}
	notRevoked(t, s, run)
}

// While a run is rolled back, or waits for it, nothing is stored.
func TestRevokeDuringARollback(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t, as("w1@box", 0))
	run := d.Create(t, storetest.Seed{})
	finish(t, s, starts(t, s, alone(run, store.StepAnalyze, "a")), bad(store.StepAnalyze))
	for _, worker := range []string{"", "w1@box"} {
		if worker != "" {
			starts(t, s, alone(run, store.StepRollback, "r"))
		}
		got, err := s.RevokeRun(t.Context(), store.Revocation{RunID: run})
		if err != nil || !got.RollingBack || !got.TooLate || got.Ended || got.Worker != worker || got.Alive != (worker != "") {
			t.Fatalf("%+v %v", got, err)
		}
		notRevoked(t, s, run)
	}
}

// The request stays until the run has failed, and a retry does not find it.
func TestRevokeWhileAStepRuns(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t, as("w1@box", 0))
	run := d.Create(t, storetest.Seed{})
	start, is := begun(t, s, run, store.StepAnalyze, "a").(store.Start)
	if !is || start.Revocation != nil {
		t.Fatalf("%+v", start)
	}
	if wish, err := s.CheckClaim(t.Context(), start.Claim); wish != nil || err != nil {
		t.Fatalf("%+v, %v", wish, err)
	}
	notRevoked(t, s, run)
	for _, reason := range []string{"x", "wrong branch"} {
		got, err := s.RevokeRun(t.Context(), store.Revocation{RunID: run, Reason: reason})
		if err != nil || got.Ended || got.TooLate || got.Step != store.StepAnalyze || !got.Alive || got.Worker != "w1@box" || got.PreviousStatus != store.RunRunning {
			t.Fatalf("%+v %v", got, err)
		}
	}
	wish, err := s.CheckClaim(t.Context(), start.Claim)
	if err != nil || wish == nil || wish.Text() != "Revoked by operator: wrong branch" {
		t.Fatalf("%+v %v", wish, err)
	}
	if detail, err := s.FindRunDetail(t.Context(), run); err != nil || detail.Revocation == nil || *detail.Revocation != *wish {
		t.Errorf("%+v %v", detail.Revocation, err)
	}
	// A worker that takes the step over, or runs the next one, knows it from the beginning.
	if err := s.ReleaseClaim(t.Context(), start.Claim); err != nil {
		t.Fatal(err)
	}
	if start, is = begun(t, s, run, store.StepAnalyze, "a").(store.Start); !is || start.Revocation == nil || *start.Revocation != *wish {
		t.Fatalf("%+v", start)
	}
	finished, err := s.FinishStep(t.Context(), start.Claim, store.Outcome{Status: store.StepFailed, Message: wish.Text()})
	if err != nil || finished.RunEnded || finished.Status != store.RunFailed {
		t.Fatalf("%+v %v", finished, err)
	}
	notRevoked(t, s, run)
	if _, is := begun(t, s, run, store.StepRollback, "r").(store.Start); !is {
		t.Error("no rollback follows")
	}
}

func TestRevokeOfNoRun(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	if _, err := s.RevokeRun(t.Context(), store.Revocation{RunID: "x"}); !errors.Is(err, store.ErrInvalid) {
		t.Error(err)
	}
	if _, err := s.RevokeRun(t.Context(), store.Revocation{RunID: "00000000-0000-4000-8000-000000000000"}); !errors.Is(err, store.ErrNotFound) {
		t.Error(err)
	}
}

func begun(t *testing.T, s *store.Store, run string, step store.Step, task string) store.Decision {
	t.Helper()
	decision, err := s.BeginStep(t.Context(), alone(run, step, task))
	if err != nil {
		t.Fatal(err)
	}
	return decision
}

func notRevoked(t *testing.T, s *store.Store, run string) {
	t.Helper()
	if detail, err := s.FindRunDetail(t.Context(), run); err != nil || detail.Revocation != nil {
		t.Errorf("%+v, %v, want no request to end the run", detail.Revocation, err)
	}
}
