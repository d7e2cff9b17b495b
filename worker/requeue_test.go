package worker_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker/amqp"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// limited makes "orders" a quorum queue with a delivery limit.
func limited(limit int) func(*worker.Config) {
	return func(c *worker.Config) {
		c.TaskQueues = []worker.Queue{{Name: "orders", Type: "quorum", Arguments: map[string]any{"x-delivery-limit": limit}}}
	}
}

// The delivery limit does not drop a message that waits, for a database for
// example, however often it is requeued.
func TestRequeuedMessageOutlivesTheDeliveryLimit(t *testing.T) {
	t.Parallel()
	const limit, times = 3, 12
	for name, cut := range map[string]bool{"requeued": false, "requeued and connections cut": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newTestEnv(t)
			p, through := workertest.NewProxy(t, r.url)
			cfg := r.config()
			cfg.Broker = through
			limited(limit)(&cfg)
			w := newWorker(t, cfg)
			registerShop(w)
			var tries atomic.Int32
			w.Register("shop.waiting", worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) {
				n := tries.Add(1)
				if cut && n%2 == 0 {
					p.CutOnce()
				}
				if n <= times {
					return nil, worker.Reject{Requeue: true, After: 10 * time.Millisecond, Reason: "database is unavailable"}
				}
				return "done", nil
			}))
			stop := workertest.Start(t, w)
			id := r.send(chainOf("shop.waiting", "next-1"))
			for _, id := range []string{id, "next-1"} {
				if row := r.result(id); row.State != protocol.StateSuccess {
					t.Errorf("task %s is %s, want SUCCESS", id, row.State)
				}
			}
			// Copies that were published again after a cut may be behind the next task.
			eventually(t, "no message is ready", func() bool { return r.depth("orders") == 0 })
			if err := stop(); err != nil {
				t.Error(err)
			}
			if n := r.depth("orders"); n != 0 {
				t.Errorf("%d messages remain", n)
			}
		})
	}
}

// The same when the result cannot be stored: the task runs repeatedly, and its
// message is not dropped.
func TestUnavailableResultBackendLosesNoMessage(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	limited(3)(&cfg)
	cfg.RecordTimeout = time.Millisecond
	var calls atomic.Int32
	r.results.Fail(func([]protocol.Result) error {
		if calls.Add(1) <= 12 {
			return errors.New("database is unavailable")
		}
		return nil
	})
	w := newWorker(t, cfg)
	registerShop(w)
	r.stop = workertest.Start(t, w)
	r.result(r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil)))
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	if n := r.depth("orders"); n != 0 {
		t.Errorf("%d messages remain", n)
	}
}

// Every lost connection returns the message of a running task to its queue. The
// queue must not drop it: another worker needs it if this one crashes.
func TestMessageOfARunningTaskOutlivesTheDeliveryLimit(t *testing.T) {
	t.Parallel()
	const limit, cuts = 2, 5
	r, p, w, g, id := startBehindProxy(t, limited(limit))
	for n := 1; n <= cuts; n++ {
		attached := w.Attached()
		p.CutOnce()
		// First the old message is delivered, then its copy.
		eventually(t, "the message is delivered again", func() bool { return w.Reconnects() >= n && w.Attached() >= attached+2 })
		eventually(t, "the worker consumes again", func() bool { return w.Ready() == nil })
	}
	close(g.release)
	expectRecordedOnce(t, r, g, id)
}

// The broker has dropped the message of a running task. There is nothing to
// acknowledge, but the outcome is recorded.
func TestTaskWhoseMessageWasDroppedIsRecorded(t *testing.T) {
	t.Parallel()
	r, p, w, g, id := startBehindProxy(t, func(c *worker.Config) {
		c.Slots = 2
		limited(0)(c)
	})
	p.CutOnce()
	eventually(t, "the worker consumes again", func() bool { return w.Reconnects() == 1 && w.Ready() == nil })
	// If the message were still in the queue, it would be delivered before this one.
	r.result(r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil)))
	if n := w.Attached(); n != 0 {
		t.Fatalf("the message was delivered again %d times, want it dropped", n)
	}
	close(g.release)
	for _, id := range []string{id, "next-1"} {
		if row := r.result(id); row.State != protocol.StateSuccess {
			t.Errorf("task %s is %s, want SUCCESS", id, row.State)
		}
	}
	if n := g.runs.Load(); n != 1 {
		t.Errorf("the task ran %d times, want once", n)
	}
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	if n := r.depth("orders"); n != 0 {
		t.Errorf("%d messages remain", n)
	}
}

// A copy that replaces a running task's message may be delivered after the end of
// the task, without the redelivered flag.
func TestCopyOfAMessageWhoseTaskHasEndedDoesNotRunIt(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	w := newWorker(t, r.config())
	g := newGatedTask()
	close(g.release)
	w.Register("shop.gated", g)
	registerShop(w)
	r.stop = workertest.Start(t, w)
	m := chainOf("shop.gated", "next-1")
	r.result(r.send(m))
	m.Headers[worker.HeaderCopy] = true
	r.send(m)
	eventually(t, "the copy is settled", func() bool { return w.Attached() == 1 })
	expectRecordedOnce(t, r, g, m.TaskID)
}

// lostAtCopy is a broker whose connection for publishing is lost once, when a copy is to
// be published.
type lostAtCopy struct {
	broker.Broker
	done atomic.Bool
}

type publisherLostAtCopy struct {
	broker.Publisher
	broker *lostAtCopy
}

func (b *lostAtCopy) OpenPublisher(ctx context.Context) (broker.Publisher, error) {
	p, err := b.Broker.OpenPublisher(ctx)
	return &publisherLostAtCopy{p, b}, err
}

func (p *publisherLostAtCopy) Publish(ctx context.Context, m protocol.Publishing, declare *broker.Queue) error {
	if m.Headers["x-mm-orchestrator-copy"] != nil && p.broker.done.CompareAndSwap(false, true) {
		p.Close()
	}
	return p.Publisher.Publish(ctx, m, declare)
}

// A worker whose connections are cut together receives again before it has noticed that
// the one for publishing is lost. The copy of a message that its queue would drop at the
// next loss is published on the next connection.
func TestCopyIsPublishedOnTheNextConnection(t *testing.T) {
	t.Parallel()
	r, p, w, g, id := startBehindProxy(t, func(c *worker.Config) {
		limited(2)(c)
		c.Transport = &lostAtCopy{Broker: amqp.New(amqp.Config{Addresses: c.Broker, Heartbeat: c.Heartbeat, Name: c.Node, Logger: c.Logger})}
	})
	p.CutOnce()
	eventually(t, "the copy joins the running task, as the returned message has", func() bool { return w.Attached() >= 2 })
	if n := w.Reconnects(); n != 1 {
		t.Errorf("the consuming connection was lost %d times, want once", n)
	}
	close(g.release)
	expectRecordedOnce(t, r, g, id)
}

// RabbitMQ routes a message by its header CC too, also one that is published to a queue.
// What the worker publishes in place of a message is for one queue alone.
func TestWhatReplacesAMessageReachesOneQueue(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	for _, name := range []string{"other", "dead"} {
		if _, err := r.channel.QueueDeclare(name, true, false, false, false, nil); err != nil {
			t.Fatal(err)
		}
	}
	cfg := r.config()
	limited(10)(&cfg)
	cfg.DeadLetterQueue = "dead"
	w := newWorker(t, cfg)
	var tries atomic.Int32
	w.Register("shop.waiting", worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) {
		if tries.Add(1) <= 3 {
			return nil, worker.Reject{Requeue: true, After: time.Millisecond}
		}
		return "done", nil
	}))
	stop := workertest.Start(t, w)
	for _, task := range []string{"shop.waiting", "shop.unknown"} {
		m := workertest.Message("orders", task, nil, nil)
		m.Headers["CC"] = []any{"other"}
		r.result(r.send(m))
	}
	eventually(t, "the message that nobody has registered is a dead letter", func() bool { return r.depth("dead") == 1 })
	if err := stop(); err != nil {
		t.Error(err)
	}
	if n := r.depth("other"); n != 2 {
		t.Errorf("the other queue has %d messages, want the two that the producer has sent", n)
	}
}
