package orchestrator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

func TestMendingOf(t *testing.T) {
	t.Parallel()
	running := store.WorkspaceState{RunID: "r", RunStatus: store.RunRunning, RunGoesOn: true}
	with := func(change func(*store.WorkspaceState)) store.WorkspaceState {
		w := running
		change(&w)
		return w
	}
	for _, c := range []struct {
		name string
		seen store.WorkspaceState
		want mend
	}{
		{"nobody's, nobody waits", store.WorkspaceState{}, mendNothing},
		{"nobody's, somebody waits", store.WorkspaceState{Waiting: 1}, mendPass},
		{"the run was deleted", store.WorkspaceState{RunID: "r"}, mendPass},
		{"the run has ended", store.WorkspaceState{RunID: "r", RunStatus: store.RunSucceeded}, mendPass},
		{"between two steps", running, mendIdle},
		{"in a step", with(func(w *store.WorkspaceState) { w.Working = true }), mendNothing},
		{"its message is parked", with(func(w *store.WorkspaceState) { w.Parked = 1 }), mendNothing},
		{"others wait", with(func(w *store.WorkspaceState) { w.Waiting = 7 }), mendIdle},
		{"its rollback is to come", with(func(w *store.WorkspaceState) { w.RunStatus = store.RunFailed }), mendIdle},
		{"let in, not begun", with(func(w *store.WorkspaceState) { w.RunStatus = store.RunPending }), mendIdle},
		{"waits for approval", with(func(w *store.WorkspaceState) { w.RunStatus = store.RunAwaitingApproval }), mendNothing},
	} {
		if got := mendingOf(c.seen); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}

func TestWorkspaceOf(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(root, link); err != nil {
		t.Fatal(err)
	}
	elsewhere := t.TempDir()
	for _, c := range []struct{ plan, want string }{
		{`[{"name": "patch", "parameters": {"workspace": "."}}]`, root},
		{`[{"name": "patch"}, {"name": "build", "parameters": {"workspace": "sub/dir"}}]`, root},
		{`[{"name": "patch", "parameters": {"workspace": "` + link + `/sub"}}]`, root},
		{`[{"name": "rollback", "parameters": {"workspace": "` + elsewhere + `/"}}]`, elsewhere},
		{`[{"name": "patch", "parameters": {"workspace": "` + root + `x"}}]`, root + "x"},
		{`[{"name": "patch", "parameters": {"workspace": {"a": 1}}}]`, root},
		{`[{"name": "patch", "parameters": 7}]`, root},
		{`nonsense`, root},
		{``, root},
	} {
		for _, configured := range []string{root, link} {
			same(t, c.plan, workspaceOf("q", configured, store.Run{Steps: json.RawMessage(c.plan)}), "q:"+c.want)
		}
	}
}

func TestRunOf(t *testing.T) {
	t.Parallel()
	args := func(texts ...string) []json.RawMessage {
		var list []json.RawMessage
		for _, text := range texts {
			list = append(list, json.RawMessage(text))
		}
		return list
	}
	for _, c := range []struct {
		message protocol.Message
		want    string
	}{
		{protocol.Message{Task: TaskExecutePlanStep, Args: args(`"{5B0E}"`, `"build"`)}, "5b0e"},
		{protocol.Message{Task: TaskExecutePlanStep, Kwargs: protocol.Object{{Key: "run_id", Value: json.RawMessage(`"5b0e"`)}}}, "5b0e"},
		{protocol.Message{Task: TaskExecutePlanStep, Args: args(`7`)}, ""},
		{protocol.Message{Task: TaskExecutePlanStep}, ""},
		{protocol.Message{Task: TaskHealthCheck, Args: args(`"5b0e"`)}, ""},
	} {
		same(t, fmt.Sprintf("%s %s", c.message.Args, c.message.Kwargs), runOf(&c.message), c.want)
	}
}

func TestRollbackMessageIsOneThatCeleryReads(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.config.Node = "orchestrator@test"
	o, err := New(b.config)
	if err != nil {
		t.Fatal(err)
	}
	s := sweeper{Orchestrator: o}
	id, delivery, err := s.rollbackMessage(store.Run{ID: testRun}, "root", "parent")
	if err != nil {
		t.Fatal(err)
	}
	m, err := protocol.Decode(delivery, []string{"application/json"})
	if err != nil {
		t.Fatal(err)
	}
	if m.Version != 2 || m.Task != TaskExecutePlanStep || m.ID != id || m.RootID != "root" || m.ParentID != "parent" || m.Origin != "orchestrator@test" ||
		string(m.RawArgs) != `["`+testRun+`", "rollback"]` || m.Properties.Priority != nil || m.Properties.DeliveryMode != 2 || len(m.Embed.Errbacks)+len(m.Embed.Chain) > 0 {
		t.Errorf("%+v, args %s", m, m.RawArgs)
	}
	if again, _, _ := s.rollbackMessage(store.Run{ID: testRun}, "root", "parent"); again == id {
		t.Error("two rollbacks with one id")
	}
}

// fakeBroker takes messages until it has to refuse one.
type fakeBroker struct {
	published []protocol.Publishing
	refuse    string // a task id
}

func (f *fakeBroker) Publish(_ context.Context, m protocol.Publishing) error {
	if m.TaskID == f.refuse {
		return errors.New("broker is away")
	}
	f.published = append(f.published, m)
	return nil
}
func (f *fakeBroker) QueueDepth(context.Context, string) (int, error) { return 0, nil }
func (f *fakeBroker) InHand() []*protocol.Message                     { return nil }

func TestTheEndOfAStepPublishesWhatWaited(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.plan(`[{"name": "analyze"}]`)
	o, err := New(b.config)
	if err != nil {
		t.Fatal(err)
	}
	broker := &fakeBroker{refuse: "c"}
	o.broker = broker
	for i, id := range []string{"a", "b", "c", "d"} {
		b.steps.parked = append(b.steps.parked, store.ParkedMessage{ID: int64(i), RunID: testRun, Step: store.StepBuild, TaskID: id, Queue: "q", Body: []byte(id), Since: time.Now()})
	}
	b.steps.unpark = true
	if _, err := o.Execute(t.Context(), Request{RunID: testRun, Step: "analyze", TaskID: "t"}, nil); err != nil {
		t.Fatal(err)
	}
	var sent []string
	for _, m := range broker.published {
		sent = append(sent, m.RoutingKey+":"+m.Exchange+string(m.Body))
	}
	same(t, "published", strings.Join(sent, " "), "q:a q:b")
	same(t, "dropped, kept", fmt.Sprint(b.steps.dropped, b.steps.kept), "[0 1] [2 3]")
}
