package worker

import (
	"context"
	"errors"

	amqp "github.com/rabbitmq/amqp091-go"
)

var (
	errNotConnected = errors.New("the worker is not connected to its broker")
	errOwnChanged   = errors.New("the worker's own consumers have changed meanwhile")
)

// OtherConsumers asks the broker how many consumers other than this worker's own take
// from the queue that the task's message came from. With none, nobody else can
// be given the message.
//
//   - It counts too many rather than too few: a connection that this worker
//     has lost counts until the broker has noticed.
//   - It goes on asking while the broker is silent, until ctx ends or the
//     connection is lost; the error says so. There is an error too while there
//     is no connection, and when the worker's own consumers change just then.
//   - Consumers that wait for their turn on a quorum queue with
//     x-single-active-consumer are not told of by RabbitMQ.
func (t *Task) OtherConsumers(ctx context.Context) (int, error) {
	if t.others == nil {
		return 0, errNotConnected
	}
	return t.others(ctx)
}

// otherConsumers asks on the connection of the moment, whether or not it is the one
// that holds the message.
func (w *Worker) otherConsumers(ctx context.Context, queue string) (int, error) {
	found, err := w.QueueConsumers(ctx, queue)
	return found.Other, err
}

// QueueConsumers are those that take from a queue, as the broker has them.
type QueueConsumers struct {
	// Own are this worker's, Other everybody else's: further workers of this
	// package as well as Python's.
	Own, Other int
}

// QueueConsumers asks the broker who takes from a queue. It promises what
// [Task.OtherConsumers] does. Own is no more than the broker had of this worker during
// the call: a connection that answers has not lost its consumers.
func (w *Worker) QueueConsumers(ctx context.Context, queue string) (QueueConsumers, error) {
	var found QueueConsumers
	s := w.link.now()
	if s == nil {
		return found, errNotConnected
	}
	sub := s.subscriptionOf(queue)
	before := sub.own()
	all, err := s.consumersOf(ctx, queue)
	if err != nil {
		return found, err
	}
	// One that was added or cancelled while the question was under way may be
	// in the answer, or not.
	if sub.own() != before {
		return found, errOwnChanged
	}
	found.Own = min(all, int(before.consumers))
	found.Other = all - found.Own
	return found, nil
}

// now is the session of the moment, nil for none.
func (l *link) now() *session {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.session == nil || l.session.isLost() {
		return nil
	}
	return l.session
}

// ownConsumers are a subscription's. Two that are equal have nothing between
// them, since changes only grows.
type ownConsumers struct{ consumers, changes int64 }

// own may be asked of a subscription that is nil, as the session of a worker
// that stops has none.
func (sub *subscription) own() ownConsumers {
	if sub == nil {
		return ownConsumers{}
	}
	return ownConsumers{sub.consuming.Load(), sub.changes.Load()}
}

// askers are the questions to a broker that may find no answer: one at a time,
// on a channel of their own, since a refusal closes it.
type askers struct {
	turn    chan struct{} // holds one while a question is under way
	channel *amqp.Channel // nil before the first, and after a refusal; whose turn it is has it
}

// consumersOf is how many consumers a queue has. A question that the caller
// does not wait for stays under way until it is answered or the session ends.
func (s *session) consumersOf(ctx context.Context, queue string) (int, error) {
	select {
	case s.askers.turn <- struct{}{}:
	case <-s.lost:
		return 0, errNotConnected
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
	type answer struct {
		consumers int
		err       error
	}
	answers := make(chan answer, 1)
	go func() {
		consumers, err := s.ask(queue)
		<-s.askers.turn
		answers <- answer{consumers, err}
	}()
	select {
	case a := <-answers:
		return a.consumers, a.err
	case <-s.lost:
		return 0, errNotConnected
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}

// ask has no limit of its own, unlike other calls: a broker that has just
// begun to read nothing is not lost. Heartbeats end it with the connection.
func (s *session) ask(queue string) (consumers int, err error) {
	if s.blocked.Load() {
		return 0, errCannotAsk
	}
	if s.askers.channel == nil {
		if s.askers.channel, err = s.conn.Channel(); err != nil {
			s.askers.channel = nil
			return 0, err
		}
	}
	state, err := s.askers.channel.QueueDeclarePassive(queue, true, false, false, false, nil)
	if err != nil {
		s.askers.channel = nil
		return 0, err
	}
	return state.Consumers, nil
}
