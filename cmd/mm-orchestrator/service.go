package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/metrics"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// service is what runs while a worker does.
type service struct {
	worker *worker.Worker
	// sweep looks after parked messages until its context ends.
	sweep    func(context.Context)
	statsd   *metrics.StatsD
	watchdog *watchdog
	listener *metrics.Listener // nil for none
	// urgent is closed when running steps shall end.
	urgent <-chan struct{}
	log    *slog.Logger
}

// run works until ctx ends and what runs has ended. Metrics and probes are
// served for as long as there is work, and end after it, so that the last
// step is counted and a supervisor sees the worker until it is gone.
func (s service) run(ctx context.Context, started func()) error {
	background, end := context.WithCancel(context.WithoutCancel(ctx))
	var group sync.WaitGroup
	group.Go(func() { s.statsd.Run(background) })
	group.Go(func() {
		// From the first consumer to the request to stop: before and after,
		// nobody expects a worker to be well.
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
				s.log.Error("metrics and health are not served any more", "error", err)
			}
		})
	}
	group.Go(func() {
		select {
		case <-s.worker.Started():
			started()
			// Also while it stops: its last steps may let other runs in.
			s.sweep(background)
		case <-background.Done():
		}
	})
	group.Go(func() {
		select {
		case <-s.urgent:
			s.worker.StopNow()
		case <-background.Done():
		}
	})
	err := s.worker.Run(ctx)
	end()
	group.Wait()
	return err
}

// logStart is the one line that a bug report needs.
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
	root, err := c.place().WithDefaults().Root()
	if err != nil {
		// Runs that have a directory in their row can do without.
		log.Warn("no artifact root: runs without one in their row will fail", "error", err)
	}
	log.Info("worker ready",
		"version", versionText(), "node", c.Node, "queue", c.Queue, "concurrency", c.Concurrency, "prefetch", c.PrefetchCount(),
		"broker", strings.Join(brokers, " "), "database", db.Place(), "results", results,
		"workspace", c.Workspace, "compose_project", orchestrator.ComposeProject, "artifact_root", root,
		"docker", cmp.Or(address.MaskURL(c.DockerHost), "local"), "listen", listen, "statsd", cmp.Or(c.StatsD.Host, "off"))
}

// vitals are what the watchdog looks at.
func (c *configuration) vitals(w *worker.Worker, steps *orchestrator.Orchestrator, db *databases, engine *compose.Engine) []vital {
	// Below that, a take-over that waits for a dead worker would count.
	still := max(c.HealthLimit, 3*time.Second)
	list := []vital{
		{name: "the worker's engine", limit: c.HealthLimit, look: func(context.Context) error { return w.Health() }},
		// A process that was stopped and goes on needs a moment.
		{name: "the worker's own loops", limit: lookTime, look: func(context.Context) error { return errors.Join(w.Stuck(still), steps.Stuck(still)) }},
		{name: "the docker engine", limit: c.HealthLimit, optional: true, look: engine.Ping},
	}
	for _, s := range db.opened {
		list = append(list, vital{name: "the database " + s.Place(), limit: c.HealthLimit, look: s.Ping})
	}
	// It answers by one connection while another, without which no step begins,
	// may be refused. A database that is away is told first, by its own name.
	list = append(list, vital{name: "the session that proves this worker alive", limit: c.HealthLimit + 2*lookTime, look: func(context.Context) error { return db.tables.LockError() }})
	// Nothing but an operator mends it. The database's absence is told above.
	list = append(list, vital{name: "the schema mm_orchestrator", limit: lookTime, look: func(ctx context.Context) error {
		if err := db.tables.CheckOwnSchema(ctx); errors.Is(err, store.ErrSchema) {
			return fmt.Errorf("%w. Messages go back to the queue until then, and a step that runs goes on", err)
		}
		return nil
	}})
	if root, err := c.place().WithDefaults().Root(); err == nil && c.DiskReserve > 0 {
		least := uint64(c.DiskReserve) << 20
		list = append(list, vital{name: "the file system of " + root, look: func(context.Context) error { return diskSpace(root, least, c.name("MM_ORCHESTRATOR_DISK_RESERVE")) }})
	}
	return list
}

// checkWorkspace says what is wrong with the repository's directory.
func (c *configuration) checkWorkspace() error {
	path := c.Workspace
	info, err := os.Stat(path)
	cure := "Mount the repository there, or name its directory by " + c.name("WORKSPACE_ROOT")
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return &configError{fmt.Sprintf("workspace %s does not exist. %s", path, cure)}
	case errors.Is(err, fs.ErrPermission):
		return &configError{fmt.Sprintf("workspace %s may not be entered by user %d. Run as its owner, or change its permissions", path, os.Getuid())}
	case err != nil:
		return &configError{fmt.Sprintf("workspace %s cannot be used: %v. %s", path, errors.Unwrap(err), cure)}
	case !info.IsDir():
		return &configError{fmt.Sprintf("workspace %s is not a directory. %s", path, cure)}
	}
	return nil
}

// place says where artifacts lie.
func (c *configuration) place() artifacts.DirectoryConfig {
	return artifacts.DirectoryConfig{WorkingDir: c.Workspace, Base: c.ArtifactBase, SubPath: c.ArtifactSubPath, Mappings: c.ArtifactMappings}
}

// statsD adds to the settings what they cannot say.
func (c *configuration) statsD(log *slog.Logger) metrics.StatsDConfig {
	config := c.StatsD
	config.Logger = log
	return config
}

// worker is the engine's configuration.
func (c *configuration) worker(results worker.ResultBackend, log *slog.Logger) (worker.Config, error) {
	if err := c.checkFiles(); err != nil {
		return worker.Config{}, err
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
		DeadLetterQueue: c.DeadLetterQueue,
		StartTimeout:    orNone(c.Wait),
		ShutdownTimeout: orNone(splitGrace(c.ShutdownGrace).Finish),
		StopTimeout:     splitGrace(c.ShutdownGrace).Stop,
		Logger:          log,
	}, nil
}

// orNone writes "no time at all" as the engine does.
func orNone(d time.Duration) time.Duration {
	if d == 0 {
		return -1
	}
	return d
}

// redacted keeps secrets out of the answers to probes.
func redacted(redactor *artifacts.Redactor, probe metrics.Probe) metrics.Probe {
	return func(ctx context.Context) error {
		if err := probe(ctx); err != nil {
			return errors.New(redactor.String(err.Error()))
		}
		return nil
	}
}
