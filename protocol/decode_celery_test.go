package protocol_test

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Every captured message can be decoded, and its decoded parts can be written
// to the same bytes again.
func TestDecodeCapturedMessages(t *testing.T) {
	t.Parallel()
	for _, pattern := range []string{"producer_*.json", "worker_*.json"} {
		for _, file := range capturedFiles(t, pattern) {
			for _, s := range capturedScenarios(t, file) {
				for i, captured := range append(s.Produced, s.Messages...) {
					name := file + "/" + s.Name
					d := captured.delivery(t)
					if captured.Properties.ContentType != "application/json" {
						var malformed *protocol.MalformedError
						if _, err := protocol.Decode(d, nil); !errors.As(err, &malformed) || malformed.Reason != protocol.ReasonContentType {
							t.Errorf("%s[%d]: content type %s: %v", name, i, captured.Properties.ContentType, err)
						}
						continue
					}
					m, err := protocol.Decode(d, nil)
					if err != nil {
						t.Errorf("%s[%d]: %v", name, i, err)
						continue
					}
					checkHeaders(t, name, m, d)
					if _, compressed := d.Headers["compression"]; m.Version == 2 && !compressed {
						if got := writeBody(t, m); got != string(captured.Body) {
							t.Errorf("%s[%d]:\nwrote %s\nwant  %s", name, i, got, captured.Body)
						}
					}
				}
			}
		}
	}
}

func checkHeaders(t *testing.T, name string, m *protocol.Message, d protocol.Delivery) {
	t.Helper()
	if m.ID != d.Properties.CorrelationID {
		t.Errorf("%s: id %q, correlation id %q", name, m.ID, d.Properties.CorrelationID)
	}
	if m.Version == 1 {
		return
	}
	for header, got := range map[string]any{
		"task": m.Task, "id": m.ID, "root_id": m.RootID, "argsrepr": m.ArgsRepr, "kwargsrepr": m.KwargsRepr,
		"origin": m.Origin, "retries": int32(m.Retries),
	} {
		if !reflect.DeepEqual(got, d.Headers[header]) {
			t.Errorf("%s: header %s: got %#v, want %#v", name, header, got, d.Headers[header])
		}
	}
	if ignore, ok := d.Headers["ignore_result"].(bool); ok != (m.IgnoreResult != nil) || ok && ignore != *m.IgnoreResult {
		t.Errorf("%s: ignore_result: got %v, want %v", name, m.IgnoreResult, d.Headers["ignore_result"])
	}
}

// writeBody writes [args, kwargs, embed] from the decoded parts alone.
func writeBody(t *testing.T, m *protocol.Message) string {
	t.Helper()
	list := func(sigs []protocol.Signature) string {
		if sigs == nil {
			return "null"
		}
		texts := make([]string, len(sigs))
		for i, s := range sigs {
			texts[i] = string(s.Text())
		}
		return "[" + strings.Join(texts, ", ") + "]"
	}
	args := make([]string, len(m.Args))
	for i, a := range m.Args {
		args[i] = string(a)
	}
	kwargs, err := protocol.EncodeJSON(m.Kwargs)
	if err != nil {
		t.Fatal(err)
	}
	chord := json.RawMessage("null")
	if m.Embed.Chord != nil {
		chord = m.Embed.Chord.Text()
	}
	return "[[" + strings.Join(args, ", ") + "], " + string(kwargs) + `, {"callbacks": ` + list(m.Embed.Callbacks) +
		`, "errbacks": ` + list(m.Embed.Errbacks) + `, "chain": ` + list(m.Embed.Chain) + `, "chord": ` + string(chord) + "}]"
}

// A compressed message decodes to the same as an uncompressed one.
func TestDecodeCompressed(t *testing.T) {
	t.Parallel()
	found := 0
	for _, s := range capturedScenarios(t, "producer_celery-5.7.0.json") {
		for _, captured := range s.Produced {
			d := captured.delivery(t)
			if _, ok := d.Headers["compression"]; !ok {
				continue
			}
			found++
			m, err := protocol.Decode(d, []string{"json"})
			if err != nil {
				t.Fatalf("%s: %v", s.Name, err)
			}
			if got := writeBody(t, m); !strings.HasPrefix(got, "[[") || len(m.Args) == 0 {
				t.Errorf("%s: %s", s.Name, got)
			}
		}
	}
	if found == 0 {
		t.Fatal("no compressed message among the captures")
	}
}
