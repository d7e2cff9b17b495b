package orchestrator

import (
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/store"
)

// A run revoked between two steps: the next one fails before it does anything.
func TestARevokedStepDoesNothing(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.program("docker", `echo ran >ran`)
	b.plan(`[{"name": "build"}]`)
	b.steps.revoked = &store.Revocation{Reason: "wrong branch"}
	failure, _ := b.fail("build")
	if failure.Arg != "Revoked by operator: wrong branch" || failure.Type != "TaskRevokedError" || !strings.HasSuffix(failure.Traceback, "TaskRevokedError: Revoked by operator: wrong branch\n") {
		t.Errorf("%+v", failure)
	}
	if log := b.artifact("build.log"); strings.Contains(log, "docker") {
		t.Errorf("log %q", log)
	}
}
