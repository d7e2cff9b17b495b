package amqp_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker/amqp"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// RabbitMQ gives single messages of some queues to nobody. The error says so, and why.
func TestSomeQueuesGiveNoSingleMessages(t *testing.T) {
	t.Parallel()
	b := amqp.New(amqp.Config{Addresses: devenv.Broker(t), Heartbeat: time.Minute, Name: "test@shop", Logger: workertest.Logger(t)})
	q := broker.Queue{Name: "orders", Arguments: map[string]any{"x-single-active-consumer": true, "x-queue-type": "quorum"}}.WithDefaults()
	c, err := b.OpenConsumer(t.Context(), []broker.Queue{q})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, _, _, err = c.(broker.Getter).Get(t.Context(), q)
	if !errors.Is(err, broker.ErrMismatch) || !strings.Contains(err.Error(), "single messages cannot be taken") || !strings.Contains(err.Error(), "RabbitMQ: 405") {
		t.Errorf("error %v", err)
	}
}
