package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/moonladderstudios/mm-orchestrator/tasks/speckit/preflight"
)

// spec checks what the Spec workflow needs: the tasks root, the directory for files, and
// what its tasks check before they do anything.
func (d *doctor) spec(ctx context.Context) []verdict {
	c := d.config
	if c.Spec.Consume == nil {
		return ok("the worker does not run the Spec workflow: %s is not set", c.name("MM_ORCHESTRATOR_SPEC_QUEUES"))
	}
	list := d.tasksRoot()
	list = append(list, d.specArtifacts()...)
	if c.Spec.TestMode {
		return append(list, ok("test mode: Codex and GitHub are simulated (%s)", c.name("TEST_MODE"))...)
	}
	report, err := c.checkServices(ctx, d.program.env, c.Spec.Repository, d.redactor, d.program.redactor())
	if err != nil {
		return append(list, failed(err)...)
	}
	list = append(list, serviceVerdict(report.Codex)...)
	if c.Spec.Repository == "" {
		list = append(list, note("Check the token for one: mm-orchestrator spec preflight --repository OWNER/NAME", "the token for GitHub is not checked: %s is not set, so that each run names its repository", c.name("GITHUB_REPOSITORY"))...)
	} else {
		list = append(list, serviceVerdict(report.GitHub)...)
	}
	switch report.Login.Status {
	case preflight.LoginFailed:
		list = append(list, fail("", "%s", report.Login.Message)...)
	case preflight.LoginPassed:
		list = append(list, ok("volume %s: %s", c.Services.CodexVolume, report.Login.Message)...)
	}
	return list
}

func serviceVerdict(f preflight.Finding) []verdict {
	switch {
	case f.Status.Fails():
		return fail("", "%s", f.Message)
	case f.Status == preflight.ExpiresSoon, strings.Contains(f.Message, "which is soon"):
		return note("", "%s", f.Message)
	}
	return ok("%s", f.Message)
}

func (d *doctor) tasksRoot() []verdict {
	root := d.config.speckit().TasksRoot
	cure := "Set " + d.config.name("TASKS_ROOT") + " and " + d.config.name("REPO_ROOT") + " to where the features are; MoonMind's workers mount ./specs at /app/specs"
	found, err := filepath.Glob(filepath.Join(globbed(root), "*", "tasks"+".md"))
	switch _, statErr := os.Stat(root); {
	case statErr != nil:
		return fail(cure, "the tasks root cannot be read: %v", statErr)
	case err != nil:
		return fail(cure, "the tasks root %s cannot be listed: %v", root, err)
	case len(found) == 0:
		return note(cure, "the tasks root %s has no feature with a list of tasks", root)
	}
	return ok("the tasks root %s has %s", root, counted(len(found), "feature"))
}

// globbed is a path in a pattern.
func globbed(path string) string {
	return strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`).Replace(path)
}

// specArtifacts checks that files of runs can be written. It writes nothing.
func (d *doctor) specArtifacts() []verdict {
	const anyRun = "00000000-0000-4000-8000-000000000000"
	place, err := d.config.speckit().RunDirectory("", anyRun)
	if err != nil {
		return failed(err)
	}
	dir := filepath.Dir(place.Dir)
	existing := dir
	for !exists(existing) {
		existing = filepath.Dir(existing)
	}
	const write, search = 2, 1
	if err := syscall.Access(existing, write|search); err != nil {
		return fail("Mount it writable for the worker, or set "+d.config.name("ARTIFACTS_ROOT"), "files of runs go to %s, but %s is not writable: %v", dir, existing, err)
	}
	return ok("files of runs go to %s", dir)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
