package worker_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// Each lost connection returns the messages that wait for their ETA or for a slot.
// Their queue's delivery limit drops none of them.
func TestWaitingMessagesOutliveTheDeliveryLimit(t *testing.T) {
	t.Parallel()
	const limit, cuts = 4, 10
	r, p, w, g, id := startBehindProxy(t, func(c *worker.Config) {
		limited(limit)(c)
		c.Prefetch = 20
	})
	delayed := r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil, workertest.Option("countdown", 3600)))
	next := r.send(workertest.Message("orders", "shop.add", workertest.Args(3, 4), nil))
	// A connection that lasts until the messages that are near the limit are replaced.
	waiting := func() bool {
		ids := map[string]bool{}
		for _, m := range w.Unacked() {
			count, _ := m.Headers["x-delivery-count"].(int64)
			ids[m.ID] = m.ID == id || count < limit/2
		}
		return w.Ready() == nil && ids[id] && ids[delayed] && ids[next] && r.depth("orders") == 0
	}
	for n := 1; n <= cuts; n++ {
		eventually(t, "all messages are with the worker", waiting)
		p.CutOnce()
		eventually(t, "the connection is lost", func() bool { return w.Reconnects() >= n })
	}
	eventually(t, "no message was dropped", waiting)
	close(g.release)
	for _, id := range []string{id, next} {
		if row := r.result(id); row.State != protocol.StateSuccess {
			t.Errorf("task %s is %s, want SUCCESS", id, row.State)
		}
	}
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	// A connection that is lost between a copy and its acknowledgement leaves both.
	remaining := 0
	for {
		d, ok, err := r.channel.Get("orders", true)
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			break
		}
		if remaining++; d.CorrelationId == id {
			t.Error("the finished task's message remains")
		}
	}
	if remaining == 0 {
		t.Error("the message that waits for its ETA is lost")
	}
}

// The message of a task that pauses is delivered again after a lost connection. It
// waits with the task and leaves room for other messages.
func TestPauseLeavesRoomAfterALostConnection(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	p, through := workertest.NewProxy(t, r.url)
	cfg := r.config()
	cfg.Broker = through
	w := newWorker(t, cfg)
	registerShop(w)
	w.Register("shop.later", worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) {
		return nil, worker.Reject{Requeue: true, After: time.Hour}
	}))
	workertest.Start(t, w)
	r.send(workertest.Message("orders", "shop.later", nil, nil))
	add := func() protocol.Publishing {
		return workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil)
	}
	r.result(r.send(add()))
	p.CutOnce()
	eventually(t, "the message is delivered again", func() bool { return w.Attached() >= 1 })
	r.result(r.send(add()))
}

// The messages of a queue start in the broker's order, however many goroutines read
// them.
func TestMessagesOfAQueueStartInOrder(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	cfg.Prefetch = 100
	w := newWorker(t, cfg)
	const messages = 300
	started := make(chan int, messages)
	worker.Handle(w, "shop.number", func(_ context.Context, in struct {
		N int `celery:"n"`
	}) (any, error) {
		started <- in.N
		return nil, nil
	})
	var body protocol.Publishing
	if _, err := r.channel.QueueDeclare("orders", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	for n := range messages {
		body = workertest.Message("orders", "shop.number", workertest.Args(n), nil)
		r.send(body)
	}
	workertest.Start(t, w)
	for n := range messages {
		if got := receive(t, "a start", started); got != n {
			t.Fatalf("message %d started in place of %d", got, n)
		}
	}
}

// A full queue does not keep the messages of another queue waiting.
func TestAFullQueueDoesNotStarveAnother(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	cfg.Queues, cfg.Prefetch = []string{"full", "other"}, 50
	w := newWorker(t, cfg)
	started, proceed := make(chan string), make(chan struct{})
	w.Register("shop.step", worker.HandlerFunc(func(_ context.Context, task *worker.Task) (any, error) {
		started <- task.Queue
		<-proceed
		return nil, nil
	}))
	t.Cleanup(func() { close(started) }) // after the end of the worker, whose tasks send to it
	workertest.Start(t, w)
	defer close(proceed)
	for range 20 {
		r.send(workertest.Message("full", "shop.step", nil, nil))
	}
	receive(t, "the first start", started)
	r.send(workertest.Message("other", "shop.step", nil, nil))
	eventually(t, "all are delivered", func() bool { return w.Received() == 21 })
	var order []string
	for range 2 {
		proceed <- struct{}{}
		order = append(order, receive(t, "a start", started))
	}
	if order[0] != "other" && order[1] != "other" {
		t.Errorf("tasks started from %v, want one of the other queue", order)
	}
	go func() {
		for range started {
		}
	}()
}

// A requeue after a pause counts as one return, so that even a delivery limit of 1
// drops nothing.
func TestRequeueAfterAPauseCountsOnce(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	limited(1)(&cfg)
	w := newWorker(t, cfg)
	var tries atomic.Int32
	w.Register("shop.later", worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) {
		if tries.Add(1) > 5 {
			return nil, nil
		}
		return nil, worker.Reject{Requeue: true, After: 10 * time.Millisecond}
	}))
	workertest.Start(t, w)
	r.result(r.send(workertest.Message("orders", "shop.later", nil, nil)))
}
