package speckit

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// recordTimeout is how long the end of a task may take to be recorded, also after
// the worker was told to stop.
const recordTimeout = 30 * time.Second

// A failure is the error of a failed task, as Python clients and readers of the rows
// see it.
type failure struct {
	// class is Python's, of its builtins.
	class string
	text  string
	// code is that of the payload, "" for the one that the task's name makes.
	code string
	// payload has further fields of the payload, nil for none.
	payload *object
}

func (f *failure) Error() string { return f.text }

func runtimeError(format string, args ...any) *failure {
	return &failure{class: "RuntimeError", text: fmt.Sprintf(format, args...)}
}

func valueError(format string, args ...any) *failure {
	return &failure{class: "ValueError", text: fmt.Sprintf(format, args...)}
}

// request is a task as a message asks for it.
type request struct {
	task    store.SpecTask
	taskID  string
	runID   string
	attempt int
	// context is that of the chain; of discover_next_phase the one that it makes.
	context *object
	// open is what is written when the task starts.
	open func(*attempt) store.SpecWrite
	// work carries the task out and returns what is written at its end. It changes
	// the context.
	work func(ctx context.Context, a *attempt) (store.SpecWrite, error)
}

// An attempt is a task that this worker carries out.
type attempt struct {
	*Speckit
	request
	claim store.SpecClaim
	run   store.SpecRun
	log   *slog.Logger
	// skills is what the skills policy says.
	skills decision
	// base is the path of the run's directory as rows and context have it, and place
	// the directory.
	base  string
	place artifacts.Directory
	// directoryError is why there is no directory.
	directoryError error
	// credentials is what a check of the credentials found, nil before.
	credentials *credentials
	// opening is the message of the task's row when it begins.
	opening string
}

// run carries a task out and returns the context for the next one.
func (s *Speckit) run(ctx context.Context, r request) (json.RawMessage, error) {
	began := s.config.Now()
	activity := s.stalls.Start(fmt.Sprintf("task %s of run %s", r.task, r.runID), "asking the database whether to begin")
	defer activity.End()
	ctx = activity.Context(ctx)
	var a *attempt
	decision, err := s.config.Runs.BeginSpec(ctx, store.SpecRequest{
		RunID: r.runID, Task: r.task, Attempt: r.attempt, TaskID: r.taskID, CodexQueue: pythonText(r.context, "codex_queue"),
	}, func(start store.SpecStart) store.SpecWrite {
		a = s.newAttempt(r, start)
		return r.open(a)
	})
	if err == nil {
		faultpoint.Hit(faultpoint.StepDecided, r.runID, string(r.task))
	}
	var busy store.SpecBusy
	switch d := decision.(type) {
	case store.SpecBusy:
		busy = d
	case store.SpecDone:
		faultpoint.Hit(faultpoint.StepAnswered, r.runID, string(r.task))
		// Its worker may have died before it had removed them.
		(&attempt{Speckit: s, request: r, run: store.SpecRun{ID: r.runID}, log: s.log}).removeClones()
		s.log.Info("task has ended before: its outcome is published again", "task", r.task, "run_id", r.runID, "task_id", r.taskID)
		if d.Outcome.ErrorType != "" {
			return nil, s.pythonError(&failure{class: d.Outcome.ErrorType, text: d.Outcome.Message})
		}
		return d.Outcome.Result, nil
	}
	switch {
	case errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrInvalid):
		return nil, s.pythonError(valueError("%v", err))
	case err != nil:
		return nil, s.requeue(ctx, err)
	case a == nil || decision == nil || busy.Worker != "":
		return nil, worker.Reject{Requeue: true, After: 2 * time.Second, Reason: fmt.Sprintf("worker %s runs task %s of run %s", busy.Worker, busy.Task, r.runID)}
	}
	if start, again := decision.(store.SpecStart); again {
		a.claim, a.run = start.Claim, start.Run
	}
	retry := r.attempt > 1 || r.context.truthy("retry")
	s.config.Metrics.SpecStarted(string(r.task), r.attempt, retry)
	a.log.Info("task begins", "skill", a.skills.skill)
	faultpoint.Hit(faultpoint.StepBegun, r.runID, string(r.task))
	activity.Progress("working")
	write, failed := a.workSafely(ctx)
	if failed != nil && (ctx.Err() != nil || !isFailure(failed)) {
		return nil, a.giveUp(ctx, failed)
	}
	faultpoint.Hit(faultpoint.StepWorked, r.runID, string(r.task))
	if failed == nil {
		write.Outcome = &store.SpecOutcome{Result: r.context.compact()}
	} else {
		write = a.failed(failed)
	}
	activity.Progress("recording its end")
	record, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordTimeout)
	defer cancel()
	err = s.config.Runs.WriteSpec(record, a.claim, write)
	if errors.Is(err, store.ErrInvalid) && failed == nil {
		failed = valueError("%v", err)
		err = s.config.Runs.WriteSpec(record, a.claim, a.failed(failed))
	}
	if err != nil {
		return nil, a.giveUp(ctx, err)
	}
	faultpoint.Hit(faultpoint.FinishAfter, r.runID, string(r.task))
	activity.Progress("removing its clones")
	a.removeClones()
	s.config.Metrics.SpecFinished(string(r.task), r.attempt, failed == nil, s.config.Now().Sub(began))
	if failed != nil {
		return nil, s.pythonError(failed)
	}
	return write.Outcome.Result, nil
}

// Stuck returns an error that names the running tasks that have made no progress for so
// long although they wait for no program and no server, or for one for longer than its own
// limit: a file system that hangs does not let even a killed program end. It is nil if there
// are none. It does not block.
func (s *Speckit) Stuck(after time.Duration) error { return s.stalls.Stuck(after) }

// serversLimit is more than all requests of a check or for a pull request take.
const serversLimit = 20 * time.Minute

// waitAtMost says that a task waits for something that has a limit of its own. Programs may
// take a while longer to end.
func waitAtMost(ctx context.Context, limit time.Duration) (over func()) {
	return stall.FromContext(ctx).WaitAtMost(limit + time.Minute)
}

func isFailure(err error) bool {
	var f *failure
	return errors.As(err, &f)
}

// newAttempt prepares a task whose claim is about to be written.
func (s *Speckit) newAttempt(r request, start store.SpecStart) *attempt {
	a := &attempt{
		Speckit: s, request: r, claim: start.Claim, run: start.Run,
		log: s.log.With("task", r.task, "run_id", start.Run.ID, "attempt", r.attempt, "task_id", r.taskID),
	}
	a.skills = s.config.Skills.decide(start.Run.ID, r.task, r.context)
	a.skills.record(r.context, r.task)
	a.base, a.place, a.directoryError = runDirectory(s.config.Artifacts, start.Run.ArtifactsPath, start.Run.ID)
	return a
}

// workSafely carries the task out; a panic is a failure of the task.
func (a *attempt) workSafely(ctx context.Context) (write store.SpecWrite, err error) {
	defer func() {
		if p := recover(); p != nil {
			a.log.Error("task panicked", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = runtimeError("task %s of run %s failed by a defect of the worker: %v", a.task, a.runID, p)
		}
	}()
	if a.claim.Starts > a.config.MaxStarts {
		return write, runtimeError("Task %s was started %d times, and each time its worker died before the task had ended", a.task, a.claim.Starts-1)
	}
	write, err = a.work(ctx, a)
	if errors.Is(err, store.ErrInvalid) {
		err = valueError("%v", err)
	}
	return write, err
}

// failed is what is written for a failed task (docs/spec-workflow.md#failure).
func (a *attempt) failed(err error) store.SpecWrite {
	f := a.clean(err)
	code := f.code
	if code == "" {
		code = string(a.task) + "_failed"
	}
	payload := statusPayload(store.SpecFailed, f.text)
	payload.set("code", code)
	if f.payload != nil {
		for _, key := range f.payload.keys {
			payload.setRaw(key, f.payload.values[key])
		}
	}
	return store.SpecWrite{
		Status: store.SpecRunFailed, Ended: true,
		State:   &store.SpecState{Status: store.SpecFailed, Message: f.text, Payload: payload.compact()},
		Outcome: &store.SpecOutcome{ErrorType: f.class, Message: f.text},
	}
}

// clean is the failure with its text redacted.
func (s *Speckit) clean(err error) *failure {
	var f *failure
	if !errors.As(err, &f) {
		f = runtimeError("%v", err)
	}
	cleaned := *f
	cleaned.text = s.redact(f.text)
	return &cleaned
}

// redact makes a text fit for rows and results.
func (s *Speckit) redact(text string) string {
	return s.config.Redactor.String(strings.ToValidUTF8(strings.ReplaceAll(text, "\x00", ""), "\uFFFD"))
}

// pythonError is the failure as the worker stores it in Celery's result.
func (s *Speckit) pythonError(err error) error {
	f := s.clean(err)
	return &worker.Error{Type: f.class, Args: []any{f.text}, Err: f}
}

// giveUp hands the claim back without an outcome, so that the next delivery of the
// message continues the task.
func (a *attempt) giveUp(ctx context.Context, err error) error {
	release, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordTimeout)
	defer cancel()
	faultpoint.Hit(faultpoint.ReleaseBefore, a.runID, string(a.task))
	releaseErr := a.config.Runs.ReleaseSpec(release, a.claim)
	faultpoint.Hit(faultpoint.ReleaseAfter, a.runID, string(a.task))
	if releaseErr != nil {
		a.log.Warn("the claim on the task could not be given back: it is free once this worker has ended", "error", releaseErr)
	}
	return a.requeue(ctx, err)
}

// requeue returns the message to its queue because of a fault that is not the
// task's own.
func (s *Speckit) requeue(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return worker.Reject{Requeue: true, After: 5 * time.Second, Reason: s.redact(err.Error())}
}

// statusPayload begins the payload of a row.
func statusPayload(status store.SpecStatus, message string) *object {
	o := newObject()
	o.set("status", string(status))
	o.set("message", message)
	return o
}

// state is a row with the fields of the skills policy in its payload.
func (a *attempt) state(status store.SpecStatus, payload *object, refs ...string) *store.SpecState {
	a.skills.addTo(payload)
	return &store.SpecState{Status: status, Message: payload.text("message"), Payload: payload.compact(), Refs: refs}
}

// directory opens the run's directory.
func (a *attempt) directory() (*artifacts.Run, error) {
	err := a.directoryError
	if err == nil {
		var dir *artifacts.Run
		if dir, err = artifacts.Open(a.place.Dir, a.config.Redactor); err == nil {
			return dir, nil
		}
	}
	var path *artifacts.PathError
	if errors.As(err, &path) {
		return nil, valueError("%s: artifacts_path of run %s is %q", path.Text, a.runID, a.base)
	}
	return nil, &failure{class: "OSError", text: err.Error()}
}

// write writes a file of the run and returns its row.
func (a *attempt) write(dir *artifacts.Run, kind, name, text string) (store.SpecArtifact, error) {
	file, err := dir.Write(name, text)
	if err != nil {
		return store.SpecArtifact{}, &failure{class: "OSError", text: err.Error()}
	}
	return a.artifact(kind, file), nil
}

func (a *attempt) artifact(kind string, file artifacts.File) store.SpecArtifact {
	return store.SpecArtifact{SpecFile: store.SpecFile{Type: kind, Path: filepath.Join(a.base, file.Path)}, SizeBytes: file.SizeBytes, SHA256: file.Checksum}
}

// derived returns digits for a name that Python draws at random. The same attempt
// has the same name however often it is started.
func (a *attempt) derived(what string, digits int) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s|%s|%d", what, a.run.ID, a.attempt))
	return hex.EncodeToString(sum[:])[:digits]
}
