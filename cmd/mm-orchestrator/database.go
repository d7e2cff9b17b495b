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
	"github.com/moonladderstudios/mm-orchestrator/results"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// slowAnswer is how long an attempt to connect may take before it is reported.
const slowAnswer = 2 * time.Second

// openStore opens a database. While the server is unreachable it retries for up
// to wait. It calls report once before the first pause, and when an attempt to
// connect takes longer than slowAnswer.
func openStore(ctx context.Context, config store.Config, role databaseRole, wait time.Duration, report func(what string, err error)) (*store.Store, error) {
	deadline := time.Now().Add(wait)
	pause := 250 * time.Millisecond
	for reported := false; ; pause = min(2*pause, 3*time.Second) {
		s, err := openOnce(ctx, config, role, report)
		if err == nil || !errors.Is(err, store.ErrUnavailable) || time.Until(deadline) < pause {
			return s, cureDatabase(role, err)
		}
		if !reported {
			report(fmt.Sprintf("waiting up to %s for the %s", shortDuration(wait), role.what), err)
			reported = true
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}

// openOnce makes one attempt. It takes up to ten seconds if the server accepts
// the connection and does not answer.
func openOnce(ctx context.Context, config store.Config, role databaseRole, report func(what string, err error)) (*store.Store, error) {
	reported := make(chan struct{})
	slow := time.AfterFunc(slowAnswer, func() {
		defer close(reported)
		report("waiting for the "+role.what, errors.New("no answer yet"))
	})
	s, err := store.Open(ctx, config)
	if !slow.Stop() {
		<-reported
	}
	return s, err
}

// explainSchemaError replaces an error such as a missing relation by the result
// of checking the whole schema, if that fails. It adds a cure to the error of a
// statement for which the role lacks a privilege.
func explainSchemaError(ctx context.Context, db *store.Store, err error) error {
	if errors.Is(err, store.ErrRefused) {
		return &curedError{err, "`mm-orchestrator doctor` names the privileges that the role lacks; or run this command as the owner of the tables"}
	}
	if !errors.Is(err, store.ErrSchema) {
		return err
	}
	if cause := db.CheckOwnSchema(ctx); errors.Is(cause, store.ErrSchema) {
		return cause
	}
	return err
}

// resultsConfig is how Celery results are stored.
func (c *configuration) resultsConfig() store.ResultsConfig {
	encoding := protocol.EncodingPickle
	if c.ResultEncoding == "json" {
		encoding = protocol.EncodingJSON
	}
	return store.ResultsConfig{Encoding: encoding}
}

// separateResults reports whether results are stored in another database than
// the tables, or as another user, and so need their own connections.
func (c *configuration) separateResults() bool {
	return !c.Results.IsZero() && !c.Results.Equal(c.Database())
}

// databases are the databases that a worker writes to.
type databases struct {
	// tables is the database of MoonMind's tables and of schema mm_orchestrator.
	tables *store.Store
	// results is nil when Celery results are not stored.
	results results.Backend
	opened  []*store.Store
}

// closeTimeout limits the orderly closing of connections. An unreachable
// database must not delay the end of the process, which closes them anyway.
const closeTimeout = 300 * time.Millisecond

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
	case <-time.After(closeTimeout):
	}
}

// openDatabases opens the databases that a worker writes to, checks them, and
// creates or upgrades the tables if the configuration allows it.
func openDatabases(ctx context.Context, c *configuration, redact func(string) string, log *slog.Logger) (_ *databases, err error) {
	d := &databases{}
	defer func() {
		if err != nil {
			d.close()
		}
	}()
	report := func(what string, err error) { log.Warn("start is delayed", "what", what, "error", err) }
	open := func(where address.Database, role databaseRole) (*store.Store, error) {
		s, err := openStore(ctx, store.Config{URL: where.URL(), Worker: c.Node, Connections: c.connectionsPerStore(), Logger: log, Redact: redact}, role, c.Wait, report)
		if err == nil {
			d.opened = append(d.opened, s)
		}
		return s, err
	}

	if d.tables, err = open(c.Database(), c.tablesDatabase()); err != nil {
		return nil, err
	}
	var resultsStore *store.Store
	if c.separateResults() {
		if resultsStore, err = open(c.Results, c.resultsDatabase()); err != nil {
			return nil, err
		}
	}
	if err = checkConnections(ctx, d.tables, resultsStore, c.Wait, report); err != nil {
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
	if resultsStore != nil {
		home = resultsStore
	}
	backend, err := store.NewResults(home, c.resultsConfig())
	if err != nil {
		return nil, err
	}
	if resultsStore != nil {
		if err = prepareResults(ctx, backend, home, c, log); err != nil {
			return nil, err
		}
	}
	d.results = backend
	return d, nil
}

// resultTables is the configuration of Celery's tables if they are in the same
// database as MoonMind's, else nil.
func (c *configuration) resultTables() *store.ResultsConfig {
	if c.Results.IsZero() || c.separateResults() {
		return nil
	}
	config := c.resultsConfig()
	return &config
}

// prepareTables creates or upgrades the schema mm_orchestrator, or returns an
// error that says what is missing.
func prepareTables(ctx context.Context, db *store.Store, options store.MigrateOptions, c *configuration, log *slog.Logger) error {
	// Checked first, because its error says more than a statement that fails with
	// "permission denied". The role owns whatever is created after this.
	if !c.Spec.Only {
		if err := db.CheckPrivileges(ctx, options.ResultTables); err != nil {
			return cureAccess(err)
		}
	}
	if c.Spec.Consume != nil {
		if err := db.CheckSpecPrivileges(ctx, options.ResultTables); err != nil {
			return cureAccess(err)
		}
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
		if err := c.checkPrepared(db, report); err != nil {
			return err
		}
	}
	return db.CheckSchema(ctx)
}

// cureMigration is the cure for a role that may not create tables.
func (c *configuration) cureMigration() string {
	return "Run `mm-orchestrator migrate` as the owner of the database, then start the worker with " + c.assign("MM_ORCHESTRATOR_AUTO_MIGRATE", "false")
}

// prepareResults does the same for a database that stores only results.
func prepareResults(ctx context.Context, backend *store.Results, home *store.Store, c *configuration, log *slog.Logger) error {
	if err := backend.CheckPrivileges(ctx); err != nil {
		return cureAccess(err)
	}
	if !c.AutoMigrate {
		report, err := backend.PlanTables(ctx)
		if err == nil {
			err = c.checkPrepared(home, report)
		}
		return err
	}
	report, err := backend.EnsureTables(ctx)
	switch {
	case errors.Is(err, store.ErrRefused):
		return &curedError{err, c.cureMigration()}
	case err == nil:
		logReport(log, home, report)
	}
	return err
}

// checkPrepared returns an error if a step of the report is still to be done.
// Steps that only the tables' owner can do are left out.
func (c *configuration) checkPrepared(db *store.Store, report store.Report) error {
	for _, step := range report.Steps {
		if !step.ByOwner {
			return &configError{fmt.Sprintf("database %s is not ready, this is still to be done: %s. Run `mm-orchestrator migrate`, or set %s", db.Place(), step.What, c.assign("MM_ORCHESTRATOR_AUTO_MIGRATE", "true"))}
		}
	}
	return nil
}

func logReport(log *slog.Logger, db *store.Store, report store.Report) {
	if lines := report.Lines(); len(lines) > 0 {
		log.Info("prepared the database", "database", db.Place(), "steps", strings.Join(lines, "; "))
	}
}

// nilIfStopped returns nil if ctx has ended: the operation failed because the
// process was asked to stop.
func nilIfStopped(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}
