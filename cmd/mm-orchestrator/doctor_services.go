package main

import (
	"cmp"
	"context"
	"errors"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

func (d *doctor) broker(ctx context.Context) []verdict {
	config, err := d.config.worker(nil, quiet())
	if err != nil {
		return failed(err)
	}
	w, err := worker.New(config)
	if err != nil {
		return failed(err)
	}
	found, err := w.Inspect(ctx)
	if err != nil {
		return failed(d.config.cureBroker(err))
	}
	d.inspected = &found
	return ok("%s at %s", found.Server, found.Broker)
}

func (d *doctor) queue(context.Context) []verdict {
	var list []verdict
	for _, q := range d.inspected.Queues {
		switch {
		case q.Err != nil:
			list = append(list, failed(d.config.cureBroker(q.Err))...)
		case !q.Exists && !q.ExchangeExists:
			list = append(list, ok("%q and exchange %q are not there yet, the worker makes them", q.Name, q.Exchange)...)
		case !q.Exists:
			list = append(list, ok("%q is not there yet, the worker makes it; exchange %q is declared as ours", q.Name, q.Exchange)...)
		case !q.ExchangeExists:
			list = append(list, ok("%q is declared as ours, %d messages, %d consumers; exchange %q is not there yet, the worker makes it", q.Name, q.Messages, q.Consumers, q.Exchange)...)
		default:
			list = append(list, ok("%q and exchange %q are declared as ours, %d messages, %d consumers", q.Name, q.Exchange, q.Messages, q.Consumers)...)
		}
	}
	return list
}

func (d *doctor) database(ctx context.Context) []verdict {
	db, err := openStore(ctx, store.Config{URL: d.config.Database(), Worker: "mm-orchestrator doctor", RetryFor: time.Second}, d.config.tablesDatabase(), 0, func(string, error) {})
	if err != nil {
		return failed(err)
	}
	d.db = db
	version, err := db.ServerVersion(ctx)
	if err == nil {
		err = db.CheckSession(ctx)
	}
	if err != nil {
		return failed(err)
	}
	return ok("PostgreSQL %s at %s", version, db.Place())
}

func (d *doctor) tables(ctx context.Context) []verdict {
	// Whose directories they have is looked at later; without rows there is
	// nothing to look at.
	d.runs, _ = d.db.ListRuns(ctx, store.RunFilter{Limit: 100})
	// Ours, and MoonMind's compared with what its migrations make.
	plan, err := d.db.Migrate(ctx, store.MigrateOptions{DryRun: true})
	var shared error
	if err == nil {
		_, shared = d.db.Migrate(ctx, store.MigrateOptions{DryRun: true, SharedTables: true})
	}
	missing := d.db.CheckSchema(ctx)
	var difference *store.SchemaDifference
	switch {
	case err != nil:
		return failed(err)
	case missing != nil && len(plan.Steps) == 0, missing != nil && strings.Contains(missing.Error(), "has no table"):
		return failed(missing)
	case errors.As(shared, &difference):
		return note("If the names and types of columns are those of MoonMind's newest migrations, this is no harm",
			"MoonMind's tables differ from those that this program was tested with: %v", shared)
	case shared != nil:
		return failed(shared)
	case len(plan.Steps) > 0 && !d.config.AutoMigrate:
		return fail("Run `mm-orchestrator migrate`, or set "+d.config.assign("MM_ORCHESTRATOR_AUTO_MIGRATE", "true"),
			"MoonMind's are there; ours are not ready: %s", strings.Join(plan.Lines(), "; "))
	case len(plan.Steps) > 0:
		return ok("MoonMind's are as expected; the worker makes ours at its start (%d steps, `mm-orchestrator migrate --dry-run` shows them)", len(plan.Steps))
	}
	return ok("MoonMind's are as expected, schema mm_orchestrator is of this version")
}

func (d *doctor) results(ctx context.Context) []verdict {
	if d.config.Results.IsZero() {
		return ok("no result backend is configured: no Celery results are kept")
	}
	home := d.db
	if d.config.resultsElsewhere() {
		var err error
		home, err = openStore(ctx, store.Config{URL: d.config.Results, Worker: "mm-orchestrator doctor", RetryFor: time.Second}, d.config.resultsDatabase(), 0, func(string, error) {})
		if err != nil {
			return failed(err)
		}
		defer home.Close()
	}
	backend, err := store.NewResults(home, d.config.resultsConfig())
	if err != nil {
		return failed(err)
	}
	plan, err := backend.PlanResultTable(ctx)
	switch {
	case err != nil:
		return failed(err)
	case len(plan.Steps) == 0:
		return ok("celery_taskmeta at %s, written as %s", home.Place(), d.config.ResultEncoding)
	case d.config.AutoMigrate:
		return ok("at %s; the worker will %s", home.Place(), strings.Join(plan.Lines(), "; "))
	}
	return fail("Run `mm-orchestrator migrate`", "at %s is still to be done: %s", home.Place(), strings.Join(plan.Lines(), "; "))
}

func (d *doctor) docker(ctx context.Context) []verdict {
	engine, err := compose.NewEngine(d.config.EngineConfig())
	if err != nil {
		return fail("Correct "+d.config.names("DOCKER_HOST", "DOCKER_CERT_PATH"), "%v", err)
	}
	defer engine.Close()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := engine.Ping(ctx); err != nil {
		return fail("Start the engine, mount its socket, or set "+d.config.name("DOCKER_HOST")+"; this user needs the right to use it", "%v", err)
	}
	return ok("engine answers at %s", cmp.Or(d.config.DockerHost, "the local socket"))
}
