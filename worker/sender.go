package worker

import (
	"context"
	"errors"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Sender is a connection that only publishes. It routes and declares as its worker
// does, and needs no Run. Package client is built on it; a program that wants
// signatures and results uses that package.
//
// Many goroutines may use a Sender at once. It is never repaired: once [Sender.Lost]
// is closed, every call fails, and the program opens another one.
type Sender struct {
	worker  *Worker
	session *session
}

// Sender connects once, to the first of Config.Broker that answers. The caller must
// call Close.
func (w *Worker) Sender(ctx context.Context) (*Sender, error) {
	s, err := w.connect(ctx)
	if err != nil {
		return nil, err
	}
	return &Sender{worker: w, session: s}, nil
}

// Lost is closed when the connection is lost or closed.
func (s *Sender) Lost() <-chan struct{} { return s.session.lost }

// Close closes the connection.
func (s *Sender) Close() { s.session.close() }

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
	return s.worker.sendOn(ctx, s.session, o)
}

// Routed returns a task message with the exchange and routing key to which Send would
// publish it: for a program that stores messages and publishes them later, by
// [Worker.Publish].
func (w *Worker) Routed(m protocol.Publishing, own protocol.Destination) (protocol.Publishing, error) {
	o, err := w.routed(m, own)
	return o.message, err
}

func (w *Worker) routed(m protocol.Publishing, own protocol.Destination) (outgoing, error) {
	to, err := w.routes.resolve(m.Task, own)
	if err != nil {
		return outgoing{}, &unsendableError{task: m.Task, id: m.TaskID, err: err}
	}
	m.Exchange, m.RoutingKey = to.exchange, to.routingKey
	return outgoing{message: m, destination: to}, nil
}

// Broadcast declares an exchange as Celery declares that of its remote control,
// celery.pidbox: of type fanout and not durable. It publishes the message there. The
// error is ErrUnroutable when no worker listens.
func (s *Sender) Broadcast(ctx context.Context, m protocol.Publishing) error {
	err := s.session.onChannel("exchange.declare", func(ch *amqp.Channel) error {
		return ch.ExchangeDeclare(m.Exchange, "fanout", false, false, false, false, nil)
	})
	if err != nil {
		return s.session.declareError(Queue{Name: m.Exchange, Exchange: m.Exchange}, err)
	}
	return s.worker.publishOn(ctx, s.session, m)
}

// onChannel calls do with a channel that is closed afterwards.
func (s *session) onChannel(what string, do func(*amqp.Channel) error) error {
	defer s.guard(what)()
	ch, err := s.conn.Channel()
	if err != nil {
		return err
	}
	defer ch.Close()
	return do(ch)
}

// sendOn declares the message's queue, as Celery does, and publishes the message,
// once.
func (w *Worker) sendOn(ctx context.Context, s *session, o outgoing) error {
	if o.destination.queue.Name != "" {
		err := s.declare(o.destination.queue)
		var mismatch *MismatchError
		switch {
		case errors.As(err, &mismatch):
			// The queue exists with other properties, but may still receive the
			// message. If it does not, the broker returns the message.
			s.acceptDeclaration(o.destination.queue.Name)
			w.cfg.Logger.Info("publishing to a queue whose declaration differs", "queue", o.destination.queue.Name, "error", err)
		case err != nil:
			return err
		}
	}
	if err := s.publisher.publish(ctx, o.message); err != nil {
		if s.conn.IsClosed() && !errors.Is(err, ErrUnreachable) && ctx.Err() == nil {
			// amqp091-go answers open confirms as refused before it says that the
			// connection is lost.
			return s.connectionError("publishing", err)
		}
		return err
	}
	w.metrics.published.Inc()
	return nil
}
