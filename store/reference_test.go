package store_test

import (
	"encoding/json"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// recorded is a whole run as Python left it.
type recorded struct {
	Run       []storetest.Row `json:"run"`
	Plan      []storetest.Row `json:"plan"`
	States    []storetest.Row `json:"states"`
	Artifacts []storetest.Row `json:"artifacts"`
}

// ignored are columns that differ from run to run.
var ignored = []string{"id", "orchestrator_run_id", "run_id", "action_plan_id", "created_at", "updated_at", "queued_at"}

// without copies a row without these columns, and with its times in one
// notation.
func without(row storetest.Row, names ...string) storetest.Row {
	row = maps.Clone(row)
	for _, name := range names {
		delete(row, name)
	}
	for name, value := range row {
		text, _ := value.(string)
		if instant, err := time.Parse(time.RFC3339Nano, text); err == nil && strings.HasSuffix(name, "_at") {
			row[name] = instant.UTC().Format(time.RFC3339Nano)
		}
	}
	return row
}

func at(t *testing.T, value any) time.Time {
	t.Helper()
	text, _ := value.(string)
	instant, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		t.Fatal(err)
	}
	return instant
}

// TestReferenceRuns plays two whole runs of MoonMind's own worker step by step
// and must leave the same rows. Bettered on purpose: the snapshot has every
// step (docs/moonmind.md#c16), and a state's updated_at is not before its
// finished_at (docs/moonmind.md#r9).
func TestReferenceRuns(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"api_ok", "verify_times_out"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			want := load[recorded](t, "reference_"+name+".json")
			paths := map[string]storetest.Row{}
			for _, a := range want.Artifacts {
				paths[a["id"].(string)] = a
			}
			plan, err := json.Marshal(want.Plan[0]["steps"])
			if err != nil {
				t.Fatal(err)
			}
			d := storetest.New(t)
			clock := &storetest.Clock{}
			s := d.Open(t, func(c *store.Config) { c.Now = clock.Now })
			root := "/srv/artifacts/" + want.Run[0]["id"].(string)
			run := d.Create(t, storetest.Seed{
				ID: want.Run[0]["id"].(string), Instruction: want.Run[0]["instruction"].(string), Plan: plan,
				Priority: want.Run[0]["priority"].(string), ArtifactRoot: root,
			})
			d.Rows(t, `UPDATE orchestrator_runs SET metrics_snapshot = jsonb_build_object('approval', $2::text::jsonb) WHERE id = $1 RETURNING id`,
				run, marshal(t, want.Run[0]["metrics_snapshot"].(map[string]any)["approval"]))

			steps := map[string]any{}
			for _, state := range want.States {
				if state["status"] == "skipped" {
					continue
				}
				step := store.Step(state["plan_step"].(string))
				clock.Time = at(t, state["started_at"])
				start := begin(t, s, run, step, state["celery_task_id"].(string))
				outcome := store.Outcome{
					Status: store.StepStatus(state["plan_step_status"].(string)), Message: state["message"].(string),
					ArtifactRoot: root, FinishedAt: at(t, state["finished_at"]),
				}
				if state["payload"] != nil {
					outcome.Payload = json.RawMessage(marshal(t, state["payload"]))
				}
				for _, ref := range state["artifact_refs"].([]any) {
					a := paths[ref.(string)]
					outcome.Artifacts = append(outcome.Artifacts, store.Artifact{
						Type: a["artifact_type"].(string), Path: a["path"].(string),
						Checksum: a["checksum"].(string), SizeBytes: int64(a["size_bytes"].(float64)),
					})
				}
				finish(t, s, start.Claim, outcome)
				steps[string(step)] = map[string]any{
					"status":     state["plan_step_status"],
					"durationMs": float64(outcome.FinishedAt.Sub(clock.Time).Microseconds()) / 1000,
				}
			}

			run0 := without(want.Run[0], append(ignored, "approval_token_text")...)
			run0["artifact_root"] = root
			run0["metrics_snapshot"].(map[string]any)["steps"] = steps
			equal(t, "run", without(d.Run(t, run), ignored...), run0)

			states := d.States(t, run)
			if len(states) != len(want.States) {
				t.Fatalf("%d states, want %d", len(states), len(want.States))
			}
			ids := map[string]string{}
			got := d.Artifacts(t, run)
			for _, a := range got {
				ids[a["path"].(string)] = a["id"].(string)
			}
			for i, state := range states {
				for j, ref := range want.States[i]["artifact_refs"].([]any) {
					want.States[i]["artifact_refs"].([]any)[j] = ids[paths[ref.(string)]["path"].(string)]
				}
				equal(t, "state", without(state, ignored...), without(want.States[i], ignored...))
			}
			if len(got) != len(want.Artifacts) {
				t.Fatalf("%d artifacts, want %d", len(got), len(want.Artifacts))
			}
			for i := range got {
				equal(t, "artifact", without(got[i], ignored...), without(want.Artifacts[i], ignored...))
			}
		})
	}
}

func marshal(t *testing.T, value any) string {
	t.Helper()
	text, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestExampleRows takes a run through the examples of rows: seeded, in
// progress, succeeded, failed in four ways, rolled back, skipped.
func TestExampleRows(t *testing.T) {
	t.Parallel()
	type stateRows struct {
		Seeded       []storetest.Row          `json:"seeded_by_the_api"`
		InProgress   storetest.Row            `json:"in_progress"`
		Succeeded    []storetest.Row          `json:"succeeded"`
		Skipped      storetest.Row            `json:"rollback_skipped_after_verify"`
		RolledBack   storetest.Row            `json:"rollback_succeeded"`
		Failed       map[string]storetest.Row `json:"failed"`
		AfterRetry   storetest.Row            `json:"after_api_retry_from_build"`
		TwinOfPython storetest.Row            `json:"twin_row_python_adds_on_that_retry"`
	}
	want := load[stateRows](t, "task_state_rows.json")
	// Ids of artifacts are compared by number.
	loose := append([]string{"artifact_refs"}, ignored...)
	compare := func(t *testing.T, got, want storetest.Row) {
		t.Helper()
		equal(t, "state", without(got, loose...), without(want, loose...))
		g, _ := got["artifact_refs"].([]any)
		w, _ := want["artifact_refs"].([]any)
		if len(g) != len(w) || (got["artifact_refs"] == nil) != (want["artifact_refs"] == nil) {
			t.Errorf("artifact_refs %v, want as many as %v", got["artifact_refs"], want["artifact_refs"])
		}
	}
	outcome := func(t *testing.T, row storetest.Row) store.Outcome {
		o := store.Outcome{
			Status: store.StepStatus(row["plan_step_status"].(string)), Message: row["message"].(string), FinishedAt: at(t, row["finished_at"]),
		}
		if row["payload"] != nil {
			o.Payload = json.RawMessage(marshal(t, row["payload"]))
		}
		for i := range row["artifact_refs"].([]any) {
			o.Artifacts = append(o.Artifacts, store.Artifact{Type: "metrics", Path: row["plan_step"].(string) + strings.Repeat("x", i), Checksum: "00"})
		}
		return o
	}
	d := storetest.New(t)
	clock := &storetest.Clock{}
	s := d.Open(t, func(c *store.Config) { c.Now = clock.Now })
	play := func(t *testing.T, run string, row storetest.Row) {
		t.Helper()
		clock.Time = at(t, row["started_at"])
		step := store.Step(row["plan_step"].(string))
		finish(t, s, begin(t, s, run, step, row["celery_task_id"].(string)).Claim, outcome(t, row))
		compare(t, d.State(t, run, step), row)
	}

	good := d.Create(t, storetest.Seed{})
	for i, row := range d.States(t, good) {
		compare(t, row, want.Seeded[i])
	}
	for _, row := range want.Succeeded {
		if row["plan_step"] == "build" {
			clock.Time = at(t, want.InProgress["started_at"])
			claim := begin(t, s, good, store.StepBuild, want.InProgress["celery_task_id"].(string)).Claim
			compare(t, d.State(t, good, store.StepBuild), want.InProgress)
			if err := s.ReleaseClaim(t.Context(), claim); err != nil {
				t.Fatal(err)
			}
		}
		play(t, good, row)
	}
	skipped := d.State(t, good, store.StepRollback)
	want.Skipped["finished_at"] = d.Run(t, good)["completed_at"]
	compare(t, skipped, want.Skipped)

	for name, row := range want.Failed {
		t.Run(name, func(t *testing.T) {
			run := d.Create(t, storetest.Seed{})
			play(t, run, row)
			if name != "build_nonzero_exit" {
				return
			}
			play(t, run, want.RolledBack)
			d.Retry(t, run, store.StepBuild, "registry is reachable again")
			compare(t, d.State(t, run, store.StepBuild), want.AfterRetry)
			// Python adds a twin here; we take the row that the API reset
			// (docs/moonmind.md#r5).
			clock.Time = at(t, want.TwinOfPython["started_at"])
			begin(t, s, run, store.StepBuild, want.TwinOfPython["celery_task_id"].(string))
			want.TwinOfPython["attempt"], want.TwinOfPython["artifact_refs"] = 2, []any{}
			compare(t, d.State(t, run, store.StepBuild), want.TwinOfPython)
			if n := len(d.Rows(t, `SELECT 1 FROM spec_workflow_task_states WHERE orchestrator_run_id = $1 AND plan_step = 'build'`, run)); n != 1 {
				t.Errorf("%d rows for build, want no twin", n)
			}
		})
	}
}

// TestSnapshotForms compares metrics_snapshot with the forms that Python
// intends.
func TestSnapshotForms(t *testing.T) {
	t.Parallel()
	want := load[map[string]struct {
		Approval json.RawMessage
		Steps    map[string]struct {
			Status     store.StepStatus
			DurationMs float64
		}
		Run *struct {
			Status     string
			DurationMs float64
		}
	}](t, "metrics_snapshots.json")
	whole := load[map[string]json.RawMessage](t, "metrics_snapshots.json")
	d := storetest.New(t)
	for name, plan := range map[string]json.RawMessage{
		"intended_after_success":                       nil,
		"intended_after_build_failure_before_rollback": nil,
		"intended_after_rollback":                      nil,
		"final_failure_without_rollback_step":          json.RawMessage(`["analyze", {"name": "build"}]`),
	} {
		t.Run(name, func(t *testing.T) {
			clock := &storetest.Clock{Time: time.Date(2026, 1, 14, 9, 30, 2, 93745000, time.UTC)}
			s := d.Open(t, func(c *store.Config) { c.Now = clock.Now })
			run := d.Create(t, storetest.Seed{Plan: plan})
			first := clock.Time
			var last []store.Step
			for _, step := range store.Steps() {
				if _, ok := want[name].Steps[string(step)]; ok {
					last = append(last, step)
				}
			}
			for i, step := range last {
				entry := want[name].Steps[string(step)]
				took := time.Duration(entry.DurationMs*1000+0.5) * time.Microsecond
				if i == 0 {
					// The run's duration counts from the first start.
				} else if i == len(last)-1 && want[name].Run != nil {
					clock.Time = first.Add(time.Duration(want[name].Run.DurationMs*1000+0.5)*time.Microsecond - took)
				}
				start := begin(t, s, run, step, name+string(step))
				if i == 0 && len(last) == 1 && want[name].Run != nil {
					d.Rows(t, `UPDATE orchestrator_runs SET started_at = started_at - $2::interval WHERE id = $1 RETURNING id`, run,
						time.Duration((want[name].Run.DurationMs-entry.DurationMs)*1000+0.5)*time.Microsecond)
				}
				finish(t, s, start.Claim, store.Outcome{Status: entry.Status, FinishedAt: clock.Time.Add(took)})
				clock.Time = clock.Time.Add(took)
			}
			var expected any
			if err := json.Unmarshal(whole[name], &expected); err != nil {
				t.Fatal(err)
			}
			equal(t, "snapshot", d.Run(t, run)["metrics_snapshot"], expected)
		})
	}
}
