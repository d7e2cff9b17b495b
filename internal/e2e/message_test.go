package e2e

import (
	"encoding/json"
	"os"
	"regexp"
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"
)

// The producer of these tests must send the same message as MoonMind's API;
// otherwise they prove nothing. Its message must equal a captured one, except for
// the ids.
func TestProducerPublishesWhatTheAPIPublishes(t *testing.T) {
	t.Parallel()
	var captured struct {
		Message struct {
			Publish    map[string]any `json:"publish"`
			Properties map[string]any `json:"properties"`
			Headers    map[string]any `json:"headers"`
			Body       any            `json:"body"`
		} `json:"first_message_from_the_api"`
	}
	readJSON(t, "testdata/celery_messages_orchestrator.json", &captured)
	want := plainIDs(t, captured.Message)

	s := newStack(t, stackConfig{NoWorker: true})
	for _, version := range versions {
		run := s.submit(version)
		message := s.take(queue)
		var body any
		if err := json.Unmarshal(message.Body, &body); err != nil {
			t.Fatal(err)
		}
		got := captured.Message
		got.Publish = map[string]any{"exchange": message.Exchange, "routing_key": message.RoutingKey}
		got.Properties = map[string]any{
			"content_type": message.ContentType, "content_encoding": message.ContentEncoding,
			"delivery_mode": message.DeliveryMode, "correlation_id": message.CorrelationId, "reply_to": message.ReplyTo,
		}
		got.Headers, got.Body = message.Headers, body
		if message.Priority != 0 {
			t.Errorf("celery %s: priority %d, want none", version, message.Priority)
		}
		for _, difference := range differences(want, plainIDs(t, got)) {
			t.Errorf("celery %s: %s", version, difference)
		}
		if message.CorrelationId != run.TaskIDs["analyze"] {
			t.Errorf("celery %s: the first message is %s, want the task of analyze, %s", version, message.CorrelationId, run.TaskIDs["analyze"])
		}
	}
}

// take removes the only message from a queue.
func (s *stack) take(queue string) amqp.Delivery {
	s.t.Helper()
	conn, err := amqp.Dial(s.broker)
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close()
	channel, err := conn.Channel()
	if err != nil {
		s.t.Fatal(err)
	}
	message, ok, err := channel.Get(queue, true)
	if err != nil || !ok {
		s.t.Fatalf("no message in %s: %v", queue, err)
	}
	return message
}

var (
	uuids   = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)
	origins = regexp.MustCompile(`gen\d+@[\w.-]+`)
)

// plainIDs converts a value to plain JSON. It replaces ids by letters in the
// order of their first occurrence, and hosts by a word.
func plainIDs(t *testing.T, value any) any {
	t.Helper()
	text, err := json.Marshal(value) // writes maps sorted, so the order is the same for equal messages
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[string]string)
	text = uuids.ReplaceAllFunc(text, func(id []byte) []byte {
		if seen[string(id)] == "" {
			seen[string(id)] = "<id " + string(rune('a'+len(seen))) + ">"
		}
		return []byte(seen[string(id)])
	})
	text = origins.ReplaceAll(text, []byte("<origin>"))
	var plain any
	if err := json.Unmarshal(text, &plain); err != nil {
		t.Fatal(err)
	}
	return plain
}

func readJSON(t *testing.T, path string, value any) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, value); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
}
