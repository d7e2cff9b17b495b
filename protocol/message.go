package protocol

import (
	"encoding/json"
	"time"
)

// Delivery is what a decoder needs of a message that a broker handed over.
// Headers hold the values of an AMQP table: nil, bool, string, []byte, any
// integer or float kind, time.Time, []any, and map[string]any.
type Delivery struct {
	Headers    map[string]any
	Properties Properties
	Exchange   string
	RoutingKey string
	// Redelivered is the broker's flag: somebody may have seen it before.
	Redelivered bool
	Body        []byte
}

// Properties are the AMQP basic properties that Celery sets
// (docs/celery.md#message-properties). An empty string or zero means that the
// property is absent, but for Priority.
type Properties struct {
	ContentType     string
	ContentEncoding string
	DeliveryMode    uint8
	// Priority is nil when the property is absent, which Celery tells apart
	// from 0.
	Priority      *uint8
	CorrelationID string
	ReplyTo       string
	// Expiration is decimal milliseconds, as AMQP wants it.
	Expiration string
}

// Publishing is a message ready to be sent.
type Publishing struct {
	// TaskID and Task repeat what Headers say, for logs and errors.
	TaskID     string
	Task       string
	Exchange   string
	RoutingKey string
	Headers    map[string]any
	Properties Properties
	Body       []byte
}

// Message is a decoded task message. It is read-only for everybody but the
// decoder.
type Message struct {
	// Version of the protocol it came in: 1 or 2.
	Version int

	Task     string
	ID       string
	RootID   string
	ParentID string
	Group    string
	// GroupIndex is nil when the message does not say.
	GroupIndex *int
	Shadow     string
	// ETA and Expires are nil when not set.
	ETA     *time.Time
	Expires *time.Time
	Retries int
	// TimeLimit of the message; zero means that it gives none.
	TimeLimit  TimeLimit
	ArgsRepr   string
	KwargsRepr string
	Origin     string
	// IgnoreResult is nil for null or absent: the task's own setting decides
	// (docs/celery.md#headers, Celery 5.7).
	IgnoreResult        *bool
	ReplacedTaskNesting int
	StampedHeaders      []string
	Stamps              map[string]any

	// Args are the positional arguments, each the JSON text that was sent.
	Args []json.RawMessage
	// Kwargs are the keyword arguments in the order that was sent.
	Kwargs Object
	Embed  Embed

	// RawArgs and RawKwargs are the exact texts of both, for the result row.
	RawArgs   json.RawMessage
	RawKwargs json.RawMessage

	// Headers are all headers as received, the custom ones included.
	Headers     map[string]any
	Properties  Properties
	Exchange    string
	RoutingKey  string
	Redelivered bool
}

// TimeLimit is a pair of limits on the body of a task. Zero means none.
type TimeLimit struct {
	Hard time.Duration
	Soft time.Duration
}

// Embed is the third element of a protocol 2 body: what follows the task.
type Embed struct {
	Callbacks []Signature
	Errbacks  []Signature
	// Chain is in reverse order: the next step is the last element.
	Chain []Signature
	Chord *Signature
}

// Member is one key of an Object with the text of its value.
type Member struct {
	Key   string
	Value json.RawMessage
}

// Object is a JSON object that keeps order and text of its members.
type Object []Member

// Get returns the text of a member, or nil when it is absent or null.
func (o Object) Get(key string) json.RawMessage {
	for _, m := range o {
		if m.Key == key {
			if isNull(m.Value) {
				return nil
			}
			return m.Value
		}
	}
	return nil
}
