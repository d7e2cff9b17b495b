package worker_test

import (
	"bytes"
	"context"
	"errors"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/results"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// When a handler keeps its delivery and publishes it later, the new message is
// byte for byte the same.
func TestADeliveryCanBePublishedAgain(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	w := newWorker(t, r.config())
	deliveries := make(chan protocol.Delivery, 2)
	w.Register("shop.keep", worker.HandlerFunc(func(ctx context.Context, task *worker.Task) (any, error) {
		if n := len(w.Unacked()); n == 0 {
			t.Error("Unacked is empty while a task runs")
		}
		deliveries <- task.Delivery
		return nil, worker.Ignore
	}))
	stop := workertest.Start(t, w)
	message := workertest.Message("orders", "shop.keep", workertest.Args("ä", 1.5), workertest.Kwargs(map[string]any{"k": nil}))
	message.Headers["own"] = map[string]any{"list": []any{nil, true, int64(1) << 40, "text"}, "bytes": []byte{0, 255}}
	message.Body = bytes.Replace(message.Body, []byte("1.5"), []byte("1.50 "), 1)
	r.send(message)
	first := receive(t, "delivery", deliveries)
	again := protocol.Publishing{RoutingKey: "orders", Headers: first.Headers, Properties: first.Properties, Body: first.Body}
	// Properties that Celery does not set.
	again.Properties.MessageID, again.Properties.Type, again.Properties.AppID = "m", "t", "a"
	again.Properties.Timestamp = time.Date(2026, 2, 22, 12, 0, 1, 0, time.UTC)
	first.Properties = again.Properties
	if err := w.Publish(t.Context(), again); err != nil {
		t.Fatal(err)
	}
	second := receive(t, "second delivery", deliveries)
	if !reflect.DeepEqual(first, second) || !bytes.Equal(second.Body, message.Body) {
		t.Errorf("got %+v\nthen %+v", first, second)
	}
	again.RoutingKey = "nowhere"
	again.Properties.CorrelationID = ""
	if err := w.Publish(t.Context(), again); !errors.Is(err, worker.ErrUnroutable) {
		t.Errorf("to no queue: %v", err)
	}
	again.Exchange = "none"
	if err := w.Publish(t.Context(), again); !errors.Is(err, worker.ErrUnroutable) {
		t.Errorf("to no exchange: %v", err)
	}
	if n, err := w.QueueDepth(t.Context(), "orders"); n != 0 || err != nil {
		t.Errorf("depth %d, %v", n, err)
	}
	if _, err := w.QueueDepth(t.Context(), "nowhere"); !errors.Is(err, worker.ErrMismatch) || strings.Contains(err.Error(), "Passive") {
		t.Errorf("depth of no queue: %v", err)
	}
	if err := w.Health(); err != nil {
		t.Error(err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if n := len(w.Unacked()); n != 0 {
		t.Errorf("%d unacknowledged messages at the end", n)
	}
}

// A handler keeps its message and returns Ignore. When the same message is
// published again, it runs: while the first call still runs, and later, even with
// the broker's redelivered flag.
func TestMessageRunsAgainAfterIgnore(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	config := r.config()
	config.Slots = 2
	w := newWorker(t, config)
	calls, proceed := make(chan *worker.Task), make(chan error)
	w.Register("shop.keep", worker.HandlerFunc(func(ctx context.Context, task *worker.Task) (any, error) {
		calls <- task
		return nil, <-proceed
	}))
	workertest.Start(t, w)
	message := workertest.Message("orders", "shop.keep", nil, nil)
	id := r.send(message)
	receive(t, "first call", calls)
	attached := w.Attached()
	r.send(message)
	eventually(t, "the copy is attached", func() bool { return w.Attached() > attached })
	proceed <- worker.Ignore
	receive(t, "second call, of the copy", calls)
	proceed <- worker.Ignore
	eventually(t, "both are acknowledged", func() bool { return r.depth("orders") == 0 && len(w.Unacked()) == 0 })

	r.send(message)
	receive(t, "third call", calls)
	if err := w.BreakChannel(); err != nil {
		t.Fatal(err)
	}
	reconnects := w.Reconnects()
	eventually(t, "the channel is lost", func() bool { return w.Reconnects() > reconnects || w.Reconnects() > 0 })
	proceed <- worker.Ignore
	if task := receive(t, "fourth call, redelivered", calls); !task.Redelivered {
		t.Error("not redelivered")
	}
	proceed <- nil
	if row := r.result(id); row.State != protocol.StateSuccess {
		t.Errorf("%+v", row)
	}
}

// A producer sends a message again after its task has ended, and this time the
// handler requeues it. The broker then marks it as redelivered, which must not
// make it a repetition of the message that ended.
func TestMessageSentAgainRunsAfterItsRequeue(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	w := newWorker(t, r.config())
	calls, proceed := make(chan *worker.Task), make(chan error)
	w.Register("shop.again", worker.HandlerFunc(func(ctx context.Context, task *worker.Task) (any, error) {
		calls <- task
		return nil, <-proceed
	}))
	workertest.Start(t, w)
	message := workertest.Message("orders", "shop.again", nil, nil)
	r.send(message)
	receive(t, "first message", calls)
	proceed <- nil
	eventually(t, "the first message is acknowledged", func() bool { return r.depth("orders") == 0 && len(w.Unacked()) == 0 })
	r.send(message)
	receive(t, "second message", calls)
	proceed <- worker.Reject{Requeue: true}
	if task := receive(t, "second message, requeued", calls); !task.Redelivered {
		t.Error("not redelivered")
	}
	proceed <- nil
}

// A message that is sent again after the end of its task runs, also if its connection is
// lost while it waits: what comes back then is no repetition of the task that has ended.
func TestMessageSentAgainRunsAfterALostConnection(t *testing.T) {
	t.Parallel()
	b, w, _, stored := newMemoryEnv(t, func(cfg *worker.Config) { cfg.Slots, cfg.Prefetch = 1, 4 })
	g := newGatedTask()
	w.Register("shop.gated", g)
	var runs atomic.Int32
	worker.Handle(w, "shop.again", func(context.Context, noArgs) (int32, error) { return runs.Add(1), nil })
	workertest.Start(t, w)
	send := func(m protocol.Publishing) string {
		t.Helper()
		if err := w.Publish(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		return m.TaskID
	}
	message := workertest.Message("orders", "shop.again", nil, nil)
	if _, err := stored.WaitState(t.Context(), send(message)); err != nil {
		t.Fatal(err)
	}
	send(workertest.Message("orders", "shop.gated", nil, nil))
	receive(t, "another task has the slot", g.began)
	send(message)
	eventually(t, "the message waits", func() bool { return len(w.Unacked()) == 2 })
	b.Disconnect()
	eventually(t, "the worker consumes again", func() bool { return w.Reconnects() == 1 && w.Attached() > 0 })
	close(g.release)
	eventually(t, "the message runs, or is taken for a repetition", func() bool { return runs.Load() == 2 || w.Attached() > 1 })
	if n := runs.Load(); n != 2 {
		t.Errorf("the message that was sent twice ran %d times", n)
	}
}

// A message that is sent again may wait in another worker that stops, which requeues it. The
// worker that has run the first one runs it: its own cannot come again.
func TestMessageSentAgainRunsAfterAnotherWorkerHasStopped(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	w := newWorker(t, r.config())
	calls := make(chan *worker.Task)
	w.Register("shop.again", worker.HandlerFunc(func(ctx context.Context, task *worker.Task) (any, error) {
		calls <- task
		return nil, nil
	}))
	workertest.Start(t, w)
	message := workertest.Message("orders", "shop.again", nil, nil)
	r.send(message)
	receive(t, "first message", calls)
	eventually(t, "the first message is acknowledged", func() bool { return r.depth("orders") == 0 && len(w.Unacked()) == 0 })
	other := r.dial()
	channel, err := other.Channel()
	if err != nil {
		t.Fatal(err)
	}
	held, err := channel.Consume("orders", "other", false, false, false, false, amqp.Table{"x-priority": 10})
	if err != nil {
		t.Fatal(err)
	}
	r.send(message)
	receive(t, "second message, in the other worker", held)
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	if task := receive(t, "second message", calls); !task.Redelivered {
		t.Error("not redelivered")
	}
}

// A dead letter that an operator moves back runs, also if it was the copy of another
// message: it is no copy of what has become the dead letter.
func TestDeadLetterThatIsMovedBackRuns(t *testing.T) {
	t.Parallel()
	b, w, _, stored := newMemoryEnv(t, func(cfg *worker.Config) { cfg.DeadLetterQueue = "dead" })
	worker.Handle(w, "shop.add", add, worker.MaxStarts(1))
	// The worker of a first start has died.
	if _, err := stored.CountStart(t.Context(), results.Start{TaskID: "died", Attempt: "0.0"}); err != nil {
		t.Fatal(err)
	}
	workertest.Start(t, w)
	message := workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil, workertest.Option("task_id", "died"))
	message.Headers[worker.HeaderCopy] = true
	if err := w.Publish(t.Context(), message); err != nil {
		t.Fatal(err)
	}
	if row, err := stored.WaitState(t.Context(), "died"); err != nil || row.State != protocol.StateFailure {
		t.Fatalf("%+v, %v", row, err)
	}
	// It is acknowledged when it is a dead letter.
	eventually(t, "the task ends", func() bool { return len(w.Unacked()) == 0 })
	consumer, err := b.OpenConsumer(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer consumer.Close()
	letter, _, ok, err := consumer.(broker.Getter).Get(t.Context(), broker.Queue{Name: "dead"})
	if !ok || err != nil {
		t.Fatal(ok, err)
	}
	again := protocol.Publishing{RoutingKey: "orders", Headers: letter.Message.Headers, Properties: letter.Message.Properties, Body: letter.Message.Body}
	if err := w.Publish(t.Context(), again); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it runs, or is taken for a repetition", func() bool {
		row, _ := stored.Find("died")
		return row.State == protocol.StateSuccess || w.Attached() > 0
	})
	if row, _ := stored.Find("died"); row.State != protocol.StateSuccess {
		t.Errorf("the task is still %s", row.State)
	}
}

// Messages that can never run go to the dead-letter queue.
func TestDeadLetterQueue(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	config := r.config()
	config.DeadLetterQueue = "orders.dead"
	w := newWorker(t, config)
	worker.Handle(w, "shop.add", add)
	workertest.Start(t, w)
	undecodable := amqp.Publishing{
		Headers: amqp.Table{"task": "shop.add", "id": "a", "own": "x"}, ContentType: "application/json", ContentEncoding: "utf-8",
		Expiration: "60000", Body: []byte("[[1"),
	}
	if err := r.channel.PublishWithContext(t.Context(), "", "orders", false, false, undecodable); err != nil {
		t.Fatal(err)
	}
	stranger := r.send(workertest.Message("orders", "shop.unknown", nil, nil))
	good := r.send(workertest.Message("orders", "shop.add", workertest.Args(2, 3), nil))
	r.result(good)
	eventually(t, "both are dead letters", func() bool {
		n, err := w.QueueDepth(t.Context(), "orders.dead")
		return err == nil && n == 2
	})
	got := map[string]amqp.Delivery{}
	for range 2 {
		d, ok, err := r.channel.Get("orders.dead", true)
		if !ok || err != nil {
			t.Fatal(ok, err)
		}
		id, _ := d.Headers["id"].(string)
		got[id] = d
	}
	bad := got["a"]
	if string(bad.Body) != "[[1" || bad.Headers["own"] != "x" || bad.Expiration != "" || bad.DeliveryMode != amqp.Persistent ||
		bad.Headers[worker.HeaderQueue] != "orders" || bad.Headers[worker.HeaderReason] == "" {
		t.Errorf("%+v", bad)
	}
	if reason, _ := got[stranger].Headers[worker.HeaderReason].(string); !contains(reason, "shop.unknown") {
		t.Errorf("%+v", got[stranger])
	}
	if row := r.result(stranger); row.State != protocol.StateFailure {
		t.Errorf("%+v", row)
	}
	if n := r.depth("orders"); n != 0 {
		t.Errorf("%d messages remain", n)
	}
}
