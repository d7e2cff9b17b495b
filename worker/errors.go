package worker

import (
	"errors"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// Causes with which the worker ends a handler's context (see [context.Cause]).
var (
	// ErrSoftTimeLimit is the cause at the soft time limit, and ctx.Err is then
	// context.DeadlineExceeded. A handler that returns one of these errors, or
	// context.Canceled, fails as SoftTimeLimitExceeded.
	ErrSoftTimeLimit = errors.New("soft time limit exceeded")
	// ErrTimeLimit is the cause at the hard time limit. The task fails as
	// TimeLimitExceeded when the handler then returns an error, or does not
	// return within Config.HardLimitGrace.
	ErrTimeLimit = errors.New("hard time limit exceeded")
	// ErrShutdown is the cause when the worker stops and waits for running tasks
	// no longer. If the handler then returns an error, the worker stores no
	// result and requeues the message.
	ErrShutdown = errors.New("worker is shutting down")
)

// Errors of Run, Inspect and Publish. Compare with [errors.Is].
var (
	// ErrUnreachable: no broker answered (connection refused, no such host,
	// timeout), or the connection was lost. A retry may succeed.
	ErrUnreachable = broker.ErrUnreachable
	// ErrCredentials: the broker refused the user name or the password.
	ErrCredentials = broker.ErrCredentials
	// ErrVhost: the virtual host does not exist, or the user has no permissions
	// for it.
	ErrVhost = broker.ErrVhost
	// ErrMismatch: a queue or exchange exists with other properties than the
	// configured ones, or a queue that the worker does not declare is missing.
	ErrMismatch = broker.ErrMismatch
	// ErrPermission: the user lacks the permission to declare, consume or
	// publish.
	ErrPermission = broker.ErrPermission
	// ErrUnroutable: the broker refused a message because no queue would receive
	// it.
	ErrUnroutable = broker.ErrUnroutable
)

type (
	// ConnectError is the reason why the worker cannot connect to a broker, with
	// what the operator can do. It matches its Kind (ErrUnreachable, ErrCredentials
	// or ErrVhost) with errors.Is. With several brokers the errors of all are
	// joined. See [broker.ConnectError] for its fields.
	ConnectError = broker.ConnectError
	// MismatchError says that a queue or an exchange exists with other properties
	// than the configured ones, or that a queue does not exist which the worker does
	// not declare. It says which property differs, and what the operator can do. It
	// matches [ErrMismatch] with errors.Is. See [broker.MismatchError] for its
	// fields.
	MismatchError = broker.MismatchError
)

// Ignore is returned by a handler to end the task without an outcome: the worker
// acknowledges the message, stores no result and publishes no follow-up.
//
//lint:ignore ST1012 the name is Celery's, and it is an outcome rather than an error
var Ignore = errors.New("ignore this task")

// Error is a failure with the exception class that Python sees. AsyncResult.get
// raises the class if the reading program has imported its module, and calls it
// with the arguments. Otherwise it raises a class of the same name that Celery
// makes in celery.exceptions (docs/celery.md#states-and-exceptions).
type Error struct {
	// Type is the name of the class. Defaults to "RuntimeError".
	Type string
	// Module is the module of the class. Defaults to "builtins".
	Module string
	// Args are the arguments of the exception. Defaults to the text of Err, if
	// there is one.
	Args []any
	// Traceback is the text of AsyncResult.traceback. Defaults to type and
	// message in Python's form.
	Traceback string
	// Err is the underlying Go error, for logs and errors.Is.
	Err error

	wrongArguments bool // of the task: a retry is of no use
}

// Error is the last line of a Python traceback: "Type: message".
func (e Error) Error() string {
	exception := e.exception()
	if text := exception.Text(); text != "" {
		return exception.Type + ": " + text
	}
	return exception.Type
}

func (e Error) Unwrap() error { return e.Err }

// Reject is returned by a handler to return the message to the broker.
type Reject struct {
	// Requeue returns the message to its queue: the worker stores no result and
	// publishes nothing. Without it the message goes to the queue's dead-letter
	// exchange, if there is one, and the task fails with the class Reject; its
	// error callbacks are published.
	Requeue bool
	// After is a pause before the message is requeued. Meanwhile this worker
	// keeps the message, but it occupies no slot. A shutdown ends the pause.
	After time.Duration
	// Reason is written to the log, and is the text of the exception when the
	// task fails.
	Reason string
}

func (r Reject) Error() string {
	text := "reject without requeue"
	if r.Requeue {
		text = "reject with requeue"
	}
	if r.Reason != "" {
		text += ": " + r.Reason
	}
	return text
}
