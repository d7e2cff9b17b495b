package worker

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

const (
	// confirmTimeout is how long a connected broker that takes messages may
	// leave one unconfirmed before the connection counts as lost.
	confirmTimeout = 60 * time.Second
	// outstanding bounds the messages that wait for their confirm at once. It
	// is also the room for returned messages, so that the library's reader
	// never waits for us.
	outstanding = 64
	// maxHeaderBytes keeps a content header in one frame, as it must be.
	maxHeaderBytes = 131072 - 8 - 2048
)

// publisher sends messages over one connection and waits until the broker has
// taken responsibility for each.
type publisher struct {
	session *session
	slots   chan struct{}

	mu      sync.Mutex // guards all below
	channel *amqp.Channel
	returns chan amqp.Return
	// returned holds, by message id (the task id), what the broker sent back.
	returned map[string]amqp.Return
	waiting  map[string]int
}

func (p *publisher) init(s *session) {
	p.session = s
	p.slots = make(chan struct{}, outstanding)
	p.returned = map[string]amqp.Return{}
	p.waiting = map[string]int{}
}

// open returns the publishing channel, a new one when the last was closed by
// a refused message. p.mu is held.
func (p *publisher) open() (*amqp.Channel, error) {
	if p.channel != nil && !p.channel.IsClosed() {
		return p.channel, nil
	}
	defer p.session.guard("channel.open")()
	channel, err := p.session.conn.Channel()
	if err != nil {
		return nil, err
	}
	if err := channel.Confirm(false); err != nil {
		return nil, err
	}
	p.channel = channel
	p.returns = channel.NotifyReturn(make(chan amqp.Return, outstanding))
	return channel, nil
}

// publish sends one message, mandatory, and waits for the broker's confirm.
// The error is ErrUnroutable when no queue took it, a *unsendableError when
// AMQP cannot carry it, and otherwise worth a retry.
func (p *publisher) publish(ctx context.Context, m protocol.Publishing) error {
	out, err := amqpPublishing(m)
	if err != nil {
		return err
	}
	leave, err := p.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()

	confirm, channel, err := p.send(m, out)
	if err != nil {
		return p.session.lostBecause("publishing", err)
	}
	defer p.forget(m.TaskID)
	faultpoint.Hit(faultpoint.PublishSent, m.TaskID)
	if err := p.await(ctx, confirm); err != nil {
		return err
	}
	if back, ok := p.takeReturn(m.TaskID); ok {
		return fmt.Errorf("%w: task %s (id %s) to exchange %q with routing key %q: declare or bind a queue there, or correct the route (RabbitMQ: %d %s)",
			ErrUnroutable, m.Task, m.TaskID, m.Exchange, m.RoutingKey, back.ReplyCode, back.ReplyText)
	}
	if !confirm.Acked() {
		if channel.IsClosed() && !p.session.isLost() {
			return fmt.Errorf("%w: task %s (id %s): the broker closed the channel on a message to exchange %q with routing key %q: check that the exchange exists and may be written to",
				ErrUnroutable, m.Task, m.TaskID, m.Exchange, m.RoutingKey)
		}
		return fmt.Errorf("broker did not take task %s (id %s) for exchange %q with routing key %q", m.Task, m.TaskID, m.Exchange, m.RoutingKey)
	}
	return nil
}

// enter waits until fewer than the most messages wait for their confirm.
func (p *publisher) enter(ctx context.Context) (leave func(), err error) {
	select {
	case p.slots <- struct{}{}:
		return func() { <-p.slots }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-p.session.lost:
		return nil, p.session.lostBecause("publishing", p.session.lostErr)
	}
}

func (p *publisher) send(m protocol.Publishing, out amqp.Publishing) (*amqp.DeferredConfirmation, *amqp.Channel, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	channel, err := p.open()
	if err != nil {
		return nil, nil, err
	}
	p.waiting[m.TaskID]++
	confirm, err := channel.PublishWithDeferredConfirm(m.Exchange, m.RoutingKey, true, false, out)
	if err != nil {
		p.release(m.TaskID)
		return nil, nil, err
	}
	return confirm, channel, nil
}

// await waits for a confirm, as long as a blocked broker needs.
func (p *publisher) await(ctx context.Context, confirm *amqp.DeferredConfirmation) error {
	timer := time.NewTimer(confirmTimeout)
	defer timer.Stop()
	for {
		select {
		case <-confirm.Done():
			return nil
		case <-p.session.lost:
			return p.session.lostBecause("publishing", p.session.lostErr)
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-timer.C:
			if p.session.blocked.Load() {
				timer.Reset(confirmTimeout)
				continue
			}
			err := fmt.Errorf("no confirm within %v", confirmTimeout)
			p.session.fail(err)
			return p.session.lostBecause("publishing", err)
		}
	}
}

// takeReturn tells whether the message of a task came back. A return precedes
// its confirm, so it is in the channel by now.
func (p *publisher) takeReturn(taskID string) (amqp.Return, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		select {
		case r, ok := <-p.returns:
			if !ok {
				p.returns = nil
				continue
			}
			if p.waiting[r.MessageId] > 0 {
				p.returned[r.MessageId] = r
			} else if p.waiting[r.CorrelationId] > 0 {
				p.returned[r.CorrelationId] = r
			}
			continue
		default:
		}
		break
	}
	r, ok := p.returned[taskID]
	return r, ok
}

func (p *publisher) forget(taskID string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.release(taskID)
}

// release ends the wait of one message. p.mu is held.
func (p *publisher) release(taskID string) {
	if p.waiting[taskID]--; p.waiting[taskID] <= 0 {
		delete(p.waiting, taskID)
		delete(p.returned, taskID)
	}
}

// unsendableError says that AMQP cannot carry a message: no retry helps.
type unsendableError struct {
	task, id string
	err      error
}

func (e *unsendableError) Error() string {
	return fmt.Sprintf("task %s (id %s) cannot be published: %v", e.task, e.id, e.err)
}

func (e *unsendableError) Unwrap() error { return e.err }

// amqpPublishing makes the library's form of a message and checks everything
// for which the library or the broker would close the connection.
func amqpPublishing(m protocol.Publishing) (amqp.Publishing, error) {
	unsendable := func(err error) error { return &unsendableError{task: m.Task, id: m.TaskID, err: err} }
	for name, text := range map[string]string{
		"exchange": m.Exchange, "routing key": m.RoutingKey, "content type": m.Properties.ContentType,
		"content encoding": m.Properties.ContentEncoding, "correlation id": m.Properties.CorrelationID,
		"reply address": m.Properties.ReplyTo, "expiration": m.Properties.Expiration,
		"message id": m.Properties.MessageID, "type": m.Properties.Type, "application id": m.Properties.AppID,
	} {
		if len(text) > 255 {
			return amqp.Publishing{}, unsendable(fmt.Errorf("its %s is longer than 255 bytes", name))
		}
	}
	headers, err := amqpTable(m.Headers)
	if err != nil {
		return amqp.Publishing{}, unsendable(err)
	}
	if size := fieldSize(headers); size > maxHeaderBytes {
		return amqp.Publishing{}, unsendable(fmt.Errorf("its headers take %d bytes, more than the %d of an AMQP frame", size, maxHeaderBytes))
	}
	mode := m.Properties.DeliveryMode
	if mode != amqp.Transient {
		mode = amqp.Persistent
	}
	out := amqp.Publishing{
		Headers:         headers,
		ContentType:     m.Properties.ContentType,
		ContentEncoding: m.Properties.ContentEncoding,
		DeliveryMode:    mode,
		CorrelationId:   m.Properties.CorrelationID,
		ReplyTo:         m.Properties.ReplyTo,
		Expiration:      m.Properties.Expiration,
		MessageId:       m.Properties.MessageID,
		Type:            m.Properties.Type,
		AppId:           m.Properties.AppID,
		Timestamp:       m.Properties.Timestamp,
		Body:            m.Body,
	}
	if p := m.Properties.Priority; p != nil {
		if out.Priority = *p; *p == 0 {
			out.Priority = 1
			out.DeliveryMode |= priorityZero
		}
	}
	return out, nil
}

// outgoing is a message with its way.
type outgoing struct {
	message protocol.Publishing
	way     way
}

// address gives follow-ups their exchange and routing key.
func (w *Worker) address(followUps []protocol.FollowUp) ([]outgoing, error) {
	messages := make([]outgoing, 0, len(followUps))
	for _, f := range followUps {
		to, err := w.routes.resolve(f.Publishing.Task, f.Destination)
		if err != nil {
			return nil, &unsendableError{task: f.Publishing.Task, id: f.Publishing.TaskID, err: err}
		}
		m := f.Publishing
		m.Exchange, m.RoutingKey = to.exchange, to.routingKey
		m.Properties.Priority = w.priority(m, f.Destination)
		if r, known := w.registry[m.Task]; known && m.Headers["ignore_result"] == nil {
			// Null would mean the same, but a worker says what it knows.
			m.Headers["ignore_result"] = r.ignoreResult
		}
		if _, err := amqpPublishing(m); err != nil {
			return nil, err
		}
		messages = append(messages, outgoing{message: m, way: to})
	}
	return messages, nil
}

// priority leaves out a priority of 0 for a task that this worker knows and
// whose signature names a queue, as Celery does
// (docs/celery.md#message-properties). A 0 that the signature itself gives goes
// too: to the broker both are the same.
func (w *Worker) priority(m protocol.Publishing, own protocol.Destination) *uint8 {
	priority := m.Properties.Priority
	if _, known := w.registry[m.Task]; known && own.Queue != "" && priority != nil && *priority == 0 {
		return nil
	}
	return priority
}

// send publishes a message on the connection of the moment, once; its queue
// is declared before, as Celery does.
func (w *Worker) send(ctx context.Context, o outgoing) error {
	s, err := w.link.get(ctx)
	if err != nil {
		return err
	}
	if o.way.queue.Name != "" {
		err := s.declare(o.way.queue)
		var mismatch *MismatchError
		switch {
		case errors.As(err, &mismatch):
			// It exists, otherwise than we think: the message may well reach
			// it, and the broker tells us when not.
			s.leaveDeclared(o.way.queue.Name)
			w.cfg.Logger.Info("publishing to a queue that is declared otherwise", "queue", o.way.queue.Name, "error", err)
		case err != nil:
			return err
		}
	}
	if err := s.publisher.publish(ctx, o.message); err != nil {
		return err
	}
	w.metrics.published.Inc()
	return nil
}
