package protocol_test

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"testing"
	"unicode/utf8"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Decoding any input returns a message or a typed error. Follow-ups and a retry
// can be made from any decoded message.
func FuzzDecode(f *testing.F) {
	for _, pattern := range []string{"producer_*.json", "worker_celery-5.7.0.json"} {
		for _, file := range capturedFiles(f, pattern) {
			for _, s := range capturedScenarios(f, file) {
				for _, m := range append(s.Produced, s.Messages...) {
					compression, _ := m.headers(f)["compression"].(string)
					task, _ := m.headers(f)["task"].(string)
					f.Add([]byte(m.Headers), m.Body, task, compression)
				}
			}
		}
	}
	var malformed struct {
		Cases []malformedCase `json:"cases"`
	}
	readCaptured(f, "malformed_celery-5.7.0.json", &malformed)
	for _, c := range malformed.Cases {
		f.Add([]byte(c.Headers), c.Body, "shop.add", "")
	}
	f.Fuzz(func(t *testing.T, headers, body []byte, task, compression string) {
		d := delivery(string(body))
		var table map[string]any
		if protocol.DecodeJSON(headers, &table) == nil && table != nil {
			d.Headers, _ = amqpValue(table).(map[string]any)
		}
		if task != "" {
			d.Headers["task"] = task
		}
		if compression != "" {
			d.Headers["compression"] = compression
		}
		_, headerErr := protocol.DecodeHeader(d, nil)
		m, err := protocol.Decode(d, nil)
		if err != nil {
			if !errors.Is(err, protocol.ErrMalformed) {
				t.Fatalf("not a MalformedError: %v", err)
			}
			var malformed *protocol.MalformedError
			errors.As(err, &malformed)
			if malformed.Disposition().StoreFailure && malformed.TaskID == "" {
				t.Fatal("StoreFailure without a task id")
			}
			if err := protocol.CheckJSON(malformed.Exception().JSON()); err != nil {
				t.Fatal(err)
			}
			return
		}
		if headerErr != nil {
			t.Fatalf("Decode succeeds, DecodeHeader fails: %v", headerErr)
		}
		protocol.LaterSteps(m)
		protocol.StampsJSON(m)
		if protocol.CheckCanvas(m) == nil {
			checkPlan(t)(protocol.AfterSuccess(m, nil, protocol.Sender{}))
			checkPlan(t)(protocol.AfterFailure(m, protocol.Sender{}))
		}
		retry, err := protocol.RetryMessage(m, protocol.RetryOptions{})
		if err != nil {
			t.Fatal(err)
		}
		again, err := protocol.Decode(protocol.Delivery{Headers: retry.Headers, Properties: retry.Properties, Body: retry.Body}, nil)
		if err != nil {
			t.Fatalf("the retry cannot be decoded: %v", err)
		}
		if again.ID != m.ID || again.Retries != m.Retries+1 || string(again.RawArgs) != string(m.RawArgs) {
			t.Fatalf("the retry is of another task: %+v", again)
		}
	})
}

// checkPlan checks that follow-ups can be made and decoded.
func checkPlan(t *testing.T) func(protocol.Plan, error) {
	return func(plan protocol.Plan, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("CheckCanvas succeeds, AfterSuccess fails: %v", err)
		}
		for _, f := range plan.FollowUps {
			p := f.Publishing
			_, err := protocol.DecodeHeader(protocol.Delivery{Headers: p.Headers, Properties: p.Properties, Body: p.Body}, nil)
			if err != nil {
				t.Fatal(err)
			}
			if p.Properties.ContentType != "application/json" || p.TaskID == "" {
				t.Fatalf("properties %+v", p.Properties)
			}
		}
	}
}

// Decompression of any bytes ends, within its limit.
func FuzzDecompress(f *testing.F) {
	var captured struct {
		Messages []struct {
			Name, Body string
			Compressed []byte
		}
	}
	text, err := os.ReadFile("testdata/compressed_kombu-5.7.0.json")
	if err != nil || json.Unmarshal(text, &captured) != nil {
		f.Fatal(err)
	}
	for _, m := range captured.Messages {
		if m.Body == "small" {
			f.Add(m.Name, m.Compressed)
		}
	}
	f.Fuzz(func(t *testing.T, name string, body []byte) {
		d := delivery(string(body))
		d.Headers["compression"] = name
		if out, err := protocol.Decompress(d, 1<<16); err == nil && len(out) > 1<<16 {
			t.Fatalf("%d bytes", len(out))
		}
	})
}

func FuzzParseSignature(f *testing.F) {
	f.Add([]byte(`{"task": "shop.add", "args": [1], "kwargs": {}, "options": {"task_id": "x", "queue": "mail"}, "subtask_type": null, "immutable": true}`))
	f.Add([]byte(`{"task": "celery.chain", "kwargs": {"tasks": [{"task": "a"}, {"task": "b", "options": null}]}}`))
	f.Add([]byte(`{"task":"t","options":{"eta":{"__type__":"datetime","__value__":"2031-01-02T03:04:05"},"expires":1e300,"headers":{"n":7}}}`))
	f.Add([]byte(`{"task":"t","options":{"stamped_headers":["a"],"a":[1],"link":[{"task":"u"}],"link_error":{"task":"v"}}, "options": {}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := protocol.ParseSignature(text)
		if err != nil {
			if !errors.Is(err, protocol.ErrMalformed) {
				t.Fatal(err)
			}
			return
		}
		changed, err := s.WithOptions(protocol.Member{Key: "task_id", Value: json.RawMessage(`"new"`)})
		if err != nil {
			t.Fatal(err)
		}
		if changed.TaskID() != "new" || changed.Task != s.Task {
			t.Fatalf("%s became %s", text, changed.Text())
		}
		p, _, err := changed.Apply(protocol.ApplyOptions{Args: []json.RawMessage{json.RawMessage("NaN")}})
		if err != nil {
			if !errors.Is(err, protocol.ErrMalformed) {
				t.Fatal(err)
			}
			return
		}
		if _, ok := p.Headers["compression"]; !ok && protocol.CheckJSON(p.Body) != nil {
			t.Fatalf("the body is not JSON: %s", p.Body)
		}
		for name, value := range p.Headers {
			if !utf8.ValidString(name) || !plain(value) {
				t.Fatalf("header %q = %#v", name, value)
			}
		}
	})
}

// plain reports whether Publishing.Headers may hold the value.
func plain(v any) bool {
	switch v := v.(type) {
	case nil, bool, int32, float64:
		return true
	case int64:
		return v >= 0
	case string:
		return utf8.ValidString(v)
	case []any:
		for _, x := range v {
			if !plain(x) {
				return false
			}
		}
		return true
	case map[string]any:
		for key, x := range v {
			if !utf8.ValidString(key) || !plain(x) {
				return false
			}
		}
		return true
	}
	return false
}

func FuzzReadResult(f *testing.F) {
	for _, file := range capturedFiles(f, "worker_*.json") {
		for _, s := range capturedScenarios(f, file) {
			for _, row := range s.Rows {
				if row.ResultHex != nil {
					column, err := hex.DecodeString(*row.ResultHex)
					if err != nil {
						f.Fatal(err)
					}
					f.Add(column)
				}
			}
		}
	}
	for _, text := range wrapped {
		pickle, err := protocol.PickleJSON(json.RawMessage(text))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(pickle)
	}
	f.Fuzz(func(t *testing.T, column []byte) {
		value, err := protocol.ReadResult(column)
		if err != nil {
			var pickle *protocol.PickleError
			var syntax *protocol.SyntaxError
			if !errors.As(err, &pickle) && !errors.As(err, &syntax) {
				t.Fatalf("an error of an unexpected type: %v", err)
			}
			return
		}
		if err := protocol.CheckJSON(value); err != nil {
			t.Fatalf("%s: %v", value, err)
		}
	})
}

// JSON that CheckJSON accepts can be decoded, encoded, pickled and read back.
func FuzzJSON(f *testing.F) {
	for _, text := range append(jsonTexts()[:40], wrapped...) {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		if protocol.CheckJSON(text) != nil {
			return
		}
		var v any
		if err := protocol.DecodeJSON(text, &v); err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		encoded, err := protocol.EncodeJSON(v)
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		var again any
		if err := protocol.DecodeJSON(encoded, &again); err != nil {
			t.Fatalf("%s: %v", encoded, err)
		}
		twice, err := protocol.EncodeJSON(again)
		if err != nil || string(twice) != string(encoded) {
			t.Fatalf("%q:\nfirst  %s\nsecond %s", text, encoded, twice)
		}
		pickle, err := protocol.PickleJSON(text)
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		if _, err := protocol.ReadResult(pickle); err != nil {
			t.Fatalf("%q pickled as %x: %v", text, pickle, err)
		}
	})
}

func FuzzParseTime(f *testing.F) {
	for _, text := range []string{"2031-01-02T03:04:05.678901+00:00", "2031-W05-3", "2031034", "2031-01-02T24:00", "9999-12-31T23:59:59-23:59"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		at, err := protocol.ParseTime(text)
		if err != nil {
			return
		}
		again, err := protocol.ParseTime(protocol.FormatTime(at))
		if y := at.UTC().Year(); y < 1 || y > 9999 {
			return
		}
		if err != nil || !again.Equal(at) {
			t.Fatalf("%q is %v, written as %s", text, at, protocol.FormatTime(at))
		}
	})
}
