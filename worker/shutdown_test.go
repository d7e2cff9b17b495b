package worker_test

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker/memory"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// lines collects log lines.
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

// running starts a worker. cancel ends the context of Run, whose result ended
// receives.
func running(t *testing.T, w *worker.Worker) (cancel func(), ended <-chan error) {
	t.Helper()
	ctx, cancelRun := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- w.Run(ctx) }()
	t.Cleanup(func() { cancelRun(); w.StopNow() })
	receive(t, "the worker starts", w.Started())
	return cancelRun, result
}

func TestWarmShutdownFinishesRunningTasksAndRequeuesTheRest(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	cfg.Queues = []string{"orders", "more"}
	w := newWorker(t, cfg)
	registerShop(w)
	g := newGatedTask()
	w.Register("shop.gated", g)
	cancel, ended := running(t, w)
	id := r.send(workertest.Message("orders", "shop.gated", nil, nil))
	receive(t, "the task begins", g.began)
	// The first waits for the only slot, the second for its ETA.
	r.send(workertest.Message("more", "shop.add", workertest.Args(1, 2), nil))
	r.send(workertest.Message("more", "shop.add", workertest.Args(1, 2), nil, workertest.Option("countdown", 60)))
	eventually(t, "both are delivered", func() bool { return w.Received() >= 2 })

	cancel()
	eventually(t, "both are requeued", func() bool { return r.depth("more") == 2 })
	select {
	case err := <-ended:
		t.Fatalf("Run returned %v while a task was running", err)
	default:
	}
	close(g.release)
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

func TestStopNowCancelsRunningTasksAndRequeuesThem(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
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
	w.StopNow() // a second call does nothing
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

func TestShutdownDoesNotWaitForAHandlerThatIgnoresIt(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	cfg.ShutdownTimeout = time.Millisecond
	cfg.StopTimeout = 50 * time.Millisecond
	w := newWorker(t, cfg)
	began, release := make(chan struct{}), make(chan struct{})
	w.Register("shop.stubborn", worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) {
		close(began)
		<-release
		return nil, nil
	}))
	cancel, ended := running(t, w)
	r.send(workertest.Message("orders", "shop.stubborn", nil, nil))
	receive(t, "the task begins", began)
	cancel()
	if err := receive(t, "the end of Run", ended); err != nil {
		t.Error(err)
	}
	close(release)
	if n := r.depth("orders"); n != 1 {
		t.Errorf("%d messages are in the queue, want 1", n)
	}
}

func TestShutdownWhileTheBrokerIsUnreachable(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	p, through := workertest.NewProxy(t, r.url)
	cfg := r.config()
	cfg.Broker = through
	w := newWorker(t, cfg)
	registerShop(w)
	g := newGatedTask()
	w.Register("shop.gated", g)
	cancel, ended := running(t, w)
	id := r.send(chainOf("shop.gated", "next-1"))
	receive(t, "the task begins", g.began)
	p.Cut()
	waitUnready(t, w)
	cancel()
	close(g.release)
	receive(t, "the task ends", g.ended)
	// The outcome is still recorded, on a connection that only publishes.
	p.Restore()
	if err := receive(t, "the end of Run", ended); err != nil {
		t.Error(err)
	}
	if row, _ := r.results.Find(id); row.State != protocol.StateSuccess {
		t.Errorf("the task is %q, want SUCCESS", row.State)
	}

	// An idle worker does not wait for a broker.
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

// A negative ShutdownTimeout means no wait, and the log says 0.
func TestShutdownWithoutWaiting(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	log := &lines{}
	config := r.config()
	config.ShutdownTimeout, config.Logger = -1, log.logger()
	w := newWorker(t, config)
	g := newGatedTask()
	w.Register("shop.gated", g)
	cancel, ended := running(t, w)
	cancel()
	if err := receive(t, "the worker ends", ended); err != nil {
		t.Error(err)
	}
	if text := log.text(); !strings.Contains(text, "at_most=0s") {
		t.Errorf("log: %s", text)
	}
}

// BeforeStopped runs at the end of a shutdown. It can publish, and the last log
// line has what it returns.
func TestBeforeStopped(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	var log lines
	cfg := r.config()
	cfg.Logger = log.logger()
	g := newGatedTask()
	calls := 0
	var w *worker.Worker
	cfg.BeforeStopped = func(ctx context.Context) []any {
		calls++
		if limit, ok := ctx.Deadline(); !ok || time.Until(limit) > 10*time.Second || len(w.Unacked()) != 0 {
			t.Errorf("deadline %v, unacknowledged %v", limit, w.Unacked())
		}
		if err := w.Publish(ctx, protocol.Publishing{TaskID: "t", RoutingKey: "orders", Body: []byte("x")}); err != nil {
			t.Error(err)
		}
		return []any{"returned", 1}
	}
	w = newWorker(t, cfg)
	w.Register("shop.gated", g)
	cancel, ended := running(t, w)
	r.send(workertest.Message("orders", "shop.gated", nil, nil))
	receive(t, "the task begins", g.began)
	cancel()
	close(g.release)
	if err := receive(t, "the end of Run", ended); err != nil {
		t.Error(err)
	}
	if calls != 1 || r.depth("orders") != 1 || !strings.Contains(log.text(), `msg="worker has stopped" returned=1`) {
		t.Errorf("%d calls, %d messages: %s", calls, r.depth("orders"), log.text())
	}
}

// The time of BeforeStopped is limited to what is left of the timeouts, to one
// second after StopNow, and to half a second when nothing is left.
func TestBeforeStoppedIsLimitedInTime(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		change func(*worker.Config)
		during func(*worker.Worker)
		want   time.Duration
	}{
		{"nothing is left", func(c *worker.Config) { c.ShutdownTimeout, c.StopTimeout = -1, time.Millisecond }, func(*worker.Worker) {}, 500 * time.Millisecond},
		{"little is left", func(c *worker.Config) { c.ShutdownTimeout, c.StopTimeout = -1, 3*time.Second }, func(*worker.Worker) {}, 3 * time.Second},
		{"much is left", func(c *worker.Config) { c.ShutdownTimeout = time.Hour }, func(*worker.Worker) {}, 10 * time.Second},
		{"second signal", func(c *worker.Config) { c.ShutdownTimeout = time.Hour }, func(w *worker.Worker) { w.StopNow() }, time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cfg := worker.Config{Transport: memory.New(), Queues: []string{"orders"}, Logger: workertest.Logger(t)}
				tt.change(&cfg)
				var took time.Duration
				var w *worker.Worker
				cfg.BeforeStopped = func(ctx context.Context) []any {
					tt.during(w)
					begin := time.Now()
					<-ctx.Done()
					took = time.Since(begin)
					return nil
				}
				w = newWorker(t, cfg)
				registerShop(w)
				cancel, ended := running(t, w)
				cancel()
				if err := receive(t, "the end of Run", ended); err != nil {
					t.Error(err)
				}
				if took != tt.want {
					t.Errorf("its context ended after %v, want %v", took, tt.want)
				}
			})
		})
	}
}

// StopNow ends Run within its timeouts, although the broker does not answer.
func TestStopNowDoesNotWaitForTheBroker(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	p, through := workertest.NewProxy(t, r.url)
	cfg := r.config()
	cfg.Broker, cfg.StopTimeout, cfg.Heartbeat = through, 100*time.Millisecond, time.Minute
	w := newWorker(t, cfg)
	registerShop(w)
	cancel, ended := running(t, w)
	p.Stall()
	cancel()
	w.StopNow()
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(15 * time.Second):
		t.Error("Run waits for the broker")
	}
	p.Cut()
}
