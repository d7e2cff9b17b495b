package protocol_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// planned decodes a task with this embed and plans what follows success.
func planned(t *testing.T, embed string) (protocol.Plan, error) {
	t.Helper()
	m, err := protocol.Decode(delivery(`[[], {}, `+embed+`]`), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := protocol.CheckCanvas(m); err != nil {
		return protocol.Plan{}, err
	}
	return protocol.AfterSuccess(m, json.RawMessage(`"r"`), protocol.Sender{NewID: freshIDs(), ReplyTo: "ours"})
}

// sent shows each follow-up as "task id group/index body".
func sent(plan protocol.Plan) []string {
	var out []string
	for _, f := range plan.FollowUps {
		h := f.Publishing.Headers
		out = append(out, fmt.Sprintf("%v %v %v/%v %s", h["task"], h["id"], h["group"], h["group_index"], f.Publishing.Body))
	}
	return out
}

func task(name, options string) string {
	return `{"task": "` + name + `", "args": [], "kwargs": {}, "options": {` + options + `}, "subtask_type": null, "immutable": false}`
}

func TestPlanCanvas(t *testing.T) {
	t.Parallel()
	const none = `"callbacks": null, "errbacks": null`
	a, b, c := task("a", ""), task("b", `"task_id": "B"`), task("c", `"task_id": "C"`)
	for name, test := range map[string]struct {
		embed    string
		want     []string
		children string
	}{
		"nothing": {embed: `{}`},
		"empty":   {embed: `{"callbacks": [], "chain": [], "errbacks": []}`},
		"an empty group": {
			embed:    `{"callbacks": [{"task": "celery.group", "kwargs": {"tasks": []}, "options": {"task_id": "G"}}]}`,
			children: `[[["G", null], []]]`,
		},
		"a chain of one": {
			embed:    `{"chain": [` + b + `]}`,
			want:     []string{`b B <nil>/<nil> [["r"], {}, {` + none + `, "chain": [], "chord": null}]`},
			children: `[[["B", null], null]]`,
		},
		"callback before chain": {
			embed: `{"callbacks": [` + a + `], "chain": [` + c + `, ` + b + `]}`,
			want: []string{
				`a new-1 <nil>/<nil> [["r"], {}, {` + none + `, "chain": null, "chord": null}]`,
				`b B <nil>/<nil> [["r"], {}, {` + none + `, "chain": [` + c + `], "chord": null}]`,
			},
			children: `[[["new-1", null], null], [["B", null], null]]`,
		},
		"a group among callbacks goes first": {
			embed: `{"callbacks": [` + a + `, {"task": "celery.group", "kwargs": {"tasks": [` + b + `]}, "options": {"task_id": "G"}}, ` + c + `]}`,
			want: []string{
				`b B G/0 [["r"], {}, {` + none + `, "chain": null, "chord": null}]`,
				`a new-2 new-1/0 [["r"], {}, {` + none + `, "chain": null, "chord": null}]`,
				`c C new-1/1 [["r"], {}, {` + none + `, "chain": null, "chord": null}]`,
			},
			children: `[[["G", null], [[["B", null], null]]], [["new-1", null], [[["new-2", null], null], [["C", null], null]]]]`,
		},
		"a chain in a chain is flattened": {
			embed: `{"chain": [` + c + `, {"task": "celery.chain", "kwargs": {"tasks": [` + b + `, ` + task("d", `"task_id": "D"`) + `]}, "options": {}}]}`,
			want: []string{
				`b B <nil>/<nil> [["r"], {}, {` + none + `, "chain": [` + c + `, ` + task("d", `"task_id": "D"`) + `], "chord": null}]`,
			},
			children: `[[["B", null], null]]`,
		},
		"a chain as callback gets ids, and its own links": {
			embed: `{"callbacks": [{"task": "celery.chain", "kwargs": {"tasks": [` + a + `, ` + a + `]}, "options": {"link": [{"task": "l"}], "link_error": {"task": "e"}, "task_id": "Z"}}]}`,
			want: []string{
				`a new-1 <nil>/<nil> [["r"], {}, {"callbacks": null, "errbacks": [{"task": "e"}], "chain": [` +
					task("a", `"task_id": "Z", "link_error": [{"task": "e"}], "link": [{"task": "l"}]`) + `], "chord": null}]`,
			},
			children: `[[["new-1", null], null]]`,
		},
		"a chain in a group": {
			embed: `{"callbacks": [{"task": "celery.group", "kwargs": {"tasks": [{"task": "celery.chain", "kwargs": {"tasks": [` + b + `, ` + c + `]}}]}, "options": {"task_id": "G"}}]}`,
			want: []string{
				`b B <nil>/<nil> [["r"], {}, {` + none + `, "chain": [` + task("c", `"task_id": "C", "group_id": "G", "group_index": 0`) + `], "chord": null}]`,
			},
			children: `[[["G", null], [[["C", [["B", null], null]], null]]]]`,
		},
	} {
		plan, err := planned(t, test.embed)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := sent(plan); !reflect.DeepEqual(got, test.want) {
			t.Errorf("%s:\ngot  %s\nwant %s", name, strings.Join(got, "\n     "), strings.Join(test.want, "\n     "))
		}
		if string(plan.Children) != test.children {
			t.Errorf("%s: children %s, want %s", name, plan.Children, test.children)
		}
	}
}

// The row of a task names a long chain in a group without becoming unreadable.
func TestChildrenOfALongChainInAGroup(t *testing.T) {
	t.Parallel()
	var steps []string
	for i := range 1000 {
		steps = append(steps, task("a", fmt.Sprintf(`"task_id": "%d"`, i)))
	}
	plan, err := planned(t, `{"callbacks": [{"task": "celery.group", "kwargs": {"tasks": [{"task": "celery.chain", "kwargs": {"tasks": [`+strings.Join(steps, ", ")+`]}}]}, "options": {"task_id": "G"}}]}`)
	if err != nil {
		t.Fatal(err)
	}
	var children any
	if err := protocol.DecodeJSON(plan.Children, &children); err != nil || !strings.HasPrefix(string(plan.Children), `[[["G", null], [[["999", [["998", `) {
		t.Errorf("%.60s: %v", plan.Children, err)
	}
}

// CheckCanvas refuses follow-ups that cannot be started, and names the reason.
func TestCheckCanvasRefuses(t *testing.T) {
	t.Parallel()
	a, group := task("a", `"task_id": "A"`), `{"task": "celery.group", "kwargs": {"tasks": [{"task": "b"}]}, "options": {}}`
	chord := `{"task": "celery.chord", "kwargs": {"header": [], "body": {"task": "sum", "options": {"task_id": "S"}}}, "options": {"task_id": "X"}}`
	for name, embed := range map[string]string{
		"part of a chord":                       `{"chord": ` + a + `}`,
		"chord as next step":                    `{"chain": [` + chord + `]}`,
		"chord as a later step":                 `{"chain": [` + chord + `, ` + a + `, ` + a + `]}`,
		"chord as callback":                     `{"callbacks": [` + chord + `]}`,
		"chord as errback":                      `{"errbacks": [` + chord + `]}`,
		"chord in a chain":                      `{"chain": [{"task": "celery.chain", "kwargs": {"tasks": [` + a + `, ` + chord + `]}}]}`,
		"a task after a group":                  `{"chain": [` + a + `, ` + group + `]}`,
		"a task after a group, as a later step": `{"chain": [` + a + `, ` + group + `, ` + a + `]}`,
		"a step that is part of a chord":        `{"chain": [` + task("a", `"chord": {"task": "b"}`) + `, ` + a + `]}`,
		"a group of chords":                     `{"callbacks": [{"task": "celery.group", "kwargs": {"tasks": [` + chord + `]}}]}`,
		"an empty chain":                        `{"callbacks": [{"task": "celery.chain", "kwargs": {"tasks": []}}]}`,
		"tasks of a chain not an array":         `{"callbacks": [{"task": "celery.chain", "kwargs": {"tasks": 1}}]}`,
		"nested too deeply":                     `{"callbacks": [` + strings.Repeat(`{"task": "celery.group", "kwargs": {"tasks": [`, 40) + a + strings.Repeat(`]}}`, 40) + `]}`,
		"options that make no message":          `{"errbacks": [` + task("a", `"serializer": "pickle"`) + `]}`,
	} {
		_, err := planned(t, embed)
		var canvas *protocol.CanvasError
		if !errors.As(err, &canvas) || !errors.Is(err, protocol.ErrUnsupportedCanvas) || canvas.TaskID != "9a6bb585" {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if e := canvas.Exception(); e.Module != "builtins" || e.Type != "NotImplementedError" || len(e.Args) != 1 {
			t.Errorf("%s: exception %+v", name, e)
		}
	}
	// LaterSteps lists them nevertheless: the steps after a chord, its body and
	// the members of a group; also the body of a chord that the task, or the end of its
	// chain, is a member of.
	members := `{"task": "celery.group", "kwargs": {"tasks": [{"task": "b", "options": {"task_id": "B"}}]}, "options": {"task_id": "G"}}`
	body := `{"task": "celery.group", "kwargs": {"tasks": [` + task("c", `"task_id": "C"`) + `]}, "options": {"task_id": "H"}}`
	for embed, want := range map[string][]string{
		`{"chain": [` + members + `, ` + a + `, ` + chord + `]}`:           {"G celery.group", "A a", "X celery.chord", "B b", "S sum"},
		`{"chord": ` + body + `}`:                                          {"H celery.group", "C c"},
		`{"chain": [` + task("a", `"task_id": "A", "chord": `+body) + `]}`: {"A a", "H celery.group", "C c"},
	} {
		m, err := protocol.Decode(delivery(`[[], {}, `+embed+`]`), nil)
		if err != nil {
			t.Fatal(err)
		}
		var ids []string
		for _, step := range protocol.LaterSteps(m) {
			ids = append(ids, step.TaskID+" "+step.Task)
		}
		if !reflect.DeepEqual(ids, want) {
			t.Errorf("later steps %q, want %q", ids, want)
		}
	}
}

func TestInheritPriority(t *testing.T) {
	t.Parallel()
	seven := uint8(7)
	d := delivery(`[[], {}, {"chain": [` + task("a", `"task_id": "A"`) + `]}]`)
	d.Properties.Priority = &seven
	m, err := protocol.Decode(d, nil)
	if err != nil {
		t.Fatal(err)
	}
	for inherit, want := range map[bool]uint8{false: 0, true: 7} {
		plan, err := protocol.AfterSuccess(m, nil, protocol.Sender{InheritPriority: inherit})
		if err != nil || *plan.FollowUps[0].Publishing.Properties.Priority != want {
			t.Errorf("inherit %v: %+v, %v", inherit, plan.FollowUps, err)
		}
	}
}

// The follow-ups of a task have the same ids each time its message is
// delivered, and no other task's follow-ups have these ids.
func TestIDsOfFollowUpsAreTheSameEachTime(t *testing.T) {
	t.Parallel()
	ids := func(id, embed string) []string {
		m, err := protocol.Decode(delivery(`[[], {}, `+embed+`]`), nil)
		if err != nil {
			t.Fatal(err)
		}
		m.ID = id
		success, err := protocol.AfterSuccess(m, json.RawMessage(`1`), protocol.Sender{})
		if err != nil {
			t.Fatal(err)
		}
		failure, err := protocol.AfterFailure(m, protocol.Sender{})
		if err != nil {
			t.Fatal(err)
		}
		var ids []string
		for _, f := range append(success.FollowUps, failure.FollowUps...) {
			ids = append(ids, f.Publishing.TaskID)
		}
		return ids
	}
	both := func(callback string) string {
		list := "[" + task(callback, "") + "," + task(callback, "") + "]"
		return `{"callbacks": ` + list + `, "errbacks": ` + list + `, "chain": [` + task("last", "") + "," + task("next", "") + `], "chord": null}`
	}
	first := ids("one", both("a"))
	if again := ids("one", both("a")); len(first) != 5 || !reflect.DeepEqual(first, again) {
		t.Errorf("ids are %v, then %v", first, again)
	}
	seen := map[string]bool{}
	for _, id := range slices.Concat(first, ids("two", both("a")), ids("one", both("b"))) {
		if seen[id] {
			t.Errorf("id %s comes twice", id)
		}
		if seen[id] = true; !uuidForm.MatchString(id) {
			t.Errorf("id %q is no UUID of version 5", id)
		}
	}
}

var uuidForm = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-5[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
