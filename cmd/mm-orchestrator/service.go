package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/metrics"
	"github.com/moonladderstudios/mm-orchestrator/results"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator"
	"github.com/moonladderstudios/mm-orchestrator/tasks/speckit"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// service is a worker with its background tasks.
type service struct {
	worker *worker.Worker
	// sweep publishes parked messages in turn until its context ends. It is nil in a
	// worker that runs no steps.
	sweep func(context.Context)
	// sweepSpec fails runs of the Spec workflow that are stuck until its context ends. It
	// is nil in a worker that does not run it.
	sweepSpec func(context.Context)
	// look logs what would make runs fail. It is nil in a worker that runs no steps.
	look     func(context.Context)
	statsd   []*metrics.StatsD
	watchdog *watchdog
	listener *metrics.Listener // nil for none
	// stopNow is closed to cancel running steps.
	stopNow <-chan struct{}
	log     *slog.Logger
}

// run runs the worker until ctx ends and running steps have ended. It calls
// started when the worker consumes. Metrics and health checks are served until
// the worker has ended, so that the last step is counted and a supervisor sees
// the worker while it stops.
func (s service) run(ctx context.Context, started func()) error {
	background, end := context.WithCancel(context.WithoutCancel(ctx))
	var group sync.WaitGroup
	for _, statsd := range s.statsd {
		group.Go(func() { statsd.Run(background) })
	}
	group.Go(func() {
		// Only from the first consumer to the request to stop: a worker that starts
		// or stops is not expected to be healthy.
		watch, end := context.WithCancel(background)
		defer end()
		defer context.AfterFunc(ctx, end)()
		select {
		case <-s.worker.Started():
			s.watchdog.run(watch)
		case <-watch.Done():
		}
	})
	if s.listener != nil {
		group.Go(func() {
			if err := s.listener.Serve(background); err != nil {
				s.log.Error("listener for metrics and health checks failed", "error", err)
			}
		})
	}
	group.Go(func() {
		select {
		case <-s.worker.Started():
			started()
			if s.sweep == nil {
				return
			}
			// It continues while the worker stops: the end of its last step may free
			// the workspace for another run.
			s.sweep(background)
		case <-background.Done():
		}
	})
	group.Go(func() {
		select {
		case <-s.worker.Started():
			if s.sweepSpec != nil {
				// Not while the worker stops: its queues look empty to it then.
				s.sweepSpec(ctx)
			}
		case <-background.Done():
		}
	})
	group.Go(func() {
		// Not before the worker is ready: a hanging engine must not delay that, and
		// a worker that still waits for its database has other worries.
		select {
		case <-s.worker.Started():
			if s.look != nil {
				s.look(ctx)
			}
			// What only the start needed is a third of the memory in use, and the
			// worker may be idle for days.
			debug.FreeOSMemory()
			unmapProgram()
		case <-background.Done():
		}
	})
	group.Go(func() {
		select {
		case <-s.stopNow:
			s.worker.StopNow()
		case <-background.Done():
		}
	})
	err := s.worker.Run(ctx)
	end()
	group.Wait()
	return err
}

// logStart logs one line with all that a bug report needs.
func (c *configuration) logStart(log *slog.Logger, db *store.Store, listener *metrics.Listener) {
	brokers := make([]string, len(c.Brokers))
	for i, b := range c.Brokers {
		brokers[i] = b.Place()
	}
	results := "none"
	if !c.Results.IsZero() {
		results = c.ResultEncoding
	}
	listen := "off"
	if listener != nil {
		listen = listener.Addr()
	}
	root, err := c.artifactDirectory().WithDefaults().Root()
	if err != nil {
		// Not fatal: runs whose row names a directory do not need the root.
		log.Warn("artifact root is unusable: runs whose row names no artifact directory will fail", "error", err)
	}
	log.Info("worker ready",
		"version", versionText(), "node", c.Node, "queue", strings.Join(c.consumed(), " "), "concurrency", c.Concurrency, "prefetch", c.PrefetchCount(),
		"broker", strings.Join(brokers, " "), "database", db.Place(), "results", results,
		"workspace", c.Workspace, "compose_project", strings.Join(c.Policy.Projects(), " "), "policy", cmp.Or(c.Profiles, "built-in"), "artifact_root", root,
		"docker", cmp.Or(address.MaskURL(c.DockerHost), "local"), "listen", listen, "statsd", cmp.Or(c.StatsD.Host, "off"))
}

// healthChecks are the checks that the watchdog runs. steps and engine are nil in a worker
// that runs only the Spec workflow, spec in one that does not run it.
func (c *configuration) healthChecks(w *worker.Worker, steps *orchestrator.Orchestrator, spec *speckit.Speckit, db *databases, engine *compose.Engine) []healthCheck {
	// At least 3 s: a take-over waits 2 s for a dead worker, which is no stall.
	stall := max(c.HealthLimit, 3*time.Second)
	list := []healthCheck{
		{name: "the worker's engine", limit: c.HealthLimit, check: func(context.Context) error { return w.Health() }},
		// A limit above 0, because a process that continues after SIGSTOP needs a
		// moment to make progress.
		{name: "the worker's own loops", limit: checkInterval, check: func(ctx context.Context) error {
			stuck := w.Stuck(stall)
			if steps != nil {
				stuck = errors.Join(stuck, steps.Stuck(stall))
			}
			if spec != nil {
				// A task reads and removes the files of a whole repository, which takes long on
				// a slow disk.
				stuck = errors.Join(stuck, spec.Stuck(5*stall))
			}
			if stuck != nil && db.tables.Ping(ctx) != nil {
				return nil // they may wait for the database, whose own check has the reason
			}
			return stuck
		}},
	}
	if engine != nil {
		list = append(list, healthCheck{name: "the docker engine", limit: c.HealthLimit, optional: true, check: engine.Ping})
	}
	for _, s := range db.opened {
		list = append(list, healthCheck{name: "the database " + s.Place(), limit: c.HealthLimit, check: s.Ping})
	}
	// The database may answer on one connection and refuse the session, without
	// which no step starts. The longer limit lets an unreachable database be
	// reported first, by its own check.
	list = append(list, healthCheck{name: "the session that proves this worker alive", limit: c.HealthLimit + 2*checkInterval, check: func(context.Context) error { return db.tables.LockError() }})
	// A short limit, because only an operator can repair the schema. Other errors
	// are left to the check of the database.
	list = append(list, healthCheck{name: "the schema mm_orchestrator", limit: checkInterval, check: func(ctx context.Context) error {
		if err := db.tables.CheckOwnSchema(ctx); errors.Is(err, store.ErrSchema) {
			return fmt.Errorf("%w. Until then messages are returned to the queue; a running step continues", err)
		}
		return nil
	}})
	// A short limit for the same reason. Every run that comes meanwhile fails.
	if steps != nil {
		list = append(list, healthCheck{name: "the workspace " + c.Workspace, limit: checkInterval, check: func(context.Context) error { return c.checkWorkspace() }})
	}
	if root, err := c.artifactDirectory().WithDefaults().Root(); err == nil && c.DiskReserve > 0 {
		least := uint64(c.DiskReserve) << 20
		list = append(list, healthCheck{name: "the file system of " + root, check: func(context.Context) error { return diskSpace(root, least, c.name("MM_ORCHESTRATOR_DISK_RESERVE")) }})
	}
	return list
}

// checkWorkspace checks that the workspace is a directory.
func (c *configuration) checkWorkspace() error {
	path := c.Workspace
	info, err := os.Stat(path)
	cure := "Mount the repository there, or set " + c.name("WORKSPACE_ROOT") + " to its directory"
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return &configError{fmt.Sprintf("workspace %s does not exist. %s", path, cure)}
	case errors.Is(err, fs.ErrPermission):
		return &configError{fmt.Sprintf("workspace %s is not accessible for user %d. Run as its owner, or change its permissions", path, os.Getuid())}
	case err != nil:
		return &configError{fmt.Sprintf("workspace %s cannot be used: %v. %s", path, errors.Unwrap(err), cure)}
	case !info.IsDir():
		return &configError{fmt.Sprintf("workspace %s is not a directory. %s", path, cure)}
	}
	return nil
}

// artifactDirectory is where the artifacts of runs are.
func (c *configuration) artifactDirectory() artifacts.DirectoryConfig {
	return artifacts.DirectoryConfig{WorkingDir: c.Workspace, Base: c.ArtifactBase, SubPath: c.ArtifactSubPath, Mappings: c.ArtifactMappings}
}

// statsD is the StatsD configuration with a logger.
func (c *configuration) statsD(log *slog.Logger) metrics.StatsDConfig {
	config := c.StatsD
	config.Logger = log
	return config
}

// worker is the engine's configuration.
func (c *configuration) worker(results results.Backend, log *slog.Logger) (worker.Config, error) {
	if err := c.checkFiles(); err != nil {
		return worker.Config{}, &curedError{err, "The address comes from " + c.names("CELERY_BROKER_URL")}
	}
	return worker.Config{
		Broker: c.Broker.Reveal(),
		Queues: []string{c.Queue},
		TaskQueues: []worker.Queue{{
			Name: c.Queue, Exchange: c.Exchange, RoutingKey: c.RoutingKey, Type: c.QueueType,
		}},
		DefaultQueue:    c.Queue,
		DefaultExchange: c.Exchange,
		Slots:           c.Concurrency,
		Prefetch:        c.PrefetchCount(),
		Node:            c.Node,
		Results:         results,
		ResultExpires:   negativeIfZero(c.ResultExpires),
		DeadLetterQueue: c.DeadLetterQueue,
		StartTimeout:    negativeIfZero(c.Wait),
		ShutdownTimeout: negativeIfZero(splitGrace(c.ShutdownGrace).Finish),
		StopTimeout:     splitGrace(c.ShutdownGrace).Stop,
		Logger:          log,
	}, nil
}

// negativeIfZero converts a zero duration to the engine's form of "do not wait" or
// "never": the engine takes zero for its default.
func negativeIfZero(d time.Duration) time.Duration {
	if d == 0 {
		return -1
	}
	return d
}

// redacted removes secrets from the answers to probes.
func redacted(redactor *artifacts.Redactor, probe metrics.Probe) metrics.Probe {
	return func(ctx context.Context) error {
		if err := probe(ctx); err != nil {
			return errors.New(redactor.String(err.Error()))
		}
		return nil
	}
}
