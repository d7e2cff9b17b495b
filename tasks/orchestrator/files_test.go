package orchestrator

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
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

// What somebody edits while a command of patch runs cannot be told from what the
// command alters, and is taken back with it. It is not lost: outside of the allow-list,
// patch.log has the command that brings it back, inside, patch.diff has it.
func TestEditsDuringAPatchAreNotLost(t *testing.T) {
	t.Parallel()
	b := newDirty(t)
	started := filepath.Join(b.bin, "started")
	script := "echo two >> api_service/requirements.txt; touch " + started + "; until [ -e " + started + ".edited ]; do sleep 0.02; done"
	b.plan(strings.TrimSuffix(patchPlan(t, script, ""), "]") + `, {"name": "rollback"}]`)
	ended := make(chan struct{})
	go func() { // somebody else
		defer close(ended)
		for t.Context().Err() == nil {
			if _, err := os.Stat(started); err == nil {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		for name, text := range map[string]string{"policy.txt": "policy, edited again\n", "it's new.txt": "new\n", "api_service/Dockerfile": "FROM other\n"} {
			if err := os.WriteFile(filepath.Join(b.workspace, name), []byte(text), 0o644); err != nil {
				t.Error(err)
			}
		}
		if err := os.WriteFile(started+".edited", nil, 0o644); err != nil {
			t.Error(err)
		}
	}()
	b.fail("patch")
	<-ended
	same(t, "policy.txt", b.text("policy.txt"), "policy, edited\n")
	_, command, found := strings.Cut(b.artifact("patch.log"), "[To bring that version back, run: ")
	command, _, _ = strings.Cut(command, "]\n")
	if !found {
		t.Fatalf("patch.log is %s", b.artifact("patch.log"))
	}
	b.succeed("rollback")
	same(t, "Dockerfile after the rollback", b.text("api_service/Dockerfile"), "FROM scratch\n")
	b.git("apply", "--include=api_service/Dockerfile", filepath.Join(b.base, b.steps.run.ID, "patch.diff"))
	cmd := exec.Command("sh", "-c", command)
	cmd.Env = b.config.Environ
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", command, err, out)
	}
	same(t, "edits brought back", b.text("policy.txt")+b.text("it's new.txt")+b.text("api_service/Dockerfile"), "policy, edited again\nnew\nFROM other\n")
}

// deployPlan is patchPlan with a build, which needs no engine, and a rollback.
func deployPlan(t testing.TB, script, build string) string {
	t.Helper()
	plan := strings.TrimSuffix(patchPlan(t, script, ""), "]")
	text, err := json.Marshal(build)
	if err != nil {
		t.Fatal(err)
	}
	return plan + `, {"name": "build", "parameters": {"command": ["do", ` + string(text) + `]}}, {"name": "rollback"}]`
}

// noCompose is the line of a rollback after a build without compose.
const noCompose = "[The run's record cannot bring back images and containers: the plan builds and restarts by no docker compose command. The plan has no commands for it]\n"

// rollbackKilled makes the next rollback one that another worker has begun.
func (b *testEnv) rollbackKilled() {
	b.steps.decision = store.Start{
		Run: b.steps.run, PreviousWorker: "orchestrator@first", Change: b.steps.change,
		Claim: store.Claim{RunID: testRun, Step: store.StepRollback, Attempt: 1, TaskID: "task-1", Starts: 2, StartedAt: time.Now()},
	}
}

// withoutNote is a log without the note about earlier workers.
func withoutNote(log string) string {
	if strings.HasPrefix(log, "[Worker orchestrator@first ") {
		_, log, _ = strings.Cut(log, "\n")
	}
	return log
}

// commandsIn returns the commands in a log that bring back what was set aside.
func commandsIn(log string) []string {
	var commands []string
	for line := range strings.Lines(log) {
		if _, command, found := strings.Cut(strings.TrimSuffix(strings.TrimSpace(line), "]"), "run: "); found {
			commands = append(commands, command)
		}
	}
	return commands
}

// A rollback takes the run's change back and leaves what others have done.
func TestRollbackTakesBackTheChangeAndNothingElse(t *testing.T) {
	t.Parallel()
	b := newDirty(t)
	before := b.status()
	b.plan(deployPlan(t, "echo two >> api_service/requirements.txt; echo three > api_service/requirements-new.txt; git add api_service/requirements.txt; chmod 755 api_service/Dockerfile", "exit 1"))
	b.succeed("patch")
	b.fail("build")
	b.file("meanwhile.txt", "by somebody\n")
	b.file("policy.txt", "edited again\n")
	b.succeed("rollback")
	same(t, "status", strings.Replace(b.status(), "?? meanwhile.txt\n", "", 1), before)
	same(t, "file", b.text("api_service/requirements.txt"), "one\n")
	same(t, "policy.txt", b.text("policy.txt"), "edited again\n")
	same(t, "log", b.artifact("rollback.log"), noCompose+"tree: as before the run (4 files restored, 0 set aside)")
	b.rollbackKilled()
	b.succeed("rollback")
	same(t, "log", withoutNote(b.artifact("rollback.log")), noCompose+"tree: as before the run (4 files restored, 0 set aside)")
}

// Somebody has edited a file of the run's change since: that version is set aside.
func TestRollbackSetsAsideWhatOthersHaveEdited(t *testing.T) {
	t.Parallel()
	b := newDirty(t)
	b.plan(deployPlan(t, "echo two >> api_service/requirements.txt; echo new > 'api_service/requirements a b.txt'", "exit 1"))
	b.succeed("patch")
	b.fail("build")
	b.file("api_service/requirements.txt", "mine\n")
	b.file("api_service/requirements a b.txt", "mine too\n")
	b.succeed("rollback")
	same(t, "file", b.text("api_service/requirements.txt"), "one\n")
	log := b.artifact("rollback.log")
	if !strings.HasPrefix(log, noCompose+"[Edited by somebody since the run altered them, and set aside: api_service/requirements a b.txt, api_service/requirements.txt]\n") ||
		!strings.HasSuffix(log, "\ntree: as before the run (2 files restored, 2 set aside)") {
		t.Errorf("log %s", log)
	}
	for _, command := range commandsIn(log) {
		b.shell(command)
	}
	same(t, "file", b.text("api_service/requirements.txt"), "mine\n")
	same(t, "file", b.text("api_service/requirements a b.txt"), "mine too\n")
}

// Edits that the run has deployed go back to HEAD; the log's commands bring them
// back, in the work tree and in the index.
func TestRollbackSetsAsideDeployedEdits(t *testing.T) {
	t.Parallel()
	setup := func(t *testing.T) *testEnv {
		b := newTestEnv(t)
		b.program("do", `eval "$1"`)
		b.config.Programs = []string{"do"}
		for _, name := range []string{"Dockerfile", "requirements.txt", "requirements-gone.txt", "requirements-mode.txt", "requirements-link.txt", "requirements-staged.txt"} {
			b.file("api_service/"+name, "committed\n")
		}
		b.repository()
		b.shell(`cd api_service
echo edited >> requirements.txt
echo staged >> requirements-staged.txt && git add requirements-staged.txt && echo more >> requirements-staged.txt
rm requirements-gone.txt
chmod 755 requirements-mode.txt
ln -sf Dockerfile requirements-link.txt
echo new > 'requirements-new file.txt'
echo new > requirements-added.txt && git add requirements-added.txt`)
		b.plan(deployPlan(t, "git status --short", "exit 1"))
		return b
	}
	t.Run("deployed", func(t *testing.T) {
		t.Parallel()
		b := setup(t)
		before := b.status()
		b.succeed("patch")
		b.fail("build")
		_, outcome := b.succeed("rollback")
		same(t, "status", b.status(), "")
		same(t, "file", b.text("api_service/requirements.txt"), "committed\n")
		same(t, "artifacts", paths(outcome), "patch_diff:aside.diff rollback_log:rollback.log")
		log := b.artifact("rollback.log")
		if !strings.HasSuffix(log, "\ntree: as before the run (7 files restored, 7 set aside)") {
			t.Errorf("log %s", log)
		}
		b.rollbackKilled()
		b.succeed("rollback")
		same(t, "log", withoutNote(b.artifact("rollback.log")), log)
		for _, command := range commandsIn(log) {
			b.shell(command)
		}
		same(t, "status", b.status(), before)
		same(t, "file", b.text("api_service/requirements-staged.txt"), "committed\nstaged\nmore\n")
		b.git("reset", "-q", "--hard")
		b.shell("rm 'api_service/requirements-new file.txt'")
		b.git("apply", filepath.Join(b.base, testRun, "aside.diff"))
		same(t, "file", b.text("api_service/requirements-new file.txt"), "new\n")
		same(t, "file", b.text("api_service/requirements-staged.txt"), "committed\nstaged\nmore\n")
	})
	t.Run("not deployed", func(t *testing.T) {
		t.Parallel()
		b := setup(t)
		before := b.status()
		b.succeed("patch")
		b.succeed("rollback")
		same(t, "status", b.status(), before)
	})
	t.Run("refused", func(t *testing.T) {
		t.Parallel()
		b := setup(t)
		b.file("policy.txt", "x\n")
		before := b.status()
		failure, _ := b.fail("patch")
		same(t, "text", failure.Error(), "policy.txt is not allow-listed")
		b.succeed("rollback")
		same(t, "status", b.status(), before)
		same(t, "log", b.artifact("rollback.log"), "[The run has changed nothing: there is nothing to take back.]\ntree: as before the run (0 files restored, 0 set aside)")
	})
}

// A patch that ends in the middle of its commands is taken back as a whole.
func TestRollbackOfAPatchThatWasCutOff(t *testing.T) {
	t.Parallel()
	b := newDirty(t)
	before := b.status()
	b.plan(strings.Replace(deployPlan(t, "echo two >> api_service/requirements.txt; echo x >> policy.txt; sleep 60", "true"), `"parameters": {"commands"`, `"parameters": {"timeoutSeconds": 5, "commands"`, 1))
	failure, _ := b.fail("patch")
	if !strings.Contains(failure.Error(), "took longer than its limit") {
		t.Fatal(failure)
	}
	b.steps.trail = nil
	b.succeed("rollback")
	same(t, "status", b.status(), before)
	same(t, "policy.txt", b.text("policy.txt"), "policy, edited\n")
	// The trail has what was found, also where the workspace does not show it any more.
	want := []string{"files-changing", "set-aside", "file-changed api_service/requirements.txt", "file-changed policy.txt",
		"file-restored api_service/requirements.txt", "file-restored policy.txt"}
	if got := brief(b.steps.trail); !slices.Equal(got, want) {
		t.Errorf("trail %q, want %q", got, want)
	}
	for _, r := range b.steps.trail {
		if r.File != nil && (r.File.Before.SHA256 == "" || r.File.After.SHA256 == "" || r.File.Before.SHA256 == r.File.After.SHA256) {
			t.Errorf("%s of %s: from %s to %s", r.Kind, r.File.Path, r.File.Before, r.File.After)
		}
	}
	log := b.artifact("rollback.log")
	if !strings.HasSuffix(log, "\ntree: as before the run (2 files restored, 2 set aside)") {
		t.Errorf("log %s", log)
	}
}

// A command that fails has altered something all the same.
func TestRollbackOfAFailedPatch(t *testing.T) {
	t.Parallel()
	b := newDirty(t)
	before := b.status()
	b.plan(deployPlan(t, "echo two >> api_service/requirements.txt; exit 3", "true"))
	_, outcome := b.fail("patch")
	same(t, "artifacts", paths(outcome), "patch_diff:patch.diff metrics:patch.log")
	b.succeed("rollback")
	same(t, "status", b.status(), before)
	same(t, "log", b.artifact("rollback.log"), "tree: as before the run (1 file restored, 0 set aside)")
}

// Wrong parameters of the plan's rollback do not keep a run from being taken back from
// its record, which needs none of them.
func TestRollbackWithWrongParameters(t *testing.T) {
	t.Parallel()
	for parameters, note := range map[string]string{
		`{"strategies": "git-revert"}`:        "[Plan parameter strategies must be a list]\n",
		`{"strategies": {"commands": []}}`:    "[Plan parameter strategies must be a list]\n",
		`{"strategies": [{"commands": "x"}]}`: "",
		`{"workspace": ["x"]}`:                "[Plan parameter workspace must be a text]\n",
		`{"logArtifact": ["x"]}`:              "[Plan parameter logArtifact must be a text]\n",
		`{"logArtifact": "../x"}`:             "[Artifact path escapes the run directory: ../x]\n",
		`{"timeoutSeconds": "soon"}`:          "[Plan parameter timeoutSeconds must be a number, not \"soon\"]\n",
		`{"timeoutSeconds": -1}`:              "[Plan parameter timeoutSeconds must be a number of seconds]\n",
		`[]`:                                  "[Plan step parameters must be a mapping]\n",
		`"git-revert"`:                        "[Plan step parameters must be a mapping]\n",
	} {
		b := newDirty(t)
		before := b.status()
		plan := patchPlan(t, "echo two >> api_service/requirements.txt; exit 3", "")
		b.plan(strings.TrimSuffix(plan, "]") + `, {"name": "rollback", "parameters": ` + parameters + `}]`)
		b.fail("patch")
		b.succeed("rollback")
		same(t, parameters+" status", b.status(), before)
		same(t, parameters+" log", b.artifact("rollback.log"), note+"tree: as before the run (1 file restored, 0 set aside)")
	}
	b := newDirty(t)
	b.config.RollbackCommands = true
	for parameters, want := range map[string]string{
		`{"strategies": "git-revert"}`:                "Plan parameter strategies must be a list",
		`{"strategies": [], "timeoutSeconds": "now"}`: `Plan parameter timeoutSeconds must be a number, not "now"`,
		`[]`: "Plan step parameters must be a mapping",
	} {
		b.plan(`[{"name": "rollback", "parameters": ` + parameters + `}]`)
		failure, _ := b.fail("rollback")
		same(t, "by commands", failure.Error(), want)
	}
}

// A worker that is killed in a rollback without the run's directory leaves the one that
// stands for it. The next rollback removes that, and none in which another works.
func TestWhatAKilledRollbackHasLeftIsRemoved(t *testing.T) {
	t.Parallel()
	var dirs []string
	for range 2 {
		dir, err := os.MkdirTemp("", elsewherePrefix)
		if err == nil {
			t.Cleanup(func() { os.RemoveAll(dir) })
			err = os.WriteFile(filepath.Join(dir, "rollback.log"), []byte("x"), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		dirs = append(dirs, dir)
	}
	lock, err := lockFolder(dirs[1])
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	for _, dir := range dirs {
		if err := os.Chtimes(dir, time.Time{}, time.Now().Add(-time.Hour)); err != nil {
			t.Fatal(err)
		}
	}
	b := newTestEnv(t)
	b.plan(`[{"name": "rollback"}]`)
	b.succeed("rollback")
	for i, dir := range dirs {
		if _, err := os.Stat(dir); (err == nil) != (i == 1) {
			t.Errorf("%d: %v", i, err)
		}
	}
}

func TestRollbackWithoutTheRunsDirectory(t *testing.T) {
	t.Parallel()
	b := newDirty(t)
	before := b.status()
	b.plan(deployPlan(t, "echo two >> api_service/requirements.txt", "exit 1"))
	b.succeed("patch")
	b.fail("build")
	dir := filepath.Join(b.base, testRun)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	_, outcome := b.succeed("rollback")
	same(t, "status", b.status(), before)
	same(t, "artifacts", paths(outcome), "")
	if logged := b.logged.String(); !strings.Contains(logged, "tree: as before the run (1 file restored, 0 set aside)") {
		t.Errorf("logged %s", logged)
	}
}

// What a build alters is judged too, and taken back.
func TestABuildMustNotAlterTheWorkspace(t *testing.T) {
	t.Parallel()
	b := newDirty(t)
	b.plan(deployPlan(t, "git status --short", "echo x >> policy.txt; echo y > built.txt; echo z >> api_service/Dockerfile"))
	b.shell("git checkout -q policy.txt && git reset -q --hard && rm notes.txt")
	b.succeed("patch")
	b.file("policy.txt", "edited after the baseline\n")
	failure, _ := b.fail("build")
	same(t, "text", failure.Error(), "built.txt is not allow-listed; policy.txt is not allow-listed")
	same(t, "policy.txt", b.text("policy.txt"), "edited after the baseline\n")
	b.succeed("rollback")
	same(t, "status", b.status(), " M policy.txt\n")
}

// A service writes files of its own into the workspace when compose starts it.
func TestFilesOfAServiceAreNotBlamedOnCompose(t *testing.T) {
	t.Parallel()
	b := newDirty(t)
	b.git("commit", "-q", "-a", "-m", "x")
	b.shell("rm notes.txt")
	b.program("docker", `cd "`+b.workspace+`"; mkdir -p data; echo x >> data/log; [ ! -e edit ] || echo x >> policy.txt`)
	b.plan(`[{"name": "patch"}, {"name": "build"}, {"name": "rollback"}]`)
	b.succeed("patch")
	b.succeed("build")
	b.file("edit", "")
	failure, _ := b.fail("build")
	same(t, "text", failure.Error(), "policy.txt is not allow-listed")
	same(t, "policy.txt", b.text("policy.txt"), "policy, edited\n")
}

// A folder that a compose command removes comes back with the files in it that git
// does not track.
func TestARemovedFolderComesBackWhole(t *testing.T) {
	t.Parallel()
	b := newDirty(t)
	b.file("data/tracked", "x")
	b.git("add", "data")
	b.git("commit", "-q", "-a", "-m", "x")
	b.shell("rm notes.txt")
	b.program("docker", `rm -r "`+b.workspace+`/data"`)
	b.plan(`[{"name": "patch"}, {"name": "build"}, {"name": "rollback"}]`)
	b.succeed("patch")
	b.file("data/untracked", "of the operator")
	b.fail("build")
	same(t, "untracked file", b.text("data/untracked"), "of the operator")
}

// A service that writes into the workspace all the time is not the run's doing.
func TestFilesThatOthersKeepWritingAreLeftAlone(t *testing.T) {
	t.Parallel()
	b := newDirty(t)
	writer := exec.Command("sh", "-c", "while :; do echo x >> service.log; sleep 0.02; done")
	writer.Dir = b.workspace
	if err := writer.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = writer.Process.Kill(); _ = writer.Wait() })
	awaitFile(t, filepath.Join(b.workspace, "service.log"))
	b.plan(deployPlan(t, "echo two >> api_service/requirements.txt; sleep 0.2", "exit 1"))
	b.succeed("patch")
	if log := b.artifact("patch.log"); !strings.HasSuffix(log, "\n[Left alone, because another program still writes them: service.log]") {
		t.Errorf("log %s", log)
	}
	b.fail("build")
	b.succeed("rollback")
	same(t, "file", b.text("api_service/requirements.txt"), "one\n")
}

// Lines that end with a carriage return have it in the diff too: git apply takes them
// for other lines without.
func TestTheDiffOfAFileWithCarriageReturns(t *testing.T) {
	t.Parallel()
	for name, attributes := range map[string]string{"as they are": "", "no text": "* -text\n", "by attribute": "requirements.txt text eol=crlf\n"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newDirty(t)
			b.file(".gitattributes", attributes)
			b.file("api_service/requirements.txt", "one\r\ntwo\r\n")
			b.shell("git add .gitattributes api_service && git commit -q -m carriage-returns")
			b.plan(patchPlan(t, `printf 'three\r\n' >> api_service/requirements.txt`, ""))
			b.succeed("patch")
			for _, step := range []struct{ options, want string }{{"-R ", "one\r\ntwo\r\n"}, {"", "one\r\ntwo\r\nthree\r\n"}} {
				b.shell("git apply " + step.options + filepath.Join(b.base, b.steps.run.ID, "patch.diff"))
				same(t, "file after git apply "+step.options, b.text("api_service/requirements.txt"), step.want)
			}
		})
	}
}
