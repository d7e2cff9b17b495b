package worker

import (
	"context"
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
	s, err := w.link.get(ctx)
	if err != nil {
		return err
	}
	return w.publishOn(ctx, s, m)
}

func (w *Worker) publishOn(ctx context.Context, s *session, m protocol.Publishing) error {
	out, err := amqpPublishing(m)
	if err != nil {
		return err
	}
	if err := s.publishOnOwnChannel(ctx, m, out); err != nil {
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
	s, err := w.connect(ctx)
	if err != nil {
		return err
	}
	defer s.close()
	return do(func(ctx context.Context, m protocol.Publishing) error { return w.publishOn(ctx, s, m) })
}

// publishOnOwnChannel publishes on a channel that is opened for this message. The
// shared channel matches returned messages by task id, which a message that the
// application made may lack.
func (s *session) publishOnOwnChannel(ctx context.Context, m protocol.Publishing, out amqp.Publishing) error {
	leave, err := s.publisher.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	opened := s.guard("channel.open")
	ch, err := s.conn.Channel()
	if err == nil {
		err = ch.Confirm(false)
	}
	opened()
	if err != nil {
		return s.connectionError("publishing", err)
	}
	defer ch.Close()
	returns := ch.NotifyReturn(make(chan amqp.Return, 1))
	closed := ch.NotifyClose(make(chan *amqp.Error, 1))
	confirm, err := ch.PublishWithDeferredConfirm(m.Exchange, m.RoutingKey, true, false, out)
	if err != nil {
		return s.connectionError("publishing", err)
	}
	if err := s.publisher.await(ctx, confirm); err != nil {
		return err
	}
	unroutable := func(code int, reason string) error {
		return fmt.Errorf("%w: task %s (id %s) to exchange %q with routing key %q (RabbitMQ: %d %s)",
			ErrUnroutable, m.Task, m.TaskID, m.Exchange, m.RoutingKey, code, reason)
	}
	select {
	case back, ok := <-returns: // precedes its confirm
		if ok {
			return unroutable(int(back.ReplyCode), back.ReplyText)
		}
	default:
	}
	if confirm.Acked() {
		return nil
	}
	select {
	case err := <-closed:
		if err != nil && err.Server && !s.isLost() {
			return unroutable(err.Code, err.Reason)
		}
	default:
	}
	return fmt.Errorf("broker did not accept task %s (id %s) for exchange %q with routing key %q", m.Task, m.TaskID, m.Exchange, m.RoutingKey)
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
	defer s.guard("queue.declare")()
	ch, err := s.conn.Channel()
	if err != nil {
		return 0, s.connectionError(fmt.Sprintf("counting the messages of queue %q", name), err)
	}
	defer ch.Close()
	q, err := ch.QueueDeclarePassive(name, true, false, false, false, nil)
	if err != nil {
		return 0, s.declareError(Queue{Name: name}, err)
	}
	return q.Messages, nil
}
