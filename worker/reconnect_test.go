package worker_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// gatedTask is a handler that signals its beginning and waits for release.
type gatedTask struct {
	began   chan string
	release chan struct{}
	ended   chan string
	runs    atomic.Int32
}

func newGatedTask() *gatedTask {
	return &gatedTask{began: make(chan string, 100), release: make(chan struct{}), ended: make(chan string, 100)}
}

func (g *gatedTask) Handle(ctx context.Context, task *worker.Task) (any, error) {
	g.runs.Add(1)
	g.began <- task.ID
	defer func() { g.ended <- task.ID }()
	select {
	case <-g.release:
		return "done", nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// chainOf returns the message of a chain: task, then shop.add(1, 2) with the id
// nextID.
func chainOf(task, nextID string) protocol.Publishing {
	next := protocol.NewSignature("shop.add", workertest.Args(1, 2), nil, workertest.Option("task_id", nextID))
	immutable := []byte(`{"task": "shop.add", "args": [1, 2], "kwargs": {}, "options": {"task_id": "` + nextID + `"}, "subtask_type": null, "immutable": true}`)
	if parsed, err := protocol.ParseSignature(immutable); err == nil {
		next = parsed
	}
	signature := protocol.NewSignature(task, nil, nil)
	m, _, err := signature.Apply(protocol.ApplyOptions{Chain: []protocol.Signature{next}, ReplyTo: "r", Origin: "gen1@test", Now: time.Now()})
	if err != nil {
		panic(err)
	}
	m.RoutingKey = "orders"
	return m
}

// startBehindProxy starts a worker behind a proxy, and a gatedTask that runs.
func startBehindProxy(t *testing.T, change func(*worker.Config)) (r *testEnv, p *workertest.Proxy, w *worker.Worker, g *gatedTask, id string) {
	r = newTestEnv(t)
	p, through := workertest.NewProxy(t, r.url)
	cfg := r.config()
	cfg.Broker = through
	cfg.Heartbeat = time.Second
	if change != nil {
		change(&cfg)
	}
	w = newWorker(t, cfg)
	registerShop(w)
	g = newGatedTask()
	w.Register("shop.gated", g)
	r.stop = workertest.Start(t, w)
	id = r.send(chainOf("shop.gated", "next-1"))
	receive(t, "the task begins", g.began)
	return r, p, w, g, id
}

// expectRecordedOnce expects that the task ran once, was recorded with its
// follow-up, and was acknowledged. It stops the worker.
func expectRecordedOnce(t *testing.T, r *testEnv, g *gatedTask, id string) {
	t.Helper()
	if row := r.result(id); row.State != protocol.StateSuccess {
		t.Errorf("task is %s, want SUCCESS", row.State)
	}
	r.result("next-1")
	if n := g.runs.Load(); n != 1 {
		t.Errorf("the task ran %d times, want once", n)
	}
	if n := len(r.results.List()); n != 2 {
		t.Errorf("there are %d results, want 2", n)
	}
	// After the stop, unacknowledged messages are in the queue again.
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	if n := r.depth("orders"); n != 0 {
		t.Errorf("%d messages were not acknowledged", n)
	}
}

func TestTaskContinuesWhileTheConnectionIsLost(t *testing.T) {
	t.Parallel()
	for _, queueType := range []string{"", "quorum"} {
		for name, lose := range map[string]func(*workertest.Proxy, *worker.Worker){
			"cut":   func(p *workertest.Proxy, _ *worker.Worker) { p.Cut(); p.Restore() },
			"stall": func(p *workertest.Proxy, w *worker.Worker) { p.Stall(); waitUnready(t, w); p.Cut(); p.Restore() },
			// As consumer_timeout does after 30 minutes.
			"channel": func(_ *workertest.Proxy, w *worker.Worker) {
				if err := w.BreakChannel(); err != nil {
					t.Error(err)
				}
			},
		} {
			t.Run(name+" "+queueType, func(t *testing.T) {
				t.Parallel()
				r, p, w, g, id := startBehindProxy(t, func(c *worker.Config) {
					c.TaskQueues = []worker.Queue{{Name: "orders", Type: queueType}}
				})
				lose(p, w)
				waitUnready(t, w)
				eventually(t, "the worker consumes again", func() bool { return w.Ready() == nil })
				eventually(t, "the message is delivered again", func() bool { return w.Attached() >= 1 })
				close(g.release)
				expectRecordedOnce(t, r, g, id)
			})
		}
	}
}

func waitUnready(t *testing.T, w *worker.Worker) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for w.Ready() == nil && w.Reconnects() == 0 {
		if time.Now().After(deadline) {
			t.Error("the worker did not notice the loss")
			return
		}
		time.Sleep(time.Millisecond)
	}
}

func TestTaskThatEndsWhileDisconnectedIsRecordedLater(t *testing.T) {
	t.Parallel()
	r, p, w, g, id := startBehindProxy(t, nil)
	p.Cut()
	waitUnready(t, w)
	close(g.release)
	receive(t, "the task ends", g.ended)
	if _, stored := r.results.Find(id); stored {
		t.Error("the result was stored before the follow-up was published")
	}
	p.Restore()
	expectRecordedOnce(t, r, g, id)
}

func TestTheSameMessageTwiceRunsOnce(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	cfg.Slots = 2
	w := newWorker(t, cfg)
	registerShop(w)
	g := newGatedTask()
	w.Register("shop.gated", g)
	r.stop = workertest.Start(t, w)
	m := chainOf("shop.gated", "next-1")
	r.send(m)
	r.send(m)
	receive(t, "the task begins", g.began)
	eventually(t, "the second delivery is attached", func() bool { return w.Attached() == 1 })
	close(g.release)
	expectRecordedOnce(t, r, g, m.TaskID)
}

func TestWorkerConsumesAgainAfterItsQueueWasDeleted(t *testing.T) {
	t.Parallel()
	r, _, w, g, _ := startBehindProxy(t, nil)
	if _, err := r.channel.QueueDelete("orders", false, false, false); err != nil {
		t.Fatal(err)
	}
	waitUnready(t, w)
	eventually(t, "the worker consumes again", func() bool { return w.Ready() == nil })
	close(g.release)
	r.result(r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil)))
	r.result("next-1")
}

func TestStartErrorsAreDistinguished(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	if _, err := r.channel.QueueDeclare("quorum", true, false, false, false, map[string]any{"x-queue-type": "quorum"}); err != nil {
		t.Fatal(err)
	}
	if err := r.channel.ExchangeDeclare("topic", "topic", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := r.channel.QueueDeclare("bound", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	if err := r.channel.QueueBind("bound", "bound", "amq.direct", false, nil); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*worker.Config)
		want   error
		text   string
	}{
		"no broker":  {func(c *worker.Config) { c.Broker = "amqp://a:b@127.0.0.1:1/" }, worker.ErrUnreachable, "127.0.0.1:1"},
		"password":   {func(c *worker.Config) { c.Broker = withUserInfo(r.url, "mm", "wrong") }, worker.ErrCredentials, "Check user and password"},
		"vhost":      {func(c *worker.Config) { c.Broker = r.url + "-not" }, worker.ErrVhost, "virtual host"},
		"queue type": {func(c *worker.Config) { c.Queues = []string{"quorum"} }, worker.ErrMismatch, `queue "quorum" exists with arguments {x-queue-type: quorum}, the worker would declare no arguments. Set Type of the queue in TaskQueues, or delete the queue. (RabbitMQ: 406 PRECONDITION_FAILED`},
		"exchange type": {func(c *worker.Config) {
			c.Queues = []string{"other"}
			c.TaskQueues = []worker.Queue{{Name: "other", Exchange: "topic"}}
		}, worker.ErrMismatch, `exchange "topic" exists with type topic`},
		"passive": {func(c *worker.Config) {
			c.Queues = []string{"absent"}
			c.TaskQueues = []worker.Queue{{Name: "absent", Passive: true}}
		}, worker.ErrMismatch, "Create the queue"},
		"additional binding": {func(c *worker.Config) { c.Queues = []string{"bound"} }, nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := r.config()
			cfg.Logger = nil
			cfg.StartTimeout = -1
			c.change(&cfg)
			w := newWorker(t, cfg)
			registerShop(w)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if c.want == nil {
				go func() { <-w.Started(); cancel() }()
			}
			err := w.Run(ctx)
			if !errors.Is(err, c.want) || err != nil && !contains(err.Error(), c.text) {
				t.Errorf("got %v\nwant %v with %q", err, c.want, c.text)
			}
		})
	}
}

func TestWorkerWaitsForItsBrokerAtTheStart(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	p, through := workertest.NewProxy(t, r.url)
	p.Cut()
	cfg := r.config()
	cfg.Broker = "amqp://a:b@127.0.0.1:1/;" + through
	w := newWorker(t, cfg)
	registerShop(w)
	time.AfterFunc(100*time.Millisecond, p.Restore)
	workertest.Start(t, w)
	r.result(r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil)))
}
