package protocol

import (
	"encoding/json"
	"time"
)

// Delivery is a message as received from a broker, reduced to what decoding
// needs. Headers hold the values of an AMQP table: nil, bool, string, []byte,
// any integer or float kind, time.Time, []any, and map[string]any.
type Delivery struct {
	Headers    map[string]any
	Properties Properties
	Exchange   string
	RoutingKey string
	// Redelivered is the broker's flag: a consumer may have received the
	// message before.
	Redelivered bool
	Body        []byte
}

// Properties are the AMQP basic properties that Celery sets
// (docs/celery.md#message-properties). An empty string or zero means that the
// property is absent; for Priority, nil does.
type Properties struct {
	ContentType     string
	ContentEncoding string
	DeliveryMode    uint8
	// Priority is nil when the property is absent. To Celery, absent and 0
	// differ.
	Priority      *uint8
	CorrelationID string
	ReplyTo       string
	// Expiration is the time to live in decimal milliseconds.
	Expiration string
	// Celery never sets MessageID, Type, AppID and Timestamp, and this package
	// does not use them. They are kept when a message is published again.
	// Timestamp has a resolution of one second.
	MessageID string
	Type      string
	AppID     string
	Timestamp time.Time
}

// Publishing is a message ready to be published.
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

// Message is a decoded task message. Callers must not change it: it shares
// memory with the [Delivery] it was decoded from.
type Message struct {
	// Version is the version of Celery's message protocol: 1 or 2.
	Version int

	// Task is the name of the task, ID the id of this call.
	Task string
	ID   string
	// RootID is the id of the first task of the workflow, ParentID that of the
	// task that published the message, Group the id of the task's group. Each
	// is "" when the message has none.
	RootID   string
	ParentID string
	Group    string
	// GroupIndex is nil when the message has none.
	GroupIndex *int
	// Shadow is the name to show in place of Task, or "".
	Shadow string
	// ETA is the earliest time to run, Expires the latest. Nil means none.
	ETA     *time.Time
	Expires *time.Time
	// Retries counts the earlier attempts of the task.
	Retries int
	// TimeLimit is the zero value when the message sets no limits.
	TimeLimit TimeLimit
	// ArgsRepr and KwargsRepr are the arguments as text for logs, possibly
	// shortened.
	ArgsRepr   string
	KwargsRepr string
	// Origin names the process that sent the message.
	Origin string
	// IgnoreResult is nil for null or absent: the task's own setting decides
	// (docs/celery.md#headers, Celery 5.7).
	IgnoreResult        *bool
	ReplacedTaskNesting int
	StampedHeaders      []string
	Stamps              map[string]any

	// Args are the positional arguments, each as the JSON text received.
	Args []json.RawMessage
	// Kwargs are the keyword arguments in the order received.
	Kwargs Object
	Embed  Embed

	// RawArgs and RawKwargs are the unchanged texts of Args and Kwargs, for
	// the result row.
	RawArgs   json.RawMessage
	RawKwargs json.RawMessage

	// Headers are all headers as received, custom ones included.
	Headers     map[string]any
	Properties  Properties
	Exchange    string
	RoutingKey  string
	Redelivered bool
}

// TimeLimit holds the limits on how long a task may run. Zero means no limit.
type TimeLimit struct {
	// Hard is the time after which the worker ends the task.
	Hard time.Duration
	// Soft is the time after which the worker asks the task to stop.
	Soft time.Duration
}

// Embed is the third element of a protocol 2 body: the signatures to run after
// the task.
type Embed struct {
	// Callbacks run after a success.
	Callbacks []Signature
	// Errbacks run after a failure.
	Errbacks []Signature
	// Chain holds the later steps in reverse order, as on the wire: the next
	// step is the last element.
	Chain []Signature
	// Chord is the body of the chord that the task belongs to, or nil. See
	// [CheckCanvas].
	Chord *Signature
}

// Member is one key of an [Object] and the JSON text of its value.
type Member struct {
	Key   string
	Value json.RawMessage
}

// Object is a JSON object that keeps the order of its members and the text of
// their values.
type Object []Member

// Get returns the text of the member key, or nil when it is absent or null.
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
