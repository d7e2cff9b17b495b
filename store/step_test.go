package store_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

func TestStartIsVisible(t *testing.T) { // docs/moonmind.md#r9, docs/moonmind.md#r3
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	run := d.Create(t, storetest.Seed{})
	start := begin(t, s, run, store.StepAnalyze, "a")
	if !start.RunStarted || start.Run.Status != store.RunRunning || !start.Run.HasRollback || start.Claim.Starts != 1 || start.Claim.Attempt != 1 {
		t.Errorf("start %+v", start)
	}
	state, row := d.State(t, run, store.StepAnalyze), d.Run(t, run)
	if state["plan_step_status"] != "in_progress" || state["celery_state"] != "STARTED" || state["celery_task_id"] != "a" {
		t.Errorf("state %v", state)
	}
	if row["status"] != "running" || row["started_at"] != state["started_at"] || row["completed_at"] != nil {
		t.Errorf("run %v", row)
	}
	if !at(t, row["updated_at"]).After(at(t, row["created_at"])) {
		t.Errorf("updated_at %v is not set", row["updated_at"])
	}
	finish(t, s, start.Claim, good(store.StepAnalyze))
	if second := begin(t, s, run, store.StepPatch, "p"); second.RunStarted {
		t.Error("the second step says that it started the run")
	}
}

func TestMissingRunAndBadRequests(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	missing := "5b0e6a52-3c1d-4f0e-9b7a-6a1f2d9c4e10"
	for _, c := range []struct {
		request store.BeginRequest
		kind    error
		text    string
	}{
		{alone(missing, store.StepBuild, "t"), store.ErrNotFound, "Run " + missing + " not found"},
		{alone("x'; DROP TABLE", store.StepBuild, "t"), store.ErrInvalid, "UUID"},
		{alone(missing, "deploy", "t"), store.ErrInvalid, `"deploy"`},
		{alone(missing, store.StepBuild, ""), store.ErrInvalid, "has no task id"},
	} {
		_, err := s.BeginStep(t.Context(), c.request)
		var own *store.Error
		if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.text) || !errors.As(err, &own) || !own.Permanent() {
			t.Errorf("%+v: %v, want %v with %q", c.request, err, c.kind, c.text)
		}
	}
	if n := len(d.Rows(t, `SELECT 1 FROM mm_orchestrator.claims`)); n != 0 {
		t.Errorf("%d claims", n)
	}
}

// TestRepeatedDelivery: a message of a step that has ended changes nothing and
// gets the same answer, bytes and all (docs/moonmind.md#r1).
func TestRepeatedDelivery(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	run := d.Create(t, storetest.Seed{})
	outcome := good(store.StepAnalyze)
	outcome.Payload = json.RawMessage(`{"z":1,"a":[1.50,"é"]}`)
	finish(t, s, begin(t, s, run, store.StepAnalyze, "chain-analyze").Claim, outcome)
	pass(t, s, run, "chain", toVerify[1:]...)
	before, states, artifacts := d.Run(t, run), d.States(t, run), d.Artifacts(t, run)
	other := d.Open(t, func(c *store.Config) { c.Worker = "other" })
	for _, task := range []string{"chain-analyze", "a duplicate of the chain"} {
		done, ok := decide(t, other, run, store.StepAnalyze, task).(store.Done)
		if !ok {
			t.Fatalf("task %s is not done", task)
		}
		if string(done.Outcome.Payload) != string(outcome.Payload) || len(done.Outcome.Artifacts) != 1 || done.Outcome.Artifacts[0] != outcome.Artifacts[0] {
			t.Errorf("outcome %+v, want %+v", done.Outcome, outcome)
		}
	}
	stop, ok := decide(t, other, run, store.StepRollback, "stale").(store.Stop)
	if !ok || !strings.Contains(stop.Reason, "succeeded") {
		t.Errorf("a rollback of a good run: %+v", stop)
	}
	equal(t, "run", d.Run(t, run), before)
	equal(t, "states", d.States(t, run), states)
	equal(t, "artifacts", d.Artifacts(t, run), artifacts)
}

// TestRetryOfAnEndedRun: docs/moonmind.md#r3, docs/moonmind.md#r4,
// docs/moonmind.md#r5, and a second retry, docs/moonmind.md#r6.
func TestRetryOfAnEndedRun(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	run := d.Create(t, storetest.Seed{})
	pass(t, s, run, "one", store.StepAnalyze, store.StepPatch)
	finished := finish(t, s, begin(t, s, run, store.StepBuild, "one-build").Claim, bad(store.StepBuild))
	if finished.Status != store.RunFailed || finished.RunEnded {
		t.Errorf("after a failed build: %+v", finished)
	}
	if row := d.Run(t, run); row["status"] != "failed" || row["completed_at"] != nil {
		t.Errorf("run %v", row)
	}
	if stop, ok := decide(t, s, run, store.StepRestart, "one-restart").(store.Stop); !ok || !strings.Contains(stop.Reason, "failed") {
		t.Errorf("restart after a failed build: %+v", stop)
	}
	finished = finish(t, s, begin(t, s, run, store.StepRollback, "one-rollback").Claim, good(store.StepRollback))
	if finished.Status != store.RunRolledBack || !finished.RunEnded || finished.Duration <= 0 {
		t.Errorf("after the rollback: %+v", finished)
	}
	ids := d.Artifacts(t, run)

	for _, round := range []string{"two", "three"} {
		d.Retry(t, run, store.StepBuild, "again")
		// The messages of the rounds before come once more: no effect.
		if done, ok := decide(t, s, run, store.StepBuild, "one-build").(store.Done); !ok || done.Outcome.Status != store.StepFailed {
			t.Errorf("the old build: %+v", done)
		}
		if _, ok := decide(t, s, run, store.StepRollback, "another-rollback").(store.Stop); !ok {
			t.Error("an old rollback must not undo a run that was retried")
		}
		start := begin(t, s, run, store.StepBuild, round+"-build")
		state := d.State(t, run, store.StepBuild)
		for _, column := range []string{"message", "payload", "finished_at"} {
			if state[column] != nil {
				t.Errorf("%s is %v at the start of a retry (docs/moonmind.md#c14)", column, state[column])
			}
		}
		if row := d.Run(t, run); row["status"] != "running" || row["completed_at"] != nil {
			t.Errorf("run %v", row)
		}
		old := alone(run, store.StepRollback, "yet-another")
		old.RootTaskID = "root of the submission before"
		if decision, err := s.BeginStep(t.Context(), old); err != nil {
			t.Fatal(err)
		} else if _, ok := decision.(store.Stop); !ok {
			t.Errorf("an old rollback must not undo a run that is running again: %T", decision)
		}
		finish(t, s, start.Claim, good(store.StepBuild))
		pass(t, s, run, round, store.StepRestart, store.StepVerify)
		if row := d.Run(t, run); row["status"] != "succeeded" || row["completed_at"] == nil {
			t.Errorf("run %v", row)
		}
	}
	states := d.States(t, run)
	if len(states) != 6 {
		t.Fatalf("%d state rows, want one for each step", len(states))
	}
	equal(t, "attempts", []any{states[0]["attempt"], states[2]["attempt"], states[5]["attempt"]}, []any{1, 3, 3})
	if r := states[5]; r["status"] != "skipped" || r["celery_task_id"] != nil || r["started_at"] != nil || r["message"] != "Rollback not required" {
		t.Errorf("rollback row %v", r)
	}
	for i, row := range d.Artifacts(t, run)[:3] {
		if row["id"] != ids[i]["id"] {
			t.Errorf("artifact %v was registered anew", row["path"])
		}
	}
	if done, ok := decide(t, s, run, store.StepRollback, "one-rollback").(store.Done); !ok || done.Outcome.Status != store.StepSucceeded {
		t.Errorf("the first rollback again: %+v", done)
	}
}

// TestSecondFailureRollsBackAgain: the API's retry may leave the rollback's
// row as it was; what was done for the first failure does not count for the
// second.
func TestSecondFailureRollsBackAgain(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	run := d.Create(t, storetest.Seed{})
	for _, round := range []string{"one", "two"} {
		finish(t, s, begin(t, s, run, store.StepBuild, round).Claim, bad(store.StepBuild))
		finish(t, s, begin(t, s, run, store.StepRollback, round+"-rollback").Claim, good(store.StepRollback))
		if row := d.Run(t, run); row["status"] != "rolled_back" {
			t.Fatalf("run %v", row)
		}
		// An error callback that was published twice has two ids.
		if _, ok := decide(t, s, run, store.StepRollback, round+"-rollback-twin").(store.Done); !ok {
			t.Error("the twin of a rollback must be done")
		}
		d.Rows(t, `UPDATE spec_workflow_task_states SET attempt = attempt + 1, plan_step_status = 'pending', celery_state = 'PENDING'
			WHERE orchestrator_run_id = $1 AND plan_step = 'build' RETURNING id`, run)
		d.Rows(t, `UPDATE orchestrator_runs SET status = 'pending' WHERE id = $1 RETURNING id`, run)
	}
}

func TestFailureForGood(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	t.Run("no rollback in the plan", func(t *testing.T) {
		run := d.Create(t, storetest.Seed{Plan: json.RawMessage(`[{"name": "build", "parameters": {}}]`)})
		finished := finish(t, s, begin(t, s, run, store.StepBuild, "b").Claim, bad(store.StepBuild))
		row := d.Run(t, run)
		if finished.Status != store.RunFailed || !finished.RunEnded || row["completed_at"] == nil {
			t.Errorf("%+v %v", finished, row)
		}
		if _, ok := decide(t, s, run, store.StepRollback, "r").(store.Stop); !ok {
			t.Error("a rollback of a run that ended for good must stop")
		}
	})
	t.Run("rollback failed", func(t *testing.T) {
		run := d.Create(t, storetest.Seed{})
		finish(t, s, begin(t, s, run, store.StepBuild, "b").Claim, bad(store.StepBuild))
		finished := finish(t, s, begin(t, s, run, store.StepRollback, "r").Claim, bad(store.StepRollback))
		row := d.Run(t, run)
		if finished.Status != store.RunFailed || !finished.RunEnded || row["completed_at"] == nil {
			t.Errorf("%+v %v", finished, row)
		}
		equal(t, "run entry", row["metrics_snapshot"].(map[string]any)["run"].(map[string]any)["status"], "failed")
		if done, ok := decide(t, s, run, store.StepRollback, "twin").(store.Done); !ok || done.Outcome.Status != store.StepFailed {
			t.Errorf("the twin of a failed rollback: %+v", done)
		}
	})
}

func TestApproval(t *testing.T) { // docs/moonmind.md#a1
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	run := d.Create(t, storetest.Seed{Gate: true})
	before := d.Run(t, run)
	if stop, ok := decide(t, s, run, store.StepAnalyze, "a").(store.Stop); !ok || !strings.Contains(stop.Reason, "approv") {
		t.Errorf("a run that waits for approval: %+v", stop)
	}
	equal(t, "run", d.Run(t, run), before)
	d.Approve(t, run)
	pass(t, s, run, "x", toVerify...)
	row := d.Run(t, run)
	if row["status"] != "succeeded" {
		t.Errorf("run %v", row)
	}
	equal(t, "approval", row["metrics_snapshot"].(map[string]any)["approval"].(map[string]any)["status"], "granted")
}

// TestRowsOfAPythonWorker: what Python finished is recognised without a claim
// of ours.
func TestRowsOfAPythonWorker(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	run := d.Create(t, storetest.Seed{})
	artifact := d.Rows(t, `INSERT INTO orchestrator_run_artifacts (id, run_id, artifact_type, path, checksum, size_bytes)
		VALUES (gen_random_uuid(), $1, 'metrics', 'analyze.log', 'c0ffee', 7) RETURNING id`, run)
	d.Rows(t, `UPDATE spec_workflow_task_states
		SET status = 'succeeded', plan_step_status = 'succeeded', celery_state = 'SUCCESS', celery_task_id = 'py', message = 'Analysis complete',
		    payload = '{"log": "analyze.log"}', artifact_refs = jsonb_build_array($2::text, 'not an id', 7), finished_at = now(), started_at = now()
		WHERE orchestrator_run_id = $1 AND plan_step = 'analyze' RETURNING id`, run, artifact[0]["id"])
	d.Rows(t, `UPDATE orchestrator_runs SET status = 'running', started_at = now() WHERE id = $1 RETURNING id`, run)
	done, ok := decide(t, s, run, store.StepAnalyze, "py").(store.Done)
	if !ok {
		t.Fatal("a step that Python finished is not done")
	}
	want := store.Outcome{
		Status: store.StepSucceeded, Message: "Analysis complete", Payload: json.RawMessage(`{"log": "analyze.log"}`),
		Artifacts:    []store.Artifact{{Type: "metrics", Path: "analyze.log", Checksum: "c0ffee", SizeBytes: 7}},
		ArtifactRoot: "/app/var/artifacts/spec_workflows/" + run, FinishedAt: done.Outcome.FinishedAt,
	}
	equal(t, "outcome", done.Outcome, want)

	// After a retry the row still carries Python's task id: that is no proof.
	d.Retry(t, run, store.StepAnalyze, "")
	if start := begin(t, s, run, store.StepAnalyze, "py"); start.Claim.Attempt != 2 {
		t.Errorf("attempt %d", start.Claim.Attempt)
	}
}

// TestStepsAfterVerify: a plan may have its steps in another order. All of them run.
func TestStepsAfterVerify(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	plan := json.RawMessage(`[{"name": "verify"}, {"name": "analyze"}, {"name": "build"}, {"name": "rollback"}]`)
	run := d.Create(t, storetest.Seed{Plan: plan})
	for _, step := range []store.Step{store.StepVerify, store.StepAnalyze} {
		if got := finish(t, s, begin(t, s, run, step, string(step)).Claim, good(step)); got.RunEnded || got.Status != store.RunRunning {
			t.Errorf("after %s: %+v", step, got)
		}
	}
	if got := finish(t, s, begin(t, s, run, store.StepBuild, "build").Claim, good(store.StepBuild)); !got.RunEnded || got.Status != store.RunSucceeded {
		t.Errorf("after build: %+v", got)
	}
	if state := d.State(t, run, store.StepRollback); state["status"] != "skipped" {
		t.Errorf("rollback %v", state)
	}
}

// TestRunWithoutStates: a run that was not made by the API gets its rows.
func TestRunWithoutStates(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	run := d.Create(t, storetest.Seed{NoStates: true})
	start := begin(t, s, run, store.StepAnalyze, "a")
	state := d.State(t, run, store.StepAnalyze)
	if state["attempt"] != 1.0 || state["task_name"] != "analyze" || state["artifact_refs"] != nil {
		t.Errorf("state %v", state)
	}
	finish(t, s, start.Claim, store.Outcome{Status: store.StepSucceeded, Message: "m"})
	equal(t, "artifact_refs", d.State(t, run, store.StepAnalyze)["artifact_refs"], []any{})
	pass(t, s, run, "x", toVerify[1:]...)
	if state := d.State(t, run, store.StepRollback); state["status"] != "skipped" {
		t.Errorf("rollback %v", state)
	}
}

// TestOutcomeOfAnyText: what comes out of commands is stored, whatever it is.
func TestOutcomeOfAnyText(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	run := d.Create(t, storetest.Seed{})
	task := "task\x00-" + strings.Repeat("ü", 300)
	start := begin(t, s, run, store.StepAnalyze, task)
	log := store.Artifact{Type: "metrics", Path: "ana\x00lyse-é-日本.log", Checksum: "first", SizeBytes: 1}
	again := log
	again.Checksum, again.SizeBytes = "last", 2
	finish(t, s, start.Claim, store.Outcome{
		Status: store.StepFailed, Message: "é日本\x00\xff" + strings.Repeat("x", 1<<20),
		Artifacts: []store.Artifact{log, {Type: "patch_diff", Path: "p.diff"}, again},
		Payload:   json.RawMessage(`{"a\u0000b": "\ud800 \\u0000 \ud83d\ude00", "log": "` + "\xff" + `"}`),
		Traceback: "tb\x00", ErrorType: "E",
	})
	state := d.State(t, run, store.StepAnalyze)
	message := state["message"].(string)
	if !strings.HasPrefix(message, "é日本�xxx") || len(message) > 40<<10 || !strings.Contains(message, "cut here; 10485") {
		t.Errorf("message of %d bytes: %.80s … %s", len(message), message, message[len(message)-80:])
	}
	equal(t, "payload", state["payload"], map[string]any{"ab": "\ufffd \\u0000 😀", "log": "�"})
	if id := state["celery_task_id"].(string); len([]rune(id)) != 255 || !strings.HasPrefix(id, "task-ü") {
		t.Errorf("task id %q", id)
	}
	artifacts := d.Artifacts(t, run)
	if len(artifacts) != 2 || artifacts[0]["path"] != "analyse-é-日本.log" || artifacts[0]["checksum"] != "last" || artifacts[1]["checksum"] != nil {
		t.Errorf("artifacts %v", artifacts)
	}
	equal(t, "refs", state["artifact_refs"], []any{artifacts[0]["id"], artifacts[1]["id"]})
	if _, ok := decide(t, s, run, store.StepAnalyze, task).(store.Done); !ok {
		t.Error("the same long task id is not recognised")
	}

	start = begin(t, s, d.Create(t, storetest.Seed{}), store.StepBuild, "b")
	for _, o := range []store.Outcome{
		{Status: "skipped"},
		{Status: store.StepFailed, Payload: json.RawMessage(`{`)},
		{Status: store.StepFailed, Artifacts: []store.Artifact{{Type: "no such label", Path: "p"}}},
		{Status: store.StepFailed, Artifacts: []store.Artifact{{Type: "metrics", Path: strings.Repeat("p", 1025)}}},
		{Status: store.StepFailed, Artifacts: []store.Artifact{{Type: "metrics", Path: "p", SizeBytes: -1}}},
		{Status: store.StepFailed, ArtifactRoot: strings.Repeat("p", 1025)},
	} {
		if _, err := s.FinishStep(t.Context(), start.Claim, o); !errors.Is(err, store.ErrInvalid) {
			t.Errorf("%+v: %v, want ErrInvalid", o, err)
		}
	}
	finish(t, s, start.Claim, bad(store.StepBuild))
}

// TestSnapshotKeepsWhatOthersPut, whatever shape it has.
func TestSnapshotKeepsWhatOthersPut(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	entry := `{"analyze": {"status": "succeeded", "durationMs": 2000.0}}`
	for before, after := range map[string]string{
		`NULL`:                              `{"steps": ` + entry + `}`,
		`'null'`:                            `{"steps": ` + entry + `}`,
		`'[1]'`:                             `{"steps": ` + entry + `}`,
		`'{"steps": 7, "mine": [1, 2.50]}'`: `{"mine": [1, 2.50], "steps": ` + entry + `}`,
		`'{"steps": {"patch": {"x": 1}}}'`:  `{"steps": {"patch": {"x": 1}, ` + entry[1:] + `}`,
		`'{"run": {"status": "old"}, "a": null}'`: `{"a": null, "run": {"status": "old"}, "steps": ` + entry + `}`,
	} {
		run := d.Create(t, storetest.Seed{})
		d.Rows(t, `UPDATE orchestrator_runs SET metrics_snapshot = `+before+` WHERE id = $1 RETURNING id`, run)
		claim := begin(t, s, run, store.StepAnalyze, "a").Claim
		finish(t, s, claim, store.Outcome{Status: store.StepSucceeded, FinishedAt: claim.StartedAt.Add(2 * time.Second)})
		same := d.Rows(t, `SELECT metrics_snapshot = $2::text::jsonb AND metrics_snapshot::text LIKE '%2000.0%' AS same, metrics_snapshot FROM orchestrator_runs WHERE id = $1`, run, after)
		if same[0]["same"] != true {
			t.Errorf("%s became %v, want %s", before, same[0]["metrics_snapshot"], after)
		}
	}
}

// TestClockBehind: a machine whose clock is behind must not break the CHECK
// on the run's times.
func TestClockBehind(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	ahead := time.Now().Add(time.Hour)
	first := d.Open(t, func(c *store.Config) { c.Now = func() time.Time { return ahead } })
	second := d.Open(t)
	run := d.Create(t, storetest.Seed{})
	pass(t, first, run, "x", toVerify[:4]...)
	start := begin(t, second, run, store.StepVerify, "x-verify")
	finished := finish(t, second, start.Claim, store.Outcome{Status: store.StepSucceeded, FinishedAt: start.Claim.StartedAt.Add(-time.Second)})
	row := d.Run(t, run)
	if row["completed_at"] != row["started_at"] || finished.Duration != 0 {
		t.Errorf("run %v, %+v", row, finished)
	}
	if s := d.State(t, run, store.StepVerify); s["finished_at"] != s["started_at"] {
		t.Errorf("state %v", s)
	}
}

// A worker died in patch, and another one, whose clock is behind, fails the lost step.
// The step stays one of this program's: a rollback does not run the plan's commands, as
// it does for steps of a worker that keeps no record.
func TestClockBehindAtALostStep(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	ahead := time.Now().Add(time.Hour)
	dying := d.Open(t, as("dying", 0), func(c *store.Config) { c.Now = func() time.Time { return ahead } })
	s := d.Open(t, as("successor", 0))
	run := d.Create(t, storetest.Seed{})
	starts(t, dying, shared("w", run, store.StepPatch, "t"))
	dying.Close()
	waitFor(t, "the worker is seen dead", func() bool { return !workspaces(t, s)[0].Working })
	if lost := failLost(t, s, run, 0); lost == nil || lost.Step != store.StepPatch || lost.Finished.Status != store.RunFailed {
		t.Fatalf("%+v", lost)
	}
	if state := d.State(t, run, store.StepPatch); state["finished_at"] != state["started_at"] {
		t.Errorf("state %v", state)
	}
	start, ok := ask(t, s, shared("w", run, store.StepRollback, "rollback-1")).(store.Start)
	if !ok || start.Change.RunElsewhere {
		t.Errorf("the rollback begins: %t; it takes patch for another program's: %t", ok, start.Change.RunElsewhere)
	}
}

func TestReads(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	first := d.Create(t, storetest.Seed{Priority: "high"})
	second := d.Create(t, storetest.Seed{TargetService: "orchestrator", Plan: json.RawMessage(`["analyze", "verify"]`)})
	pass(t, s, first, "x", toVerify...)

	runs, err := s.ListRuns(t.Context(), store.RunFilter{})
	if err != nil || len(runs) != 2 || runs[0].ID != second || runs[0].HasRollback || !runs[1].HasRollback || runs[1].Priority != "high" {
		t.Errorf("runs %+v, %v", runs, err)
	}
	for _, filter := range []store.RunFilter{{Status: store.RunSucceeded}, {TargetService: "api"}, {Offset: 1, Limit: 1}} {
		if runs, err := s.ListRuns(t.Context(), filter); err != nil || len(runs) != 1 || runs[0].ID != first {
			t.Errorf("%+v: %+v, %v", filter, runs, err)
		}
	}
	if run, err := s.FindRun(t.Context(), first); err != nil || run.Status != store.RunSucceeded || run.CompletedAt == nil {
		t.Errorf("%+v, %v", run, err)
	}
	detail, err := s.FindRunDetail(t.Context(), first)
	if err != nil || len(detail.States) != 6 || len(detail.Artifacts) != 5 {
		t.Fatalf("%+v, %v", detail, err)
	}
	if st := detail.States[2]; st.Step != store.StepBuild || st.Status != "succeeded" || len(st.ArtifactIDs) != 1 ||
		st.Starts != 1 || st.Worker != "orchestrator@test" || st.Payload == nil {
		t.Errorf("state %+v", st)
	}
	if st := detail.States[5]; st.Status != "skipped" || st.Starts != 0 {
		t.Errorf("state %+v", st)
	}
	if !strings.Contains(string(detail.Snapshot), `"run"`) {
		t.Errorf("snapshot %s", detail.Snapshot)
	}
	missing := "5b0e6a52-3c1d-4f0e-9b7a-6a1f2d9c4e10"
	if _, err := s.FindRunDetail(t.Context(), missing); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("%v", err)
	}
	if _, err := s.FindRun(t.Context(), missing); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("%v", err)
	}
}
