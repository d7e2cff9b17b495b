package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

var revokeCommand = &command{
	name:       "revoke",
	args:       "RUN",
	words:      1,
	alsoCalled: []string{"cancel", "stop", "abort", "kill", "rollback"},
	summary:    "end a run",
	about: "Ends a run. A running step's commands are ended with all their processes, the step fails with the reason, and the run is rolled back. " +
		"A run that has not begun or waits for approval fails at once, without rollback; one between two steps fails when the next begins. A rollback cannot be revoked.\n\n" +
		"The command waits for that, for as long as --wait says, and tells what has become of the run. " +
		"RUN is the id of a run, or its beginning, as for `mm-orchestrator runs`; what is printed names the whole of it. " +
		"Exit code 0: the run has failed as asked, or is rolled back. 1: it had failed or ended before, or nobody has ended it yet.",
	examples: []example{
		{"mm-orchestrator runs revoke 6f1c2f0e --reason 'wrong branch'", "end it"},
	},
	topics: []topic{topicDatabase},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &revokeFlags{}
		fs.StringVar(&f.reason, "reason", "", "Why, as `text`. It is shown with the failed step. Default: none.")
		durationVar(fs, &f.wait, "wait", 15*time.Second, "How long to wait until the run has failed.")
		return f.run
	},
}

type revokeFlags struct {
	reason string
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
	db, err := openStore(ctx, store.Config{URL: c.Database().URL(), RetryFor: typedRetry}, c.tablesDatabase(), 0, p.say)
	if err != nil {
		return err
	}
	defer db.Close()
	defer func() { err = sayMigrate(ctx, db, err) }()

	id, err := findRun(ctx, db, wanted)
	if err != nil {
		return err
	}
	wish := store.Revocation{RunID: id, Reason: artifacts.NewRedactor(p.env).String(f.reason), By: p.operator()}
	revoked, err := db.RevokeRun(ctx, wish)
	switch {
	case err != nil:
		return err
	case revoked.RollingBack && revoked.Step == store.StepRollback:
		return fmt.Errorf("run %s is being rolled back, by worker %s since %s: a rollback cannot be revoked, nothing was changed", wish.RunID, revoked.Worker, clock(&revoked.Since))
	case revoked.RollingBack:
		return fmt.Errorf("run %s has failed already, and its rollback comes next: a rollback cannot be revoked, nothing was changed", wish.RunID)
	case revoked.TooLate:
		return fmt.Errorf("run %s is %s already: nothing was changed", wish.RunID, revoked.PreviousStatus)
	case revoked.Ended && len(revoked.Succeeded) > 0:
		fmt.Fprintf(p.stdout, "run %s was waiting for approval: it is failed now. Steps that it had behind it are not rolled back: %s\n", wish.RunID, joinSteps(revoked.Succeeded))
		return nil
	case revoked.Ended:
		fmt.Fprintf(p.stdout, "run %s had not begun (%s): it is failed now, nothing has to be rolled back\n", wish.RunID, revoked.PreviousStatus)
		return nil
	case revoked.Step != "" && !revoked.Alive:
		fmt.Fprintf(p.stdout, "run %s: worker %s, which had step %s, is gone; the run fails when another takes the step over\n", wish.RunID, revoked.Worker, revoked.Step)
	case revoked.Step != "":
		fmt.Fprintf(p.stdout, "run %s: worker %s is asked to end step %s, which runs since %s\n", wish.RunID, revoked.Worker, revoked.Step, clock(&revoked.Since))
	default:
		fmt.Fprintf(p.stdout, "run %s is between two steps (%s): it fails when the next one begins\n", wish.RunID, revoked.PreviousStatus)
	}
	return p.awaitRevoked(ctx, db, wish.RunID, f.wait)
}

// awaitRevoked says what has become of a run that was revoked while it was
// under way.
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
			return fmt.Errorf("run %s was quicker and has succeeded", id)
		case time.Now().After(deadline):
			return fmt.Errorf("run %s is still %s after %s. The wish is recorded: the next worker that has the run in hand ends it; `mm-orchestrator runs %s` shows it", id, run.Status, wait, id)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func joinSteps(steps []store.Step) string {
	var names []string
	for _, step := range steps {
		names = append(names, string(step))
	}
	return strings.Join(names, ", ")
}

// operator is who runs this command, as user@host, as far as known.
func (p *program) operator() string {
	_, user, _ := p.env.lookup("USER")
	host, err := os.Hostname()
	if user == "" || err != nil {
		return user
	}
	return user + "@" + host
}
