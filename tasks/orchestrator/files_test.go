package orchestrator

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// newDirty returns a workspace with a service, and with work that somebody has left
// in it. The program "do" runs the script that the plan gives it.
func newDirty(t testing.TB) *testEnv {
	b := newTestEnv(t)
	b.program("do", `eval "$1"`)
	b.config.Programs = []string{"do"}
	b.file("api_service/Dockerfile", "FROM scratch\n")
	b.file("api_service/requirements.txt", "one\n")
	b.file("policy.txt", "policy\n")
	b.file("staged.txt", "a\n")
	b.repository()
	b.file("policy.txt", "policy, edited\n")
	b.file("staged.txt", "b\n")
	b.git("add", "staged.txt")
	b.file("notes.txt", "mine\n")
	return b
}

// patchPlan is a plan whose patch runs one script.
func patchPlan(t testing.TB, script, more string) string {
	t.Helper()
	text, err := json.Marshal(script)
	if err != nil {
		t.Fatal(err)
	}
	return `[{"name": "patch", "parameters": {"commands": [["do", ` + string(text) + `]]` + more + `}}]`
}

// status is what git says about the workspace.
func (b *testEnv) status() string {
	b.t.Helper()
	cmd := exec.Command("git", "status", "--porcelain", "--untracked-files=all", "--ignored")
	cmd.Dir, cmd.Env = b.workspace, append(b.config.Environ, "GIT_OPTIONAL_LOCKS=0")
	out, err := cmd.CombinedOutput()
	if err != nil {
		b.t.Fatalf("git status: %v: %s", err, out)
	}
	return string(out)
}

func (b *testEnv) text(name string) string {
	b.t.Helper()
	data, err := os.ReadFile(filepath.Join(b.workspace, name))
	if err != nil {
		return err.Error()
	}
	return string(data)
}

// What was there before the run is not blamed on it, and what it has altered is in
// the diff and in the payload.
func TestAPatchIsJudgedByWhatItAlters(t *testing.T) {
	t.Parallel()
	b := newDirty(t)
	before := b.status()
	b.plan(patchPlan(t, "echo two >> api_service/requirements.txt; echo three > api_service/requirements-new.txt; git add api_service/requirements.txt", ""))
	_, outcome := b.succeed("patch")
	same(t, "message", outcome.Message, "Patched files: api_service/requirements-new.txt, api_service/requirements.txt")
	same(t, "artifacts", paths(outcome), "patch_diff:patch.diff metrics:patch.log")
	var payload patchPayload
	if err := json.Unmarshal(outcome.Payload, &payload); err != nil {
		t.Fatal(err)
	}
	same(t, "staged", strings.Join(payload.Staged, " "), "api_service/requirements.txt")
	same(t, "untracked", strings.Join(payload.Untracked, " "), "api_service/requirements-new.txt")
	same(t, "unstaged", strings.Join(payload.Unstaged, " "), "")
	if len(payload.Files) != 2 || payload.Files[0].Before != nil || payload.Files[1].Before.Mode != "100644" || payload.Files[1].Before.SHA256 == payload.Files[1].After.SHA256 {
		t.Errorf("files %+v", payload.Files)
	}
	// The diff brings the change to a workspace as it was before.
	b.git("checkout", "-q", "HEAD", "--", "api_service")
	if err := os.Remove(filepath.Join(b.workspace, "api_service/requirements-new.txt")); err != nil {
		t.Fatal(err)
	}
	same(t, "status", b.status(), before)
	b.git("apply", filepath.Join(b.base, testRun, "patch.diff"))
	same(t, "file", b.text("api_service/requirements.txt"), "one\ntwo\n")
	same(t, "new file", b.text("api_service/requirements-new.txt"), "three\n")
}

func TestWhatAPatchMustNotAlterIsTakenBack(t *testing.T) {
	t.Parallel()
	b := newDirty(t)
	before := b.status()
	// What it may alter stays until the rollback.
	b.plan(patchPlan(t, "echo two >> api_service/requirements.txt; echo x >> policy.txt; rm notes.txt; git config user.name x; mkdir other", ""))
	failure, outcome := b.fail("patch")
	text := ".git/config is not allow-listed; notes.txt is not allow-listed; other is not allow-listed; policy.txt is not allow-listed"
	same(t, "text", failure.Error(), text)
	same(t, "class", failure.Type, "AllowListViolation")
	same(t, "artifacts", paths(outcome), "patch_diff:patch.diff metrics:patch.log")
	same(t, "status", strings.Replace(b.status(), " M api_service/requirements.txt\n", "", 1), before)
	same(t, "policy.txt", b.text("policy.txt"), "policy, edited\n")
	same(t, "notes.txt", b.text("notes.txt"), "mine\n")
	if log := b.artifact("patch.log"); !strings.Contains(log, "\n[Taken back: policy.txt (not allow-listed)]\n") || !strings.HasSuffix(log, "\npatch step failed while executing orchestrator command.\n"+text) {
		t.Errorf("log %s", log)
	}
	b.git("cat-file", "-e", "refs/mm-orchestrator/runs/"+testRun+"/violations:policy.txt")
}
