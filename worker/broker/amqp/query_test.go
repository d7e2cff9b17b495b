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

// A broker that answers no question for longer than it may take for anything else, as
// during an alarm, does not lose the connection: messages may arrive on it.
func TestAQuestionDoesNotLoseTheConnection(t *testing.T) {
	t.Parallel()
	proxy, address := workertest.NewProxy(t, devenv.Broker(t))
	b := amqp.New(amqp.Config{Addresses: address, Heartbeat: time.Minute, Name: "test@shop", Logger: workertest.Logger(t)})
	orders := broker.Queue{Name: "orders"}.WithDefaults()
	c, err := b.OpenConsumer(t.Context(), []broker.Queue{orders})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
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
