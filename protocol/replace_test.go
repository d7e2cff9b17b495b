package protocol_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os/exec"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// replaced is a task that is replaced.
const (
	replacedPlain  = `{"callbacks": null, "errbacks": null, "chain": null, "chord": null}`
	replacedMember = `{"callbacks": [{"task": "shop.cb", "args": [1], "kwargs": {}, "options": {}, "subtask_type": null, "immutable": false}], "errbacks": null, "chain": [], "chord": null}`
	replacedFull   = `{"callbacks": [{"task": "shop.cb", "args": [1], "kwargs": {}, "options": {}, "subtask_type": null, "immutable": false}],
		"errbacks": [{"task": "shop.eb", "args": [], "kwargs": {}, "options": {"queue": "errors"}, "subtask_type": null, "immutable": true}],
		"chain": [{"task": "shop.last", "args": [], "kwargs": {}, "options": {"task_id": "last-id", "reply_to": "client"}, "subtask_type": null, "immutable": false},
			{"task": "shop.next", "args": [], "kwargs": {"a": 1}, "options": {"task_id": "next-id", "reply_to": "client"}, "subtask_type": null, "immutable": true}], "chord": null}`
)

func replacedTask(t *testing.T, embed string, headers map[string]any) *protocol.Message {
	t.Helper()
	all := map[string]any{
		"lang": "py", "task": "shop.add", "id": "own-id", "root_id": "root-id", "parent_id": nil, "group": nil, "retries": int32(0),
		"replaced_task_nesting": int32(0), "origin": "gen1@client", "timelimit": []any{nil, nil},
	}
	for name, value := range headers {
		all[name] = value
	}
	m, err := protocol.Decode(protocol.Delivery{
		Headers: all, Body: []byte(`[[1, 2], {}, ` + embed + `]`), RoutingKey: "orders",
		Properties: protocol.Properties{ContentType: "application/json", ContentEncoding: "utf-8", CorrelationID: "own-id", ReplyTo: "client"},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// signatures of replacements.
const (
	sigAdd   = `{"task": "shop.add", "args": [3, 4], "kwargs": {"z": 1}, "options": {}, "subtask_type": null, "immutable": false}`
	sigOpts  = `{"task": "shop.other", "args": [], "kwargs": {}, "options": {"queue": "q2", "priority": 7, "headers": {"x": 1}, "link": [{"task": "shop.own", "args": [], "kwargs": {}, "options": {}, "subtask_type": null, "immutable": false}], "link_error": {"task": "shop.eb", "args": [], "kwargs": {}, "options": {"queue": "errors"}, "subtask_type": null, "immutable": true}}, "subtask_type": null, "immutable": true}`
	sigChain = `{"task": "celery.chain", "args": [], "kwargs": {"tasks": [` + sigAdd + `, ` + sigOpts + `, {"task": "shop.mul", "args": [2], "kwargs": {}, "options": {}, "subtask_type": null, "immutable": false}]}, "options": {}, "subtask_type": "chain", "immutable": false}`
	sigLater = `{"task": "celery.chain", "args": [], "kwargs": {"tasks": [` + sigAdd + `, ` + sigAdd + `]}, "options": {"queue": "later", "priority": 3, "time_limit": 9}, "subtask_type": "chain", "immutable": false}`
	sigOne   = `{"task": "celery.chain", "args": [], "kwargs": {"tasks": [` + sigAdd + `]}, "options": {}, "subtask_type": "chain", "immutable": false}`
	sigStamp = `{"task": "shop.add", "args": [], "kwargs": {}, "options": {"tenant": "b", "stamped_headers": ["tenant"]}, "subtask_type": null, "immutable": false}`
	sigGroup = `{"task": "celery.group", "args": [], "kwargs": {"tasks": [` + sigAdd + `, ` + sigAdd + `]}, "options": {}, "subtask_type": "group", "immutable": false}`
	sigChord = `{"task": "shop.add", "args": [], "kwargs": {}, "options": {"chord": ` + sigAdd + `}, "subtask_type": null, "immutable": false}`
	sigEmpty = `{"task": "celery.chain", "args": [], "kwargs": {"tasks": []}, "options": {}, "subtask_type": "chain", "immutable": false}`
)

// madeID is a UUID. Ids that are made for the tasks of a replacement differ.
var madeID = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)

// The messages are equal to those of Task.replace in every header and in the body, except
// for the reply address, which Celery loses.
func TestReplaceEqualsPython(t *testing.T) {
	t.Parallel()
	type question struct {
		Headers   map[string]any  `json:"headers"`
		Body      json.RawMessage `json:"body"`
		ReplyTo   string          `json:"reply_to"`
		Signature json.RawMessage `json:"signature"`
		message   *protocol.Message
	}
	member := map[string]any{"group": "group-id", "group_index": int32(2), "replaced_task_nesting": int32(1), "retries": int32(2), "expires": "2999-01-01T00:00:00+00:00",
		"stamped_headers": []any{"tenant"}, "stamps": map[string]any{"tenant": "a"}, "x-own": "header", "timelimit": []any{int32(30), int32(20)}}
	var questions []question
	for embed, headers := range map[string]map[string]any{replacedPlain: nil, replacedFull: nil, replacedMember: member} {
		for _, s := range []string{sigAdd, sigOpts, sigChain, sigOne, sigStamp, sigLater} {
			if s == sigLater && embed == replacedFull {
				continue // Celery drops the options of a chain that others follow
			}
			m := replacedTask(t, embed, headers)
			questions = append(questions, question{m.Headers, json.RawMessage(`[[1, 2], {}, ` + embed + `]`), "client", json.RawMessage(s), m})
		}
	}
	for _, version := range []string{"5.4.0", "5.7.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			text, err := json.Marshal(questions)
			if err != nil {
				t.Fatal(err)
			}
			command := exec.CommandContext(t.Context(), devenv.Celery(t, version), "testdata/replace.py")
			command.Stdin = bytes.NewReader(text)
			var stderr strings.Builder
			command.Stderr = &stderr
			out, err := command.Output()
			if err != nil {
				t.Fatalf("%v: %s", err, stderr.String())
			}
			var answers []struct {
				Error      string
				Headers    map[string]any
				Properties map[string]any
				Body       any
			}
			if err := json.Unmarshal(out, &answers); err != nil || len(answers) != len(questions) {
				t.Fatalf("%d answers to %d questions: %v", len(answers), len(questions), err)
			}
			for i, q := range questions {
				s, err := protocol.ParseSignature(q.Signature)
				if err != nil {
					t.Fatal(err)
				}
				plan, err := protocol.ReplaceTask(q.message, s, protocol.Sender{ReplyTo: "worker", Origin: "gen1@worker"})
				if err != nil || answers[i].Error != "" || len(plan.FollowUps) != 1 {
					t.Fatalf("%s: %d messages, %v, Python: %s", q.Signature, len(plan.FollowUps), err, answers[i].Error)
				}
				got := plan.FollowUps[0].Publishing
				want := answers[i].Headers
				want["origin"] = "gen1@worker"
				delete(got.Headers, "ignore_result") // the worker knows it of its own tasks
				delete(want, "ignore_result")
				compare(t, string(q.Signature)+" headers", got.Headers, want)
				var body any
				if err := json.Unmarshal(got.Body, &body); err != nil {
					t.Fatal(err)
				}
				dropReplyTo(body)
				dropReplyTo(answers[i].Body)
				if version == "5.4.0" {
					linkOnce(answers[i].Body)
				}
				compare(t, string(q.Signature)+" body", body, answers[i].Body)
				if got.Properties.CorrelationID != answers[i].Properties["correlation_id"] && !madeID.MatchString(got.Properties.CorrelationID) {
					t.Errorf("correlation id %s, want %s", got.Properties.CorrelationID, answers[i].Properties["correlation_id"])
				}
				if got.TaskID == "own-id" && got.Properties.ReplyTo != "client" {
					t.Errorf("%s: reply to %s, want that of the replaced task", q.Signature, got.Properties.ReplyTo)
				}
			}
		})
	}
}

// linkOnce removes the second one of two equal callbacks: up to 5.6, Celery links the
// callbacks of a task twice to a chain that replaces it.
func linkOnce(value any) {
	switch v := value.(type) {
	case []any:
		for _, e := range v {
			linkOnce(e)
		}
	case map[string]any:
		for name, e := range v {
			if list, ok := e.([]any); ok && (name == "link" || name == "callbacks") && len(list) == 2 && reflect.DeepEqual(list[0], list[1]) {
				v[name] = list[:1]
			}
			linkOnce(e)
		}
	}
}

// dropReplyTo removes reply addresses, and options of Celery that are null.
func dropReplyTo(value any) {
	switch v := value.(type) {
	case []any:
		for _, e := range v {
			dropReplyTo(e)
		}
	case map[string]any:
		delete(v, "reply_to")
		if options, ok := v["options"].(map[string]any); ok {
			for name, option := range options {
				if option == nil || name == "root_id" {
					delete(options, name)
				}
			}
		}
		for _, e := range v {
			dropReplyTo(e)
		}
	}
}

func compare(t *testing.T, what string, got, want any) {
	t.Helper()
	text := func(v any) any {
		out, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		out = madeID.ReplaceAll(out, []byte("made"))
		var same any
		if err := json.Unmarshal(out, &same); err != nil {
			t.Fatal(err)
		}
		return same
	}
	if g, w := text(got), text(want); !reflect.DeepEqual(g, w) {
		a, _ := json.Marshal(g)
		b, _ := json.Marshal(w)
		t.Errorf("%s:\ngot  %s\nwant %s", what, a, b)
	}
}

func TestReplaceKeepsItsIDs(t *testing.T) {
	t.Parallel()
	s, err := protocol.ParseSignature(json.RawMessage(sigChain))
	if err != nil {
		t.Fatal(err)
	}
	m := replacedTask(t, replacedFull, nil)
	first, err := protocol.ReplaceTask(m, s, protocol.Sender{})
	if err != nil {
		t.Fatal(err)
	}
	again, err := protocol.ReplaceTask(m, s, protocol.Sender{})
	if err != nil || first.FollowUps[0].Publishing.TaskID != again.FollowUps[0].Publishing.TaskID || !bytes.Equal(first.FollowUps[0].Publishing.Body, again.FollowUps[0].Publishing.Body) {
		t.Errorf("the same replacement has other ids when it is published again: %v", err)
	}
	retried, replaced := *m, *m
	retried.Retries++
	replaced.ReplacedTaskNesting++
	for what, later := range map[string]*protocol.Message{"retry": &retried, "replacement": &replaced} {
		if other, err := protocol.ReplaceTask(later, s, protocol.Sender{}); err != nil || other.FollowUps[0].Publishing.TaskID == first.FollowUps[0].Publishing.TaskID {
			t.Errorf("the replacement of a %s has the ids of the first: %v", what, err)
		}
	}
}

func TestReplaceRefusesChords(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"group": sigGroup, "member": sigChord, "empty": sigEmpty,
		"chord":       `{"task": "celery.chord", "args": [], "kwargs": {"header": [], "body": ` + sigAdd + `}, "options": {}}`,
		"ends so":     `{"task": "celery.chain", "args": [], "kwargs": {"tasks": [` + sigAdd + `, ` + sigGroup + `]}, "options": {}}`,
		"link is bad": `{"task": "shop.add", "args": [], "kwargs": {}, "options": {"link": 5}}`,
	} {
		s, err := protocol.ParseSignature(json.RawMessage(text))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := protocol.ReplaceTask(replacedTask(t, replacedFull, nil), s, protocol.Sender{}); !errors.Is(err, protocol.ErrUnsupportedCanvas) {
			t.Errorf("%s: %v, want ErrUnsupportedCanvas", name, err)
		}
	}
}
