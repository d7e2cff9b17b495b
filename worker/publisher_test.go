package worker_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker/amqp"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// linkTo returns an option that makes shop.add, to be published to an exchange, the
// callback of a task.
func linkTo(option, id, exchange, queue string) protocol.Member {
	options := fmt.Sprintf(`{"task_id": %q, "queue": %q}`, id, queue)
	if exchange != "" {
		options = fmt.Sprintf(`{"task_id": %q, "exchange": %q, "routing_key": "x"}`, id, exchange)
	}
	return workertest.Option(option, json.RawMessage(
		`[{"task": "shop.add", "args": [1, 2], "kwargs": {}, "options": `+options+`, "subtask_type": null, "immutable": true}]`))
}

// No exchange takes a task's callback. The task runs once and fails with the reason,
// its error callback runs, and no other task's publications suffer.
func TestFollowUpThatNobodyTakes(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	cfg.Slots, cfg.RecordTimeout = 4, time.Second
	var log lines
	cfg.Logger = log.logger()
	w := newWorker(t, cfg)
	registerShop(w)
	var runs atomic.Int32
	w.Register("shop.once", worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) {
		runs.Add(1)
		return 1, nil
	}))
	r.stop = workertest.Start(t, w)
	bad := r.send(workertest.Message("orders", "shop.once", nil, nil, linkTo("link", "never", "no-exchange", ""), linkTo("link_error", "told", "", "orders")))
	for n := range 100 {
		r.send(chainOf("shop.onok", fmt.Sprintf("next-%d", n)))
	}
	row := r.result(bad)
	if row.State != protocol.StateFailure || !strings.Contains(row.Exception.Repr(), "no-exchange") {
		t.Errorf("task is %s %v, want FAILURE with the name of the exchange", row.State, row.Exception)
	}
	r.result("told")
	for n := range 100 {
		r.result(fmt.Sprintf("next-%d", n))
	}
	if n := runs.Load(); n != 1 {
		t.Errorf("the handler ran %d times, want once", n)
	}
	for line := range strings.Lines(log.text()) {
		if strings.Contains(line, "cannot be recorded yet") && !strings.Contains(line, "no-exchange") {
			t.Errorf("another publication is blamed: %s", line)
		}
	}
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	if n := r.depth("orders"); n != 0 {
		t.Errorf("%d messages remain", n)
	}
}

// Queue and exchange of a destination are deleted after the worker has declared them.
func TestDeletedDestinationIsDeclaredAgain(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	cfg.TaskQueues = []worker.Queue{{Name: "orders"}, {Name: "parcels", Exchange: "post", RoutingKey: "parcel"}}
	w := newWorker(t, cfg)
	registerShop(w)
	workertest.Start(t, w)
	send := func() {
		t.Helper()
		before := 0
		if q, err := r.conn.Channel(); err == nil {
			if state, err := q.QueueDeclarePassive("parcels", true, false, false, false, nil); err == nil {
				before = state.Messages
			}
			_ = q.Close()
		}
		id := r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil, linkTo("link", "next", "", "parcels")))
		if row := r.result(id); row.State != protocol.StateSuccess {
			t.Errorf("task is %s %v", row.State, row.Exception)
		}
		if n := r.depth("parcels"); n != before+1 {
			t.Errorf("%d messages in parcels, want %d", n, before+1)
		}
	}
	send()
	for what, remove := range map[string]func() error{
		"queue":    func() error { _, err := r.channel.QueueDelete("parcels", false, false, false); return err },
		"exchange": func() error { return r.channel.ExchangeDelete("post", false, false) },
	} {
		if err := remove(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		send()
	}
}

// The broker does not read from the connection that publishes. Publish ends with its
// context, and tasks, acknowledgements and queries go on.
func TestBlockedPublisherDelaysNothingElse(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	w := newWorker(t, r.config())
	registerShop(w)
	r.stop = workertest.Start(t, w)
	if err := w.Publish(t.Context(), protocol.Publishing{TaskID: "a", RoutingKey: "orders", Body: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	unblock, err := w.BlockPublisher()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	began := time.Now()
	err = w.Publish(ctx, protocol.Publishing{TaskID: "b", RoutingKey: "orders", Body: []byte("x")})
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > 10*time.Second {
		t.Errorf("Publish returned %v after %v", err, time.Since(began))
	}
	r.result(r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil)))
	eventually(t, "the message is acknowledged", func() bool { return len(w.Unacked()) == 0 })
	if n, err := w.QueueDepth(t.Context(), "orders"); n != 0 || err != nil {
		t.Errorf("depth %d, %v", n, err)
	}
	id := r.send(chainOf("shop.onok", "next-1"))
	unblock()
	r.result(id)
	r.result("next-1")
}

// A network that stalls ends no call later than its context.
func TestCallsEndWithTheirContext(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	p, through := workertest.NewProxy(t, r.url)
	cfg := r.config()
	cfg.Broker, cfg.Heartbeat = through, time.Minute
	w := newWorker(t, cfg)
	registerShop(w)
	workertest.Start(t, w)
	if _, err := w.QueueDepth(t.Context(), "orders"); err != nil {
		t.Fatal(err)
	}
	if err := w.Publish(t.Context(), protocol.Publishing{TaskID: "a", RoutingKey: "orders", Body: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	p.Stall()
	for name, call := range map[string]func(context.Context) error{
		"Publish": func(ctx context.Context) error {
			return w.Publish(ctx, protocol.Publishing{RoutingKey: "orders", Body: []byte("x")})
		},
		"QueueDepth":     func(ctx context.Context) error { _, err := w.QueueDepth(ctx, "orders"); return err },
		"QueueConsumers": func(ctx context.Context) error { _, err := w.QueueConsumers(ctx, "orders"); return err },
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		began := time.Now()
		if err := call(ctx); err == nil || time.Since(began) > 10*time.Second {
			t.Errorf("%s returned %v after %v", name, err, time.Since(began))
		}
		cancel()
	}
	p.Cut()
}

// lostAmidst is a broker whose connection for publishing is lost once, in the middle of
// messages that are published together.
type lostAmidst struct {
	broker.Broker
	done atomic.Bool
}

type publisherLostAmidst struct {
	broker.BatchPublisher
	broker *lostAmidst
}

func (b *lostAmidst) OpenPublisher(ctx context.Context) (broker.Publisher, error) {
	p, err := b.Broker.OpenPublisher(ctx)
	if err != nil {
		return nil, err
	}
	return &publisherLostAmidst{p.(broker.BatchPublisher), b}, nil
}

func (p *publisherLostAmidst) PublishAll(ctx context.Context, messages []broker.Publication) []error {
	if !p.broker.done.CompareAndSwap(false, true) {
		return p.BatchPublisher.PublishAll(ctx, messages)
	}
	errs := p.BatchPublisher.PublishAll(ctx, messages[:len(messages)/2])
	p.Close()
	return append(errs, p.BatchPublisher.PublishAll(ctx, messages[len(errs):])...)
}

// The many callbacks of a task are published together. Of a connection that is lost
// meanwhile, those that the broker has confirmed are not published again.
func TestCallbacksArePublishedTogether(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		task, option, state string
		args                []json.RawMessage
		lose                bool
	}{
		"undisturbed":                      {"shop.add", "link", protocol.StateSuccess, workertest.Args(1, 2), false},
		"connection lost":                  {"shop.add", "link", protocol.StateSuccess, workertest.Args(1, 2), true},
		"error callbacks, undisturbed":     {"shop.fail", "link_error", protocol.StateFailure, nil, false},
		"error callbacks, connection lost": {"shop.fail", "link_error", protocol.StateFailure, nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newTestEnv(t)
			cfg := r.config()
			cfg.TaskQueues = []worker.Queue{{Name: "orders"}, {Name: "parcels"}}
			between := &lostAmidst{Broker: amqp.New(amqp.Config{Addresses: cfg.Broker, Heartbeat: cfg.Heartbeat, Name: cfg.Node, Logger: cfg.Logger})}
			between.done.Store(!test.lose)
			cfg.Transport = between
			w := newWorker(t, cfg)
			registerShop(w)
			workertest.Start(t, w)
			const callbacks = 150
			row := r.result(r.send(workertest.Message("orders", test.task, test.args, nil, linksTo(test.option, "parcels", callbacks))))
			if row.State != test.state {
				t.Errorf("task is %s %v", row.State, row.Exception)
			}
			// An error callback is published after the row is stored.
			eventually(t, "the message is acknowledged", func() bool { return len(w.Unacked()) == 0 })
			if n := r.depth("parcels"); n != callbacks {
				t.Errorf("%d messages in the queue, want %d", n, callbacks)
			}
			if lost := between.done.Load(); !lost {
				t.Error("nothing was published together")
			}
			for i := range callbacks {
				d, _, err := r.channel.Get("parcels", true)
				if err != nil {
					t.Fatal(err)
				}
				if want := fmt.Sprint("callback-", i); d.CorrelationId != want {
					t.Fatalf("message %d is %s, want %s: they are in the order of the signatures", i, d.CorrelationId, want)
				}
			}
		})
	}
}

// onlyOneByOne is a broker whose publishers are no BatchPublisher.
type onlyOneByOne struct{ broker.Broker }

func (b onlyOneByOne) OpenPublisher(ctx context.Context) (broker.Publisher, error) {
	p, err := b.Broker.OpenPublisher(ctx)
	if err != nil {
		return nil, err
	}
	return struct{ broker.Publisher }{p}, nil
}

// Error callbacks that no queue takes are lost, each with a line in the log. They neither
// keep the others from being published nor make each of them wait, and the task does not
// run again.
func TestErrorCallbackThatNobodyTakes(t *testing.T) {
	t.Parallel()
	for name, batch := range map[string]bool{"together": true, "one by one": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newTestEnv(t)
			cfg := r.config()
			cfg.RecordTimeout = time.Second
			cfg.TaskQueues = []worker.Queue{{Name: "orders"}, {Name: "parcels"}}
			var log lines
			cfg.Logger = log.logger()
			if !batch {
				cfg.Transport = onlyOneByOne{amqp.New(amqp.Config{Addresses: cfg.Broker, Heartbeat: cfg.Heartbeat, Name: cfg.Node, Logger: cfg.Logger})}
			}
			w := newWorker(t, cfg)
			registerShop(w)
			workertest.Start(t, w)
			var callbacks []json.RawMessage
			for i := range 9 {
				options := fmt.Sprintf(`{"task_id": "callback-%d", "queue": "parcels"}`, i)
				if i%2 == 0 {
					options = fmt.Sprintf(`{"task_id": "callback-%d", "exchange": "no-exchange", "routing_key": "x"}`, i)
				}
				callbacks = append(callbacks, json.RawMessage(
					`{"task": "shop.add", "args": [1, 2], "kwargs": {}, "options": `+options+`, "subtask_type": null, "immutable": true}`))
			}
			row := r.result(r.send(workertest.Message("orders", "shop.fail", nil, nil, workertest.Option("link_error", callbacks))))
			if row.State != protocol.StateFailure || !strings.Contains(row.Exception.Repr(), "boom") {
				t.Errorf("task is %s %v", row.State, row.Exception)
			}
			eventually(t, "the message is acknowledged", func() bool { return len(w.Unacked()) == 0 })
			if n := r.depth("parcels"); n != 4 {
				t.Errorf("%d error callbacks in the queue, want 4", n)
			}
			if n := r.depth("orders"); n != 0 {
				t.Errorf("%d messages remain", n)
			}
			for i := range 9 {
				lost := strings.Contains(log.text(), fmt.Sprintf("callback_id=callback-%d", i))
				if lost != (i%2 == 0) {
					t.Errorf("error callback %d is called lost: %v", i, lost)
				}
			}
			if n := strings.Count(log.text(), "cannot be recorded yet"); n != 1 {
				t.Errorf("published in %d turns, want one for all", n)
			}
		})
	}
}

// cutAmidst is a broker behind a network that is cut once: of the first messages that are
// published together, half are confirmed before.
type cutAmidst struct {
	broker.Broker
	cut func(ended func() bool)

	mu        sync.Mutex
	calls     int
	confirmed map[string]int // by id
}

type publisherCutAmidst struct {
	broker.BatchPublisher
	broker *cutAmidst
}

func (b *cutAmidst) OpenPublisher(ctx context.Context) (broker.Publisher, error) {
	p, err := b.Broker.OpenPublisher(ctx)
	if err != nil {
		return nil, err
	}
	return &publisherCutAmidst{p.(broker.BatchPublisher), b}, nil
}

func (p *publisherCutAmidst) PublishAll(ctx context.Context, messages []broker.Publication) []error {
	b := p.broker
	b.mu.Lock()
	defer b.mu.Unlock()
	var errs []error
	if b.calls++; b.calls == 1 {
		half := len(messages) / 2
		errs = p.BatchPublisher.PublishAll(ctx, messages[:half])
		rest := make(chan []error, 1)
		go func() { rest <- p.BatchPublisher.PublishAll(ctx, messages[half:]) }()
		b.cut(func() bool { return len(rest) > 0 })
		errs = append(errs, <-rest...)
	} else {
		errs = p.BatchPublisher.PublishAll(ctx, messages)
	}
	for i, err := range errs {
		if err == nil {
			b.confirmed[messages[i].Message.TaskID]++
		}
	}
	return errs
}

// Publish publishes a message that alone is left.
func (p *publisherCutAmidst) Publish(ctx context.Context, m protocol.Publishing, declare *broker.Queue) error {
	err := p.BatchPublisher.Publish(ctx, m, declare)
	if err == nil {
		p.broker.mu.Lock()
		defer p.broker.mu.Unlock()
		p.broker.confirmed[m.TaskID]++
	}
	return err
}

// The network is cut while the callbacks of a task are published. All of them are in the
// queue when the row is stored. Twice are at most those that the broker had received and
// not confirmed.
func TestPublishedTogetherOverANetworkThatIsCut(t *testing.T) {
	t.Parallel()
	const callbacks, half = 100, 32
	for name, stalled := range map[string]bool{"nothing of the rest arrives": true, "some of the rest arrives": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newTestEnv(t)
			cfg := r.config()
			network, through := workertest.NewProxy(t, r.url)
			cfg.Broker = through
			cfg.TaskQueues = []worker.Queue{{Name: "orders"}, {Name: "parcels"}}
			b := &cutAmidst{
				Broker:    amqp.New(amqp.Config{Addresses: through, Heartbeat: cfg.Heartbeat, Name: cfg.Node, Logger: cfg.Logger}),
				confirmed: map[string]int{},
			}
			b.cut = func(ended func() bool) {
				if stalled {
					network.Stall()
				} else {
					for !ended() && r.depth("parcels") <= half {
					}
				}
				network.CutOnce()
				network.Restore()
			}
			cfg.Transport = b
			w := newWorker(t, cfg)
			registerShop(w)
			workertest.Start(t, w)
			row := r.result(r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil, linksTo("link", "parcels", callbacks))))
			if row.State != protocol.StateSuccess {
				t.Errorf("task is %s %v", row.State, row.Exception)
			}
			arrived := map[string]int{}
			for {
				d, more, err := r.channel.Get("parcels", true)
				if err != nil {
					t.Fatal(err)
				}
				if !more {
					break
				}
				arrived[d.CorrelationId]++
			}
			b.mu.Lock()
			defer b.mu.Unlock()
			for i := range callbacks {
				id := fmt.Sprint("callback-", i)
				if b.confirmed[id] != 1 || arrived[id] == 0 {
					t.Errorf("%s was confirmed %d times and has arrived %d times", id, b.confirmed[id], arrived[id])
				}
				if arrived[id] > 1 && (stalled || i < half) {
					t.Errorf("%s has arrived %d times", id, arrived[id])
				}
			}
		})
	}
}

// A callback that no queue takes makes the task fail. Other callbacks are published, but
// the group at the end of its chain is not.
func TestChainDoesNotGoOnAfterAFollowUpThatNobodyTakes(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	cfg.RecordTimeout = time.Millisecond
	cfg.TaskQueues = []worker.Queue{{Name: "orders"}, {Name: "parcels"}}
	w := newWorker(t, cfg)
	registerShop(w)
	workertest.Start(t, w)
	member := strings.Replace(next("parcels"), "[1, 2]", "[3, 4]", 1)
	group := json.RawMessage(`{"task": "celery.group", "args": [], "kwargs": {"tasks": [` + member + `, ` + member + `, ` + member +
		`]}, "options": {}, "subtask_type": "group", "immutable": false}`)
	links := []json.RawMessage{json.RawMessage(next("parcels")), json.RawMessage(strings.Replace(next("x"), `"queue": "x"`, `"exchange": "no-exchange", "routing_key": "x"`, 1))}
	row := r.result(r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil,
		workertest.Option("link", links), workertest.Option("chain", []json.RawMessage{group}))))
	if row.State != protocol.StateFailure || !strings.Contains(row.Exception.Repr(), "no-exchange") {
		t.Errorf("task is %s %v, want FAILURE with the name of the exchange", row.State, row.Exception)
	}
	// A missing exchange can make the broker forget what it has confirmed.
	for n := r.depth("parcels"); n > 0; n-- {
		d, _, err := r.channel.Get("parcels", true)
		if err != nil {
			t.Fatal(err)
		}
		if d.Headers["argsrepr"] != "(1, 2)" {
			t.Errorf("the chain has gone on: %v", d.Headers)
		}
	}
}

// next returns a signature of a task whose queue is this one.
func next(queue string) string {
	return `{"task": "shop.add", "args": [1, 2], "kwargs": {}, "options": {"queue": "` + queue + `"}, "subtask_type": null, "immutable": true}`
}

// linksTo returns the option link or link_error with callbacks that a queue receives.
func linksTo(option, queue string, callbacks int) protocol.Member {
	var all []json.RawMessage
	for i := range callbacks {
		all = append(all, json.RawMessage(fmt.Sprintf(
			`{"task": "shop.add", "args": [1, 2], "kwargs": {}, "options": {"task_id": "callback-%d", "queue": %q}, "subtask_type": null, "immutable": true}`, i, queue)))
	}
	return workertest.Option(option, all)
}

// BenchmarkCallbacks runs tasks with 50 callbacks each.
func BenchmarkCallbacks(b *testing.B) {
	r := newTestEnv(b)
	cfg := r.config()
	cfg.Logger = nil
	cfg.TaskQueues = []worker.Queue{{Name: "orders"}, {Name: "parcels"}}
	w := newWorker(b, cfg)
	registerShop(w)
	if _, err := r.channel.QueueDeclare("orders", true, false, false, false, nil); err != nil {
		b.Fatal(err)
	}
	var last string
	for range b.N {
		last = r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil, linksTo("link", "parcels", 50)))
	}
	b.ReportAllocs()
	b.ResetTimer()
	workertest.Start(b, w)
	r.result(last)
}
