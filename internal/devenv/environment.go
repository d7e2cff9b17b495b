package devenv

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"
)

// Config says what [Up] provides.
type Config struct {
	// Newest starts the newest RabbitMQ and PostgreSQL of Debian's unstable
	// suite, as containers, instead of using what is installed or running.
	Newest bool
	// Images also provides the images of the shipped compose file and exports
	// the variables that name them.
	Images bool
	// Only limits the parts to those named: engine, compose, python, broker,
	// database, compiler, codex, oldest-compose, newest-engine. Defaults to all but the last
	// two: a compose program of the oldest supported release, and the programs of the
	// newest docker engine.
	Only []string
	// Celeries are the Celery releases to make Python environments of. Defaults
	// to all that tests use.
	Celeries []string
	// Keep leaves the services running; `make services-down` ends them.
	Keep bool
	// Output receives the progress lines. Required.
	Output io.Writer
}

// Environment is the result of [Up].
type Environment struct {
	guard *guard
	cache *cache
	vars  map[string]string
}

// Vars returns NAME=value pairs for the environment of a command, sorted.
func (e *Environment) Vars() []string {
	var pairs []string
	for name, value := range e.vars {
		pairs = append(pairs, name+"="+value)
	}
	sort.Strings(pairs)
	return pairs
}

// Exports returns the same as lines for a POSIX shell.
func (e *Environment) Exports() string {
	var lines strings.Builder
	for _, pair := range e.Vars() {
		name, value, _ := strings.Cut(pair, "=")
		fmt.Fprintf(&lines, "export %s='%s'\n", name, strings.ReplaceAll(value, "'", `'\''`))
	}
	return lines.String()
}

// Close ends everything that Up has started, and waits for the end.
func (e *Environment) Close() error { return e.guard.close() }

// startup is the state of one call of Up.
type startup struct {
	Config
	cache    *cache
	guard    *guard
	progress *progress
	root     string // the clone's folder
	dir      string // scratch folder of this run, removed by the guard
	debian   *debian
	newest   newest

	engineReady chan struct{} // closed when an engine answers or cannot be had
	engineErr   error

	mu   sync.Mutex
	vars map[string]string
}

func (b *startup) export(name, value string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.vars[name] = value
}

// Up starts what is missing and returns once all parts answer. If it fails or
// ctx ends, it ends everything that it has started before it returns. With
// Config.Keep, `devenv down` ends the services.
func Up(ctx context.Context, config Config) (*Environment, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	cache, err := openCache()
	if err != nil {
		return nil, err
	}
	root, err := moduleRoot(ctx)
	if err != nil {
		return nil, err
	}
	guard, err := startGuard()
	if err != nil {
		return nil, err
	}
	b := &startup{
		Config: config, cache: cache, guard: guard, root: root,
		progress:    newProgress(config.Output),
		engineReady: make(chan struct{}),
		vars:        map[string]string{},
	}
	defer b.progress.close()
	if err := b.startAll(ctx); err != nil {
		return nil, errors.Join(err, guard.close())
	}
	environment := &Environment{guard: guard, cache: cache, vars: b.vars}
	if config.Keep {
		if err := environment.keep(); err != nil {
			return nil, errors.Join(err, guard.close())
		}
	}
	return environment, nil
}

// startAll starts the parts in parallel and waits for all of them.
func (b *startup) startAll(ctx context.Context) error {
	var err error
	if b.dir, err = scratchFolder(); err != nil {
		return err
	}
	if err := b.guard.watchFolder(b.dir); err != nil {
		return err
	}
	b.takeGiven()
	b.debian = b.planPackages(ctx)

	type part struct {
		name string
		up   func(context.Context) error
	}
	parts := []part{
		{"engine", b.engine},
		{"compose", b.compose},
		{"python", b.python},
		{"broker", b.broker},
		{"database", b.database},
		{"compiler", b.compiler},
		{"codex", b.codex},
		{partOldestCompose, b.oldestComposeProgram},
		{partNewestEngine, b.newestEngine},
	}
	parts = slices.DeleteFunc(parts, func(p part) bool { return !b.wants(p.name) })
	if b.Images {
		parts = append(parts, part{"images", b.stackImages})
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wait sync.WaitGroup
	failures := make([]error, len(parts))
	for i, part := range parts {
		wait.Go(func() {
			if err := part.up(ctx); err != nil {
				failures[i] = fmt.Errorf("%s: %w", part.name, err)
				cancel()
			}
		})
	}
	wait.Wait()
	// A failure cancels the other parts; their errors about that are omitted.
	var real []error
	for _, failure := range failures {
		if failure != nil && !errors.Is(failure, context.Canceled) {
			real = append(real, failure)
		}
	}
	if len(real) > 0 {
		return errors.Join(real...)
	}
	return errors.Join(failures...)
}

// takeGiven takes over the variables that the caller's environment sets, and
// those of `make services-up`.
func (b *startup) takeGiven() {
	kept := b.cache.keptServices()
	for _, name := range []string{EnvBroker, EnvBrokerAPI, EnvBrokerImage, EnvDatabase, EnvDatabaseImage, EnvPythonRoot, EnvCompose, EnvCodex, EnvOldestCompose, EnvNewestEngine} {
		if b.Newest && (name == EnvBroker || name == EnvBrokerAPI || name == EnvBrokerImage || name == EnvDatabase || name == EnvDatabaseImage) {
			continue // Newest asks for other servers
		}
		if value := os.Getenv(name); value != "" {
			b.vars[name] = value
			b.progress.found(name, "given by the environment")
		} else if value, ok := kept[name]; ok {
			b.vars[name] = value
			b.progress.found(name, "left running by services-up")
		}
	}
}

// partNames are the values that Config.Only accepts.
var partNames = []string{"engine", "compose", "python", "broker", "database", "compiler", "codex", partOldestCompose, partNewestEngine}

// Parts that are only provided if they are named.
const (
	partOldestCompose = "oldest-compose"
	partNewestEngine  = "newest-engine"
)

// Validate returns an error that names the wrong field and value.
func (c Config) Validate() error {
	for _, name := range c.Only {
		if !slices.Contains(partNames, name) {
			return fmt.Errorf("there is no part %q; there are %s", name, strings.Join(partNames, ", "))
		}
	}
	for _, release := range c.Celeries {
		if !slices.ContainsFunc(celeries, func(known celeryRelease) bool { return known.celery == release }) {
			return fmt.Errorf("there is no Python environment with Celery %q; there are %s", release, enumerate(celeries, nil))
		}
	}
	if c.Output == nil {
		return errors.New("Config.Output is missing")
	}
	return nil
}

// wants reports whether this run needs the part. It needs the engine also for
// servers that can only run as containers.
func (b *startup) wants(part string) bool {
	if len(b.Only) == 0 && part != partOldestCompose && part != partNewestEngine || slices.Contains(b.Only, part) {
		return true
	}
	if part != "engine" {
		return false
	}
	return b.Images || b.Newest || !canInstall() &&
		(b.wants("broker") && findRabbitMQ() == "" || b.wants("database") && findPostgreSQL() == "")
}

// given reports whether all these variables already have values.
func (b *startup) given(names ...string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, name := range names {
		if b.vars[name] == "" {
			return false
		}
	}
	return true
}

// until calls try until it succeeds, ctx ends, the limit has passed, or exited
// (may be nil) is closed. In the last three cases the error contains that of
// the last call.
func until(ctx context.Context, limit time.Duration, exited <-chan struct{}, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-exited:
			return fmt.Errorf("the process has ended: %w", err)
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return fmt.Errorf("not ready after %s: %w", limit, err)
			}
			return ctx.Err()
		case <-tick.C:
		}
	}
}
