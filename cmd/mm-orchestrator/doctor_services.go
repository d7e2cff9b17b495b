package main

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/address"
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

// deliveryLimit says how often a message of a quorum queue may come back. The
// protocol tells neither the limit nor the policies that set it; one that is an
// argument of the queue would be a difference from our declaration.
func deliveryLimit(queue, server string) []verdict {
	const policies = "See that no policy sets delivery-limit below 20 for it (`rabbitmqctl list_policies`)"
	_, version, _ := strings.Cut(server, " ")
	major, _, _ := strings.Cut(version, ".")
	if n, err := strconv.Atoi(major); err == nil && n < 4 {
		return ok("%q is a quorum queue: without a policy %s sets no delivery limit", queue, server)
	}
	return note(policies+", or turn it off by -1",
		"%q is a quorum queue, of which RabbitMQ drops a message that came back 20 times, or as often as a policy says, which cannot be seen from here: the worker sends it again before, after 10", queue)
}

func (d *doctor) publish(context.Context) []verdict {
	if err := d.inspected.PublishErr; err != nil {
		return failed(&curedError{err, "Without it a run stops after its first step. As an administrator, run: rabbitmqctl set_permissions -p VHOST USER CONFIGURE WRITE READ, with a WRITE that fits amq.default too"})
	}
	return ok("the next step's message can be sent")
}

// open opens a database as a worker does.
func (d *doctor) open(ctx context.Context, where address.Database, role databaseRole) (*store.Store, error) {
	config := store.Config{URL: where.URL(), Worker: "mm-orchestrator doctor", RetryFor: time.Second, Connections: d.config.connectionsPerStore()}
	return openStore(ctx, config, role, 0, d.program.say)
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
		list = append(list, note("Leave the option out", "%s has no effect: %s", option.Variable, option.Reason)...)
	}
	return list
}

// connections says whether a worker gets all that it needs at a time. What
// others use now, a worker perhaps that is about to be replaced, is no failure.
func (d *doctor) connections(ctx context.Context) []verdict {
	if d.config.resultsElsewhere() {
		// If it cannot be opened, results says so.
		d.elsewhere, d.elsewhereErr = d.open(ctx, d.config.Results, d.config.resultsDatabase())
	}
	err := store.CheckConnections(ctx, d.db, d.elsewhere)
	var few *store.TooFewConnections
	switch {
	case err == nil:
		return ok("a worker that runs %d at a time gets the %d that it needs", d.config.Concurrency, d.config.connectionsPerStore()+1)
	case errors.As(err, &few) && few.Busy:
		return note("They suffice if a worker is among the others that stops before this one starts. Otherwise: "+few.Cure, "%v", err)
	}
	return failed(cureAccess(err))
}

// session says whether the worker's lock lasts.
func (d *doctor) session(ctx context.Context) []verdict {
	if err := d.db.CheckSession(ctx); err != nil {
		return failed(err)
	}
	return ok("a connection keeps its session, and with it the worker's lock")
}

func (d *doctor) privileges(ctx context.Context) []verdict {
	err := d.db.CheckPrivileges(ctx, d.config.resultTables())
	if errors.Is(err, store.ErrSchema) {
		d.columns, err = err, nil
	}
	if err != nil {
		return failed(cureAccess(err))
	}
	return ok("the role may read and write what a worker reads and writes")
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
	compared := "MoonMind's are as expected"
	if errors.Is(shared, store.ErrRefused) {
		// To compare them, they are made a second time for a moment.
		compared, shared = "MoonMind's have all columns that a worker writes (this role may make no schema, by which to compare more)", nil
	}
	var difference *store.SchemaDifference
	switch {
	case err != nil:
		return failed(err)
	case missing != nil && len(plan.Steps) == 0, missing != nil && strings.Contains(missing.Error(), "has no table"):
		return failed(missing)
	case d.columns != nil:
		return failed(d.columns)
	case errors.As(shared, &difference):
		return note("If the names and types of columns are those of MoonMind's newest migrations, this is no harm",
			"MoonMind's tables differ from those that this program was tested with: %v", shared)
	case shared != nil:
		return failed(shared)
	case len(plan.Steps) > 0 && !d.config.AutoMigrate:
		return fail("Run `mm-orchestrator migrate`, or set "+d.config.assign("MM_ORCHESTRATOR_AUTO_MIGRATE", "true"),
			"MoonMind's are there; ours are not ready: %s", strings.Join(plan.Lines(), "; "))
	case len(plan.Steps) > 0:
		if _, err := d.db.Migrate(ctx, store.MigrateOptions{Rehearse: true}); err != nil {
			return fail("Let the owner of the database run `mm-orchestrator migrate`", "MoonMind's are there; the worker would make ours at its start, and may not: %v", err)
		}
		return ok("%s; the worker makes ours at its start (%d steps, `mm-orchestrator migrate --dry-run` shows them)", compared, len(plan.Steps))
	}
	return ok("%s, schema mm_orchestrator is of this version", compared)
}

func (d *doctor) results(ctx context.Context) []verdict {
	if d.config.Results.IsZero() {
		return ok("no result backend is configured: no Celery results are kept")
	}
	home := d.db
	if d.config.resultsElsewhere() {
		if d.elsewhereErr != nil {
			return failed(d.elsewhereErr)
		}
		home = d.elsewhere
	}
	backend, err := store.NewResults(home, d.config.resultsConfig())
	if err != nil {
		return failed(err)
	}
	if err := backend.CheckPrivileges(ctx); err != nil {
		return failed(cureAccess(err))
	}
	plan, err := backend.PlanResultTable(ctx)
	switch {
	case err != nil:
		return failed(err)
	case len(plan.Steps) == 0:
		return ok("celery_taskmeta at %s, written as %s", home.Place(), d.config.ResultEncoding)
	case !slices.ContainsFunc(plan.Steps, func(step store.ReportStep) bool { return !step.ByOwner }):
		return note("As the owner of the tables, run what is said", "celery_taskmeta at %s, written as %s without what Celery 5.7 needs; %s", home.Place(), d.config.ResultEncoding, strings.Join(plan.Lines(), "; "))
	case d.config.AutoMigrate:
		if err := backend.RehearseResultTable(ctx); err != nil {
			return fail("Let the owner of the database run `mm-orchestrator migrate`", "at %s; the worker would make its tables at its start, and may not: %v", home.Place(), err)
		}
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
	return ok("engine answers at %s", cmp.Or(address.MaskURL(d.config.DockerHost), "the local socket"))
}
