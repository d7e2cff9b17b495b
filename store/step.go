package store

import (
	"encoding/json"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Step names a step of a plan, as in the enum orchestratorplanstep.
type Step string

// The steps in plan order.
const (
	StepAnalyze  Step = "analyze"
	StepPatch    Step = "patch"
	StepBuild    Step = "build"
	StepRestart  Step = "restart"
	StepVerify   Step = "verify"
	StepRollback Step = "rollback"
)

// Known says that the step is one of these.
func (s Step) Known() bool { return knownSteps[s] }

// StepStatus is how a step ended.
type StepStatus string

// The two ways in which a step that was run ends.
const (
	StepSucceeded StepStatus = "succeeded"
	StepFailed    StepStatus = "failed"
)

// RunStatus is a label of the enum orchestratorrunstatus.
type RunStatus string

// The labels of orchestratorrunstatus.
const (
	RunPending          RunStatus = "pending"
	RunRunning          RunStatus = "running"
	RunAwaitingApproval RunStatus = "awaiting_approval"
	RunSucceeded        RunStatus = "succeeded"
	RunFailed           RunStatus = "failed"
	RunRolledBack       RunStatus = "rolled_back"
)

// Run is a row of orchestrator_runs with its plan.
type Run struct {
	ID            string
	Instruction   string
	TargetService string
	Priority      string
	Status        RunStatus
	// ArtifactRoot is "" for NULL.
	ArtifactRoot string
	QueuedAt     time.Time
	StartedAt    *time.Time
	CompletedAt  *time.Time
	// Steps is orchestrator_action_plans.steps as stored: hostile input that
	// package tasks/orchestrator interprets.
	Steps json.RawMessage
	// HasRollback says that the plan names a rollback step; bare strings
	// count (docs/moonmind.md#the-plan).
	HasRollback bool
}

// BeginRequest asks for the right to run one step. The broker's flag
// redelivered is not among it: a message that was handed back and published
// anew comes without the flag, and the claim tells more.
type BeginRequest struct {
	RunID  string
	Step   Step
	TaskID string
	// RootTaskID is the id of the chain's first task; it names one submission
	// of a run.
	RootTaskID string
	// Workspace names what only one run at a time may change, such as the name
	// of the queue and the path of a repository. It must be the same for all
	// steps of a run, and alike in all workers that share it. Required.
	Workspace func(Run) string
	// Queue is where the message came from, and goes back to after it was
	// parked.
	Queue string
	// Message is kept if the step has to wait. Exchange, RoutingKey and
	// Redelivered are not needed.
	Message protocol.Delivery
}

// A Decision is the answer of BeginStep: [Start], [Done], [Parked] or [Stop].
type Decision interface{ decision() }

// Start: the caller holds the claim and must run the step, then FinishStep.
type Start struct {
	Claim Claim
	Run   Run
	// OwnedAt is a moment at which nobody else could have the claim: just before
	// the commit was sent.
	OwnedAt time.Time
	// RunStarted says that this step took the run from pending to running.
	RunStarted bool
	// Progress says which commands of this attempt have ended, under workers
	// that ran it before: they must not be run again. Nil: none has.
	Progress *Progress
	// PreviousWorker is the node name of the worker that ran the attempt last; "" if
	// nobody did, or if it is not known any more.
	PreviousWorker string
}

// Done: this task id, or this attempt of the step, has already ended. The
// caller reports the same outcome and causes no effect.
type Done struct {
	Outcome Outcome
	// ParkedReady says that the run has nothing left to do, so that it gave up the
	// workspace that it still held, and that parked messages can be published.
	ParkedReady bool
}

// Parked: it is not this step's turn. The message is kept in the database,
// and TakeParked gives it out when its turn has come. The caller acknowledges
// it and causes no effect. The state row is as it was.
type Parked struct {
	Why ParkedWhy
	// Reason in words for an operator.
	Reason string
	// ParkedReady says that another run was let in by this very call, and that its
	// messages can be published.
	ParkedReady bool
}

// Stop: the message must have no effect at all, for the reason given in
// words for an operator: approval is missing, the run has ended, the rollback
// belongs to an attempt that has been retried since.
type Stop struct {
	Reason string
	// ParkedReady: see Done.
	ParkedReady bool
}

func (Start) decision()  {}
func (Done) decision()   {}
func (Parked) decision() {}
func (Stop) decision()   {}

// Claim is the right to finish one attempt of one step. It fences: a worker
// that has lost its claim changes nothing.
type Claim struct {
	RunID   string
	Step    Step
	Attempt int
	TaskID  string
	// Token is different for every start.
	Token int64
	// Starts counts how often this attempt was started, this time included.
	Starts int
	// HandedBack counts those of them whose worker stopped in order.
	HandedBack int
	StartedAt  time.Time
}

// Deaths is how many workers died while they ran the attempt.
func (c Claim) Deaths() int { return max(0, c.Starts-1-c.HandedBack) }

// Outcome is how a step ended: everything that FinishStep records, and
// everything that a repeated delivery needs in order to answer the same.
type Outcome struct {
	Status StepStatus `json:"status"`
	// Message for the state row, redacted and without NUL.
	Message string `json:"message"`
	// Artifacts in the order of registration.
	Artifacts []Artifact `json:"artifacts,omitempty"`
	// Payload is the state's payload, a JSON object, or nil for none.
	Payload json.RawMessage `json:"payload,omitempty"`
	// ArtifactRoot is the absolute run directory, or "" if the step failed
	// before it was known.
	ArtifactRoot string `json:"artifact_root,omitempty"`
	// ErrorType and ErrorModule name the Python class that a failure shows
	// in AsyncResult; Traceback is its text.
	ErrorType   string `json:"error_type,omitempty"`
	ErrorModule string `json:"error_module,omitempty"`
	Traceback   string `json:"traceback,omitempty"`
	// FinishedAt is the instant at which the step's work ended.
	FinishedAt time.Time `json:"finished_at"`
	// NothingFollows says that the message of the step brings no other one of
	// the run about: no next link after this success, no error callback after
	// this failure. The run then gives its workspace up, whatever its plan has
	// left. It is not part of the record.
	NothingFollows bool `json:"-"`
}

// Artifact is a file in a run's directory, as it is registered.
type Artifact struct {
	// Type is a label of the enum orchestratorrunartifacttype.
	Type string `json:"type"`
	// Path is relative to the run directory.
	Path string `json:"path"`
	// Checksum is bare lower-case SHA-256 hex.
	Checksum  string `json:"checksum"`
	SizeBytes int64  `json:"size_bytes"`
}

// Finished tells what FinishStep made of the run.
type Finished struct {
	// Status of the run after the step.
	Status RunStatus
	// RunEnded says that completed_at was set; Duration is then the time
	// since the run's start.
	RunEnded bool
	Duration time.Duration
	// ParkedReady says that parked messages can be published now: see TakeParked.
	ParkedReady bool
}
