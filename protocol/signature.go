package protocol

import (
	"bytes"
	"encoding/json"
	"errors"
	"time"
)

// Signature is a task with its arguments and options, to be applied later
// (docs/celery.md#signatures). [ParseSignature] and [NewSignature] make one,
// and [Signature.WithOptions] makes a changed copy. A signature keeps the text
// that it was parsed from and writes it back unchanged. Callers may read the
// fields but not change them.
type Signature struct {
	raw                json.RawMessage
	rawArgs, rawKwargs json.RawMessage

	// Task is the name of the task.
	Task string
	// Args and Kwargs are the arguments, Options the options of apply_async, all
	// as JSON text.
	Args    []json.RawMessage
	Kwargs  Object
	Options Object
	// SubtaskType is "chain", "group" or the like for a canvas, otherwise "".
	SubtaskType string
	// Immutable says that the result of the preceding task is not passed to
	// this one.
	Immutable bool
}

// Destination is the routing that a signature's own options ask for. An empty
// field leaves the choice to the worker's routes (docs/celery.md#routing).
type Destination struct {
	Queue      string
	Exchange   string
	RoutingKey string
}

// ApplyOptions are the call options of [Signature.Apply]
// (docs/celery.md#applying-a-signature).
type ApplyOptions struct {
	// Args are the results of the parent task. They are prepended to the
	// signature's own arguments, unless the signature is immutable.
	Args []json.RawMessage
	// ParentID and RootID are the parent and root of the new task. An empty
	// RootID stands for the new task's own id.
	ParentID string
	RootID   string
	// Chain holds the later steps of the chain, the next step last. An empty
	// slice marks the last step of a chain; nil means that there is no chain.
	Chain []Signature
	// Group and GroupIndex make the task a member of a group, unless the
	// signature names a group of its own.
	Group      string
	GroupIndex *int
	// ReplyTo and Origin are the worker's own, used where the signature has
	// none.
	ReplyTo string
	Origin  string
	// Priority is used where the signature has none.
	Priority *uint8
	// NewID makes the task id where the signature has none. Defaults to random
	// UUIDs (version 4).
	NewID func() string
	// Now is the time from which countdown and expires count. Defaults to the
	// current time.
	Now time.Time
	// Prepare, if not nil, gets the arguments of the message, those of Args
	// included, and may change them and add headers: as a task class in Python
	// that overrides apply_async. A header that the signature has stays.
	Prepare func(s Signature, args []json.RawMessage) (Prepared, error)
}

// Prepared is what [ApplyOptions.Prepare] makes of a message.
type Prepared struct {
	// Args are the arguments.
	Args []json.RawMessage
	// Headers are added to those of the message.
	Headers map[string]string
	// Queue is where the message goes if its signature has no destination of its
	// own. Empty means that the worker's routes decide.
	Queue string
}

// ParseSignature parses the JSON object of a signature
// (docs/celery.md#signatures). args, kwargs and options may be missing or null.
// The signature shares memory with text. The error is a [*MalformedError] with
// [ReasonShape].
func ParseSignature(text json.RawMessage) (Signature, error) {
	if err := checkJSON(text); err != nil {
		return Signature{}, &MalformedError{Reason: ReasonShape, Detail: err.Error()}
	}
	return parseSignature(text)
}

// parseSignature parses a text whose syntax the caller has checked.
func parseSignature(text json.RawMessage) (Signature, error) {
	text = bytes.Trim(text, " \t\r\n")
	s := Signature{raw: text, rawArgs: json.RawMessage("[]"), rawKwargs: json.RawMessage("{}")}
	fail := func(detail string) (Signature, error) {
		return Signature{}, &MalformedError{Reason: ReasonShape, Task: s.Task, Detail: detail}
	}
	o, err := members(text)
	if err != nil {
		return fail("a signature is not an object")
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
			return fail("args of signature " + quote(s.Task) + " is not an array")
		}
	}
	if kwargs := o.Get("kwargs"); kwargs != nil {
		s.rawKwargs = kwargs
		if s.Kwargs, err = members(kwargs); err != nil {
			return fail("kwargs of signature " + quote(s.Task) + " is not an object")
		}
	}
	if options := o.Get("options"); options != nil {
		if s.Options, err = members(options); err != nil {
			return fail("options of signature " + quote(s.Task) + " is not an object")
		}
	}
	return s, nil
}

// parseSignatures parses an array of signatures, or a single signature.
func parseSignatures(text json.RawMessage) ([]Signature, error) {
	if kindOf(text) == kindObject {
		s, err := parseSignature(text)
		return []Signature{s}, err
	}
	items, err := elements(text)
	if err != nil {
		return nil, &MalformedError{Reason: ReasonShape, Detail: "it is not an array of signatures"}
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

// detailOf returns the Detail of a *MalformedError.
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

// NewSignature returns a signature that is not immutable. Nil args and kwargs
// are empty. All values must be JSON text, such as [EncodeJSON] makes; they are
// not checked.
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

// Text returns the JSON text of the signature, unchanged since it was parsed.
func (s Signature) Text() json.RawMessage { return s.raw }

// MarshalJSON returns the same as Text, or null for the zero Signature.
func (s Signature) MarshalJSON() ([]byte, error) {
	if s.raw == nil {
		return []byte("null"), nil
	}
	return s.raw, nil
}

// Option returns the JSON text of an option, or nil when it is absent or null.
func (s Signature) Option(name string) json.RawMessage { return s.Options.Get(name) }

// TaskID returns the preset id, or "" if each [Signature.Apply] makes a new
// one.
func (s Signature) TaskID() string { return textOf(s.Option("task_id")) }

// Destination returns the routing that the signature's own options ask for.
func (s Signature) Destination() Destination {
	return Destination{
		Queue:      textOf(s.Option("queue")),
		Exchange:   textOf(s.Option("exchange")),
		RoutingKey: textOf(s.Option("routing_key")),
	}
}

// WithOptions returns a copy in which the given options are set. All other
// text and the order of the members stay unchanged; new options are appended.
// The error is a [*MalformedError]: a value is not JSON.
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
