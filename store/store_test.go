package store_test

import (
	"encoding/json"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/moonladderstudios/mm-orchestrator/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// load reads a file of testdata.
func load[T any](t *testing.T, name string) T {
	t.Helper()
	text, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	var value T
	if err := json.Unmarshal(text, &value); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return value
}

// begin begins a step that must start.
func begin(t testing.TB, s *store.Store, run string, step store.Step, task string) store.Start {
	t.Helper()
	decision := decide(t, s, run, step, task)
	start, ok := decision.(store.Start)
	if !ok {
		t.Fatalf("begin %s: %T %+v, want Start", step, decision, decision)
	}
	return start
}

// decide begins a step and returns what was decided.
func decide(t testing.TB, s *store.Store, run string, step store.Step, task string) store.Decision {
	t.Helper()
	request := alone(run, step, task)
	request.RootTaskID = "root"
	decision, err := s.BeginStep(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	return decision
}

// alone asks for a step of a run that has a workspace of its own.
func alone(run string, step store.Step, task string) store.BeginRequest {
	return store.BeginRequest{RunID: run, Step: step, TaskID: task, Queue: "q", Workspace: func(r store.Run) string { return "q:/" + r.ID }}
}

// isBusy says that a decision parks the message because the step runs.
func isBusy(decision store.Decision) bool {
	parked, ok := decision.(store.Parked)
	return ok && parked.Why == store.ParkedBusy
}

// finish finishes a step that was begun.
func finish(t testing.TB, s *store.Store, claim store.Claim, outcome store.Outcome) store.Finished {
	t.Helper()
	if outcome.FinishedAt.IsZero() {
		outcome.FinishedAt = claim.StartedAt.Add(27404 * time.Microsecond)
	}
	finished, err := s.FinishStep(t.Context(), claim, outcome)
	if err != nil {
		t.Fatal(err)
	}
	return finished
}

// good and bad are outcomes with one artifact.
func good(step store.Step) store.Outcome {
	return store.Outcome{
		Status: store.StepSucceeded, Message: "done",
		Artifacts: []store.Artifact{{Type: "metrics", Path: string(step) + ".log", Checksum: "ab", SizeBytes: 2}},
		Payload:   json.RawMessage(`{"log":"` + string(step) + `.log"}`),
	}
}

func bad(step store.Step) store.Outcome {
	o := good(step)
	o.Status, o.Message, o.ErrorType, o.ErrorModule = store.StepFailed, "failed", "CommandExecutionError", "moonmind"
	return o
}

// pass runs steps through to success, with task ids of the form prefix-step.
func pass(t *testing.T, s *store.Store, run, prefix string, steps ...store.Step) {
	t.Helper()
	for _, step := range steps {
		finish(t, s, begin(t, s, run, step, prefix+"-"+string(step)).Claim, good(step))
	}
}

var toVerify = store.Steps()[:5]

// equal compares two JSON-like values.
func equal(t *testing.T, what string, got, want any) {
	t.Helper()
	g, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	w, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	if string(g) != string(w) {
		t.Errorf("%s:\n got %s\nwant %s", what, g, w)
	}
}
