package orchestrator

import (
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
)

func TestEveryStepCanBePerformed(t *testing.T) {
	t.Parallel()
	for _, step := range store.Steps() {
		if performers[step] == nil {
			t.Errorf("step %s cannot be performed", step)
		}
	}
	if len(performers) != len(store.Steps()) {
		t.Errorf("%d steps can be performed, %d are known", len(performers), len(store.Steps()))
	}
}

func TestAStepThatKillsItsWorkersIsNotStartedForEver(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.program("docker", "")
	b.plan(`[{"name": "build"}]`)
	claim := store.Claim{RunID: testRun, Step: store.StepBuild, Attempt: 1, Starts: 3, StartedAt: time.Now()}
	b.steps.decision = store.Start{Run: b.steps.run, Claim: claim}
	b.succeed("build")
	claim.Starts, claim.HandedBack = 5, 2
	b.steps.decision = store.Start{Run: b.steps.run, Claim: claim}
	b.succeed("build")
	claim.Starts = 6
	b.steps.decision = store.Start{Run: b.steps.run, Claim: claim}
	left := b.artifact("build.log")
	failure, outcome := b.fail("build")
	text := "step build was started 3 times and its worker died each time; it is not started again. " +
		"Look for what ends the worker (memory, a signal) in its log and the kernel's, then retry the run"
	same(t, "text", failure.Error(), text+" (see build.log)")
	same(t, "artifacts", paths(outcome), "build_log:build.log")
	same(t, "log", b.artifact("build.log"), left+"\n"+text)
}
