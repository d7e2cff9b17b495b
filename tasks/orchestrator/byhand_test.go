package orchestrator

import (
	"strings"
	"testing"
)

// TestByHand runs the commands that `mm-orchestrator changes RUN` prints.
func TestByHand(t *testing.T) {
	t.Parallel()
	b := chains(t)
	b.chainPlan(`[["git","status","--short"]]`)
	b.shell(`touch ../broken; echo edited >> svc/a; echo untracked > svc/new`)
	b.runChain("one", map[string]bool{"patch": true, "rollback": true}, "patch", "build", "rollback")
	same(t, "status after the rollback", b.shell(`git status --short`), "")
	steps := ByHand(testRun, b.recordedChange())
	if len(steps) != 4 {
		t.Fatalf("%+v", steps)
	}
	run := func(step HandStep, file string) string {
		t.Helper()
		same(t, "directory", step.Directory, b.workspace)
		return b.shell(strings.ReplaceAll(strings.Join(step.Commands, "\n"), "FILE", file))
	}
	same(t, steps[0].What, run(steps[0], "svc/a"), "a\nedited\n")
	same(t, steps[2].What, run(steps[2], ""), "svc/a\nsvc/new\n")
	run(steps[3], "svc/new")
	run(steps[1], "svc/a")
	same(t, "files", b.shell(`cat svc/a svc/new`), "a\nedited\nuntracked\n")
}
