package worker_test

import (
	"context"
	"errors"
	"strings"
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

// The tests of this file run on the clock of testing/synctest, so that they may wait
// for hours.

// shortLived is a broker that ends every connection soon after it was opened.
type shortLived struct {
	*memory.Broker
	lifetime              atomic.Int64 // in nanoseconds; 0 is no limit
	consumers, publishers atomic.Int64 // how many were opened
}

func (b *shortLived) end(opened *atomic.Int64) {
	opened.Add(1)
	if lifetime := b.lifetime.Load(); lifetime > 0 {
		time.AfterFunc(time.Duration(lifetime), b.Disconnect)
	}
}

func (b *shortLived) OpenConsumer(ctx context.Context, queues []broker.Queue) (broker.Consumer, error) {
	defer b.end(&b.consumers)
	return b.Broker.OpenConsumer(ctx, queues)
}

func (b *shortLived) OpenPublisher(ctx context.Context) (broker.Publisher, error) {
	defer b.end(&b.publishers)
	return b.Broker.OpenPublisher(ctx)
}

// Connections that die at once are opened again after pauses of up to a second, and
// their loss is logged once. The loss of one that has worked for a while is logged, and
// the next one is opened without a pause.
func TestConnectionsThatDieAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := &shortLived{Broker: memory.New()}
		b.lifetime.Store(int64(10 * time.Millisecond))
		var log lines
		w := newWorker(t, worker.Config{Transport: b, Queues: []string{"orders"}, Logger: log.logger()})
		registerShop(w)
		stop := workertest.Start(t, w)
		time.Sleep(time.Minute)
		for kind, opened := range map[string]int64{"consumes": b.consumers.Load(), "publishes": b.publishers.Load()} {
			if opened < 30 || opened > 200 {
				t.Errorf("a connection that %s was opened %d times in a minute, want about one a second", kind, opened)
			}
		}
		lost := func() (lost [2]int) {
			lost[0] = strings.Count(log.text(), `msg="connection to the broker lost`)
			lost[1] = strings.Count(log.text(), `msg="connection for publishing lost`)
			return lost
		}
		if got := lost(); got != [2]int{1, 1} {
			t.Errorf("the loss of the two connections was logged %v times, want once each:\n%s", got, log.text())
		}

		b.lifetime.Store(0)
		time.Sleep(time.Minute)
		consumers, publishers := b.consumers.Load(), b.publishers.Load()
		b.Disconnect()
		synctest.Wait()
		if b.consumers.Load() != consumers+1 || b.publishers.Load() != publishers+1 {
			t.Error("a steady connection that was lost is not opened again at once")
		}
		if got := lost(); got != [2]int{2, 2} {
			t.Errorf("the loss of the two connections was logged %v times, want twice each:\n%s", got, log.text())
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

// pausing starts a worker with one slot and a prefetch of 1. Each run of a task is
// counted under its name.
func pausing(t *testing.T, handlers map[string]worker.HandlerFunc) (*memory.Broker, *client.Client, *workertest.Results, func() error) {
	t.Helper()
	b, results := memory.New(), &workertest.Results{}
	cfg := worker.Config{Transport: b, Queues: []string{"orders"}, Results: results, Logger: workertest.Logger(t)}
	w := newWorker(t, cfg)
	registerShop(w)
	for name, handler := range handlers {
		w.Register(name, handler)
	}
	c, err := client.New(client.FromWorker(cfg))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return b, c, results, workertest.Start(t, w)
}

// A task that has asked for a pause, or whose outcome cannot be recorded, waits without
// a slot. Its message, which comes again after a lost connection, waits with it: other
// messages are delivered and run meanwhile, and the task runs again only after the
// pause.
func TestPausesOutliveTheConnection(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var runs atomic.Int32
		b, c, results, stop := pausing(t, map[string]worker.HandlerFunc{
			"shop.later": func(context.Context, *worker.Task) (any, error) {
				if runs.Add(1) == 1 {
					return nil, worker.Reject{Requeue: true, After: time.Hour}
				}
				return "done", nil
			},
		})
		later, err := c.Send(t.Context(), client.Task("shop.later"))
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		for range 3 {
			synctest.Wait()
			b.Disconnect()
			addition(t, c)
		}
		if n := runs.Load(); n != 1 || time.Since(began) > time.Minute {
			t.Errorf("after %v the task has run %d times, want once", time.Since(began), n)
		}
		if row, err := results.Wait(t.Context(), later.ID); err != nil || string(row.Value) != `"done"` {
			t.Errorf("%+v, %v", row, err)
		}
		if took := time.Since(began); runs.Load() != 2 || took < time.Hour || took > time.Hour+time.Minute {
			t.Errorf("the task has run %d times in %v, want twice, with an hour between", runs.Load(), took)
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

// addition sends a task and waits for its result.
func addition(t *testing.T, c *client.Client) {
	t.Helper()
	sent, err := c.Send(t.Context(), client.Task("shop.add", 1, 2))
	if err != nil {
		t.Fatal(err)
	}
	if err := sent.Get(t.Context(), nil); err != nil {
		t.Error(err)
	}
}

// The same for a message that is requeued because its outcome cannot be recorded.
func TestPausesAfterAFailureToRecordOutliveTheConnection(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var runs atomic.Int32
		b, c, results, stop := pausing(t, map[string]worker.HandlerFunc{
			"shop.once": func(context.Context, *worker.Task) (any, error) { return runs.Add(1), nil },
		})
		results.Fail(func(rows []protocol.Result) error {
			if rows[0].Task == "shop.once" {
				return errors.New("the table is locked")
			}
			return nil
		})
		once, err := c.Send(t.Context(), client.Task("shop.once"))
		if err != nil {
			t.Fatal(err)
		}
		// RecordTimeout is five minutes. Then the message waits before it is requeued.
		time.Sleep(5*time.Minute + time.Second)
		for range 3 {
			b.Disconnect()
			addition(t, c)
		}
		results.Fail(nil)
		if n := runs.Load(); n != 1 {
			t.Errorf("the task has run %d times before its pause has ended, want once", n)
		}
		if row, err := results.Wait(t.Context(), once.ID); err != nil || row.State != protocol.StateSuccess || runs.Load() != 2 {
			t.Errorf("%+v, %v after %d runs", row, err, runs.Load())
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}
