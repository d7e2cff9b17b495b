package workertest

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Args makes positional arguments of Go values. It panics on one that has no
// form in Python's JSON.
func Args(values ...any) []json.RawMessage {
	args := make([]json.RawMessage, len(values))
	for i, value := range values {
		args[i] = encode(value)
	}
	return args
}

// Kwargs makes keyword arguments, sorted by name.
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

// Option is an option of a signature, such as link_error or time_limit.
func Option(name string, value any) protocol.Member {
	return protocol.Member{Key: name, Value: encode(value)}
}

// Message is the message that a Python producer would send for a task, to the
// default exchange and the given queue.
func Message(queue, task string, args []json.RawMessage, kwargs protocol.Object, options ...protocol.Member) protocol.Publishing {
	signature := protocol.NewSignature(task, args, kwargs, options...)
	message, _, err := signature.Apply(protocol.ApplyOptions{Origin: "gen1@workertest", ReplyTo: "workertest", Now: time.Now()})
	if err != nil {
		panic(fmt.Sprintf("workertest: %v", err))
	}
	message.Exchange, message.RoutingKey = "", queue
	return message
}

// Decoded is a message as a worker's handler gets it.
func Decoded(message protocol.Publishing) (*protocol.Message, error) {
	return protocol.Decode(protocol.Delivery{
		Headers:    message.Headers,
		Properties: message.Properties,
		Exchange:   message.Exchange,
		RoutingKey: message.RoutingKey,
		Body:       message.Body,
	}, nil)
}
