package amqp

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
	"github.com/moonladderstudios/mm-orchestrator/worker/internal/wire"
)

// A quorum queue drops or dead-letters a message that was returned to it more
// often than its delivery limit allows. From RabbitMQ 4.0 on the default limit
// is 20. Lost channels and connections count, and before 4.3 also the
// acknowledgement timeout and basic.nack. Other queues do not count.
const (
	// headerCount has the number of returns that a quorum queue has counted. It
	// is absent at first. From RabbitMQ 4.3 on, headerAcquired has the number of
	// deliveries.
	headerCount    = "x-delivery-count"
	headerAcquired = "x-acquired-count"
	// headerCC and headerBCC are further routing keys, for which RabbitMQ has delivered
	// the message to their queues already. It takes headerBCC out of messages.
	headerCC  = "CC"
	headerBCC = "BCC"
	// argumentLimit is the argument of a queue that sets its limit. That of a policy
	// is not visible to a worker.
	argumentLimit = "x-delivery-limit"
	// defaultLimit is RabbitMQ's default from 4.0 on.
	defaultLimit = 20
)

func (c *consumer) delivery(q broker.Queue, d amqp.Delivery) broker.Delivery {
	message := plainDelivery(d)
	limit := defaultLimit
	if own, set := q.Arguments[argumentLimit]; set {
		limit = integer(own)
	}
	r := &receipt{consumer: c, tag: d.DeliveryTag, queue: q.Name, message: message}
	c.acks.add(r)
	return broker.Delivery{
		Message:     message,
		Returns:     integer(message.Headers[headerCount]),
		ReturnLimit: max(limit, 0),
		Receipt:     r,
	}
}

func integer(value any) int {
	if value == nil {
		return 0
	}
	switch n := reflect.ValueOf(value); {
	case n.CanInt():
		return int(n.Int())
	case n.CanUint():
		return int(n.Uint())
	}
	return 0
}

// plainDelivery converts amqp091-go's delivery (see package wire for how it marks a
// priority of 0).
func plainDelivery(d amqp.Delivery) protocol.Delivery {
	properties := protocol.Properties{
		ContentType:     d.ContentType,
		ContentEncoding: d.ContentEncoding,
		DeliveryMode:    d.DeliveryMode &^ wire.PriorityZero,
		CorrelationID:   d.CorrelationId,
		ReplyTo:         d.ReplyTo,
		Expiration:      d.Expiration,
		MessageID:       d.MessageId,
		Type:            d.Type,
		AppID:           d.AppId,
		Timestamp:       d.Timestamp.UTC(),
	}
	if d.Priority != 0 || d.DeliveryMode&wire.PriorityZero != 0 {
		priority := d.Priority
		properties.Priority = &priority
	}
	return protocol.Delivery{
		Headers:     wire.Headers(d.Headers, decimal),
		Properties:  properties,
		Exchange:    d.Exchange,
		RoutingKey:  d.RoutingKey,
		Redelivered: d.Redelivered,
		Body:        d.Body,
	}
}

// receipt settles a delivery on the channel from which it came: elsewhere its tag means
// nothing.
type receipt struct {
	consumer *consumer
	tag      uint64
	queue    string
	message  protocol.Delivery

	// Guarded by acks.mu.
	unsettled      bool
	previous, next *receipt // in the list of unsettled deliveries
}

func (r *receipt) Ack()     { r.check(r.consumer.acks.ack(r)) }
func (r *receipt) Reject()  { r.settled(r.consumer.channel.Reject(r.tag, false)) }
func (r *receipt) Requeue() { r.settled(r.consumer.channel.Nack(r.tag, false, true)) }

func (r *receipt) settled(err error) {
	r.consumer.acks.settled(r)
	r.check(err)
}

func (r *receipt) check(err error) {
	if err != nil {
		r.consumer.fail(fmt.Errorf("settling a delivery: %w", err))
	}
}

var (
	errLost    = errors.New("the connection that delivered the task is lost")
	errBlocked = errors.New("the broker has blocked this connection (it lacks memory or disk space) and would not answer")
)

// StillUnacked sends a query on the channel of the delivery. An answer proves that the
// channel is open, and so that the broker counts the delivery as unacknowledged.
func (r *receipt) StillUnacked(ctx context.Context) error {
	c := r.consumer
	if c.isBlocked() {
		return errBlocked
	}
	// RabbitMQ answers channel.flow without doing anything.
	err := c.call(ctx, callOptions{what: "channel.flow", turn: c.turn}, func() error { return c.channel.Flow(true) })
	switch {
	case err == nil && !c.isLost():
		return nil
	case err != nil && ctx.Err() != nil:
		return err
	}
	return errLost
}

// Copy returns the message with the default exchange, which reaches its queue alone
// without CC, and without the count of returns, which begins at zero again.
func (r *receipt) Copy() protocol.Publishing {
	headers := maps.Clone(r.message.Headers)
	if headers == nil {
		headers = map[string]any{}
	}
	for _, name := range []string{headerCount, headerAcquired, headerCC, headerBCC} {
		delete(headers, name)
	}
	return protocol.Publishing{
		TaskID: r.message.Properties.CorrelationID, RoutingKey: r.queue,
		Headers: headers, Properties: r.message.Properties, Body: r.message.Body,
	}
}
