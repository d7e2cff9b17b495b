package worker_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/client"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker/memory"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// The tests of this file run on the clock of testing/synctest. RecordTimeout is at its
// default of five minutes.

// troubled is a broker that can be unreachable, accept no messages, and refuse
// messages.
type troubled struct {
	*memory.Broker

	mu      sync.Mutex // guards all below
	down    bool
	refuse  func(m protocol.Publishing) error
	blocked chan struct{} // nil unless the broker accepts no messages; closed when it does again
	since   time.Time     // of blocked
	total   time.Duration // for which it was blocked before
}

// block lets the broker accept no messages, and unblock ends that. The caller has locked
// b.mu.
func (b *troubled) block() { b.blocked, b.since = make(chan struct{}), time.Now() }

func (b *troubled) unblock() {
	close(b.blocked)
	b.blocked, b.total = nil, b.total+time.Since(b.since)
}

// blockedFor is for how long it was blocked in total.
func (b *troubled) blockedFor() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.blocked != nil {
		return b.total + time.Since(b.since)
	}
	return b.total
}

func (b *troubled) set(change func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	change()
}

func (b *troubled) reachable() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.down {
		return &broker.ConnectError{Kind: broker.ErrUnreachable, What: "the broker is down"}
	}
	return nil
}

func (b *troubled) OpenConsumer(ctx context.Context, queues []broker.Queue) (broker.Consumer, error) {
	if err := b.reachable(); err != nil {
		return nil, err
	}
	return b.Broker.OpenConsumer(ctx, queues)
}

func (b *troubled) OpenPublisher(ctx context.Context) (broker.Publisher, error) {
	if err := b.reachable(); err != nil {
		return nil, err
	}
	p, err := b.Broker.OpenPublisher(ctx)
	return &troubledPublisher{p, b, b.blockedFor()}, err
}

type troubledPublisher struct {
	broker.Publisher
	b      *troubled
	before time.Duration // for which the broker was blocked before
}

func (p *troubledPublisher) Blocked() time.Duration { return p.b.blockedFor() - p.before }

func (p *troubledPublisher) Publish(ctx context.Context, m protocol.Publishing, declare *broker.Queue) error {
	p.b.mu.Lock()
	blocked := p.b.blocked
	p.b.mu.Unlock()
	if blocked != nil {
		select {
		case <-blocked:
		case <-p.Lost():
		case <-ctx.Done():
		}
	}
	p.b.mu.Lock()
	refuse := p.b.refuse
	p.b.mu.Unlock()
	if refuse != nil {
		if err := refuse(m); err != nil {
			return err
		}
	}
	return p.Publisher.Publish(ctx, m, declare)
}

// The time of trouble at the broker does not count against RecordTimeout: what is
// refused at its end is tried again. The work is kept, and the body runs once.
func TestTroubleAtTheBrokerDoesNotUseUpTheRecordTimeout(t *testing.T) {
	t.Parallel()
	const trouble = time.Hour
	for name, tt := range map[string]struct {
		begin, end func(b *troubled, results *workertest.Results)
		alone      bool // without a follow-up, which would be published first
	}{
		"unreachable, then no queue takes the follow-up": {
			begin: func(b *troubled, _ *workertest.Results) { b.down = true; b.Disconnect() },
			end: func(b *troubled, _ *workertest.Results) {
				b.down, b.refuse = false, once(worker.ErrUnroutable)
			},
		},
		"unreachable, while the result backend fails": {
			begin: func(b *troubled, r *workertest.Results) {
				r.Fail(func([]protocol.Result) error { return errors.New("the table is locked") })
				b.down = true
				b.Disconnect()
			},
			end: func(b *troubled, r *workertest.Results) {
				b.down = false
				time.AfterFunc(time.Minute, func() { r.Fail(nil) })
			},
			alone: true,
		},
		"blocked": {
			begin: func(b *troubled, _ *workertest.Results) { b.block() },
			end: func(b *troubled, _ *workertest.Results) {
				b.unblock()
				b.refuse = once(errors.New("not accepted"))
			},
		},
		"blocked, and the connection is lost at the end": {
			begin: func(b *troubled, _ *workertest.Results) { b.block() },
			end: func(b *troubled, _ *workertest.Results) {
				b.Disconnect() // before it accepts messages again
				b.unblock()
				b.refuse = once(errors.New("not accepted"))
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b, results := &troubled{Broker: memory.New()}, &workertest.Results{}
				cfg := worker.Config{Transport: b, Queues: []string{"orders"}, Results: results, Logger: workertest.Logger(t)}
				w := newWorker(t, cfg)
				registerShop(w)
				g := newGatedTask()
				w.Register("shop.gated", g)
				c, err := client.New(client.FromWorker(cfg))
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(c.Close)
				stop := workertest.Start(t, w)
				task, ids := client.Task("shop.gated").With(client.TaskID("first")), []string{"first"}
				if !tt.alone {
					task, ids = task.With(client.Link(client.Task("shop.add", 1, 2).Immutable().With(client.TaskID("next")))), append(ids, "next")
				}
				_, err = c.Send(t.Context(), task)
				if err != nil {
					t.Fatal(err)
				}
				<-g.began
				b.set(func() { tt.begin(b, results) })
				synctest.Wait()
				close(g.release)
				time.Sleep(trouble)
				b.set(func() { tt.end(b, results) })
				for _, id := range ids {
					if row, err := results.Wait(t.Context(), id); err != nil || row.State != protocol.StateSuccess {
						t.Errorf("task %s is %s %v, %v; want SUCCESS", id, row.State, row.Exception, err)
					}
				}
				if n := g.runs.Load(); n != 1 {
					t.Errorf("the body has run %d times, want once", n)
				}
				if err := stop(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// once returns a function that returns the error at its first call.
func once(err error) func(protocol.Publishing) error {
	var calls atomic.Int32
	return func(protocol.Publishing) error {
		if calls.Add(1) > 1 {
			return nil
		}
		return err
	}
}

// Only a follow-up that no queue takes makes its task fail. After any other error that
// lasts for RecordTimeout the message is requeued, and the task runs again.
func TestAFollowUpThatTheBrokerRefusesDoesNotMakeItsTaskFail(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b, results := &troubled{Broker: memory.New()}, &workertest.Results{}
		cfg := worker.Config{Transport: b, Queues: []string{"orders"}, Results: results, Logger: workertest.Logger(t)}
		w := newWorker(t, cfg)
		registerShop(w)
		var runs atomic.Int32
		w.Register("shop.once", worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) { return runs.Add(1), nil }))
		c, err := client.New(client.FromWorker(cfg))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		stop := workertest.Start(t, w)
		began := time.Now()
		b.refuse = func(m protocol.Publishing) error {
			if m.TaskID == "next" && time.Since(began) < 6*time.Minute {
				return errors.New("not accepted")
			}
			return nil
		}
		sent, err := c.Send(t.Context(), client.Task("shop.once"), client.Link(client.Task("shop.add", 1, 2).Immutable().With(client.TaskID("next"))))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := results.Wait(t.Context(), "next"); err != nil {
			t.Error(err)
		}
		if _, err := results.Wait(t.Context(), sent.ID); err != nil {
			t.Error(err)
		}
		if history := results.History(sent.ID); len(history) != 1 || history[0] != protocol.StateSuccess || runs.Load() != 2 {
			t.Errorf("states %v after %d runs, want SUCCESS after 2", history, runs.Load())
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}
