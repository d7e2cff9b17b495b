package worker

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// subscription is the set of consumers of one queue on one session.
//
// QoS is always per consumer: RabbitMQ 4.3 refuses the shared kind, and
// quorum queues never supported it (docs/celery.md#prefetch). A message that is
// delayed (it waits for its ETA or for a pause, without a slot) uses up a part
// of its consumer's limit, and the limit of a running consumer cannot be
// raised. So overflow consumers are added: the sum of all limits is Prefetch
// plus the number of delayed messages, and at most overflowLimitMax-1 more.
type subscription struct {
	session *session
	queue   Queue
	worker  *Worker

	delayed int // messages that wait without a slot; guarded by registry.mu
	// unadjusted is set when delayed has changed and adjust has not been called.
	unadjusted atomic.Bool

	mu            sync.Mutex         // guards all below
	overflow      []overflowConsumer // oldest first
	overflowLimit int                // the sum of their limits
	next          int                // number of the next tag
	tags          []string           // of every consumer that was not cancelled
	stopped       bool               // the worker stops: no consumer is added any more

	// consumerCount is how many consumers the broker has confirmed and the
	// worker has not cancelled. consumerChanges counts the calls that add or
	// cancel one. Both are atomic because OtherConsumers reads them, and mu stays
	// locked during calls to the broker.
	consumerCount, consumerChanges atomic.Int64
}

// overflowConsumer is a consumer whose limit makes room for delayed messages.
type overflowConsumer struct {
	tag   string
	limit int
}

// reportInterval is how often an idle consumer reports progress to Stuck.
const reportInterval = time.Second

// overflowLimitMax is the largest limit of an overflow consumer. Each new one
// is larger than the one before, up to this: a thousand delayed messages need
// about seventy consumers.
const overflowLimitMax = 16

// consume declares the queues and starts one consumer on each. They receive
// until the session is lost or the worker cancels them.
func (w *Worker) consume(ctx context.Context, s *session) ([]*subscription, error) {
	var subscriptions []*subscription
	for _, name := range w.cfg.Queues {
		queue, err := w.routes.queue(name)
		if err != nil {
			return nil, err
		}
		if _, err := s.declare(ctx, queue); err != nil {
			return nil, err
		}
		sub := &subscription{session: s, queue: queue, worker: w}
		subscriptions = append(subscriptions, sub)
	}
	s.setSubscriptions(subscriptions)
	// All queues are declared before the first consumer starts: a declaration
	// that fails ends the session, and with it every delivery.
	for _, sub := range subscriptions {
		sub.mu.Lock()
		_, err := sub.start(ctx, w.cfg.Prefetch)
		sub.mu.Unlock()
		if err != nil {
			return nil, err
		}
	}
	return subscriptions, nil
}

// setSubscriptions records which queues the session consumes.
func (s *session) setSubscriptions(subscriptions []*subscription) {
	s.subscriptionsMu.Lock()
	defer s.subscriptionsMu.Unlock()
	s.subscriptions = map[string]*subscription{}
	for _, sub := range subscriptions {
		s.subscriptions[sub.queue.Name] = sub
	}
}

// subscriptionOf returns the subscription of a queue, or nil.
func (s *session) subscriptionOf(queue string) *subscription {
	s.subscriptionsMu.Lock()
	defer s.subscriptionsMu.Unlock()
	return s.subscriptions[queue]
}

// start adds a consumer. The caller has locked sub.mu.
func (sub *subscription) start(ctx context.Context, limit int) (string, error) {
	s := sub.session
	sub.next++
	sub.consumerChanges.Add(1)
	tag := fmt.Sprintf("%.100s/%.100s/%d", sub.worker.cfg.Node, sub.queue.Name, sub.next)
	arguments, err := amqpTable(sub.queue.ConsumerArguments)
	if err != nil {
		return "", err
	}
	deliveries, err := ask(ctx, s.connection, callOptions{what: "basic.consume", turn: s.consumeTurn}, func() (<-chan amqp.Delivery, error) {
		if err := s.consumeChannel.Qos(limit, 0, false); err != nil {
			return nil, err
		}
		return s.consumeChannel.Consume(sub.queue.Name, tag, false, false, false, false, arguments)
	})
	if err != nil {
		s.fail(err)
		return "", s.connectionError(fmt.Sprintf("consuming queue %q", sub.queue.Name), err)
	}
	if !s.addConsumer() {
		return "", s.connectionError(fmt.Sprintf("consuming queue %q", sub.queue.Name), s.lostErr)
	}
	sub.tags = append(sub.tags, tag)
	sub.consumerCount.Add(1)
	go sub.receive(deliveries)
	return tag, nil
}

// receive starts a goroutine for each delivery; the sum of the limits bounds
// their number. It returns when the consumer has ended: the worker cancelled
// it, or the session is lost.
func (sub *subscription) receive(deliveries <-chan amqp.Delivery) {
	defer sub.session.consumers.Done()
	activity := sub.worker.stalls.Start("consumer of queue "+sub.queue.Name, "receiving")
	defer activity.End()
	ticker := time.NewTicker(reportInterval)
	defer ticker.Stop()
	for {
		select {
		case d, ok := <-deliveries:
			if !ok {
				return
			}
			sub.worker.received(sub, d)
		case <-ticker.C:
		}
		activity.Progress("")
	}
}

// adjust adds or cancels overflow consumers, so that their limits are about the
// number of delayed messages. Each move to or from delayed is followed by a call.
func (sub *subscription) adjust() {
	if !sub.unadjusted.Swap(false) {
		return
	}
	sub.mu.Lock()
	defer sub.mu.Unlock()
	delayed := sub.worker.registry.delayedOn(sub)
	for !sub.stopped && !sub.session.isLost() && min(delayed, sub.worker.cfg.MaxETA) > sub.overflowLimit {
		limit := min(max(1, sub.overflowLimit), overflowLimitMax)
		tag, err := sub.start(sub.worker.lifecycle.record, limit)
		if err != nil {
			return // the session is lost: keepConnected reports it and replaces it
		}
		sub.overflow = append(sub.overflow, overflowConsumer{tag, limit})
		sub.overflowLimit += limit
	}
	for len(sub.overflow) > 0 && !sub.session.isLost() {
		last := sub.overflow[len(sub.overflow)-1]
		if delayed > sub.overflowLimit-last.limit || sub.cancel(last.tag) != nil {
			return
		}
		sub.overflow = sub.overflow[:len(sub.overflow)-1]
		sub.overflowLimit -= last.limit
	}
}

// cancel ends one consumer; its deliveries can still be settled. The caller has
// locked sub.mu.
func (sub *subscription) cancel(tag string) error {
	for i, t := range sub.tags {
		if t == tag {
			sub.tags = append(sub.tags[:i], sub.tags[i+1:]...)
			sub.consumerChanges.Add(1)
			sub.consumerCount.Add(-1)
			break
		}
	}
	s := sub.session
	err := s.callConsuming(sub.worker.lifecycle.record, "basic.cancel", func() error { return s.consumeChannel.Cancel(tag, false) })
	if err != nil {
		s.fail(err)
	}
	return err
}

// stop cancels every consumer.
func (sub *subscription) stop() {
	sub.mu.Lock()
	defer sub.mu.Unlock()
	sub.stopped = true
	for len(sub.tags) > 0 && !sub.session.isLost() {
		if err := sub.cancel(sub.tags[len(sub.tags)-1]); err != nil {
			return
		}
	}
}
