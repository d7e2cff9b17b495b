package orchestrator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// A Request is a delivery of execute_plan_step.
type Request struct {
	RunID, Step        string
	TaskID, RootTaskID string
	// Delivery is the message, which is parked if the step has to wait.
	Delivery protocol.Delivery
	// NoNext says that no message follows a success, NoErrback that none follows
	// a failure: then the run has no message in flight after this step.
	NoNext, NoErrback bool
	// StillUnacked asks the broker whether the message is still unacknowledged on
	// this worker's channel, see [worker.Task.StillUnacked]. Nil for a step without
	// a message.
	StillUnacked func(ctx context.Context) error
	// OtherConsumers asks the broker how many consumers of other workers the
	// message's queue has, see [worker.Task.OtherConsumers]. Nil, for a step without
	// a message, counts as some.
	OtherConsumers func(ctx context.Context) (int, error)
}

// A Result is the return value of execute_plan_step, with its keys in the order
// of Python's.
type Result struct {
	Message   string          `json:"message"`
	Artifacts []string        `json:"artifacts"`
	Metadata  json.RawMessage `json:"metadata"`
}

// ErrStop says that the message must have no effect: no result is stored and no
// message follows.
var ErrStop = errors.New("the step must not be run")

// A HandBackError says that the step cannot run now and that the message must
// return to the queue.
type HandBackError struct {
	// After is the pause before the message returns.
	After  time.Duration
	Reason string
}

func (e *HandBackError) Error() string { return e.Reason }

// Execute runs one step of a run, or returns the recorded outcome of one that has
// ended.
//
//   - A [Result] means that the step has succeeded and that this is recorded.
//   - A [*Failure] means that it has failed and that this is recorded. If the
//     request names no run or no step, there is nothing to record it in.
//   - [ErrStop] means that the message must have no effect: it is obsolete, or it
//     is parked in the database because the step has to wait.
//   - A [*HandBackError] means that the message must be delivered again: the
//     database cannot begin or record the step now, this worker was isolated
//     from database and broker, or the step leaves its rest to the next worker.
//   - The cause of ctx means the same, unless that is a time limit.
//
// isLimit says that a cause is a time limit of the message, which is recorded as
// a failure of the step. Any other cause means that the worker stops. It may be
// nil for no such limits.
func (o *Orchestrator) Execute(ctx context.Context, request Request, isLimit func(error) bool) (Result, error) {
	step := store.Step(request.Step)
	if !step.Known() {
		return Result{}, valueError(protocol.PythonRepr(request.Step) + " is not a valid OrchestratorPlanStep")
	}
	runID, err := store.ParseRunID(request.RunID)
	if err != nil {
		return Result{}, valueError("badly formed hexadecimal UUID string")
	}
	if isLimit == nil {
		isLimit = func(error) bool { return false }
	}
	log := o.log.With("run_id", runID, "step", string(step), "task_id", request.TaskID)
	activity := o.stalls.Start("step "+string(step)+" of run "+runID, "asking the database whether to begin")
	defer activity.End()
	ctx = activity.Context(ctx)
	decision, err := o.config.Steps.BeginStep(ctx, store.BeginRequest{
		RunID: runID, Step: step, TaskID: request.TaskID, RootTaskID: request.RootTaskID,
		Queue: o.config.Queue, Message: request.Delivery, GateService: o.gateService,
		Workspace: func(run store.Run) string { return workspaceOf(o.config.Queue, o.config.Workspace, run) },
	})
	if err != nil {
		return Result{}, o.beginError(ctx, log, runID, err)
	}
	faultpoint.Hit(faultpoint.StepDecided, runID, string(step))
	var result Result
	var parkedReady bool
	switch decision := decision.(type) {
	case store.Start:
		a := &attempt{Orchestrator: o, request: request, begun: decision, isLimit: isLimit, log: log.With("attempt", decision.Claim.Attempt)}
		return a.run(ctx)
	case store.Done:
		faultpoint.Hit(faultpoint.StepAnswered, runID, string(step))
		log.Info("step has ended before, returning its recorded outcome", "status", string(decision.Outcome.Status))
		parkedReady = decision.ParkedReady
		o.writeTrailAgain(ctx, log, runID)
		result, err = answer(decision.Outcome)
	case store.Parked:
		log.Info("step has to wait, its message is parked", "why", string(decision.Why), "reason", decision.Reason)
		parkedReady, err = decision.ParkedReady, ErrStop
	case store.Stop:
		log.Warn("step not run", "reason", decision.Reason)
		parkedReady, err = decision.ParkedReady, ErrStop
	default:
		return Result{}, fmt.Errorf("cannot start step %s of run %s: unknown decision %T", step, runID, decision)
	}
	if parkedReady {
		o.publishReady(ctx, log)
	}
	return result, err
}

// beginError turns an error of BeginStep into that of Execute.
func (o *Orchestrator) beginError(ctx context.Context, log *slog.Logger, runID string, err error) error {
	switch {
	case errors.Is(err, store.ErrNotFound):
		return valueError("Run " + runID + " not found")
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	log.Error("step cannot be begun, handing the message back", "error", err)
	return &HandBackError{After: o.config.HandBackDelay, Reason: err.Error()}
}

// answer returns the result or failure of a finished step: the same now and
// whenever its message is delivered again.
func answer(outcome store.Outcome) (Result, error) {
	if outcome.Status == store.StepFailed {
		failure := &Failure{Type: outcome.ErrorType, Module: outcome.ErrorModule, Arg: outcome.Message, Traceback: outcome.Traceback}
		if failure.Type == "KeyError" {
			// The row has Python's str(), which quotes the text of a KeyError.
			failure.Arg = unquoted(outcome.Message)
		}
		return Result{}, failure
	}
	result := Result{Message: outcome.Message, Artifacts: []string{}, Metadata: json.RawMessage("{}")}
	for _, file := range outcome.Artifacts {
		result.Artifacts = append(result.Artifacts, file.Path)
	}
	if len(outcome.Payload) > 0 && string(outcome.Payload) != "null" {
		result.Metadata = outcome.Payload
	}
	return result, nil
}

func unquoted(text string) string {
	if len(text) >= 2 && text[0] == text[len(text)-1] && strings.ContainsRune(`'"`, rune(text[0])) {
		return text[1 : len(text)-1]
	}
	return text
}
