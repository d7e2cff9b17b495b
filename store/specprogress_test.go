package store_test

import (
	"reflect"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// A worker that takes a task over gets what the one before has recorded, whatever
// characters Codex's words have.
func TestProgressIsThatOfTheWorkerBefore(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	const run = "e2b7c4d0-19af-4c55-8b3e-0a6d5f4c3b2a"
	db.Rows(t, `INSERT INTO spec_workflow_runs (id, feature_key) VALUES ($1, 'f') RETURNING id`, run)
	begin := func(s *store.Store, id string) store.SpecClaim {
		t.Helper()
		decision, err := s.BeginSpec(t.Context(), store.SpecRequest{RunID: run, Task: store.SpecSubmit, Attempt: 1, TaskID: id}, func(store.SpecStart) store.SpecWrite { return store.SpecWrite{} })
		start, started := decision.(store.SpecStart)
		if err != nil || !started {
			t.Fatalf("%v, %v", decision, err)
		}
		return start.Claim
	}
	first := db.Open(t)
	claim := begin(first, "task-1")
	if !reflect.DeepEqual(claim.Progress, store.SpecProgress{}) {
		t.Errorf("a new claim has the progress %+v", claim.Progress)
	}
	codex := store.CodexProgress{
		Stage: store.CodexEnded, Runs: 2, BaseCommit: "c0ffee", KnownTasks: []string{"task_e_1"}, TaskID: "thread", Outcome: "finished", Message: "a\x00b \u2028 \"",
		Log:   &store.SpecArtifact{SpecFile: store.SpecFile{Type: "codex_logs", Path: "a/codex_1.jsonl"}, SizeBytes: 7, SHA256: "ab"},
		Patch: &store.SpecArtifact{SpecFile: store.SpecFile{Type: "codex_patch", Path: "a/codex_1.patch"}, SizeBytes: 8, SHA256: "cd"},
	}
	if err := first.WriteSpec(t.Context(), claim, store.SpecWrite{Progress: &store.SpecProgress{Codex: &codex}}); err != nil {
		t.Fatal(err)
	}
	// A write without progress leaves it.
	if err := first.WriteSpec(t.Context(), claim, store.SpecWrite{Phase: store.SpecPhaseSubmit}); err != nil {
		t.Fatal(err)
	}
	first.Close() // as if the worker had died
	second := begin(db.Open(t), "task-1")
	codex.Message = "ab \u2028 \""
	if got := second.Progress.Codex; got == nil || !reflect.DeepEqual(*got, codex) {
		t.Errorf("progress is %+v, want %+v", got, codex)
	}
	if second.Starts != 2 {
		t.Errorf("started %d times, want 2", second.Starts)
	}
}
