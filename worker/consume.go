package worker

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// subscription is all that consumes one queue on one session.
//
// QoS is always per consumer: RabbitMQ 4.3 refuses the shared kind, and
// quorum queues never had it (docs/celery.md#prefetch). A running consumer's
// limit cannot be raised, so a message that is held without a slot (an ETA, a
// pause) is made up for by a further consumer: the sum of all limits is the
// number of prefetched messages plus what is held, and up to extraMost-1 more.
type subscription struct {
	session *session
	queue   Queue
	worker  *Worker

	mu      sync.Mutex // guards all below
	held    int        // messages that wait without a slot
	extras  []extra    // consumers that make up for them, oldest first
	spare   int        // the sum of their limits
	next    int        // number for tags
	tags    []string   // of every consumer that was not cancelled
	stopped bool       // no further consumers: the worker stops

	// consuming is how many consumers there are for certain, changes how often
	// one was asked for or cancelled: for who cannot wait for mu, which is held
	// while the broker is asked.
	consuming, changes atomic.Int64
}

type extra struct {
	tag   string
	limit int
}

// beatTime is how often a consumer that receives nothing shows that it could.
const beatTime = time.Second

// extraMost is the limit of the largest further consumer. They grow, so that
// a thousand held messages need some seventy consumers and not a thousand.
const extraMost = 16

// consume declares the queues and starts one consumer on each. Deliveries are
// received until the session is lost or its consumers are cancelled.
func (w *Worker) consume(s *session) ([]*subscription, error) {
	var subscriptions []*subscription
	for _, name := range w.cfg.Queues {
		queue, err := w.routes.queue(name)
		if err != nil {
			return nil, err
		}
		if err := s.declare(queue); err != nil {
			return nil, err
		}
		sub := &subscription{session: s, queue: queue, worker: w}
		subscriptions = append(subscriptions, sub)
	}
	s.subscribed(subscriptions)
	// Only when all are declared, so that nothing is received in vain.
	for _, sub := range subscriptions {
		sub.mu.Lock()
		_, err := sub.start(w.cfg.Prefetch)
		sub.mu.Unlock()
		if err != nil {
			return nil, err
		}
	}
	return subscriptions, nil
}

// subscribed notes what is consumed on the session.
func (s *session) subscribed(subscriptions []*subscription) {
	s.subscriptionsMu.Lock()
	defer s.subscriptionsMu.Unlock()
	s.subscriptions = map[string]*subscription{}
	for _, sub := range subscriptions {
		s.subscriptions[sub.queue.Name] = sub
	}
}

// subscriptionOf is that of a queue, nil for none.
func (s *session) subscriptionOf(queue string) *subscription {
	s.subscriptionsMu.Lock()
	defer s.subscriptionsMu.Unlock()
	return s.subscriptions[queue]
}

// start adds a consumer. sub.mu is held.
func (sub *subscription) start(limit int) (tag string, err error) {
	s := sub.session
	sub.next++
	sub.changes.Add(1)
	tag = fmt.Sprintf("%.100s/%.100s/%d", sub.worker.cfg.Node, sub.queue.Name, sub.next)
	arguments, err := amqpTable(sub.queue.ConsumerArguments)
	if err != nil {
		return "", err
	}
	var deliveries <-chan amqp.Delivery
	err = s.call("basic.consume", func() error {
		if err := s.consuming.Qos(limit, 0, false); err != nil {
			return err
		}
		deliveries, err = s.consuming.Consume(sub.queue.Name, tag, false, false, false, false, arguments)
		return err
	})
	if err != nil {
		s.fail(err)
		return "", s.lostBecause(fmt.Sprintf("consuming queue %q", sub.queue.Name), err)
	}
	sub.tags = append(sub.tags, tag)
	sub.consuming.Add(1)
	s.consumers.Add(1)
	go sub.receive(deliveries)
	return tag, nil
}

// receive gives each delivery a goroutine of its own; there are never more
// than the sum of the limits. When the channel of deliveries ends, the
// consumer is gone for whatever reason: unless it was us, so is the session.
func (sub *subscription) receive(deliveries <-chan amqp.Delivery) {
	defer sub.session.consumers.Done()
	activity := sub.worker.stalls.Start("consumer of queue "+sub.queue.Name, "receiving")
	defer activity.End()
	beat := time.NewTicker(beatTime)
	defer beat.Stop()
	for {
		select {
		case d, ok := <-deliveries:
			if !ok {
				return
			}
			sub.worker.received(sub, d)
		case <-beat.C:
		}
		activity.Progress("")
	}
}

// hold says that a message waits without a slot from now on; release ends it.
func (sub *subscription) hold() (release func()) {
	sub.worker.metrics.held.Inc()
	sub.mu.Lock()
	sub.held++
	sub.makeUp()
	sub.mu.Unlock()
	return sync.OnceFunc(func() {
		sub.worker.metrics.held.Dec()
		sub.mu.Lock()
		sub.held--
		sub.cutDown()
		sub.mu.Unlock()
	})
}

// makeUp starts a further consumer when more is held than made up for.
func (sub *subscription) makeUp() {
	if sub.stopped || sub.session.isLost() || sub.held <= sub.spare || sub.held > sub.worker.cfg.MaxETA {
		return
	}
	limit := min(max(1, sub.spare), extraMost)
	tag, err := sub.start(limit)
	if err != nil {
		return // the session is lost, which others report
	}
	sub.extras = append(sub.extras, extra{tag, limit})
	sub.spare += limit
}

// cutDown cancels the last further consumer when it is not needed any more.
func (sub *subscription) cutDown() {
	for len(sub.extras) > 0 && !sub.session.isLost() {
		last := sub.extras[len(sub.extras)-1]
		if sub.held > sub.spare-last.limit {
			return
		}
		if err := sub.cancel(last.tag); err != nil {
			return
		}
		sub.extras = sub.extras[:len(sub.extras)-1]
		sub.spare -= last.limit
	}
}

// cancel ends one consumer; what it has delivered stays valid. sub.mu is held.
func (sub *subscription) cancel(tag string) error {
	for i, t := range sub.tags {
		if t == tag {
			sub.tags = append(sub.tags[:i], sub.tags[i+1:]...)
			sub.changes.Add(1)
			sub.consuming.Add(-1)
			break
		}
	}
	return sub.session.call("basic.cancel", func() error { return sub.session.consuming.Cancel(tag, false) })
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
