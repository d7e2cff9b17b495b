package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// silence is how long a server may let a person wait before it is told of.
const silence = 2 * time.Second

// openStore opens a database. One that cannot be reached is waited for as
// long as wait says; say is told once, when the waiting begins. It is also told
// when the server takes its time to answer.
func openStore(ctx context.Context, config store.Config, role databaseRole, wait time.Duration, say func(what string, err error)) (*store.Store, error) {
	deadline := time.Now().Add(wait)
	pause := 250 * time.Millisecond
	for said := false; ; pause = min(2*pause, 3*time.Second) {
		s, err := openOnce(ctx, config, role, say)
		if err == nil || !errors.Is(err, store.ErrUnavailable) || time.Until(deadline) < pause {
			return s, cureDatabase(role, err)
		}
		if !said {
			say(fmt.Sprintf("waiting up to %s for the %s", shortDuration(wait), role.what), err)
			said = true
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}

// openOnce tries once, which a server that takes the connection and says nothing
// can draw out to ten seconds.
func openOnce(ctx context.Context, config store.Config, role databaseRole, say func(what string, err error)) (*store.Store, error) {
	said := make(chan struct{})
	slow := time.AfterFunc(silence, func() {
		defer close(said)
		say("waiting for the "+role.what, errors.New("no answer yet"))
	})
	s, err := store.Open(ctx, config)
	if !slow.Stop() {
		<-said
	}
	return s, err
}

// sayMigrate replaces an error of the database's, such as a missing relation,
// by one that says what is wrong with the schema as a whole, if something is.
func sayMigrate(ctx context.Context, db *store.Store, err error) error {
	if !errors.Is(err, store.ErrSchema) {
		return err
	}
	if why := db.CheckOwnSchema(ctx); errors.Is(why, store.ErrSchema) {
		return why
	}
	return err
}

// resultsConfig is how Celery results are kept.
func (c *configuration) resultsConfig() store.ResultsConfig {
	encoding := protocol.EncodingPickle
	if c.ResultEncoding == "json" {
		encoding = protocol.EncodingJSON
	}
	return store.ResultsConfig{Encoding: encoding}
}

// resultsElsewhere says that results are kept in another database than the
// tables, or as another user, so that they need connections of their own.
func (c *configuration) resultsElsewhere() bool {
	return !c.Results.IsZero() && !c.Results.Equal(c.Database())
}

// databases are what a worker writes to.
type databases struct {
	// tables are MoonMind's and ours.
	tables *store.Store
	// results is nil when Celery results are not kept.
	results worker.ResultBackend
	opened  []*store.Store
}

// farewell is how long connections may take to be closed in order. A database
// that is away must not hold up the end of the process, which closes them
// anyway.
const farewell = 300 * time.Millisecond

func (d *databases) close() {
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		for _, s := range slices.Backward(d.opened) {
			s.Close()
		}
	}()
	select {
	case <-closed:
	case <-time.After(farewell):
	}
}

// openDatabases opens what a worker writes to, and sees to it that the tables
// are there.
func openDatabases(ctx context.Context, c *configuration, log *slog.Logger) (_ *databases, err error) {
	d := &databases{}
	defer func() {
		if err != nil {
			d.close()
		}
	}()
	say := func(what string, err error) { log.Warn("not yet", "what", what, "error", err) }
	open := func(where address.Database, role databaseRole) (*store.Store, error) {
		s, err := openStore(ctx, store.Config{URL: where.URL(), Worker: c.Node, Connections: c.connectionsPerStore(), Logger: log}, role, c.Wait, say)
		if err == nil {
			d.opened = append(d.opened, s)
		}
		return s, err
	}

	if d.tables, err = open(c.Database(), c.tablesDatabase()); err != nil {
		return nil, err
	}
	var elsewhere *store.Store
	if c.resultsElsewhere() {
		if elsewhere, err = open(c.Results, c.resultsDatabase()); err != nil {
			return nil, err
		}
	}
	if err = checkConnections(ctx, d.tables, elsewhere, c.Wait, say); err != nil {
		return nil, err
	}
	if err = d.tables.CheckSession(ctx); err != nil {
		return nil, err
	}
	if err = prepareTables(ctx, d.tables, store.MigrateOptions{ResultTables: c.resultTables()}, c, log); err != nil {
		return nil, err
	}
	if c.Results.IsZero() {
		return d, nil
	}
	home := d.tables
	if elsewhere != nil {
		home = elsewhere
	}
	backend, err := store.NewResults(home, c.resultsConfig())
	if err != nil {
		return nil, err
	}
	if elsewhere != nil {
		if err = prepareResults(ctx, backend, home, c, log); err != nil {
			return nil, err
		}
	}
	d.results = resultBackend{backend}
	return d, nil
}

// resultTables are those in the database of the tables, nil if there are none.
func (c *configuration) resultTables() *store.ResultsConfig {
	if c.Results.IsZero() || c.resultsElsewhere() {
		return nil
	}
	config := c.resultsConfig()
	return &config
}

// prepareTables makes or upgrades what is ours, or says what is missing.
func prepareTables(ctx context.Context, db *store.Store, options store.MigrateOptions, c *configuration, log *slog.Logger) error {
	// First, as it says more than a statement that fails for want of a right.
	// What is made here belongs to us.
	if err := db.CheckPrivileges(ctx, options.ResultTables); err != nil {
		return cureAccess(err)
	}
	options.DryRun = !c.AutoMigrate
	report, err := db.Migrate(ctx, options)
	switch {
	case errors.Is(err, store.ErrRefused):
		return &curedError{err, c.cureMigration()}
	case err != nil:
		return err
	case c.AutoMigrate:
		logReport(log, db, report)
	default:
		if err := c.unprepared(db, report); err != nil {
			return err
		}
	}
	return db.CheckSchema(ctx)
}

// cureMigration is for a role that may not make tables.
func (c *configuration) cureMigration() string {
	return "Let the owner of the database run `mm-orchestrator migrate`, then start the worker with " + c.assign("MM_ORCHESTRATOR_AUTO_MIGRATE", "false")
}

// prepareResults does the same for a database in which only results are kept.
func prepareResults(ctx context.Context, backend *store.Results, home *store.Store, c *configuration, log *slog.Logger) error {
	if err := backend.CheckPrivileges(ctx); err != nil {
		return cureAccess(err)
	}
	if !c.AutoMigrate {
		report, err := backend.PlanResultTable(ctx)
		if err == nil {
			err = c.unprepared(home, report)
		}
		return err
	}
	report, err := backend.EnsureResultTable(ctx)
	switch {
	case errors.Is(err, store.ErrRefused):
		return &curedError{err, c.cureMigration()}
	case err == nil:
		logReport(log, home, report)
	}
	return err
}

// unprepared says what is still to be done, nil if it is nothing or somebody
// else's.
func (c *configuration) unprepared(db *store.Store, report store.Report) error {
	for _, step := range report.Steps {
		if !step.ByOwner {
			return &configError{fmt.Sprintf("database %s is not ready: %s is still to be done. Run `mm-orchestrator migrate`, or set %s", db.Place(), step.What, c.assign("MM_ORCHESTRATOR_AUTO_MIGRATE", "true"))}
		}
	}
	return nil
}

func logReport(log *slog.Logger, db *store.Store, report store.Report) {
	if lines := report.Lines(); len(lines) > 0 {
		log.Info("prepared the database", "database", db.Place(), "steps", strings.Join(lines, "; "))
	}
}

// resultBackend tells the engine which errors no retry mends: values that the
// table can never hold. All else, a table that was dropped or a privilege
// that was taken, an operator can mend while the message waits.
type resultBackend struct{ results *store.Results }

// Store implements worker.ResultBackend.
func (b resultBackend) Store(ctx context.Context, results ...protocol.Result) ([]bool, error) {
	written, err := b.results.Store(ctx, results...)
	if errors.Is(err, store.ErrInvalid) {
		err = worker.Permanent(err)
	}
	return written, err
}

// orStopped is nil when what failed was given up because the process was
// asked to stop.
func orStopped(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}
