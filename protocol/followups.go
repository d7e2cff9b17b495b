package protocol

import (
	"encoding/json"
	"time"
)

// Sender is the worker that publishes follow-ups.
type Sender struct {
	// ReplyTo is the worker's own reply address, for signatures without one.
	ReplyTo string
	// Origin is "gen<pid>@<host>".
	Origin string
	// NewID makes task and group ids; nil makes UUIDs of version 4.
	NewID func() string
	// Now is the moment from which countdown and expires count.
	Now time.Time
	// InheritPriority gives the next chain step the priority of its
	// predecessor (Celery's task_inherit_parent_priority).
	InheritPriority bool
}

// FollowUp is a message to send and what its signature says of the way.
// The worker's routes fill Exchange and RoutingKey of the Publishing.
type FollowUp struct {
	Publishing  Publishing
	Destination Destination
}

// Plan is what follows the outcome of a task, in the order of publishing.
type Plan struct {
	FollowUps []FollowUp
	// Children is for Result.Children; nil when nothing follows.
	Children json.RawMessage
}

// AfterSuccess lists callbacks and the next chain step of a task that
// returned value; nil is None (contract 4.3). It changes nothing and may be
// called again, but callbacks without a preset id get a new one each time.
// The error is a *CanvasError or a *MalformedError.
func AfterSuccess(m *Message, value json.RawMessage, s Sender) (Plan, error) {
	return planSuccess(m, value, s)
}

// AfterFailure lists the error callbacks of a task, as one ad-hoc group
// (contract 4.5).
func AfterFailure(m *Message, s Sender) (Plan, error) { return planFailure(m, s) }

// LaterStep is a chain step that will never run because an earlier one has
// failed. Its row is FAILURE with the failed task's exception and traceback,
// worker and queue NULL and retries 0 (contract 4.4).
type LaterStep struct {
	TaskID string
	Task   string
	Args   json.RawMessage
	Kwargs json.RawMessage
}

// LaterSteps lists the steps behind m in the order in which Celery stores
// them: the last one first. Steps without a preset id are left out, and so is
// the step id m itself.
func LaterSteps(m *Message) []LaterStep { return laterSteps(m) }
