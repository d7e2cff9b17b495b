// Package memory is a [broker.Broker] inside this process, for tests: a worker and a
// client with the same [Broker] as their Transport need no server. It keeps the
// promises of package broker that do not need one. A message is lost with the process.
//
// Exchanges are of type direct or fanout. Priorities, expiration, dead-letter exchanges
// and the arguments of queues have no effect, and a queue counts no returns.
package memory

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// Broker has queues and connections. [New] makes one.
type Broker struct {
	mu          sync.Mutex // guards all below, and all that belongs to a connection
	changed     *sync.Cond // a message, a limit or a connection has changed
	queues      map[string]*queue
	bindings    map[string][]binding // by exchange
	connections map[*connection]bool
}

var _ broker.Broker = (*Broker)(nil)

// queue is a queue with its ready messages, the next one first.
type queue struct {
	declared  broker.Queue
	ready     []protocol.Delivery
	consumers map[*connection]int
}

type binding struct {
	queue string
	key   string
	all   bool // the exchange is a fanout
}

// New returns a broker without queues.
func New() *Broker {
	b := &Broker{queues: map[string]*queue{}, bindings: map[string][]binding{}, connections: map[*connection]bool{}}
	b.changed = sync.NewCond(&b.mu)
	return b
}

// Disconnect loses all connections, as a restart of a server does. Messages that are
// not settled go back to their queues.
func (b *Broker) Disconnect() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for c := range b.connections {
		c.lose(errors.New("disconnected"))
	}
}

// CheckQueue refuses exchanges of other types than direct and fanout.
func (b *Broker) CheckQueue(q broker.Queue) error {
	switch q.ExchangeType {
	case "", "direct", "fanout":
		return nil
	}
	return fmt.Errorf("exchange type %q: package memory has direct and fanout", q.ExchangeType)
}

// CheckMessage returns nil.
func (b *Broker) CheckMessage(protocol.Publishing) error { return nil }

// Inspect says which queues exist.
func (b *Broker) Inspect(_ context.Context, queues []broker.Queue) (broker.Inspection, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	found := broker.Inspection{Broker: place, Server: "memory"}
	for _, q := range queues {
		inspected := broker.QueueInspection{Name: q.Name, Exchange: q.Exchange, ExchangeExists: b.bindings[q.Exchange] != nil}
		if known := b.queues[q.Name]; known != nil {
			inspected.Exists, inspected.Messages, inspected.Consumers = true, len(known.ready), known.count()
		}
		if inspected.Exists || q.Passive {
			inspected.Err = b.check(q)
		}
		found.Queues = append(found.Queues, inspected)
	}
	return found, nil
}

// check compares a declaration with what exists. The caller has locked b.mu.
func (b *Broker) check(q broker.Queue) error {
	known := b.queues[q.Name]
	switch {
	case known == nil && q.Passive:
		return &broker.MismatchError{What: "queue", Name: q.Name, Cure: "Declare it first.", Broker: "memory"}
	case known != nil && !q.Passive && q.ExchangeType != "" && known.declared.ExchangeType != "" && q.ExchangeType != known.declared.ExchangeType:
		return &broker.MismatchError{What: "exchange", Name: q.Exchange, Argument: "type", Current: known.declared.ExchangeType,
			Exists: "with type " + known.declared.ExchangeType, Want: "type " + q.ExchangeType, Cure: "Set ExchangeType of the queue in TaskQueues.", Broker: "memory"}
	}
	return nil
}

// declare adds a queue and its binding. The caller has locked b.mu.
func (b *Broker) declare(q broker.Queue) error {
	if err := errors.Join(b.check(q), b.CheckQueue(q)); err != nil || q.Passive {
		return err
	}
	if b.queues[q.Name] == nil {
		b.queues[q.Name] = &queue{declared: q, consumers: map[*connection]int{}}
	}
	if added := (binding{queue: q.Name, key: q.RoutingKey, all: q.ExchangeType == "fanout"}); q.Exchange != "" && !slices.Contains(b.bindings[q.Exchange], added) {
		b.bindings[q.Exchange] = append(b.bindings[q.Exchange], added)
	}
	return nil
}

func (q *queue) count() int {
	all := 0
	for _, n := range q.consumers {
		all += n
	}
	return all
}

// missing is the error about a queue that does not exist.
func missing(name string) error {
	return &broker.MismatchError{What: "queue", Name: name, Cure: "Declare it first.", Broker: "memory"}
}

// place is what Place returns.
const place = "memory"

// connection is a Consumer or a Publisher.
type connection struct {
	b             *Broker
	lost          chan struct{}
	err           error
	subscriptions []*subscription
	delivering    sync.WaitGroup
}

func (b *Broker) open(ctx context.Context, queues []broker.Queue) (*connection, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, q := range queues {
		if err := b.declare(q); err != nil {
			return nil, err
		}
	}
	c := &connection{b: b, lost: make(chan struct{})}
	b.connections[c] = true
	return c, nil
}

// OpenConsumer declares the queues.
func (b *Broker) OpenConsumer(ctx context.Context, queues []broker.Queue) (broker.Consumer, error) {
	c, err := b.open(ctx, queues)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// OpenPublisher cannot fail.
func (b *Broker) OpenPublisher(ctx context.Context) (broker.Publisher, error) {
	c, err := b.open(ctx, nil)
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (c *connection) Place() string          { return place }
func (c *connection) Lost() <-chan struct{}  { return c.lost }
func (c *connection) Blocked() time.Duration { return 0 }

func (c *connection) Err() error {
	c.b.mu.Lock()
	defer c.b.mu.Unlock()
	return c.err
}

// lose ends the connection. The caller has locked b.mu.
func (c *connection) lose(err error) {
	if c.err != nil {
		return
	}
	c.err = err
	close(c.lost)
	delete(c.b.connections, c)
	for _, s := range c.subscriptions {
		s.stop()
		for _, r := range slices.Backward(s.unacked) {
			s.queue.back(r.message)
		}
		s.unacked = nil
	}
	c.b.changed.Broadcast()
}

// usable returns an error if the connection is lost. The caller has locked b.mu.
func (c *connection) usable() error {
	if c.err != nil {
		return fmt.Errorf("%w: %s: %w", broker.ErrUnreachable, place, c.err)
	}
	return nil
}

func (c *connection) Close() {
	c.b.mu.Lock()
	c.lose(errors.New("closed"))
	c.b.mu.Unlock()
	c.delivering.Wait()
}

// back puts a message in front, marked as redelivered.
func (q *queue) back(m protocol.Delivery) {
	m.Redelivered = true
	q.ready = slices.Insert(q.ready, 0, m)
}

// subscription is the receiving of a queue.
type subscription struct {
	c              *connection
	queue          *queue
	limit, delayed int
	unacked        []*receipt // in the order of their delivery
	stopped        bool
	ended          chan struct{} // nil for what Get takes
}

func (c *connection) Subscribe(_ context.Context, q broker.Queue, limit int, deliver func(broker.Delivery)) (broker.Subscription, error) {
	c.b.mu.Lock()
	defer c.b.mu.Unlock()
	if err := c.usable(); err != nil {
		return nil, err
	}
	from := c.b.queues[q.Name]
	if from == nil {
		return nil, missing(q.Name)
	}
	s := &subscription{c: c, queue: from, limit: limit, ended: make(chan struct{})}
	c.subscriptions = append(c.subscriptions, s)
	from.consumers[c]++
	c.delivering.Go(func() {
		defer close(s.ended)
		for {
			r := s.next()
			if r == nil {
				return
			}
			deliver(broker.Delivery{Message: r.message, Receipt: r})
		}
	})
	return s, nil
}

var _ broker.Getter = (*connection)(nil)

// Get takes the first ready message.
func (c *connection) Get(_ context.Context, q broker.Queue) (broker.Delivery, int, bool, error) {
	c.b.mu.Lock()
	defer c.b.mu.Unlock()
	if err := c.usable(); err != nil {
		return broker.Delivery{}, 0, false, err
	}
	from := c.b.queues[q.Name]
	if from == nil {
		return broker.Delivery{}, 0, false, missing(q.Name)
	}
	if len(from.ready) == 0 {
		return broker.Delivery{}, 0, false, nil
	}
	// What Get takes belongs to a subscription that has ended.
	i := slices.IndexFunc(c.subscriptions, func(s *subscription) bool { return s.queue == from && s.ended == nil })
	if i < 0 {
		i = len(c.subscriptions)
		c.subscriptions = append(c.subscriptions, &subscription{c: c, queue: from, stopped: true})
	}
	r := c.subscriptions[i].take()
	return broker.Delivery{Message: r.message, Receipt: r}, len(from.ready), true, nil
}

// take takes the first ready message. The caller has locked b.mu.
func (s *subscription) take() *receipt {
	r := &receipt{from: s, message: s.queue.ready[0]}
	s.queue.ready = s.queue.ready[1:]
	s.unacked = append(s.unacked, r)
	return r
}

// next waits for a message and for room. It returns nil when the subscription ends.
func (s *subscription) next() *receipt {
	s.c.b.mu.Lock()
	defer s.c.b.mu.Unlock()
	for !s.stopped {
		if len(s.queue.ready) > 0 && len(s.unacked) < s.limit+s.delayed {
			return s.take()
		}
		s.c.b.changed.Wait()
	}
	return nil
}

// stop ends the subscription. The caller has locked b.mu.
func (s *subscription) stop() {
	if !s.stopped {
		s.stopped = true
		s.queue.consumers[s.c]--
		s.c.b.changed.Broadcast()
	}
}

func (s *subscription) Delay(_ context.Context, messages int) {
	s.c.b.mu.Lock()
	defer s.c.b.mu.Unlock()
	s.delayed = messages
	s.c.b.changed.Broadcast()
}

func (s *subscription) Stop(ctx context.Context) {
	s.c.b.mu.Lock()
	s.stop()
	s.c.b.mu.Unlock()
	select {
	case <-s.ended:
	case <-s.c.lost:
	case <-ctx.Done():
	}
}

// receipt is a delivery that is not settled as long as it is in unacked.
type receipt struct {
	from    *subscription
	message protocol.Delivery
}

func (r *receipt) settle(requeue bool) {
	s := r.from
	s.c.b.mu.Lock()
	defer s.c.b.mu.Unlock()
	i := slices.Index(s.unacked, r)
	if i < 0 {
		return // the connection is lost
	}
	s.unacked = slices.Delete(s.unacked, i, i+1)
	if requeue {
		s.queue.back(r.message)
	}
	s.c.b.changed.Broadcast()
}

func (r *receipt) Ack()     { r.settle(false) }
func (r *receipt) Reject()  { r.settle(false) }
func (r *receipt) Requeue() { r.settle(true) }

func (r *receipt) StillUnacked(context.Context) error {
	r.from.c.b.mu.Lock()
	defer r.from.c.b.mu.Unlock()
	if !slices.Contains(r.from.unacked, r) {
		return errors.New("the delivery is settled, or its connection is lost")
	}
	return nil
}

func (r *receipt) Copy() protocol.Publishing {
	headers := maps.Clone(r.message.Headers)
	if headers == nil {
		headers = map[string]any{}
	}
	return protocol.Publishing{TaskID: r.message.Properties.CorrelationID, RoutingKey: r.from.queue.declared.Name,
		Headers: headers, Properties: r.message.Properties, Body: r.message.Body}
}

func (c *connection) Depth(_ context.Context, name string) (int, error) {
	c.b.mu.Lock()
	defer c.b.mu.Unlock()
	q := c.b.queues[name]
	if q == nil {
		return 0, missing(name)
	}
	return len(q.ready), c.usable()
}

func (c *connection) Consumers(_ context.Context, name string) (broker.Consumers, error) {
	c.b.mu.Lock()
	defer c.b.mu.Unlock()
	q := c.b.queues[name]
	if q == nil {
		return broker.Consumers{}, missing(name)
	}
	return broker.Consumers{Own: q.consumers[c], Other: q.count() - q.consumers[c]}, c.usable()
}

func (c *connection) Publish(ctx context.Context, m protocol.Publishing, declare *broker.Queue) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	c.b.mu.Lock()
	defer c.b.mu.Unlock()
	if err := c.usable(); err != nil {
		return err
	}
	if declare != nil {
		var mismatch *broker.MismatchError
		if err := c.b.declare(*declare); err != nil && !errors.As(err, &mismatch) {
			return err
		}
	}
	to := c.b.route(m)
	if len(to) == 0 {
		return fmt.Errorf("%w: task %s (id %s) to exchange %q with routing key %q: declare or bind a queue there, or correct the route",
			broker.ErrUnroutable, m.Task, m.TaskID, m.Exchange, m.RoutingKey)
	}
	for _, q := range to {
		q.ready = append(q.ready, protocol.Delivery{Headers: maps.Clone(m.Headers), Properties: m.Properties,
			Exchange: m.Exchange, RoutingKey: m.RoutingKey, Body: m.Body})
	}
	c.b.changed.Broadcast()
	return nil
}

// PublishAll publishes one message after the other.
func (c *connection) PublishAll(ctx context.Context, messages []broker.Publication) []error {
	errs := make([]error, len(messages))
	for i, m := range messages {
		errs[i] = c.Publish(ctx, m.Message, m.Declare)
	}
	return errs
}

// route returns the queues that take a message. The caller has locked b.mu.
func (b *Broker) route(m protocol.Publishing) []*queue {
	var to []*queue
	if q := b.queues[m.RoutingKey]; m.Exchange == "" && q != nil {
		to = append(to, q)
	}
	for _, bound := range b.bindings[m.Exchange] {
		if q := b.queues[bound.queue]; (bound.all || bound.key == m.RoutingKey) && !slices.Contains(to, q) {
			to = append(to, q)
		}
	}
	return to
}

func (c *connection) Broadcast(ctx context.Context, m protocol.Publishing) error {
	return c.Publish(ctx, m, nil)
}
