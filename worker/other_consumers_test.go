package worker_test

import (
	"context"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// A running task can ask how many other consumers its queue has. The worker's own
// ones do not count; a delayed message adds one of these.
func TestOtherConsumers(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	p, through := workertest.NewProxy(t, r.url)
	cfg := r.config()
	cfg.Broker, cfg.Slots = through, 2
	w := newWorker(t, cfg)
	type answer struct {
		others int
		err    error
	}
	asks, answers := make(chan time.Duration), make(chan answer)
	w.Register("shop.asking", worker.HandlerFunc(func(ctx context.Context, task *worker.Task) (any, error) {
		for limit := range asks {
			ask, cancel := context.WithTimeout(ctx, limit)
			others, err := task.OtherConsumers(ask)
			answers <- answer{others, err}
			cancel()
		}
		return "done", nil
	}))
	w.Register("shop.later", worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) {
		return nil, worker.Reject{Requeue: true, After: time.Hour}
	}))
	registerShop(w)
	r.stop = workertest.Start(t, w)
	id := r.send(chainOf("shop.asking", "next-1"))
	others := func(limit time.Duration) answer {
		asks <- limit
		return receive(t, "the answer", answers)
	}
	consumers := func() int {
		t.Helper()
		ch, err := r.conn.Channel()
		if err != nil {
			t.Fatal(err)
		}
		defer ch.Close()
		q, err := ch.QueueDeclarePassive("orders", true, false, false, false, nil)
		if err != nil {
			t.Fatal(err)
		}
		return q.Consumers
	}
	if got := others(time.Minute); got != (answer{}) {
		t.Errorf("%v, want no other consumer", got)
	}
	r.send(chainOf("shop.later", "next-2"))
	eventually(t, "the worker has two consumers", func() bool { return consumers() == 2 })
	eventually(t, "there is no other consumer", func() bool { return others(time.Minute) == answer{} })

	ch, err := r.conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ch.Consume("orders", "another", false, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	if got := others(time.Minute); got != (answer{others: 1}) {
		t.Errorf("%v, want 1 other", got)
	}
	if got, err := w.QueueConsumers(t.Context(), "orders"); err != nil || got != (worker.QueueConsumers{Own: 2, Other: 1}) {
		t.Errorf("%+v, %v, want 2 of its own and 1 other", got, err)
	}
	if err := ch.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the other consumer has ended", func() bool { return others(time.Minute) == answer{} })

	p.Stall()
	for range 2 { // the second query waits for the first
		if got := others(300 * time.Millisecond); got.err == nil {
			t.Error("no error, although the broker cannot answer")
		}
	}
	p.Cut()
	if got := others(time.Minute); got.err == nil {
		t.Error("no error, although the connection is lost")
	}
	if got, err := w.QueueConsumers(t.Context(), "orders"); err == nil {
		t.Errorf("%+v and no error, although the connection is lost", got)
	}
	p.Restore()
	eventually(t, "there is no other consumer again", func() bool { return others(time.Minute) == answer{} })
	close(asks)
	r.result(id)
	r.result("next-1")
}
