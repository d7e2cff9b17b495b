package orchestrator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

func TestRepairOf(t *testing.T) {
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
		want repair
	}{
		{"no holder, no run waits", store.WorkspaceState{}, repairNothing},
		{"no holder, a run waits", store.WorkspaceState{Waiting: true}, repairPass},
		{"the run was deleted", store.WorkspaceState{RunID: "r"}, repairPass},
		{"the run has ended", store.WorkspaceState{RunID: "r", RunStatus: store.RunSucceeded}, repairPass},
		{"between two steps", running, repairIdle},
		{"in a step", with(func(w *store.WorkspaceState) { w.Working = true }), repairNothing},
		{"its message is parked", with(func(w *store.WorkspaceState) { w.Parked = true }), repairNothing},
		{"its message is parked behind a step of it", with(func(w *store.WorkspaceState) { w.Parked, w.Blocked, w.Working = true, true, true }), repairNothing},
		{"its message is parked behind a dead worker", with(func(w *store.WorkspaceState) { w.Parked, w.Blocked = true, true }), repairIdle},
		{"others wait", with(func(w *store.WorkspaceState) { w.Waiting = true }), repairIdle},
		{"its rollback follows", with(func(w *store.WorkspaceState) { w.RunStatus = store.RunFailed }), repairIdle},
		{"granted the workspace, not begun", with(func(w *store.WorkspaceState) { w.RunStatus = store.RunPending }), repairIdle},
		{"waits for approval", with(func(w *store.WorkspaceState) { w.RunStatus = store.RunAwaitingApproval }), repairNothing},
	} {
		if got := repairOf(c.seen); got != c.want {
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
	const id = "5b0e6a52-3c1d-4f0e-9b7a-0123456789ab"
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
		{protocol.Message{Task: TaskExecutePlanStep, Args: args(`"{5B0E6A52-3C1D-4F0E-9B7A-0123456789AB}"`, `"build"`)}, id},
		{protocol.Message{Task: TaskExecutePlanStep, Kwargs: protocol.Object{{Key: "run_id", Value: json.RawMessage(`"5b0e6a523c1d4f0e9b7a0123456789ab"`)}}}, id},
		{protocol.Message{Task: TaskExecutePlanStep, Args: args(`"5b0e"`, `"build"`)}, ""},
		{protocol.Message{Task: TaskExecutePlanStep, Args: args(`7`)}, ""},
		{protocol.Message{Task: TaskExecutePlanStep}, ""},
		{protocol.Message{Task: TaskHealthCheck, Args: args(`"` + id + `"`)}, ""},
	} {
		same(t, fmt.Sprintf("%s %s", c.message.Args, c.message.Kwargs), runOf(&c.message), c.want)
	}
}

func TestRollbackMessageIsOneThatCeleryReads(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
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
		t.Error("two rollbacks have the same task id")
	}
}

// fakeBroker accepts messages until the one that it must refuse.
type fakeBroker struct {
	published []protocol.Publishing
	refuse    string // a task id
	consumers worker.QueueConsumers
	silent    bool // nobody knows who consumes the queue
}

func (f *fakeBroker) Publish(_ context.Context, m protocol.Publishing) error {
	if m.TaskID == f.refuse {
		return errors.New("broker is unavailable")
	}
	f.published = append(f.published, m)
	return nil
}
func (f *fakeBroker) RemoveReady(context.Context, string, bool, func([]protocol.Delivery) ([]bool, error)) (int, error) {
	return 0, nil
}
func (f *fakeBroker) QueueDepth(context.Context, string) (int, error) { return 0, nil }
func (f *fakeBroker) Unacked() []*protocol.Message                    { return nil }
func (f *fakeBroker) QueueConsumers(context.Context, string) (worker.QueueConsumers, error) {
	if f.silent {
		return worker.QueueConsumers{}, errors.New("broker is unavailable")
	}
	return f.consumers, nil
}

func TestTheEndOfAStepPublishesParkedMessages(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
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
	b.steps.parkedReady = true
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

// awaySteps is a database that does not answer when parked messages are kept.
type awaySteps struct{ *fakeSteps }

func (f awaySteps) KeepParked(ctx context.Context, id int64, sent bool) error {
	_ = f.fakeSteps.KeepParked(ctx, id, sent)
	retrying, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	<-retrying.Done()
	return errors.New("the database is unavailable")
}

// Broker and database may fail together. The end of a step, and the shutdown, do not wait
// for the database once for each message.
func TestParkedMessagesAreGivenBackTogether(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	for i := range int64(8) {
		b.steps.parked = append(b.steps.parked, store.ParkedMessage{ID: i, RunID: testRun, Step: store.StepBuild, TaskID: "refused", Queue: "q"})
	}
	b.config.Steps = awaySteps{b.steps}
	o, err := New(b.config)
	if err != nil {
		t.Fatal(err)
	}
	o.broker = &fakeBroker{refuse: "refused"}
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		err := o.publishParked(t.Context())
		same(t, "error", fmt.Sprint(err), "broker is unavailable\nthe database is unavailable")
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("it took %s", took)
		}
	})
	same(t, "kept", fmt.Sprint(b.steps.kept), "[0 1 2 3 4 5 6 7]")
}

// A consumer that is no worker of this program may have a message of any run, for
// any time.
func TestNoRunIsLostBesideForeignConsumers(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		// consumers are the broker's count, ours what other workers of this
		// program have noted.
		consumers worker.QueueConsumers
		ours      int
		silent    bool
		lost      bool
	}{
		{"alone", worker.QueueConsumers{Own: 1}, 0, false, true},
		{"a Python worker", worker.QueueConsumers{Own: 1, Other: 1}, 0, false, false},
		{"another worker of ours", worker.QueueConsumers{Own: 1, Other: 1}, 1, false, true},
		{"both", worker.QueueConsumers{Own: 2, Other: 3}, 2, false, false},
		{"a worker of ours has lost its broker", worker.QueueConsumers{Own: 1, Other: 1}, 2, false, false},
		{"the broker does not answer", worker.QueueConsumers{Own: 1}, 0, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := newTestEnv(t)
			var log strings.Builder
			b.config.Logger = slog.New(slog.NewTextHandler(&log, nil))
			o, err := New(b.config)
			if err != nil {
				t.Fatal(err)
			}
			o.broker = &fakeBroker{consumers: c.consumers, silent: c.silent}
			b.steps.consumers = c.ours
			b.steps.workspaces = []store.WorkspaceState{{Workspace: "w", RunID: testRun, RunStatus: store.RunRunning, RunGoesOn: true, Idle: time.Hour, Version: "1"}}
			synctest.Test(t, func(t *testing.T) {
				s := sweeper{Orchestrator: o, suspects: map[string]suspect{}}
				for range 3600 {
					if err := s.sweep(t.Context()); err != nil {
						t.Fatal(err)
					}
					time.Sleep(time.Second)
				}
			})
			if got := len(b.steps.lost) > 0; got != c.lost {
				t.Errorf("the run was lost: %t, want %t", got, c.lost)
			}
			logged := 0
			if !c.lost && !c.silent && c.consumers.Other > c.ours {
				logged = 1
			}
			if n := strings.Count(log.String(), "lost runs are not looked for"); n != logged || strings.Contains(log.String(), "looked for again") {
				t.Errorf("logged %d times, want %d:\n%s", n, logged, &log)
			}
		})
	}
}

// Every sign that somebody may have the run restarts the grace.
func TestLostRunsAreFoundAgain(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	var log strings.Builder
	b.config.Logger = slog.New(slog.NewTextHandler(&log, nil))
	o, err := New(b.config)
	if err != nil {
		t.Fatal(err)
	}
	broker := &fakeBroker{}
	o.broker = broker
	b.steps.workspaces = []store.WorkspaceState{{Workspace: "w", RunID: testRun, RunStatus: store.RunRunning, RunGoesOn: true, Idle: time.Hour, Version: "1"}}
	synctest.Test(t, func(t *testing.T) {
		s := sweeper{Orchestrator: o, suspects: map[string]suspect{}}
		sweep := func(d time.Duration) {
			t.Helper()
			for began := time.Now(); time.Since(began) < d; time.Sleep(time.Second) {
				if err := s.sweep(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
		}
		nearly := o.config.LostGrace - time.Second
		sweep(nearly)
		broker.consumers = worker.QueueConsumers{Own: 1, Other: 1}
		sweep(time.Second)
		broker.consumers.Other = 0
		sweep(nearly)
		b.steps.workspaces[0].Version = "2"
		sweep(nearly)
		broker.silent = true
		sweep(time.Second)
		broker.silent = false
		sweep(nearly)
		b.steps.workspaces[0].LongStep = true
		sweep(time.Second)
		b.steps.workspaces[0].LongStep = false
		sweep(nearly)
		if len(b.steps.lost) > 0 {
			t.Error("lost before the grace was over")
		}
		// A short difference is not logged: most likely a worker of ours has just
		// started.
		if log.Len() > 0 {
			t.Errorf("logged:\n%s", &log)
		}
		broker.consumers.Other = 2
		sweep(time.Hour)
		broker.consumers.Other = 0
		sweep(nearly)
		if len(b.steps.lost) > 0 {
			t.Error("lost too soon after the last foreign consumer has ended")
		}
		sweep(5 * time.Second)
		if len(b.steps.lost) == 0 {
			t.Error("not lost after the grace")
		}
	})
	for text, want := range map[string]int{"lost runs are not looked for": 1, "consumers=2": 1, "lost runs are looked for again": 1} {
		if n := strings.Count(log.String(), text); n != want {
			t.Errorf("%q is %d times in the log, want %d:\n%s", text, n, want, &log)
		}
	}
}
