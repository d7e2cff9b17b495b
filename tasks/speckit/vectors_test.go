package speckit

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"go.uber.org/goleak"

	"github.com/moonladderstudios/mm-orchestrator/internal/spectest"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// recorded reads a file of testdata, which was recorded from MoonMind.
func recorded[T any](t *testing.T, name string) (v T) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name))
	if err == nil {
		err = json.Unmarshal(text, &v)
	}
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestNextTaskIsThatOfMoonMind(t *testing.T) {
	t.Parallel()
	vectors := recorded[[]struct {
		Case    string         `json:"case"`
		TasksMD string         `json:"tasks_md"`
		Next    map[string]any `json:"next"`
	}](t, "tasks_md_vectors.json")
	for _, v := range vectors {
		next, _ := nextTask(v.TasksMD)
		var got map[string]any
		if next != nil {
			if err := json.Unmarshal(next.object().compact(), &got); err != nil {
				t.Fatal(err)
			}
		}
		if !reflect.DeepEqual(got, v.Next) {
			t.Errorf("%s: got %v, want %v", v.Case, got, v.Next)
		}
	}
	if len(vectors) != 12 {
		t.Errorf("%d vectors", len(vectors))
	}
}

func TestLinesThatLookLikeOpenTasksAreNamed(t *testing.T) {
	t.Parallel()
	text := "# Tasks\n- [ ]  T1 two spaces\n* [ ] T2\n- [] T3\n1. [ ] T4\n- [x] T5\n- plain\n[link](x)\n- [ ]\n- [ ] T6 real\n- [ ]  T7\n"
	next, unread := nextTask(text)
	if next == nil || next.id != "T6" || !reflect.DeepEqual(unread, []int{2, 3, 4, 5}) {
		t.Errorf("next %+v, unread %v", next, unread)
	}
}

func TestShardsAreThoseOfMoonMind(t *testing.T) {
	t.Parallel()
	vectors := recorded[struct {
		Vectors []map[string]string `json:"vectors"`
	}](t, "codex_shard_vectors.json").Vectors
	for _, v := range vectors {
		for _, n := range []int{1, 3, 5, 64} {
			queue, index := codexQueues{shards: n}.shard(v["key"])
			if want := v[fmt.Sprintf("shards_%d", n)]; queue != want || fmt.Sprintf("codex-%d", index) != want {
				t.Errorf("%s of %d shards: got %s, %d, want %s", v["key"], n, queue, index, want)
			}
		}
	}
	if queue, index := (codexQueues{fixed: "codex", shards: 3}).shard("any"); queue != "codex" || index != 0 || len(vectors) != 6 {
		t.Errorf("fixed queue: %s, %d; %d vectors", queue, index, len(vectors))
	}
}

// message is a recorded message.
type message struct {
	Properties struct {
		CorrelationID string `json:"correlation_id"`
		ReplyTo       string `json:"reply_to"`
		Priority      uint8  `json:"priority"`
	} `json:"properties"`
	Publish struct {
		RoutingKey string `json:"routing_key"`
	} `json:"publish"`
	Headers map[string]any    `json:"headers"`
	Body    []json.RawMessage `json:"body"`
}

// The messages of submit and publish are those that MoonMind's worker publishes after
// the task before, with the routing in context, headers and destination.
func TestFollowUpsAreThoseOfMoonMind(t *testing.T) {
	t.Parallel()
	messages := recorded[map[string]json.RawMessage](t, "celery_messages_spec_workflow.json")
	contexts := recorded[map[string]json.RawMessage](t, "spec_context_stages.json")
	s := &Speckit{queues: codexQueues{shards: 3}}
	for _, c := range []struct{ before, returned, after string }{
		{"discover_from_the_api", "1_returned_by_discover", "submit_published_by_the_worker"},
		{"submit_published_by_the_worker", "3_returned_by_submit_and_first_argument_of_publish", "publish_published_by_the_worker"},
	} {
		var before, want message
		for name, into := range map[string]*message{c.before: &before, c.after: &want} {
			if err := json.Unmarshal(messages[name], into); err != nil {
				t.Fatal(err)
			}
		}
		body, err := json.Marshal(before.Body)
		if err != nil {
			t.Fatal(err)
		}
		m, err := protocol.Decode(protocol.Delivery{
			Properties: protocol.Properties{ContentType: "application/json", ContentEncoding: "utf-8", CorrelationID: before.Properties.CorrelationID, ReplyTo: before.Properties.ReplyTo},
			Headers:    before.Headers, Body: body, RoutingKey: before.Publish.RoutingKey,
		}, nil)
		if err != nil {
			t.Fatal(err)
		}
		plan, err := protocol.AfterSuccess(m, contexts[c.returned], protocol.Sender{Prepare: s.prepare})
		if err != nil || len(plan.FollowUps) != 1 {
			t.Fatalf("%s: %d follow-ups, %v", c.after, len(plan.FollowUps), err)
		}
		got := plan.FollowUps[0]
		var gotBody []json.RawMessage
		if err := json.Unmarshal(got.Publishing.Body, &gotBody); err != nil {
			t.Fatal(err)
		}
		spectest.Same(t, c.after+": body", gotBody, want.Body)
		if got.Queue != want.Publish.RoutingKey || *got.Publishing.Properties.Priority != want.Properties.Priority {
			t.Errorf("%s: queue %q, priority %d", c.after, got.Queue, *got.Publishing.Properties.Priority)
		}
		for _, name := range []string{"task", "id", "root_id", "parent_id", headerAffinity, headerQueue} {
			spectest.Same(t, c.after+": header "+name, got.Publishing.Headers[name], want.Headers[name])
		}
	}
}

func TestQueueOfAMessageWithoutAContext(t *testing.T) {
	t.Parallel()
	s := &Speckit{queues: codexQueues{shards: 3}}
	for headers, want := range map[string]string{
		`{"codex-queue": "codex-7", "codex-affinity": "x"}`:   "codex-7",
		`{"codex-affinity": "octo/widgets|014-refresh-docs"}`: "codex-2",
		`{}`:                            "",
		`{"codex-queue": 7}`:            "",
		`{"codex-queue": {"a": ["b"]}}`: "",
	} {
		signature := protocol.NewSignature(TaskSubmit, nil, nil, protocol.Member{Key: "headers", Value: json.RawMessage(headers)})
		for _, args := range [][]json.RawMessage{nil, {json.RawMessage("null")}, {json.RawMessage(`"text"`)}} {
			prepared, err := s.prepare(signature, args)
			if err != nil || prepared.Queue != want || !reflect.DeepEqual(prepared.Args, args) {
				t.Errorf("%s %s: %+v, %v, want queue %q", headers, args, prepared, err, want)
			}
		}
	}
}

func TestPythonJSON(t *testing.T) {
	t.Parallel()
	text := `{"a": "tab\t \"q\" \\ ü 😀 \u007f </x>", "n": 1.50, "list": [1, {"b": null}], "none": [], "empty": {}, "t": true}`
	o, err := parseObject(json.RawMessage(text))
	if err != nil {
		t.Fatal(err)
	}
	for indent, want := range map[bool]string{
		false: `{"a": "tab\t \"q\" \\ \u00fc \ud83d\ude00 \u007f </x>", "n": 1.50, "list": [1, {"b": null}], "none": [], "empty": {}, "t": true}`,
		true: "{\n  \"a\": \"tab\\t \\\"q\\\" \\\\ \\u00fc \\ud83d\\ude00 \\u007f </x>\",\n  \"n\": 1.50,\n  \"list\": [\n    1,\n    {\n      \"b\": null\n    }\n  ],\n" +
			"  \"none\": [],\n  \"empty\": {},\n  \"t\": true\n}",
	} {
		if got, err := o.python(indent); err != nil || got != want {
			t.Errorf("indent %v: got %s, %v\nwant %s", indent, got, err, want)
		}
	}
}
