package worker_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker/memory"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// ready is a queue of which messages are removed.
type ready struct {
	*testEnv
	worker *worker.Worker
	sent   map[string]string // names of messages, by task id
}

func newReady(t *testing.T, change func(*worker.Config)) *ready {
	t.Helper()
	r := newTestEnv(t)
	cfg := r.config()
	change(&cfg)
	w := newWorker(t, cfg)
	registerShop(w)
	if err := workertest.Start(t, w)(); err != nil { // it has declared the queue
		t.Fatal(err)
	}
	return &ready{r, w, map[string]string{}}
}

func (r *ready) publish(names ...string) {
	r.t.Helper()
	before := len(r.sent)
	for _, name := range names {
		r.sent[r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil))] = name
	}
	r.wait(before + len(names))
}

func (r *ready) wait(count int) {
	r.t.Helper()
	eventually(r.t, fmt.Sprint(count, " messages are ready"), func() bool { return r.depth("orders") == count })
}

// deliver lets the first messages be delivered, and returns them to the queue.
func (r *ready) deliver(count int) {
	r.t.Helper()
	depth := r.depth("orders")
	conn := r.dial()
	ch, err := conn.Channel()
	if err != nil {
		r.t.Fatal(err)
	}
	for range count {
		if _, ok, err := ch.Get("orders", false); !ok || err != nil {
			r.t.Fatal(ok, err)
		}
	}
	_ = conn.Close()
	r.wait(depth)
}

// remove removes messages, and checks which ones it was shown.
func (r *ready) remove(redelivered bool, want []string, names ...string) {
	r.t.Helper()
	var shown []string
	removed, err := r.worker.RemoveReady(r.t.Context(), "orders", redelivered, func(messages []protocol.Delivery) (chosen []bool, err error) {
		if len(messages) > 64 {
			r.t.Errorf("%d messages at a time", len(messages))
		}
		for _, m := range messages {
			name := r.sent[m.Properties.CorrelationID]
			shown = append(shown, name)
			chosen = append(chosen, slices.Contains(names, name))
		}
		return chosen, nil
	})
	if err != nil || removed != len(names) || !slices.Equal(shown, want) {
		r.t.Errorf("%d were removed of %q, %v; want %d of %q", removed, shown, err, len(names), want)
	}
}

// rest takes all messages.
func (r *ready) rest(want ...string) {
	r.t.Helper()
	r.wait(len(want))
	var rest []string
	for range want {
		m, _, err := r.channel.Get("orders", true)
		if err != nil {
			r.t.Fatal(err)
		}
		rest = append(rest, r.sent[m.CorrelationId])
	}
	if !slices.Equal(rest, want) {
		r.t.Errorf("in the queue are %q, want %q", rest, want)
	}
}

// Messages are removed, and the others stay in their places.
func TestSingleMessagesAreRemovedFromAQueue(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"classic", "quorum"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			r := newReady(t, func(c *worker.Config) { c.TaskQueues = []worker.Queue{{Name: "orders", Type: kind}} })
			r.remove(false, nil)
			r.publish("a", "b", "c", "d", "e")
			r.deliver(3)
			r.remove(true, []string{"a", "b", "c"}, "b")
			r.wait(4)
			r.remove(false, []string{"a", "c", "d", "e"}, "c", "e")
			r.rest("a", "d")
		})
	}
}

// A long queue is looked at in parts.
func TestSingleMessagesAreRemovedFromALongQueue(t *testing.T) {
	t.Parallel()
	r := newReady(t, func(*worker.Config) {})
	var names, even, odd []string
	for i := range 201 {
		names = append(names, fmt.Sprint(i))
		if i%2 == 0 {
			even = append(even, names[i])
		} else {
			odd = append(odd, names[i])
		}
	}
	r.publish(names...)
	r.remove(false, names, even...)
	r.rest(odd...)
}

// A queue that counts returns drops no message because it was looked at.
func TestMessagesThatAreLookedAtOutliveTheDeliveryLimit(t *testing.T) {
	t.Parallel()
	r := newReady(t, limited(2))
	r.publish("a", "b")
	for range 8 {
		if _, err := r.worker.RemoveReady(t.Context(), "orders", false, func(messages []protocol.Delivery) ([]bool, error) { return make([]bool, len(messages)), nil }); err != nil {
			t.Fatal(err)
		}
		r.wait(2)
	}
}

// What cannot be decided, or cannot be taken, is an error, and all messages stay.
func TestNothingIsRemovedAfterAnError(t *testing.T) {
	t.Parallel()
	r := newReady(t, func(*worker.Config) {})
	r.publish("a", "b")
	unknown := errors.New("unknown")
	if _, err := r.worker.RemoveReady(t.Context(), "orders", false, func([]protocol.Delivery) ([]bool, error) { return nil, unknown }); !errors.Is(err, unknown) {
		t.Errorf("error %v", err)
	}
	r.rest("a", "b")
	all := func(messages []protocol.Delivery) ([]bool, error) {
		return slices.Repeat([]bool{true}, len(messages)), nil
	}
	if _, err := r.worker.RemoveReady(t.Context(), "nowhere", false, all); !errors.Is(err, worker.ErrMismatch) {
		t.Errorf("a queue that does not exist: %v", err)
	}
	cfg := r.config()
	cfg.Transport = withoutGet{memory.New()}
	if _, err := newWorker(t, cfg).RemoveReady(t.Context(), "orders", false, all); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("a transport that cannot take single messages: %v", err)
	}
}

type withoutGet struct{ broker.Broker }

func (b withoutGet) OpenConsumer(ctx context.Context, queues []broker.Queue) (broker.Consumer, error) {
	c, err := b.Broker.OpenConsumer(ctx, queues)
	return struct{ broker.Consumer }{c}, err
}
