package protocol

import (
	"encoding/json"
	"time"
)

// States of a task as Celery names them (docs/celery.md#states-and-exceptions).
const (
	StatePending = "PENDING"
	StateStarted = "STARTED"
	StateRetry   = "RETRY"
	StateSuccess = "SUCCESS"
	StateFailure = "FAILURE"
	StateRevoked = "REVOKED"
)

// Result is what a worker tells a result backend about a task: Celery's
// "meta" (docs/celery.md#states-and-exceptions). One of Value and Exception is
// set, or neither for None.
type Result struct {
	TaskID string
	// State is one of the constants above or any word of the application.
	State string
	// Value is the return value (or the custom state's info) in Python's
	// JSON; nil means None.
	Value json.RawMessage
	// Exception is set in the states RETRY, FAILURE and REVOKED.
	Exception *Exception
	// Traceback is text as Python prints it, or "" for none.
	Traceback string

	// Task, Args, Kwargs, Worker, Queue and Retries are the columns of
	// result_extended. HasRequest tells a request without these (empty
	// columns) from no request at all (NULL columns).
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

	// Children lists what was sent, in Celery's nested form, or nil.
	Children json.RawMessage
	// Stamps is Celery 5.7's {"stamped_headers", "stamps"}, or nil.
	Stamps json.RawMessage
	// DateDone is zero for states that are not ready.
	DateDone time.Time
}

// Exception is an error as Celery stores it: the three keys exc_type,
// exc_message and exc_module (docs/celery.md#states-and-exceptions).
type Exception struct {
	Type string
	// Module is "builtins" for Python's own.
	Module string
	// Args are the arguments of the exception in Python's JSON.
	Args []json.RawMessage
}
