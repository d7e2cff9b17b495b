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
	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

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
	// record is what is recorded about the change of the run; saveRecord writes it.
	// recorded is its text in the database, nil for nothing.
	record   change.Record
	recorded json.RawMessage
	// ranElsewhere is [store.ChangeState].RunElsewhere.
	ranElsewhere bool
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
		succeeded, failure = s.performSafely(ctx, begun)
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

// logPayload is the payload of steps whose only artifact is a log.
type logPayload struct {
	Log string `json:"log"`
}

// performSafely turns a panic of perform into a failure.
func (s *stepRun) performSafely(ctx context.Context, begun store.Start) (result success, failure *Failure) {
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
	return s.perform(ctx, begun.Run, begun.Change)
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
func (s *stepRun) perform(ctx context.Context, run store.Run, known store.ChangeState) (success, *Failure) {
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
		var cancel context.CancelFunc
		ctx, cancel = withTimeLimit(ctx, time.Duration(limit*float64(time.Second)))
		defer cancel()
	}
	if endReasonOf(ctx) == revoked {
		// Revoked between two steps: do not begin this one.
		return success{}, commandError(context.Cause(ctx).Error())
	}
	if failure := s.loadRecord(known); failure != nil {
		return success{}, failure
	}
	return performers[s.step](s, ctx)
}

// performers has what each of [store.Steps] does.
var performers = map[store.Step]func(*stepRun, context.Context) (success, *Failure){
	store.StepAnalyze:  (*stepRun).analyze,
	store.StepPatch:    (*stepRun).patch,
	store.StepBuild:    (*stepRun).build,
	store.StepRestart:  (*stepRun).restart,
	store.StepVerify:   (*stepRun).verify,
	store.StepRollback: (*stepRun).rollback,
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
