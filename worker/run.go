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

// outcome is how a task ended, before anything is told to anybody.
type outcome struct {
	kind string // one of the outcome constants
	// value is set for a success, failed for a failure and for the reason of
	// a retry.
	value  json.RawMessage
	failed failure
	retry  Retry
	reject Reject
	took   time.Duration
}

// failure is an error as it is stored.
type failure struct {
	exception protocol.Exception
	traceback string
	err       error
}

// slot is the right of one delivery to run a task. It is left once: at the
// end, before a pause, or when an abandoned handler returns at last.
type slot struct {
	worker *Worker
	left   bool
}

func (s *slot) leave() {
	if s.left {
		return
	}
	s.left = true
	s.worker.metrics.running.Dec()
	<-s.worker.slots
}

// leaveWhen keeps the slot taken until the handler returns.
func (s *slot) leaveWhen(returned <-chan returned) {
	s.left = true
	w := s.worker
	w.abandoned.Add(1)
	w.metrics.abandoned.Inc()
	go func() {
		<-returned
		w.abandoned.Add(-1)
		w.metrics.abandoned.Dec()
		w.metrics.running.Dec()
		<-w.slots
	}()
}

// execute runs a task whose slot is taken, and settles it. A panic in the
// engine itself is the message's fault, as far as one can know: it is
// rejected, and so are its repeated deliveries.
func (w *Worker) execute(e *execution, m *protocol.Message, r registration, d *delivery, slot *slot) {
	defer func() {
		if p := recover(); p != nil {
			for _, d := range w.running.end(e, verdictReject) {
				d.settle(verdictReject)
			}
			w.messagePanicked(p)
		}
	}()
	faultpoint.Hit(faultpoint.TaskStarting, m.ID, m.ArgsRepr)
	o := w.run(e, m, r, d, slot)
	d.activity.Progress("recording how its task ended")
	faultpoint.Hit(faultpoint.TaskReturned, m.ID, m.ArgsRepr)
	w.settle(e, m, r, o, slot)
}

// run finds out how a task ends.
func (w *Worker) run(e *execution, m *protocol.Message, r registration, d *delivery, slot *slot) outcome {
	if err := w.canFollow(m); err != nil {
		return failureOutcome(err)
	}
	ignored := w.ignoresResult(m, r)
	if w.cfg.TrackStarted && !ignored {
		w.storeStarted(m)
	}
	task := &Task{Message: m, Node: w.cfg.Node, Queue: d.sub.queue.Name, Delivery: d.wire,
		held:   func(ctx context.Context) error { return w.stillUnacked(ctx, e) },
		others: func(ctx context.Context) (int, error) { return w.otherConsumers(ctx, d.sub.queue.Name) }}
	var ended atomic.Bool
	defer ended.Store(true)
	if !ignored {
		task.update = func(ctx context.Context, state string, meta json.RawMessage) error {
			if ended.Load() {
				return fmt.Errorf("task %s has ended: its state cannot be %s any more", m.ID, state)
			}
			row := w.row(m, state)
			row.Value = meta
			return w.storeOnce(ctx, row)
		}
	}
	began := w.cfg.Now()
	// How long a handler takes is its own affair.
	over := d.activity.Wait()
	o := runBody(w.life.work, task, w.handlerOf(r), w.timeLimit(m, r), w.cfg.HardLimitGrace, w.life.abandon.Done(), slot.leaveWhen)
	over()
	o.took = w.cfg.Now().Sub(began)
	return o
}

// Outcome is how a task ended, as RunTask tells it.
type Outcome struct {
	// State is SUCCESS, FAILURE or RETRY, or "" when the handler rejected or
	// ignored the task.
	State string
	// Value is the encoded result of a success.
	Value json.RawMessage
	// Exception and Traceback are those of a failure or a retry.
	Exception *protocol.Exception
	Traceback string
	// Err is the error that the handler returned, if any.
	Err error
	// Retry and Reject are set when the handler asked for it.
	Retry  *Retry
	Reject *Reject
}

// RunTask runs the handler of a message, with middleware and time limits, and
// says how it ended. Nothing is published, stored or acknowledged: it is for
// tests, and needs no Run. The error says that there is no such task.
func (w *Worker) RunTask(ctx context.Context, m *protocol.Message) (Outcome, error) {
	r, known := w.registry[m.Task]
	if !known {
		return Outcome{}, fmt.Errorf("task %q is not registered", m.Task)
	}
	task := &Task{Message: m, Node: w.cfg.Node, Queue: m.RoutingKey}
	o := runBody(ctx, task, w.handlerOf(r), w.timeLimit(m, r), w.cfg.HardLimitGrace, nil, func(<-chan returned) {})
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
		result.Exception, result.Traceback = &o.failed.exception, o.failed.traceback
	}
	return result, nil
}

// canFollow refuses a task before its body runs when what follows it could
// never be published: a chord, or a signature that no message can be made of
// (docs/celery.md#groups-and-chords).
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
	_, err = w.address(slices.Concat(success.FollowUps, failed.FollowUps))
	return err
}

// timeLimit is the message's, else the task's, else the worker's, for each of
// the two by itself (docs/celery.md#time-limits).
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

// returned is what came out of a handler.
type returned struct {
	value any
	err   error
}

// runBody calls the handler under its limits. The handler has a goroutine of
// its own, because one that ignores its context must not hold up the rest:
// some time after the hard limit, and when abandon closes, it is given to
// leave.
//
// At the hard limit the handler has a grace to return. What follows a failure
// may rely on what the handler does at its end, as a rollback does on a step
// that is recorded as failed: told before, it would come too early.
func runBody(work context.Context, task *Task, handler Handler, limit protocol.TimeLimit, grace time.Duration, abandon <-chan struct{}, leave func(<-chan returned)) outcome {
	ctx, cancel := context.WithCancelCause(ContextWithTask(work, task))
	defer cancel(nil)
	if limit.Soft > 0 {
		soft := time.AfterFunc(limit.Soft, func() { cancel(ErrSoftTimeLimit) })
		defer soft.Stop()
	}
	var hard, late <-chan time.Time
	if limit.Hard > 0 {
		timer := time.NewTimer(limit.Hard)
		defer timer.Stop()
		hard = timer.C
	}
	done := make(chan returned, 1)
	go callHandler(ctx, task, handler, done)
	for {
		select {
		case r := <-done:
			o := outcomeOf(ctx, r, task.Message)
			if late != nil && (o.kind == outcomeFailure || o.kind == outcomeRetry) {
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
			leave(done)
			return hardLimitOutcome(limit.Hard)
		case <-abandon:
			leave(done)
			return outcome{kind: outcomeInterrupted}
		}
	}
}

func callHandler(ctx context.Context, task *Task, handler Handler, done chan<- returned) {
	finished := false
	var r returned
	defer func() {
		if !finished {
			r = returned{err: &panicError{value: recover(), frames: panicFrames()}}
		}
		done <- r
	}()
	r.value, r.err = handler.Handle(ctx, task)
	finished = true
}

// outcomeOf reads what a handler returned.
func outcomeOf(ctx context.Context, r returned, m *protocol.Message) outcome {
	if r.err == nil {
		value, err := protocol.EncodeJSON(r.value)
		if err != nil {
			return failureOutcome(err)
		}
		return outcome{kind: outcomeSuccess, value: value}
	}
	if errors.Is(r.err, Ignore) {
		return outcome{kind: outcomeIgnore}
	}
	if reject, ok := asValue[Reject](r.err); ok {
		return outcome{kind: outcomeReject, reject: reject}
	}
	if retry, ok := asValue[Retry](r.err); ok {
		return retryOutcome(retry, m)
	}
	cause := context.Cause(ctx)
	switch {
	case cause == ErrShutdown:
		return outcome{kind: outcomeInterrupted}
	case cause == ErrSoftTimeLimit && (errors.Is(r.err, ErrSoftTimeLimit) || errors.Is(r.err, context.Canceled)):
		return failureOutcome(&Error{Type: "SoftTimeLimitExceeded", Module: "billiard.exceptions", Args: []any{}, Err: r.err})
	}
	return failureOutcome(r.err)
}

// asValue finds a T or a *T in an error's chain.
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

func retryOutcome(retry Retry, m *protocol.Message) outcome {
	most := retry.Max
	if most == 0 {
		most = 3
	}
	reason := retry.Err
	if most > 0 && m.Retries+1 > most {
		if reason == nil {
			reason = &Error{Type: "MaxRetriesExceededError", Module: "celery.exceptions",
				Args: []any{fmt.Sprintf("Can't retry %s[%s] args:%s kwargs:%s", m.Task, m.ID, m.ArgsRepr, m.KwargsRepr)}}
		}
		return failureOutcome(reason)
	}
	if reason == nil {
		reason = &Error{Type: "Retry", Module: "celery.exceptions", Args: []any{retry.Error()}}
	}
	o := failureOutcome(reason)
	o.kind, o.retry = outcomeRetry, retry
	return o
}

// hardLimitOutcome is Celery's, which has the limit in seconds and no traceback.
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
	return outcome{kind: outcomeFailure, failed: failure{exception: exception, traceback: tracebackOf(err, exception), err: err}}
}

// exceptionOf is an error as Python will know it.
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
			// Celery stores the repr of what cannot be encoded.
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

// cleanText makes text that PostgreSQL takes.
func cleanText(text string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(text, "\uFFFD"), "\x00", `\x00`)
}

// panicError is a handler's panic.
type panicError struct {
	value  any
	frames []protocol.Frame
}

func (e *panicError) Error() string {
	if e.value == nil {
		return "handler ended its goroutine without returning"
	}
	return fmt.Sprintf("panic: %v", e.value)
}

// panicFrames is the stack of a panic without Go's own part and ours, in
// Python's order: most recent call last.
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

// goStack is the stack of a panic of our own, for the log.
func goStack() string {
	var lines []string
	for _, f := range panicFrames() {
		lines = append(lines, fmt.Sprintf("%s %s:%d", f.Function, f.File, f.Line))
	}
	return strings.Join(lines, "\n")
}

// taskLog has the fixed keys of everything that is logged of a task.
func (w *Worker) taskLog(m *protocol.Message) *slog.Logger {
	return w.cfg.Logger.With("task_id", clip(m.ID), "task", clip(m.Task), "root_id", clip(m.RootID))
}

// clip keeps what strangers send from filling a log.
func clip(text string) string {
	const most = 200
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most], "") + "..."
}
