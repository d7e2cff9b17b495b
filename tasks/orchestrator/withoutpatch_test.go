package orchestrator

import (
	"strings"
	"testing"
)

// newSkill is a workspace in which a skill runs a script.
func newSkill(t *testing.T, script string) *testEnv {
	t.Helper()
	b := newDirty(t)
	b.steps.run.TargetService = "orchestrator"
	b.program("python", script)
	b.plan(`[{"name": "build", "parameters": {"service": "orchestrator", "workspace": ".", "logArtifact": "skill.log", "command":
			["python", "-m", "moonmind.workflows.orchestrator.skill_executor", "--skill-id", "s", "--skill-args-json", "{}"]}},
		{"name": "verify", "parameters": {"service": "orchestrator", "logArtifact": "verify.log"}},
		{"name": "rollback", "parameters": {"service": "orchestrator", "logArtifact": "rollback.log", "strategies": [
			{"type": "git-revert", "commands": [["git", "reset", "--hard", "HEAD"]]}]}}]`)
	return b
}

// tree is the last line of rollback.log about files.
func (b *testEnv) tree() string {
	lines := strings.Split(b.artifact("rollback.log"), "\n")
	return lines[len(lines)-1]
}

// A skill may alter any file, as no patch of its plan has an allow-list. A rollback
// takes that back, and no edit of the operator's.
func TestWhatASkillHasAlteredIsTakenBack(t *testing.T) {
	t.Parallel()
	for _, end := range []string{"0", "1"} {
		b := newSkill(t, `echo changed > policy.txt; rm staged.txt; echo of-the-skill >> api_service/Dockerfile; echo x > new.txt; git add new.txt
			git -c user.name=a -c user.email=a@example.test commit -q -a -m skill; mkdir -p data; echo x > data/log; exit `+end)
		before, head := b.status(), b.shell("git rev-parse HEAD")
		if end == "0" {
			b.succeed("build")
			b.fail("verify")
		} else {
			failure, _ := b.fail("build")
			if !strings.Contains(failure.Error(), "failed with code 1") {
				t.Error(failure)
			}
		}
		b.file("api_service/requirements.txt", "edited since\n")
		b.succeed("rollback")
		if tree := b.tree(); !strings.HasPrefix(tree, "tree: as before the run (") || !strings.HasSuffix(tree, " restored, 0 set aside)") {
			t.Error(tree)
		}
		same(t, "head", b.shell("git rev-parse HEAD"), head)
		same(t, "edits", b.text("policy.txt")+b.text("staged.txt")+b.text("api_service/requirements.txt"), "policy, edited\nb\nedited since\n")
		same(t, "status", b.status(), " M api_service/requirements.txt\n"+strings.Replace(before, "?? notes", "?? data/log\n?? notes", 1))
	}
}

// What somebody edits after a skill that has altered nothing is not the run's.
func TestASkillThatAltersNothing(t *testing.T) {
	t.Parallel()
	b := newSkill(t, `echo done`)
	b.succeed("build")
	b.file("policy.txt", "edited since\n")
	b.succeed("rollback")
	same(t, "tree", b.tree(), "tree: as before the run (0 files restored, 0 set aside)")
	same(t, "policy.txt", b.text("policy.txt"), "edited since\n")
}

// A retry runs the skill again, in the workspace of before.
func TestARetriedSkill(t *testing.T) {
	t.Parallel()
	b := newSkill(t, `cat policy.txt; echo changed >> policy.txt; exit 1`)
	for attempt := 1; attempt <= 3; attempt++ {
		b.steps.attempt = attempt
		b.fail("build")
		if log := b.artifact("skill.log"); !strings.Contains(log, "policy, edited") || strings.Contains(log, "changed") {
			t.Errorf("attempt %d: %s", attempt, log)
		}
		b.succeed("rollback")
		same(t, "tree", b.tree(), "tree: as before the run (1 file restored, 0 set aside)")
		same(t, "policy.txt", b.text("policy.txt"), "policy, edited\n")
	}
}

// A skill that is ended before it is known what it has altered. Its version is set
// aside, as somebody may have edited the file meanwhile; files that git does not track
// stay, as they may be those of a container.
func TestASkillThatIsEnded(t *testing.T) {
	t.Parallel()
	b := newSkill(t, `echo changed > policy.txt; mkdir data; echo x > data/log; exec sleep 60`)
	b.plan(strings.Replace(string(b.steps.run.Steps), `"workspace": "."`, `"timeoutSeconds": 0.5`, 1))
	b.fail("build")
	same(t, "policy.txt", b.text("policy.txt"), "changed\n")
	b.succeed("rollback")
	same(t, "tree", b.tree(), "tree: as before the run (1 file restored, 1 set aside)")
	same(t, "policy.txt", b.text("policy.txt"), "policy, edited\n")
	same(t, "data/log", b.text("data/log"), "x\n")
}
