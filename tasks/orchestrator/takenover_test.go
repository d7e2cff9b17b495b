package orchestrator

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
)

// A worker that has lost its claim without noticing ends its command as soon as it
// can ask the database, without a grace, and does not record the end of the step.
func TestAWorkerThatLostItsClaimEndsItsCommand(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.repository()
	b.config.KillGrace = time.Hour
	b.program("docker", `trap '' TERM; touch began; sleep 600`)
	b.plan(`[{"name": "build"}]`)
	b.steps.takenOver = func() bool {
		_, err := os.Stat(filepath.Join(b.workspace, "began"))
		return err == nil
	}
	b.steps.finishErrs = []error{store.ErrClaimLost}
	o, err := New(b.config)
	if err != nil {
		t.Fatal(err)
	}
	_, err = o.Execute(t.Context(), Request{RunID: testRun, Step: "build", TaskID: "task-1"}, nil)
	if !errors.Is(err, ErrStop) {
		t.Fatalf("%v, want ErrStop", err)
	}
	if len(b.steps.finished) != 0 || b.steps.released != 0 {
		t.Errorf("recorded %v, released %d times", b.steps.finished, b.steps.released)
	}
}
