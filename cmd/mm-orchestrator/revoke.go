package main

import (
	"context"
	"fmt"
	"os"
	"os/user"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/store"
)

var revokeCommand = &command{
	name:     "revoke",
	args:     "RUN",
	words:    1,
	synonyms: []string{"cancel", "stop", "abort", "kill"},
	summary:  "stop a run and roll it back",
	about: "Stops a run. If a step is running, its processes are killed, the step fails with the reason, and the run is rolled back. " +
		"A run that has not started, or that waits for approval before it has changed anything, fails at once without rollback. One that waits before verify for its approval is rolled back. A run between two steps fails when its next step begins. A rollback cannot be revoked.\n\n" +
		"A run that only Python workers have had, and of which no message is left, has no next step: --lost ends it at once, without rollback, so that it can be retried. It is refused while a worker has the run.\n\n" +
		"The command waits for the result for as long as --wait says, and prints it. " +
		"RUN is the id of a run or its beginning, as for `mm-orchestrator runs`.\n\n" +
		"Exit code 0: the run has failed as requested, or is rolled back. 1: it had ended before, is already being rolled back, or no worker has stopped it yet.",
	examples: []example{
		{"mm-orchestrator runs revoke 6f1c2f0e --reason 'wrong branch'", "stop it, with a reason"},
	},
	topics: []topic{topicDatabase},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &revokeFlags{}
		fs.StringVar(&f.reason, "reason", "", "Why the run is stopped, as `text`. It becomes part of the failed step's message. Default: none.")
		fs.BoolVar(&f.lost, "lost", false, "No message of the run is left: end it at once, without rollback. Default: false.")
		durationVar(fs, &f.wait, "wait", 15*time.Second, "How long to wait until the run has failed.")
		return f.run
	},
}

type revokeFlags struct {
	reason string
	lost   bool
	wait   time.Duration
}

func (f *revokeFlags) run(ctx context.Context, p *program, in input) (err error) {
	if len(in.words) == 0 {
		return &usageError{"runs revoke needs the id of a run; " + seeHelp(in.parsed)}
	}
	wanted, err := parseRun(in)
	if err != nil {
		return err
	}
	c, _, err := resolve(p.env, in.settings)
	if err != nil {
		return err
	}
	db, err := openStore(ctx, store.Config{URL: c.Database().URL(), RetryFor: interactiveRetry, Redact: p.redactor().String}, c.tablesDatabase(), 0, p.reportWait)
	if err != nil {
		return err
	}
	defer db.Close()
	defer func() { err = explainSchemaError(ctx, db, err) }()

	id, err := findRun(ctx, db, wanted)
	if err != nil {
		return err
	}
	request := store.Revocation{RunID: id, Reason: p.redactor().String(f.reason), By: p.operator(), Lost: f.lost}
	revoked, err := db.RevokeRun(ctx, request)
	switch {
	case err != nil:
		return err
	case revoked.RollingBack && revoked.Step == store.StepRollback:
		return fmt.Errorf("run %s is being rolled back by worker %s since %s: a rollback cannot be revoked, nothing was changed", request.RunID, revoked.Worker, clock(&revoked.Since))
	case revoked.RollingBack:
		return fmt.Errorf("run %s has already failed and will be rolled back: a rollback cannot be revoked, nothing was changed", request.RunID)
	case revoked.TooLate:
		return fmt.Errorf("run %s is already %s: nothing was changed", request.RunID, revoked.PreviousStatus)
	case revoked.Ended && revoked.PreviousStatus == store.RunRunning:
		fmt.Fprintf(p.stdout, "run %s was running and is now failed. Nothing of it is rolled back%s\n", request.RunID, succeededText(revoked.Succeeded))
		return nil
	case revoked.Ended && len(revoked.Succeeded) > 0:
		fmt.Fprintf(p.stdout, "run %s was waiting for approval and is now failed. Its succeeded steps are not rolled back: %s\n", request.RunID, joinSteps(revoked.Succeeded))
		return nil
	case revoked.Ended:
		fmt.Fprintf(p.stdout, "run %s had not started (%s) and is now failed; there is nothing to roll back\n", request.RunID, revoked.PreviousStatus)
		return nil
	case revoked.Step != "" && !revoked.Alive:
		fmt.Fprintf(p.stdout, "run %s: worker %s, which ran step %s, is dead; the run fails when another worker takes the step over\n", request.RunID, revoked.Worker, revoked.Step)
	case revoked.Step != "":
		fmt.Fprintf(p.stdout, "run %s: asked worker %s to stop step %s, running since %s\n", request.RunID, revoked.Worker, revoked.Step, clock(&revoked.Since))
	case revoked.PreviousStatus == store.RunAwaitingApproval:
		fmt.Fprintf(p.stdout, "run %s waits before verify for its approval: verify fails, and the run is rolled back\n", request.RunID)
	default:
		fmt.Fprintf(p.stdout, "run %s is between two steps (%s): it fails when the next step begins\n", request.RunID, revoked.PreviousStatus)
	}
	return p.awaitRevoked(ctx, db, request.RunID, f.wait)
}

// awaitRevoked waits until a worker has carried out a revocation, and prints the
// result.
func (p *program) awaitRevoked(ctx context.Context, db *store.Store, id string, wait time.Duration) error {
	for deadline := time.Now().Add(wait); ; {
		run, err := db.FindRun(ctx, id)
		switch {
		case err != nil:
			return err
		case run.Status == store.RunFailed && run.CompletedAt == nil:
			fmt.Fprintf(p.stdout, "run %s has failed; its rollback follows\n", id)
			return nil
		case run.Status == store.RunFailed:
			fmt.Fprintf(p.stdout, "run %s has failed; there is no rollback in its plan\n", id)
			return nil
		case run.Status == store.RunRolledBack:
			fmt.Fprintf(p.stdout, "run %s was rolled back\n", id)
			return nil
		case run.Status == store.RunSucceeded:
			return fmt.Errorf("run %s succeeded before it could be stopped", id)
		case time.Now().After(deadline):
			return fmt.Errorf("run %s is still %s after %s. The request is recorded: the next worker that gets a message of the run stops it; see `mm-orchestrator runs %s`. If no message of it is left, use --lost", id, run.Status, wait, id)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func succeededText(steps []store.Step) string {
	if len(steps) == 0 {
		return ""
	}
	return "; these steps had succeeded: " + joinSteps(steps)
}

func joinSteps(steps []store.Step) string {
	var names []string
	for _, step := range steps {
		names = append(names, string(step))
	}
	return strings.Join(names, ", ")
}

// operator is the user that runs the command, as user@host; "" if unknown. Without
// USER, as under `docker exec` and cron, it is the name of the process's user.
func (p *program) operator() string {
	_, name, _ := p.env.lookup("USER")
	if current, err := user.Current(); name == "" && err == nil {
		name = current.Username
	}
	host, err := os.Hostname()
	if name == "" || err != nil {
		return name
	}
	return name + "@" + host
}
