package worker

import (
	"context"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// Sender is a connection that only publishes. It routes and declares as its worker
// does, and needs no Run. Package client is built on it; a program that wants
// signatures and results uses that package.
//
// Many goroutines may use a Sender at once. It is never repaired: once [Sender.Lost]
// is closed, every call fails, and the program opens another one.
type Sender struct {
	worker    *Worker
	publisher broker.Publisher
}

// Sender connects once, to the first of Config.Broker that answers. The caller must
// call Close.
func (w *Worker) Sender(ctx context.Context) (*Sender, error) {
	p, err := w.broker.OpenPublisher(ctx)
	if err != nil {
		return nil, err
	}
	return &Sender{worker: w, publisher: p}, nil
}

// Lost is closed when the connection is lost or closed.
func (s *Sender) Lost() <-chan struct{} { return s.publisher.Lost() }

// Close closes the connection.
func (s *Sender) Close() { s.publisher.Close() }

// Send chooses the destination of a task message by what it asks for itself, by
// Config.TaskRoutes, or by Config.DefaultQueue, declares the queue as Celery does,
// publishes the message, and waits for the broker's confirm: nil means that it is in
// a queue. The error is ErrUnroutable when no queue received it, and ErrUnreachable
// when the connection was lost. After ErrUnreachable the message may or may not be in
// the queue.
func (s *Sender) Send(ctx context.Context, m protocol.Publishing, own protocol.Destination) error {
	o, err := s.worker.routed(m, own)
	if err != nil {
		return err
	}
	return s.worker.sendOn(ctx, s.publisher, o)
}

// Routed returns a task message with the exchange and routing key to which Send would
// publish it: for a program that stores messages and publishes them later, by
// [Worker.Publish].
func (w *Worker) Routed(m protocol.Publishing, own protocol.Destination) (protocol.Publishing, error) {
	o, err := w.routed(m, own)
	return o.Message, err
}

func (w *Worker) routed(m protocol.Publishing, own protocol.Destination) (broker.Publication, error) {
	to, err := w.routes.resolve(m.Task, own)
	if err != nil {
		return broker.Publication{}, &broker.UnsendableError{Task: m.Task, ID: m.TaskID, Err: err}
	}
	m.Exchange, m.RoutingKey = to.exchange, to.routingKey
	return broker.Publication{Message: m, Declare: &to.queue}, nil
}

// Broadcast declares an exchange as Celery declares that of its remote control,
// celery.pidbox: of type fanout and not durable. It publishes the message there. The
// error is ErrUnroutable when no worker listens.
func (s *Sender) Broadcast(ctx context.Context, m protocol.Publishing) error {
	if err := s.publisher.Broadcast(ctx, m); err != nil {
		return err
	}
	s.worker.metrics.published.Inc()
	return nil
}
