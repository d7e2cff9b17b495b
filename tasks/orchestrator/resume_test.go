package orchestrator

import (
	"context"
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// shell runs a script in the workspace and returns what it prints.
func (b *testEnv) shell(script string) string {
	b.t.Helper()
	cmd := exec.Command("sh", "-ec", script)
	cmd.Dir, cmd.Env = b.workspace, b.config.Environ
	out, err := cmd.CombinedOutput()
	if err != nil {
		b.t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

// retried is a run whose patch altered files, which was rolled back if undone is set,
// and which is then retried from a step after patch.
func (b *testEnv) retried(undone bool) {
	b.t.Helper()
	b.repository()
	b.file("svc/requirements.txt", "a==1\n")
	b.file("svc/pyproject.toml", "p\n")
	b.git("add", ".")
	b.git("commit", "-q", "-m", "y")
	b.file("notes.txt", "mine\n")
	b.program("docker", `cat svc/requirements.txt; test ! -e svc/new.txt || cat svc/new.txt`)
	b.plan(`[{"name":"build","parameters":{"command":["docker","build"]}},
		{"name":"restart","parameters":{"command":["docker","up"]}},
		{"name":"verify","parameters":{}},{"name":"rollback","parameters":{"strategies":[]}}]`)
	o, err := New(b.config)
	if err != nil {
		b.t.Fatal(err)
	}
	ctx := b.t.Context()
	check := func(err error) {
		b.t.Helper()
		if err != nil {
			b.t.Fatal(err)
		}
	}
	r, err := change.Open(ctx, o.runner.git, b.workspace, change.Options{})
	check(err)
	before, baseline, err := r.Capture(ctx, testRun, "baseline")
	check(err)
	b.shell(`printf 'z==2\n' >> svc/requirements.txt; printf 'new\n' > svc/new.txt; printf 'q\n' >> svc/pyproject.toml; git add svc/pyproject.toml`)
	after, err := r.Observe(ctx, before)
	check(err)
	list := change.Judge(before, after, change.Rules{Allowed: func(path string) bool { return strings.HasPrefix(path, "svc/") }})
	id, err := r.StoreChange(ctx, testRun, "after", after, list)
	check(err)
	record := change.Record{
		Files:      &change.Files{Workspace: b.workspace, Top: b.workspace, Baseline: baseline, Change: id},
		Submission: "an earlier task",
	}
	if undone {
		_, err := r.Restore(ctx, before, after, list)
		check(err)
		record.Undone = true
		same(b.t, "status after the rollback", b.shell(`git status --short`), "?? notes.txt\n")
	}
	b.steps.change.Record, err = record.Encode()
	check(err)
	b.steps.attempt = 2
}

func (b *testEnv) recordedChange() change.Record {
	b.t.Helper()
	record, err := change.Decode(b.steps.change.Record)
	if err != nil {
		b.t.Fatal(err)
	}
	return record
}

const changedStatus = "M  svc/pyproject.toml\n M svc/requirements.txt\n?? notes.txt\n?? svc/new.txt\n"

// TestRetryFromBuildMakesTheChangeAgain: a rollback had taken it back.
func TestRetryFromBuildMakesTheChangeAgain(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"build", "restart"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			b := newTestEnv(t)
			b.retried(true)
			b.succeed(step)
			same(t, "status", b.shell(`git status --short --untracked-files=all`), changedStatus)
			log := b.artifact(step + ".log")
			note := "[The run was rolled back; its change is made again: svc/new.txt, svc/pyproject.toml, svc/requirements.txt]\n"
			if !strings.HasPrefix(log, note) || !strings.Contains(log, "a==1\nz==2\nnew") {
				t.Error(log)
			}
			if record := b.recordedChange(); record.Undone || record.Submission != "task-0" {
				t.Errorf("%+v", record)
			}
			// The next step of the chain does not look again, whatever somebody does.
			b.file("svc/new.txt", "theirs\n")
			b.succeed("restart")
			same(t, "file", b.shell(`cat svc/new.txt`), "theirs\n")
		})
	}
}

// TestRetryOfARunThatWasNotRolledBack uses the workspace as it is.
func TestRetryOfARunThatWasNotRolledBack(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.retried(false)
	b.succeed("build")
	same(t, "status", b.shell(`git status --short --untracked-files=all`), changedStatus)
	if log := b.artifact("build.log"); strings.Contains(log, "[") {
		t.Error(log)
	}
}

// TestRetryOfADriftedWorkspace: files of the run's change are neither as before nor
// as after it.
func TestRetryOfADriftedWorkspace(t *testing.T) {
	t.Parallel()
	drifted := func(t *testing.T) *testEnv {
		b := newTestEnv(t)
		b.retried(true)
		b.file("svc/requirements.txt", "a==1\ntheirs\n")
		b.file("svc/new.txt", "theirs too\n")
		b.file("README", "no business of the run's\n")
		return b
	}
	t.Run("is refused", func(t *testing.T) {
		t.Parallel()
		b := drifted(t)
		before := b.shell(`git status --short; cat svc/*`)
		failure, _ := b.fail("build")
		want := "Files that the run has changed were edited since: svc/new.txt, svc/requirements.txt. Retry the run from patch; or restore them; or set MM_ORCHESTRATOR_ALLOW_DRIFT to true to use them as they are"
		if !strings.HasPrefix(failure.Error(), want) {
			t.Errorf("%s, want %s", failure, want)
		}
		same(t, "workspace", b.shell(`git status --short; cat svc/*`), before)
		if record := b.recordedChange(); !record.Undone || record.Submission == "task-0" {
			t.Errorf("%+v", record)
		}
		// So is the next start of it.
		b.fail("build")
	})
	t.Run("is allowed by the setting", func(t *testing.T) {
		t.Parallel()
		b := drifted(t)
		b.config.AllowDrift = true
		b.succeed("build")
		same(t, "files", b.shell(`cat svc/requirements.txt svc/new.txt svc/pyproject.toml`), "a==1\ntheirs\ntheirs too\np\nq\n")
		log := b.artifact("build.log")
		for _, want := range []string{
			"[Edited since the run has changed them, and used as they are: svc/new.txt, svc/requirements.txt]\n",
			"[The run was rolled back; its change is made again: svc/pyproject.toml]\n",
		} {
			if !strings.Contains(log, want) {
				t.Errorf("%s\nlacks %s", log, want)
			}
		}
	})
}

// TestRetryAfterTheImageWasRolledBack: verify and restart alone would show the
// service of before.
func TestRetryAfterTheImageWasRolledBack(t *testing.T) {
	t.Parallel()
	for step, want := range map[string]string{
		"verify":  "The run was rolled back, so that the service is as before the run: there is nothing of the run to verify. Retry the run from build, or from patch",
		"restart": "The run was rolled back, and with it the image that its build had made: a restart would start the image of before. Retry the run from build, or from patch",
	} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			b := newTestEnv(t)
			b.retried(true)
			record := b.recordedChange()
			record.Image = &change.Image{Restored: true}
			b.steps.change.Record, _ = record.Encode()
			failure, _ := b.fail(step)
			if !strings.HasPrefix(failure.Error(), want) {
				t.Error(failure)
			}
			same(t, "status", b.shell(`git status --short`), "?? notes.txt\n")
		})
	}
}

// TestRetryWithoutTheContent: the refs were removed, and git has collected what only
// they kept.
func TestRetryWithoutTheContent(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.retried(true)
	b.shell(`git for-each-ref --format='delete %(refname)' refs/mm-orchestrator | git update-ref --stdin; git gc -q --prune=now`)
	failure, _ := b.fail("build")
	if !strings.Contains(failure.Error(), " before the run cannot be read: ") {
		t.Error(failure)
	}
}

// TestRetryThatCannotRecord changes nothing.
func TestRetryThatCannotRecord(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.retried(true)
	b.steps.recordChange = func(context.Context) error { return store.ErrRefused }
	b.fail("build")
	same(t, "status", b.shell(`git status --short`), "?? notes.txt\n")
}

// chain runs a step of the chain whose first task has the id root. It returns the
// failure, nil if the step has succeeded.
func (b *testEnv) chain(root, step string) *Failure {
	b.t.Helper()
	o, err := New(b.config)
	if err != nil {
		b.t.Fatal(err)
	}
	_, err = o.Execute(b.t.Context(), Request{RunID: testRun, Step: step, TaskID: root + "-" + step, RootTaskID: root}, nil)
	var failure *Failure
	if err != nil && !errors.As(err, &failure) {
		b.t.Fatal(err)
	}
	return failure
}

// chains is a repository with a plan whose patch runs the program "repair", and whose
// build fails while the file "broken" is beside the workspace.
func chains(t *testing.T) *testEnv {
	t.Helper()
	b := newTestEnv(t)
	b.repository()
	b.file("svc/a", "a\n")
	b.file("svc/b", "b\n")
	b.file("other", "o\n")
	b.git("add", ".")
	b.git("commit", "-q", "-m", "y")
	b.program("repair", `echo repaired >> svc/a; echo new > svc/new`)
	b.program("docker", `[ "$1" != build ] || { cat svc/*; [ ! -e ../broken ]; }`)
	b.config.Programs = []string{"repair"}
	b.chainPlan(`[["repair"]]`)
	return b
}

func (b *testEnv) chainPlan(commands string) {
	b.plan(`[{"name":"patch","parameters":{"commands":` + commands + `,"allowlist":["svc/*"]}},
		{"name":"build","parameters":{"command":["docker","build"]}},
		{"name":"restart","parameters":{"command":["docker","up"]}},
		{"name":"verify","parameters":{}},
		{"name":"rollback","parameters":{"strategies":[{"type":"rebuild","commands":[["docker","rebuild"]]}]}}]`)
}

func (b *testEnv) runChain(root string, want map[string]bool, steps ...string) {
	b.t.Helper()
	for _, step := range steps {
		if failure := b.chain(root, step); (failure == nil) != want[step] {
			b.t.Fatalf("%s of chain %s: %v", step, root, failure)
		}
	}
}

// TestRetriedRun: from patch to rollback, and again.
func TestRetriedRun(t *testing.T) {
	t.Parallel()
	const before = "a\nb\no\n"
	files := `cat svc/a svc/b other; test ! -e svc/new || cat svc/new`
	begin := func(t *testing.T) *testEnv {
		b := chains(t)
		b.shell(`touch ../broken`)
		b.runChain("one", map[string]bool{"patch": true, "rollback": true}, "patch", "build", "rollback")
		same(t, "files after the rollback", b.shell(files), before)
		b.steps.attempt = 2
		return b
	}
	t.Run("from build", func(t *testing.T) {
		t.Parallel()
		b := begin(t)
		b.shell(`rm ../broken; echo theirs >> other`)
		b.runChain("two", map[string]bool{"build": true, "restart": true}, "build", "restart")
		same(t, "files", b.shell(files), "a\nrepaired\nb\no\ntheirs\nnew\n")
		if log := b.artifact("build.log"); !strings.HasPrefix(log, "[The run was rolled back; its change is made again: svc/a, svc/new]\n$ docker build\na\nrepaired\nb\nnew") {
			t.Error(log)
		}
		// It fails after all, and is taken back once more.
		b.runChain("two", map[string]bool{"rollback": true}, "rollback")
		same(t, "files after the second rollback", b.shell(files), before+"theirs\n")
		if log := b.artifact("rollback.log"); !strings.Contains(log, "tree: as before the run (2 files restored, 0 set aside)") {
			t.Error(log)
		}
	})
	t.Run("from build, refused", func(t *testing.T) {
		t.Parallel()
		b := begin(t)
		b.shell(`echo mine >> svc/a`)
		failure := b.chain("two", "build")
		if failure == nil || !strings.HasPrefix(failure.Error(), "Files that the run has changed were edited since: svc/a. ") {
			t.Fatal(failure)
		}
		b.runChain("two", map[string]bool{"rollback": true}, "rollback")
		same(t, "files", b.shell(files), "a\nmine\nb\no\n")
		same(t, "log", b.artifact("rollback.log"), "[A rollback has taken back what the run had changed, and the run has changed nothing since: there is nothing to take back.]")
	})
	t.Run("from patch", func(t *testing.T) {
		t.Parallel()
		b := begin(t)
		b.shell(`echo mine >> svc/a; echo mine >> svc/b`)
		b.runChain("two", map[string]bool{"patch": true, "rollback": true}, "patch", "build")
		same(t, "files", b.shell(files), "a\nmine\nrepaired\nb\nmine\no\nnew\n")
		// To the state before this attempt.
		b.runChain("two", map[string]bool{"rollback": true}, "rollback")
		same(t, "files after the rollback", b.shell(files), "a\nmine\nb\nmine\no\n")
	})
	t.Run("from patch, not rolled back before", func(t *testing.T) {
		t.Parallel()
		b := chains(t)
		b.shell(`touch ../broken`)
		b.runChain("one", map[string]bool{"patch": true}, "patch", "build")
		b.steps.attempt = 2
		b.runChain("two", map[string]bool{"patch": true, "rollback": true}, "patch", "build", "rollback")
		same(t, "files", b.shell(files), before)
	})
}

// TestRetriedRunOfEdits: what the run deploys are the operator's uncommitted edits.
func TestRetriedRunOfEdits(t *testing.T) {
	t.Parallel()
	b := chains(t)
	b.chainPlan(`[["git","status","--short"]]`)
	b.shell(`touch ../broken; echo edited >> svc/a; git add svc/a; echo more >> svc/a; echo mine > svc/new`)
	status := b.shell(`git status --short --untracked-files=all; git diff; git diff --cached`)
	b.runChain("one", map[string]bool{"patch": true, "rollback": true}, "patch", "build", "rollback")
	same(t, "status after the rollback", b.shell(`git status --short`), "")
	b.steps.attempt = 2
	b.shell(`rm ../broken`)
	b.runChain("two", map[string]bool{"build": true}, "build")
	same(t, "edits", b.shell(`git status --short --untracked-files=all; git diff; git diff --cached`), status)
	if log := b.artifact("build.log"); !strings.HasPrefix(log, "[The run was rolled back; its change is made again: svc/a, svc/new]\n") {
		t.Error(log)
	}
}

// TestRetriedPatchAfterViolations, which a run without a rollback has only undone.
func TestRetriedPatchAfterViolations(t *testing.T) {
	t.Parallel()
	b := chains(t)
	b.program("repair", `echo repaired >> svc/a; [ ! -e ../broken ] || echo bad >> other`)
	b.shell(`touch ../broken`)
	if failure := b.chain("one", "patch"); failure == nil || !strings.Contains(failure.Error(), "other is not allow-listed") {
		t.Fatal(failure)
	}
	b.steps.attempt = 2
	b.shell(`rm ../broken`)
	b.runChain("two", map[string]bool{"patch": true, "build": true, "rollback": true}, "patch", "build")
	same(t, "files", b.shell(`cat svc/a other`), "a\nrepaired\nrepaired\no\n")
	b.runChain("two", map[string]bool{"rollback": true}, "rollback")
	same(t, "files after the rollback", b.shell(`cat svc/a other`), "a\no\n")
}
