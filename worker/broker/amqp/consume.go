package amqp

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// consumer is a connection that consumes: with it, every delivery tag is valid.
type consumer struct {
	*connection
	name string // Config.Name

	// channel carries consumers and acknowledgements. turn serialises its
	// synchronous methods, which amqp091-go does not do.
	channel *amqp.Channel
	turn    chan struct{}
	acks    acks

	// query is for questions that the broker may not answer. They have a channel of
	// their own, because the broker closes it when it refuses one: query is nil
	// before the first and after a refusal. It belongs to whoever has queryTurn.
	query     *amqp.Channel
	queryTurn chan struct{}

	mu            sync.Mutex
	subscriptions map[string]*subscription // by queue
}

// OpenConsumer connects and declares the queues.
func (b *Broker) OpenConsumer(ctx context.Context, queues []broker.Queue) (broker.Consumer, error) {
	conn, err := b.dialAny(ctx, "")
	if err != nil {
		return nil, err
	}
	c := &consumer{
		connection:    conn,
		name:          b.cfg.Name,
		turn:          make(chan struct{}, 1),
		queryTurn:     make(chan struct{}, 1),
		subscriptions: map[string]*subscription{},
	}
	if c.channel, err = ask(ctx, conn, callOptions{what: "channel.open"}, conn.conn.Channel); err != nil {
		c.Close()
		return nil, fmt.Errorf("broker %s: opening a channel: %w: %w", c.place, broker.ErrUnreachable, ours(err))
	}
	c.acks.write, c.acks.hold, c.acks.release = c.channel.Ack, conn.wire.Hold, conn.wire.Release
	c.watch(c.channel)
	for _, q := range queues {
		if err := c.declare(ctx, q); err != nil {
			c.Close()
			return nil, err
		}
	}
	if b.cfg.Delays {
		if err := c.makeDelays(ctx, queues); err != nil {
			c.Close()
			return nil, err
		}
	}
	return c, nil
}

// Close closes the connection and waits for the goroutines that deliver.
func (c *consumer) Close() {
	c.connection.Close()
	c.mu.Lock()
	all := slices.Collect(maps.Values(c.subscriptions))
	c.mu.Unlock()
	for _, sub := range all {
		sub.end()
	}
}

// subscription is the set of consumers of one queue.
//
// The limit of unacknowledged messages (QoS) is always that of a consumer: RabbitMQ
// 4.3 refuses the shared kind, and quorum queues never supported it
// (docs/celery.md#prefetch). A message that is delayed uses up a part of its
// consumer's limit, and the limit of a running consumer cannot be raised. So overflow
// consumers are added: the sum of all limits is that of the first consumer plus the
// number of delayed messages, and at most overflowLimitMax-1 more.
type subscription struct {
	consumer  *consumer
	queue     broker.Queue
	deliver   func(broker.Delivery)
	receiving sync.WaitGroup // one for each consumer; none is added once ended is set
	receivers receivers

	mu            sync.Mutex         // guards all below, also during calls of the broker
	overflow      []overflowConsumer // oldest first
	overflowLimit int                // the sum of their limits
	next          int                // number of the next tag
	tags          []string           // of every consumer that was not cancelled
	ended         bool               // no consumer is added any more

	ownMu sync.Mutex
	own   ownConsumers
}

// ownConsumers says how many consumers the broker has confirmed and this process has
// not cancelled. changes counts the calls that add or cancel one: if two values are
// equal, none was added or cancelled in between.
type ownConsumers struct{ count, changes int }

// overflowConsumer is a consumer whose limit makes room for delayed messages.
type overflowConsumer struct {
	tag   string
	limit int
}

// overflowLimitMax is the largest limit of an overflow consumer. Each new one
// is larger than the one before, up to this: a thousand delayed messages need
// about seventy consumers.
const overflowLimitMax = 16

// Subscribe starts the first consumer of a queue.
func (c *consumer) Subscribe(ctx context.Context, q broker.Queue, limit int, deliver func(broker.Delivery)) (broker.Subscription, error) {
	sub := &subscription{consumer: c, queue: q, deliver: deliver}
	c.mu.Lock()
	c.subscriptions[q.Name] = sub
	c.mu.Unlock()
	sub.mu.Lock()
	defer sub.mu.Unlock()
	if _, err := sub.start(ctx, limit); err != nil {
		return nil, err
	}
	return sub, nil
}

// start adds a consumer and returns its tag. The caller has locked sub.mu.
//
// The tag is no named result: after an error the call of the broker may go on, and
// reads it.
func (sub *subscription) start(ctx context.Context, limit int) (string, error) {
	c := sub.consumer
	sub.next++
	sub.changed(0)
	tag := fmt.Sprintf("%.100s/%.100s/%d", c.name, sub.queue.Name, sub.next)
	arguments, err := amqpTable(sub.queue.ConsumerArguments)
	if err != nil {
		return "", err
	}
	deliveries, err := ask(ctx, c.connection, callOptions{what: "basic.consume", turn: c.turn}, func() (<-chan amqp.Delivery, error) {
		if err := c.channel.Qos(limit, 0, false); err != nil {
			return nil, err
		}
		return c.channel.Consume(sub.queue.Name, tag, false, false, false, false, arguments)
	})
	if err != nil {
		c.fail(err)
		return "", c.connectionError(fmt.Sprintf("consuming queue %q", sub.queue.Name), err)
	}
	sub.tags = append(sub.tags, tag)
	sub.changed(+1)
	sub.receiving.Add(1)
	go sub.receive(deliveries, limit)
	return tag, nil
}

// Delay adds or cancels overflow consumers, so that their limits are about the number
// of delayed messages.
func (sub *subscription) Delay(ctx context.Context, delayed int) {
	sub.mu.Lock()
	defer sub.mu.Unlock()
	for !sub.ended && !sub.consumer.isLost() && delayed > sub.overflowLimit {
		limit := min(max(1, sub.overflowLimit), overflowLimitMax)
		tag, err := sub.start(ctx, limit)
		if err != nil {
			return // the connection is lost
		}
		sub.overflow = append(sub.overflow, overflowConsumer{tag, limit})
		sub.overflowLimit += limit
	}
	for len(sub.overflow) > 0 && !sub.consumer.isLost() {
		last := sub.overflow[len(sub.overflow)-1]
		if delayed > sub.overflowLimit-last.limit || sub.cancel(ctx, last.tag) != nil {
			return
		}
		sub.overflow = sub.overflow[:len(sub.overflow)-1]
		sub.overflowLimit -= last.limit
	}
}

// cancel ends one consumer; its deliveries can still be settled. The caller has
// locked sub.mu.
func (sub *subscription) cancel(ctx context.Context, tag string) error {
	if i := slices.Index(sub.tags, tag); i >= 0 {
		sub.tags = slices.Delete(sub.tags, i, i+1)
		sub.changed(-1)
	}
	c := sub.consumer
	err := c.call(ctx, callOptions{what: "basic.cancel", turn: c.turn}, func() error { return c.channel.Cancel(tag, false) })
	if err != nil {
		c.fail(err)
	}
	return err
}

// Stop cancels every consumer and waits until they deliver nothing any more.
func (sub *subscription) Stop(ctx context.Context) {
	sub.passOnAll()
	sub.mu.Lock()
	sub.ended = true
	for len(sub.tags) > 0 && !sub.consumer.isLost() {
		if sub.cancel(ctx, sub.tags[len(sub.tags)-1]) != nil {
			break
		}
	}
	sub.mu.Unlock()
	delivered := make(chan struct{})
	go func() {
		defer close(delivered)
		sub.receiving.Wait()
	}()
	select {
	case <-delivered:
	case <-sub.consumer.lost:
	case <-ctx.Done():
	}
}

// end waits for the goroutines that deliver, after the connection was closed.
func (sub *subscription) end() {
	sub.passOnAll()
	sub.mu.Lock()
	sub.ended = true
	sub.mu.Unlock()
	sub.receiving.Wait()
}

func (sub *subscription) changed(by int) {
	sub.ownMu.Lock()
	defer sub.ownMu.Unlock()
	sub.own.count += by
	sub.own.changes++
}

// ownConsumers returns those of a queue. There are none when nothing is subscribed.
func (c *consumer) ownConsumers(queue string) ownConsumers {
	c.mu.Lock()
	sub := c.subscriptions[queue]
	c.mu.Unlock()
	if sub == nil {
		return ownConsumers{}
	}
	sub.ownMu.Lock()
	defer sub.ownMu.Unlock()
	return sub.own
}

var errConsumersChanged = errors.New("the worker's own consumers changed during the query")

// Consumers asks the broker for the consumers of a queue. RabbitMQ does not count the
// inactive consumers of a quorum queue with x-single-active-consumer.
func (c *consumer) Consumers(ctx context.Context, queue string) (broker.Consumers, error) {
	before := c.ownConsumers(queue)
	state, err := c.queueState(ctx, queue, "counting the consumers")
	if err != nil {
		return broker.Consumers{}, err
	}
	// The answer may or may not include a consumer that was added or cancelled
	// during the call.
	if c.ownConsumers(queue) != before {
		return broker.Consumers{}, errConsumersChanged
	}
	own := min(state.Consumers, before.count)
	return broker.Consumers{Own: own, Other: state.Consumers - own}, nil
}

// Depth asks the broker for the number of ready messages.
func (c *consumer) Depth(ctx context.Context, queue string) (int, error) {
	state, err := c.queueState(ctx, queue, "counting the messages")
	return state.Messages, err
}

// queueState asks the broker how many consumers and ready messages a queue has. The
// broker may take any time: when ctx ends first, the query continues in the
// background until the broker answers or the connection is lost.
func (c *consumer) queueState(ctx context.Context, queue, what string) (amqp.Queue, error) {
	state, err := ask(ctx, c.connection, callOptions{what: "queue.declare", turn: c.queryTurn, patient: true}, func() (state amqp.Queue, err error) {
		if c.query == nil {
			if c.query, err = c.conn.Channel(); err != nil {
				c.query = nil
				return state, err
			}
		}
		if state, err = c.query.QueueDeclarePassive(queue, true, false, false, false, nil); err != nil {
			c.query = nil
		}
		return state, err
	})
	var refused *amqp.Error
	switch {
	case err == nil, ctx.Err() != nil:
		return state, err
	case errors.As(err, &refused):
		return state, c.declareError(broker.Queue{Name: queue}, err)
	}
	return state, c.connectionError(fmt.Sprintf("%s of queue %q", what, queue), err)
}

// BreakChannel makes the broker close the channel that consumes with 406, as it does
// when a delivery has been unacknowledged for too long. Tests of package worker call
// it.
func (c *consumer) BreakChannel() error { return c.channel.Ack(1<<40, false) }
