package client

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Option is an option of apply_async.
type Option func(*options)

// options are the options of a signature, in the order in which they were set, which
// is their order on the wire.
type options struct {
	entries []option
	headers protocol.Object // the value of option headers
	stamps  protocol.Object
	err     error
}

// option has a value or, if it is link or link_error, signatures.
type option struct {
	name       string
	value      json.RawMessage
	signatures []Signature
}

func (o options) with(more []Option) options {
	o.entries = slices.Clone(o.entries)
	for _, set := range more {
		set(&o)
	}
	return o
}

// over returns the options of a call on top of those of a signature.
func (o options) over(own options) options {
	entries := o.entries
	own.entries = slices.Clone(own.entries)
	for _, p := range entries {
		switch {
		case p.signatures != nil:
			own = own.add(p.name, p.signatures)
		case p.name == "headers":
			for _, h := range o.headers {
				own.headers = set(own.headers, h.Key, h.Value)
			}
			own.put(option{name: p.name, value: encode(own.headers)})
		default:
			own.put(p)
		}
	}
	for _, s := range o.stamps {
		own.stamps = set(own.stamps, s.Key, s.Value)
	}
	return own
}

func (o *options) set(name string, value any) {
	text, err := protocol.EncodeJSON(value)
	if err != nil && o.err == nil {
		o.err = fmt.Errorf("option %s: %w", name, err)
	}
	o.put(option{name: name, value: text})
}

func (o *options) put(p option) {
	for i := range o.entries {
		if o.entries[i].name == p.name {
			o.entries[i] = p
			return
		}
	}
	o.entries = append(o.entries, p)
}

// add appends signatures to link or link_error.
func (o options) add(name string, signatures []Signature) options {
	if len(signatures) == 0 {
		return o
	}
	o.entries = slices.Clone(o.entries)
	o.put(option{name: name, signatures: append(slices.Clone(o.list(name)), signatures...)})
	return o
}

// list returns the signatures of link or link_error.
func (o options) list(name string) []Signature {
	for _, p := range o.entries {
		if p.name == name {
			return p.signatures
		}
	}
	return nil
}

// value returns the text of an option, or nil.
func (o options) value(name string) json.RawMessage {
	for _, p := range o.entries {
		if p.name == name {
			return p.value
		}
	}
	return nil
}

func (o options) textOf(name string) string {
	var text string
	if value := o.value(name); value != nil {
		_ = protocol.DecodeJSON(value, &text)
	}
	return text
}

func (o options) without(name string) options {
	o.entries = slices.DeleteFunc(slices.Clone(o.entries), func(p option) bool { return p.name == name })
	return o
}

// members returns the options as they stand in a signature: stamps come before what
// freezing adds.
func (o options) members() protocol.Object {
	var all protocol.Object
	stamped := false
	stamp := func() {
		if len(o.stamps) == 0 || stamped {
			return
		}
		stamped = true
		names := make([]string, len(o.stamps))
		for i, s := range o.stamps {
			names[i] = s.Key
			all = append(all, s)
		}
		all = append(all, protocol.Member{Key: "stamped_headers", Value: encode(names)})
	}
	for _, p := range o.entries {
		if p.name == "task_id" {
			stamp()
		}
		value := p.value
		if p.signatures != nil {
			texts := make([]json.RawMessage, len(p.signatures))
			for i, s := range p.signatures {
				texts[i] = s.text()
			}
			value = encode(texts)
		}
		all = append(all, protocol.Member{Key: p.name, Value: value})
	}
	stamp()
	return all
}

func seconds(d time.Duration) any {
	if d%time.Second == 0 {
		return int64(d / time.Second)
	}
	return d.Seconds()
}

// Queue sends the task to a queue. It takes precedence over routes.
func Queue(name string) Option { return func(o *options) { o.set("queue", name) } }

// Exchange sends the task to an exchange with a routing key, as they are.
func Exchange(name, routingKey string) Option {
	return func(o *options) { o.set("exchange", name); o.set("routing_key", routingKey) }
}

// Countdown delays the task: its worker keeps it until then. In a signature within a
// chain the time counts from when that task is sent.
func Countdown(d time.Duration) Option { return func(o *options) { o.set("countdown", seconds(d)) } }

// ETA is the earliest time at which the task runs. A time in [protocol.Naive] is
// written without a zone, and means UTC.
func ETA(t time.Time) Option { return func(o *options) { o.set("eta", t) } }

// Expires is how long after it was sent the task may begin. Later, its worker stores
// REVOKED, or the broker drops the message.
func Expires(d time.Duration) Option { return func(o *options) { o.set("expires", seconds(d)) } }

// ExpiresAt is the latest time at which the task may begin.
func ExpiresAt(t time.Time) Option { return func(o *options) { o.set("expires", t) } }

// Priority is the priority of the message in its queue. A higher number comes first,
// in queues that were declared with x-max-priority, and in quorum queues from 5 on.
func Priority(n uint8) Option { return func(o *options) { o.set("priority", n) } }

// TimeLimit limits how long the task may run: after soft its worker asks it to stop,
// after hard it ends it. Zero means the worker's own limit.
func TimeLimit(hard, soft time.Duration) Option {
	return func(o *options) {
		if hard != 0 {
			o.set("time_limit", seconds(hard))
		}
		if soft != 0 {
			o.set("soft_time_limit", seconds(soft))
		}
	}
}

// TaskID is the id of the task. The default is random. Sending an id twice is for
// repeating a send whose outcome is not known.
func TaskID(id string) Option { return func(o *options) { o.set("task_id", id) } }

// Shadow is the name that logs and monitors show in place of the task's.
func Shadow(name string) Option { return func(o *options) { o.set("shadow", name) } }

// Header adds a header of the application's own to the message. The value may be nil,
// a bool, a number, text, a list or a map of these.
func Header(name string, value any) Option {
	return func(o *options) {
		text, err := protocol.EncodeJSON(value)
		if err != nil && o.err == nil {
			o.err = fmt.Errorf("header %s: %w", name, err)
			return
		}
		o.headers = set(o.headers, name, text)
		o.set("headers", o.headers)
	}
}

// Stamp stamps the task, or every task of a chain or group: workers pass a stamp on
// with retries, store it with the result, and can revoke by it.
func Stamp(name string, value any) Option {
	return func(o *options) {
		text, err := protocol.EncodeJSON(value)
		if err != nil && o.err == nil {
			o.err = fmt.Errorf("stamp %s: %w", name, err)
			return
		}
		o.stamps = set(o.stamps, name, text)
	}
}

// IgnoreResult makes the worker store no result of the task.
func IgnoreResult() Option { return func(o *options) { o.set("ignore_result", true) } }

// Compress compresses the message with zlib, which Celery also calls gzip.
func Compress() Option { return func(o *options) { o.set("compression", "zlib") } }

// Link sends a task after the success of this one, with its result as first
// argument unless the signature is immutable. A group cannot have it.
func Link(callbacks ...Signature) Option { return linkOption("link", callbacks) }

// LinkError sends a task after the failure of this one, with the id of the failed
// task as first argument unless the signature is immutable.
func LinkError(errbacks ...Signature) Option { return linkOption("link_error", errbacks) }

func linkOption(name string, signatures []Signature) Option {
	return func(o *options) {
		for _, s := range signatures {
			if o.err == nil {
				o.err = s.problem()
			}
		}
		*o = o.add(name, signatures)
	}
}
