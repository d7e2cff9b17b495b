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
	name:     "migrate",
	synonyms: []string{"init", "install", "setup", "upgrade", "remove", "uninstall"},
	summary:  "create or upgrade the tables that a worker needs",
	about: "Creates or upgrades what this program needs in the database: its own schema mm_orchestrator and, if a result backend is configured, " +
		"Celery's table celery_taskmeta. It prints each change, makes all changes in one transaction, and changes nothing if it is run again. Workers may be running.\n\n" +
		"MoonMind creates its own tables. For a database without MoonMind, --shared-tables creates them as MoonMind's migrations do. Existing tables are never changed: " +
		"if they differ, the command prints the differences and changes nothing.",
	examples: []example{
		{"mm-orchestrator migrate --dry-run", "what would it change?"},
		{"mm-orchestrator migrate", "create or upgrade"},
		{"mm-orchestrator migrate --shared-tables", "a separate database, without MoonMind"},
		{"mm-orchestrator migrate --remove", "going back to the Python worker, after the last worker of this program has stopped"},
	},
	topics: []topic{topicResults, topicDatabase, topicStart},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &migrateFlags{}
		fs.BoolVarP(&f.dryRun, "dry-run", "n", false, "Print the changes without making them.")
		fs.BoolVar(&f.shared, "shared-tables", false, "Also create MoonMind's tables, in a database that has none of them.")
		fs.BoolVar(&f.remove, "remove", false, "Drop the schema mm_orchestrator, with all claims and recorded outcomes. MoonMind's and Celery's tables stay. Refused while a worker of this program is alive or messages are parked.")
		return f.run
	},
}

type migrateFlags struct{ dryRun, shared, remove bool }

func (f *migrateFlags) run(ctx context.Context, p *program, in input) error {
	if f.remove && f.shared {
		return &usageError{"--remove and --shared-tables exclude each other"}
	}
	c, _, err := resolve(p.env, in.settings)
	if err != nil {
		return err
	}
	wait := c.Wait
	if f.dryRun && !in.parsed.Flags().Changed("wait") {
		// A dry run is typed by a person, who wants to see an error at once. Only
		// --wait on the same command line overrides that.
		wait = 0
	}
	db, err := openStore(ctx, store.Config{URL: c.Database().URL(), RetryFor: interactiveRetry}, c.tablesDatabase(), wait, p.reportWait)
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
	if !c.Results.IsZero() && !c.separateResults() {
		options.ResultTables = &results
	}
	report, err := db.Migrate(ctx, options)
	if errors.Is(err, store.ErrRefused) {
		return &curedError{err, "Run this command as the owner of the database, and of the schema mm_orchestrator if it exists"}
	}
	if err != nil {
		return err
	}
	p.reportMigration(report, f.dryRun)
	if c.separateResults() {
		if err := p.migrateResults(ctx, c, results, wait, f.dryRun); err != nil {
			return err
		}
	}
	if !f.dryRun {
		// This command does not create what is still missing. The operator should
		// know before a worker refuses to start.
		if err := db.CheckSchema(ctx); err != nil {
			p.printNote(fmt.Sprintf("a worker cannot start yet: %v", err))
		}
	}
	return nil
}

// removeOwnSchema drops the schema mm_orchestrator, and prints what it removes and
// what it keeps.
func (p *program) removeOwnSchema(ctx context.Context, db *store.Store, dryRun bool) error {
	removal, err := db.RemoveOwnSchema(ctx, dryRun)
	var used *store.SchemaInUseError
	for deadline := time.Now().Add(sessionEndWait); errors.As(err, &used) && len(used.Workers) > 0 && time.Now().Before(deadline); {
		time.Sleep(100 * time.Millisecond)
		removal, err = db.RemoveOwnSchema(ctx, dryRun)
	}
	switch {
	case errors.As(err, &used) && len(used.Workers) > 0:
		return &curedError{err, "Stop " + itOrThem(len(used.Workers)) + " with SIGTERM first: the last worker that stops returns parked messages to the queue"}
	case errors.As(err, &used):
		return &curedError{err, "Run `" + orchestrator.ReturnCommand + "` to return them to the queue, then run this command again"}
	case errors.Is(err, store.ErrRefused):
		return &curedError{err, "Run this command as the owner of the schema"}
	case err != nil:
		return err
	}
	p.reportMigration(removal.Report, dryRun)
	if len(removal.Tables) == 0 {
		return nil
	}
	verb := "removed"
	if dryRun {
		verb = "would remove"
	}
	for _, table := range removal.Tables {
		fmt.Fprintf(p.stdout, "  %s mm_orchestrator.%s, %s%s\n", verb, table.Name, counted(table.Rows, "row"), ownTableNotes[table.Name])
	}
	fmt.Fprint(p.stdout, wrap("kept: MoonMind's tables with all runs, steps and artifacts; Celery's tables celery_taskmeta and celery_tasksetmeta with their rows, their sequences task_id_sequence and taskset_id_sequence, "+
		"and the columns children and stamps of celery_taskmeta if they exist: Celery 5.7 uses them, older versions ignore them", "  ")+"\n")
	return nil
}

// ownTableNotes say what is lost when a table is dropped.
var ownTableNotes = map[string]string{
	"claims":      ": which worker ran which step, and the recorded outcomes that answer redelivered messages",
	"holds":       ": which run holds which workspace",
	"revocations": ": revocations of runs that no worker has carried out yet",
	"changes":     ": what is kept to take back the changes of runs; first run `mm-orchestrator changes remove --over-for 0` on each host, or nobody removes the refs and containers that the rows name",
}

// migrateResults creates Celery's tables in a separate database.
func (p *program) migrateResults(ctx context.Context, c *configuration, config store.ResultsConfig, wait time.Duration, dryRun bool) error {
	db, err := openStore(ctx, store.Config{URL: c.Results.URL(), RetryFor: interactiveRetry}, c.resultsDatabase(), wait, p.reportWait)
	if err != nil {
		return err
	}
	defer db.Close()
	fmt.Fprintf(p.stdout, "result backend %s\n", db.Place())
	if dryRun {
		fmt.Fprintln(p.stdout, "  would create Celery's tables celery_taskmeta and celery_tasksetmeta if they do not exist")
		return nil
	}
	results, err := store.NewResults(db, config)
	if err != nil {
		return err
	}
	report, err := results.EnsureTables(ctx)
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

// interactiveRetry is how long an interactive command retries a statement after
// its connection was lost. It is short, because a person waits.
const interactiveRetry = 5 * time.Second

// reportWait prints to stderr what the command is waiting for, and why.
func (p *program) reportWait(what string, err error) {
	p.printNote(fmt.Sprintf("%s: %v", what, err))
}
