package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator"
)

var migrateCommand = &command{
	name:       "migrate",
	alsoCalled: []string{"init", "install", "setup", "upgrade", "remove", "uninstall"},
	summary:    "make the tables that a worker needs",
	about: "Brings the database to what this program needs: the schema mm_orchestrator, which holds what is the program's own, and, if a result backend is configured, " +
		"Celery's table celery_taskmeta. It says what it does, does it in one transaction, and does nothing the second time. Workers may be running.\n\n" +
		"MoonMind's tables are made by MoonMind. For a database without MoonMind, --shared-tables makes them as MoonMind's migrations do; tables that exist are never changed, " +
		"and where they differ it says how and changes nothing.",
	examples: []example{
		{"mm-orchestrator migrate --dry-run", "what would it do?"},
		{"mm-orchestrator migrate", "do it"},
		{"mm-orchestrator migrate --shared-tables", "a database of one's own, without MoonMind"},
		{"mm-orchestrator migrate --remove", "the way back: take away what is this program's own, after its last worker has stopped"},
	},
	topics: []topic{topicResults, topicDatabase, topicStart},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &migrateFlags{}
		fs.BoolVarP(&f.dryRun, "dry-run", "n", false, "Say what would be done, and change nothing.")
		fs.BoolVar(&f.shared, "shared-tables", false, "Make MoonMind's tables too, in a database that has none of them.")
		fs.BoolVar(&f.remove, "remove", false, "Take the schema mm_orchestrator away, with all claims and recorded outcomes. MoonMind's tables and Celery's stay. Refused while a worker of this program lives or messages are parked.")
		return f.run
	},
}

type migrateFlags struct{ dryRun, shared, remove bool }

func (f *migrateFlags) run(ctx context.Context, p *program, in input) error {
	if f.remove && f.shared {
		return &usageError{"--remove takes away and --shared-tables makes: give one of them"}
	}
	c, _, err := resolve(p.env, in.settings)
	if err != nil {
		return err
	}
	wait := c.Wait
	if f.dryRun && !in.parsed.Flags().Changed("wait") {
		// Somebody looks, and wants to hear at once what is wrong. Only a flag on
		// the same command line says otherwise.
		wait = 0
	}
	db, err := openStore(ctx, store.Config{URL: c.Database().URL(), RetryFor: typedRetry}, c.tablesDatabase(), wait, p.say)
	if err != nil {
		return err
	}
	defer db.Close()
	fmt.Fprintf(p.stdout, "database %s\n", db.Place())

	if f.remove {
		return p.removeOwnSchema(ctx, db, f.dryRun)
	}
	options := store.MigrateOptions{SharedTables: f.shared, DryRun: f.dryRun}
	results := c.resultsConfig()
	if !c.Results.IsZero() && !c.resultsElsewhere() {
		options.ResultTables = &results
	}
	report, err := db.Migrate(ctx, options)
	if err != nil {
		return err
	}
	p.reportMigration(report, f.dryRun)
	if c.resultsElsewhere() {
		if err := p.migrateResults(ctx, c, results, wait, f.dryRun); err != nil {
			return err
		}
	}
	if !f.dryRun {
		// What is still missing is not this command's to make; the operator
		// should hear of it before a worker refuses to start.
		if err := db.CheckSchema(ctx); err != nil {
			fmt.Fprintf(p.stderr, "mm-orchestrator: a worker cannot start yet: %v\n", err)
		}
	}
	return nil
}

// removeOwnSchema says what it takes away, and what it leaves.
func (p *program) removeOwnSchema(ctx context.Context, db *store.Store, dryRun bool) error {
	removal, err := db.RemoveOwnSchema(ctx, dryRun)
	var used *store.SchemaInUseError
	for deadline := time.Now().Add(deathPause); errors.As(err, &used) && len(used.Workers) > 0 && time.Now().Before(deadline); {
		time.Sleep(100 * time.Millisecond)
		removal, err = db.RemoveOwnSchema(ctx, dryRun)
	}
	switch {
	case errors.As(err, &used) && len(used.Workers) > 0:
		return &curedError{err, "Stop it first, by SIGTERM: the last worker that stops gives parked messages back to the queue"}
	case errors.As(err, &used):
		return &curedError{err, "Run `" + orchestrator.ReturnCommand + "`, which gives them back to the queue, and then this again"}
	case err != nil:
		return err
	}
	p.reportMigration(removal.Report, dryRun)
	if len(removal.Tables) == 0 {
		return nil
	}
	goes := "removed"
	if dryRun {
		goes = "would remove"
	}
	for _, table := range removal.Tables {
		fmt.Fprintf(p.stdout, "  %s mm_orchestrator.%s, %d rows%s\n", goes, table.Name, table.Rows, ownTableWords[table.Name])
	}
	fmt.Fprint(p.stdout, wrap("kept: MoonMind's tables with all runs, steps and artifacts; Celery's tables celery_taskmeta and celery_tasksetmeta with their rows, their sequences task_id_sequence and taskset_id_sequence, "+
		"and the columns children and stamps of celery_taskmeta, where they are there: Python's Celery 5.7 has them too, and older ones do not mind", "  ")+"\n")
	return nil
}

// ownTableWords say what is lost with a table.
var ownTableWords = map[string]string{
	"claims":      ": which worker ran which step, and the recorded ends of steps by which a message that comes again is answered",
	"holds":       ": which run has which workspace",
	"revocations": ": runs that an operator has ended and no worker yet",
}

// migrateResults makes Celery's tables in a database of their own.
func (p *program) migrateResults(ctx context.Context, c *configuration, config store.ResultsConfig, wait time.Duration, dryRun bool) error {
	db, err := openStore(ctx, store.Config{URL: c.Results.URL(), RetryFor: typedRetry}, c.resultsDatabase(), wait, p.say)
	if err != nil {
		return err
	}
	defer db.Close()
	fmt.Fprintf(p.stdout, "result backend %s\n", db.Place())
	if dryRun {
		fmt.Fprintln(p.stdout, "  would make Celery's tables celery_taskmeta and celery_tasksetmeta, if they are not there")
		return nil
	}
	results, err := store.NewResults(db, config)
	if err != nil {
		return err
	}
	report, err := results.EnsureResultTable(ctx)
	if err != nil {
		return err
	}
	p.reportMigration(report, dryRun)
	return nil
}

func (p *program) reportMigration(report store.Report, dryRun bool) {
	lines := report.Lines()
	if len(lines) == 0 {
		fmt.Fprintln(p.stdout, "  nothing to do")
	}
	for _, line := range lines {
		if dryRun {
			line = "would " + line
		}
		fmt.Fprintf(p.stdout, "  %s\n", line)
	}
}

// typedRetry is how long a statement of a command that somebody has typed is
// tried again when the connection breaks: a person who waits is told soon.
const typedRetry = 5 * time.Second

// say tells of something that takes time.
func (p *program) say(what string, err error) {
	fmt.Fprintf(p.stderr, "mm-orchestrator: %s\n", p.redactor().String(fmt.Sprintf("%s: %v", what, err)))
}
