package protocol

import (
	"encoding/json"
	"time"
)

// The states of a task, with Celery's names
// (docs/celery.md#states-and-exceptions). SUCCESS, FAILURE and REVOKED are
// final.
const (
	StatePending = "PENDING"
	StateStarted = "STARTED"
	StateRetry   = "RETRY"
	StateSuccess = "SUCCESS"
	StateFailure = "FAILURE"
	StateRevoked = "REVOKED"
)

// Result is the outcome of a task as a result backend stores it: Celery's
// "meta" (docs/celery.md#states-and-exceptions). At most one of Value and
// Exception is set; neither means that the value is None.
type Result struct {
	TaskID string
	// State is one of the State constants or a state of the application's own.
	State string
	// Value is the return value, or a custom state's info, as JSON text in
	// Python's dialect; nil means None.
	Value json.RawMessage
	// Exception is set in the states RETRY, FAILURE and REVOKED.
	Exception *Exception
	// Traceback is text as [Traceback] makes it, or "" for none.
	Traceback string

	// Task, Args, Kwargs, Worker, Queue and Retries are the columns that
	// Celery's result_extended adds. HasRequest says whether the task's message
	// is known: if so, missing values are stored as empty text, otherwise as
	// NULL.
	HasRequest bool
	Task       string
	Args       json.RawMessage
	Kwargs     json.RawMessage
	// Worker is the node name, or "" for NULL.
	Worker string
	// Queue is the routing key of the delivery, or "" for NULL.
	Queue string
	// Retries is nil for NULL.
	Retries *int

	// Children lists the follow-ups in Celery's nested form, as in
	// [Plan.Children], or is nil.
	Children json.RawMessage
	// Stamps is the object {"stamped_headers", "stamps"} of Celery 5.7, as
	// [StampsJSON] makes it, or nil.
	Stamps json.RawMessage
	// DateDone is the time of the end; zero in a state that is not final.
	DateDone time.Time

	// ReplyTo and CorrelationID are those of the task's message: where a backend
	// that sends outcomes as messages sends this one. They are "" for a task that
	// never ran.
	ReplyTo       string
	CorrelationID string
	// RootID, ParentID and Group are those of the task's message, or "".
	RootID   string
	ParentID string
	Group    string

	// Unreadable is set by a backend that reads: the stored value or exception has
	// no form in JSON, and is left out. It is nil in what a worker stores.
	Unreadable error
}

// Exception is a Python exception as Celery stores it, in the three keys
// exc_type, exc_message and exc_module
// (docs/celery.md#states-and-exceptions).
type Exception struct {
	Type string
	// Module is "builtins" for Python's own exceptions.
	Module string
	// Args are the exception's arguments, each as JSON text in Python's
	// dialect.
	Args []json.RawMessage
}
