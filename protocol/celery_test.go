package protocol_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Captures of what real Celery sent and stored; testdata/celery/README.md says
// how they were made.

type capturedProperties struct {
	ContentType     string `json:"content_type"`
	ContentEncoding string `json:"content_encoding"`
	DeliveryMode    uint8  `json:"delivery_mode"`
	Priority        *uint8 `json:"priority"`
	CorrelationID   string `json:"correlation_id"`
	ReplyTo         string `json:"reply_to"`
	Expiration      string `json:"expiration"`
}

type capturedMessage struct {
	PublishedBy string             `json:"published_by"`
	Exchange    string             `json:"exchange"`
	RoutingKey  string             `json:"routing_key"`
	Properties  capturedProperties `json:"properties"`
	Headers     json.RawMessage    `json:"headers"`
	Body        []byte             `json:"body_base64"`
}

type capturedRow struct {
	TaskID       string  `json:"task_id"`
	Status       string  `json:"status"`
	ResultHex    *string `json:"result_hex"`
	ResultText   *string `json:"result_text"`
	Name         *string `json:"name"`
	ArgsText     *string `json:"args_text"`
	KwargsText   *string `json:"kwargs_text"`
	ChildrenText *string `json:"children_text"`
	StampsText   *string `json:"stamps_text"`
	Traceback    *string `json:"traceback"`
	Worker       *string `json:"worker"`
}

type capturedScenario struct {
	Name     string            `json:"-"`
	Python   string            `json:"python"`
	Produced []capturedMessage `json:"messages"`
	Messages []capturedMessage `json:"messages_in_publish_order"`
	Rows     []capturedRow     `json:"celery_taskmeta_rows_in_insert_order"`
}

func readCaptured(t testing.TB, name string, v any) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "testdata", "celery", name))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, v); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

func capturedFiles(t testing.TB, pattern string) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join("..", "testdata", "celery", pattern))
	if err != nil || len(paths) == 0 {
		t.Fatalf("no captures match %s: %v", pattern, err)
	}
	for i, path := range paths {
		paths[i] = filepath.Base(path)
	}
	return paths
}

// capturedScenarios reads the scenarios of one file in the order of the file.
func capturedScenarios(t testing.TB, name string) []capturedScenario {
	t.Helper()
	var file struct {
		Scenarios protocolObject `json:"scenarios"`
	}
	readCaptured(t, name, &file)
	var scenarios []capturedScenario
	for _, m := range file.Scenarios {
		var s capturedScenario
		if err := json.Unmarshal(m.Value, &s); err != nil {
			t.Fatalf("%s: %s: %v", name, m.Key, err)
		}
		s.Name = m.Key
		scenarios = append(scenarios, s)
	}
	return scenarios
}

// protocolObject is an object in the order of the file.
type protocolObject protocol.Object

func (o *protocolObject) UnmarshalJSON(text []byte) error {
	d := json.NewDecoder(bytes.NewReader(text))
	if _, err := d.Token(); err != nil {
		return err
	}
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return err
		}
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return err
		}
		*o = append(*o, protocol.Member{Key: key.(string), Value: value})
	}
	return nil
}

func (m capturedMessage) properties() protocol.Properties {
	p := m.Properties
	return protocol.Properties{
		ContentType: p.ContentType, ContentEncoding: p.ContentEncoding, DeliveryMode: p.DeliveryMode,
		Priority: p.Priority, CorrelationID: p.CorrelationID, ReplyTo: p.ReplyTo, Expiration: p.Expiration,
	}
}

func (m capturedMessage) headers(t testing.TB) map[string]any {
	t.Helper()
	if len(m.Headers) == 0 || string(m.Headers) == "null" {
		return nil
	}
	table, ok := headerValue(m.Headers).(map[string]any)
	if !ok {
		t.Fatalf("headers %s", m.Headers)
	}
	return table
}

// headerValue converts a header to what an AMQP client returns: int32 for
// integers.
func headerValue(text json.RawMessage) any {
	var v any
	if err := protocol.DecodeJSON(text, &v); err != nil {
		panic(err)
	}
	return amqpValue(v)
}

func amqpValue(v any) any {
	switch v := v.(type) {
	case int64:
		if v == int64(int32(v)) {
			return int32(v)
		}
	case []any:
		for i := range v {
			v[i] = amqpValue(v[i])
		}
	case map[string]any:
		for key := range v {
			v[key] = amqpValue(v[key])
		}
	}
	return v
}

func (m capturedMessage) delivery(t testing.TB) protocol.Delivery {
	t.Helper()
	return protocol.Delivery{
		Headers: m.headers(t), Properties: m.properties(), Body: m.Body,
		Exchange: m.Exchange, RoutingKey: m.RoutingKey,
	}
}
