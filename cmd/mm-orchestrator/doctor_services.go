package main

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

func (d *doctor) broker(ctx context.Context) []verdict {
	config, err := d.config.worker(nil, discardLogger())
	if err != nil {
		return failed(err)
	}
	d.config.addSpec(&config)
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
			list = append(list, ok("queue %q and exchange %q do not exist yet, the worker will declare them", q.Name, q.Exchange)...)
		case !q.Exists:
			list = append(list, ok("queue %q does not exist yet, the worker will declare it; exchange %q matches the configuration", q.Name, q.Exchange)...)
		case !q.ExchangeExists:
			list = append(list, ok("queue %q matches the configuration, %s, %s; exchange %q does not exist yet, the worker will declare it", q.Name, counted(q.Messages, "message"), counted(q.Consumers, "consumer"), q.Exchange)...)
		default:
			list = append(list, ok("queue %q and exchange %q match the configuration, %s, %s", q.Name, q.Exchange, counted(q.Messages, "message"), counted(q.Consumers, "consumer"))...)
		}
		kind := q.Type
		if !q.Exists {
			kind = d.config.QueueType
		}
		if kind == "quorum" && q.Err == nil {
			list = append(list, deliveryLimit(q.Name, d.inspected.Server)...)
		}
	}
	return list
}

// deliveryLimit explains how often a message of a quorum queue may be redelivered.
// AMQP shows neither the limit nor the policies that set it. A limit that is an
// argument of the queue is reported as a mismatch of the declaration instead.
func deliveryLimit(queue, server string) []verdict {
	_, version, _ := strings.Cut(server, " ")
	major, _, _ := strings.Cut(version, ".")
	if n, err := strconv.Atoi(major); err == nil && n < 4 {
		return ok("%q is a quorum queue: %s has no delivery limit unless a policy sets one", queue, server)
	}
	return note("Check that no policy sets delivery-limit below 20 for it (`rabbitmqctl list_policies`), or disable the limit by a policy with delivery-limit -1",
		"%q is a quorum queue, from which RabbitMQ drops a message after 20 returns, or after as many as a policy says, which AMQP does not show; the worker replaces a message by a copy after 10 returns", queue)
}

// publish checks the permission to publish the message of a run's next step.
func (d *doctor) publish(context.Context) []verdict {
	if err := d.inspected.PublishErr; err != nil {
		return failed(&curedError{err, "Without it a run stops after its first step. As an administrator, run: rabbitmqctl set_permissions -p VHOST USER CONFIGURE WRITE READ, with a WRITE pattern that matches amq.default too"})
	}
	return ok("the worker may publish the message of the next step")
}

// open opens a database with as many connections as a worker.
func (d *doctor) open(ctx context.Context, where address.Database, role databaseRole) (*store.Store, error) {
	config := store.Config{URL: where.URL(), Worker: "mm-orchestrator doctor", RetryFor: time.Second, Connections: d.config.connectionsPerStore()}
	return openStore(ctx, config, role, 0, d.program.reportWait)
}

func (d *doctor) database(ctx context.Context) []verdict {
	db, err := d.open(ctx, d.config.Database(), d.config.tablesDatabase())
	if err != nil {
		return failed(err)
	}
	d.db = db
	version, err := db.ServerVersion(ctx)
	if err != nil {
		return failed(err)
	}
	list := ok("PostgreSQL %s at %s", version, db.Place())
	for _, option := range d.config.ignoredOptions() {
		list = append(list, note("Remove the option", "%s has no effect: %s", option.Variable, option.Reason)...)
	}
	return list
}

// connections checks that a worker can open all its connections at the same
// time. If other clients use them now, it is only a note: the other client may be
// the worker that is about to be replaced.
func (d *doctor) connections(ctx context.Context) []verdict {
	if d.config.separateResults() {
		// The check results reports the error.
		d.resultsDB, d.resultsErr = d.open(ctx, d.config.Results, d.config.resultsDatabase())
	}
	err := store.CheckConnections(ctx, d.db, d.resultsDB)
	var few *store.TooFewConnections
	switch {
	case err == nil:
		return ok("a worker with concurrency %d can open the %d connections that it needs", d.config.Concurrency, d.config.connectionsPerStore()+1)
	case errors.As(err, &few) && few.Busy:
		return note("If they belong to a worker that you stop before you start this one, there is nothing to do. Otherwise: "+few.Cure, "%v", err)
	}
	return failed(cureAccess(err))
}

// session checks that a pooler in between does not break session locks.
func (d *doctor) session(ctx context.Context) []verdict {
	if err := d.db.CheckSession(ctx); err != nil {
		return failed(err)
	}
	return ok("connections keep their sessions, as the worker's lock requires")
}

func (d *doctor) privileges(ctx context.Context) []verdict {
	var err error
	if !d.config.Spec.Only {
		err = d.db.CheckPrivileges(ctx, d.config.resultTables())
	}
	if err == nil && d.config.Spec.Consume != nil {
		err = d.db.CheckSpecPrivileges(ctx, d.config.resultTables())
	}
	if errors.Is(err, store.ErrSchema) {
		d.missingColumns, err = err, nil // the check tables reports it
	}
	if err != nil {
		return failed(cureAccess(err))
	}
	return ok("the role has all privileges that a worker needs")
}

func (d *doctor) tables(ctx context.Context) []verdict {
	// For the check artifacts, which does without them if this fails.
	d.runs, _ = d.db.ListRuns(ctx, store.RunFilter{Limit: 100})
	// plan is for our schema; shared compares MoonMind's tables with those that
	// its migrations create.
	plan, err := d.db.Migrate(ctx, store.MigrateOptions{DryRun: true})
	var shared error
	if err == nil {
		_, shared = d.db.Migrate(ctx, store.MigrateOptions{DryRun: true, SharedTables: true})
	}
	missing := d.db.CheckSchema(ctx)
	compared := "MoonMind's tables are as expected"
	if errors.Is(shared, store.ErrRefused) {
		// The comparison creates the tables in a temporary schema.
		compared, shared = "MoonMind's tables have all columns that a worker writes (not compared further, because this role may not create a schema)", nil
	}
	var difference *store.SchemaDifference
	switch {
	case err != nil:
		return failed(err)
	case missing != nil && len(plan.Steps) == 0, missing != nil && strings.Contains(missing.Error(), "has no table"):
		return failed(missing)
	case d.missingColumns != nil:
		return failed(d.missingColumns)
	case errors.As(shared, &difference):
		return note("Harmless if the columns are those of MoonMind's newest migrations",
			"MoonMind's tables differ from those that this program was tested with: %v", shared)
	case shared != nil:
		return failed(shared)
	case len(plan.Steps) > 0 && !d.config.AutoMigrate:
		return fail("Run `mm-orchestrator migrate`, or set "+d.config.assign("MM_ORCHESTRATOR_AUTO_MIGRATE", "true"),
			"MoonMind's tables exist; schema mm_orchestrator is not ready: %s", strings.Join(plan.Lines(), "; "))
	case len(plan.Steps) > 0:
		if _, err := d.db.Migrate(ctx, store.MigrateOptions{Rehearse: true}); err != nil {
			return fail("Run `mm-orchestrator migrate` as the owner of the database", "MoonMind's tables exist; the worker would create or upgrade schema mm_orchestrator at its start, but may not: %v", err)
		}
		return ok("%s; the worker will create or upgrade schema mm_orchestrator at its start (%d steps, see `mm-orchestrator migrate --dry-run`)", compared, len(plan.Steps))
	}
	return ok("%s, schema mm_orchestrator is up to date", compared)
}

func (d *doctor) results(ctx context.Context) []verdict {
	if d.config.Results.IsZero() {
		return ok("no result backend is configured: no Celery results are stored")
	}
	home := d.db
	if d.config.separateResults() {
		if d.resultsErr != nil {
			return failed(d.resultsErr)
		}
		home = d.resultsDB
	}
	backend, err := store.NewResults(home, d.config.resultsConfig())
	if err != nil {
		return failed(err)
	}
	if err := backend.CheckPrivileges(ctx); err != nil {
		return failed(cureAccess(err))
	}
	plan, err := backend.PlanTables(ctx)
	switch {
	case err != nil:
		return failed(err)
	case len(plan.Steps) == 0:
		return ok("celery_taskmeta at %s, written as %s", home.Place(), d.config.ResultEncoding)
	case !slices.ContainsFunc(plan.Steps, func(step store.ReportStep) bool { return !step.ByOwner }):
		return note("Run these statements as the owner of the tables", "celery_taskmeta at %s, written as %s without the columns that Celery 5.7 needs; %s", home.Place(), d.config.ResultEncoding, strings.Join(plan.Lines(), "; "))
	case d.config.AutoMigrate:
		if err := backend.RehearseTables(ctx); err != nil {
			return fail("Run `mm-orchestrator migrate` as the owner of the database", "at %s; the worker would create Celery's tables at its start, but may not: %v", home.Place(), err)
		}
		return ok("at %s; the worker will %s", home.Place(), strings.Join(plan.Lines(), "; "))
	}
	return fail("Run `mm-orchestrator migrate`", "at %s, still to be done: %s", home.Place(), strings.Join(plan.Lines(), "; "))
}
