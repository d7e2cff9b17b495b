package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator"
)

var rollbackCommand = &command{
	name:     "rollback",
	args:     "RUN",
	words:    1,
	synonyms: []string{"undo", "revert", "back"},
	summary:  "roll back a run that has succeeded",
	about: "Takes back a run that has succeeded, while nothing newer was deployed: a worker brings files, image and containers back to what they were before the run, as the rollback of a failed run does. " +
		"It does the same for a run whose rollback has failed. RUN is the id of a run or its beginning, as for `mm-orchestrator runs`.\n\n" +
		"It refuses, changes nothing, and says what stands in the way: a later run for the same service or in the same workspace, a container or an image name that something else has replaced since, " +
		"what was kept of the run and is removed (7 days after its end, see `mm-orchestrator changes`), or the plan. Files that somebody has edited since do not stand in the way: the rollback sets them aside, " +
		"and `mm-orchestrator runs set-aside` brings them back.\n\n" +
		"It must run where the worker runs, with the same settings: it looks at the workspace and at the docker engine. While the rollback is to come the run is shown as failed, afterwards as rolled_back. " +
		"The command waits for the end and prints it, unless --no-wait is given. If it is interrupted, the rollback goes on.\n\n" +
		"Exit code 0: the run is rolled back, or with --no-wait the rollback is requested. 1: something stands in the way, or the rollback has failed. 69: broker, database or docker engine unreachable.",
	examples: []example{
		{"mm-orchestrator runs rollback 6f1c2f0e --reason 'slower than before'", "take it back, with a reason"},
		{"mm-orchestrator runs rollback 6f1c2f0e --dry-run", "would it be possible?"},
	},
	topics: []topic{topicBroker, topicDatabase, topicFiles, topicSteps, topicChanges},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &rollbackFlags{}
		fs.StringVar(&f.reason, "reason", "", "Why the run is rolled back, as `text`. It becomes part of the rollback's log. Default: none.")
		fs.StringVar(&f.by, "by", "", "Who asks for it, as `text`. Default: the user and host of this process.")
		fs.BoolVar(&f.noWait, "no-wait", false, "Do not wait for the end of the rollback.")
		fs.BoolVarP(&f.dryRun, "dry-run", "n", false, "Say whether something stands in the way, without changing anything.")
		return f.run
	},
}

type rollbackFlags struct {
	reason, by     string
	noWait, dryRun bool
}

func (f *rollbackFlags) run(ctx context.Context, p *program, in input) (err error) {
	if len(in.words) == 0 {
		return &usageError{"runs rollback needs the id of a run; " + seeHelp(in.parsed)}
	}
	wanted, err := parseRun(in)
	if err != nil {
		return err
	}
	c, db, err := p.openCommand(ctx, in)
	if err != nil {
		return err
	}
	defer db.Close()
	defer func() { err = explainSchemaError(ctx, db, err) }()
	id, err := findRun(ctx, db, wanted)
	if err != nil {
		return err
	}
	run, err := db.FindRun(ctx, id)
	if err != nil {
		return err
	}
	steps, closeEngine, err := p.openSteps(c, db)
	if err != nil {
		return err
	}
	defer closeEngine()
	obstacles, err := p.lookForObstacles(ctx, db, steps, run)
	if err != nil {
		return err
	}
	request := store.RollbackRequest{RunID: id, Reason: p.redactor().String(f.reason), By: p.askedBy(f.by)}
	requested, err := db.RequestRollback(ctx, c.Queue, request, f.message(steps, len(obstacles) > 0))
	if err != nil {
		return err
	}
	obstacles = append(requested.Obstacles, obstacles...)
	switch {
	case len(obstacles) > 0 && !requested.Already:
		return fmt.Errorf("run %s is not rolled back, and nothing was changed:\n  %s", id, strings.Join(obstacles, ";\n  "))
	case f.dryRun && requested.Already:
		fmt.Fprintf(p.stdout, "run %s: its rollback is requested already\n", id)
		return nil
	case f.dryRun:
		fmt.Fprintf(p.stdout, "run %s (%s): nothing stands in the way of a rollback; nothing was changed\n", id, run.Status)
		return nil
	case requested.Already:
		fmt.Fprintf(p.stdout, "run %s: its rollback was requested already, %s\n", id, strings.TrimPrefix(requested.Text(), "requested "))
	default:
		fmt.Fprintf(p.stdout, "run %s had %s at %s: its rollback is requested\n", id, requested.PreviousStatus, clock(&requested.CompletedAt))
	}
	if _, err := p.publishParked(ctx, c, db); err != nil {
		if f.noWait {
			return fmt.Errorf("the rollback of run %s is requested, but its message cannot be published yet; a worker does that: %w", id, err)
		}
		p.printNote(fmt.Sprintf("the message cannot be published yet, a worker does that: %v", err))
	}
	if f.noWait {
		fmt.Fprintf(p.stdout, "run %s: see `mm-orchestrator runs %s` for its end\n", id, id)
		return nil
	}
	return p.awaitRollback(ctx, c, db, id)
}

// message returns what makes the rollback's message, nil to learn only what the
// database says.
func (f *rollbackFlags) message(steps *orchestrator.Orchestrator, blocked bool) store.RollbackMessage {
	if f.dryRun || blocked {
		return nil
	}
	return steps.RollbackMessage
}

// lookForObstacles looks at the workspace and at the engine.
func (p *program) lookForObstacles(ctx context.Context, db *store.Store, steps *orchestrator.Orchestrator, run store.Run) ([]string, error) {
	if run.Status != store.RunSucceeded && run.Status != store.RunFailed {
		return nil, nil // the database says why
	}
	changes, err := db.ListChanges(ctx, store.ChangeFilter{})
	if err != nil {
		return nil, err
	}
	return steps.RollbackObstacles(ctx, run, changes)
}

// openSteps returns what a command uses to look at the workspace and the engine, as a
// worker does, and a function that closes the engine's connections.
func (p *program) openSteps(c *configuration, db *store.Store) (*orchestrator.Orchestrator, func(), error) {
	if err := c.loadPolicy(); err != nil {
		return nil, nil, err
	}
	engine, err := compose.NewEngine(c.EngineConfig())
	if err != nil {
		return nil, nil, &configError{fmt.Sprintf("%s %q or %s %q cannot be used: %v", c.name("DOCKER_HOST"), address.MaskURL(c.DockerHost), c.name("DOCKER_CERT_PATH"), c.DockerCertPath, err)}
	}
	steps, err := orchestrator.New(orchestrator.Config{
		Steps: db, Queue: c.Queue, Node: c.Node, Workspace: c.Workspace, Environ: c.ChildEnvironment(p.env), Logger: discardLogger(), Redactor: p.redactor(),
		SettingName: c.name, Policy: c.Policy, Engine: engine, Helpers: engine, RollbackCommands: c.Rollback == "commands",
	})
	if err != nil {
		_ = engine.Close()
		return nil, nil, &configError{err.Error()}
	}
	return steps, func() { _ = engine.Close() }, nil
}

// noWorkerAfter is how long a rollback may wait before the command says that no worker
// is there to run it.
const noWorkerAfter = 3 * time.Second

// awaitRollback waits for the end of a rollback and prints what happens.
func (p *program) awaitRollback(ctx context.Context, c *configuration, db *store.Store, id string) error {
	begin := time.Now()
	var said, warned bool
	for {
		detail, err := db.FindRunDetail(ctx, id)
		if err != nil {
			return err
		}
		run := detail.Run
		if w := detail.Activity.Working; w != nil && w.Step == store.StepRollback && !said {
			said = true
			fmt.Fprintf(p.stdout, "run %s: rollback running since %s, on %s\n", id, clock(&w.Since), oneLine(w.Worker, 80))
		}
		switch {
		case run.Status == store.RunRolledBack:
			fmt.Fprintf(p.stdout, "run %s is rolled back\n", id)
			for _, line := range rollbackLines(run.ArtifactRoot) {
				fmt.Fprintln(p.stdout, "  "+oneLine(p.redactor().String(line), 400))
			}
			return nil
		case run.Status == store.RunFailed && run.CompletedAt != nil:
			return fmt.Errorf("the rollback of run %s has failed: %s; see rollback.log in %s", id, oneLine(p.redactor().String(messageOf(detail, store.StepRollback)), 2000), dash(run.ArtifactRoot))
		case run.Status != store.RunFailed:
			return fmt.Errorf("run %s is %s: it was retried before its rollback began", id, run.Status)
		}
		if !said && !warned && time.Since(begin) > noWorkerAfter {
			warned = true
			workers, err := db.ListWorkers(ctx, c.Queue)
			if err != nil {
				return err
			}
			if len(workers) == 0 {
				fmt.Fprintf(p.stderr, "mm-orchestrator: no worker is alive on queue %s: the rollback begins when one starts\n", oneLine(c.Queue, 80))
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func messageOf(detail store.RunDetail, step store.Step) string {
	for _, state := range detail.States {
		if state.Step == step {
			return state.Message
		}
	}
	return ""
}

// rollbackLines are the lines of a rollback's log that say what is as before and what
// was set aside. The log may be out of reach; the result is in the database too.
func rollbackLines(artifactRoot string) (lines []string) {
	text, err := os.ReadFile(filepath.Join(artifactRoot, "rollback.log"))
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimRight(line, "\n")
		for _, prefix := range []string{"tree: ", "image: ", "configuration: ", "[Edited by somebody", "[The uncommitted edits", "[To bring", "[The run has changed nothing"} {
			if strings.HasPrefix(line, prefix) {
				lines = append(lines, line)
			}
		}
	}
	return lines
}
