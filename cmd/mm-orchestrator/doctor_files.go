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

// say runs a program in the workspace, if that is there, with the environment of commands, and
// returns its trimmed output, or its last words as an error.
func (d *doctor) say(ctx context.Context, argv ...string) (string, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = d.environ
	if info, err := os.Stat(d.config.Workspace); err == nil && info.IsDir() {
		cmd.Dir = d.config.Workspace
	}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = time.Second // whoever inherits the output
	if err := cmd.Run(); err != nil {
		if words := strings.TrimSpace(errs.String()); words != "" {
			return "", errors.New(words)
		}
		return "", err
	}
	return strings.TrimSpace(out.String()), nil
}

// workspace says whether it can be worked in.
func (d *doctor) workspace(context.Context) []verdict {
	path := d.config.Workspace
	if err := d.config.checkWorkspace(); err != nil {
		return failed(err)
	}
	// access(2) asks for the real user; a worker has no other.
	if err := syscall.Access(path, 2); err != nil {
		return fail("Run the worker as its owner, mount it writable, or change its permissions", "%s may not be written by user %d", path, os.Getuid())
	}
	return ok("%s may be written by user %d", path, os.Getuid())
}

// git says whether patch and rollback can work.
func (d *doctor) git(ctx context.Context) []verdict {
	path := d.config.Workspace
	if _, err := exec.LookPath("git"); err != nil {
		return fail("Install git: patch and rollback need it", "there is no git program")
	}
	top, err := d.say(ctx, "git", "-c", "safe.directory=*", "rev-parse", "--show-toplevel")
	if err != nil {
		return fail("Mount the repository there, or name its directory by "+d.config.name("WORKSPACE_ROOT"), "%s is no git work tree: %v", path, err)
	}
	d.workTree = top
	if _, err := d.say(ctx, "git", "-c", "safe.directory=*", "rev-parse", "--verify", "HEAD^{commit}"); err != nil {
		return fail("Commit once", "%s has no commit: there is nothing that a rollback could go back to", top)
	}
	owner, err := ownerOf(top)
	if _, trusted := d.say(ctx, "git", "rev-parse", "--git-dir"); trusted != nil && err == nil {
		return note("Run: git config --global --add safe.directory "+top+", or run the worker as its owner",
			"%s belongs to user %d, we run as %d; the worker tells git to trust it, programs that call git by themselves do not", top, owner, os.Getuid())
	}
	changed, err := d.say(ctx, "git", "-c", "safe.directory=*", "status", "--porcelain", "-z")
	switch {
	case err != nil:
		return fail("Repair the work tree", "git status fails in %s: %v", top, err)
	case changed != "":
		return note("Runs deploy them, and a rollback may undo them: commit what shall stay", "%s has %d changed or untracked files", path, strings.Count(changed, "\x00"))
	}
	return ok("%s is a clean work tree of user %d", top, owner)
}

func (d *doctor) compose(ctx context.Context) []verdict {
	d.composing = compose.Program{Standalone: d.config.ComposeProgram}
	argv := d.composing.Resolve([]string{"docker", "compose", "version", "--short"})
	version, err := d.say(ctx, argv...)
	if err != nil {
		found := fmt.Sprintf("%s cannot be run: %v", argv[0], err)
		if argv[0] == "docker" {
			found = "docker compose cannot be run: " + err.Error()
			// docker takes the plugin's arguments for its own.
			if strings.Contains(err.Error(), "unknown flag") || strings.Contains(err.Error(), "not a docker command") {
				found = "docker is there, its compose plugin is not"
			}
		}
		return fail("Install docker with its compose plugin, or set "+d.config.name("MM_ORCHESTRATOR_COMPOSE")+" to a docker-compose program of version 2 or later", "%s", found)
	}
	fault := compose.FaultOf(version)
	switch {
	case fault.Unusable:
		return fail("Install version "+compose.OldestTested+" or later", "compose %s cannot be used: %s", version, fault.Text)
	case fault.Text != "":
		return note("Install another version, "+compose.OldestTested+" or later", "compose %s works; %s", version, fault.Text)
	}
	return ok("compose %s", version)
}

func (d *doctor) services(ctx context.Context) []verdict {
	if d.config.checkWorkspace() != nil {
		return []verdict{{statusSkip, "needs the check workspace", ""}}
	}
	target, _ := compose.ParseTarget(compose.BuildCommand(orchestrator.ComposeProject, orchestrator.Services()[0]))
	text, err := d.say(ctx, d.composing.Resolve(target.ServicesCommand())...)
	if err != nil {
		return fail("Correct it, set COMPOSE_FILE, or set "+d.config.name("WORKSPACE_ROOT")+" to where it is", "the compose file cannot be read: %v", err)
	}
	there := compose.ParseServices(text)
	var missing []string
	for _, service := range orchestrator.Services() {
		if !slices.Contains(there, service) {
			missing = append(missing, service)
		}
	}
	switch {
	case len(missing) == len(orchestrator.Services()):
		return fail("Set COMPOSE_FILE or "+d.config.name("WORKSPACE_ROOT")+" to MoonMind's", "the compose file has none of the services that runs can repair (%s); it has %s", strings.Join(missing, ", "), strings.Join(there, ", "))
	case len(missing) > 0:
		return note("Runs for the missing ones fail; nothing to do if there are none", "the compose file has %s, and not %s", strings.Join(there, ", "), strings.Join(missing, ", "))
	}
	return ok("project %s has %s", orchestrator.ComposeProject, strings.Join(orchestrator.Services(), ", "))
}

// artifacts says whether runs can have their directories, without making any,
// and whether those that rows name are seen here.
func (d *doctor) artifacts(context.Context) []verdict {
	root, err := d.config.place().WithDefaults().Root()
	if err != nil {
		return failed(err)
	}
	at, made := root, ""
	for {
		if _, err := os.Stat(at); !errors.Is(err, fs.ErrNotExist) || at == filepath.Dir(at) {
			break
		}
		at, made = filepath.Dir(at), " (made by the worker)"
	}
	if err := syscall.Access(at, 2|1); err != nil {
		return fail("Mount the artifact volume writable, change its permissions, or set "+d.config.name("WORKFLOW_ARTIFACTS_ROOT"), "%s may not be written by user %d", at, os.Getuid())
	}
	for _, m := range d.config.ArtifactMappings {
		if info, err := os.Stat(m.To); err != nil || !info.IsDir() {
			return fail("Mount the volume there, or correct the map", "%s leads from %s to %s, which is no directory", d.config.name("MM_ORCHESTRATOR_ARTIFACT_PATH_MAP"), m.From, m.To)
		}
	}
	seen, unseen := d.runDirectories(d.runs)
	if seen == 0 && unseen != "" {
		return note("If the API mounts the volume elsewhere, set "+d.config.assign("MM_ORCHESTRATOR_ARTIFACT_PATH_MAP", "/path/of/the/api=/path/here")+"; if old runs were removed, ignore this",
			"rows of runs name directories such as %s, of which none is there on this side", unseen)
	}
	free, err := freeSpace(root)
	least := uint64(d.config.DiskReserve) << 20
	const cure = "Free some space: logs, images and builds need it"
	switch {
	case err != nil:
		return failed(err)
	case free < least:
		return fail(cure, "%s%s has %s left, less than the %s of %s", root, made, mebibytes(free), mebibytes(least), d.config.name("MM_ORCHESTRATOR_DISK_RESERVE"))
	case free < 1<<30:
		return note(cure, "%s%s is writable, with only %s left", root, made, mebibytes(free))
	}
	return ok("%s%s is writable, with %s left", root, made, mebibytes(free))
}

// runDirectories counts the runs whose directory is there, and gives one that
// is not, under the name in its row. A directory of a run that has not begun
// need not be there.
func (d *doctor) runDirectories(runs []store.ListedRun) (seen int, unseen string) {
	place := d.config.place().WithDefaults()
	for _, run := range runs {
		if run.ArtifactRoot == "" || run.StartedAt == nil {
			continue
		}
		of, err := place.ForRun(run.ArtifactRoot, run.ID)
		if err == nil {
			_, err = os.Stat(of.Dir)
		}
		if err == nil {
			seen++
		} else if unseen == "" {
			unseen = run.ArtifactRoot
		}
	}
	return seen, unseen
}
