package amqp

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// What kombu calls native delayed delivery (kombu/transport/native_delayed_delivery.py,
// docs/celery.md#delayed-delivery): 28 queues, one for each bit of a number of seconds, in
// which a message expires after as long as its bit says. The first parts of its routing key
// are the bits. The topic exchange in front of each queue sends it there, or on to the next
// exchange, and the one after the last sends it to the exchange that was meant.
const (
	delayBits     = 28
	delayDelivery = "celery_delayed_delivery"
)

func delayName(bit int) string { return fmt.Sprintf("celery_delayed_%d", bit) }

// makeDelays declares the exchanges and queues through which Celery's producers delay
// messages, and binds those of queues whose exchange is not direct to them, as each Celery
// worker does when it starts (celery/worker/consumer/delayed_delivery.py). As there, a
// refusal is logged: without them the worker receives all other messages. An error means
// that the connection is of no use.
func (c *connection) makeDelays(ctx context.Context, queues []broker.Queue) error {
	queues = slices.DeleteFunc(slices.Clone(queues), func(q broker.Queue) bool {
		return q.Passive || q.Exchange == "" || q.ExchangeType == "direct"
	})
	if len(queues) == 0 {
		return nil
	}
	err := c.declareDelays(ctx, "quorum", queues)
	var refused *amqp.Error
	if errors.As(err, &refused) && refused.Code == amqp.PreconditionFailed {
		// Celery's setting broker_native_delayed_delivery_queue_type may be classic.
		if c.declareDelays(ctx, "classic", queues) == nil {
			return nil
		}
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return err
	case refused == nil || !refused.Server || c.isLost():
		return c.connectionError("declaring the queues of delayed messages", err)
	}
	cure := "Delete the queues and exchanges celery_delayed_*, if they are empty: the worker or Celery makes them again"
	if refused.Code == amqp.AccessRefused {
		cure = "Give the user configure, write and read permission on celery_delayed_.*, and on the exchanges of its queues, or start a Celery worker that has them once"
	}
	names := make([]string, len(queues))
	for i, q := range queues {
		names[i] = q.Name
	}
	c.log.Warn("messages that Celery's producers send with countdown or eta may be lost: the queues that delay them cannot be declared",
		"broker", c.place, "queues", names, "error", "RabbitMQ: "+brokerText(refused), "cure", cure)
	return nil
}

// declareDelays makes the queues that delay messages with a type, on a channel of its own.
func (c *connection) declareDelays(ctx context.Context, queueType string, queues []broker.Queue) error {
	return c.call(ctx, callOptions{what: "a declaration"}, func() error {
		ch, err := c.conn.Channel()
		if err != nil {
			return err
		}
		defer ch.Close()
		closed := ch.NotifyClose(make(chan *amqp.Error, 1))
		err = declareDelaysOn(ch, queueType, queues)
		if errors.Is(err, amqp.ErrClosed) {
			// A refusal that came before the last method was sent.
			if refused := <-closed; refused != nil {
				return refused
			}
		}
		return err
	})
}

// declareDelaysOn sends more than a hundred methods, of which only the last is answered:
// one round trip. It begins at the end of the way, so that what a message goes on to is
// there already.
func declareDelaysOn(ch *amqp.Channel, queueType string, queues []broker.Queue) error {
	exchange := func(name string, noWait bool) error {
		return ch.ExchangeDeclare(name, "topic", true, false, false, noWait, nil)
	}
	if err := exchange(delayDelivery, true); err != nil {
		return err
	}
	for _, q := range queues {
		key := q.RoutingKey
		if !strings.HasPrefix(key, "#") {
			key = "#." + key // after the bits
		}
		if err := ch.ExchangeBind(q.Exchange, key, delayDelivery, true, nil); err != nil {
			return err
		}
		if err := ch.QueueBind(q.Name, key, q.Exchange, true, nil); err != nil {
			return err
		}
	}
	next := delayDelivery
	for bit := range delayBits {
		name := delayName(bit)
		arguments := map[string]any{
			"x-queue-type": queueType, "x-overflow": "reject-publish", "x-message-ttl": int64(1000) << bit, "x-dead-letter-exchange": next,
		}
		if queueType == "quorum" {
			arguments["x-dead-letter-strategy"] = "at-least-once"
		}
		table, err := amqpTable(arguments)
		if err != nil {
			return err
		}
		if err := exchange(name, true); err != nil {
			return err
		}
		if _, err := ch.QueueDeclare(name, true, false, false, true, table); err != nil {
			return err
		}
		// The bits before this one may have any value.
		before := strings.Repeat("*.", delayBits-1-bit)
		if err := ch.QueueBind(name, before+"1.#", name, true, nil); err != nil {
			return err
		}
		if err := ch.ExchangeBind(next, before+"0.#", name, true, nil); err != nil {
			return err
		}
		next = name
	}
	return exchange(next, false)
}
