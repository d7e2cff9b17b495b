package store_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

func recordChange(t *testing.T, s *store.Store, claim store.Claim, text string) {
	t.Helper()
	if err := s.RecordChange(t.Context(), claim, json.RawMessage(text)); err != nil {
		t.Fatal(err)
	}
}

// TestEveryLaterStepGetsTheRecord: whichever worker runs it, after whatever end of
// the step before, and after a retry.
func TestEveryLaterStepGetsTheRecord(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	first := d.Open(t, as("first", 0))
	start := begin(t, first, run, store.StepPatch, "t")
	equal(t, "change at the first start", start.Change, store.ChangeState{})
	equal(t, "row", d.Rows(t, `SELECT run_id, queue, workspace, record, ran_elsewhere, reduced_at FROM mm_orchestrator.changes`),
		[]storetest.Row{{"run_id": run, "queue": "q", "workspace": "q:/" + run, "record": nil, "ran_elsewhere": false, "reduced_at": nil}})
	recordChange(t, first, start.Claim, `{"version": 1,  "files": {"baseline": "ab"}}`)
	first.Close()

	second := d.Open(t, as("second", 0))
	for taken := false; !taken; {
		start, taken = decide(t, second, run, store.StepPatch, "t").(store.Start)
	}
	want := store.ChangeState{Record: json.RawMessage(`{"version": 1,  "files": {"baseline": "ab"}}`)}
	equal(t, "change of the successor", start.Change, want)
	finish(t, second, start.Claim, good(store.StepPatch))

	build := begin(t, second, run, store.StepBuild, "b")
	equal(t, "change at build", build.Change, want)
	recordChange(t, second, build.Claim, `{"version":2}`)
	recordChange(t, second, build.Claim, `{"version":3}`)
	finish(t, second, build.Claim, bad(store.StepBuild))
	want.Record = json.RawMessage(`{"version":3}`)
	rollback := begin(t, second, run, store.StepRollback, "r")
	equal(t, "change at rollback", rollback.Change, want)
	finish(t, second, rollback.Claim, good(store.StepRollback))

	d.Retry(t, run, store.StepBuild, "again")
	equal(t, "change at the retry", begin(t, second, run, store.StepBuild, "b2").Change, want)
	equal(t, "rows", len(d.Rows(t, `SELECT run_id FROM mm_orchestrator.changes`)), 1)
}

func TestTheRecordIsFenced(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	slow := d.Open(t, as("slow", 0))
	claim := begin(t, slow, run, store.StepPatch, "t").Claim
	recordChange(t, slow, claim, `{"of":"slow"}`)
	d.Rows(t, `UPDATE mm_orchestrator.claims SET holder = 7 WHERE run_id = $1 RETURNING step`, run)
	successor := d.Open(t, as("successor", 0))
	taken := begin(t, successor, run, store.StepPatch, "t")
	equal(t, "record", string(taken.Change.Record), `{"of":"slow"}`)
	refused := func(what string, claim store.Claim) {
		t.Helper()
		if err := slow.RecordChange(t.Context(), claim, json.RawMessage(`{"of":"nobody"}`)); !errors.Is(err, store.ErrClaimLost) {
			t.Errorf("%s: %v, want ErrClaimLost", what, err)
		}
	}
	refused("taken over", claim)
	recordChange(t, successor, taken.Claim, `{"of":"successor"}`)
	finish(t, successor, taken.Claim, good(store.StepPatch))
	refused("ended", taken.Claim)
	equal(t, "record", d.Rows(t, `SELECT record FROM mm_orchestrator.changes`), []storetest.Row{{"record": map[string]any{"of": "successor"}}})
}

func TestTheRecordIsAnObject(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	s := d.Open(t)
	claim := begin(t, s, run, store.StepPatch, "t").Claim
	for _, text := range []string{``, `null`, `[]`, `1`, `{`, `{}x`} {
		if err := s.RecordChange(t.Context(), claim, json.RawMessage(text)); !errors.Is(err, store.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", text, err)
		}
	}
	for values, constraint := range map[string]string{
		`'[]', now(), now(), NULL`:                   "changes_record_object",
		`NULL, now(), now() - interval '1 s', NULL`:  "changes_times",
		`NULL, now(), now(), now() - interval '1 s'`: "changes_times",
	} {
		_, err := d.Pool.Exec(t.Context(), `INSERT INTO mm_orchestrator.changes
			(run_id, queue, workspace, record, created_at, updated_at, reduced_at) VALUES (gen_random_uuid(), 'q', 'w', `+values+`)`)
		if err == nil || !strings.Contains(err.Error(), constraint) {
			t.Errorf("%s: %v, want %s", values, err, constraint)
		}
	}
}

// TestTheRecordSurvivesItsSchema: the schema is dropped and created again while a
// step runs.
func TestTheRecordSurvivesItsSchema(t *testing.T) {
	t.Parallel()
	d := remade(t)
	s := d.Open(t)
	run := d.Create(t, storetest.Seed{})
	request := shared("w", run, store.StepPatch, "1")
	request.Queue = "q"
	claim := starts(t, s, request)
	recordChange(t, s, claim, `{"n":1}`)
	dropOwnSchema(t, d)
	if err := s.RecordChange(t.Context(), claim, json.RawMessage(`{"n":2}`)); !errors.Is(err, store.ErrSchema) {
		t.Errorf("without the schema: %v", err)
	}
	migrate(t, s, store.MigrateOptions{})
	recordChange(t, s, claim, `{"n":2}`)
	equal(t, "row", d.Rows(t, `SELECT queue, workspace, record FROM mm_orchestrator.changes`),
		[]storetest.Row{{"queue": "q", "workspace": "w", "record": map[string]any{"n": 2.0}}})
	finish(t, s, claim, good(store.StepPatch))
}

// TestAStepThatAnotherProgramRan: what a Python worker leaves behind is no claim.
func TestAStepThatAnotherProgramRan(t *testing.T) {
	t.Parallel()
	python := func(t *testing.T, d *storetest.Database, run string, step store.Step) {
		t.Helper()
		d.Rows(t, `
			INSERT INTO spec_workflow_task_states AS s
			       (id, orchestrator_run_id, plan_step, attempt, task_name, status, plan_step_status, celery_state, celery_task_id, started_at, finished_at)
			VALUES (gen_random_uuid(), $1, $2::text::orchestratorplanstep, 1, $2::text, 'succeeded', 'succeeded', 'SUCCESS', 'python', now(), now())
			ON CONFLICT (orchestrator_run_id, plan_step, attempt) DO UPDATE
			SET plan_step_status = 'succeeded', celery_task_id = 'python', started_at = now(), finished_at = now()
			RETURNING id`, run, string(step))
	}
	for name, c := range map[string]struct {
		want bool
		ran  func(t *testing.T, d *storetest.Database, s *store.Store, run string)
	}{
		"nothing before": {false, func(*testing.T, *storetest.Database, *store.Store, string) {}},
		"its analyze": {false, func(t *testing.T, d *storetest.Database, _ *store.Store, run string) {
			python(t, d, run, store.StepAnalyze)
		}},
		"its patch": {true, func(t *testing.T, d *storetest.Database, _ *store.Store, run string) {
			python(t, d, run, store.StepPatch)
		}},
		"its patch, which was retried": {true, func(t *testing.T, d *storetest.Database, _ *store.Store, run string) {
			python(t, d, run, store.StepPatch)
			d.Retry(t, run, store.StepPatch, "again")
		}},
		"our patch": {false, func(t *testing.T, _ *storetest.Database, s *store.Store, run string) {
			finish(t, s, begin(t, s, run, store.StepPatch, "p").Claim, good(store.StepPatch))
		}},
		"our patch, started twice": {false, func(t *testing.T, _ *storetest.Database, s *store.Store, run string) {
			if err := s.ReleaseClaim(t.Context(), begin(t, s, run, store.StepPatch, "p").Claim); err != nil {
				t.Fatal(err)
			}
			finish(t, s, begin(t, s, run, store.StepPatch, "p").Claim, good(store.StepPatch))
		}},
		"our patch, failed, rolled back and retried": {false, func(t *testing.T, d *storetest.Database, s *store.Store, run string) {
			finish(t, s, begin(t, s, run, store.StepPatch, "p").Claim, bad(store.StepPatch))
			finish(t, s, begin(t, s, run, store.StepRollback, "r").Claim, good(store.StepRollback))
			d.Retry(t, run, store.StepPatch, "again")
			finish(t, s, begin(t, s, run, store.StepPatch, "p2").Claim, good(store.StepPatch))
		}},
		"our patch, and its repetition of it": {true, func(t *testing.T, d *storetest.Database, s *store.Store, run string) {
			finish(t, s, begin(t, s, run, store.StepPatch, "p").Claim, good(store.StepPatch))
			d.Retry(t, run, store.StepPatch, "again")
			d.Rows(t, `UPDATE spec_workflow_task_states SET attempt = 1 WHERE orchestrator_run_id = $1 AND plan_step = 'patch' RETURNING id`, run)
			python(t, d, run, store.StepPatch)
		}},
		"its build of the same message": {true, func(t *testing.T, d *storetest.Database, s *store.Store, run string) {
			if err := s.ReleaseClaim(t.Context(), begin(t, s, run, store.StepBuild, "python").Claim); err != nil {
				t.Fatal(err)
			}
			python(t, d, run, store.StepBuild)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := storetest.New(t)
			run := d.Create(t, storetest.Seed{})
			s := d.Open(t)
			c.ran(t, d, s, run)
			start := begin(t, s, run, store.StepRestart, "t")
			equal(t, "RunElsewhere", start.Change.RunElsewhere, c.want)
			finish(t, s, start.Claim, bad(store.StepRestart))
			// Our own later steps do not hide it.
			equal(t, "RunElsewhere at rollback", begin(t, s, run, store.StepRollback, "last").Change.RunElsewhere, c.want)
		})
	}
}

// TestTheSnapshotTellsTheAttemptThatCounts: of a retried run, nothing that only an
// earlier attempt did.
func TestTheSnapshotTellsTheAttemptThatCounts(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	s := d.Open(t)
	end := func(step store.Step, task string, outcome store.Outcome) {
		t.Helper()
		start := begin(t, s, run, step, task)
		outcome.FinishedAt = start.Claim.StartedAt
		finish(t, s, start.Claim, outcome)
	}
	snapshot := func() map[string]any {
		t.Helper()
		snapshot := d.Run(t, run)["metrics_snapshot"].(map[string]any)
		if _, kept := snapshot["approval"]; !kept {
			t.Errorf("other keys are lost: %v", snapshot)
		}
		delete(snapshot, "approval")
		return snapshot
	}
	first := func(status string) map[string]any { return map[string]any{"status": status, "durationMs": 0.0} }
	second := func(status string) map[string]any {
		return map[string]any{"status": status, "durationMs": 0.0, "attempt": 2.0}
	}
	for _, step := range []store.Step{store.StepAnalyze, store.StepPatch} {
		end(step, string(step), good(step))
	}
	end(store.StepBuild, "build", bad(store.StepBuild))
	end(store.StepRollback, "rollback", good(store.StepRollback))
	steps := map[string]any{"analyze": first("succeeded"), "patch": first("succeeded"), "build": first("failed"), "rollback": first("succeeded")}
	equal(t, "steps after the rollback", snapshot()["steps"], any(steps))
	if got := snapshot()["run"].(map[string]any)["status"]; got != "rolled_back" {
		t.Errorf("run is %v", got)
	}
	d.Retry(t, run, store.StepBuild, "again")
	equal(t, "steps before the retry starts", snapshot()["steps"], any(steps))
	build := begin(t, s, run, store.StepBuild, "build2")
	steps = map[string]any{"analyze": first("succeeded"), "patch": first("succeeded")}
	equal(t, "snapshot of the retry", snapshot(), map[string]any{"steps": steps})
	outcome := good(store.StepBuild)
	outcome.FinishedAt = build.Claim.StartedAt
	finish(t, s, build.Claim, outcome)
	end(store.StepRestart, "restart", good(store.StepRestart))
	end(store.StepVerify, "verify", good(store.StepVerify))
	steps["build"], steps["restart"], steps["verify"] = second("succeeded"), second("succeeded"), second("succeeded")
	equal(t, "steps of the retry", snapshot()["steps"], any(steps))
	if got := snapshot()["run"].(map[string]any)["status"]; got != "succeeded" {
		t.Errorf("run is %v", got)
	}
}
