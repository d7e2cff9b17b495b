package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// findingOf returns the finding of a check, in an environment in which no check
// fails: notes leave the exit code at 0.
func (s testEnv) findingOf(t *testing.T, check string, args ...string) finding {
	t.Helper()
	return runDoctor(t, append(s.env(), "MM_ORCHESTRATOR_COMPOSE="+dockerOnPath(t)), exitOK, args...)[check]
}

func gitIn(t *testing.T, dir string, args ...string) {
	t.Helper()
	cmd := exec.Command("git", append([]string{"-c", "protocol.file.allow=always", "-c", "user.name=t", "-c", "user.email=t@example.com"}, args...)...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("git %q: %v\n%s", args, err, out)
	}
}

// A lock that a killed git left behind fails the check, with its age and cure: in
// the repository, in a submodule, and in a linked work tree. The lock of a running
// git is ok.
func TestDoctorFindsStaleGitLock(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	s.git(t)
	if f := s.findingOf(t, "git-lock"); f.Status != statusOK {
		t.Fatalf("%+v", f)
	}
	library := t.TempDir()
	gitIn(t, library, "init", "-q")
	gitIn(t, library, "commit", "-q", "--allow-empty", "-m", "start")
	gitIn(t, s.workspace, "submodule", "--quiet", "add", library, "library")
	gitIn(t, s.workspace, "commit", "-q", "-m", "library")
	linked := filepath.Join(t.TempDir(), "linked")
	gitIn(t, s.workspace, "worktree", "add", "-q", linked)
	spaced := filepath.Join(t.TempDir(), "it's a copy")
	gitIn(t, s.workspace, "clone", "-q", ".", spaced)
	for name, tt := range map[string]struct{ workspace, lock string }{
		"with spaces":     {spaced, spaced + "/.git/index.lock"},
		"repository":      {s.workspace, s.workspace + "/.git/index.lock"},
		"submodule":       {s.workspace, s.workspace + "/.git/modules/library/index.lock"},
		"its settings":    {s.workspace, s.workspace + "/.git/config.lock"},
		"linked":          {linked, s.workspace + "/.git/worktrees/linked/index.lock"},
		"shared by links": {linked, s.workspace + "/.git/packed-refs.lock"},
	} {
		if err := os.WriteFile(tt.lock, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		old := time.Now().Add(-3 * time.Hour)
		if err := os.Chtimes(tt.lock, old, old); err != nil {
			t.Fatal(err)
		}
		f := runDoctor(t, append(s.env(), "MM_ORCHESTRATOR_COMPOSE="+dockerOnPath(t)), exitFailure, "--workspace="+tt.workspace)["git-lock"]
		if f.Status != statusFail || !strings.HasPrefix(f.Found, tt.lock+" is 3h0m") || !strings.Contains(f.Found, "no git process on this machine") || !strings.Contains(f.Cure, "rm "+change.ShellQuote(tt.lock)) {
			t.Errorf("%s: %+v", name, f)
		}
		// The command does what it says, whatever the path has.
		_, command, _ := strings.Cut(f.Cure, "run: ")
		if out, err := exec.Command("sh", "-c", command).CombinedOutput(); err != nil {
			t.Errorf("%s: %s: %v %s", name, command, err, out)
		}
		if _, err := os.Lstat(tt.lock); !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}

	// A git that waits for its message has the lock of the index.
	editor := filepath.Join(t.TempDir(), "editor")
	if err := os.WriteFile(editor, []byte("#!/bin/sh\nread line <\"$WAIT_FOR\"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	pipe := filepath.Join(t.TempDir(), "pipe")
	if out, err := exec.Command("mkfifo", pipe).CombinedOutput(); err != nil {
		t.Fatalf("mkfifo: %v: %s", err, out)
	}
	commit := exec.Command("git", "-c", "user.name=t", "-c", "user.email=t@example.com", "commit", "--allow-empty", "-a")
	commit.Dir, commit.Env = s.workspace, append(os.Environ(), "GIT_EDITOR="+editor, "WAIT_FOR="+pipe)
	if err := commit.Start(); err != nil {
		t.Fatal(err)
	}
	lock := s.workspace + "/.git/index.lock"
	eventually(t, "git has the lock", func() error {
		_, err := os.Stat(lock)
		return err
	})
	if f := s.findingOf(t, "git-lock"); f.Status != statusOK || !strings.Contains(f.Found, fmt.Sprintf("in use by git (process %d)", commit.Process.Pid)) {
		t.Errorf("%+v", f)
	}
	if err := os.WriteFile(pipe, []byte("\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_ = commit.Wait() // of an empty message: it may fail
}

// Settings of the repository hide no files from the check, and make git start no
// program.
func TestDoctorRunsGitWithoutSettingsOfTheRepository(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	s.git(t)
	ran := filepath.Join(t.TempDir(), "ran")
	program := filepath.Join(t.TempDir(), "fsmonitor")
	if err := os.WriteFile(program, []byte("#!/bin/sh\ntouch "+ran+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	gitIn(t, s.workspace, "config", "status.showUntrackedFiles", "no")
	gitIn(t, s.workspace, "config", "core.fsmonitor", program)
	if err := os.WriteFile(filepath.Join(s.workspace, "new.txt"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if f := s.findingOf(t, "git"); f.Status != statusNote || !strings.Contains(f.Found, "has 1 changed or untracked files") {
		t.Errorf("%+v", f)
	}
	if _, err := os.Stat(ran); err == nil {
		t.Error("git has run core.fsmonitor")
	}
}

// Skills need a Python that finds MoonMind, here in the workspace.
func TestDoctorNotesMissingSkillPython(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	s.git(t)
	bin := t.TempDir()
	for _, name := range []string{"git", "sh"} {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(path, filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	path := func(dirs string) environment {
		return append(s.env(), "MM_ORCHESTRATOR_COMPOSE="+dockerOnPath(t), "PATH="+dirs)
	}
	if f := runDoctor(t, path(bin), exitOK)["skills"]; f.Status != statusNote || !strings.Contains(f.Found, "no python on the PATH") {
		t.Errorf("without python: %+v", f)
	}
	// Not a symbolic link: it would not find the packages beside the real program.
	python := fmt.Sprintf("#!/bin/sh\nexec %s \"$@\"\n", devenv.Celery(t, "5.7.0"))
	if err := os.WriteFile(filepath.Join(bin, "python"), []byte(python), 0o700); err != nil {
		t.Fatal(err)
	}
	if f := runDoctor(t, path(bin), exitOK)["skills"]; f.Status != statusNote || !strings.Contains(f.Found, "No module named 'moonmind'") {
		t.Errorf("without MoonMind: %+v", f)
	}
	module := filepath.Join(s.workspace, "moonmind", "workflows", "orchestrator")
	if err := os.MkdirAll(module, 0o700); err != nil {
		t.Fatal(err)
	}
	for dir := module; dir != s.workspace; dir = filepath.Dir(dir) {
		if err := os.WriteFile(filepath.Join(dir, "__init__.py"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if f := runDoctor(t, path(bin), exitOK)["skills"]; f.Status != statusNote || !strings.Contains(f.Found, "no module named moonmind.workflows.orchestrator.skill_executor") {
		t.Errorf("with an older MoonMind: %+v", f)
	}
	if err := os.WriteFile(filepath.Join(module, "skill_executor.py"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if f := runDoctor(t, path(bin), exitOK)["skills"]; f.Status != statusOK {
		t.Errorf("with MoonMind: %+v", f)
	}
}

// MoonMind does not serve the health URL of its plans; a configured replacement is
// asked instead.
func TestDoctorNotesHealthURLThatNobodyServes(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	s.git(t)
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/healthz" {
			w.WriteHeader(http.StatusNotFound)
		}
	}))
	t.Cleanup(api.Close)
	for _, tt := range []struct{ name, set, status, found string }{
		{"as planned", "", statusNote, "health URL of api is http://api:5000/health, as plans say, which MoonMind's API does not serve"},
		{"another that is wrong", "--health-url=api=" + api.URL + "/health", statusNote, "/health, answers 404 instead of 200"},
		{"right", "--health-url=api=" + api.URL + "/healthz", statusOK, "/healthz, answers 200"},
		{"unreachable", "--health-url=api=http://127.0.0.1:1/healthz", statusOK, "no answer now"},
	} {
		var args []string
		if tt.set != "" {
			args = []string{tt.set}
		}
		f := s.findingOf(t, "verify", args...)
		if f.Status != tt.status || !strings.Contains(f.Found, tt.found) || f.Status == statusNote && !strings.Contains(strings.ToLower(f.Cure), "health") {
			t.Errorf("%s: %+v", tt.name, f)
		}
	}
}

// A compose version with a known fault is reported with the fault.
func TestDoctorNotesComposeFaults(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	s.git(t)
	for version, want := range map[string]struct {
		code          int
		status, found string
	}{
		"1.29.2": {exitFailure, statusFail, "lacks --wait"},
		"2.20.3": {exitOK, statusNote, "older than 2.26"},
		"2.40.3": {exitOK, statusNote, "exits with code 0 when --wait-timeout is exceeded"},
		"5.6.0":  {exitOK, statusOK, "compose 5.6.0"},
	} {
		f := runDoctor(t, s.env(), want.code, "--compose="+fakeCompose(t, version))["compose"]
		if f.Status != want.status || !strings.Contains(f.Found, want.found) || !strings.Contains(f.Found, version) {
			t.Errorf("%s: %+v", version, f)
		}
	}
}

// In the middle of a merge, every run is refused.
func TestDoctorFindsMergeInProgress(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	s.git(t)
	gitIn(t, s.workspace, "checkout", "-q", "-b", "other")
	gitIn(t, s.workspace, "commit", "-q", "--allow-empty", "-m", "theirs")
	gitIn(t, s.workspace, "checkout", "-q", "-")
	gitIn(t, s.workspace, "commit", "-q", "--allow-empty", "-m", "ours")
	gitIn(t, s.workspace, "merge", "-q", "--no-commit", "other")
	f := runDoctor(t, append(s.env(), "MM_ORCHESTRATOR_COMPOSE="+dockerOnPath(t)), exitFailure)["git-state"]
	if f.Status != statusFail || !strings.HasPrefix(f.Found, "a merge is in progress in "+s.workspace) || !strings.Contains(f.Cure, "git merge --abort") {
		t.Errorf("%+v", f)
	}
}

// The doctor does not even refresh the index, as git status does by itself.
func TestDoctorLeavesTheIndexAlone(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	s.git(t)
	file := filepath.Join(s.workspace, "file.txt")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	gitIn(t, s.workspace, "add", "file.txt")
	gitIn(t, s.workspace, "commit", "-q", "-m", "file")
	old := time.Now().Add(-time.Hour)
	if err := os.Chtimes(file, old, old); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(filepath.Join(s.workspace, ".git", "index"))
	if err != nil {
		t.Fatal(err)
	}
	if f := s.findingOf(t, "git"); f.Status != statusOK {
		t.Errorf("%+v", f)
	}
	if after, err := os.ReadFile(filepath.Join(s.workspace, ".git", "index")); err != nil || string(after) != string(before) {
		t.Errorf("the index has changed (%v)", err)
	}
}
