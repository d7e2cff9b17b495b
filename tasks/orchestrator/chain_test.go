package orchestrator

import (
	"encoding/json"
	"os"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// The message is the one that was captured from MoonMind's API, but for what names the
// API itself.
func TestChainMessageIsTheOneOfTheAPI(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../internal/moonmind/testdata/first_message.json")
	if err != nil {
		t.Fatal(err)
	}
	var captured struct {
		Properties map[string]any `json:"properties"`
		Headers    map[string]any `json:"headers"`
		Body       any            `json:"body"`
	}
	if err := json.Unmarshal(text, &captured); err != nil {
		t.Fatal(err)
	}
	// The ids in the order in which they are drawn: the first step, then the last ones.
	ids := []string{
		"b97a2309-2c50-4325-b2f8-39e2b7d0b501", "b6df1994-7e45-446f-88af-84df8cf9a905", "993f8753-039c-4a33-a263-d446dc85ba04",
		"751a5561-85d5-419f-9268-58db99847d03", "5060f333-8db9-4dd0-886c-4491f584b902",
	}
	run := store.Run{ID: "5b0e6a52-3c1d-4f0e-9b7a-6a1f2d9c4e10", Steps: json.RawMessage(`[{"name": "analyze"}, {"name": "patch"}, {"name": "build"}, {"name": "restart"}, {"name": "verify"}, {"name": "rollback"}]`)}
	next := 0
	id, message, err := ChainMessage(run, "orchestrator.run", "gen71@api", time.Now(), func() string { next++; return ids[next-1] })
	if err != nil || id != ids[0] {
		t.Fatal(id, err)
	}
	var body any
	if err := json.Unmarshal(message.Body, &body); err != nil {
		t.Fatal(err)
	}
	same(t, "body", asJSON(t, body), asJSON(t, without(captured.Body, "reply_to")))
	same(t, "headers", asJSON(t, message.Headers), asJSON(t, captured.Headers))
	if message.Properties.CorrelationID != ids[0] || message.Properties.Priority != nil || message.Properties.DeliveryMode != 2 {
		t.Errorf("properties %+v", message.Properties)
	}
	if _, err := protocol.Decode(message, []string{"application/json"}); err != nil {
		t.Error(err)
	}
}

func asJSON(t *testing.T, value any) string {
	t.Helper()
	text, err := json.MarshalIndent(value, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// without removes a key from all objects in a value.
func without(value any, key string) any {
	switch v := value.(type) {
	case []any:
		for i := range v {
			v[i] = without(v[i], key)
		}
	case map[string]any:
		delete(v, key)
		for name := range v {
			v[name] = without(v[name], key)
		}
	}
	return value
}

func TestChainMessageOfAPlanWithoutSteps(t *testing.T) {
	t.Parallel()
	for _, plan := range []string{`[]`, `{}`, `[{"name": "rollback"}]`, `["x"]`, `nonsense`} {
		if _, _, err := ChainMessage(store.Run{ID: testRun, Steps: json.RawMessage(plan)}, "q", "n", time.Now(), nil); err == nil {
			t.Errorf("%s: no error", plan)
		}
	}
}
