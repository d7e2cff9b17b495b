package main

import (
	"cmp"
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator"
)

// What fails only in a step of some run: a worker is well without it, so that
// these checks note it and do not fail.

// skillTime bounds how long a Python may take to look for MoonMind, whose
// packages it imports for that.
const skillTime = 15 * time.Second

// skills says whether plans with a skill find their Python.
func (d *doctor) skills(ctx context.Context) []verdict {
	const others = "Runs with a skill fail, all others do not need it"
	python := orchestrator.FindSkillPython(d.environ, d.config.Workspace)
	if python == "" {
		return note(others+": to run them, install a python with MoonMind beside the worker", "there is no program python")
	}
	ctx, cancel := context.WithTimeout(ctx, skillTime)
	defer cancel()
	// As with the -m of a plan, the workspace is on Python's path.
	_, err := d.say(ctx, python, "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None and 'no module named ' + sys.argv[1])", orchestrator.SkillModule)
	if err != nil {
		words := err.Error()
		if ctx.Err() != nil {
			words = fmt.Sprintf("no answer within %s", skillTime)
		}
		return note(others+": to run them, install MoonMind for this python, or put another one first on the PATH", "%s does not find MoonMind's skills: %s", python, lastOf(words))
	}
	return ok("%s finds MoonMind's skills", python)
}

// lastOf is the last line, where Python says what is wrong.
func lastOf(text string) string {
	text = strings.TrimSpace(text)
	return text[strings.LastIndex(text, "\n")+1:]
}

// verify says whether the health check that runs end with can be answered.
func (d *doctor) verify(ctx context.Context) []verdict {
	var list []verdict
	for _, service := range orchestrator.Services() {
		planned, replaced := orchestrator.PlannedHealthURL(service), d.config.HealthURLs[service]
		asks := cmp.Or(replaced, planned)
		if asks == "" {
			continue // containers are looked at instead
		}
		cure := "Correct " + d.config.name("MM_ORCHESTRATOR_HEALTH_URL")
		if replaced == "" {
			cure = fmt.Sprintf("Set %s, which MoonMind answers: verify fails otherwise, and with it each run for %s", d.config.assign("MM_ORCHESTRATOR_HEALTH_URL", service+"=http://api:5000/healthz"), service)
		}
		shown := address.MaskURL(asks)
		asked, cancel := context.WithTimeout(ctx, 3*time.Second)
		status, err := orchestrator.ProbeHealth(asked, d.environ, asks, 2*time.Second)
		cancel()
		switch {
		case err == nil && status == orchestrator.PlannedHealthStatus:
			list = append(list, ok("%s is asked at %s, which answers %d", service, shown, status)...)
		case err == nil:
			list = append(list, note(cure, "%s is asked at %s, which answers %d and not %d", service, shown, status, orchestrator.PlannedHealthStatus)...)
		case replaced == "":
			list = append(list, note(cure, "%s is asked at %s, as the plans say, which MoonMind's API does not serve (nobody answers at the moment: %v)", service, shown, err)...)
		default:
			// The service may be down, or never reachable from here: only
			// a run shows.
			list = append(list, ok("%s is asked at %s, where nobody answers at the moment (%v)", service, shown, err)...)
		}
	}
	return list
}

// gitLock finds files by which git thinks that another git is at work. One
// that was killed leaves them behind, and every patch and rollback fails.
func (d *doctor) gitLock(ctx context.Context) []verdict {
	locks, err := d.gitLocks(ctx)
	if err != nil {
		return note("Repair the repository", "the directories of git cannot be searched for locks: %v", err)
	}
	var list []verdict
	for _, path := range locks {
		info, err := os.Lstat(path)
		if err != nil {
			continue // gone meanwhile: it was in use
		}
		age := time.Since(info.ModTime()).Round(time.Second)
		git, visible := gitAtWork(d.workTree, path)
		switch {
		case git != 0:
			list = append(list, ok("%s is %s old and in use by git (process %d)", path, age, git)...)
		case visible:
			list = append(list, note("If no git works there in another container or on another machine, run: rm "+path,
				"%s is %s old, and no git that can be seen from here works there: patch and rollback fail until it is gone", path, age)...)
		default:
			list = append(list, note("If no git works there, run: rm "+path,
				"%s is %s old; whether a git works there cannot be seen on this system: patch and rollback fail until it is gone", path, age)...)
		}
	}
	if len(list) == 0 {
		return ok("no lock of git is left over")
	}
	return list
}

// lockNames are those that commands of runs meet.
var lockNames = []string{"index.lock", "HEAD.lock", "config.lock", "packed-refs.lock"}

// gitLocks looks into the work tree's own directory, that which it shares with
// other work trees, and those of its submodules.
func (d *doctor) gitLocks(ctx context.Context) ([]string, error) {
	own, err := d.say(ctx, "git", "-c", "safe.directory=*", "rev-parse", "--absolute-git-dir")
	if err != nil {
		return nil, err
	}
	shared, err := d.say(ctx, "git", "-c", "safe.directory=*", "rev-parse", "--git-common-dir")
	if err != nil {
		return nil, err
	}
	if !filepath.IsAbs(shared) {
		shared = filepath.Join(d.config.Workspace, shared)
	}
	found := map[string]bool{}
	in := func(dir string) {
		for _, name := range lockNames {
			path := filepath.Join(dir, name)
			if _, err := os.Lstat(path); err == nil {
				found[path] = true
			}
		}
	}
	in(own)
	in(filepath.Clean(shared))
	_ = filepath.WalkDir(filepath.Join(own, "modules"), func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil || !entry.IsDir():
			return nil // what cannot be read is left out
		case slices.Contains([]string{"objects", "refs", "logs", "hooks", "lfs"}, entry.Name()):
			return fs.SkipDir
		}
		in(path)
		return nil
	})
	// Old submodules keep their directory in the work tree.
	paths, _ := d.say(ctx, "git", "-c", "safe.directory=*", "config", "--null", "--file", filepath.Join(d.workTree, ".gitmodules"), "--get-regexp", `^submodule\..*\.path$`)
	for entry := range strings.SplitSeq(paths, "\x00") {
		if _, path, given := strings.Cut(entry, "\n"); given && filepath.IsLocal(path) {
			in(filepath.Join(d.workTree, path, ".git"))
		}
	}
	list := make([]string, 0, len(found))
	for path := range found {
		list = append(list, path)
	}
	slices.Sort(list)
	return list, nil
}

// gitAtWork returns the process id of a git that has the lock open, or whose
// directory is below the work tree or that of the lock; 0 if there is none
// that can be seen. visible is false where processes cannot be listed.
func gitAtWork(workTree, lock string) (pid int, visible bool) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, false
	}
	dir := filepath.Dir(lock)
	for _, entry := range entries {
		n, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		visible = true
		proc := filepath.Join("/proc", entry.Name())
		name, err := os.ReadFile(filepath.Join(proc, "comm"))
		if err != nil || !strings.HasPrefix(string(name), "git") {
			continue
		}
		if at, err := os.Readlink(filepath.Join(proc, "cwd")); err == nil && (below(at, workTree) || below(at, dir)) {
			return n, true
		}
		open, _ := os.ReadDir(filepath.Join(proc, "fd"))
		for _, fd := range open {
			if at, err := os.Readlink(filepath.Join(proc, "fd", fd.Name())); err == nil && at == lock {
				return n, true
			}
		}
	}
	return 0, visible
}

func below(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }
