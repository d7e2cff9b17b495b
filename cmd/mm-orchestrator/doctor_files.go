package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator"
)

func fileOwner(info fs.FileInfo) int {
	if stat, known := info.Sys().(*syscall.Stat_t); known {
		return int(stat.Uid)
	}
	return -1
}

// output runs a program in the workspace, if that exists, with the environment
// of a plan's commands. It returns the trimmed stdout, or an error with the text
// of stderr.
func (d *doctor) output(ctx context.Context, argv ...string) (string, error) {
	return d.outputIn(ctx, d.environ, argv...)
}

// gitOutput is output of a git command that settings do not alter.
func (d *doctor) gitOutput(ctx context.Context, args ...string) (string, error) {
	return d.outputIn(ctx, change.GitEnviron(d.environ, "*"), append([]string{"git"}, args...)...)
}

func (d *doctor) outputIn(ctx context.Context, environ []string, argv ...string) (string, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = environ
	if info, err := os.Stat(d.config.Workspace); err == nil && info.IsDir() {
		cmd.Dir = d.config.Workspace
	}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = time.Second // a descendant may keep the pipes open
	if err := cmd.Run(); err != nil {
		if message := strings.TrimSpace(errs.String()); message != "" {
			return "", errors.New(message)
		}
		return "", err
	}
	return strings.TrimSpace(out.String()), nil
}

// workspace checks that the workspace exists and is writable.
func (d *doctor) workspace(context.Context) []verdict {
	path := d.config.Workspace
	if err := d.config.checkWorkspace(); err != nil {
		return failed(err)
	}
	// access(2) checks the real user id, which in a worker is the effective one.
	if err := syscall.Access(path, 2); err != nil {
		return fail("Run the worker as its owner, mount it writable, or change its permissions", "%s is not writable for user %d", path, os.Getuid())
	}
	return ok("%s is writable for user %d", path, os.Getuid())
}

// git checks the repository that patch and rollback change.
func (d *doctor) git(ctx context.Context) []verdict {
	path := d.config.Workspace
	if _, err := exec.LookPath("git"); err != nil {
		return fail("Install git: patch and rollback need it", "git is not installed, or not on the PATH")
	}
	top, err := d.gitOutput(ctx, "rev-parse", "--show-toplevel")
	if err != nil {
		return fail("Mount the repository there, or set "+d.config.name("WORKSPACE_ROOT")+" to its directory", "%s is not a git work tree: %v", path, err)
	}
	if _, err := d.gitOutput(ctx, "rev-parse", "--verify", "HEAD^{commit}"); err != nil {
		return fail("Make a first commit", "%s has no commit that a rollback could restore", top)
	}
	owner, err := ownerOf(top)
	if _, trusted := d.output(ctx, "git", "rev-parse", "--git-dir"); trusted != nil && err == nil {
		return note("Run: git config --global --add safe.directory "+top+", or run the worker as its owner",
			"%s belongs to user %d, this process runs as user %d; the worker tells git to trust it, but other programs that call git will fail", top, owner, os.Getuid())
	}
	changed, err := d.gitOutput(ctx, "status", "--porcelain", "-z")
	switch {
	case err != nil:
		return fail("Repair the work tree", "git status fails in %s: %v", top, err)
	case changed != "":
		return note("Commit what you want to keep: runs deploy these changes, and a rollback may undo them", "%s has %d changed or untracked files", path, strings.Count(changed, "\x00"))
	}
	return ok("%s is a clean work tree of user %d", top, owner)
}

func (d *doctor) compose(ctx context.Context) []verdict {
	d.composeProgram = compose.Program{Standalone: d.config.ComposeProgram}
	argv := d.composeProgram.Resolve([]string{"docker", "compose", "version", "--short"})
	version, err := d.output(ctx, argv...)
	if err != nil {
		found := fmt.Sprintf("%s failed: %v", argv[0], err)
		if argv[0] == "docker" {
			found = "docker compose failed: " + err.Error()
			// Without the plugin, docker parses the plugin's arguments itself.
			if strings.Contains(err.Error(), "unknown flag") || strings.Contains(err.Error(), "not a docker command") {
				found = "docker is installed, its compose plugin is not"
			}
		}
		return fail("Install docker with its compose plugin, or set "+d.config.name("MM_ORCHESTRATOR_COMPOSE")+" to a docker-compose program of version 2 or later", "%s", found)
	}
	fault := compose.FaultOf(version)
	switch {
	case fault.Unusable:
		return fail("Install version "+compose.OldestTested+" or later", "compose %s cannot be used: %s", version, fault.Text)
	case fault.Text != "":
		return note("Install another version, "+compose.OldestTested+" or later", "compose %s works, but %s", version, fault.Text)
	}
	return ok("compose %s", version)
}

func (d *doctor) services(ctx context.Context) []verdict {
	if d.config.checkWorkspace() != nil {
		return []verdict{{statusSkip, "needs the check workspace", ""}}
	}
	target, _ := compose.ParseTarget(compose.BuildCommand(orchestrator.ComposeProject, orchestrator.Services()[0]))
	text, err := d.output(ctx, d.composeProgram.Resolve(target.ServicesCommand())...)
	if err != nil {
		return fail("Correct the file, set COMPOSE_FILE, or set "+d.config.name("WORKSPACE_ROOT")+" to the file's directory", "the compose file cannot be read: %v", err)
	}
	defined := compose.ParseServices(text)
	var missing []string
	for _, service := range orchestrator.Services() {
		if !slices.Contains(defined, service) {
			missing = append(missing, service)
		}
	}
	switch {
	case len(missing) == len(orchestrator.Services()):
		return fail("Point COMPOSE_FILE or "+d.config.name("WORKSPACE_ROOT")+" to MoonMind's compose file", "the compose file defines none of the services that runs can repair (%s); it defines %s", strings.Join(missing, ", "), strings.Join(defined, ", "))
	case len(missing) > 0:
		return note("Runs for the missing services fail; ignore this if there are no such runs", "the compose file defines %s, but not %s", strings.Join(defined, ", "), strings.Join(missing, ", "))
	}
	return ok("project %s has %s", orchestrator.ComposeProject, strings.Join(orchestrator.Services(), ", "))
}

// artifacts checks that a worker can create the directories of runs, without
// creating one, and that the directories named in the runs' rows exist here.
func (d *doctor) artifacts(context.Context) []verdict {
	root, err := d.config.artifactDirectory().WithDefaults().Root()
	if err != nil {
		return failed(err)
	}
	at, created := root, ""
	for {
		if _, err := os.Stat(at); !errors.Is(err, fs.ErrNotExist) || at == filepath.Dir(at) {
			break
		}
		at, created = filepath.Dir(at), " (which the worker will create)"
	}
	if err := syscall.Access(at, 2|1); err != nil {
		return fail("Mount the artifact volume writable, change its permissions, or set "+d.config.name("WORKFLOW_ARTIFACTS_ROOT"), "%s is not writable for user %d", at, os.Getuid())
	}
	for _, m := range d.config.ArtifactMappings {
		if info, err := os.Stat(m.To); err != nil || !info.IsDir() {
			return fail("Mount the volume there, or correct the map", "%s maps %s to %s, which is not a directory", d.config.name("MM_ORCHESTRATOR_ARTIFACT_PATH_MAP"), m.From, m.To)
		}
	}
	existing, missing := d.runDirectories(d.runs)
	if existing == 0 && missing != "" {
		return note("If the API mounts the volume at another path, set "+d.config.assign("MM_ORCHESTRATOR_ARTIFACT_PATH_MAP", "/path/of/the/api=/path/here")+"; if the directories of old runs were deleted, ignore this",
			"none of the directories that the runs' rows name exists here, for example %s", missing)
	}
	free, err := freeSpace(root)
	least := uint64(d.config.DiskReserve) << 20
	const cure = "Free disk space: logs, images and builds need it"
	switch {
	case err != nil:
		return failed(err)
	case free < least:
		return fail(cure, "%s%s has %s free, less than the %s required by %s", root, created, mebibytes(free), mebibytes(least), d.config.name("MM_ORCHESTRATOR_DISK_RESERVE"))
	case free < 1<<30:
		return note(cure, "%s%s is writable, but only %s are free", root, created, mebibytes(free))
	}
	return ok("%s%s is writable, %s free", root, created, mebibytes(free))
}

// runDirectories counts the runs whose artifact directory exists, and returns
// one directory that does not, as its row names it. Runs that have not started
// have no directory yet.
func (d *doctor) runDirectories(runs []store.ListedRun) (existing int, missing string) {
	place := d.config.artifactDirectory().WithDefaults()
	for _, run := range runs {
		if run.ArtifactRoot == "" || run.StartedAt == nil {
			continue
		}
		of, err := place.ForRun(run.ArtifactRoot, run.ID)
		if err == nil {
			_, err = os.Stat(of.Dir)
		}
		if err == nil {
			existing++
		} else if missing == "" {
			missing = run.ArtifactRoot
		}
	}
	return existing, missing
}
