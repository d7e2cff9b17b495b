package store

import (
	"encoding/json"
	"slices"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Step names a step of a plan: a label of the enum orchestratorplanstep.
type Step string

// The labels of orchestratorplanstep.
const (
	StepAnalyze  Step = "analyze"
	StepPatch    Step = "patch"
	StepBuild    Step = "build"
	StepRestart  Step = "restart"
	StepVerify   Step = "verify"
	StepRollback Step = "rollback"
)

// Steps returns all steps, in the order in which plans have them.
func Steps() []Step {
	return []Step{StepAnalyze, StepPatch, StepBuild, StepRestart, StepVerify, StepRollback}
}

// Known says whether s is one of Steps.
func (s Step) Known() bool { return slices.Contains(Steps(), s) }

// StepStatus says how a step ended.
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
	// HasRollback says that the plan has a rollback step, as an object or as a bare
	// string (docs/moonmind.md#the-plan).
	HasRollback bool
}

// BeginRequest asks for the right to run one step.
type BeginRequest struct {
	RunID  string
	Step   Step
	TaskID string
	// RootTaskID is the id of the chain's first task; it names one submission
	// of a run.
	RootTaskID string
	// Workspace returns the name of what only one run at a time may change, such as
	// the name of the queue and the path of a repository. It must be the same for
	// all steps of a run, and in all workers that share the workspace. Required.
	Workspace func(Run) string
	// GateService names the service whose approval gate applies. Defaults to the target
	// service in lower case.
	GateService func(Run) string
	// Queue is the queue that the message came from, and goes back to after it was
	// parked.
	Queue string
	// Message is parked if the step has to wait. Its Exchange and RoutingKey are not
	// used. With Redelivered set, BeginStep allows for a holder that has just died;
	// the flag is no condition for taking a claim over, since a message that was
	// parked and published anew does not have it.
	Message protocol.Delivery
}

// A Decision is the answer of BeginStep: [Start], [Done], [Parked] or [Stop].
type Decision interface{ decision() }

// Start: the caller holds the claim and must run the step, then FinishStep.
type Start struct {
	Claim Claim
	Run   Run
	// OwnedAt is just before the commit was sent. At that moment no other worker
	// could have the claim.
	OwnedAt time.Time
	// RunStarted says that this step took the run from pending to running.
	RunStarted bool
	// Progress says which commands of this attempt have ended under earlier workers
	// and must not run again; nil for none.
	Progress *Progress
	// PreviousWorker is the node name of the worker that ran the attempt last. It is
	// "" if there is none, or if the answer to an earlier try was lost.
	PreviousWorker string
	// afterPause says that the run has paused before this step, for its approval.
	afterPause bool
	// RootTaskID is that of the request.
	RootTaskID string
	// Change is what is known about the change of the run.
	Change ChangeState
	// Revocation is an operator's request to end the run, nil for none. CheckClaim
	// returns one that comes later.
	Revocation *Revocation
	// RollbackRequest is an operator's request for this rollback, nil for none and for
	// every other step.
	RollbackRequest *RollbackRequest
	// Approval is nil if the run needs none.
	Approval *StartApproval
}

// StartApproval says what a step of a run that needs an approval has to look at.
type StartApproval struct {
	// Check: call CheckApproval before the step's first effect. In verify: before
	// anything.
	Check bool
	// Violation, unless "", is why the step must fail: the plan was changed while the
	// run was carried out.
	Violation string
}

// ChangeState is what the database knows about the change of a run.
type ChangeState struct {
	// Record is what RecordChange stored last for the run, in any step and
	// attempt; nil for nothing. Package change defines it.
	Record json.RawMessage
	// RunElsewhere says that patch, build or restart of the run was also run by a
	// worker that keeps no record: a Python worker, or an older version. It stays
	// set.
	RunElsewhere bool
}

// Done: this task id, or this attempt of the step, has already ended. The caller
// reports the same outcome and does not run the step.
type Done struct {
	Outcome Outcome
	// ParkedReady says that the run had nothing left to do, so that BeginStep
	// released its workspace, and that parked messages may be published.
	ParkedReady bool
}

// Parked: the step has to wait. The message is stored in the database, and
// TakeParked returns it when the step can start. The caller acknowledges the
// message and does nothing else. The state row is unchanged.
type Parked struct {
	Why ParkedWhy
	// Reason is in words for an operator.
	Reason string
	// ParkedReady says that this call gave the workspace to another run, whose
	// messages can be published.
	ParkedReady bool
}

// Stop: the message must have no effect. Reason says why, in words for an operator:
// the run waits for approval or has ended, or the rollback belongs to a failure
// after which the run was retried.
type Stop struct {
	Reason string
	// Refused says that BeginStep has put the run back to awaiting_approval, because
	// no approval covers the step.
	Refused bool
	// ParkedReady: see Done.
	ParkedReady bool
}

func (Start) decision()  {}
func (Done) decision()   {}
func (Parked) decision() {}
func (Stop) decision()   {}

// Claim is the right to finish one attempt of one step. A worker that has lost its
// claim can change nothing.
type Claim struct {
	RunID   string
	Step    Step
	Attempt int
	TaskID  string
	// Token is another one for each start, and serves as a fencing token.
	Token int64
	// Starts counts how often this attempt was started, this time included.
	Starts int
	// HandedBack counts those after which the worker called ReleaseClaim.
	HandedBack int
	StartedAt  time.Time
}

// Deaths counts the workers that died while they ran the attempt.
func (c Claim) Deaths() int { return max(0, c.Starts-1-c.HandedBack) }

// Outcome is how a step ended: all that FinishStep records, and that BeginStep
// needs to answer a repeated delivery.
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
	// FinishedAt is when the work of the step ended.
	FinishedAt time.Time `json:"finished_at"`
	// LeftBehind is what a step that changes something has left, nil if it is not
	// known. FinishStep keeps it for the next look at the run's approval.
	LeftBehind *Effects `json:"-"`
	// Audit are records for the run's trail that are not written yet. They come before
	// those of the step's end.
	Audit []audit.Record `json:"-"`
	// NothingFollows says that no message of the run follows from the step's: no
	// next link after a success, no error callback after a failure. The run then
	// gives up its workspace, even if steps of its plan are left. It is not
	// recorded.
	NothingFollows bool `json:"-"`
}

// Artifact is a file in a run's directory.
type Artifact struct {
	// Type is a label of the enum orchestratorrunartifacttype.
	Type string `json:"type"`
	// Path is relative to the run directory.
	Path string `json:"path"`
	// Checksum is SHA-256 in lower-case hex, without a prefix.
	Checksum  string `json:"checksum"`
	SizeBytes int64  `json:"size_bytes"`
}

// Finished is the state of the run after FinishStep.
type Finished struct {
	// Status of the run after the step.
	Status RunStatus
	// RunEnded says that completed_at was set; Duration is then the time
	// since the run's start.
	RunEnded bool
	Duration time.Duration
	// ParkedReady says that parked messages may be published now: see TakeParked.
	ParkedReady bool
	// AuditHead is that of the run's audit trail, with the records of this end.
	AuditHead audit.Head
}
