package worker

import (
	"context"
	"errors"

	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// What a program can ask the broker, and what is known without asking is in health.go.

type (
	// Inspection is the result of [Worker.Inspect]: the broker that answered, its
	// product and version, the consumed queues, and whether publishing is allowed.
	// See [broker.Inspection] for its fields.
	Inspection = broker.Inspection
	// QueueInspection describes one of the queues of Config.Queues: whether it exists,
	// its type, its messages and consumers, and the error with which Run would fail
	// because of it. See [broker.QueueInspection] for its fields.
	QueueInspection = broker.QueueInspection
	// QueueConsumers is the number of consumers of a queue, as the broker counts
	// them: Own are those of this worker, Other those of all other programs, other
	// workers of this package as well as Python workers.
	QueueConsumers = broker.Consumers
)

// Inspect connects to the broker once and checks the consumed queues, without
// consuming or creating anything. It declares only queues and exchanges that
// exist, so that the broker compares their properties with the configured ones.
// It checks permissions that a worker needs later by requests which the broker
// authorizes and then cannot carry out. The error says why the check was not
// possible; problems of single queues are in QueueInspection.Err. It needs no
// Run. It is for a command that checks a configuration before a deployment.
func (w *Worker) Inspect(ctx context.Context) (Inspection, error) {
	queues, err := w.queues()
	if err != nil {
		return Inspection{}, err
	}
	return w.broker.Inspect(ctx, queues)
}

// QueueDepth returns how many messages are ready in a queue. It does not count
// those that a worker has received and not yet settled. While there is no
// connection it waits for one until ctx ends. The error is ErrMismatch when the
// queue does not exist. It is for metrics, and for adding or removing workers.
func (w *Worker) QueueDepth(ctx context.Context, name string) (int, error) {
	s, err := w.link.get(ctx)
	if err != nil {
		return 0, err
	}
	return s.Depth(ctx, name)
}

var (
	errNotConnected = errors.New("the worker is not connected to its broker")
	// errNoDelivery says that every delivery of the task is lost with its session.
	errNoDelivery = errors.New("the connection that delivered the task is lost")
)

// QueueConsumers asks the broker for the number of consumers of a queue. The
// guarantees of [Task.OtherConsumers] hold. Own may be too low, but not too high:
// a connection that answers still has its consumers. It is for a program that must
// know whether it is the last worker of a queue, for instance before it stops.
func (w *Worker) QueueConsumers(ctx context.Context, queue string) (QueueConsumers, error) {
	s, connected := w.link.now()
	if !connected {
		return QueueConsumers{}, errNotConnected
	}
	return s.Consumers(ctx, queue)
}

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
//
// It is for a handler that may only do something if no other worker can begin the same
// task meanwhile, for instance to end and let its message run again here.
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

// StillUnacked asks the broker whether the task's message is still delivered to
// this worker and unacknowledged. Nil means that this was true at some moment
// during the call, and that until then the broker had delivered the message to
// no other consumer. It returns an error when the connection that delivered the
// message is lost, when the broker has blocked the connection, and when ctx ends
// before the broker answers.
//
// It is for a handler that is about to do what must not be done twice, and cannot wait
// until the heartbeats notice a lost connection.
func (t *Task) StillUnacked(ctx context.Context) error {
	if t.stillUnacked == nil {
		return errNoDelivery
	}
	return t.stillUnacked(ctx)
}

func (w *Worker) stillUnacked(ctx context.Context, a *attempt) error {
	receipt := a.receipt()
	if receipt == nil {
		return errNoDelivery
	}
	return receipt.StillUnacked(ctx)
}
