package worker

import (
	"errors"
	"fmt"
	"time"
)

// What ends a handler's context before its time: the cause of the context.
var (
	// ErrSoftTimeLimit is the cause at the soft time limit. A handler that
	// returns because of it fails as SoftTimeLimitExceeded.
	ErrSoftTimeLimit = errors.New("soft time limit exceeded")
	// ErrTimeLimit is the cause at the hard time limit. A handler that returns
	// with an error then fails as TimeLimitExceeded; one that does not return
	// within Config.HardLimitGrace is waited for no longer and fails so too.
	ErrTimeLimit = errors.New("hard time limit exceeded")
	// ErrShutdown is the cause when the worker stops without waiting longer.
	// Whatever the handler then returns with it, the message goes back to the
	// broker and no result is stored.
	ErrShutdown = errors.New("worker is shutting down")
)

// Why Run or a reconnection failed: compare with errors.Is.
var (
	// ErrUnreachable: no broker answered (refused, no such host, timeout).
	// Waiting may help.
	ErrUnreachable = errors.New("broker is unreachable")
	// ErrCredentials: the broker refused user or password.
	ErrCredentials = errors.New("broker refused the credentials")
	// ErrVhost: the virtual host does not exist or is closed to this user.
	ErrVhost = errors.New("broker refused the virtual host")
	// ErrMismatch: a queue or exchange exists and was declared otherwise, or
	// does not exist and was only to be found.
	ErrMismatch = errors.New("broker has a different declaration")
	// ErrPermission: the user may not declare, consume or publish.
	ErrPermission = errors.New("broker denied access")
	// ErrUnroutable: a message was refused because no queue would get it.
	ErrUnroutable = errors.New("no queue receives this message")
)

// Ignore is returned by a handler whose task must leave no trace: the message
// is acknowledged, nothing is stored, and nothing follows.
//
//lint:ignore ST1012 it is Celery's word, and an outcome more than an error
var Ignore = errors.New("ignore this task")

// Error is a failure as Python will see it. The class is looked up there by
// module and name; one that does not exist is made on the fly.
type Error struct {
	// Type is the class. Defaults to "RuntimeError".
	Type string
	// Module of the class. Defaults to "builtins".
	Module string
	// Args of the exception. Defaults to the text of Err, if there is one.
	Args []any
	// Traceback shown by AsyncResult.traceback. Defaults to one that says
	// type and message.
	Traceback string
	// Err is the Go error behind it, for logs and errors.Is.
	Err error
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

// Retry is returned by a handler to run the task again: a message with the
// same id, one more retry and an ETA is published, the row says RETRY, and
// the old message is acknowledged (docs/celery.md#retries).
type Retry struct {
	// After is the pause. Zero means 180 s, Celery's default_retry_delay;
	// negative means none.
	After time.Duration
	// Max is how many retries there may be in all. Zero means 3, Celery's
	// default; negative means no limit. When it is used up, the task fails
	// with Err, or as MaxRetriesExceededError without one.
	Max int
	// Err is the failure that makes it necessary, or nil.
	Err error
	// Queue to publish to. Empty means where the message came from.
	Queue string
}

func (r Retry) Error() string {
	text := "retry in " + r.delay().String()
	if r.Err != nil {
		text += ": " + r.Err.Error()
	}
	return text
}

func (r Retry) Unwrap() error { return r.Err }

func (r Retry) delay() time.Duration {
	switch {
	case r.After == 0:
		return 180 * time.Second
	case r.After < 0:
		return 0
	}
	return r.After
}

// Reject is returned by a handler to give the message back.
type Reject struct {
	// Requeue puts it back into its queue: no result, and nothing follows.
	// Otherwise a dead-letter exchange gets it, if there is one, and the task
	// is FAILURE with the class Reject, its error callbacks included.
	Requeue bool
	// After is a pause before it is put back, in which the message stays with this
	// worker but takes no slot. It is cut short by shutdown.
	After time.Duration
	// Reason for the log.
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

// Permanent marks an error of a [ResultBackend] as one that no retry mends:
// the result can never be written. The engine logs it and goes on.
func Permanent(err error) error {
	if err == nil {
		return nil
	}
	return &permanentError{err}
}

// IsPermanent says whether err was marked by [Permanent].
func IsPermanent(err error) bool {
	var permanent *permanentError
	return errors.As(err, &permanent)
}

type permanentError struct{ err error }

func (e *permanentError) Error() string { return e.err.Error() }
func (e *permanentError) Unwrap() error { return e.err }

// ConnectError says why a broker cannot be used. It is an [ErrUnreachable], an
// [ErrCredentials] or an [ErrVhost]. With several brokers there is one for each,
// joined.
type ConnectError struct {
	// Kind is one of the three.
	Kind error
	// What happened, to which broker.
	What string
	// Err is the cause, or nil.
	Err error
	// Cure is what the operator can do.
	Cure string
}

func (e *ConnectError) Error() string { return e.Problem() + ". " + e.Cure }

// Problem is the error without the cure.
func (e *ConnectError) Problem() string {
	text := e.Kind.Error() + ": " + e.What
	if e.Err != nil {
		text += ": " + e.Err.Error()
	}
	return text
}

// Unwrap returns the kind and the cause.
func (e *ConnectError) Unwrap() []error {
	if e.Err == nil {
		return []error{e.Kind}
	}
	return []error{e.Kind, e.Err}
}

// MismatchError says that a queue or an exchange exists in another shape than
// the one configured. It is an [ErrMismatch].
type MismatchError struct {
	// What is "queue" or "exchange"; Name its name.
	What, Name string
	// Argument is the argument or property that differs, and Current its
	// value at the broker, as far as the broker tells; "" otherwise.
	Argument, Current string
	// Exists describes what the broker has, Want what we would declare.
	Exists, Want string
	// Cure is what the operator can do.
	Cure string
	// Broker is the broker's own text.
	Broker string
}

func (e *MismatchError) Error() string {
	return fmt.Sprintf("%s %q exists %s, we would declare %s. %s (RabbitMQ: %s)", e.What, e.Name, e.Exists, e.Want, e.Cure, e.Broker)
}

// Is makes a MismatchError an ErrMismatch.
func (e *MismatchError) Is(target error) bool { return target == ErrMismatch }
