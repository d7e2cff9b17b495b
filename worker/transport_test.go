package worker_test

import (
	"context"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/client"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker/memory"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// newMemoryEnv returns a worker with another broker than RabbitMQ, and a client.
func newMemoryEnv(t *testing.T, change func(*worker.Config)) (*memory.Broker, *worker.Worker, *client.Client, *workertest.Results) {
	t.Helper()
	b, results := memory.New(), &workertest.Results{}
	cfg := worker.Config{Transport: b, Queues: []string{"orders"}, Node: "w1@shop", Slots: 2, Results: results, Logger: workertest.Logger(t)}
	if change != nil {
		change(&cfg)
	}
	w := newWorker(t, cfg)
	c, err := client.New(client.FromWorker(cfg))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return b, w, c, results
}

// A chain, a retry with a pause, an ETA, a message that is requeued, one that nobody
// has registered, and a group run to their ends: the engine needs nothing of RabbitMQ.
func TestAWorkerRunsOnAnotherBroker(t *testing.T) {
	t.Parallel()
	_, w, c, results := newMemoryEnv(t, func(cfg *worker.Config) { cfg.DeadLetterQueue = "dead" })
	registerShop(w)
	first := true
	w.Register("shop.again", worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) {
		if first {
			first = false
			return nil, worker.Reject{Requeue: true, After: 10 * time.Millisecond}
		}
		return "done", nil
	}))
	workertest.Start(t, w)
	send := func(s client.Signature, options ...client.Option) *client.Result {
		t.Helper()
		result, err := c.Send(t.Context(), s, options...)
		if err != nil {
			t.Fatal(err)
		}
		return result
	}
	sum := func(r *client.Result) (n int) {
		t.Helper()
		if err := r.Get(t.Context(), &n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	chain := send(client.Chain(client.Task("shop.add", 1, 2), client.Task("shop.add", 3), client.Task("shop.add", 4)))
	if got := sum(chain); got != 10 {
		t.Errorf("the chain gives %d, want 10", got)
	}
	if got := sum(send(client.Task("shop.add", 1, 1), client.Countdown(20*time.Millisecond))); got != 2 {
		t.Errorf("a delayed task gives %d, want 2", got)
	}
	retried := send(client.Task("shop.retry", 0))
	if err := retried.Get(t.Context(), nil); err == nil || len(results.History(retried.ID)) != 3 {
		t.Errorf("a task with 2 retries ends with %v after %v", err, results.History(retried.ID))
	}
	var done string
	if err := send(client.Task("shop.again")).Get(t.Context(), &done); err != nil || done != "done" {
		t.Errorf("a requeued task gives %q, %v", done, err)
	}
	if err := send(client.Task("shop.unknown")).Get(t.Context(), nil); err == nil {
		t.Error("a task that nobody has registered succeeds")
	}
	eventually(t, "its message is in the dead-letter queue", func() bool {
		n, err := w.QueueDepth(t.Context(), "dead")
		return n == 1 && err == nil
	})
	if found, err := w.QueueConsumers(t.Context(), "orders"); err != nil || found != (worker.QueueConsumers{Own: 1}) {
		t.Errorf("consumers: %+v, %v, want one of the worker's", found, err)
	}
	if found, err := w.Inspect(t.Context()); err != nil || len(found.Queues) != 1 || !found.Queues[0].Exists || found.Queues[0].Err != nil {
		t.Errorf("inspection: %+v, %v", found, err)
	}
}

// A task continues when its connection is lost, and the message that comes again joins
// it. At a shutdown, messages that wait go back.
func TestLostConnectionsAndShutdownOnAnotherBroker(t *testing.T) {
	t.Parallel()
	b, w, c, results := newMemoryEnv(t, func(cfg *worker.Config) { cfg.Slots, cfg.Prefetch = 1, 4 })
	started, proceed := make(chan struct{}), make(chan struct{})
	w.Register("shop.slow", worker.HandlerFunc(func(ctx context.Context, task *worker.Task) (any, error) {
		started <- struct{}{}
		select {
		case <-proceed:
			return "done", task.StillUnacked(ctx)
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}))
	stop := workertest.Start(t, w)
	slow, err := c.Send(t.Context(), client.Task("shop.slow"))
	if err != nil {
		t.Fatal(err)
	}
	receive(t, "the task begins", started)
	b.Disconnect()
	eventually(t, "the message joins its task", func() bool { return w.Attached() == 1 })
	for range 3 {
		if _, err := c.Send(t.Context(), client.Task("shop.slow")); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "three messages wait", func() bool { return len(w.Unacked()) == 4 })
	proceed <- struct{}{}
	if row, err := results.WaitState(t.Context(), slow.ID); err != nil || row.State != protocol.StateSuccess || string(row.Value) != `"done"` {
		t.Errorf("%+v, %v", row, err)
	}
	receive(t, "the next one begins", started)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	consumer, err := b.OpenConsumer(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer consumer.Close()
	if n, err := consumer.Depth(t.Context(), "orders"); n != 3 || err != nil {
		t.Errorf("%d messages are in the queue again, %v; want the one that was interrupted and the two that waited", n, err)
	}
}
