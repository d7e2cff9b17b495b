package worker_test

import (
	"context"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// TestHeld: a running task can find out whether its message is still its own.
func TestHeld(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	p, through := workertest.NewProxy(t, r.url)
	cfg := r.config()
	cfg.Broker = through
	w := newWorker(t, cfg)
	asks, answers := make(chan time.Duration), make(chan error)
	w.Register("shop.asking", worker.HandlerFunc(func(ctx context.Context, task *worker.Task) (any, error) {
		for limit := range asks {
			ask, cancel := context.WithTimeout(ctx, limit)
			answers <- task.StillUnacked(ask)
			cancel()
		}
		return "done", nil
	}))
	registerShop(w)
	r.stop = workertest.Start(t, w)
	id := r.send(chainOf("shop.asking", "next-1"))
	held := func(limit time.Duration) error {
		t.Helper()
		asks <- limit
		return <-answers
	}
	for range 3 {
		if err := held(20 * time.Second); err != nil {
			t.Errorf("%v, want held", err)
		}
	}
	// Silent: there is no answer.
	p.Stall()
	if err := held(300 * time.Millisecond); err == nil {
		t.Error("held, though the broker cannot answer")
	}
	// A broker that reads nothing for a while proves nothing either.
	if err := w.Block(); err != nil {
		t.Fatal(err)
	}
	if err := held(300 * time.Millisecond); err == nil {
		t.Error("held, though the broker was not asked")
	}
	// Lost: it is known at once.
	p.Cut()
	if err := held(20 * time.Second); err == nil {
		t.Error("held, though the connection is lost")
	}
	// The message comes again and joins the task.
	p.Restore()
	deadline := time.Now().Add(30 * time.Second)
	for held(20*time.Second) != nil {
		if time.Now().After(deadline) {
			t.Fatal("the message was delivered again, and is not held")
		}
	}
	close(asks)
	r.result(id)
	r.result("next-1")
}
