package orchestrator

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/policy"
	"github.com/moonladderstudios/mm-orchestrator/policy/programs"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// Steps is the part of [store.Store] that this package uses. The methods are
// documented there.
type Steps interface {
	BeginStep(ctx context.Context, request store.BeginRequest) (store.Decision, error)
	RecordProgress(ctx context.Context, claim store.Claim, progress store.Progress) error
	RecordChange(ctx context.Context, claim store.Claim, record json.RawMessage, records ...audit.Record) error
	Record(ctx context.Context, claim store.Claim, records ...audit.Record) error
	FinishStep(ctx context.Context, claim store.Claim, outcome store.Outcome) (store.Finished, error)
	ReadTrail(ctx context.Context, runID string, begin func(store.Trail) error, entry func(audit.Entry) error) error
	ReleaseClaim(ctx context.Context, claim store.Claim, records ...audit.Record) error
	LockConfirmedAt() time.Time
	CheckClaim(ctx context.Context, claim store.Claim) (*store.Revocation, error)
	CheckApproval(ctx context.Context, claim store.Claim, check store.ApprovalCheck) (*store.NotApproved, error)

	RegisterWorker(ctx context.Context, queue string) error
	CountOtherConsumers(ctx context.Context, queue string, own int, maxAge time.Duration) (int, error)
	LeaveQueue(ctx context.Context, queue string) (store.Departure, error)
	ClearHolds(ctx context.Context, queue string) error
	ParkedMessages
	TakeParked(ctx context.Context, queue string) ([]store.ParkedMessage, error)
	KeepParked(ctx context.Context, id int64, sent bool) error

	ListWorkspaces(ctx context.Context, queue string, unacked []string) ([]store.WorkspaceState, error)
	PassWorkspace(ctx context.Context, workspace, runID string) error
	PassPending(ctx context.Context, suspect store.Suspect) error
	FailLost(ctx context.Context, suspect store.Suspect, rollback store.RollbackMessage) (*store.LostRun, error)
	FreeClaims(ctx context.Context, suspect store.Suspect) error
	PresentAwaiting(ctx context.Context, queue string, service func(store.Run) string, look store.Look) error
	EndUnapproved(ctx context.Context, queue string, rollback store.RollbackMessage) ([]store.Unapproved, error)
	FindPause(ctx context.Context, queue string) (*store.Pause, error)

	ListChanges(ctx context.Context, filter store.ChangeFilter) ([]store.Change, error)
	RemoveOldTrails(ctx context.Context, keep time.Duration, limit int) ([]string, error)
	RemoveChange(ctx context.Context, filter store.ChangeFilter, remove func(context.Context, store.Change) (left json.RawMessage, err error)) error
}

// Metrics counts events of steps and runs (docs/moonmind.md#statsd). Its methods
// are called after the commit, must not block and cannot fail.
type Metrics interface {
	StepStarted(step string)
	StepFinished(step string, succeeded bool, took time.Duration)
	// RunStatus: the run has a new status and has not ended.
	RunStatus(status string)
	// RunFinished: the run has ended in status.
	RunFinished(status string, took time.Duration)
	// Paused says whether the queue is paused.
	Paused(paused bool)
}

// Engine is the docker engine as steps use it. [compose.Engine] implements it, and
// documents the methods.
type Engine interface {
	compose.State
	HasAnswered() bool
	Project(ctx context.Context, name string) (compose.Project, error)
	InspectContainer(ctx context.Context, id string) (compose.Inspection, compose.Container, error)
	ReadFiles(ctx context.Context, of compose.Inspection, paths []string) (compose.Inspection, error)
	MissingFiles(ctx context.Context, id string, of compose.Inspection) ([]string, error)
	CreateContainer(ctx context.Context, name string, from compose.Inspection) (string, error)
	StartContainer(ctx context.Context, id string) error
	StopContainer(ctx context.Context, id string) error
	PauseContainer(ctx context.Context, id string) error
	RenameContainer(ctx context.Context, id, name string) error
	RemoveContainer(ctx context.Context, id string) error
	RemoveBuildContainer(ctx context.Context, id string) (bool, error)
	RemoveNetwork(ctx context.Context, id string) error
	RemoveVolume(ctx context.Context, name string) error
	CreateNetwork(ctx context.Context, name string, settings compose.NetworkSettings) error
	DisconnectNetwork(ctx context.Context, id, container string) error
	NetworkUsers(ctx context.Context, id, project string) ([]compose.Container, error)
	InspectImage(ctx context.Context, nameOrID string) (compose.Image, error)
	TagImage(ctx context.Context, id, name string) error
	UntagImage(ctx context.Context, name string) error
	SaveImage(ctx context.Context, id string, to io.Writer) error
	LoadImage(ctx context.Context, from io.Reader) error
	CreatePin(ctx context.Context, pin compose.Pin) error
	FindPin(ctx context.Context, name string) (compose.Pin, error)
	ListPins(ctx context.Context, owner string) ([]compose.Pin, error)
	RemovePin(ctx context.Context, name string) error
}

// Config is the configuration of an Orchestrator.
type Config struct {
	// Steps is the database. Required.
	Steps Steps
	// Metrics may be nil for none.
	Metrics Metrics
	// Logger defaults to slog.Default(). This package redacts what it logs.
	Logger *slog.Logger

	// Queue is the one that the worker consumes. Each host that has a workspace
	// of its own needs its own queue. Parked messages return to it. Required.
	Queue string
	// Node is the worker's name: the origin of the messages that it creates.
	Node string

	// Workspace is the absolute path of the repository: the workspace of
	// every service profile, and where commands run. Required.
	Workspace string
	// Artifacts says where runs have their directories. Its WorkingDir
	// defaults to Workspace.
	Artifacts artifacts.DirectoryConfig
	// Environ is the environment of commands, as NAME=value. Secrets in it
	// are redacted everywhere; proxy variables in it are honoured by verify.
	Environ []string
	// Redactor defaults to one made from Environ and the files with secrets that it
	// and Workspace have.
	Redactor *artifacts.Redactor

	// Policy says what runs may do to which service. Defaults to policy.Default().
	// Programs, HealthURLs, StepTimeLimit, QuietPeriod, RunningIsEnough and AppChecks
	// are for all services of which the policy's file does not say the same.
	Policy *policy.Policy
	// Programs are those that plans may run in addition to those of the policy and
	// the skill executor. A command may run if its first word is one of them.
	Programs []string
	// Permissions allow command lines of git, docker and docker-compose that the rules
	// of package programs refuse.
	Permissions []programs.Permission
	// Compose says how `docker compose` is started on this machine.
	Compose compose.Program
	// Engine is the docker engine. With nil, steps check no containers, and a
	// rollback cannot bring back the image of before.
	Engine Engine
	// Helpers replaces the container that the worker itself runs in. With nil, the
	// worker runs in none.
	Helpers Helpers
	// OwnContainers are the ids of containers that the worker may be running in,
	// see [compose.OwnCandidates]. Program is the path of mm-orchestrator there.
	OwnContainers []string
	Program       string
	// HelperWindow is how long a helper waits for a new worker. Defaults to 2 min.
	HelperWindow time.Duration
	// Stopping is closed when the worker is asked to stop. A step that only waits
	// for a helper does not delay that. Nil means never.
	Stopping <-chan struct{}
	// SettingName returns how the operator has set the setting of a variable, a
	// flag for instance. Error messages name that. Defaults to the variable.
	SettingName func(variable string) string
	// DiskReserve is how many bytes must be free on each file system that a run
	// writes to. Zero means that this is not looked at.
	DiskReserve uint64
	// HealthURLs replace the health check URL of plans, by compose service
	// (docs/moonmind.md#f5).
	HealthURLs map[string]string

	// MaxStarts is how many workers may die during one attempt of a step. After
	// that the step fails, so that it cannot end one worker after the other.
	// Starts that a stopping worker handed back do not count. Defaults to 3.
	MaxStarts int
	// StepTimeLimit ends a step that takes longer. Zero means no limit.
	StepTimeLimit time.Duration
	// KillGrace is the time between SIGTERM and SIGKILL when a command is ended.
	// Defaults to 10 s.
	KillGrace time.Duration
	// IsolatedAfter is the time without any confirmation, from database or broker,
	// that a step is this worker's, after which its commands are killed. It must
	// be well below store.Config.TakeoverGrace. Defaults to 1.25 s.
	IsolatedAfter time.Duration
	// HandBackDelay is the pause before a message returns to the queue because
	// its step cannot be begun or recorded now. Defaults to 5 s.
	HandBackDelay time.Duration
	// FinishTimeout bounds one attempt to record the end of a step; attempts
	// are repeated until one succeeds or the worker stops. Defaults to 30 s.
	FinishTimeout time.Duration
	// QuietPeriod is how long a service has to stay as it is, with all checks
	// good, before verify calls it healthy. It should be longer than the pauses of
	// a restart policy. Defaults to 10 s.
	QuietPeriod time.Duration
	// RunningIsEnough names services that are healthy when they run for the
	// quiet period, if neither the plan nor the container has a health check.
	RunningIsEnough []string
	// AppChecks are commands that check a service, by the service, in addition to
	// everything else. They run like commands of plans.
	AppChecks map[string][]string
	// StateTimeout is how long verify waits for a container to become
	// healthy when the plan has no health check. Defaults to 120 s.
	StateTimeout time.Duration

	// ApprovalWait is how long a run may wait before verify for an approval, with its
	// workspace and all that it has deployed. After that it fails and is rolled back.
	// Defaults to 1 h.
	ApprovalWait time.Duration

	// RollbackCommands makes a rollback run the commands of the plan, as MoonMind
	// does, instead of undoing what the run has changed.
	RollbackCommands bool
	// AllowDrift lets a retry that begins after patch use a workspace in which
	// somebody has edited files of the run's change since.
	AllowDrift bool
	// KeepChanges is how long after its end a run's record is kept, with the refs
	// and the pin that it names. Defaults to 7 days.
	KeepChanges time.Duration
	// KeepAudit is how long an audit trail is kept after its last record, at least a
	// day. Defaults to 0: for ever.
	KeepAudit time.Duration
	// AuditDirectory is a folder in which the worker writes the audit trail of each
	// run that has ended, as RUN.jsonl. Empty means that it writes none.
	AuditDirectory string
	// PinDirectory is a folder in which the images that a rollback needs are also
	// saved as files. Empty means that only containers keep them in the engine.
	PinDirectory string
	// BaselineFileLimit is the largest file in bytes that the baseline contains if
	// git does not track it, BaselineLimit the most of all such files together.
	// Negative means none. They default to 64 and 512 MiB.
	BaselineFileLimit, BaselineLimit int64

	// SweepInterval is the time between two sweeps. It bounds how long a crash can
	// delay a waiting run. Defaults to 1 s.
	SweepInterval time.Duration
	// LostGrace is how long nothing may be seen of a run that holds a workspace
	// before the run counts as lost. It must be longer than a broker needs to
	// notice that a worker's machine has failed and to deliver its message to
	// another worker: two to three heartbeats of 60 s. Defaults to 3 min.
	LostGrace time.Duration

	// Now defaults to time.Now.
	Now func() time.Time
}

// WithDefaults returns a copy in which empty fields have their defaults.
func (c Config) WithDefaults() Config {
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if c.Policy == nil {
		c.Policy = policy.Default()
	}
	if c.Redactor == nil {
		c.Redactor = artifacts.NewRedactor(c.Environ, artifacts.Rules{Workspace: c.Workspace})
	}
	if c.Metrics == nil {
		c.Metrics = noMetrics{}
	}
	if c.SettingName == nil {
		c.SettingName = func(variable string) string { return variable }
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	c.Artifacts.WorkingDir = cmp.Or(c.Artifacts.WorkingDir, c.Workspace)
	c.Artifacts = c.Artifacts.WithDefaults()
	c.HelperWindow = cmp.Or(c.HelperWindow, 2*time.Minute)
	c.MaxStarts = cmp.Or(c.MaxStarts, 3)
	c.KeepChanges = cmp.Or(c.KeepChanges, 7*24*time.Hour)
	c.BaselineFileLimit = cmp.Or(c.BaselineFileLimit, 64<<20)
	c.BaselineLimit = cmp.Or(c.BaselineLimit, 512<<20)
	c.SweepInterval = cmp.Or(c.SweepInterval, time.Second)
	c.LostGrace = cmp.Or(c.LostGrace, 3*time.Minute)
	c.IsolatedAfter = cmp.Or(c.IsolatedAfter, 1250*time.Millisecond)
	c.KillGrace = cmp.Or(c.KillGrace, 10*time.Second)
	c.HandBackDelay = cmp.Or(c.HandBackDelay, 5*time.Second)
	c.FinishTimeout = cmp.Or(c.FinishTimeout, 30*time.Second)
	c.QuietPeriod = cmp.Or(c.QuietPeriod, 10*time.Second)
	c.StateTimeout = cmp.Or(c.StateTimeout, 120*time.Second)
	c.ApprovalWait = cmp.Or(c.ApprovalWait, time.Hour)
	return c
}

// Validate returns an error that names the first wrong field. It does not look at
// the file system.
func (c Config) Validate() error {
	if c.Steps == nil {
		return errors.New("orchestrator: Steps is not set")
	}
	if !filepath.IsAbs(c.Workspace) {
		return fmt.Errorf("orchestrator: workspace %q must be an absolute path", c.Workspace)
	}
	if c.Queue == "" {
		return errors.New("orchestrator: Queue is not set")
	}
	if c.PinDirectory != "" && !filepath.IsAbs(c.PinDirectory) {
		return fmt.Errorf("orchestrator: PinDirectory %q must be an absolute path", c.PinDirectory)
	}
	if c.MaxStarts < 0 {
		return fmt.Errorf("orchestrator: MaxStarts is %d, must not be negative", c.MaxStarts)
	}
	for name, limit := range map[string]time.Duration{
		"StepTimeLimit": c.StepTimeLimit, "KeepChanges": c.KeepChanges, "HelperWindow": c.HelperWindow, "KillGrace": c.KillGrace, "IsolatedAfter": c.IsolatedAfter, "HandBackDelay": c.HandBackDelay,
		"SweepInterval": c.SweepInterval, "LostGrace": c.LostGrace, "FinishTimeout": c.FinishTimeout, "QuietPeriod": c.QuietPeriod, "StateTimeout": c.StateTimeout, "ApprovalWait": c.ApprovalWait,
	} {
		if limit < 0 {
			return fmt.Errorf("orchestrator: %s is %s, must not be negative", name, limit)
		}
	}
	if err := c.Artifacts.Validate(); err != nil {
		return fmt.Errorf("orchestrator: %w", err)
	}
	return nil
}

type noMetrics struct{}

func (noMetrics) StepStarted(string)                       {}
func (noMetrics) StepFinished(string, bool, time.Duration) {}
func (noMetrics) RunStatus(string)                         {}
func (noMetrics) RunFinished(string, time.Duration)        {}
func (noMetrics) Paused(bool)                              {}
