package amqp

import (
	"context"
	"errors"
	"fmt"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

var _ broker.Getter = (*consumer)(nil)

// Get takes one message by basic.get. RabbitMQ refuses it for a queue with an exclusive
// consumer, for an exclusive queue of another connection, and for a quorum queue with
// x-single-active-consumer.
func (c *consumer) Get(ctx context.Context, q broker.Queue) (broker.Delivery, int, bool, error) {
	type answer struct {
		message amqp.Delivery
		ok      bool
	}
	got, err := ask(ctx, c.connection, callOptions{what: "basic.get", turn: c.turn}, func() (a answer, err error) {
		a.message, a.ok, err = c.channel.Get(q.Name, false)
		return a, err
	})
	switch {
	case err == nil && !got.ok:
		return broker.Delivery{}, 0, false, nil
	case err == nil:
		return c.delivery(q, got.message), int(got.message.MessageCount), true, nil
	case ctx.Err() == nil:
		c.fail(err) // if RabbitMQ has refused it, it has closed the channel
		err = c.getError(q, err)
	}
	return broker.Delivery{}, 0, false, err
}

// getError explains why RabbitMQ has refused basic.get.
func (c *consumer) getError(q broker.Queue, err error) error {
	var refused *amqp.Error
	var closed *closedError // the end of the channel was seen before the answer
	code, text := 0, ""
	switch {
	case errors.As(err, &refused):
		code, text = refused.Code, brokerText(refused)
	case errors.As(err, &closed):
		code, text = closed.code, fmt.Sprintf("%d %s", closed.code, closed.reason)
	}
	switch code {
	case amqp.NotFound:
		return &broker.MismatchError{What: "queue", Name: q.Name, Cure: "Create the queue.", Broker: "RabbitMQ: " + text}
	case amqp.AccessRefused:
		return fmt.Errorf("%w: taking a message of queue %q at %s: give the user read permission on it (RabbitMQ: %s)", broker.ErrPermission, q.Name, c.place, text)
	case amqp.ResourceLocked, amqp.NotImplemented:
		return &broker.MismatchError{What: "queue", Name: q.Name, Exists: "as a queue from which single messages cannot be taken now",
			Want: "one without an exclusive consumer, and no quorum queue with x-single-active-consumer", Cure: "Stop its consumers.", Broker: "RabbitMQ: " + text}
	}
	return c.connectionError(fmt.Sprintf("taking a message of queue %q", q.Name), err)
}
