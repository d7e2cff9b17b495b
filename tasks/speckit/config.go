package speckit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/speckit/preflight"
)

// Runs is the part of [store.Store] that this package uses. The methods are
// documented there.
type Runs interface {
	BeginSpec(ctx context.Context, request store.SpecRequest, open func(store.SpecStart) store.SpecWrite) (store.SpecDecision, error)
	WriteSpec(ctx context.Context, claim store.SpecClaim, write store.SpecWrite) error
	ReleaseSpec(ctx context.Context, claim store.SpecClaim) error
}

// Metrics counts tasks (docs/spec-workflow.md#metrics). Its methods must not block
// and cannot fail.
type Metrics interface {
	SpecStarted(task string, attempt int, retry bool)
	SpecFinished(task string, attempt int, succeeded bool, took time.Duration)
}

// Preflight is implemented by preflight.Checker. An error is that of the context.
type Preflight interface {
	Check(ctx context.Context, request preflight.Request) (preflight.Report, error)
}

// Config is the configuration of a Speckit.
type Config struct {
	// Runs is the database. Required.
	Runs Runs
	// Metrics may be nil for none.
	Metrics Metrics
	// Logger defaults to slog.Default(). This package redacts what it logs.
	Logger *slog.Logger
	// Redactor removes secrets from files, rows and results. Required.
	Redactor *artifacts.Redactor

	// TasksRoot is the absolute path of the directory with one directory per feature.
	// Required.
	TasksRoot string
	// Artifacts says where runs have their directories.
	Artifacts artifacts.DirectoryConfig
	// Repository is that of runs whose row names none, as owner/name, "" for none.
	Repository string
	// Repositories says where the repositories of runs are. nil means that the tasks can
	// neither run Codex nor publish outside of test mode.
	Repositories *Repositories

	// DefaultQueue is the queue of discover_next_phase. Defaults to speckit.
	DefaultQueue string
	// CodexQueue is the queue of the other two tasks. Empty means one of the queues
	// codex-0, codex-1 and so on.
	CodexQueue string
	// CodexShards counts these. Defaults to 3.
	CodexShards int

	// TestMode makes Codex and GitHub simulated, as MoonMind's TEST_MODE does.
	TestMode bool
	// Preflight checks before anything else of a task whether it can work. Not used in
	// test mode.
	Preflight Preflight
	// Codex does the tasks. Not used in test mode.
	Codex CodexConfig
	// Publish says how changes are published. Not used in test mode.
	Publish PublishConfig
	// Skills is MoonMind's skills policy.
	Skills SkillsPolicy
	// MaxStarts is how often a task may be started whose worker dies. Defaults to 3.
	MaxStarts int
	// StuckAfter is how long nothing may be seen of an active run before Sweep fails it.
	// Defaults to 1 h.
	StuckAfter time.Duration

	// SettingName returns the name of a setting for error texts. Defaults to the
	// variable itself.
	SettingName func(variable string) string
	// Now defaults to time.Now.
	Now func() time.Time
}

// WithDefaults returns a copy in which empty fields have their defaults.
func (c Config) WithDefaults() Config {
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if c.Metrics == nil {
		c.Metrics = noMetrics{}
	}
	if c.DefaultQueue == "" {
		c.DefaultQueue = "speckit"
	}
	if c.CodexShards == 0 {
		c.CodexShards = 3
	}
	if c.Skills.Default == "" {
		c.Skills.Default = "speckit"
	}
	if c.MaxStarts == 0 {
		c.MaxStarts = 3
	}
	if c.StuckAfter == 0 {
		c.StuckAfter = time.Hour
	}
	if c.SettingName == nil {
		c.SettingName = func(variable string) string { return variable }
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c
}

// Validate returns an error that names what is wrong.
func (c Config) Validate() error {
	switch {
	case c.Runs == nil:
		return errors.New("speckit: Config.Runs is nil")
	case c.Redactor == nil:
		return errors.New("speckit: Config.Redactor is nil")
	case !filepath.IsAbs(c.TasksRoot):
		return fmt.Errorf("speckit: Config.TasksRoot is %q, want an absolute path", c.TasksRoot)
	case c.StuckAfter < 0:
		return fmt.Errorf("speckit: Config.StuckAfter is %s, want a positive duration", c.StuckAfter)
	case c.CodexShards < 0 || c.CodexShards > 64:
		return fmt.Errorf("speckit: Config.CodexShards is %d, want 1 to 64", c.CodexShards)
	case c.Skills.Canary < 0 || c.Skills.Canary > 100:
		return fmt.Errorf("speckit: Config.Skills.Canary is %d, want 0 to 100", c.Skills.Canary)
	}
	if c.Repositories != nil {
		if err := c.Repositories.validate(); err != nil {
			return err
		}
	}
	if err := c.Codex.validate(c.Repositories); err != nil {
		return err
	}
	if err := c.Publish.validate(); err != nil {
		return err
	}
	return c.Artifacts.WithDefaults().Validate()
}

type noMetrics struct{}

func (noMetrics) SpecStarted(string, int, bool)                 {}
func (noMetrics) SpecFinished(string, int, bool, time.Duration) {}

// Speckit runs the tasks of the Spec workflow. [New] makes one.
type Speckit struct {
	config Config
	queues codexQueues
	log    *slog.Logger
	// stalls knows the tasks that run.
	stalls stall.Detector
}

// New returns a Speckit, or an error of Validate. It reads and writes nothing.
func New(config Config) (*Speckit, error) {
	config = config.WithDefaults()
	if err := config.Validate(); err != nil {
		return nil, err
	}
	config.Artifacts = config.Artifacts.WithDefaults()
	return &Speckit{
		config: config,
		queues: codexQueues{fixed: config.CodexQueue, shards: config.CodexShards},
		log:    slog.New(config.Redactor.Handler(config.Logger.Handler())),
	}, nil
}

// Queues are all queues of the chain: that of discover_next_phase, and those of the
// other two tasks. Retries of MoonMind's API go to the shards even where a worker
// has a fixed queue (docs/spec-workflow.md#s1), so these are always among them.
func (c Config) Queues() []string {
	c = c.WithDefaults()
	list := append([]string{c.DefaultQueue}, codexQueues{fixed: c.CodexQueue, shards: c.CodexShards}.names()...)
	slices.Sort(list[1:])
	return slices.Compact(list)
}
