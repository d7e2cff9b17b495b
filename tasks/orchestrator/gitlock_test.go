package orchestrator

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
)

const resetPlan = `[{"name": "rollback", "parameters": {"strategies": [{"type": "git-revert", "commands": [["git", "reset", "--hard", "HEAD"]]}]}}]`

// rollbackAgain makes the next execution the second start of a rollback, in a run
// that began some time ago.
func (b *testEnv) rollbackAgain(ago time.Duration) {
	began := time.Now().Add(-ago)
	b.steps.run.StartedAt = &began
	b.plan(resetPlan)
	b.config.RollbackCommands = true
	b.steps.decision = store.Start{
		Run: b.steps.run, PreviousWorker: "orchestrator@first",
		Claim: store.Claim{RunID: testRun, Step: store.StepRollback, Attempt: 1, TaskID: "task-1", Starts: 2, StartedAt: time.Now()},
	}
}

// A worker is killed while its rollback's git restores a file, and leaves
// index.lock. The next worker's rollback removes it and restores the file.
func TestARollbackKilledInGitResetIsTakenOver(t *testing.T) {
	const variable = "ORCHESTRATOR_TEST_WORKSPACE"
	if workspace := os.Getenv(variable); workspace != "" {
		b := newTestEnv(t)
		b.workspace, b.config.Workspace = workspace, workspace
		b.plan(resetPlan)
		b.config.RollbackCommands = true
		b.fail("rollback")
		return
	}
	t.Parallel()
	b := newTestEnv(t)
	began, hold, lock := filepath.Join(b.bin, "began"), filepath.Join(b.bin, "hold"), filepath.Join(b.workspace, ".git/index.lock")
	b.program("smudge", `if [ -e "`+hold+`" ]; then echo began > "`+began+`"; sleep 600; fi; cat`)
	b.file(".gitattributes", "slow.txt filter=slow\n")
	b.file("slow.txt", "committed\n")
	b.repository()
	b.git("config", "filter.slow.clean", "cat")
	b.git("config", "filter.slow.smudge", filepath.Join(b.bin, "smudge"))
	b.file("slow.txt", "changed\n")
	if err := os.WriteFile(hold, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	worker := exec.Command(self, "-test.run", "^TestARollbackKilledInGitResetIsTakenOver$")
	worker.Env = append(os.Environ(), variable+"="+b.workspace, "TMPDIR="+t.TempDir())
	if err := worker.Start(); err != nil {
		t.Fatal(err)
	}
	awaitFile(t, began)
	if err := worker.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = worker.Wait()
	if err := os.Remove(hold); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(lock); err != nil {
		t.Fatal(err)
	}

	b.rollbackAgain(time.Hour)
	_, outcome := b.succeed("rollback")
	same(t, "message", outcome.Message, "Rollback executed")
	if log := b.artifact("rollback.log"); !strings.Contains(log, "git reset --hard HEAD\n[Removed "+lock+", which a git that was killed has left: no git uses it.]\nHEAD is now at ") {
		t.Errorf("log %s", log)
	}
	text, err := os.ReadFile(filepath.Join(b.workspace, "slow.txt"))
	if err != nil {
		t.Fatal(err)
	}
	same(t, "file", string(text), "committed\n")
}

// A lock that may be that of somebody else stays, and the log says what to do.
func TestALockOfSomebodyElseStays(t *testing.T) {
	t.Parallel()
	setup := func(t *testing.T) (b *testEnv, lock string) {
		b = newTestEnv(t)
		b.repository()
		lock = filepath.Join(b.workspace, ".git/index.lock")
		if err := os.WriteFile(lock, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		b.rollbackAgain(time.Hour)
		return b, lock
	}
	check := func(t *testing.T, b *testEnv, lock, line string) {
		t.Helper()
		failure, _ := b.fail("rollback")
		if !strings.Contains(failure.Error(), "Command git reset --hard HEAD failed with code 128: ") {
			t.Errorf("%s", failure.Error())
		}
		if log := b.artifact("rollback.log"); !strings.Contains(log, "\n["+line+"]\n") {
			t.Errorf("log %s\nwant the line %s", log, line)
		}
		if _, err := os.Stat(lock); err != nil {
			t.Error(err)
		}
	}
	t.Run("older than the run", func(t *testing.T) {
		t.Parallel()
		b, lock := setup(t)
		old := time.Now().Add(-2 * time.Hour)
		if err := os.Chtimes(lock, old, old); err != nil {
			t.Fatal(err)
		}
		check(t, b, lock, lock+" is older than this run, and may be that of a git in another container or on another machine. If no git uses it, run: rm "+lock)
	})
	t.Run("in use", func(t *testing.T) {
		t.Parallel()
		b, lock := setup(t)
		git := exec.Command("git", "hash-object", "--stdin") // waits for its input
		git.Dir = b.workspace
		input, err := git.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := git.Start(); err != nil {
			t.Fatal(err)
		}
		check(t, b, lock, fmt.Sprintf("%s is in use by git (process %d). If the next command fails because of it, retry the run when that git has ended.", lock, git.Process.Pid))
		_ = input.Close()
		if err := git.Wait(); err != nil {
			t.Error(err)
		}
	})
}
