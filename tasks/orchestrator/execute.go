package orchestrator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// Orchestrator executes the steps of runs.
type Orchestrator struct {
	config Config
	log    *slog.Logger
	runner *runner
	client healthClient
	// broker is nil before Register.
	broker   Broker
	stalls   stall.Detector
	sweeping sweeping
}

// New returns an Orchestrator for a valid config. It uses neither files nor
// network.
func New(config Config) (*Orchestrator, error) {
	config = config.WithDefaults()
	if err := config.Validate(); err != nil {
		return nil, err
	}
	return &Orchestrator{
		config: config,
		log:    slog.New(config.Redactor.Handler(config.Logger.Handler())),
		runner: newRunner(config),
		client: newHealthClient(config.Environ),
	}, nil
}

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

// errStepTimeLimit is the cause with which a step's context ends at its limit.
type errStepTimeLimit struct{ limit time.Duration }

func (e errStepTimeLimit) Error() string {
	return fmt.Sprintf("the step took longer than its limit of %s", e.limit)
}

// Execute runs one step of a run, or returns the recorded outcome of one that has
// ended.
//
//   - A [Result] means that the step has succeeded and that this is recorded.
//   - A [*Failure] means that it has failed and that this is recorded. If the
//     request names no run or no step, there is nothing to record it in.
//   - [ErrStop] means that the message must have no effect: it is obsolete, or it
//     is parked in the database because the step has to wait.
//   - A [*HandBackError] means that the message must be delivered again: the
//     database cannot begin or record the step now, or this worker was
//     isolated from database and broker.
//   - The cause of ctx means the same, unless that is a time limit.
//
// isLimit says that a cause is a time limit of the message, which is recorded as
// a failure of the step. Any other cause means that the worker stops. It may be
// nil for no such limits.
func (o *Orchestrator) Execute(ctx context.Context, request Request, isLimit func(error) bool) (Result, error) {
	step := store.Step(request.Step)
	if !step.Known() {
		return Result{}, valueError(pythonRepr(request.Step) + " is not a valid OrchestratorPlanStep")
	}
	runID, err := store.ParseRunID(request.RunID)
	if err != nil {
		return Result{}, valueError("badly formed hexadecimal UUID string")
	}
	log := o.log.With("run_id", runID, "step", string(step), "task_id", request.TaskID)
	activity := o.stalls.Start("step "+string(step)+" of run "+runID, "asking the database whether to begin")
	defer activity.End()
	ctx = activity.Context(ctx)
	decision, err := o.config.Steps.BeginStep(ctx, store.BeginRequest{
		RunID: runID, Step: step, TaskID: request.TaskID, RootTaskID: request.RootTaskID,
		Queue: o.config.Queue, Message: request.Delivery,
		Workspace: func(run store.Run) string { return workspaceOf(o.config.Queue, o.config.Workspace, run) },
	})
	if err != nil {
		return Result{}, o.beginError(ctx, log, runID, err)
	}
	faultpoint.Hit(faultpoint.StepDecided, runID, string(step))
	switch decision := decision.(type) {
	case store.Start:
		return o.start(ctx, log, request, decision, isLimit)
	case store.Done:
		faultpoint.Hit(faultpoint.StepAnswered, runID, string(step))
		log.Info("step has ended before, returning its recorded outcome", "status", string(decision.Outcome.Status))
		if decision.ParkedReady {
			o.publishReady(ctx, log)
		}
		return answer(decision.Outcome)
	case store.Parked:
		log.Info("step has to wait, its message is parked", "why", string(decision.Why), "reason", decision.Reason)
		if decision.ParkedReady {
			o.publishReady(ctx, log)
		}
		return Result{}, ErrStop
	case store.Stop:
		log.Warn("step not run", "reason", decision.Reason)
		if decision.ParkedReady {
			o.publishReady(ctx, log)
		}
		return Result{}, ErrStop
	default:
		return Result{}, fmt.Errorf("cannot start step %s of run %s: unknown decision %T", step, runID, decision)
	}
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

// start runs a step whose claim this worker has, and records its end.
func (o *Orchestrator) start(ctx context.Context, log *slog.Logger, request Request, begun store.Start, isLimit func(error) bool) (Result, error) {
	log = log.With("attempt", begun.Claim.Attempt)
	log.Info("step started", "service", begun.Run.TargetService, "starts", begun.Claim.Starts)
	o.config.Metrics.StepStarted(string(begun.Claim.Step))
	if begun.RunStarted {
		o.config.Metrics.RunStatus(string(store.RunRunning))
	}

	work, cancel := ctx, context.CancelFunc(func() {})
	if limit := o.config.StepTimeLimit; limit > 0 {
		work, cancel = context.WithTimeoutCause(ctx, limit, errStepTimeLimit{limit})
	}
	faultpoint.Hit(faultpoint.StepBegun, begun.Claim.RunID, string(begun.Claim.Step))
	work, claimLost, unwatchClaim := o.endWhenTakenOver(work, begun.Claim)
	defer unwatchClaim()
	journal := o.openJournal(log, begun, claimLost)
	work, unwatchIsolation := o.endWhenIsolated(work, log, request, begun)
	work, unwatchRevocation := o.endWhenRevoked(work, begun.Claim)
	if afterKill(begun.Claim) {
		// Programs that are left of this step, or of an earlier one of the run, may
		// still write to the workspace.
		processes.EndOtherWorkersPrograms(log, begun.Claim.RunID)
	}
	stall.FromContext(ctx).Progress("working")
	outcome := o.work(work, log, begun, journal)
	unwatchRevocation()
	journal.close()
	unwatchIsolation()
	unwatchClaim()
	revokedOutcome(work, &outcome)
	faultpoint.Hit(faultpoint.StepWorked, begun.Claim.RunID, string(begun.Claim.Step))
	cancel()
	if cause := context.Cause(ctx); cause != nil && outcome.Status == store.StepFailed && (isLimit == nil || !isLimit(cause)) {
		// The worker stops: another one continues the step.
		o.release(ctx, log, begun.Claim)
		return Result{}, cause
	}
	if isolated := (errIsolated{}); errors.As(context.Cause(work), &isolated) && outcome.Status == store.StepFailed {
		log.Error("worker was isolated, commands of the step were killed, handing the message back", "error", isolated)
		if err := o.releaseUntilDone(ctx, log, begun.Claim); err != nil {
			return Result{}, err
		}
		return Result{}, &HandBackError{Reason: isolated.Error()}
	}
	finished, err := o.finish(ctx, log, request, begun.Claim, &outcome, isLimit)
	if err != nil {
		return Result{}, err
	}

	took := max(0, outcome.FinishedAt.Sub(begun.Claim.StartedAt))
	succeeded := outcome.Status == store.StepSucceeded
	o.config.Metrics.StepFinished(string(begun.Claim.Step), succeeded, took)
	switch {
	case finished.RunEnded:
		o.config.Metrics.RunFinished(string(finished.Status), finished.Duration)
	case !succeeded:
		o.config.Metrics.RunStatus(string(finished.Status))
	}
	attributes := []any{"took", took.Round(time.Millisecond), "run_status", string(finished.Status)}
	if succeeded {
		log.Info("step succeeded", append(attributes, "message", outcome.Message)...)
	} else {
		log.Error("step failed", append(attributes, "error", outcome.Message)...)
	}
	if finished.ParkedReady {
		o.publishReady(ctx, log)
	}
	return answer(outcome)
}

// afterKill says that a program of the run may have been killed before this start
// of the step, or may still run.
func afterKill(claim store.Claim) bool {
	return claim.Starts > 1 || claim.Attempt > 1 || claim.Step == store.StepRollback
}

// finish records the outcome, or another one that says why it cannot be
// recorded. While the database is unavailable, or lacks a table that an operator
// can create again, finish waits: a step that is not recorded would be run again.
// A time limit does not end the wait, because the rollback that follows it
// depends on the record.
func (o *Orchestrator) finish(ctx context.Context, log *slog.Logger, request Request, claim store.Claim, outcome *store.Outcome, isLimit func(error) bool) (store.Finished, error) {
	pause, logged, replaced := 100*time.Millisecond, false, false
	ended := ctx.Done()
	for {
		outcome.NothingFollows = request.NoNext
		if outcome.Status == store.StepFailed {
			outcome.NothingFollows = request.NoErrback
		}
		stall.FromContext(ctx).Progress("recording its end")
		attempt, cancel := context.WithTimeout(context.WithoutCancel(ctx), o.config.FinishTimeout)
		finished, err := o.config.Steps.FinishStep(attempt, claim, *outcome)
		cancel()
		switch {
		case err == nil:
			faultpoint.Hit(faultpoint.FinishAfter, claim.RunID, string(claim.Step))
			return finished, nil
		case errors.Is(err, store.ErrClaimLost):
			log.Warn("step was taken over or retried, its end is not recorded", "status", string(outcome.Status), "error", err)
			o.publishReady(ctx, log) // the retry waits for this end
			return store.Finished{}, ErrStop
		case errors.Is(err, store.ErrInvalid) && !replaced:
			// The tables can never store it, and running the step again would not
			// change that.
			log.Error("end of step cannot be recorded as it is", "status", string(outcome.Status), "error", err)
			failure := unexpected(fmt.Errorf("the end of the step (%s: %s) cannot be recorded: %w", outcome.Status, cut(outcome.Message), err))
			*outcome = store.Outcome{
				Status: store.StepFailed, Message: o.clean(failure.Error()), FinishedAt: outcome.FinishedAt,
				ErrorType: failure.Type, ErrorModule: failure.Module, Traceback: o.clean(failure.traceback()),
			}
			replaced = true
			continue
		case !errors.Is(err, store.ErrUnavailable) && !errors.Is(err, store.ErrSchema) && !errors.Is(err, context.DeadlineExceeded):
			o.release(ctx, log, claim)
			log.Error("end of step cannot be recorded, handing the message back", "error", err)
			return store.Finished{}, &HandBackError{After: o.config.HandBackDelay, Reason: err.Error()}
		}
		if !logged {
			log.Error("end of step cannot be recorded yet, waiting for the database", "error", err)
			logged = true
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
			pause = min(2*pause, o.config.HandBackDelay)
		case <-ended:
			timer.Stop()
			if isLimit != nil && isLimit(context.Cause(ctx)) {
				ended = nil
				continue
			}
			o.release(ctx, log, claim)
			return store.Finished{}, context.Cause(ctx)
		}
	}
}

// release gives up the claim on a step that this worker will not finish.
func (o *Orchestrator) release(ctx context.Context, log *slog.Logger, claim store.Claim) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), o.config.FinishTimeout)
	defer cancel()
	faultpoint.Hit(faultpoint.ReleaseBefore, claim.RunID, string(claim.Step))
	if err := o.config.Steps.ReleaseClaim(ctx, claim); err != nil {
		log.Warn("claim on step cannot be released", "error", err)
	}
	faultpoint.Hit(faultpoint.ReleaseAfter, claim.RunID, string(claim.Step))
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

// success is the end of a step that has not failed.
type success struct {
	message string
	files   []artifacts.File
	// payload becomes the state's payload, nil for none.
	payload any
}

// A stepRun is one execution of a step.
type stepRun struct {
	*Orchestrator
	// runner is the Orchestrator's, for this step.
	runner  *runner
	log     *slog.Logger
	journal *journal
	runID   string
	step    store.Step
	plan    plan
	params  parameters
	profile profile
	place   artifacts.Directory
	dir     *artifacts.Run
	// afterKill is what the function says.
	afterKill    bool
	runStartedAt time.Time
}

// work runs a step and returns its outcome, also for a panic or a bad plan
// (docs/moonmind.md#r13).
func (o *Orchestrator) work(ctx context.Context, log *slog.Logger, begun store.Start, journal *journal) store.Outcome {
	s := &stepRun{
		Orchestrator: o, log: log, journal: journal, runID: begun.Run.ID, step: begun.Claim.Step,
		runner:    o.runner.of(processes.Owner{Run: begun.Run.ID, Step: string(begun.Claim.Step)}),
		afterKill: afterKill(begun.Claim), runStartedAt: begun.Claim.StartedAt,
	}
	if begun.Run.StartedAt != nil {
		s.runStartedAt = *begun.Run.StartedAt
	}
	var succeeded success
	var failure *Failure
	if deaths := begun.Claim.Deaths(); deaths >= o.config.MaxStarts {
		failure = unexpected(fmt.Errorf("step %s was started %d times and its worker died each time; it is not started again. "+
			"Look for what ends the worker (memory, a signal) in its log and the kernel's, then retry the run", begun.Claim.Step, deaths))
		failure = s.keepLog(begun.Run, failure)
	} else {
		succeeded, failure = s.performSafely(ctx, begun.Run)
	}
	outcome := store.Outcome{Status: store.StepSucceeded, Message: succeeded.message, ArtifactRoot: s.place.RowPath}
	files, payload := succeeded.files, succeeded.payload
	if failure != nil {
		s.fallbackLog(failure)
		outcome.Status, outcome.Message = store.StepFailed, failure.Error()
		outcome.ErrorType, outcome.ErrorModule = failure.Type, failure.Module
		outcome.Traceback = cutTraceback(o.clean(failure.traceback()))
		files, payload = failure.files, nil
		if failure.log != "" {
			payload = logPayload{failure.log}
		}
	}
	if s.dir != nil {
		s.dir.Close()
	}
	outcome.Message = cut(o.clean(outcome.Message))
	for _, file := range files {
		outcome.Artifacts = append(outcome.Artifacts, store.Artifact{
			Type: artifacts.Type(string(s.step), file.Path), Path: file.Path, Checksum: file.Checksum, SizeBytes: file.SizeBytes,
		})
	}
	if payload != nil {
		// Structs of strings always encode.
		outcome.Payload, _ = json.Marshal(payload)
	}
	outcome.FinishedAt = o.config.Now().UTC()
	return outcome
}

// cutTraceback shortens a traceback and keeps its end, which has the exception.
func cutTraceback(text string) string {
	if len(text) <= 2*messageLimit {
		return text
	}
	return cut(text) + "\n" + strings.ToValidUTF8(text[len(text)-messageLimit:], "")
}

// clean makes a text fit for a database row: redacted, valid UTF-8, without NUL.
func (o *Orchestrator) clean(text string) string {
	return o.config.Redactor.String(strings.ToValidUTF8(strings.ReplaceAll(text, "\x00", ""), "\uFFFD"))
}

// logPayload is the payload of steps whose only artifact is a log.
type logPayload struct {
	Log string `json:"log"`
}

// performSafely turns a panic of perform into a failure.
func (s *stepRun) performSafely(ctx context.Context, run store.Run) (result success, failure *Failure) {
	defer func() {
		if value := recover(); value != nil {
			stack := strings.ReplaceAll(string(debug.Stack()), "\t", "  ")
			result = success{}
			failure = &Failure{
				Type: "RuntimeError", Module: moduleBuiltins,
				Arg: fmt.Sprintf("step %s of run %s panicked: %v. This is a defect of mm-orchestrator; the worker's log has the stack", s.step, s.runID, value),
			}
			failure.Traceback = "Traceback (most recent call last):\n" + stack + "RuntimeError: " + failure.Arg + "\n"
			s.log.Error("step panicked", "error", fmt.Sprint(value), "stack", stack)
		}
	}()
	return s.perform(ctx, run)
}

// open reads the step's part of the plan and opens the run's directory.
func (s *stepRun) open(run store.Run) (failure *Failure) {
	if s.plan, failure = parsePlan(run.Steps); failure != nil {
		return failure
	}
	if s.params, failure = s.plan.find(s.step); failure != nil {
		return failure
	}
	place, err := s.config.Artifacts.ForRun(run.ArtifactRoot, s.runID)
	if err != nil {
		return artifactError(err)
	}
	if s.dir, err = artifacts.Open(place.Dir, s.config.Redactor); err != nil {
		return artifactError(err)
	}
	s.place = place
	faultpoint.Hit(faultpoint.ArtifactsOpened, s.runID, string(s.step))
	return nil
}

// keepLog finishes the log that dead workers have left of a step, if there is
// one, and registers it with the failure.
func (s *stepRun) keepLog(run store.Run, failure *Failure) *Failure {
	if s.open(run) != nil {
		return failure
	}
	name, bad := s.params.text("logArtifact", string(s.step)+".log")
	if bad != nil {
		return failure
	}
	log, err := s.dir.Continue(name, 0, 0)
	if err != nil {
		if !errors.Is(err, artifacts.ErrNoLog) {
			s.log.Error("log of the failed step cannot be finished", "error", err)
		}
		return failure
	}
	defer log.Discard()
	log.Line(failure.Error())
	return s.attachLog(log, failure)
}

// perform does the same checks as the Python worker, in the same order, and runs
// the step.
func (s *stepRun) perform(ctx context.Context, run store.Run) (success, *Failure) {
	if failure := s.open(run); failure != nil {
		return success{}, failure
	}
	var failure *Failure
	if s.profile, failure = findProfile(run.TargetService); failure != nil {
		return success{}, failure
	}
	limit, failure := s.params.number("timeoutSeconds", 0)
	switch {
	case failure != nil:
		return success{}, failure
	case limit < 0 || limit > largest:
		return success{}, valueError("Plan parameter timeoutSeconds must be a number of seconds")
	case limit > 0:
		limit := time.Duration(limit * float64(time.Second))
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, limit, errStepTimeLimit{limit})
		defer cancel()
	}
	if cause := context.Cause(ctx); errors.As(cause, &errRevoked{}) {
		// Revoked between two steps: do not begin this one.
		return success{}, commandError(cause.Error())
	}
	switch s.step {
	case store.StepAnalyze:
		return s.analyze()
	case store.StepPatch:
		return s.patch(ctx)
	case store.StepBuild:
		return s.build(ctx)
	case store.StepRestart:
		return s.restart(ctx)
	case store.StepVerify:
		return s.verify(ctx)
	case store.StepRollback:
		return s.rollback(ctx)
	}
	return success{}, valueError(pythonRepr(string(s.step)) + " is not a valid OrchestratorPlanStep")
}

// fallbackLog writes the log of a failure that has none
// (docs/moonmind.md#fallback-log).
func (s *stepRun) fallbackLog(failure *Failure) {
	if !failure.isRunnerError() || len(failure.files) > 0 || s.dir == nil {
		return
	}
	lines := []string{string(s.step) + " step failed while executing orchestrator command."}
	for _, line := range []string{failure.output, failure.Error()} {
		if line != "" {
			lines = append(lines, line)
		}
	}
	file, err := s.dir.Write(string(s.step)+".log", strings.Join(lines, "\n"))
	if err != nil {
		s.log.Error("log of the failed step cannot be written", "error", err)
		return
	}
	failure.files, failure.log = []artifacts.File{file}, file.Path
}

// workspace returns the directory of the step's workspace parameter, which is
// absolute or relative to the configured workspace (docs/moonmind.md#service-profiles).
func (s *stepRun) workspace() (string, *Failure) {
	text, failure := s.params.text("workspace", ".")
	if failure != nil {
		return "", failure
	}
	return resolveIn(artifacts.Resolve(s.config.Workspace), text), nil
}
