package workertest

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Args encodes Go values as positional arguments. It panics on a value that has no
// form in Python's JSON (see [protocol.EncodeJSON]).
func Args(values ...any) []json.RawMessage {
	args := make([]json.RawMessage, len(values))
	for i, value := range values {
		args[i] = encode(value)
	}
	return args
}

// Kwargs encodes Go values as keyword arguments, sorted by name. It panics like
// [Args].
func Kwargs(values map[string]any) protocol.Object {
	var kwargs protocol.Object
	for _, key := range slices.Sorted(maps.Keys(values)) {
		kwargs = append(kwargs, protocol.Member{Key: key, Value: encode(values[key])})
	}
	return kwargs
}

func encode(value any) json.RawMessage {
	text, err := protocol.EncodeJSON(value)
	if err != nil {
		panic(fmt.Sprintf("workertest: %v", err))
	}
	return text
}

// Option makes an option of a signature, such as link_error or time_limit, for
// [Message]. It panics like [Args].
func Option(name string, value any) protocol.Member {
	return protocol.Member{Key: name, Value: encode(value)}
}

// Message returns the message that a Python producer publishes for a task, with the
// default exchange and the given queue as destination. It panics when the
// signature is invalid.
func Message(queue, task string, args []json.RawMessage, kwargs protocol.Object, options ...protocol.Member) protocol.Publishing {
	signature := protocol.NewSignature(task, args, kwargs, options...)
	message, _, err := signature.Apply(protocol.ApplyOptions{Origin: "gen1@workertest", ReplyTo: "workertest", Now: time.Now()})
	if err != nil {
		panic(fmt.Sprintf("workertest: %v", err))
	}
	message.Exchange, message.RoutingKey = "", queue
	return message
}

// Decoded returns a message in the form in which a handler receives it.
func Decoded(message protocol.Publishing) (*protocol.Message, error) {
	return protocol.Decode(protocol.Delivery{
		Headers:    message.Headers,
		Properties: message.Properties,
		Exchange:   message.Exchange,
		RoutingKey: message.RoutingKey,
		Body:       message.Body,
	}, nil)
}
