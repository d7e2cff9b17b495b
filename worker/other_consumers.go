package worker

import (
	"context"
	"errors"

	amqp "github.com/rabbitmq/amqp091-go"
)

var (
	errNotConnected     = errors.New("the worker is not connected to its broker")
	errConsumersChanged = errors.New("the worker's own consumers changed during the query")
)

// OtherConsumers asks the broker how many consumers the queue of the task's
// message has besides those of this worker. If it is 0, the broker can deliver
// the message to this worker only.
//
//   - The number may be too high, but not too low: the consumers of a connection
//     that this worker has lost count until the broker notices the loss.
//   - It waits for the broker's answer until ctx ends or the connection is lost.
//   - It returns an error when there is no answer, when the worker is not
//     connected, and when the worker adds or cancels a consumer during the call.
//   - RabbitMQ does not count the inactive consumers of a quorum queue with
//     x-single-active-consumer.
func (t *Task) OtherConsumers(ctx context.Context) (int, error) {
	if t.otherConsumers == nil {
		return 0, errNotConnected
	}
	return t.otherConsumers(ctx)
}

// otherConsumers asks on the current connection, even if another one delivered
// the message.
func (w *Worker) otherConsumers(ctx context.Context, queue string) (int, error) {
	found, err := w.QueueConsumers(ctx, queue)
	return found.Other, err
}

// QueueConsumers is the number of consumers of a queue, as the broker counts
// them.
type QueueConsumers struct {
	// Own are the consumers of this worker, Other those of all other programs:
	// other workers of this package as well as Python workers.
	Own, Other int
}

// QueueConsumers asks the broker for the number of consumers of a queue. The
// guarantees of [Task.OtherConsumers] hold. Own may be too low, but not too high:
// a connection that answers still has its consumers.
func (w *Worker) QueueConsumers(ctx context.Context, queue string) (QueueConsumers, error) {
	var found QueueConsumers
	s, connected := w.link.now()
	if !connected {
		return found, errNotConnected
	}
	sub := s.subscriptionOf(queue)
	before := sub.own()
	state, err := s.queueState(ctx, queue)
	if err != nil {
		return found, err
	}
	all := state.Consumers
	// The answer may or may not include a consumer that was added or cancelled
	// during the call.
	if sub.own() != before {
		return found, errConsumersChanged
	}
	found.Own = min(all, int(before.consumers))
	found.Other = all - found.Own
	return found, nil
}

// ownConsumers is a snapshot of a subscription's counters. If two snapshots are
// equal, no consumer was added or cancelled in between: changes only grows.
type ownConsumers struct{ consumers, changes int64 }

// own works on a nil subscription too: the session of a worker that stops has
// none.
func (sub *subscription) own() ownConsumers {
	if sub == nil {
		return ownConsumers{}
	}
	return ownConsumers{sub.consumerCount.Load(), sub.consumerChanges.Load()}
}

// probes sends queries that the broker may not answer. They run one at a time,
// on a channel of their own, because the broker closes it when it refuses one.
type probes struct {
	turn    chan struct{} // full while a query runs
	channel *amqp.Channel // nil before the first query and after a refusal; owned by whoever has the turn
}

// queueState asks the broker how many consumers and ready messages a queue has. The
// broker may take any time: when ctx ends first, the query continues in the
// background until the broker answers or the session is lost.
func (s *session) queueState(ctx context.Context, queue string) (amqp.Queue, error) {
	state, err := ask(ctx, s.connection, callOptions{what: "queue.declare", turn: s.probes.turn, patient: true}, func() (amqp.Queue, error) {
		return s.probe(queue)
	})
	if err != nil && s.isLost() {
		return state, errNotConnected
	}
	return state, err
}

// probe runs one query.
func (s *session) probe(queue string) (state amqp.Queue, err error) {
	if s.probes.channel == nil {
		if s.probes.channel, err = s.conn.Channel(); err != nil {
			s.probes.channel = nil
			return state, err
		}
	}
	if state, err = s.probes.channel.QueueDeclarePassive(queue, true, false, false, false, nil); err != nil {
		s.probes.channel = nil
	}
	return state, err
}
