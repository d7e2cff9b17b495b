package store_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// succeed carries a run through all steps in workspace w, with a record of its change.
func succeed(t *testing.T, s *store.Store, run string) {
	t.Helper()
	for _, step := range toVerify {
		claim := starts(t, s, shared("w", run, step, run+"-"+string(step)))
		if step == store.StepPatch {
			if err := s.RecordChange(t.Context(), claim, json.RawMessage(`{"version":1}`)); err != nil {
				t.Fatal(err)
			}
		}
		finish(t, s, claim, good(step))
	}
}

func requestRollback(t *testing.T, s *store.Store, queue, run string) store.RequestedRollback {
	t.Helper()
	r, err := s.RequestRollback(t.Context(), queue, store.RollbackRequest{RunID: run, Reason: "slower", By: "ann@box"},
		func(run store.Run, root, parent string) (string, protocol.Delivery, error) {
			return "requested-" + run.ID, protocol.Delivery{Headers: map[string]any{"id": "x"}, Body: []byte("[]")}, nil
		})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// obstructed requests a rollback that must change nothing, and returns why.
func obstructed(t *testing.T, d *storetest.Database, s *store.Store, queue, run string) string {
	t.Helper()
	before, states := d.Run(t, run), d.States(t, run)
	r := requestRollback(t, s, queue, run)
	if len(r.Obstacles) == 0 {
		t.Fatalf("nothing stands in the way: %+v", r)
	}
	equal(t, "run", d.Run(t, run), before)
	equal(t, "states", d.States(t, run), states)
	equal(t, "parked", len(d.Rows(t, `SELECT 1 FROM mm_orchestrator.parked WHERE why = 'requested'`)), 0)
	return strings.Join(r.Obstacles, "; ")
}

// A run that has succeeded is rolled back by request as a failed one is: the rollback
// becomes due, is published, runs once, and the rows are those of a run that was rolled
// back.
func TestSucceededRunIsRolledBackByRequest(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s, other := d.Open(t), d.Open(t, as("other", 0))
	run := d.Create(t, storetest.Seed{})
	succeed(t, s, run)
	if stop, is := ask(t, s, shared("w", run, store.StepRollback, "stale")).(store.Stop); !is {
		t.Errorf("before the request a rollback is answered with %+v", stop)
	}
	r := requestRollback(t, s, "q", run)
	if len(r.Obstacles) > 0 || r.Already || r.PreviousStatus != store.RunSucceeded || r.CompletedAt.IsZero() {
		t.Fatalf("%+v", r)
	}
	row := d.Run(t, run)
	if row["status"] != "failed" || row["completed_at"] != nil || strings.Contains(string(mustJSON(t, row["metrics_snapshot"])), `"run"`) {
		t.Errorf("run %v", row)
	}
	if state := d.State(t, run, store.StepRollback); state["plan_step_status"] != "pending" || state["finished_at"] != nil || !strings.HasPrefix(state["message"].(string), "Rollback requested by ann@box at 2") {
		t.Errorf("rollback %v", state)
	}
	// It has the workspace: no other run begins there in between.
	next := d.Create(t, storetest.Seed{Priority: "high"})
	waits(t, other, shared("w", next, store.StepAnalyze, "next"), store.ParkedWorkspace)
	if again := requestRollback(t, other, "q", run); !again.Already || again.By != "ann@box" || again.Reason != "slower" {
		t.Errorf("a second request: %+v", again)
	}
	equal(t, "audit", d.Rows(t, `SELECT record::json ->> 'by' AS by, record::json ->> 'text' AS text FROM mm_orchestrator.audit WHERE run_id = $1 AND record::json ->> 'kind' = 'rollback-requested'`, run),
		[]storetest.Row{{"by": "ann@box", "text": "slower"}})
	equal(t, "published", taken(t, s, "q"), "requested-"+run)
	start, is := ask(t, other, shared("w", run, store.StepRollback, "requested-"+run)).(store.Start)
	if !is || start.RollbackRequest == nil || start.RollbackRequest.Reason != "slower" || string(start.Change.Record) != `{"version":1}` {
		t.Fatalf("start %+v", start)
	}
	if f := finish(t, other, start.Claim, good(store.StepRollback)); f.Status != store.RunRolledBack || !f.RunEnded {
		t.Errorf("finished %+v", f)
	}
	row = d.Run(t, run)
	if row["status"] != "rolled_back" || row["completed_at"] == nil {
		t.Errorf("run %v", row)
	}
	equal(t, "published", taken(t, s, "q"), "next")
	if revoked, err := s.RevokeRun(t.Context(), store.Revocation{RunID: next}); err != nil || !revoked.Ended {
		t.Errorf("%+v, %v", revoked, err) // it gives the workspace up
	}
	detail, err := s.FindRunDetail(t.Context(), run)
	if err != nil || detail.RollbackRequest == nil || detail.RollbackRequest.PreviousStatus != store.RunSucceeded {
		t.Errorf("%+v, %v", detail.RollbackRequest, err)
	}
	if why := obstructed(t, d, s, "q", run); why != "it is rolled back already" {
		t.Errorf("again: %s", why)
	}
	// A rollback that fails is no longer requested after a retry.
	d.Retry(t, run, store.StepBuild, "")
	claim := starts(t, s, shared("w2", run, store.StepBuild, "build-again"))
	finish(t, s, claim, bad(store.StepBuild))
	start, is = ask(t, s, shared("w2", run, store.StepRollback, "of-the-retry")).(store.Start)
	if !is || start.RollbackRequest != nil {
		t.Errorf("the rollback of the retry: %+v", start)
	}
	// A rollback that has failed can be requested.
	if f := finish(t, s, start.Claim, bad(store.StepRollback)); f.Status != store.RunFailed || !f.RunEnded {
		t.Errorf("finished %+v", f)
	}
	if r := requestRollback(t, s, "q", run); len(r.Obstacles) > 0 || r.PreviousStatus != store.RunFailed {
		t.Errorf("after a failed rollback: %+v", r)
	}
}

func mustJSON(t *testing.T, value any) []byte {
	t.Helper()
	text, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// What stands in the way of a rollback by request, each case with its reason.
func TestWhatStandsInTheWayOfARollback(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	expect := func(run, queue, words string) {
		t.Helper()
		if why := obstructed(t, d, s, queue, run); !strings.Contains(why, words) {
			t.Errorf("%q, want %q", why, words)
		}
	}
	_, err := s.RequestRollback(t.Context(), "q", store.RollbackRequest{RunID: "5b0e6a52-3c1d-4f0e-9b7a-6a1f2d9c4e10"}, nil)
	if !errors.Is(err, store.ErrNotFound) {
		t.Errorf("no such run: %v", err)
	}
	pending := d.Create(t, storetest.Seed{})
	expect(pending, "q", "it is pending, and has not ended: `mm-orchestrator runs revoke`")
	failed := d.Create(t, storetest.Seed{TargetService: "other"})
	finish(t, s, begin(t, s, failed, store.StepAnalyze, "f").Claim, bad(store.StepAnalyze))
	expect(failed, "q", "its rollback is to come")

	run := d.Create(t, storetest.Seed{})
	succeed(t, s, run)
	expect(run, "another", "it belongs to queue q, and this is queue another")
	d.Rows(t, `UPDATE mm_orchestrator.changes SET ran_elsewhere = true WHERE run_id = $1 RETURNING run_id`, run)
	expect(run, "q", "a worker that keeps no record")
	d.Rows(t, `UPDATE mm_orchestrator.changes SET ran_elsewhere = false, reduced_at = now() WHERE run_id = $1 RETURNING run_id`, run)
	expect(run, "q", "what takes it back is not kept")
	d.Rows(t, `UPDATE mm_orchestrator.changes SET reduced_at = NULL WHERE run_id = $1 RETURNING run_id`, run)

	// A later run in the workspace: it holds it, it has ended, it was rolled back.
	newer := d.Create(t, storetest.Seed{TargetService: "other"})
	claim := starts(t, s, shared("w", newer, store.StepAnalyze, "n"))
	expect(run, "q", "run "+newer+" holds the workspace w")
	finish(t, s, claim, good(store.StepAnalyze))
	claim = starts(t, s, shared("w", newer, store.StepPatch, "n-patch"))
	finish(t, s, claim, bad(store.StepPatch))
	expect(run, "q", "run "+newer+" (failed) has begun to patch at 2")
	finish(t, s, starts(t, s, shared("w", newer, store.StepRollback, "n-rollback")), good(store.StepRollback))
	if r, err := s.RequestRollback(t.Context(), "q", store.RollbackRequest{RunID: run}, nil); err != nil || len(r.Obstacles) > 0 {
		t.Errorf("after the rollback of the later run: %+v, %v", r, err)
	}
	equal(t, "only looking changes nothing", d.Run(t, run)["status"], "succeeded")
	// A later run for the service elsewhere, as a Python worker runs it.
	python := d.Create(t, storetest.Seed{})
	d.Rows(t, `UPDATE spec_workflow_task_states SET started_at = now() + interval '1 second', plan_step_status = 'succeeded'
		WHERE orchestrator_run_id = $1 AND plan_step = 'restart' RETURNING id`, python)
	expect(run, "q", "run "+python+" (pending) has begun to restart at 2")
}
