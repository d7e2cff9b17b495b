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

// Checks of what only some steps need. A worker can run without it, so these
// checks note problems and never fail.

// skillTimeout limits the search of a Python for MoonMind's module, which imports
// its parent packages.
const skillTimeout = 15 * time.Second

// skills checks that there is a Python that can run MoonMind's skills.
func (d *doctor) skills(ctx context.Context) []verdict {
	const consequence = "Only runs with a skill need it, and they fail without it"
	python := orchestrator.FindSkillPython(d.environ, d.config.Workspace)
	if python == "" {
		return note(consequence+": to run them, install a python that has MoonMind beside the worker", "there is no python on the PATH")
	}
	ctx, cancel := context.WithTimeout(ctx, skillTimeout)
	defer cancel()
	// The plan runs python -m, which has the workspace on its path; so has -c.
	_, err := d.output(ctx, python, "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None and 'no module named ' + sys.argv[1])", orchestrator.SkillModule)
	if err != nil {
		message := err.Error()
		if ctx.Err() != nil {
			message = fmt.Sprintf("no answer within %s", skillTimeout)
		}
		return note(consequence+": to run them, install MoonMind for this python, or put another one first on the PATH", "%s does not find MoonMind's skills: %s", python, lastLine(message))
	}
	return ok("%s finds MoonMind's skills", python)
}

// lastLine returns the last line, where Python prints the error.
func lastLine(text string) string {
	text = strings.TrimSpace(text)
	return text[strings.LastIndex(text, "\n")+1:]
}

// verify checks the health URLs that runs ask in their last step.
func (d *doctor) verify(ctx context.Context) []verdict {
	var list []verdict
	for _, service := range orchestrator.Services() {
		planned, replacement := orchestrator.PlannedHealthURL(service), d.config.HealthURLs[service]
		target := cmp.Or(replacement, planned)
		if target == "" {
			continue // verify inspects the containers instead
		}
		cure := "Correct " + d.config.name("MM_ORCHESTRATOR_HEALTH_URL")
		if replacement == "" {
			cure = fmt.Sprintf("Set %s, which MoonMind serves; otherwise verify fails, and with it every run for %s", d.config.assign("MM_ORCHESTRATOR_HEALTH_URL", service+"=http://api:5000/healthz"), service)
		}
		shown := address.MaskURL(target)
		probeCtx, cancel := context.WithTimeout(ctx, 3*time.Second)
		status, err := orchestrator.ProbeHealth(probeCtx, d.environ, target, 2*time.Second)
		cancel()
		switch {
		case err == nil && status == orchestrator.PlannedHealthStatus:
			list = append(list, ok("health URL of %s, %s, answers %d", service, shown, status)...)
		case err == nil:
			list = append(list, note(cure, "health URL of %s, %s, answers %d instead of %d", service, shown, status, orchestrator.PlannedHealthStatus)...)
		case replacement == "":
			list = append(list, note(cure, "health URL of %s is %s, as plans say, which MoonMind's API does not serve (no answer now: %v)", service, shown, err)...)
		default:
			// The service may be stopped, or unreachable from here. Only a run
			// can tell.
			list = append(list, ok("health URL of %s is %s, no answer now (%v)", service, shown, err)...)
		}
	}
	return list
}

// gitLock looks for lock files of git. A killed git leaves them behind, and then
// every patch and rollback fails.
func (d *doctor) gitLock(ctx context.Context) []verdict {
	locks, err := d.gitLocks(ctx)
	if err != nil {
		return note("Repair the repository", "cannot search git's directories for locks: %v", err)
	}
	var list []verdict
	for _, path := range locks {
		info, err := os.Lstat(path)
		if err != nil {
			continue // deleted meanwhile, so it was in use
		}
		age := time.Since(info.ModTime()).Round(time.Second)
		git, visible := gitAtWork(d.workTree, path)
		switch {
		case git != 0:
			list = append(list, ok("%s is %s old and in use by git (process %d)", path, age, git)...)
		case visible:
			list = append(list, note("If no git in another container or on another machine uses it, run: rm "+path,
				"%s is %s old, and no git process on this machine uses it: patch and rollback fail until it is removed", path, age)...)
		default:
			list = append(list, note("If no git uses it, run: rm "+path,
				"%s is %s old; this system does not show whether a git process uses it: patch and rollback fail until it is removed", path, age)...)
		}
	}
	if len(list) == 0 {
		return ok("no stale lock file of git")
	}
	return list
}

// lockNames are the lock files that make the git commands of runs fail.
var lockNames = []string{"index.lock", "HEAD.lock", "config.lock", "packed-refs.lock"}

// gitLocks searches the git directory of the work tree, the one that it shares
// with other work trees, and those of its submodules.
func (d *doctor) gitLocks(ctx context.Context) ([]string, error) {
	own, err := d.gitOutput(ctx, "rev-parse", "--absolute-git-dir")
	if err != nil {
		return nil, err
	}
	shared, err := d.gitOutput(ctx, "rev-parse", "--git-common-dir")
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
			return nil // skip unreadable directories
		case slices.Contains([]string{"objects", "refs", "logs", "hooks", "lfs"}, entry.Name()):
			return fs.SkipDir
		}
		in(path)
		return nil
	})
	// Submodules made by old versions of git keep their git directory in the
	// work tree.
	paths, _ := d.gitOutput(ctx, "config", "--null", "--file", filepath.Join(d.workTree, ".gitmodules"), "--get-regexp", `^submodule\..*\.path$`)
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

// gitAtWork returns the process id of a git that has the lock open, or that
// works in the work tree or in the lock's directory; 0 if there is none. visible
// is false if the system does not list processes.
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
