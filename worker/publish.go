package worker

import (
	"context"
	"fmt"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

const (
	// confirmTimeout is how long a broker may leave a message unconfirmed before
	// the connection counts as lost. Time while it accepts no messages
	// (connection.blocked) does not count.
	confirmTimeout = 60 * time.Second
	// unconfirmedMax bounds the messages that wait for their confirm at the same
	// time. It is also the buffer for returned messages, so that amqp091-go's
	// reader never blocks on it.
	unconfirmedMax = 64
	// maxHeaderBytes is what fits into one frame besides the other properties:
	// AMQP does not split a content header.
	maxHeaderBytes = 131072 - 8 - 2048
)

// publisher publishes messages over one connection and waits for the broker's
// confirm of each.
type publisher struct {
	session     *session
	unconfirmed chan struct{} // one element for each message that waits for its confirm

	mu       sync.Mutex // guards all below
	channel  *amqp.Channel
	returns  chan amqp.Return
	returned map[string]amqp.Return // by task id: what the broker returned as unroutable
	waiting  map[string]int         // by task id: how many messages wait for their confirm
}

func (p *publisher) init(s *session) {
	p.session = s
	p.unconfirmed = make(chan struct{}, unconfirmedMax)
	p.returned = map[string]amqp.Return{}
	p.waiting = map[string]int{}
}

// open returns the channel for publishing. It opens a new one when the broker
// has closed the last one because of a message. The caller has locked p.mu.
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
	p.returns = channel.NotifyReturn(make(chan amqp.Return, unconfirmedMax))
	return channel, nil
}

// publish publishes one message as mandatory and waits for the broker's confirm.
// The error is ErrUnroutable when no queue received it and an *unsendableError
// when AMQP cannot carry it. After any other error a retry may succeed.
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
		return p.session.connectionError("publishing", err)
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
		return fmt.Errorf("broker did not accept task %s (id %s) for exchange %q with routing key %q", m.Task, m.TaskID, m.Exchange, m.RoutingKey)
	}
	return nil
}

// enter waits until fewer than unconfirmedMax messages wait for their confirm.
// The caller must call leave when it has its own confirm, or an error.
func (p *publisher) enter(ctx context.Context) (leave func(), err error) {
	select {
	case p.unconfirmed <- struct{}{}:
		return func() { <-p.unconfirmed }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-p.session.lost:
		return nil, p.session.connectionError("publishing", p.session.lostErr)
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
		p.forgetLocked(m.TaskID)
		return nil, nil, err
	}
	return confirm, channel, nil
}

// await waits for a confirm. Without one within confirmTimeout it ends the
// session, unless the broker is blocked.
func (p *publisher) await(ctx context.Context, confirm *amqp.DeferredConfirmation) error {
	timer := time.NewTimer(confirmTimeout)
	defer timer.Stop()
	for {
		select {
		case <-confirm.Done():
			return nil
		case <-p.session.lost:
			return p.session.connectionError("publishing", p.session.lostErr)
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-timer.C:
			if p.session.blocked.Load() {
				timer.Reset(confirmTimeout)
				continue
			}
			err := fmt.Errorf("no confirm within %v", confirmTimeout)
			p.session.fail(err)
			return p.session.connectionError("publishing", err)
		}
	}
}

// takeReturn reports whether the broker has returned the message of a task. It is
// called after the confirm: the broker sends a return before it, so that the
// return is in the channel by then.
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

// forget removes the bookkeeping of one message.
func (p *publisher) forget(taskID string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.forgetLocked(taskID)
}

func (p *publisher) forgetLocked(taskID string) {
	if p.waiting[taskID]--; p.waiting[taskID] <= 0 {
		delete(p.waiting, taskID)
		delete(p.returned, taskID)
	}
}

// unsendableError says that AMQP cannot carry a message: a retry is of no use.
type unsendableError struct {
	task, id string
	err      error
}

func (e *unsendableError) Error() string {
	return fmt.Sprintf("task %s (id %s) cannot be published: %v", e.task, e.id, e.err)
}

func (e *unsendableError) Unwrap() error { return e.err }

// amqpPublishing converts a message for amqp091-go. It refuses everything because
// of which the library or the broker would close the connection.
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

// outgoing is a message with its destination.
type outgoing struct {
	message     protocol.Publishing
	destination destination
}

// routeFollowUps gives follow-up messages their exchange and routing key.
func (w *Worker) routeFollowUps(followUps []protocol.FollowUp) ([]outgoing, error) {
	messages := make([]outgoing, 0, len(followUps))
	for _, f := range followUps {
		to, err := w.routes.resolve(f.Publishing.Task, f.Destination)
		if err != nil {
			return nil, &unsendableError{task: f.Publishing.Task, id: f.Publishing.TaskID, err: err}
		}
		m := f.Publishing
		m.Exchange, m.RoutingKey = to.exchange, to.routingKey
		m.Properties.Priority = w.priority(m, f.Destination)
		if r, known := w.tasks[m.Task]; known && m.Headers["ignore_result"] == nil {
			// Null would mean the same, but Celery's workers write the value that
			// they know.
			m.Headers["ignore_result"] = r.ignoreResult
		}
		if _, err := amqpPublishing(m); err != nil {
			return nil, err
		}
		messages = append(messages, outgoing{message: m, destination: to})
	}
	return messages, nil
}

// priority leaves out a priority of 0 when this worker has the task and its
// signature names a queue, as Celery does (docs/celery.md#message-properties).
// It leaves out a 0 that the signature itself gives, too: for the broker both
// are equal.
func (w *Worker) priority(m protocol.Publishing, own protocol.Destination) *uint8 {
	priority := m.Properties.Priority
	if _, known := w.tasks[m.Task]; known && own.Queue != "" && priority != nil && *priority == 0 {
		return nil
	}
	return priority
}

// send is sendOn on the current session.
func (w *Worker) send(ctx context.Context, o outgoing) error {
	s, err := w.link.get(ctx)
	if err != nil {
		return err
	}
	return w.sendOn(ctx, s, o)
}
