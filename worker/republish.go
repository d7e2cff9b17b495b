package worker

import (
	"context"
	"errors"
	"fmt"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Publish publishes a message unchanged, as persistent unless its properties say
// transient, and waits for the broker's confirm: nil means that the message is
// in a queue. While there is no connection it waits for one until ctx ends. So
// it does before Run connects and after Run has returned: give it a ctx that
// ends. It may be called during the shutdown, and by handlers.
//
// m.Exchange and m.RoutingKey say where it goes; the exchange "" with the name of
// a queue as routing key is that queue. Config.TaskRoutes are not applied.
//
// The error is ErrUnroutable when no queue received the message. After any other
// error the message may or may not be in the queue, so that a retry may publish
// it twice.
func (w *Worker) Publish(ctx context.Context, m protocol.Publishing) error {
	p, err := w.publishing.get(ctx)
	if err != nil {
		return err
	}
	return w.publishOn(ctx, p, m)
}

func (w *Worker) publishOn(ctx context.Context, p *publisher, m protocol.Publishing) error {
	if err := p.publish(ctx, m); err != nil {
		return err
	}
	w.metrics.published.Inc()
	return nil
}

// WithConnection connects once, without consuming or declaring anything, and
// calls do with a function that does what [Worker.Publish] does on that
// connection. It closes the connection when do returns. It is for a program that
// only publishes, and needs no Run. It returns the error of the connection, as
// Run does, or that of do.
func (w *Worker) WithConnection(ctx context.Context, do func(publish func(context.Context, protocol.Publishing) error) error) error {
	p, err := w.connectPublisher(ctx)
	if err != nil {
		return err
	}
	defer p.close()
	return do(func(ctx context.Context, m protocol.Publishing) error { return w.publishOn(ctx, p, m) })
}

// QueueDepth returns how many messages are ready in a queue. It does not count
// those that a worker has received and not yet settled. While there is no
// connection it waits for one until ctx ends. The error is ErrMismatch when the
// queue does not exist.
func (w *Worker) QueueDepth(ctx context.Context, name string) (int, error) {
	s, err := w.link.get(ctx)
	if err != nil {
		return 0, err
	}
	found, err := s.queueState(ctx, name)
	var refused *amqp.Error
	switch {
	case errors.As(err, &refused):
		return 0, s.declareError(Queue{Name: name}, err)
	case err != nil && ctx.Err() != nil:
		return 0, err
	case err != nil:
		return 0, s.connectionError(fmt.Sprintf("counting the messages of queue %q", name), err)
	}
	return found.Messages, nil
}
