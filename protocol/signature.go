package protocol

import (
	"bytes"
	"encoding/json"
	"errors"
	"time"
)

// Signature is a task with its arguments and options, to be applied later
// (docs/celery.md#signatures). The text it came from is kept and written back
// unchanged. Make one by [ParseSignature] or [NewSignature], and change it by
// [Signature.WithOptions]; its fields are for reading.
type Signature struct {
	raw                json.RawMessage
	rawArgs, rawKwargs json.RawMessage

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
// the worker's routes decide the rest (docs/celery.md#routing).
type Destination struct {
	Queue      string
	Exchange   string
	RoutingKey string
}

// ApplyOptions are the call options with which a worker applies a signature
// (docs/celery.md#applying-a-signature).
type ApplyOptions struct {
	// Args of the parent, prepended unless the signature is immutable.
	Args []json.RawMessage
	// ParentID and RootID are those of the task that applies it; RootID
	// empty means the new task's own id.
	ParentID string
	RootID   string
	// Chain is what remains of the chain behind this signature, the next step
	// last. Empty but not nil is the last step of a chain; nil is no chain.
	Chain []Signature
	// Group and GroupIndex join an ad-hoc group, unless the signature has a
	// group of its own.
	Group      string
	GroupIndex *int
	// ReplyTo and Origin are the worker's own, used where the signature has none.
	ReplyTo string
	Origin  string
	// Priority, if set, is the message's unless the signature has its own.
	Priority *uint8
	// NewID makes the task id when the signature has none; nil makes UUIDs of
	// version 4.
	NewID func() string
	// Now is the moment from which countdown and expires count; zero is now.
	Now time.Time
}

// ParseSignature reads a signature object (docs/celery.md#signatures). The text
// is kept. args, kwargs and options may be missing or null. The error is a
// *MalformedError with ReasonShape.
func ParseSignature(text json.RawMessage) (Signature, error) {
	if err := checkJSON(text); err != nil {
		return Signature{}, &MalformedError{Reason: ReasonShape, Detail: err.Error()}
	}
	return parseSignature(text)
}

// parseSignature reads a text that has been checked.
func parseSignature(text json.RawMessage) (Signature, error) {
	text = bytes.Trim(text, " \t\r\n")
	s := Signature{raw: text, rawArgs: json.RawMessage("[]"), rawKwargs: json.RawMessage("{}")}
	fail := func(detail string) (Signature, error) {
		return Signature{}, &MalformedError{Reason: ReasonShape, Task: s.Task, Detail: detail}
	}
	o, err := members(text)
	if err != nil {
		return fail("a signature is no object")
	}
	if s.Task = textOf(o.Get("task")); s.Task == "" {
		return fail("a signature has no task")
	}
	s.SubtaskType = textOf(o.Get("subtask_type"))
	s.Immutable = truthy(o.Get("immutable"))
	s.Args, s.Kwargs, s.Options = []json.RawMessage{}, Object{}, Object{}
	if args := o.Get("args"); args != nil {
		s.rawArgs = args
		if s.Args, err = elements(args); err != nil {
			return fail("args of signature " + quote(s.Task) + " is no array")
		}
	}
	if kwargs := o.Get("kwargs"); kwargs != nil {
		s.rawKwargs = kwargs
		if s.Kwargs, err = members(kwargs); err != nil {
			return fail("kwargs of signature " + quote(s.Task) + " is no object")
		}
	}
	if options := o.Get("options"); options != nil {
		if s.Options, err = members(options); err != nil {
			return fail("options of signature " + quote(s.Task) + " is no object")
		}
	}
	return s, nil
}

// parseSignatures reads an array of signatures, or one alone.
func parseSignatures(text json.RawMessage) ([]Signature, error) {
	if kindOf(text) == kindObject {
		s, err := parseSignature(text)
		return []Signature{s}, err
	}
	items, err := elements(text)
	if err != nil {
		return nil, &MalformedError{Reason: ReasonShape, Detail: "no array of signatures"}
	}
	sigs := make([]Signature, 0, len(items))
	for _, item := range items {
		s, err := parseSignature(item)
		if err != nil {
			return nil, err
		}
		sigs = append(sigs, s)
	}
	return sigs, nil
}

// detailOf is the clause in a *MalformedError.
func detailOf(err error) string {
	var e *MalformedError
	if errors.As(err, &e) {
		return e.Detail
	}
	return err.Error()
}

// truthy is Python's bool of a JSON value.
func truthy(text json.RawMessage) bool {
	switch string(bytes.TrimSpace(text)) {
	case "", "null", "false", "0", "-0", "0.0", "-0.0", `""`, "[]", "{}":
		return false
	}
	return true
}

// NewSignature makes a signature of a task, mutable. Nil args and kwargs are
// empty. The texts must be JSON; see [EncodeJSON].
func NewSignature(task string, args []json.RawMessage, kwargs Object, options ...Member) Signature {
	s := Signature{
		Task: task, Args: args, Kwargs: kwargs, Options: options,
		rawArgs: joinArray(args), rawKwargs: joinObject(kwargs),
	}
	s.raw = joinObject(Object{
		{"task", quoteJSON(task)},
		{"args", s.rawArgs},
		{"kwargs", s.rawKwargs},
		{"options", joinObject(options)},
		{"subtask_type", json.RawMessage("null")},
		{"immutable", json.RawMessage("false")},
	})
	return s
}

// Text is the JSON text of the signature, exactly as it came.
func (s Signature) Text() json.RawMessage { return s.raw }

// MarshalJSON returns Text.
func (s Signature) MarshalJSON() ([]byte, error) {
	if s.raw == nil {
		return []byte("null"), nil
	}
	return s.raw, nil
}

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
// last. The error is a *MalformedError when a value is no JSON.
func (s Signature) WithOptions(set ...Member) (Signature, error) {
	options := json.RawMessage("{}")
	if o, err := members(s.raw); err == nil && o.Get("options") != nil {
		options = o.Get("options")
	}
	options, err := setMembers(options, set)
	if err == nil {
		var raw json.RawMessage
		if raw, err = setMembers(s.raw, []Member{{"options", options}}); err == nil {
			return ParseSignature(raw)
		}
	}
	return Signature{}, &MalformedError{Reason: ReasonShape, Task: s.Task, Detail: err.Error()}
}
