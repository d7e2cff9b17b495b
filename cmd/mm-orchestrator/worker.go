package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/metrics"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

var workerCommand = &command{
	name:     "worker",
	synonyms: []string{"serve", "start", "up", "consume"},
	summary:  "consume the queue and carry out the steps of runs",
	about: "Replaces MoonMind's Python worker: it consumes the queue, carries out the steps of runs in the workspace, and records the results in PostgreSQL and in the artifact " +
		"directory. Run it in the Python worker's environment. Several workers can run at the same time, also beside Python workers.\n\n" +
		"SIGTERM or SIGINT stops the worker: it takes no new step, lets the running step finish, and exits with 0. A second signal kills the step's processes at once, and " +
		"its message returns to the queue. After its start, the worker waits for a lost broker or database without a limit, while running steps continue.\n\n" +
		"At its start the worker logs one line with version, addresses and directories, for bug reports. It contains no secrets. " +
		"The variables of the Go runtime apply: GOMEMLIMIT limits the memory, GOMAXPROCS the processors.",
	examples: []example{
		{"mm-orchestrator worker", "in a container"},
		{"CELERY_BROKER_URL=amqp://mm:…@127.0.0.1// POSTGRES_HOST=127.0.0.1 mm-orchestrator worker --workspace . --log-level debug", "on a developer's machine"},
	},
	topics: topics,
	setup:  func(*pflag.FlagSet) runFunc { return runWorker },
}

// runWorker assembles and runs the worker.
func runWorker(ctx context.Context, p *program, in input) error {
	c, values, err := resolve(p.env, in.settings)
	if err != nil {
		return err
	}
	if !c.Spec.Only {
		if err := c.checkWorkspace(); err != nil {
			return err
		}
	}
	if err := c.loadPolicy(); err != nil {
		return err
	}
	environ := c.ChildEnvironment(p.env)
	redactor := artifacts.NewRedactor(withoutSources(append(slices.Clone(environ), flagSecrets(values)...)), c.redaction())
	log := newLogger(p.stderr, c, p.terminal, redactor)
	ctx, stopNow, release := stopOnSignals(ctx, log)
	defer release()

	stopAdopting, err := processes.Adopt(ctx)
	if err != nil {
		log.Warn("cannot become the reaper of orphaned processes: those that leave their process group are found only by their environment", "error", err)
	} else {
		defer stopAdopting()
	}
	processes.EndLeftovers(log)
	for _, variable := range unknown(p.env) {
		log.Warn("variable has no effect", "variable", variable.Variable, "reason", variable.Reason)
	}

	db, err := openDatabases(ctx, c, redactor.String, log)
	if err != nil {
		return nilIfStopped(ctx, err)
	}
	defer db.close()

	registry := metrics.NewRegistry(versionText())
	statsd, err := metrics.NewStatsD(c.statsD(log))
	if err != nil {
		return &configError{err.Error()}
	}
	workerConfig, err := c.worker(db.results, log)
	if err != nil {
		return err
	}
	workerConfig.Metrics = registry
	c.addSpec(&workerConfig)
	// Set below: the worker calls BeforeStopped only after it has run. Both stay nil in a
	// worker that runs only the Spec workflow, which needs no workspace and no engine.
	var steps *orchestrator.Orchestrator
	var engine *compose.Engine
	if !c.Spec.Only {
		workerConfig.BeforeStopped = func(ctx context.Context) []any { return steps.Leave(ctx) }
	}
	w, err := worker.New(workerConfig)
	if err != nil {
		return &configError{err.Error()}
	}
	var spec specParts
	if c.Spec.Consume != nil {
		if spec, err = p.registerSpec(c, w, db.tables, registry, redactor, log); err != nil {
			return err
		}
		defer spec.close()
	}
	senders := []*metrics.StatsD{statsd, spec.statsd}
	if err := metrics.RegisterDropped(registry, senders...); err != nil {
		return err
	}
	if !c.Spec.Only {
		if engine, err = compose.NewEngine(c.EngineConfig()); err != nil {
			return &configError{fmt.Sprintf("%s %q or %s %q cannot be used: %v", c.name("DOCKER_HOST"), address.MaskURL(c.DockerHost), c.name("DOCKER_CERT_PATH"), c.DockerCertPath, err)}
		}
		defer engine.Close()
		recorder, err := metrics.NewRecorder(statsd, registry)
		if err != nil {
			return err
		}
		steps, err = orchestrator.New(orchestrator.Config{
			Steps: db.tables, Queue: c.Queue, Node: c.Node, Metrics: recorder, Logger: log, Redactor: redactor,
			Workspace: c.Workspace, Artifacts: c.artifactDirectory(), Environ: environ, SettingName: c.name,
			Policy: c.Policy, Programs: c.AllowedPrograms, Compose: compose.Program{Standalone: c.ComposeProgram}, Engine: engine, DiskReserve: uint64(c.DiskReserve) << 20,
			HealthURLs: c.HealthURLs, QuietPeriod: c.QuietPeriod, RunningIsEnough: c.RunningIsEnough, AppChecks: c.AppChecks, StepTimeLimit: c.StepLimit, MaxStarts: c.MaxStarts, LostGrace: c.LostGrace, KillGrace: splitGrace(c.ShutdownGrace).Kill,
			RollbackCommands: c.Rollback == "commands", AllowDrift: c.AllowDrift, KeepChanges: c.KeepChanges, KeepAudit: c.KeepAudit, ApprovalWait: c.ApprovalWait, PinDirectory: c.inWorkspace(c.PinDirectory), AuditDirectory: c.inWorkspace(c.AuditDirectory),
			Helpers: engine, OwnContainers: ownContainers(), Program: ownProgram(), HelperWindow: c.HelperWindow, Stopping: ctx.Done(),
			BaselineFileLimit: baselineBytes(c.BaselineFileLimit), BaselineLimit: baselineBytes(c.BaselineLimit),
		})
		if err != nil {
			return &configError{err.Error()}
		}
		steps.Register(w)
	}

	watch := &watchdog{checks: c.healthChecks(w, steps, spec.tasks, db, engine), log: log}
	var listener *metrics.Listener
	if c.Listen != "" {
		listener, err = listen(ctx, log, metrics.ListenerConfig{
			Address: c.Listen, Remote: c.ListenRemote, Metrics: registry, Logger: log,
			Health: redacted(redactor, func(context.Context) error {
				select {
				case <-w.Started():
					return watch.health()
				default: // the watchdog does not run yet
					return w.Health()
				}
			}),
			Ready: redacted(redactor, func(ctx context.Context) error { return errors.Join(w.Ready(), db.tables.Ping(ctx)) }),
			Remark: func(ctx context.Context) string {
				if steps == nil {
					return ""
				}
				pause, err := db.tables.FindPause(ctx, c.Queue)
				if err != nil || pause == nil {
					return ""
				}
				return "paused: " + oneLine(redactor.String(pause.Text()), 1000)
			},
		})
		if err != nil {
			return &configError{fmt.Sprintf("%v. Set %s to another address, or to the empty text to disable it", err, c.name("MM_ORCHESTRATOR_LISTEN"))}
		}
	}
	serve := service{worker: w, statsd: senders, sweepSpec: spec.sweep, watchdog: watch, listener: listener, stopNow: stopNow, log: log}
	if steps != nil {
		serve.sweep, serve.look = steps.Sweep, steps.LogLooks
	}
	return c.cureBroker(serve.run(ctx, func() {
		c.logStart(log, db.tables, listener)
		if steps != nil {
			steps.LogPolicy()
		}
	}))
}

// listen listens at the configured address. If that is the default and in use,
// as by another worker on the same machine, it listens on a free port and logs it,
// because monitoring must not keep a worker from starting.
func listen(ctx context.Context, log *slog.Logger, cfg metrics.ListenerConfig) (*metrics.Listener, error) {
	listener, err := metrics.Listen(ctx, cfg)
	if cfg.Address != metrics.DefaultAddress || !errors.Is(err, syscall.EADDRINUSE) {
		return listener, err
	}
	cfg.Address = "127.0.0.1:0"
	if listener, err = metrics.Listen(ctx, cfg); err == nil {
		log.Warn("default address for metrics and health checks is in use, listening on a free port: set MM_ORCHESTRATOR_LISTEN to give each worker its own address",
			"default", metrics.DefaultAddress, "listen", listener.Addr())
	}
	return listener, err
}

// inWorkspace is the absolute path of a directory of the settings, "" for none.
func (c *configuration) inWorkspace(path string) string {
	if path == "" || filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(c.Workspace, path)
}

// baselineBytes converts a limit in MiB to bytes for a field of
// [orchestrator.Config], in which 0 is the default and a negative number none.
func baselineBytes(n int) int64 {
	if n == 0 {
		return -1
	}
	return int64(n) << 20
}
