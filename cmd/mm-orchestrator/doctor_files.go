package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator/preflight"
)

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

// lookLimit is how long the looks of the doctor may take together. A run has less
// time: the doctor is for a machine that may just have started.
const lookLimit = 10 * time.Second

// look looks at all that a worker needs for any run, with the looks that a run
// begins with. The checks print what they have found.
func (d *doctor) look(ctx context.Context) {
	c := d.config
	config := orchestrator.Config{
		Workspace: c.Workspace, Artifacts: c.artifactDirectory(), Environ: d.environ, Redactor: d.redactor, Logger: discardLogger(),
		Compose: compose.Program{Standalone: c.ComposeProgram}, SettingName: c.name, Policy: c.Policy, DiskReserve: uint64(c.DiskReserve) << 20,
	}
	engine, err := compose.NewEngine(d.config.EngineConfig())
	if d.engineErr = err; err == nil {
		defer engine.Close()
		config.Engine = engine
	}
	d.looked = map[string][]preflight.Result{}
	for _, result := range preflight.Run(ctx, lookLimit, orchestrator.Subject(config).Looks()) {
		d.looked[result.Look] = append(d.looked[result.Look], result)
	}
}

// look is a check that prints the results of looks; of the second and later ones
// only those that are not good.
func look(names ...string) func(*doctor, context.Context) []verdict {
	return func(d *doctor, _ context.Context) []verdict {
		list := verdicts(d.looked[names[0]])
		for _, name := range names[1:] {
			for _, v := range verdicts(d.looked[name]) {
				if (v.status == statusFail || v.status == statusNote) && !slices.Contains(list, v) {
					list = append(list, v)
				}
			}
		}
		return list
	}
}

// verdicts are the results of looks as the doctor prints them.
func verdicts(results []preflight.Result) []verdict {
	status := map[preflight.Status]string{preflight.OK: statusOK, preflight.Note: statusNote, preflight.Refuse: statusFail, preflight.Skip: statusSkip}
	var list []verdict
	for _, result := range results {
		list = append(list, verdict{status[result.Status], result.Found, result.Cure})
	}
	return list
}

func (d *doctor) docker(ctx context.Context) []verdict {
	if d.engineErr != nil {
		return fail("Correct "+d.config.names("DOCKER_HOST", "DOCKER_CERT_PATH"), "%v", d.engineErr)
	}
	return look("docker")(d, ctx)
}

// git checks the repository that patch and rollback change.
func (d *doctor) git(ctx context.Context) []verdict {
	list := look("git", "git-trust")(d, ctx)
	if list[0].status != statusOK || len(list) > 1 {
		return list[len(list)-1:]
	}
	path := d.config.Workspace
	// Without a refreshed index: the doctor changes nothing.
	changed, err := d.gitOutput(ctx, "--no-optional-locks", "status", "--porcelain", "-z")
	switch {
	case err != nil:
		return fail("Repair the work tree", "git status fails in %s: %v", path, err)
	case changed != "":
		return note("Commit what you want to keep: runs deploy these changes, and a rollback may undo them", "%s has %d changed or untracked files", path, strings.Count(changed, "\x00"))
	}
	return ok("%s is a clean work tree", path)
}

// artifacts checks that a worker can write the directories of runs, and that the
// directories named in the runs' rows exist here.
func (d *doctor) artifacts(ctx context.Context) []verdict {
	if _, err := d.config.artifactDirectory().WithDefaults().Root(); err != nil {
		return failed(err)
	}
	list := look("artifacts")(d, ctx)
	if list[0].status == statusFail {
		return list
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
	return list
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
