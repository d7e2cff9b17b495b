package main

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

func (d *doctor) broker(ctx context.Context) {
	config, err := d.config.worker(nil, quiet())
	if err != nil {
		d.failed("broker", err)
		return
	}
	w, err := worker.New(config)
	if err != nil {
		d.failed("broker", err)
		return
	}
	found, err := w.Inspect(ctx)
	if err != nil {
		d.failed("broker", cureBroker(err))
		d.add(statusSkip, "queue", "needs the broker", "")
		return
	}
	d.ok("broker", "%s at %s", found.Server, found.Broker)
	for _, q := range found.Queues {
		switch {
		case q.Err != nil:
			d.failed("queue", cureBroker(q.Err))
		case !q.Exists && !q.ExchangeExists:
			d.ok("queue", "%q and exchange %q are not there yet, the worker makes them", q.Name, q.Exchange)
		case !q.Exists:
			d.ok("queue", "%q is not there yet, the worker makes it; exchange %q is declared as ours", q.Name, q.Exchange)
		case !q.ExchangeExists:
			d.ok("queue", "%q is declared as ours, %d messages, %d consumers; exchange %q is not there yet, the worker makes it", q.Name, q.Messages, q.Consumers, q.Exchange)
		default:
			d.ok("queue", "%q and exchange %q are declared as ours, %d messages, %d consumers", q.Name, q.Exchange, q.Messages, q.Consumers)
		}
	}
}

// database returns nil if it cannot be used.
func (d *doctor) database(ctx context.Context) *store.Store {
	db, err := openStore(ctx, store.Config{URL: d.config.Database(), Worker: "mm-orchestrator doctor", RetryFor: time.Second}, tablesDatabase, 0, func(string, error) {})
	if err != nil {
		d.failed("database", err)
		for _, name := range []string{"tables", "results", "clock"} {
			d.add(statusSkip, name, "needs the database", "")
		}
		return nil
	}
	version, err := db.ServerVersion(ctx)
	if err == nil {
		err = db.CheckSession(ctx)
	}
	if err != nil {
		d.failed("database", err)
	} else {
		d.ok("database", "PostgreSQL %s at %s", version, db.Place())
	}
	return db
}

func (d *doctor) tables(ctx context.Context, db *store.Store) {
	// Ours, and MoonMind's compared with what its migrations make.
	plan, err := db.Migrate(ctx, store.MigrateOptions{DryRun: true})
	var shared error
	if err == nil {
		_, shared = db.Migrate(ctx, store.MigrateOptions{DryRun: true, SharedTables: true})
	}
	missing := db.CheckSchema(ctx)
	var difference *store.SchemaDifference
	switch {
	case err != nil:
		d.failed("tables", err)
	case missing != nil && len(plan.Steps) == 0, missing != nil && strings.Contains(missing.Error(), "has no table"):
		d.failed("tables", missing)
	case errors.As(shared, &difference):
		d.add(statusNote, "tables", "MoonMind's tables differ from those that this program was tested with: "+shared.Error(), "If the names and types of columns are those of MoonMind's newest migrations, this is no harm")
	case shared != nil:
		d.failed("tables", shared)
	case len(plan.Steps) > 0 && !d.config.AutoMigrate:
		d.add(statusFail, "tables", "MoonMind's are there; ours are not ready: "+strings.Join(plan.Lines(), "; "), "Run `mm-orchestrator migrate`, or set MM_ORCHESTRATOR_AUTO_MIGRATE=true")
	case len(plan.Steps) > 0:
		d.ok("tables", "MoonMind's are as expected; the worker makes ours at its start (%d steps, `mm-orchestrator migrate --dry-run` shows them)", len(plan.Steps))
	default:
		d.ok("tables", "MoonMind's are as expected, schema mm_orchestrator is of this version")
	}
}

func (d *doctor) results(ctx context.Context, db *store.Store) {
	if d.config.Results.IsZero() {
		d.ok("results", "no result backend is configured: no Celery results are kept")
		return
	}
	home := db
	if d.config.resultsElsewhere() {
		var err error
		home, err = openStore(ctx, store.Config{URL: d.config.Results, Worker: "mm-orchestrator doctor", RetryFor: time.Second}, resultsDatabase, 0, func(string, error) {})
		if err != nil {
			d.failed("results", err)
			return
		}
		defer home.Close()
	}
	backend, err := store.NewResults(home, d.config.resultsConfig())
	if err != nil {
		d.failed("results", err)
		return
	}
	plan, err := backend.PlanResultTable(ctx)
	switch {
	case err != nil:
		d.failed("results", err)
	case len(plan.Steps) == 0:
		d.ok("results", "celery_taskmeta at %s, written as %s", home.Place(), d.config.ResultEncoding)
	case d.config.AutoMigrate:
		d.ok("results", "at %s; the worker will %s", home.Place(), strings.Join(plan.Lines(), "; "))
	default:
		d.add(statusFail, "results", "at "+home.Place()+" is still to be done: "+strings.Join(plan.Lines(), "; "), "Run `mm-orchestrator migrate`")
	}
}

func (d *doctor) docker(ctx context.Context) {
	engine, err := compose.NewEngine(d.config.EngineConfig())
	if err != nil {
		d.add(statusFail, "docker", err.Error(), "Correct DOCKER_HOST and DOCKER_CERT_PATH")
		return
	}
	defer engine.Close()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := engine.Ping(ctx); err != nil {
		d.add(statusFail, "docker", err.Error(), "Start the engine, mount its socket, or set DOCKER_HOST; this user needs the right to use it")
		return
	}
	where := d.config.DockerHost
	if where == "" {
		where = "the local socket"
	}
	d.ok("docker", "engine answers at %s", where)
}
