package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// stoppable is a worker that a test stops in order, and whose Leave it observes.
type stoppable struct {
	stop func()
	// attributes is what Leave has returned; valid after stop.
	attributes []any
}

// stoppable starts a worker that sweeps, and calls Leave when it stops.
func (r *liveEnv) stoppable(t *testing.T, name string) *stoppable {
	t.Helper()
	s := r.db.Open(t, func(c *store.Config) { c.Worker = name })
	config := r.config
	config.Steps, config.Node, config.Logger = s, name, workertest.Logger(t)
	o, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	l := &stoppable{}
	w, err := worker.New(worker.Config{Broker: r.url, Queues: []string{"q"}, Node: name + "@test", Logger: workertest.Logger(t),
		BeforeStopped: func(ctx context.Context) []any {
			l.attributes = o.Leave(ctx)
			return l.attributes
		}})
	if err != nil {
		t.Fatal(err)
	}
	o.Register(w)
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	group.Go(func() {
		if err := w.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	group.Go(func() {
		<-w.Started()
		o.Sweep(ctx)
	})
	<-w.Started()
	l.stop = sync.OnceFunc(func() { cancel(); group.Wait(); s.Close() })
	t.Cleanup(l.stop)
	r.await(t, "worker "+name+" is registered", func() bool {
		return r.count(t, fmt.Sprintf(`SELECT count(*) AS n FROM mm_orchestrator.workers WHERE node = '%s'`, name)) == 1
	})
	return l
}

// drainQueue takes all messages of the queue q and returns their task ids, oldest
// first.
func (r *liveEnv) drainQueue(t *testing.T) (ids []string) {
	t.Helper()
	conn, err := amqp.Dial(r.url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	for {
		m, ok, err := ch.Get("q", true)
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			return ids
		}
		id, _ := m.Headers["id"].(string)
		ids = append(ids, id)
	}
}

func (r *liveEnv) consumers(t *testing.T) int {
	t.Helper()
	conn, err := amqp.Dial(r.url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	q, err := ch.QueueDeclarePassive("q", true, false, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	return q.Consumers
}

// submitNine starts one run that holds the workspace, and parks eight that wait.
func (r *liveEnv) submitNine(t *testing.T) (waiting []string) {
	t.Helper()
	r.create(t, "first", "normal", "")
	r.mark(t, "hold-first-build")
	r.publish(r.chain(t, "first", "build", "restart"))
	r.await(t, "the first run begins", func() bool { return len(r.ledger()) == 1 })
	for i := range 8 {
		name, priority := fmt.Sprint("n", i), "normal"
		if i%4 == 3 {
			name, priority = fmt.Sprint("h", i), "high"
		}
		r.create(t, name, priority, "")
		r.publish(r.chain(t, name, "build", "restart"))
	}
	return []string{"h3-build", "h7-build", "n0-build", "n1-build", "n2-build", "n4-build", "n5-build", "n6-build"}
}

const parkedCount = `SELECT count(*) AS n FROM mm_orchestrator.parked`

// When the only worker of a queue stops, it returns every parked message to the
// queue, in the order of turns, and frees the workspaces.
func TestTheLastWorkerReturnsParkedMessages(t *testing.T) {
	t.Parallel()
	r := newLiveEnv(t)
	w := r.stoppable(t, "only")
	want := r.submitNine(t)
	// The worker's slot is busy, so it takes no further message. A second worker
	// parks them, and stops first.
	second := r.stoppable(t, "second")
	r.await(t, "eight wait", func() bool { return r.count(t, parkedCount) == 8 })
	second.stop()
	if got := fmt.Sprint(second.attributes...); got != fmt.Sprint("parked", 8, "left_to", []string{"only"}) {
		t.Errorf("the first worker to stop returns %q", got)
	}
	if got := r.count(t, parkedCount); got != 8 {
		t.Errorf("%d messages are parked after one of two workers has stopped", got)
	}
	r.endBuildDuringStop(t, "first", w)
	if got := fmt.Sprint(w.attributes...); got != "returned8" {
		t.Errorf("the last worker returns %q", got)
	}
	got := r.drainQueue(t)
	// The next message of the first run was in the queue before the others.
	same(t, "messages", strings.Join(got, " "), strings.Join(append([]string{"first-restart"}, want...), " "))
	if n := r.count(t, parkedCount); n != 0 {
		t.Errorf("%d messages are still parked", n)
	}
	if rows := r.db.Rows(t, `SELECT run_id FROM mm_orchestrator.holds WHERE run_id IS NOT NULL`); len(rows) != 1 || rows[0]["run_id"] != r.names["first"] {
		t.Errorf("holds %v, want only that of the run that has not ended", rows)
	}
	if rows := r.db.Rows(t, `SELECT node FROM mm_orchestrator.workers`); len(rows) != 0 {
		t.Errorf("workers %v", rows)
	}
}

// endBuildDuringStop lets a blocked build end while its worker stops.
func (r *liveEnv) endBuildDuringStop(t *testing.T, name string, w *stoppable) {
	t.Helper()
	stopped := make(chan struct{})
	go func() { w.stop(); close(stopped) }()
	r.await(t, "the queue has no consumer", func() bool { return r.consumers(t) == 0 })
	r.clear(t, "hold-"+name+"-build")
	<-stopped
}

// Of workers that stop at the same time, exactly one returns the parked messages.
func TestWorkersThatStopTogetherReturnParkedMessages(t *testing.T) {
	t.Parallel()
	r := newLiveEnv(t)
	workers := []*stoppable{r.stoppable(t, "one"), r.stoppable(t, "two"), r.stoppable(t, "three")}
	want := r.submitNine(t)
	r.await(t, "eight wait", func() bool { return r.count(t, parkedCount) == 8 })
	var group sync.WaitGroup
	for _, w := range workers {
		group.Go(w.stop)
	}
	r.clear(t, "hold-first-build")
	group.Wait()
	got := r.drainQueue(t)
	// Whether the first run's next step began before the stop depends on timing.
	got = slices.DeleteFunc(got, func(id string) bool { return id == "first-restart" })
	slices.Sort(got)
	slices.Sort(want)
	same(t, "messages", strings.Join(got, " "), strings.Join(want, " "))
}

// After a restart of the only worker, all messages are in the queue. A run between
// two steps still keeps its workspace: no waiting run begins before it ends.
func TestNoRunBeginsBetweenStepsOfAnotherAfterARestart(t *testing.T) {
	t.Parallel()
	r := newLiveEnv(t)
	first := r.stoppable(t, "before")
	second := r.stoppable(t, "helper")
	r.submitNine(t)
	r.await(t, "eight wait", func() bool { return r.count(t, parkedCount) == 8 })
	second.stop()
	// The message of its next step is published after those that are returned.
	r.endBuildDuringStop(t, "first", first)
	ids := r.drainQueue(t)
	if len(ids) != 9 {
		t.Fatalf("messages %q", ids)
	}
	for i := range 8 {
		name := []string{"n0", "n1", "n2", "h3", "n4", "n5", "n6", "h7"}[i]
		r.publish(r.chain(t, name, "build", "restart"))
	}
	r.publish(r.chain(t, "first", "restart"))
	r.stoppable(t, "after")
	r.await(t, "all end", func() bool { return r.count(t, unfinished) == 0 })
	order := r.checkTurns(t)
	if len(order) != 9 || order[0] != "first" {
		t.Errorf("order %q", order)
	}
}

// If the broker is unavailable when the last worker stops, messages stay parked and
// the log says what to do.
func TestLeaveWithoutABroker(t *testing.T) {
	t.Parallel()
	for name, broker := range map[string]unavailableBroker{"lost before": {}, "lost meanwhile": {looks: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newTestEnv(t)
			b.steps.departure = store.Departure{Parked: 2}
			b.steps.parked = []store.ParkedMessage{{ID: 7, TaskID: "t"}, {ID: 8, TaskID: "u"}}
			o, err := New(b.config)
			if err != nil {
				t.Fatal(err)
			}
			o.broker = broker
			if got := fmt.Sprint(o.Leave(t.Context())...); got != fmt.Sprint("returned", 0, "parked", 2) {
				t.Errorf("attributes %q", got)
			}
			if text := b.logged.String(); !strings.Contains(text, "mm-orchestrator parked return") || !strings.Contains(text, "no broker") || strings.Count(text, "\n") != 1 {
				t.Errorf("log %q", text)
			}
			if len(b.steps.dropped) != 0 {
				t.Errorf("dropped %v", b.steps.dropped)
			}
		})
	}
}

type unavailableBroker struct {
	Broker
	// looks says that the queue can still be looked at.
	looks bool
}

func (unavailableBroker) Publish(context.Context, protocol.Publishing) error {
	return errors.New("no broker")
}

func (b unavailableBroker) RemoveReady(context.Context, string, bool, func([]protocol.Delivery) ([]bool, error)) (int, error) {
	if b.looks {
		return 0, nil
	}
	return 0, errors.New("no broker")
}

// RabbitMQ would route the message by CC again.
func TestParkedMessageIsPublishedToItsQueueAlone(t *testing.T) {
	t.Parallel()
	parked := store.ParkedMessage{Queue: "q", Headers: map[string]any{"CC": []any{"other"}, "id": "a"}}
	if m := publishingOf(parked); m.RoutingKey != "q" || m.Exchange != "" || len(m.Headers) != 1 || len(parked.Headers) != 2 {
		t.Errorf("%+v of %+v", m, parked)
	}
}
