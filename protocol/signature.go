package protocol

import (
	"encoding/json"
	"time"
)

// Signature is a task with its arguments and options, to be applied later
// (contract 4.1). The text it came from is kept and written back unchanged.
type Signature struct {
	raw json.RawMessage

	Task string
	// Args, Kwargs and Options keep the text of each value.
	Args    []json.RawMessage
	Kwargs  Object
	Options Object
	// SubtaskType is "" for null.
	SubtaskType string
	Immutable   bool
}

// Destination is what a signature's own options say about where it goes;
// the worker's routes decide the rest (contract 5).
type Destination struct {
	Queue      string
	Exchange   string
	RoutingKey string
}

// ApplyOptions are the call options with which a worker applies a signature
// (contract 4.2).
type ApplyOptions struct {
	// Args of the parent, prepended unless the signature is immutable.
	Args []json.RawMessage
	// ParentID and RootID are those of the task that applies it; RootID
	// empty means the new task's own id.
	ParentID string
	RootID   string
	// Chain is what remains of the chain behind this signature.
	Chain []Signature
	// Group and GroupIndex join an ad-hoc group, unless the signature has a
	// group of its own.
	Group      string
	GroupIndex *int
	// ReplyTo and Origin are the worker's own, used where the signature has none.
	ReplyTo string
	Origin  string
	// NewID makes the task id when the signature has none.
	NewID func() string
	Now   time.Time
}

// ParseSignature reads a signature object (contract 4.1). The text is kept.
// The error is a *MalformedError with ReasonShape.
func ParseSignature(text json.RawMessage) (Signature, error) { return parseSignature(text) }

// NewSignature makes a signature of a task. Nil args and kwargs are empty.
func NewSignature(task string, args []json.RawMessage, kwargs Object, options ...Member) Signature {
	return newSignature(task, args, kwargs, options)
}

// Text is the JSON text of the signature, exactly as it came.
func (s Signature) Text() json.RawMessage { return s.raw }

// MarshalJSON returns Text.
func (s Signature) MarshalJSON() ([]byte, error) { return s.raw, nil }

// Option returns the text of an option, or nil when it is absent or null.
func (s Signature) Option(name string) json.RawMessage { return s.Options.Get(name) }

// TaskID is the preset id, or "" when each application makes a new one.
func (s Signature) TaskID() string { return textOf(s.Option("task_id")) }

// Destination is what the signature's own options say about the way.
func (s Signature) Destination() Destination {
	return Destination{
		Queue:      textOf(s.Option("queue")),
		Exchange:   textOf(s.Option("exchange")),
		RoutingKey: textOf(s.Option("routing_key")),
	}
}

// WithOptions returns a copy whose options are set to the given values. All
// other text, and the order of everything, stays as it was; new options come
// last.
func (s Signature) WithOptions(options ...Member) (Signature, error) { return s.withOptions(options) }
