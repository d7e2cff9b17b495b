package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// outcome is how a task ended. Nothing of it is published or stored yet.
type outcome struct {
	kind     string          // one of the outcome constants
	value    json.RawMessage // of a success
	failed   failure         // of a failure, or the reason of a retry
	retry    Retry
	reject   Reject
	duration time.Duration // how long the handler ran
}

// failure is a failure as it is stored, and the error behind it.
type failure struct {
	exception protocol.Exception
	traceback string
	err       error
	// text is the text of err. The methods of err may be the handler's and may
	// panic: only failureOutcome calls them.
	text string
}

// stored is the exception of the result row, or nil if there is none.
func (f failure) stored() *protocol.Exception {
	if f.exception.Type == "" {
		return nil
	}
	return &f.exception
}

// execute runs the task of an attempt in its slot, records the outcome and settles
// the deliveries. A panic of this package rejects them, since the message probably
// causes it again.
func (w *Worker) execute(a *attempt) {
	defer a.releaseSlot()
	defer func() {
		if p := recover(); p != nil {
			a.end(settlementReject)
			w.reportPanic(p)
		}
	}()
	m, err := a.begin()
	if err != nil {
		faultpoint.Hit(faultpoint.DeliveryDropped, a.id)
		a.end(settlementRequeue)
		return
	}
	a.registration = w.tasks[m.Task]
	faultpoint.Hit(faultpoint.SlotTaken, m.ID, m.ArgsRepr)
	if why := w.mayNotRun(m); why != "" {
		a.outcome = outcome{kind: why}
	} else {
		faultpoint.Hit(faultpoint.TaskStarting, m.ID, m.ArgsRepr)
		a.outcome = w.run(a)
		faultpoint.Hit(faultpoint.TaskReturned, m.ID, m.ArgsRepr)
	}
	a.first.activity.Progress("recording the outcome of its task")
	w.conclude(a)
	if a.task == nil {
		a.task = &Task{Message: m, Node: w.cfg.Node, Queue: a.first.sub.queue.Name, Delivery: a.first.wire, logger: w.taskLogger(m)}
	}
	w.reportFailure(w.lifecycle.record, a.task, a.outcome)
}

// run runs a task's handler and returns the outcome.
func (w *Worker) run(a *attempt) outcome {
	m, r, d := a.message, a.registration, a.first
	if err := w.canFollow(m); err != nil {
		return failureOutcome(err)
	}
	ignored := w.ignoresResult(m, r)
	if w.cfg.TrackStarted && !ignored {
		w.storeStarted(m)
	}
	task := &Task{Message: m, Node: w.cfg.Node, Queue: d.sub.queue.Name, Delivery: d.wire, logger: w.taskLogger(m),
		stillUnacked:   func(ctx context.Context) error { return w.stillUnacked(ctx, a) },
		otherConsumers: func(ctx context.Context) (int, error) { return w.otherConsumers(ctx, d.sub.queue.Name) }}
	a.task = task
	var ended atomic.Bool
	defer ended.Store(true)
	if !ignored {
		task.update = func(ctx context.Context, state string, meta json.RawMessage) error {
			if ended.Load() {
				return fmt.Errorf("task %s has ended: its state cannot become %s", m.ID, state)
			}
			row := w.row(m, state)
			row.Value = meta
			return w.storeOnce(ctx, row)
		}
	}
	began := w.cfg.Now()
	// A handler may take any time: it does not count as stuck.
	endWait := d.activity.Wait()
	o := runHandler(w.lifecycle.work, task, r, w.timeLimit(m, r), w.cfg.HardLimitGrace, w.lifecycle.giveUp.Done(), a.giveUp)
	endWait()
	o.duration = w.cfg.Now().Sub(began)
	return o
}

// Outcome is how a task ended, the result of [Worker.RunTask].
type Outcome struct {
	// State is SUCCESS, FAILURE or RETRY, or "" when the handler returned Reject
	// or Ignore.
	State string
	// Value is the result of a success as JSON.
	Value json.RawMessage
	// Exception and Traceback describe a failure, or the reason of a retry.
	Exception *protocol.Exception
	Traceback string
	// Err is the error that the handler returned, if any.
	Err error
	// Retry and Reject are set when the handler returned them.
	Retry  *Retry
	Reject *Reject
}

// RunTask runs the handler of a message, with middleware and time limits, and
// returns the outcome. It publishes, stores and acknowledges nothing. It is for
// tests, and needs no Run. The error says that the task is not registered.
func (w *Worker) RunTask(ctx context.Context, m *protocol.Message) (Outcome, error) {
	r, known := w.tasks[m.Task]
	if !known {
		return Outcome{}, fmt.Errorf("task %q is not registered", m.Task)
	}
	task := &Task{Message: m, Node: w.cfg.Node, Queue: m.RoutingKey, logger: w.taskLogger(m)}
	o := runHandler(ctx, task, r, w.timeLimit(m, r), w.cfg.HardLimitGrace, nil, func(<-chan outcome) {})
	result := Outcome{Value: o.value, Err: o.failed.err}
	switch o.kind {
	case outcomeSuccess:
		result.State = protocol.StateSuccess
	case outcomeIgnore:
		result.Err = Ignore
	case outcomeReject:
		result.Reject, result.Err = &o.reject, o.reject
	case outcomeRetry:
		result.State, result.Retry = protocol.StateRetry, &o.retry
	case outcomeFailure:
		result.State = protocol.StateFailure
	case outcomeInterrupted:
		result.Err = ErrShutdown
	}
	if result.State == protocol.StateFailure || result.State == protocol.StateRetry {
		result.Exception, result.Traceback = o.failed.stored(), o.failed.traceback
	}
	w.reportFailure(ctx, task, o)
	return result, nil
}

// canFollow returns an error if a follow-up of the task can never be published: a
// chord, or a signature that does not make a valid message
// (docs/celery.md#groups-and-chords). The task then fails before its handler
// runs, rather than after it has done its work.
func (w *Worker) canFollow(m *protocol.Message) error {
	if err := protocol.CheckCanvas(m); err != nil {
		return err
	}
	success, err := protocol.AfterSuccess(m, nil, w.sender())
	if err != nil {
		return err
	}
	failed, err := protocol.AfterFailure(m, w.sender())
	if err != nil {
		return err
	}
	_, err = w.routeFollowUps(slices.Concat(success.FollowUps, failed.FollowUps))
	return err
}

// timeLimit returns the hard and the soft limit. Each is the message's own, or
// else the task's, or else the worker's (docs/celery.md#time-limits).
func (w *Worker) timeLimit(m *protocol.Message, r registration) protocol.TimeLimit {
	limit := m.TimeLimit
	for _, other := range []protocol.TimeLimit{r.timeLimit, w.cfg.TimeLimit} {
		if limit.Hard == 0 {
			limit.Hard = other.Hard
		}
		if limit.Soft == 0 {
			limit.Soft = other.Soft
		}
	}
	return limit
}

// runHandler calls the handler with its time limits. The handler runs in a
// goroutine of its own, so that one that ignores its context does not block the
// worker. When giveUp closes, or grace after the hard limit, runHandler returns
// without the handler; releaseAfter then frees the slot once the handler returns.
//
// The grace exists because error callbacks may depend on what the handler does
// before it returns: a rollback, for example, needs the failure of its step to
// be recorded.
func runHandler(work context.Context, task *Task, r registration, limit protocol.TimeLimit, grace time.Duration, giveUp <-chan struct{}, releaseAfter func(<-chan outcome)) outcome {
	stoppable, cancel := context.WithCancelCause(ContextWithTask(work, task))
	defer cancel(nil)
	ctx, end := limited(stoppable, limit)
	defer end()
	var hard, late <-chan time.Time
	if limit.Hard > 0 {
		timer := time.NewTimer(limit.Hard)
		defer timer.Stop()
		hard = timer.C
	}
	done := make(chan outcome, 1)
	go callHandler(ctx, task, r, done)
	for {
		select {
		case o := <-done:
			if (late != nil || context.Cause(ctx) == ErrTimeLimit) && (o.kind == outcomeFailure || o.kind == outcomeRetry) {
				return hardLimitOutcome(limit.Hard)
			}
			return o
		case <-hard:
			hard = nil
			cancel(ErrTimeLimit)
			timer := time.NewTimer(grace)
			defer timer.Stop()
			late = timer.C
		case <-late:
			releaseAfter(done)
			return hardLimitOutcome(limit.Hard)
		case <-giveUp:
			releaseAfter(done)
			return outcome{kind: outcomeInterrupted}
		}
	}
}

// callHandler calls the handler and converts what it returned. Both call the
// program's code, also methods such as Error and MarshalJSON of what was
// returned, and functions of a [RetryPolicy]. So both are under the task's time
// limits, and a panic in either is the task's failure.
func callHandler(ctx context.Context, task *Task, r registration, done chan<- outcome) {
	finished := false
	var o outcome
	var value any
	var err error
	returned := false
	defer func() { done <- o }()
	defer func() {
		if finished {
			return
		}
		panicked := &panicError{value: recover(), frames: panicFrames()}
		if returned {
			panicked.of = fmt.Sprintf("%T", value)
			if err != nil {
				panicked.of = fmt.Sprintf("%T", err)
			}
		}
		o = failureOutcome(panicked)
		if !returned {
			// This calls the program's functions: if they panic, o stays.
			defer func() { _ = recover() }()
			o = outcomeOf(ctx, nil, panicked, task.Message, r)
		}
	}()
	value, err = r.wrapped.Handle(ctx, task)
	returned = true
	o = outcomeOf(ctx, value, err, task.Message, r)
	finished = true
}

// outcomeOf converts what a handler returned.
func outcomeOf(ctx context.Context, result any, failed error, m *protocol.Message, r registration) outcome {
	if failed == nil {
		value, err := protocol.EncodeJSON(result)
		if err != nil {
			return failureOutcome(err)
		}
		return outcome{kind: outcomeSuccess, value: value}
	}
	if errors.Is(failed, Ignore) {
		return outcome{kind: outcomeIgnore}
	}
	if reject, ok := asValue[Reject](failed); ok {
		return outcome{kind: outcomeReject, reject: reject}
	}
	if retry, ok := asValue[Retry](failed); ok {
		return retryOutcome(retry, m, r)
	}
	cause := context.Cause(ctx)
	if cause == ErrShutdown {
		return outcome{kind: outcomeInterrupted}
	}
	reason := failed
	if cause == ErrSoftTimeLimit && ErrorIs(ErrSoftTimeLimit, context.DeadlineExceeded, context.Canceled)(failed) {
		reason = &Error{Type: "SoftTimeLimitExceeded", Module: "billiard.exceptions", Args: []any{}, Err: failed}
	}
	if retry, again := r.retries.retry(failed); again {
		return retryOutcome(retry.Because(reason), m, r)
	}
	return failureOutcome(r.classify(reason))
}

// asValue returns the first T or *T in an error's chain.
func asValue[T error](err error) (T, bool) {
	var value T
	if errors.As(err, &value) {
		return value, true
	}
	var pointer *T
	if errors.As(err, any(&pointer)) && pointer != nil {
		return *pointer, true
	}
	return value, false
}

// retryOutcome is a retry, or a failure when none is left. Without a reason the row of
// the state RETRY has no exception, as in Celery, but the traceback of Celery's Retry.
func retryOutcome(retry Retry, m *protocol.Message, r registration) outcome {
	if retry.err != nil {
		return failureOutcome(retry.err)
	}
	retry = retry.complete(r.retries, m.Retries).bind(m, r.positional())
	reason := r.classify(retry.reason)
	if retry.most >= 0 && m.Retries+1 > retry.most {
		if reason == nil {
			reason = &Error{Type: "MaxRetriesExceededError", Module: "celery.exceptions",
				Args: []any{fmt.Sprintf("Can't retry %s[%s] args:%s kwargs:%s", m.Task, m.ID, m.ArgsRepr, m.KwargsRepr)}}
		}
		return failureOutcome(reason)
	}
	o := outcome{kind: outcomeRetry, retry: retry}
	if reason == nil {
		asked := Error{Type: "Retry", Module: "celery.exceptions", Args: []any{retry.Error()}}
		o.failed = failure{traceback: tracebackOf(asked, asked.exception()), err: retry, text: retry.Error()}
		return o
	}
	o.failed = failureOutcome(reason).failed
	return o
}

// hardLimitOutcome returns the failure as Celery stores it: with the limit in
// seconds and without a traceback.
func hardLimitOutcome(limit time.Duration) outcome {
	var seconds any = limit.Seconds()
	if limit%time.Second == 0 {
		seconds = int64(limit / time.Second)
	}
	o := failureOutcome(&Error{Type: "TimeLimitExceeded", Module: "billiard.exceptions", Args: []any{seconds}, Err: ErrTimeLimit})
	o.failed.traceback = ""
	return o
}

func failureOutcome(err error) outcome {
	exception := exceptionOf(err)
	return outcome{kind: outcomeFailure, failed: failure{exception: exception, traceback: tracebackOf(err, exception), err: err, text: err.Error()}}
}

// exceptionOf converts an error to a Python exception.
func exceptionOf(err error) protocol.Exception {
	if typed, ok := asValue[Error](err); ok {
		return typed.exception()
	}
	var known interface{ Exception() protocol.Exception }
	if errors.As(err, &known) {
		return known.Exception()
	}
	return protocol.NewException("builtins", "RuntimeError", cleanText(err.Error()))
}

func (e Error) exception() protocol.Exception {
	exception := protocol.Exception{Type: e.Type, Module: e.Module, Args: []json.RawMessage{}}
	if exception.Type == "" {
		exception.Type = "RuntimeError"
	}
	if exception.Module == "" {
		exception.Module = "builtins"
	}
	args := e.Args
	if args == nil && e.Err != nil {
		args = []any{e.Err.Error()}
	}
	for _, arg := range args {
		text, err := protocol.EncodeJSON(arg)
		if err != nil {
			// Celery stores the repr of an argument that it cannot encode.
			text, _ = protocol.EncodeJSON(cleanText(fmt.Sprintf("%+v", arg)))
		}
		exception.Args = append(exception.Args, text)
	}
	return exception
}

func tracebackOf(err error, exception protocol.Exception) string {
	if typed, ok := asValue[Error](err); ok && typed.Traceback != "" {
		return cleanText(typed.Traceback)
	}
	var frames []protocol.Frame
	var panicked *panicError
	if errors.As(err, &panicked) {
		frames = panicked.frames
	}
	return cleanText(protocol.Traceback(exception, frames...))
}

// cleanText replaces what PostgreSQL does not accept in text: invalid UTF-8 and
// NUL.
func cleanText(text string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(text, "\uFFFD"), "\x00", `\x00`)
}

// panicError is a panic of a handler or of a method of what it returned.
type panicError struct {
	value  any
	frames []protocol.Frame
	// of is the type of what the handler returned, or "" if the handler itself
	// panicked.
	of string
}

func (e *panicError) Error() string {
	switch {
	case e.value == nil && e.of == "":
		return "handler ended its goroutine without returning"
	case e.value == nil:
		return fmt.Sprintf("a method of the %s that the handler returned ended its goroutine", e.of)
	case e.of != "":
		return fmt.Sprintf("panic in a method of the %s that the handler returned: %v", e.of, e.value)
	}
	return fmt.Sprintf("panic: %v", e.value)
}

// panicFrames returns the stack of a panic without the frames of the runtime and
// of this package, in Python's order: most recent call last.
func panicFrames() []protocol.Frame {
	pcs := make([]uintptr, 64)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(1, pcs)])
	var kept []protocol.Frame
	for {
		f, more := frames.Next()
		if strings.HasSuffix(f.Function, ".callHandler") {
			break
		}
		switch {
		case f.Function == "runtime.gopanic", f.Function == "runtime.Goexit":
			kept = nil
		case !strings.HasPrefix(f.Function, "runtime."):
			kept = append(kept, protocol.Frame{File: f.File, Line: f.Line, Function: f.Function[strings.LastIndex(f.Function, "/")+1:]})
		}
		if !more {
			break
		}
	}
	slices.Reverse(kept)
	return kept
}

// goStack returns the stack of a panic of this package, for the log.
func goStack() string {
	var lines []string
	for _, f := range panicFrames() {
		lines = append(lines, fmt.Sprintf("%s %s:%d", f.Function, f.File, f.Line))
	}
	return strings.Join(lines, "\n")
}

// taskLog returns a logger with the keys that every log line about a task has.
func (w *Worker) taskLog(m *protocol.Message) *slog.Logger {
	return w.cfg.Logger.With("task_id", clip(m.ID), "task", clip(m.Task), "root_id", clip(m.RootID))
}

// clip shortens text from producers, so that it cannot flood the log.
func clip(text string) string {
	const most = 200
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most], "") + "..."
}
