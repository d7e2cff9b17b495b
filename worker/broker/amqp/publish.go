package amqp

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
	"github.com/moonladderstudios/mm-orchestrator/worker/internal/runners"
	"github.com/moonladderstudios/mm-orchestrator/worker/internal/wire"
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
	// waitingWritersMax bounds how many goroutines wait for a message to write.
	waitingWritersMax = 4
	// frameOverhead is what a content header takes in its frame besides the properties:
	// that of the frame, then class, weight, size of the body and flags.
	frameOverhead = 8 + 14
)

// publisher is a connection that publishes, and waits for the broker's confirm of each
// message. What the broker says about a message is known for this message alone:
//
//   - Most messages share a channel. A message that comes back is matched by its
//     returnKey, which is the task's id; a message has a channel of its own if it
//     has none, or while another one with the same key is in flight.
//   - A missing exchange makes the broker close the channel, and then nobody knows of the
//     messages in flight. So a message has a channel of its own until one has reached its
//     exchange. If an exchange is deleted later, every message that was in flight is
//     published again on a channel of its own, and may be in its queue twice.
type publisher struct {
	*connection
	writers     *runners.Pool[func()] // for writes that may block
	unconfirmed chan struct{}         // one element for each message that waits for its confirm
	declaring   chan struct{}         // full while a queue is declared for the first time
	declared    sync.Map              // the names of the queues that were declared

	mu      sync.Mutex      // guards all below, also while a message is written
	shared  *sharedChannel  // nil before the first message
	present map[string]bool // exchanges that a message has reached
}

// sharedChannel is a channel on which many messages wait for their confirm. When the
// broker closes it, another one takes its place, but what the broker has said on this
// one before still has to be read.
type sharedChannel struct {
	*amqp.Channel
	returns chan amqp.Return

	// Guarded by publisher.mu, by returnKey.
	returned map[string]amqp.Return // what the broker returned as unroutable
	waiting  map[string]bool        // the messages that wait
}

// OpenPublisher connects.
func (b *Broker) OpenPublisher(ctx context.Context) (broker.Publisher, error) {
	c, err := b.dialAny(ctx, " (publishing)")
	if err != nil {
		return nil, err
	}
	p := &publisher{
		connection:  c,
		writers:     runners.New(waitingWritersMax, c.lost, func(f func()) bool { f(); return true }),
		unconfirmed: make(chan struct{}, unconfirmedMax),
		declaring:   make(chan struct{}, 1),
		present:     map[string]bool{"": true}, // RabbitMQ's default exchange
	}
	p.watch(nil)
	return p, nil
}

// Publish publishes a message, and declares its queue first, as Celery does.
func (p *publisher) Publish(ctx context.Context, m protocol.Publishing, declare *broker.Queue) error {
	if declare == nil {
		return p.publish(ctx, m)
	}
	declaredNow, err := p.declareOnce(ctx, *declare)
	if err != nil {
		return err
	}
	err = p.publish(ctx, m)
	if errors.Is(err, broker.ErrUnroutable) && !declaredNow {
		err = p.publishDeclared(ctx, m, *declare)
	}
	return err
}

// publishDeclared publishes a message whose queue or exchange was deleted after its
// declaration.
func (p *publisher) publishDeclared(ctx context.Context, m protocol.Publishing, q broker.Queue) error {
	if err := p.declareOrAccept(ctx, q); err != nil {
		return err
	}
	return p.publish(ctx, m)
}

// PublishAll publishes messages, and waits for confirms only when unconfirmedMax messages
// wait for theirs, and in the end.
func (p *publisher) PublishAll(ctx context.Context, messages []broker.Publication) []error {
	// As in publish, a write continues in the background when ctx ends.
	done := make(chan []error, 1)
	p.inBackground(func() { done <- p.publishAll(ctx, messages) })
	select {
	case errs := <-done:
		return errs
	case <-ctx.Done():
		return slices.Repeat([]error{context.Cause(ctx)}, len(messages))
	}
}

func (p *publisher) publishAll(ctx context.Context, messages []broker.Publication) []error {
	errs := make([]error, len(messages))
	var waiting []func() // for the answers to what was sent, in that order
	settleFirst := func() {
		waiting[0]()
		waiting = waiting[1:]
	}
	for i, m := range messages {
		out, err := p.amqpPublishing(m.Message)
		declaredNow := true
		if err == nil && m.Declare != nil {
			declaredNow, err = p.declareOnce(ctx, *m.Declare)
		}
		if err == nil && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		for err == nil && len(waiting) > 0 && !p.enterNow() {
			settleFirst()
		}
		if err == nil && len(waiting) == 0 {
			err = p.enter(ctx)
		}
		if errs[i] = err; err != nil {
			continue
		}
		confirm, channel, err := p.send(m.Message, out)
		if confirm == nil {
			// It is sent only now, on a channel of its own.
			for len(waiting) > 0 {
				settleFirst()
			}
		}
		waiting = append(waiting, func() {
			err := p.answer(m.Message, out, confirm, channel, err)
			<-p.unconfirmed
			if errors.Is(err, broker.ErrUnroutable) && !declaredNow {
				err = p.publishDeclared(ctx, m.Message, *m.Declare)
			}
			errs[i] = err
		})
		if confirm == nil {
			settleFirst()
		}
	}
	for len(waiting) > 0 {
		settleFirst()
	}
	return errs
}

// declareOnce declares a queue unless that was done on this connection. It reports
// whether it has declared the queue now.
func (p *publisher) declareOnce(ctx context.Context, q broker.Queue) (now bool, err error) {
	if _, done := p.declared.Load(q.Name); done {
		return false, nil
	}
	// Many messages may come at once: the first one declares their queue.
	select {
	case p.declaring <- struct{}{}:
	case <-p.lost:
		return false, p.connectionError(fmt.Sprintf("declaring queue %q", q.Name), p.lostErr)
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
	defer func() { <-p.declaring }()
	if _, done := p.declared.Load(q.Name); done {
		return false, nil
	}
	if err := p.declareOrAccept(ctx, q); err != nil {
		return false, err
	}
	p.declared.Store(q.Name, true)
	return true, nil
}

// declareOrAccept declares a queue. A queue that exists with other properties may
// still receive the message; if it does not, the broker returns the message.
func (p *publisher) declareOrAccept(ctx context.Context, q broker.Queue) error {
	err := p.declare(ctx, q)
	var mismatch *broker.MismatchError
	if errors.As(err, &mismatch) {
		p.log.Info("publishing to a queue whose declaration differs", "queue", q.Name, "error", err)
		return nil
	}
	return err
}

// Broadcast publishes to an exchange as Celery declares that of its remote control,
// celery.pidbox: of type fanout and not durable.
func (p *publisher) Broadcast(ctx context.Context, m protocol.Publishing) error {
	err := p.call(ctx, callOptions{what: "exchange.declare"}, func() error {
		ch, err := p.conn.Channel()
		if err != nil {
			return err
		}
		defer ch.Close()
		return ch.ExchangeDeclare(m.Exchange, "fanout", false, false, false, false, nil)
	})
	switch {
	case err != nil && ctx.Err() != nil:
		return err
	case err != nil:
		return p.declareError(broker.Queue{Name: m.Exchange, Exchange: m.Exchange}, err)
	}
	return p.publish(ctx, m)
}

// publish publishes one message as mandatory and waits for the broker's confirm.
func (p *publisher) publish(ctx context.Context, m protocol.Publishing) error {
	out, err := p.amqpPublishing(m)
	if err != nil {
		return err
	}
	if err := p.enter(ctx); err != nil {
		return err
	}
	// A write can block as long as the broker reads nothing. It continues in the
	// background when ctx ends.
	done := make(chan error, 1)
	p.inBackground(func() {
		defer func() { <-p.unconfirmed }()
		done <- p.publishAndWait(m, out)
	})
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// inBackground begins f and does not wait for its end.
func (p *publisher) inBackground(f func()) {
	p.writers.Run(f)
}

// enter waits until the broker accepts messages and fewer than unconfirmedMax wait for
// their confirm. The caller takes its element out of p.unconfirmed in the end.
func (p *publisher) enter(ctx context.Context) error {
	for {
		unblocked := p.waitUnblocked()
		if unblocked == nil {
			break
		}
		select {
		case <-unblocked:
		case <-ctx.Done():
			return fmt.Errorf("the broker accepts no messages (it lacks memory or disk space): %w", context.Cause(ctx))
		case <-p.lost:
			return p.connectionError("publishing", p.lostErr)
		}
	}
	select {
	case p.unconfirmed <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-p.lost:
		return p.connectionError("publishing", p.lostErr)
	}
}

// enterNow does what enter does if that needs no waiting.
func (p *publisher) enterNow() bool {
	if p.waitUnblocked() != nil || p.isLost() {
		return false
	}
	select {
	case p.unconfirmed <- struct{}{}:
		return true
	default:
		return false
	}
}

// publishAndWait publishes a message and waits for its confirm.
func (p *publisher) publishAndWait(m protocol.Publishing, out amqp.Publishing) error {
	confirm, channel, err := p.send(m, out)
	return p.answer(m, out, confirm, channel, err)
}

// answer waits for what the broker says about a message, after send, whose results are
// its last arguments. The message is published on a channel of its own if what the broker
// says would not be known for it alone.
func (p *publisher) answer(m protocol.Publishing, out amqp.Publishing, confirm *amqp.DeferredConfirmation, channel *sharedChannel, err error) error {
	switch {
	case err != nil && (p.isLost() || p.conn.IsClosed()):
		return p.connectionError("publishing", err)
	case confirm == nil:
		return p.publishOnOwnChannel(m, out)
	}
	faultpoint.Hit(faultpoint.PublishSent, m.TaskID)
	back, returned, err := p.outcome(channel, returnKey(out.MessageId, out.CorrelationId), confirm)
	switch {
	case err != nil:
		return err
	case returned:
		return unroutable(m, int(back.ReplyCode), back.ReplyText)
	case confirm.Acked():
		return nil
	}
	if err := p.lostMeanwhile(); err != nil {
		return err
	}
	if channel.IsClosed() {
		return p.publishOnOwnChannel(m, out)
	}
	return fmt.Errorf("broker did not accept task %s (id %s) for exchange %q with routing key %q", m.Task, m.TaskID, m.Exchange, m.RoutingKey)
}

// lostMeanwhile returns an error if the connection is lost. amqp091-go answers open
// confirms as refused before it says so.
func (p *publisher) lostMeanwhile() error {
	if p.isLost() || p.conn.IsClosed() {
		return p.connectionError("publishing", amqp.ErrClosed)
	}
	return nil
}

func unroutable(m protocol.Publishing, code int, reason string) error {
	return fmt.Errorf("%w: task %s (id %s) to exchange %q with routing key %q: declare or bind a queue there, or correct the route (RabbitMQ: %d %s)",
		broker.ErrUnroutable, m.Task, m.TaskID, m.Exchange, m.RoutingKey, code, reason)
}

// send writes a message to the shared channel. Without a confirmation the message
// needs a channel of its own.
func (p *publisher) send(m protocol.Publishing, out amqp.Publishing) (*amqp.DeferredConfirmation, *sharedChannel, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	key := returnKey(out.MessageId, out.CorrelationId)
	if key == "" || !p.present[m.Exchange] {
		return nil, nil, nil
	}
	channel, err := p.open()
	if err != nil {
		return nil, nil, err
	}
	if channel.waiting[key] {
		return nil, nil, nil
	}
	channel.waiting[key] = true
	confirm, err := channel.PublishWithDeferredConfirm(m.Exchange, m.RoutingKey, true, false, out)
	if err != nil {
		delete(channel.waiting, key)
		return nil, nil, err
	}
	return confirm, channel, nil
}

// returnKey identifies a message among those in flight.
func returnKey(messageID, correlationID string) string { return cmp.Or(messageID, correlationID) }

// open returns the shared channel. It opens a new one when the broker has closed the
// last one because of a message. The caller has locked p.mu.
func (p *publisher) open() (*sharedChannel, error) {
	if p.shared != nil && !p.shared.IsClosed() {
		return p.shared, nil
	}
	channel, err := p.openConfirming()
	if err != nil {
		return nil, err
	}
	p.shared = &sharedChannel{
		Channel: channel, returns: channel.NotifyReturn(make(chan amqp.Return, unconfirmedMax)),
		returned: map[string]amqp.Return{}, waiting: map[string]bool{},
	}
	return p.shared, nil
}

func (p *publisher) openConfirming() (*amqp.Channel, error) {
	return ask(context.Background(), p.connection, callOptions{what: "channel.open"}, func() (*amqp.Channel, error) {
		ch, err := p.conn.Channel()
		if err != nil {
			return nil, err
		}
		return ch, ch.Confirm(false)
	})
}

// outcome waits for the confirm of a message on the shared channel, and reports whether
// the broker has returned the message. The broker sends a return before the
// confirm, so that the return is in the channel by then.
func (p *publisher) outcome(channel *sharedChannel, key string, confirm *amqp.DeferredConfirmation) (back amqp.Return, returned bool, err error) {
	err = p.await(confirm)
	p.mu.Lock()
	defer p.mu.Unlock()
	for more := true; more; {
		select {
		case r, ok := <-channel.returns:
			switch {
			case !ok:
				channel.returns = nil
			case channel.waiting[returnKey(r.MessageId, r.CorrelationId)]:
				channel.returned[returnKey(r.MessageId, r.CorrelationId)] = r
			}
		default:
			more = false
		}
	}
	back, returned = channel.returned[key]
	delete(channel.waiting, key)
	delete(channel.returned, key)
	return back, returned, err
}

// await waits for a confirm. Without one within confirmTimeout it ends the
// connection. Time in which the broker is blocked does not count.
func (p *publisher) await(confirm *amqp.DeferredConfirmation) error {
	select {
	case <-confirm.Done():
		return nil
	default:
	}
	patience := p.patience(confirmTimeout)
	over, stop := p.timeouts.After(confirmTimeout)
	defer func() { stop() }()
	for {
		select {
		case <-confirm.Done():
			return nil
		case <-p.lost:
			return p.connectionError("publishing", p.lostErr)
		case <-over:
			if left := patience.left(); left > 0 {
				over, stop = p.timeouts.After(left)
				continue
			}
			err := fmt.Errorf("no confirm within %v", confirmTimeout)
			p.fail(err)
			_ = p.raw.Close()
			return p.connectionError("publishing", err)
		}
	}
}

// publishOnOwnChannel publishes on a channel that is opened for this message.
func (p *publisher) publishOnOwnChannel(m protocol.Publishing, out amqp.Publishing) error {
	ch, err := p.openConfirming()
	if err != nil {
		return p.connectionError("publishing", err)
	}
	defer ch.Close()
	returns := ch.NotifyReturn(make(chan amqp.Return, 1))
	closed := ch.NotifyClose(make(chan *amqp.Error, 1))
	confirm, err := ch.PublishWithDeferredConfirm(m.Exchange, m.RoutingKey, true, false, out)
	if err != nil {
		return p.connectionError("publishing", err)
	}
	faultpoint.Hit(faultpoint.PublishSent, m.TaskID)
	if err := p.await(confirm); err != nil {
		return err
	}
	select {
	case back, ok := <-returns: // precedes its confirm
		if ok {
			p.exchangePresent(m.Exchange, true)
			return unroutable(m, int(back.ReplyCode), back.ReplyText)
		}
	default:
	}
	if confirm.Acked() {
		p.exchangePresent(m.Exchange, true)
		return nil
	}
	if err := p.lostMeanwhile(); err != nil {
		return err
	}
	select {
	case err := <-closed:
		if err != nil && err.Server {
			p.exchangePresent(m.Exchange, false)
			return unroutable(m, err.Code, err.Reason)
		}
	default:
	}
	return fmt.Errorf("broker did not accept task %s (id %s) for exchange %q with routing key %q", m.Task, m.TaskID, m.Exchange, m.RoutingKey)
}

func (p *publisher) exchangePresent(exchange string, present bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if present {
		p.present[exchange] = true
	} else {
		delete(p.present, exchange)
	}
}

// amqpPublishing converts a message for this connection.
func (p *publisher) amqpPublishing(m protocol.Publishing) (amqp.Publishing, error) {
	return amqpPublishing(m, cmp.Or(p.conn.Config.FrameSize, wire.FrameSize))
}

// amqpPublishing converts a message for amqp091-go. It refuses everything because
// of which the library or the broker would close the connection. frameSize is that of
// the connection: AMQP does not split a content header.
func amqpPublishing(m protocol.Publishing, frameSize int) (amqp.Publishing, error) {
	unsendable := func(err error) error { return &broker.UnsendableError{Task: m.Task, ID: m.TaskID, Err: err} }
	size := frameOverhead + 1 + 1 + 8 // delivery mode, priority, timestamp
	for name, text := range map[string]string{
		"exchange": m.Exchange, "routing key": m.RoutingKey, "content type": m.Properties.ContentType,
		"content encoding": m.Properties.ContentEncoding, "correlation id": m.Properties.CorrelationID,
		"reply address": m.Properties.ReplyTo, "expiration": m.Properties.Expiration,
		"message id": m.Properties.MessageID, "type": m.Properties.Type, "application id": m.Properties.AppID,
	} {
		if len(text) > 255 {
			return amqp.Publishing{}, unsendable(fmt.Errorf("its %s is longer than 255 bytes", name))
		}
		if name != "exchange" && name != "routing key" { // which are not in the content header
			size += 1 + len(text)
		}
	}
	headers, err := amqpTable(m.Headers)
	if err != nil {
		return amqp.Publishing{}, unsendable(err)
	}
	if table := fieldSize(headers); size+table > frameSize {
		return amqp.Publishing{}, unsendable(fmt.Errorf("its headers take %d bytes, more than the %d for which a frame of this broker has room", table, frameSize-size))
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
			out.DeliveryMode |= wire.PriorityZero
		}
	}
	return out, nil
}
