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

// limited makes the queue "orders" one that drops a message which has come
// back more often than that.
func limited(limit int) func(*worker.Config) {
	return func(c *worker.Config) {
		c.TaskQueues = []worker.Queue{{Name: "orders", Type: "quorum", Arguments: map[string]any{"x-delivery-limit": limit}}}
	}
}

// A message that is only waiting, for a database for instance, must not be lost
// at the delivery limit of its queue, however often it is handed back.
func TestHandingBackIsNotCountedByAQuorumQueue(t *testing.T) {
	t.Parallel()
	const limit, times = 3, 12
	for name, cut := range map[string]bool{"handed back": false, "handed back and connections cut": true} {
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
			w.Register("shop.patient", worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) {
				n := tries.Add(1)
				if cut && n%2 == 0 {
					p.CutOnce()
				}
				if n <= times {
					return nil, worker.Reject{Requeue: true, After: 10 * time.Millisecond, Reason: "database is away"}
				}
				return "done", nil
			}))
			stop := workertest.Start(t, w)
			id := r.send(chainOf("shop.patient", "next-1"))
			for _, id := range []string{id, "next-1"} {
				if row := r.result(id); row.State != protocol.StateSuccess {
					t.Errorf("task %s is %s, want SUCCESS", id, row.State)
				}
			}
			if err := stop(); err != nil {
				t.Error(err)
			}
			if n := r.depth("orders"); n != 0 {
				t.Errorf("%d messages are left", n)
			}
		})
	}
}

// The same when the result cannot be stored: the task runs again and again, and
// its message stays.
func TestResultBackendThatIsAwayLosesNoMessage(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	limited(3)(&cfg)
	cfg.RecordTimeout = time.Millisecond
	var calls atomic.Int32
	r.results.Fail(func([]protocol.Result) error {
		if calls.Add(1) <= 12 {
			return errors.New("database is away")
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
		t.Errorf("%d messages are left", n)
	}
}

// While a task runs, its message comes back with every lost connection. It must
// stay for another worker, should this one die at last.
func TestMessageOfARunningTaskOutlivesTheDeliveryLimit(t *testing.T) {
	t.Parallel()
	const limit, cuts = 2, 5
	r, p, w, g, id := startBehindProxy(t, limited(limit))
	for n := 1; n <= cuts; n++ {
		attached := w.Attached()
		p.CutOnce()
		// First the old one, then the copy.
		eventually(t, "the message is delivered again", func() bool { return w.Reconnects() >= n && w.Attached() >= attached+2 })
		eventually(t, "the worker consumes again", func() bool { return w.Ready() == nil })
	}
	close(g.let)
	settled(t, r, g, id)
}

// The broker has dropped the message of a task that runs: there is nothing left
// to acknowledge, and everything else happens.
func TestTaskWhoseMessageIsGoneEndsAsUsual(t *testing.T) {
	t.Parallel()
	r, p, w, g, id := startBehindProxy(t, func(c *worker.Config) {
		c.Slots = 2
		limited(0)(c)
	})
	p.CutOnce()
	eventually(t, "the worker consumes again", func() bool { return w.Reconnects() == 1 && w.Ready() == nil })
	// Were the message still there, it would come before this one.
	r.result(r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil)))
	if n := w.Attached(); n != 0 {
		t.Fatalf("the message came back %d times, want it dropped", n)
	}
	close(g.let)
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
		t.Errorf("%d messages are left", n)
	}
}

// A copy that was sent in place of a running task's message may arrive after
// the task's end. The broker does not call it redelivered.
func TestCopyOfAMessageWhoseTaskHasEndedDoesNotRunIt(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	w := newWorker(t, r.config())
	g := newGatedTask()
	close(g.let)
	w.Register("shop.gated", g)
	registerShop(w)
	r.stop = workertest.Start(t, w)
	m := chainOf("shop.gated", "next-1")
	r.result(r.send(m))
	m.Headers[worker.HeaderCopy] = true
	r.send(m)
	eventually(t, "the copy is answered", func() bool { return w.Attached() == 1 })
	settled(t, r, g, m.TaskID)
}
