package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// outcome is how a task ended. Nothing of it is published or stored yet.
type outcome struct {
	kind        string          // one of the outcome constants
	value       json.RawMessage // of a success
	failed      failure         // of a failure, or the reason of a retry
	retry       Retry
	reject      Reject
	replacement protocol.Signature
	duration    time.Duration // how long the handler ran
	timedOut    bool          // at the hard time limit
	// startedTooOften says that the handler was not called: see MaxStarts.
	startedTooOften bool
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
	if replacement, ok := asValue[replacement](failed); ok {
		return replaceOutcome(replacement)
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
	o.failed.traceback, o.timedOut = "", true
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
		if strings.HasSuffix(f.Function, "worker.(*handlerCall).run") {
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
