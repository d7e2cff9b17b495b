package protocol_test

import (
	"bytes"
	"encoding/json"
	"math"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// canvas is a chain or group with options of its own.
func canvas(kind, tasks, options string) string {
	return `{"task": "celery.` + kind + `", "args": [], "kwargs": {"tasks": [` + tasks + `]}, "options": {` + options + `}, "subtask_type": "` + kind + `", "immutable": false}`
}

func immutable(signature string) string {
	return strings.TrimSuffix(signature, `"immutable": false}`) + `"immutable": true}`
}

// What a worker sends for chains and groups with options of their own is equal to what
// Celery's sends, in every header and in the body, and goes to the same queue.
func TestOptionsOfCanvasEqualPython(t *testing.T) {
	t.Parallel()
	const delayed = `"queue": "slow", "countdown": 600, "headers": {"x": 1}, "time_limit": 30, "shadow": "name"`
	a, b := task("shop.a", `"task_id": "A"`), task("shop.b", `"task_id": "B", "queue": "own", "priority": 4, "countdown": 100`)
	fixed := immutable(task("shop.f", `"task_id": "F"`))
	stamped := task("shop.s", `"task_id": "S", "tenant": "own", "stamped_headers": ["tenant"]`)
	stamps := `"tenant": "around", "stamped_headers": ["tenant"]`
	link := `"link": [` + task("shop.cb", `"task_id": "CB"`) + `]`
	linkError := `"link_error": [` + task("shop.eb", `"task_id": "EB"`) + `]`
	group := func(options string) string {
		return canvas("group", a+","+b+","+fixed, strings.TrimSuffix(`"task_id": "G", `+options, ", "))
	}
	chain := func(options string) string { return canvas("chain", a+","+b, options) }

	bodies := map[string]string{}
	add := func(name, member, list string) { bodies[name] = `[[1], {}, {"` + member + `": [` + list + `]}]` }
	for name, list := range map[string]string{
		"a group":                           group(delayed + `, "expires": 900, "priority": 9`),
		"a group with stamps":               canvas("group", a+","+stamped, `"task_id": "G", `+stamps),
		"a group of groups":                 canvas("group", canvas("group", a, `"task_id": "H", "queue": "inner"`)+","+b, `"task_id": "G", `+delayed),
		"a group of a chain":                canvas("group", chain(`"queue": "inner", "countdown": 300, "shadow": "c"`)+","+fixed, `"task_id": "G", "countdown": 600`),
		"a group of an immutable chain":     canvas("group", fixed+","+immutable(chain(`"queue": "inner"`)), `"task_id": "G"`),
		"a group with nulls":                group(`"queue": null, "root_id": null, "parent_id": null`),
		"a chain":                           chain(delayed + `, "priority": 9`),
		"a chain with stamps":               canvas("chain", stamped+","+a, stamps),
		"an immutable chain":                immutable(chain(delayed)),
		"a chain whose first has a queue":   canvas("chain", b+","+a, delayed),
		"a chain in a chain":                canvas("chain", chain(`"queue": "inner"`)+","+fixed, `"countdown": 600`),
		"a chain of a group":                canvas("chain", canvas("group", fixed+","+immutable(b), `"task_id": "G", "queue": "inner"`), `"countdown": 600, "queue": "outer"`),
		"a chain with links":                chain(link + ", " + linkError),
		"a chain that ends in a group":      canvas("chain", a+","+group(`"queue": "inner"`), `"queue": "outer"`),
		"a chain of a group, and its error": canvas("chain", canvas("group", fixed+","+immutable(b), `"task_id": "G"`), linkError),
	} {
		add(name, "callbacks", list)
		add(name+", next", "chain", list)
		if !strings.Contains(name, "chain") || !strings.Contains(name, "of a group") && !strings.Contains(name, "ends in a group") {
			add(name+", with another", "callbacks", list+","+task("shop.other", `"task_id": "O"`))
		}
		if !strings.Contains(name, "chain") {
			// Celery calls a chain with the failed task's request, and not as a task.
			add(name+", after a failure", "errbacks", list)
		}
	}
	var questions []map[string]any
	var names []string
	for name, body := range bodies {
		headers := map[string]any{"lang": "py", "task": "shop.add", "id": "own-id", "root_id": "root-id", "parent_id": nil, "group": nil, "retries": int32(0), "origin": "gen1@client", "timelimit": []any{nil, nil}}
		if strings.HasSuffix(name, "failure") {
			headers["task"] = "shop.fail"
		}
		questions = append(questions, map[string]any{"headers": headers, "body": json.RawMessage(body)})
		names = append(names, name)
	}
	for _, version := range []string{"5.4.0", "5.7.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			text, err := json.Marshal(questions)
			if err != nil {
				t.Fatal(err)
			}
			command := exec.CommandContext(t.Context(), devenv.Celery(t, version), "testdata/followups.py")
			command.Stdin = bytes.NewReader(text)
			var stderr strings.Builder
			command.Stderr = &stderr
			out, err := command.Output()
			if err != nil {
				t.Fatalf("%v: %s", err, stderr.String())
			}
			type message struct {
				Headers    map[string]any
				Body       any
				Queue      string
				RoutingKey string `json:"routing_key"`
				Priority   int
			}
			var answers [][]message
			if err := json.Unmarshal(out, &answers); err != nil || len(answers) != len(questions) {
				t.Fatalf("%d answers to %d questions: %v", len(answers), len(questions), err)
			}
			for i, name := range names {
				m, err := protocol.Decode(protocol.Delivery{
					Headers: questions[i]["headers"].(map[string]any), Body: []byte(bodies[name]),
					Properties: protocol.Properties{ContentType: "application/json", ContentEncoding: "utf-8", CorrelationID: "own-id"},
				}, nil)
				if err != nil {
					t.Fatal(err)
				}
				now := time.Now()
				sender := protocol.Sender{Origin: "gen1@worker", Now: now}
				plan, err := protocol.AfterSuccess(m, json.RawMessage(`"value"`), sender)
				if strings.HasSuffix(name, "failure") {
					plan, err = protocol.AfterFailure(m, sender)
				}
				if err != nil || len(plan.FollowUps) != len(answers[i]) {
					t.Errorf("%s: %d messages, %v; Python sends %d", name, len(plan.FollowUps), err, len(answers[i]))
					continue
				}
				for j, want := range answers[i] {
					f := plan.FollowUps[j]
					got := message{Headers: f.Publishing.Headers, Queue: f.Destination.Queue, RoutingKey: f.Destination.RoutingKey}
					if priority := f.Publishing.Properties.Priority; priority != nil {
						got.Priority = int(*priority)
					}
					for _, header := range []string{"eta", "expires"} {
						if text, ok := got.Headers[header].(string); ok {
							at, err := protocol.ParseTime(text)
							if err != nil {
								t.Fatal(err)
							}
							got.Headers[header] = math.Round(at.Sub(now).Seconds()/100) * 100
						}
					}
					for _, of := range []map[string]any{got.Headers, want.Headers} {
						delete(of, "ignore_result") // the worker knows it of its own tasks
						delete(of, "origin")
					}
					if err := json.Unmarshal(f.Publishing.Body, &got.Body); err != nil {
						t.Fatal(err)
					}
					if want.Queue == "celery" {
						want.Queue = "" // the default queue: that of this worker is not known here
					}
					dropAgain(want.Body)
					dropReplyTo(got.Body)
					dropReplyTo(want.Body)
					compare(t, name, got, want)
				}
			}
		})
	}
}

// dropAgain removes options of signatures that the worker that applies them writes again,
// or ignores: the index in a group, and the flag immutable of an error callback.
func dropAgain(value any) {
	switch v := value.(type) {
	case []any:
		for _, e := range v {
			dropAgain(e)
		}
	case map[string]any:
		if options, ok := v["options"].(map[string]any); ok {
			delete(options, "immutable")
			if options["group_id"] == nil {
				delete(options, "group_index")
			}
		}
		for _, e := range v {
			dropAgain(e)
		}
	}
}
