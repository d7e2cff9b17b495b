package client

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Signature is a task with arguments and options, or a chain or a group of them, that
// can be sent: Python's signature. It is a value: its methods return a changed copy
// and leave it as it is, so that it may be sent many times and by many goroutines.
type Signature struct {
	kind      kind
	task      string
	args      []json.RawMessage
	kwargs    protocol.Object
	parts     []Signature // of a chain or a group
	options   options
	immutable bool
	err       error // an argument that cannot be encoded; told by Send
}

type kind int

const (
	kindTask kind = iota
	kindChain
	kindGroup
)

// Task returns the signature of a task with positional arguments: Python's
// task.s(*args). The arguments are encoded as [protocol.EncodeJSON] does: a struct
// becomes a dictionary, a time.Time a datetime, a *big.Int an int of any size. In a
// chain, the result of the preceding task is put in front of them.
func Task(name string, args ...any) Signature {
	s := Signature{task: name, args: []json.RawMessage{}}
	for i, arg := range args {
		text, err := protocol.EncodeJSON(arg)
		if err != nil {
			s.fail(fmt.Errorf("argument %d of task %s: %w", i+1, name, err))
		}
		s.args = append(s.args, text)
	}
	return s
}

// Chain returns tasks that run one after the other, each with the result of the one
// before: Python's chain. A group may only be the last. Options given to Send reach
// the first task, as in Python, with these exceptions: TaskID and Link are for the
// last task, LinkError is for every task.
func Chain(tasks ...Signature) Signature {
	s := Signature{kind: kindChain, task: "celery.chain", parts: slices.Clone(tasks)}
	for _, part := range tasks {
		s.fail(part.problem())
	}
	if len(tasks) == 0 {
		s.err = errors.New("a chain needs at least one task")
	}
	return s
}

// Group returns tasks that run at the same time: Python's group. Its result is the
// list of theirs. Options given to Send reach every task, but TaskID is the id of the
// group. Groups within a group become one.
func Group(tasks ...Signature) Signature {
	s := Chain(tasks...)
	s.kind, s.task = kindGroup, "celery.group"
	if len(tasks) == 0 {
		s.err = errors.New("a group needs at least one task")
	}
	return s
}

// problem is why the signature cannot be sent, or nil.
func (s Signature) problem() error {
	if s.err == nil && s.kind == kindTask && s.task == "" {
		return errors.New("a task needs a name")
	}
	return s.err
}

func (s *Signature) fail(err error) {
	if s.err == nil {
		s.err = err
	}
}

// Kwarg returns a copy with one more keyword argument, or with another value for it.
// A chain has it in its first task, a group in every task.
func (s Signature) Kwarg(name string, value any) Signature {
	if s.kind != kindTask {
		return s.mapParts(func(i int, part Signature) Signature {
			if s.kind == kindGroup || i == 0 {
				return part.Kwarg(name, value)
			}
			return part
		})
	}
	text, err := protocol.EncodeJSON(value)
	if err != nil {
		s.fail(fmt.Errorf("argument %s of task %s: %w", name, s.task, err))
	}
	s.kwargs = set(s.kwargs, name, text)
	return s
}

// Immutable returns a copy that does not get the result of the task before it:
// Python's task.si(*args). Of a chain or a group it makes every task immutable.
func (s Signature) Immutable() Signature {
	if s.kind != kindTask {
		return s.mapParts(func(_ int, part Signature) Signature { return part.Immutable() })
	}
	s.immutable = true
	return s
}

// With returns a copy with options: Python's task.set(...). Link and LinkError add to
// what the signature has, all others replace. Stamp, and LinkError of a group, are
// for each of the tasks.
func (s Signature) With(options ...Option) Signature {
	s.options = s.options.with(options)
	s.fail(s.options.err)
	return s
}

func (s Signature) mapParts(change func(int, Signature) Signature) Signature {
	parts := make([]Signature, len(s.parts))
	for i, part := range s.parts {
		parts[i] = change(i, part)
		s.fail(parts[i].err)
	}
	s.parts = parts
	return s
}

// inherit moves to the parts of a chain or group what is theirs.
func (s Signature) inherit() Signature {
	if s.kind == kindTask {
		return s
	}
	stamps, errbacks := s.options.stamps, s.options.list("link_error")
	options := s.options
	options.stamps = nil
	if s.kind == kindGroup {
		options = options.without("link_error")
	}
	s = s.mapParts(func(_ int, part Signature) Signature {
		for _, stamp := range stamps {
			part.options.stamps = set(part.options.stamps, stamp.Key, stamp.Value)
		}
		if s.kind == kindGroup {
			part.options = part.options.add("link_error", errbacks)
		}
		return part.inherit()
	})
	s.options = options
	return s
}

// set returns a copy of an object with a member set.
func set(o protocol.Object, key string, value json.RawMessage) protocol.Object {
	o = slices.Clone(o)
	for i := range o {
		if o[i].Key == key {
			o[i].Value = value
			return o
		}
	}
	return append(o, protocol.Member{Key: key, Value: value})
}

// MarshalJSON writes the signature as it stands in messages, for instance for
// [worker.Replace]. The error is that of an argument or option that cannot be encoded.
func (s Signature) MarshalJSON() ([]byte, error) {
	if err := s.problem(); err != nil {
		return nil, err
	}
	return s.inherit().text(), nil
}

// text is the signature as Python writes it into messages. Options are as they are:
// without ids, unless the signature was frozen.
func (s Signature) text() json.RawMessage {
	subtask, args, kwargs := json.RawMessage("null"), s.args, s.kwargs
	if s.kind != kindTask {
		subtask, args = encode(map[kind]string{kindChain: "chain", kindGroup: "group"}[s.kind]), nil
		parts := make([]json.RawMessage, len(s.parts))
		for i, part := range s.parts {
			parts[i] = part.text()
		}
		kwargs = protocol.Object{{Key: "tasks", Value: encode(parts)}}
	}
	if args == nil {
		args = []json.RawMessage{}
	}
	return encode(protocol.Object{
		{Key: "task", Value: encode(s.task)},
		{Key: "args", Value: encode(args)},
		{Key: "kwargs", Value: encode(kwargs)},
		{Key: "options", Value: encode(s.options.members())},
		{Key: "subtask_type", Value: subtask},
		{Key: "immutable", Value: encode(s.immutable)},
	})
}

// encode writes a value of which all parts are known to be JSON.
func encode(v any) json.RawMessage {
	if o, ok := v.(protocol.Object); ok && o == nil {
		return json.RawMessage("{}")
	}
	text, err := protocol.EncodeJSON(v)
	if err != nil {
		panic("client: " + err.Error())
	}
	return text
}
