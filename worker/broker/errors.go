package broker

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
)

// Errors of connections and calls. Compare with [errors.Is].
var (
	// ErrUnreachable: no broker answered (connection refused, no such host,
	// timeout), or the connection was lost. A retry may succeed.
	ErrUnreachable = errors.New("broker is unreachable")
	// ErrCredentials: the broker refused the user name or the password.
	ErrCredentials = errors.New("broker refused the credentials")
	// ErrVhost: the virtual host does not exist, or the user has no permissions
	// for it.
	ErrVhost = errors.New("broker refused the virtual host")
	// ErrMismatch: a queue or exchange exists with other properties than the
	// configured ones, or a queue that the worker does not declare is missing.
	ErrMismatch = errors.New("broker has a different declaration")
	// ErrPermission: the user lacks the permission to declare, consume or
	// publish.
	ErrPermission = errors.New("broker denied access")
	// ErrUnroutable: the broker refused a message because no queue would receive
	// it.
	ErrUnroutable = errors.New("no queue receives this message")
)

// ConnectError is the reason why a connection to a broker was not possible. It
// matches its Kind with errors.Is. With several brokers the errors of all are
// joined.
type ConnectError struct {
	// Kind is ErrUnreachable, ErrCredentials or ErrVhost.
	Kind error
	// What describes what happened, and names the broker.
	What string
	// Err is the cause, or nil.
	Err error
	// Cure is a sentence that says what the operator can do.
	Cure string
}

func (e *ConnectError) Error() string { return e.Problem() + ". " + e.Cure }

// Problem returns the text of the error without Cure.
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

// MismatchError says that a queue or an exchange exists with other properties
// than the configured ones, or that a queue does not exist which the worker does
// not declare: [Queue.Passive] is set, or it is none of the worker's queues.
// It matches [ErrMismatch] with errors.Is.
type MismatchError struct {
	// What is "queue" or "exchange", and Name its name.
	What, Name string
	// Argument is the argument or property that differs, and Current its value
	// at the broker. Both are "" if the broker does not report them.
	Argument, Current string
	// Exists describes what the broker has, "" if it does not exist. Want
	// describes what the worker would declare.
	Exists, Want string
	// Cure is a sentence that says what the operator can do.
	Cure string
	// Broker is the text of the broker's refusal, with the name of the product.
	Broker string
}

func (e *MismatchError) Error() string {
	difference := fmt.Sprintf("exists %s, the worker would declare %s", e.Exists, e.Want)
	if e.Exists == "" {
		difference = "does not exist"
	}
	return fmt.Sprintf("%s %q %s. %s (%s)", e.What, e.Name, difference, e.Cure, e.Broker)
}

// Is reports whether target is ErrMismatch.
func (e *MismatchError) Is(target error) bool { return target == ErrMismatch }

// UnsendableError says that a message can never be sent: a retry is of no use.
type UnsendableError struct {
	// Task and ID are those of the message, Err is the reason.
	Task, ID string
	Err      error
}

func (e *UnsendableError) Error() string {
	return fmt.Sprintf("task %s (id %s) cannot be published: %v", e.Task, e.ID, e.Err)
}

func (e *UnsendableError) Unwrap() error { return e.Err }

// Kind returns a text that is equal for equal failures. The texts of errors are not:
// they may contain the port from which a connection was made. An error of a broker's
// package that has a method Kind() string says it itself.
func Kind(err error) string {
	switch e := err.(type) {
	case nil:
		return ""
	case interface{ Kind() string }:
		return e.Kind()
	case *MismatchError:
		return e.Error()
	case *ConnectError:
		return e.Kind.Error() + e.What + Kind(e.Err)
	case syscall.Errno:
		return e.Error()
	case interface{ Unwrap() []error }:
		var kinds []string
		for _, cause := range e.Unwrap() {
			kinds = append(kinds, Kind(cause))
		}
		return strings.Join(kinds, ";")
	case interface{ Unwrap() error }:
		if cause := e.Unwrap(); cause != nil {
			return Kind(cause)
		}
	}
	return fmt.Sprintf("%T", err)
}
