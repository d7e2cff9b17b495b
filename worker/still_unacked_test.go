package worker_test

import (
	"context"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// A running task can ask whether its message is still unacknowledged.
func TestStillUnacked(t *testing.T) {
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
	stillUnacked := func(limit time.Duration) error {
		t.Helper()
		asks <- limit
		return <-answers
	}
	for range 3 {
		if err := stillUnacked(20 * time.Second); err != nil {
			t.Errorf("%v, want no error", err)
		}
	}
	// The network is stalled: there is no answer.
	p.Stall()
	if err := stillUnacked(300 * time.Millisecond); err == nil {
		t.Error("no error, although the broker cannot answer")
	}
	// A blocked connection proves nothing either.
	if err := w.Block(); err != nil {
		t.Fatal(err)
	}
	if err := stillUnacked(300 * time.Millisecond); err == nil {
		t.Error("no error, although the connection is blocked")
	}
	// The connection is lost: the answer comes at once.
	p.Cut()
	if err := stillUnacked(20 * time.Second); err == nil {
		t.Error("no error, although the connection is lost")
	}
	// The message is delivered again and attached to the task.
	p.Restore()
	deadline := time.Now().Add(30 * time.Second)
	for stillUnacked(20*time.Second) != nil {
		if time.Now().After(deadline) {
			t.Fatal("still an error after the message was delivered again")
		}
	}
	close(asks)
	r.result(id)
	r.result("next-1")
}
