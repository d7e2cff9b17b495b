package worker_test

import (
	"bytes"
	"context"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// lines keeps what is logged.
type lines struct {
	mu     sync.Mutex
	buffer bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buffer.Write(p)
}

func (l *lines) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

func (l *lines) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buffer.String()
}

// running starts a worker whose Run and end the test controls itself.
func running(t *testing.T, w *worker.Worker) (cancel func(), ended <-chan error) {
	t.Helper()
	ctx, cancelRun := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- w.Run(ctx) }()
	t.Cleanup(func() { cancelRun(); w.StopNow() })
	receive(t, "the worker starts", w.Started())
	return cancelRun, result
}

func TestWarmShutdownFinishesWhatRunsAndReturnsTheRest(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	cfg := r.config()
	cfg.Queues = []string{"orders", "more"}
	w := newWorker(t, cfg)
	registerShop(w)
	g := newGated()
	w.Register("shop.gated", g)
	cancel, ended := running(t, w)
	id := r.send(workertest.Message("orders", "shop.gated", nil, nil))
	receive(t, "the task begins", g.began)
	// Waits for the only slot, in this process.
	r.send(workertest.Message("more", "shop.add", workertest.Args(1, 2), nil))
	r.send(workertest.Message("more", "shop.add", workertest.Args(1, 2), nil, workertest.Option("countdown", 60)))
	eventually(t, "both are delivered", func() bool { return w.Received() >= 2 })

	cancel()
	eventually(t, "what has not begun is back", func() bool { return r.depth("more") == 2 })
	select {
	case err := <-ended:
		t.Fatalf("Run returned %v while a task was running", err)
	default:
	}
	close(g.let)
	if err := receive(t, "the end of Run", ended); err != nil {
		t.Error(err)
	}
	if row, _ := r.results.Find(id); row.State != protocol.StateSuccess {
		t.Errorf("the running task is %q, want SUCCESS", row.State)
	}
	if n := r.depth("orders"); n != 0 {
		t.Errorf("the finished task was not acknowledged: %d messages", n)
	}
}

func TestStopNowCancelsWhatRunsAndReturnsIt(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	w := newWorker(t, r.config())
	causes := make(chan error, 1)
	began := make(chan struct{})
	w.Register("shop.wait", worker.HandlerFunc(func(ctx context.Context, _ *worker.Task) (any, error) {
		close(began)
		<-ctx.Done()
		causes <- context.Cause(ctx)
		return nil, ctx.Err()
	}))
	cancel, ended := running(t, w)
	id := r.send(workertest.Message("orders", "shop.wait", nil, nil))
	receive(t, "the task begins", began)
	cancel()
	w.StopNow()
	w.StopNow() // again does nothing
	if cause := receive(t, "the task's context ends", causes); cause != worker.ErrShutdown {
		t.Errorf("cause is %v, want ErrShutdown", cause)
	}
	if err := receive(t, "the end of Run", ended); err != nil {
		t.Error(err)
	}
	if _, stored := r.results.Find(id); stored {
		t.Error("an interrupted task has a result")
	}
	if n := r.depth("orders"); n != 1 {
		t.Errorf("%d messages are in the queue, want the interrupted one", n)
	}
}

func TestShutdownDoesNotWaitForAStubbornHandler(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	cfg := r.config()
	cfg.ShutdownTimeout = time.Millisecond
	cfg.StopTimeout = 50 * time.Millisecond
	w := newWorker(t, cfg)
	began, let := make(chan struct{}), make(chan struct{})
	w.Register("shop.stubborn", worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) {
		close(began)
		<-let
		return nil, nil
	}))
	cancel, ended := running(t, w)
	r.send(workertest.Message("orders", "shop.stubborn", nil, nil))
	receive(t, "the task begins", began)
	cancel()
	if err := receive(t, "the end of Run", ended); err != nil {
		t.Error(err)
	}
	close(let)
	if n := r.depth("orders"); n != 1 {
		t.Errorf("%d messages are in the queue, want 1", n)
	}
}

func TestShutdownWhileTheBrokerIsAway(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	p, through := workertest.NewProxy(t, r.url)
	cfg := r.config()
	cfg.Broker = through
	w := newWorker(t, cfg)
	registerShop(w)
	g := newGated()
	w.Register("shop.gated", g)
	cancel, ended := running(t, w)
	id := r.send(chainOf("shop.gated", "next-1"))
	receive(t, "the task begins", g.began)
	p.Cut()
	waitUnready(t, w)
	cancel()
	close(g.let)
	receive(t, "the task ends", g.ended)
	// Finished work is recorded even now, on a connection that only publishes.
	p.Restore()
	if err := receive(t, "the end of Run", ended); err != nil {
		t.Error(err)
	}
	if row, _ := r.results.Find(id); row.State != protocol.StateSuccess {
		t.Errorf("the task is %q, want SUCCESS", row.State)
	}

	// And an idle worker does not wait for a broker.
	p.Restore()
	w = newWorker(t, cfg)
	registerShop(w)
	cancel, ended = running(t, w)
	r.result("next-1")
	p.Cut()
	waitUnready(t, w)
	cancel()
	w.StopNow()
	receive(t, "the end of Run without a broker", ended)
}
