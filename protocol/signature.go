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
