package amqp_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker/amqp"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

var orders = broker.Queue{Name: "orders"}.WithDefaults()

// newConsumer returns a consumer whose connection the proxy can stall.
func newConsumer(t *testing.T) (broker.Consumer, *workertest.Proxy) {
	t.Helper()
	proxy, address := workertest.NewProxy(t, devenv.Broker(t))
	b := amqp.New(amqp.Config{Addresses: address, Heartbeat: time.Minute, Name: "test@shop", Logger: workertest.Logger(t)})
	c, err := b.OpenConsumer(t.Context(), []broker.Queue{orders})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c, proxy
}

// A worker must not consider itself alone because it has counted a consumer as its own
// that the broker's answer does not include, or the other way round.
func TestConsumersThatChangeDuringTheQuestionAreNotCounted(t *testing.T) {
	t.Parallel()
	c, proxy := newConsumer(t)
	sub, err := c.Subscribe(t.Context(), orders, 1, func(broker.Delivery) {})
	if err != nil {
		t.Fatal(err)
	}
	proxy.Stall()
	answer := make(chan error, 1)
	go func() {
		_, err := c.Consumers(t.Context(), orders.Name)
		answer <- err
	}()
	amqp.WaitForQuestion(c)
	amqp.ChangeConsumers(sub)
	proxy.Restore()
	if err := <-answer; err == nil {
		t.Error("the answer counts, though a consumer has changed during the question")
	}
	if got, err := c.Consumers(t.Context(), orders.Name); err != nil || got != (broker.Consumers{Own: 1}) {
		t.Errorf("afterwards: %+v, %v; want one of its own", got, err)
	}
}

// A broker that answers no question for longer than it may take for anything else, as
// during an alarm, does not lose the connection: messages may arrive on it.
func TestAQuestionDoesNotLoseTheConnection(t *testing.T) {
	t.Parallel()
	c, proxy := newConsumer(t)
	const callTimeout = 10 * time.Millisecond
	amqp.SetCallTimeout(c, callTimeout)
	proxy.Stall()
	ctx, cancel := context.WithTimeout(t.Context(), 20*callTimeout)
	defer cancel()
	if _, err := c.Depth(ctx, "orders"); !errors.Is(err, context.DeadlineExceeded) || c.Err() != nil {
		t.Errorf("a question: %v, connection: %v; want the end of the context", err, c.Err())
	}
	// Anything else must be answered.
	if _, err := c.Subscribe(t.Context(), orders, 1, func(broker.Delivery) {}); err == nil || c.Err() == nil {
		t.Errorf("a subscription: %v, connection: %v; want its loss", err, c.Err())
	}
	proxy.Cut()
}
