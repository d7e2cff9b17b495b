package worker

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Publish sends a message as it is, persistent unless it says otherwise, and
// returns when the broker has taken responsibility for it: nil means that it
// is in a queue. It waits for a connection as long as ctx allows, and may be
// called while Run is under way, also during its shutdown.
//
// The error is ErrUnroutable when no queue took the message. After any other
// error the message may have been sent: whoever tries again must bear a
// second one.
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
	if err := s.publishAlone(ctx, m, out); err != nil {
		return err
	}
	w.metrics.published.Inc()
	return nil
}

// Connected connects once, without consuming or declaring anything, and calls
// do with a function that is Publish on that connection. It is for a program
// that only has something to publish, and needs no Run. The error says why
// there is no connection, as Run's does, or is do's.
func (w *Worker) Connected(ctx context.Context, do func(publish func(context.Context, protocol.Publishing) error) error) error {
	s, err := w.connect(ctx)
	if err != nil {
		return err
	}
	defer s.close()
	return do(func(ctx context.Context, m protocol.Publishing) error { return w.publishOn(ctx, s, m) })
}

// publishAlone publishes on a channel of its own. A message that somebody else
// made may lack the ids by which the shared channel knows what came back.
func (s *session) publishAlone(ctx context.Context, m protocol.Publishing, out amqp.Publishing) error {
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
		return s.lostBecause("publishing", err)
	}
	defer ch.Close()
	returns := ch.NotifyReturn(make(chan amqp.Return, 1))
	closed := ch.NotifyClose(make(chan *amqp.Error, 1))
	confirm, err := ch.PublishWithDeferredConfirm(m.Exchange, m.RoutingKey, true, false, out)
	if err != nil {
		return s.lostBecause("publishing", err)
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
	return fmt.Errorf("broker did not take task %s (id %s) for exchange %q with routing key %q", m.Task, m.TaskID, m.Exchange, m.RoutingKey)
}

// QueueDepth is how many messages are ready in a queue: those that a worker
// has taken and not settled are not counted. The error is ErrMismatch when
// there is no such queue.
func (w *Worker) QueueDepth(ctx context.Context, name string) (int, error) {
	s, err := w.link.get(ctx)
	if err != nil {
		return 0, err
	}
	defer s.guard("queue.declare")()
	ch, err := s.conn.Channel()
	if err != nil {
		return 0, s.lostBecause("looking at a queue", err)
	}
	defer ch.Close()
	q, err := ch.QueueDeclarePassive(name, true, false, false, false, nil)
	if err != nil {
		return 0, s.declareError(Queue{Name: name, Passive: true}, err)
	}
	return q.Messages, nil
}

// Headers that a message in Config.DeadLetterQueue has besides its own.
const (
	// HeaderReason says in words why it was given up.
	HeaderReason = "x-mm-orchestrator-reason"
	// HeaderQueue is the queue that it came from.
	HeaderQueue = "x-mm-orchestrator-queue"
	// HeaderTime is when, in RFC 3339.
	HeaderTime = "x-mm-orchestrator-time"
)

// maxReason keeps the reason from filling the frame that holds all headers.
const maxReason = 1024

// deadLetter ends a delivery that can never be run: it goes to the configured
// queue and is acknowledged, or it is rejected.
func (w *Worker) deadLetter(d *delivery, taskID, reason string) {
	if w.cfg.DeadLetterQueue == "" {
		d.settle(verdictReject)
		return
	}
	headers := maps.Clone(d.wire.Headers)
	if headers == nil {
		headers = map[string]any{}
	}
	reason = cleanText(reason)
	if len(reason) > maxReason {
		reason = cleanText(reason[:maxReason]) + "…"
	}
	headers[HeaderReason], headers[HeaderQueue] = reason, d.sub.queue.Name
	headers[HeaderTime] = w.cfg.Now().UTC().Format(time.RFC3339)
	m := protocol.Publishing{
		TaskID: taskID, RoutingKey: w.cfg.DeadLetterQueue,
		Headers: headers, Properties: d.wire.Properties, Body: d.wire.Body,
	}
	// It is kept until somebody has looked at it.
	m.Properties.Expiration = ""
	err := w.insist(w.life.settle, "publish", func(ctx context.Context) error {
		err := w.Publish(ctx, m)
		if errors.Is(err, ErrUnroutable) {
			if err := w.makeDeadLetterQueue(ctx); err != nil {
				return err
			}
			err = w.Publish(ctx, m)
		}
		return err
	})
	var unsendable *unsendableError
	switch {
	case errors.As(err, &unsendable):
		w.cfg.Logger.Error("message cannot be moved to the dead-letter queue and is rejected", "task_id", taskID, "error", err)
		d.settle(verdictReject)
	case err != nil:
		w.handBack(d, err)
	default:
		d.settle(verdictAck)
	}
}

// makeDeadLetterQueue declares it as it is needed: one that exists is used in
// whatever shape it has.
func (w *Worker) makeDeadLetterQueue(ctx context.Context) error {
	s, err := w.link.get(ctx)
	if err != nil {
		return err
	}
	defer s.guard("queue.declare")()
	ch, err := s.conn.Channel()
	if err != nil {
		return s.lostBecause("declaring", err)
	}
	defer ch.Close()
	if _, err := ch.QueueDeclare(w.cfg.DeadLetterQueue, true, false, false, false, nil); err != nil {
		return s.declareError(Queue{Name: w.cfg.DeadLetterQueue}, err)
	}
	return nil
}
