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
	// MessageID, Type, AppID and Timestamp are never set by Celery, and nothing
	// here reads them: a message that is published again keeps what its producer
	// gave it. AMQP's timestamps are whole seconds.
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

	Task     string
	ID       string
	RootID   string
	ParentID string
	Group    string
	// GroupIndex is nil when the message has none.
	GroupIndex *int
	Shadow     string
	// ETA and Expires are nil when not set.
	ETA     *time.Time
	Expires *time.Time
	Retries int
	// TimeLimit is the zero value when the message sets no limits.
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
	Hard time.Duration
	Soft time.Duration
}

// Embed is the third element of a protocol 2 body: the signatures to run after
// the task.
type Embed struct {
	Callbacks []Signature
	Errbacks  []Signature
	// Chain holds the later steps in reverse order, as on the wire: the next
	// step is the last element.
	Chain []Signature
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
