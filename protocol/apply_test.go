package protocol_test

import (
	"bytes"
	"compress/zlib"
	"encoding/json"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

var applyNow = time.Date(2031, 1, 2, 3, 4, 5, 678901000, time.UTC)

func parse(t *testing.T, text string) protocol.Signature {
	t.Helper()
	s, err := protocol.ParseSignature(json.RawMessage(text))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// signature returns the text of a signature with these options.
func signature(options string) string {
	return `{"task": "shop.add", "args": [10], "kwargs": {"k": 1}, "options": {` + options + `}, "subtask_type": null, "immutable": false}`
}

func TestApplyMapsEveryOption(t *testing.T) {
	t.Parallel()
	five := uint8(5)
	for name, c := range map[string]struct {
		options string
		call    protocol.ApplyOptions
		// headers that differ from those of a signature without options.
		headers    map[string]any
		properties func(*protocol.Properties)
		embed      string
	}{
		"none":            {},
		"task_id":         {options: `"task_id": "mine"`, headers: map[string]any{"id": "mine", "root_id": "mine"}, properties: func(p *protocol.Properties) { p.CorrelationID = "mine" }},
		"countdown":       {options: `"countdown": 1.5`, headers: map[string]any{"eta": "2031-01-02T03:04:07.178901+00:00"}},
		"countdown zero":  {options: `"countdown": 0, "eta": "2031-05-06"`, headers: map[string]any{"eta": "2031-05-06"}},
		"eta wrapped":     {options: `"eta": {"__type__": "datetime", "__value__": "2031-05-06T00:00:00+02:00"}`, headers: map[string]any{"eta": "2031-05-06T00:00:00+02:00"}},
		"expires seconds": {options: `"expires": 60`, headers: map[string]any{"expires": "2031-01-02T03:05:05.678901+00:00"}, properties: func(p *protocol.Properties) { p.Expiration = "60000" }},
		"expires past":    {options: `"expires": "2001-01-01T00:00:00"`, headers: map[string]any{"expires": "2001-01-01T00:00:00"}, properties: func(p *protocol.Properties) { p.Expiration = "0" }},
		"time limits":     {options: `"time_limit": 9, "soft_time_limit": 8.5`, headers: map[string]any{"timelimit": []any{int32(9), 8.5}}},
		"shadow, retries": {options: `"shadow": "nice", "retries": 2, "ignore_result": true, "replaced_task_nesting": 1`,
			headers: map[string]any{"shadow": "nice", "retries": int32(2), "ignore_result": true, "replaced_task_nesting": int32(1)}},
		"headers": {options: `"headers": {"x-tenant": "\u00fc", "n": 7, "big": 1099511627776, "low": -1099511627776, "huge": 99999999999999999999, "f": 1.5, "l": [1, null], "t": {"a": true}}`,
			headers: map[string]any{"x-tenant": "ü", "n": int32(7), "big": int64(1 << 40), "low": "-1099511627776", "huge": "99999999999999999999", "f": 1.5,
				"l": []any{int32(1), nil}, "t": map[string]any{"a": true}}},
		"stamps": {options: `"stamped_headers": ["tenant", "gone"], "tenant": "acme"`,
			headers: map[string]any{"stamped_headers": []any{"tenant", "gone"}, "stamps": map[string]any{"tenant": "acme"}}},
		"reply_to":              {options: `"reply_to": "theirs"`, properties: func(p *protocol.Properties) { p.ReplyTo = "theirs" }},
		"priority":              {options: `"priority": 5`, properties: func(p *protocol.Properties) { p.Priority = &five }},
		"priority of the call":  {call: protocol.ApplyOptions{Priority: &five}, properties: func(p *protocol.Properties) { p.Priority = &five }},
		"delivery_mode":         {options: `"delivery_mode": 1`, properties: func(p *protocol.Properties) { p.DeliveryMode = 1 }},
		"delivery_mode by name": {options: `"delivery_mode": "transient"`, properties: func(p *protocol.Properties) { p.DeliveryMode = 1 }},
		"group of the call":     {call: protocol.ApplyOptions{Group: "g", GroupIndex: new(int)}, headers: map[string]any{"group": "g", "group_index": int32(0), "argsrepr": "(10,)"}},
		"group of its own":      {options: `"group_id": "own", "group_index": 3`, call: protocol.ApplyOptions{Group: "g"}, headers: map[string]any{"group": "own", "group_index": int32(3), "argsrepr": "(10,)"}},
		"parents":               {options: `"parent_id": "p", "root_id": "r"`, headers: map[string]any{"parent_id": "p", "root_id": "r"}},
		"parents of the call":   {options: `"parent_id": "p", "root_id": "r"`, call: protocol.ApplyOptions{ParentID: "P", RootID: "R"}, headers: map[string]any{"parent_id": "P", "root_id": "R"}},
		"nulls":                 {options: `"countdown": null, "eta": null, "expires": null, "priority": null, "headers": null, "link": null, "serializer": null, "compression": null, "stamped_headers": null`},
		"compression unknown":   {options: `"compression": "bzip2"`},
		"links": {options: `"link": {"task":"a"}, "link_error": [{"task":"b"}, {"task":"c"}], "chord": {"task":"d"}`,
			embed: `{"callbacks": [{"task":"a"}], "errbacks": [{"task":"b"}, {"task":"c"}], "chain": null, "chord": {"task":"d"}}`},
		"chain option":      {options: `"chain": [{"task":"a"}]`, embed: `{"callbacks": null, "errbacks": null, "chain": [{"task":"a"}], "chord": null}`},
		"chain of the call": {options: `"chain": [{"task":"a"}]`, call: protocol.ApplyOptions{Chain: []protocol.Signature{}}, embed: `{"callbacks": null, "errbacks": null, "chain": [], "chord": null}`},
		"unknown":           {options: `"producer": 1, "x": [1]`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			call := c.call
			call.NewID, call.Now, call.ReplyTo, call.Origin = func() string { return "new" }, applyNow, "ours", "gen1@go"
			p, _, err := parse(t, signature(c.options)).Apply(call)
			if err != nil {
				t.Fatal(err)
			}
			headers := map[string]any{
				"lang": "py", "task": "shop.add", "id": "new", "shadow": nil, "eta": nil, "expires": nil, "group": nil, "group_index": nil,
				"retries": int32(0), "timelimit": []any{nil, nil}, "root_id": "new", "parent_id": nil, "argsrepr": "[10]", "kwargsrepr": "{'k': 1}",
				"origin": "gen1@go", "ignore_result": nil, "replaced_task_nesting": int32(0), "stamped_headers": nil, "stamps": map[string]any{},
			}
			for header, value := range c.headers {
				headers[header] = value
			}
			if !reflect.DeepEqual(p.Headers, headers) {
				t.Errorf("headers:\ngot  %v\nwant %v", p.Headers, headers)
			}
			properties := protocol.Properties{ContentType: "application/json", ContentEncoding: "utf-8", DeliveryMode: 2,
				Priority: new(uint8), CorrelationID: "new", ReplyTo: "ours"}
			if c.properties != nil {
				c.properties(&properties)
			}
			if !reflect.DeepEqual(p.Properties, properties) {
				t.Errorf("properties:\ngot  %+v\nwant %+v", p.Properties, properties)
			}
			embed := c.embed
			if embed == "" {
				embed = `{"callbacks": null, "errbacks": null, "chain": null, "chord": null}`
			}
			if want := `[[10], {"k": 1}, ` + embed + `]`; string(p.Body) != want {
				t.Errorf("body:\ngot  %s\nwant %s", p.Body, want)
			}
		})
	}
}

func TestApplyRefusesOptions(t *testing.T) {
	t.Parallel()
	for _, options := range []string{
		`"serializer": "pickle"`, `"priority": 256`, `"priority": "high"`, `"priority": 1.5`, `"countdown": "soon"`, `"countdown": 1e300`, `"countdown": NaN`,
		`"countdown": 9e11`, `"eta": "soon"`, `"eta": {}`, `"expires": [1]`, `"headers": []`, `"headers": {"` + strings.Repeat("x", 256) + `": 1}`,
		`"link": 1`, `"link": [1]`, `"link_error": {"args": []}`, `"chain": {"task": 1}`,
	} {
		_, _, err := parse(t, signature(options)).Apply(protocol.ApplyOptions{Now: applyNow})
		var malformed *protocol.MalformedError
		if !errors.As(err, &malformed) || malformed.Reason != protocol.ReasonOptions || malformed.Task != "shop.add" {
			t.Errorf("%s: %v", options, err)
		}
	}
}

func TestApplyCompresses(t *testing.T) {
	t.Parallel()
	p, _, err := parse(t, signature(`"compression": "gzip"`)).Apply(protocol.ApplyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	z, err := zlib.NewReader(bytes.NewReader(p.Body))
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(z)
	if err != nil || !strings.HasPrefix(string(body), "[[10], ") || p.Headers["compression"] != "application/x-gzip" {
		t.Errorf("%s %v %v", body, err, p.Headers["compression"])
	}
	if _, err := protocol.Decode(protocol.Delivery{Headers: p.Headers, Properties: p.Properties, Body: p.Body}, nil); err != nil {
		t.Error(err)
	}
}

// Changing an option leaves all other bytes unchanged, including spacing.
func TestWithOptionsKeepsText(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ before, key, value, after string }{
		{`{"options":{"b":1 , "a" : [1,2]},"x":NaN,"task":"t"}`, "a", `"new"`, `{"options":{"b":1 , "a" : "new"},"x":NaN,"task":"t"}`},
		{`{"task": "t", "options": {}}`, "a", "1", `{"task": "t", "options": {"a": 1}}`},
		{`{"task": "t", "options": {"z": 0}}`, "a", "1", `{"task": "t", "options": {"z": 0, "a": 1}}`},
		{`{"task": "t", "options": null}`, "a", "1", `{"task": "t", "options": {"a": 1}}`},
		{`{"task": "t"}`, "a", "1", `{"task": "t", "options": {"a": 1}}`},
	} {
		s, err := parse(t, c.before).WithOptions(protocol.Member{Key: c.key, Value: json.RawMessage(c.value)})
		if err != nil || string(s.Text()) != c.after || string(s.Option(c.key)) != c.value {
			t.Errorf("%s: got %s, %v, want %s", c.before, s.Text(), err, c.after)
		}
	}
	if _, err := parse(t, `{"task": "t"}`).WithOptions(protocol.Member{Key: "a", Value: json.RawMessage("{")}); !errors.Is(err, protocol.ErrMalformed) {
		t.Errorf("a value that is not JSON: %v", err)
	}
}

func TestParseSignatureRefuses(t *testing.T) {
	t.Parallel()
	for _, text := range []string{``, `1`, `[]`, `{}`, `{"task": ""}`, `{"task": 1}`, `{"task": "t", "args": {}}`, `{"task": "t", "kwargs": []}`,
		`{"task": "t", "options": 1}`, `{"task": "t"`, "{\"task\": \"\xff\"}"} {
		if _, err := protocol.ParseSignature(json.RawMessage(text)); !errors.Is(err, protocol.ErrMalformed) {
			t.Errorf("%s: %v", text, err)
		}
	}
}
