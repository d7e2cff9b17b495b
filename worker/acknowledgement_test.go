package worker_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// Messages beyond a rate limit wait without keeping others from being delivered, although
// the worker has one slot and a prefetch of one, and a shutdown returns them to the queue.
func TestRateLimitDelaysAndLosesNothing(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"classic", "quorum"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			r := newTestEnv(t)
			cfg := r.config()
			cfg.TaskQueues = []worker.Queue{{Name: "orders", Arguments: map[string]any{"x-queue-type": kind}}}
			var mu sync.Mutex
			var ran []int
			register := func(w *worker.Worker) {
				worker.Handle(w, "shop.limited", func(_ context.Context, in struct {
					N int `celery:"n"`
				}) (int, error) {
					mu.Lock()
					defer mu.Unlock()
					ran = append(ran, in.N)
					return in.N, nil
				}, worker.RateLimit("1/h"))
				worker.Handle(w, "shop.add", add)
			}
			w := newWorker(t, cfg)
			register(w)
			stop := workertest.Start(t, w)
			ids := make([]string, 4)
			for n := range ids {
				ids[n] = r.send(workertest.Message("orders", "shop.limited", workertest.Args(n), nil))
			}
			for range 5 {
				r.result(r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil)))
			}
			r.result(ids[0])
			// A message is acknowledged just after its result is stored.
			eventually(t, "three messages wait for the limit", func() bool { return len(w.Unacked()) == 3 })
			if err := stop(); err != nil {
				t.Fatal(err)
			}
			// A quorum queue counts what was returned to it a moment later.
			eventually(t, "the three messages are in the queue after the shutdown", func() bool { return r.depth("orders") == 3 })
			again := newWorker(t, cfg)
			register(again)
			workertest.Start(t, again)
			// Which one is the next is the queue's choice among those that came back.
			eventually(t, "the next one has run", func() bool {
				mu.Lock()
				defer mu.Unlock()
				return len(ran) == 2
			})
			eventually(t, "two wait for the limit", func() bool { return len(again.Unacked()) == 2 })
			mu.Lock()
			defer mu.Unlock()
			if ran[0] != 0 || ran[1] == 0 || len(ran) != 2 {
				t.Errorf("%v ran, want one in each worker", ran)
			}
		})
	}
}

// A lost connection does not use up the limit: the messages that waited are delivered
// again, and all run.
func TestRateLimitSurvivesALostConnection(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	proxy, through := workertest.NewProxy(t, r.url)
	cfg.Broker, cfg.Slots = through, 4
	w := newWorker(t, cfg)
	worker.Handle(w, "shop.limited", func(context.Context, noArgs) (any, error) { return nil, nil }, worker.RateLimit("50/s"))
	workertest.Start(t, w)
	var ids []string
	for range 20 {
		ids = append(ids, r.send(workertest.Message("orders", "shop.limited", nil, nil)))
	}
	r.result(ids[2])
	proxy.CutOnce()
	for _, id := range ids {
		if row := r.result(id); row.State != "SUCCESS" {
			t.Errorf("%s", row.State)
		}
	}
}

func TestRateLimitsAreCelerys(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]time.Duration{
		"10/m": 6 * time.Second, "2/h": 30 * time.Minute, "0.5/s": 2 * time.Second, "4": 250 * time.Millisecond, "0": 0, "0/s": 0, "100/s": 10 * time.Millisecond,
	} {
		if got, err := worker.ParseRate(text); err != nil || got != want {
			t.Errorf("%q is %v, %v; want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "x/m", "1/d", "-1/s", "inf", "NaN/s", "1/ m"} {
		if got, err := worker.ParseRate(text); err == nil {
			t.Errorf("%q is %v", text, got)
		}
	}
}

// A message that is acknowledged early is not delivered again, whatever the handler
// returns and even if the worker stops, and its task ends.
func TestEarlyAcknowledgement(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	cfg.Slots, cfg.ShutdownTimeout = 4, -1
	w := newWorker(t, cfg)
	var runs atomic.Int32
	started := make(chan struct{}, 1)
	worker.Handle(w, "shop.reject", func(context.Context, noArgs) (any, error) {
		runs.Add(1)
		return nil, worker.Reject{Requeue: true, Reason: "later"}
	}, worker.AckEarly())
	worker.Handle(w, "shop.retry", func(ctx context.Context, _ noArgs) (int, error) {
		if n := worker.TaskFromContext(ctx).Retries; n < 2 {
			return 0, worker.RetryIn(0)
		}
		return 7, nil
	}, worker.AckEarly())
	worker.Handle(w, "shop.wait", func(ctx context.Context, _ noArgs) (any, error) {
		runs.Add(1)
		started <- struct{}{}
		<-ctx.Done()
		return nil, ctx.Err()
	}, worker.AckEarly())
	worker.Handle(w, "shop.late", func(ctx context.Context, _ noArgs) (any, error) {
		started <- struct{}{}
		<-ctx.Done()
		return nil, ctx.Err()
	})
	stop := workertest.Start(t, w)
	if row := r.result(r.send(workertest.Message("orders", "shop.reject", nil, nil))); row.Exception == nil || row.Exception.Repr() != "Reject('later', False)" {
		t.Errorf("a requeue gives %+v", row)
	}
	if row := r.result(r.send(workertest.Message("orders", "shop.retry", nil, nil)), "SUCCESS"); string(row.Value) != "7" {
		t.Errorf("a retry gives %s", row.Value)
	}
	id := r.send(workertest.Message("orders", "shop.wait", nil, nil))
	receive(t, "the handler", started)
	if list := w.Unacked(); len(list) != 0 {
		t.Errorf("%d messages are unacknowledged while the task runs", len(list))
	}
	r.send(workertest.Message("orders", "shop.late", nil, nil))
	receive(t, "the handler with a late acknowledgement", started)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if row := r.result(id); row.Exception == nil || row.Exception.Type != "WorkerLostError" {
		t.Errorf("a stopped worker gives %+v", row)
	}
	eventually(t, "the message of the late acknowledgement is in the queue", func() bool { return r.depth("orders") > 0 })
	if n := r.depth("orders"); n != 1 || runs.Load() != 2 {
		t.Errorf("%d messages are in the queue after %d runs, want that of the late acknowledgement after 2", n, runs.Load())
	}
}

// A failure is rejected, after it was recorded, and a hard time limit requeued.
func TestSettlementOfFailuresAndTimeouts(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	cfg.TaskQueues = []worker.Queue{{Name: "orders", Arguments: map[string]any{"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "dead"}}}
	cfg.HardLimitGrace = time.Millisecond
	if _, err := r.channel.QueueDeclare("dead", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	dead, err := r.channel.Consume("dead", "", true, false, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	w := newWorker(t, cfg)
	worker.Handle(w, "shop.fail", func(context.Context, noArgs) (any, error) { return nil, errors.New("no") }, worker.RejectFailures())
	var runs atomic.Int32
	worker.Handle(w, "shop.slow", func(ctx context.Context, _ noArgs) (int32, error) {
		if n := runs.Add(1); n > 2 {
			return n, nil
		}
		<-ctx.Done()
		return 0, ctx.Err()
	}, worker.RequeueTimeouts(), worker.WithTimeLimit(protocol.TimeLimit{Hard: 50 * time.Millisecond}))
	workertest.Start(t, w)
	id := r.send(workertest.Message("orders", "shop.fail", nil, nil))
	if row := r.result(id); row.State != "FAILURE" {
		t.Errorf("row %+v", row)
	}
	if got := receive(t, "the dead letter", (<-chan amqp.Delivery)(dead)); got.CorrelationId != id {
		t.Errorf("dead letter of %s", got.CorrelationId)
	}
	id = r.send(workertest.Message("orders", "shop.slow", nil, nil))
	if row := r.result(id); row.State != "SUCCESS" || string(row.Value) != "3" || fmt.Sprint(r.results.History(id)) != "[SUCCESS]" {
		t.Errorf("after %d runs the rows are %v, and the last is %+v", runs.Load(), r.results.History(id), row)
	}
}

// With one message at a time, the goroutine that receives also runs the task. It must not
// keep the next message from being received once the first is acknowledged.
func TestEarlyAcknowledgementLetsTheNextMessageInWhileTheTaskRuns(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	cfg.Slots, cfg.Prefetch = 1, 1
	w := newWorker(t, cfg)
	registerShop(w)
	g := newGatedTask()
	w.Register("shop.gated_early", g, worker.AckEarly())
	workertest.Start(t, w)
	first := r.send(workertest.Message("orders", "shop.gated_early", nil, nil))
	receive(t, "the task begins", g.began)
	second := r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil))
	eventually(t, "the next message is received", func() bool {
		unacked := w.Unacked()
		return len(unacked) == 1 && unacked[0].ID == second
	})
	close(g.release)
	for _, id := range []string{first, second} {
		if row := r.result(id); row.State != protocol.StateSuccess {
			t.Errorf("task %s is %s", id, row.State)
		}
	}
}
