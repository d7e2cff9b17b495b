package protocol_test

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"encoding/json"
	"errors"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

type malformedCase struct {
	Case       string             `json:"case"`
	Properties capturedProperties `json:"properties"`
	Headers    json.RawMessage    `json:"headers"`
	Body       []byte             `json:"body_base64"`
	Observed   struct {
		Survived bool     `json:"worker_survived"`
		Methods  []string `json:"broker_methods"`
		Row      *struct {
			Status string `json:"status"`
			Repr   string `json:"result_repr"`
		} `json:"result_row"`
	} `json:"observed_with_celery_5.7.0"`
}

// verdict says whether a worker runs a message or refuses it, and why.
type verdict struct {
	// Reason is "" for a message that runs.
	Reason protocol.Reason
	protocol.Disposition
}

var (
	runs      = verdict{}
	rejected  = protocol.Disposition{Reject: true}
	storedAck = protocol.Disposition{StoreFailure: true}
	storedRej = protocol.Disposition{StoreFailure: true, Reject: true}
)

// The table of docs/celery.md#bad-messages, column "here", case by case.
var malformedVerdicts = map[string]verdict{
	"ok baseline":                                     runs,
	"no task header, json string body":                {protocol.ReasonUnknown, rejected},
	"no headers at all, json dict without task":       {protocol.ReasonUnknown, rejected},
	"no headers, invalid json":                        {protocol.ReasonBody, rejected},
	"v2 invalid json":                                 {protocol.ReasonBody, rejected},
	"v2 invalid utf8":                                 {protocol.ReasonBody, rejected},
	"v2 pickle content type":                          {protocol.ReasonContentType, storedRej},
	"v2 yaml content type":                            {protocol.ReasonContentType, storedRej},
	"v2 text/plain":                                   {protocol.ReasonContentType, storedRej},
	"v2 no content type":                              {protocol.ReasonNoContentType, rejected},
	"v2 content_type application/json; charset=utf-8": {protocol.ReasonContentType, storedRej},
	"v2 content_encoding latin-1":                     runs,
	"v2 unknown compression":                          {protocol.ReasonCompression, rejected},
	"v2 bad zlib":                                     {protocol.ReasonCompression, rejected},
	"v2 zlib ok":                                      runs,
	"v2 bz2 ok":                                       runs,
	"v2 real gzip framing":                            {protocol.ReasonCompression, rejected},
	"v2 body 2 elements":                              {protocol.ReasonShape, rejected},
	"v2 body dict with args (hybrid)":                 runs,
	"v2 body empty dict":                              {protocol.ReasonShape, rejected},
	"v2 body null":                                    {protocol.ReasonShape, rejected},
	"v2 body empty bytes":                             {protocol.ReasonShape, rejected},
	"v2 body number":                                  {protocol.ReasonShape, rejected},
	"v2 embed null":                                   runs,
	"v2 embed empty":                                  runs,
	"v2 kwargs list":                                  {protocol.ReasonKwargs, storedAck},
	"v2 args dict":                                    {protocol.ReasonArgs, storedAck},
	"v2 missing id":                                   {protocol.ReasonNoID, rejected},
	"v2 minimal headers task+id":                      runs,
	"v2 bad eta":                                      {protocol.ReasonETA, rejected},
	"v2 bad expires":                                  {protocol.ReasonExpires, rejected},
	"v2 naive eta past":                               runs,
	"v2 unregistered missing id":                      {protocol.ReasonNoID, rejected},
	"v1":                                              runs,
	"v1 minimal":                                      runs,
	"v1 no kwargs":                                    runs,
	"v1 unregistered":                                 runs,
	"v1 no id":                                        {protocol.ReasonNoID, rejected},
}

func TestMalformedMessages(t *testing.T) {
	t.Parallel()
	var file struct {
		Cases []malformedCase `json:"cases"`
	}
	readCaptured(t, "malformed_celery-5.7.0.json", &file)
	if len(file.Cases) != 38 || len(malformedVerdicts) != 38 {
		t.Fatalf("%d cases, %d verdicts, want 38 of each", len(file.Cases), len(malformedVerdicts))
	}
	for _, c := range file.Cases {
		want, ok := malformedVerdicts[c.Case]
		if !ok {
			t.Errorf("no verdict on %q", c.Case)
			continue
		}
		captured := capturedMessage{Properties: c.Properties, Headers: c.Headers, Body: c.Body}
		m, err := protocol.Decode(captured.delivery(t), nil)
		var malformed *protocol.MalformedError
		switch {
		case want.Reason == "" && err == nil:
			if string(m.RawArgs) != "[1, 2]" && string(m.RawArgs) != "[1,2]" {
				t.Errorf("%s: args %s", c.Case, m.RawArgs)
			}
		case !errors.As(err, &malformed) || !errors.Is(err, protocol.ErrMalformed):
			t.Errorf("%s: got %v, want %q", c.Case, err, want.Reason)
		case malformed.Reason != want.Reason || malformed.Disposition() != want.Disposition:
			t.Errorf("%s: got %q %+v, want %q %+v", c.Case, malformed.Reason, malformed.Disposition(), want.Reason, want.Disposition)
		case malformed.Disposition().StoreFailure && (malformed.TaskID == "" || malformed.Exception().Type == ""):
			t.Errorf("%s: a FAILURE row without id or exception", c.Case)
		}
		// Where a Python worker ran the task, or refused it without ending its
		// process, the result here must be the same.
		ran := c.Observed.Row != nil && c.Observed.Row.Status == "SUCCESS"
		if ran && err != nil {
			t.Errorf("%s: Celery runs it, we say %v", c.Case, err)
		}
	}
}

// DecodeHeader does not read the body, and a missing header is not an error
// yet.
func TestDecodeHeaderDoesNotReadTheBody(t *testing.T) {
	t.Parallel()
	m, err := protocol.DecodeHeader(protocol.Delivery{Headers: map[string]any{"task": "nope"}, Body: []byte("{")}, nil)
	if err != nil || m.Task != "nope" || m.ID != "" {
		t.Errorf("got %+v, %v", m, err)
	}
	_, err = protocol.DecodeHeader(protocol.Delivery{
		Headers: map[string]any{"task": map[string]any{}, "id": "x"}}, nil)
	var malformed *protocol.MalformedError
	if !errors.As(err, &malformed) || malformed.Reason != protocol.ReasonUnknown || malformed.TaskID != "x" {
		t.Errorf("the header task is a table: %v", err)
	}
	m, err = protocol.DecodeHeader(protocol.Delivery{
		Properties: protocol.Properties{ContentType: "application/json"},
		Body:       []byte(`{"task": "shop.add", "id": "i", "taskset": "t", "group": "g", "retries": 3}`),
	}, nil)
	if err != nil || m.Version != 1 || m.Task != "shop.add" || m.Group != "t" || m.Retries != 3 {
		t.Errorf("protocol 1: %+v, %v", m, err)
	}
}

// A header of an unexpected type counts as missing, and nothing panics.
func TestDecodeHostileHeaders(t *testing.T) {
	t.Parallel()
	hostile := []any{nil, true, "x", []byte("x"), int8(-1), uint64(1 << 63), 1e300, []any{}, []any{nil, "x", 1e300},
		map[string]any{}, struct{}{}}
	names := []string{"root_id", "parent_id", "group", "group_index", "shadow", "retries", "timelimit", "argsrepr",
		"kwargsrepr", "origin", "ignore_result", "replaced_task_nesting", "stamped_headers", "stamps"}
	for _, name := range names {
		for _, value := range hostile {
			d := delivery(`[[], {}, null]`)
			d.Headers[name] = value
			m, err := protocol.Decode(d, nil)
			if err != nil {
				t.Errorf("header %s = %#v: %v", name, value, err)
				continue
			}
			if _, err := protocol.RetryMessage(m, protocol.RetryOptions{}); err != nil {
				t.Errorf("header %s = %#v: retry: %v", name, value, err)
			}
		}
	}
}

func delivery(body string) protocol.Delivery {
	return protocol.Delivery{
		Headers:    map[string]any{"task": "shop.add", "id": "9a6bb585"},
		Properties: protocol.Properties{ContentType: "application/json", ContentEncoding: "utf-8"},
		Body:       []byte(body),
	}
}

func reasonOf(t *testing.T, err error) protocol.Reason {
	t.Helper()
	var malformed *protocol.MalformedError
	if err != nil && !errors.As(err, &malformed) {
		t.Fatalf("not a MalformedError: %v", err)
	}
	if malformed == nil {
		return ""
	}
	return malformed.Reason
}

func TestDecodeRefuses(t *testing.T) {
	t.Parallel()
	const ok = `[[], {}, {}]`
	withType := func(contentType string) protocol.Delivery {
		d := delivery(ok)
		d.Properties.ContentType = contentType
		return d
	}
	withHeader := func(name string, value any) protocol.Delivery {
		d := delivery(ok)
		d.Headers[name] = value
		return d
	}
	var realGzip bytes.Buffer
	g := gzip.NewWriter(&realGzip)
	_, _ = g.Write([]byte(ok))
	_ = g.Close()
	compressed := func(body []byte) protocol.Delivery {
		d := withHeader("compression", "application/x-gzip")
		d.Body = body
		return d
	}
	for name, c := range map[string]struct {
		delivery protocol.Delivery
		accept   []string
		want     protocol.Reason
	}{
		"application/data is trusted by kombu only": {withType("application/data"), nil, protocol.ReasonContentType},
		"application/text likewise":                 {withType("application/text"), nil, protocol.ReasonContentType},
		"json is not accepted":                      {delivery(ok), []string{"yaml"}, protocol.ReasonContentType},
		"json accepted by name":                     {delivery(ok), []string{"json"}, ""},
		"pickle is never decoded":                   {withType("application/x-python-serialize"), []string{"pickle", "application/x-python-serialize"}, protocol.ReasonContentType},
		"real gzip":                                 {compressed(realGzip.Bytes()), nil, protocol.ReasonCompression},
		"compression is a table":                    {withHeader("compression", map[string]any{}), nil, protocol.ReasonCompression},
		"compression null":                          {withHeader("compression", nil), nil, ""},
		"eta is a number":                           {withHeader("eta", int32(7)), nil, protocol.ReasonETA},
		"expires is a table":                        {withHeader("expires", map[string]any{}), nil, protocol.ReasonExpires},
		"id is a number":                            {withHeader("id", int32(7)), nil, protocol.ReasonNoID},
		"nested too deeply":                         {delivery("[[" + strings.Repeat("[", 2000) + strings.Repeat("]", 2000) + "], {}, {}]"), nil, protocol.ReasonBody},
		"callbacks hold a number":                   {delivery(`[[], {}, {"callbacks": [1]}]`), nil, protocol.ReasonShape},
		"chain holds no task":                       {delivery(`[[], {}, {"chain": [{"args": []}]}]`), nil, protocol.ReasonShape},
		"embed is an array":                         {delivery(`[[], {}, []]`), nil, protocol.ReasonShape},
		"args null":                                 {delivery(`[null, {}, {}]`), nil, protocol.ReasonArgs},
		"kwargs null":                               {delivery(`[[], null, {}]`), nil, protocol.ReasonKwargs},
		"text after the body":                       {delivery(`[[], {}, {}] x`), nil, protocol.ReasonBody},
		"a byte order mark":                         {delivery("\ufeff[[], {}, {}]"), nil, protocol.ReasonBody},
	} {
		_, err := protocol.Decode(c.delivery, c.accept)
		if got := reasonOf(t, err); got != c.want {
			t.Errorf("%s: got %q (%v), want %q", name, got, err, c.want)
		}
	}
}

// An 8 KiB message costs little memory, whatever it contains. Before, one cost
// hundreds of megabytes.
func TestASmallMessageCostsLittleMemory(t *testing.T) {
	for name, c := range map[string]struct{ open, element, end string }{
		"args":      {"[[1", ",1", "], {}, {}]"},
		"callbacks": {`[[], {}, {"callbacks": [{"task":"a"}`, `,{"task":"a"}`, "]}]"},
	} {
		for _, size := range []int{900 << 10, 8 << 20} {
			var body bytes.Buffer
			z := zlib.NewWriter(&body)
			_, _ = z.Write([]byte(c.open + strings.Repeat(c.element, size/len(c.element)) + c.end))
			_ = z.Close()
			d := delivery(body.String())
			d.Headers["compression"] = "zlib"
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, err := protocol.Decode(d, nil)
			runtime.ReadMemStats(&after)
			want := protocol.Reason("")
			if size > protocol.SmallBodySize && size > protocol.MaxExpansion*body.Len() {
				want = protocol.ReasonCompression
			}
			allocated := (after.TotalAlloc - before.TotalAlloc) >> 20
			t.Logf("%s: %d KiB compressed, %d KiB decompressed, %d MiB allocated, %v", name, body.Len()>>10, size>>10, allocated, err)
			if got := reasonOf(t, err); got != want {
				t.Errorf("%s: got %q, want %q", name, got, want)
			}
			if allocated > 96 {
				t.Errorf("%s: a message of %d KiB allocated %d MiB", name, body.Len()>>10, allocated)
			}
		}
	}
}

// A small message cannot be decompressed to a body over the limit.
func TestDecompressionHasALimit(t *testing.T) {
	t.Parallel()
	var bomb bytes.Buffer
	z := zlib.NewWriter(&bomb)
	_, _ = z.Write(make([]byte, 1<<16))
	_ = z.Close()
	d := delivery(bomb.String())
	d.Headers["compression"] = "zlib"
	if body, err := protocol.Decompress(d, 1<<16); err != nil || len(body) != 1<<16 {
		t.Errorf("%d bytes, %v", len(body), err)
	}
	if body, err := protocol.Decompress(d, 1<<16-1); err == nil {
		t.Errorf("decompressed to %d bytes", len(body))
	}
	delete(d.Headers, "compression")
	if _, err := protocol.Decompress(d, bomb.Len()-1); err == nil {
		t.Error("a body over the limit")
	}
}

// NaN, integers of any size, lone surrogates, type wrappers and the order of
// keys survive a republication byte for byte, although encoding/json would
// change or refuse them.
func TestRepublishKeepsText(t *testing.T) {
	t.Parallel()
	const args = `[NaN, -Infinity, 123456789012345678901234567890, "\ud800 \ud83d\ude00", 1.0, 1E5,` +
		` {"__type__": "decimal", "__value__": "12.340"}, {"b": 1, "a": {"z": null, "b": 2}}]`
	const chain = `[{"task": "shop.last", "args": ` + args + `, "kwargs": {"z": 1, "a": 2}, "options": {"unknown": [1,2],"task_id": "last"},  "subtask_type": null, "immutable": true},` +
		` {"options": {"task_id": "next"}, "task": "shop.next", "args": ` + args + `, "kwargs": {}, "immutable": true}]`
	m, err := protocol.Decode(delivery(`[[1], {}, {"chain": `+chain+`}]`), nil)
	if err != nil {
		t.Fatal(err)
	}
	plan, err := protocol.AfterSuccess(m, nil, protocol.Sender{})
	if err != nil {
		t.Fatal(err)
	}
	want := `[` + args + `, {}, {"callbacks": null, "errbacks": null, "chain": [` + chain[1:strings.Index(chain, "},")+1]
	if got := string(plan.FollowUps[0].Publishing.Body); !strings.HasPrefix(got, want[:len(want)-1]) {
		t.Errorf("got  %s\nwant %s...", got, want)
	}
	retry, err := protocol.RetryMessage(m, protocol.RetryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(retry.Body, []byte(strings.ReplaceAll(chain, "},  {", "}, {"))) {
		t.Errorf("retry: %s", retry.Body)
	}
	if slices.ContainsFunc(plan.FollowUps, func(f protocol.FollowUp) bool { return f.Publishing.TaskID != "next" }) {
		t.Errorf("follow-ups: %+v", plan.FollowUps)
	}
}
