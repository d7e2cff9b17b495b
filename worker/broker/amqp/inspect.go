package amqp

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// Inspect connects to the broker once and checks queues, without consuming or creating
// anything. It declares only queues and exchanges that exist, so that the broker
// compares their properties with the given ones. It checks permissions that a worker
// needs later by requests which the broker authorizes and then cannot carry out.
func (b *Broker) Inspect(ctx context.Context, queues []broker.Queue) (broker.Inspection, error) {
	c, err := b.dialAny(ctx, "")
	if err != nil {
		return broker.Inspection{}, err
	}
	c.watch(nil)
	defer c.Close()
	product, _ := c.conn.Properties["product"].(string)
	version, _ := c.conn.Properties["version"].(string)
	found := broker.Inspection{Broker: c.place, Server: product + " " + version}
	for _, queue := range queues {
		inspected, err := ask(ctx, c, callOptions{what: "an inspection"}, func() (broker.QueueInspection, error) { return c.inspect(queue) })
		if err != nil {
			return found, err
		}
		found.Queues = append(found.Queues, inspected)
	}
	found.PublishErr = c.call(ctx, callOptions{what: "an inspection"}, func() error { return c.inspectPublishing(ctx) })
	if errors.Is(found.PublishErr, broker.ErrUnreachable) {
		return found, found.PublishErr
	}
	return found, nil
}

// inspectPublishing checks the permission to write to the default exchange. It
// publishes a message that no queue can receive, so that the broker returns it.
func (c *connection) inspectPublishing(ctx context.Context) error {
	ch, err := c.conn.Channel()
	if err != nil {
		return c.connectionError("an inspection", err)
	}
	defer ch.Close()
	closed := ch.NotifyClose(make(chan *amqp.Error, 1))
	ch.NotifyReturn(make(chan amqp.Return, 1))
	if err := ch.Confirm(false); err != nil {
		return c.connectionError("an inspection", err)
	}
	confirmed, err := ch.PublishWithDeferredConfirmWithContext(ctx, "", "mm-orchestrator.inspect."+rand.Text(), true, false, amqp.Publishing{})
	if err != nil {
		return c.connectionError("an inspection", err)
	}
	if acked, err := confirmed.WaitContext(ctx); acked || err != nil {
		return err
	}
	refused := <-closed
	switch {
	case refused == nil:
		return c.connectionError("an inspection", amqp.ErrClosed)
	case refused.Code != amqp.AccessRefused:
		return c.connectionError("an inspection", refused)
	}
	return fmt.Errorf("%w: publishing at %s: give the user write permission on the default exchange, amq.default, by which a task sends the next one (RabbitMQ: %s)",
		broker.ErrPermission, c.place, brokerText(refused))
}

func (c *connection) inspect(q broker.Queue) (broker.QueueInspection, error) {
	found := broker.QueueInspection{Name: q.Name, Exchange: q.Exchange}
	arguments, err := amqpTable(declareArguments(q))
	if err != nil {
		return found, err
	}
	// Each call has a channel of its own, because the broker closes a channel when
	// it refuses a declaration.
	call := func(method func(ch *amqp.Channel) error) error {
		ch, err := c.conn.Channel()
		if err != nil {
			return err
		}
		defer ch.Close()
		return method(ch)
	}
	exists := func(declarePassive func(ch *amqp.Channel) error) (bool, error) {
		err := call(declarePassive)
		var refused *amqp.Error
		if errors.As(err, &refused) && refused.Code == amqp.NotFound {
			return false, nil
		}
		return err == nil, err
	}
	found.ExchangeExists, err = exists(func(ch *amqp.Channel) error {
		return ch.ExchangeDeclarePassive(q.Exchange, q.ExchangeType, true, false, false, false, nil)
	})
	if err == nil && found.ExchangeExists && !q.Passive {
		err = call(func(ch *amqp.Channel) error {
			return ch.ExchangeDeclare(q.Exchange, q.ExchangeType, true, false, false, false, nil)
		})
	}
	if err == nil {
		found.Exists, err = exists(func(ch *amqp.Channel) error {
			state, err := ch.QueueDeclarePassive(q.Name, true, false, false, false, nil)
			found.Messages, found.Consumers = state.Messages, state.Consumers
			return err
		})
	}
	if err == nil && found.Exists && !q.Passive {
		err = call(func(ch *amqp.Channel) error {
			_, err := ch.QueueDeclare(q.Name, true, false, false, false, arguments)
			return err
		})
	}
	if err == nil && q.Passive && !found.Exists {
		err = &amqp.Error{Code: amqp.NotFound, Reason: fmt.Sprintf("NOT_FOUND - no queue '%s'", q.Name), Server: true}
	}
	if err == nil && found.Exists && found.ExchangeExists && !q.Passive {
		// Removing a binding needs the same permissions as adding one. This one
		// does not exist, so that nothing is removed.
		err = call(func(ch *amqp.Channel) error {
			return ch.QueueUnbind(q.Name, "mm-orchestrator.inspect."+rand.Text(), q.Exchange, nil)
		})
	}
	if err == nil && found.Exists {
		found.Err, err = c.inspectConsuming(q, call)
	}
	if err == nil && found.Exists {
		found.Type, err = inspectType(q, call)
	}
	if err != nil {
		found.Err = c.declareError(q, err)
		if errors.Is(found.Err, broker.ErrUnreachable) {
			return found, found.Err
		}
	}
	return found, nil
}

// inspectConsuming checks the permission to read the queue. It asks for a consumer
// whose priority is not a number: the broker checks the permission first, and
// then refuses the priority.
func (c *connection) inspectConsuming(q broker.Queue, call func(func(*amqp.Channel) error) error) (refusal, err error) {
	err = call(func(ch *amqp.Channel) error {
		_, err := ch.Consume(q.Name, "", false, false, false, false, amqp.Table{"x-priority": "none"})
		return err
	})
	var refused *amqp.Error
	switch {
	case !errors.As(err, &refused):
		return nil, err
	case refused.Code == amqp.AccessRefused:
		return fmt.Errorf("%w: consuming queue %q at %s: give the user read permission on it (RabbitMQ: %s)", broker.ErrPermission, q.Name, c.place, brokerText(refused)), nil
	case refused.Code == amqp.PreconditionFailed:
		return nil, nil
	}
	return nil, err
}

// inspectType returns the type of an existing queue. Without a configured type the
// virtual host's default decides, which the protocol does not report: declaring
// the queue as a quorum queue makes the broker name the difference.
func inspectType(q broker.Queue, call func(func(*amqp.Channel) error) error) (string, error) {
	if q.Type != "" {
		return q.Type, nil
	}
	if q.Passive {
		return "", nil
	}
	q.Type = "quorum"
	arguments, err := amqpTable(declareArguments(q))
	if err != nil {
		return "", err
	}
	err = call(func(ch *amqp.Channel) error {
		_, err := ch.QueueDeclare(q.Name, true, false, false, false, arguments)
		return err
	})
	var refused *amqp.Error
	switch {
	case err == nil:
		return q.Type, nil
	case !errors.As(err, &refused):
		return "", err
	case refused.Code != amqp.PreconditionFailed:
		return "", nil
	}
	difference := mismatch(q, refused)
	if difference.Argument != "x-queue-type" {
		return "", nil
	}
	return cmp.Or(difference.Current, "classic"), nil
}
