package worker

import (
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// delivery is one message from the broker and the right to settle it, which
// ends with its session.
type delivery struct {
	session     *session
	sub         *subscription
	tag         uint64
	redelivered bool
	acker       amqp.Acknowledger
	// wire is what the message said.
	wire protocol.Delivery
	// activity reports the progress of the delivery to the worker's detector.
	activity *stall.Activity
	// settled is set by whoever settles it.
	settled atomic.Bool
	// copied: the message may be in its queue a second time.
	copied atomic.Bool
}

// settle tells the broker, once, unless the tag is dead: then the broker has,
// or will, deliver again.
func (d *delivery) settle(v verdict) {
	faultpoint.Hit(faultpoint.SettleBefore, d.wire.Properties.CorrelationID)
	if d.session.isLost() || d.settled.Swap(true) {
		return
	}
	var err error
	switch v {
	case verdictAck, verdictDrop:
		err = d.acker.Ack(d.tag, false)
	case verdictReject:
		err = d.acker.Reject(d.tag, false)
	case verdictRequeue:
		err = d.requeue()
	}
	if err != nil {
		d.session.fail(fmt.Errorf("settling a delivery: %w", err))
	}
	faultpoint.Hit(faultpoint.SettleAfter, d.wire.Properties.CorrelationID)
}

// wireDelivery translates the library's delivery (see wire.go for the mark of
// a priority 0).
func wireDelivery(d amqp.Delivery) protocol.Delivery {
	properties := protocol.Properties{
		ContentType:     d.ContentType,
		ContentEncoding: d.ContentEncoding,
		DeliveryMode:    d.DeliveryMode &^ priorityZero,
		CorrelationID:   d.CorrelationId,
		ReplyTo:         d.ReplyTo,
		Expiration:      d.Expiration,
		MessageID:       d.MessageId,
		Type:            d.Type,
		AppID:           d.AppId,
		Timestamp:       d.Timestamp.UTC(),
	}
	if d.Priority != 0 || d.DeliveryMode&priorityZero != 0 {
		priority := d.Priority
		properties.Priority = &priority
	}
	return protocol.Delivery{
		Headers:     plainTable(d.Headers),
		Properties:  properties,
		Exchange:    d.Exchange,
		RoutingKey:  d.RoutingKey,
		Redelivered: d.Redelivered,
		Body:        d.Body,
	}
}

// received starts a delivery on its way, in a goroutine of its own.
func (w *Worker) received(sub *subscription, message amqp.Delivery) {
	faultpoint.Hit(faultpoint.ConsumerTook, message.CorrelationId)
	w.metrics.received.Inc()
	d := &delivery{
		session:     sub.session,
		sub:         sub,
		tag:         message.DeliveryTag,
		redelivered: message.Redelivered,
		acker:       message.Acknowledger,
		wire:        wireDelivery(message),
	}
	w.life.deliveries.Add(1)
	go func() {
		defer w.life.deliveries.Done()
		d.activity = w.stalls.Start("message "+clip(d.wire.Properties.CorrelationID), "reading it")
		defer d.activity.End()
		w.handle(d)
	}()
}

// handle takes a delivery from its bytes to its settlement.
func (w *Worker) handle(d *delivery) {
	defer func() {
		if p := recover(); p != nil {
			d.settle(verdictReject)
			w.messagePanicked(p)
		}
	}()

	faultpoint.Hit(faultpoint.DeliveryReceived, d.wire.Properties.CorrelationID)
	head, err := protocol.DecodeHeader(d.wire, acceptContent)
	if err != nil {
		w.malformed(d, err)
		return
	}
	registered, known := w.registry[head.Task]
	if !known {
		w.unregistered(d, head)
		return
	}
	message, err := protocol.Decode(d.wire, acceptContent)
	if err != nil {
		w.malformed(d, err)
		return
	}
	faultpoint.Hit(faultpoint.DeliveryDecoded, message.ID, message.ArgsRepr)
	id := identify(message, d.wire.Body)
	if w.repeated(d, message, id) {
		return
	}
	defer w.inHand.add(message)()
	if !w.waitForETA(d, message) || !w.takeSlot(d) {
		faultpoint.Hit(faultpoint.DeliveryDropped, message.ID)
		return
	}
	faultpoint.Hit(faultpoint.SlotTaken, message.ID, message.ArgsRepr)
	slot := &slot{worker: w}
	defer slot.leave()
	if w.refused(d, message) {
		return
	}
	execution, arrival, v := w.running.begin(d, id)
	if arrival != arrivalNew {
		w.answer(d, message, arrival, v)
		return
	}
	w.execute(execution, message, registered, d, slot)
}

// messagePanicked reports what must not end the worker: a message for which
// the engine or package protocol has no answer.
func (w *Worker) messagePanicked(p any) {
	w.metrics.bad.WithLabelValues(badPanic).Inc()
	w.cfg.Logger.Error("message is rejected: handling it failed", "error", fmt.Sprint(p), "stack", goStack())
}

// acceptContent is Celery's accept_content: JSON and nothing else, because
// the others can run code or need Python.
var acceptContent = []string{"application/json"}

// repeated deals with a delivery whose task runs here or has just ended here.
func (w *Worker) repeated(d *delivery, m *protocol.Message, id identity) bool {
	arrival, v := w.running.arrive(d, id)
	if arrival == arrivalNew {
		return false
	}
	w.answer(d, m, arrival, v)
	return true
}

func (w *Worker) answer(d *delivery, m *protocol.Message, arrival arrival, v verdict) {
	w.metrics.attached.Inc()
	if arrival == arrivalAttached {
		faultpoint.Hit(faultpoint.TaskAttached, m.ID, m.ArgsRepr)
		w.taskLog(m).Info("repeated delivery joins the running task")
		d.renew()
		return
	}
	w.taskLog(m).Info("repeated delivery of a task that has ended is settled without running it again")
	d.settle(v)
}

// malformed does what the table of docs/celery.md#bad-messages says for a
// message that cannot be decoded.
func (w *Worker) malformed(d *delivery, err error) {
	var bad *protocol.MalformedError
	if !errors.As(err, &bad) {
		bad = &protocol.MalformedError{Reason: protocol.ReasonUnknown, Detail: err.Error()}
	}
	w.metrics.bad.WithLabelValues(badLabel(bad.Reason)).Inc()
	do := bad.Disposition()
	if w.cfg.Undecodable == AckUndecodable && (bad.Reason == protocol.ReasonBody || bad.Reason == protocol.ReasonCompression) {
		do.Reject = false
	}
	w.cfg.Logger.Error("message cannot be run", "task_id", clip(bad.TaskID), "task", clip(bad.Task), "queue", d.sub.queue.Name,
		"rejected", do.Reject, "error", bad.Error())
	if do.StoreFailure {
		exception := bad.Exception()
		row := protocol.Result{
			TaskID:     bad.TaskID,
			State:      protocol.StateFailure,
			Exception:  &exception,
			HasRequest: true,
			Task:       bad.Task,
			Worker:     w.cfg.Node,
			Queue:      d.wire.RoutingKey,
			Args:       json.RawMessage("null"),
			Kwargs:     json.RawMessage("null"),
			DateDone:   w.cfg.Now(),
		}
		if _, err := w.store(w.life.settle, row); err != nil {
			w.handBack(d, err)
			return
		}
	}
	if do.Reject {
		w.deadLetter(d, bad.TaskID, bad.Error())
		return
	}
	d.settle(verdictAck)
}

// unregistered deals with a task that has no handler here.
func (w *Worker) unregistered(d *delivery, head *protocol.Message) {
	w.metrics.bad.WithLabelValues(badUnregistered).Inc()
	log := w.taskLog(head).With("queue", d.sub.queue.Name)
	if w.cfg.Unregistered == RequeueUnregistered {
		log.Warn("task is not registered here and goes back to its queue")
		w.pauseDelivery(d, requeueUnregisteredPause)
		d.settle(verdictRequeue)
		return
	}
	log.Error("task is not registered here and is rejected: register it, or let its producer use another queue")
	if head.ID != "" {
		// Celery's row knows nothing of the request but its id.
		exception := protocol.NotRegistered(head.Task)
		row := protocol.Result{
			TaskID:     head.ID,
			State:      protocol.StateFailure,
			Exception:  &exception,
			HasRequest: true,
			Args:       json.RawMessage("null"),
			Kwargs:     json.RawMessage("null"),
			DateDone:   w.cfg.Now(),
		}
		if _, err := w.store(w.life.settle, row); err != nil {
			w.handBack(d, err)
			return
		}
	}
	w.deadLetter(d, head.ID, protocol.NotRegistered(head.Task).Text())
}

// requeueUnregisteredPause keeps a task that nobody knows from spinning.
const requeueUnregisteredPause = 5 * time.Second

// refused deals with a task that is revoked or expired before it runs
// (docs/celery.md#receipt-and-start): REVOKED, acknowledged, and nothing
// follows.
func (w *Worker) refused(d *delivery, m *protocol.Message) bool {
	var why, outcome string
	switch {
	case w.revoked.has(m.ID):
		why, outcome = "revoked", outcomeRevoked
	case m.Expires != nil && !w.cfg.Now().Before(*m.Expires):
		why, outcome = "expired", outcomeExpired
	default:
		return false
	}
	w.taskLog(m).Info("task is not run", "why", why)
	exception := protocol.NewException("celery.exceptions", "TaskRevokedError", why)
	row := w.row(m, protocol.StateRevoked)
	row.Exception = &exception
	row.DateDone = w.cfg.Now()
	if !w.ignoresResult(m, w.registry[m.Task]) {
		if _, err := w.store(w.life.settle, row); err != nil {
			w.handBack(d, err)
			return true
		}
	}
	w.metrics.tasks.WithLabelValues(m.Task, outcome).Inc()
	d.settle(verdictAck)
	return true
}

// waitForETA holds a message until its ETA, unacknowledged and without a
// slot. False means that it is not ours any more.
func (w *Worker) waitForETA(d *delivery, m *protocol.Message) bool {
	if w.refused(d, m) {
		return false
	}
	if m.ETA == nil {
		return true
	}
	wait := m.ETA.Sub(w.cfg.Now())
	if wait <= 0 {
		return true
	}
	release := d.sub.hold()
	defer release()
	defer d.activity.Wait()()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-d.session.lost: // the broker delivers it again
		return false
	case <-w.life.receive.Done():
		d.settle(verdictRequeue)
		return false
	}
}

// takeSlot waits for the right to run a task. False means that the message is
// not ours any more, or has gone back because the worker stops.
func (w *Worker) takeSlot(d *delivery) bool {
	if w.life.receive.Err() != nil {
		d.settle(verdictRequeue)
		return false
	}
	defer d.activity.Wait()()
	select {
	case w.slots <- struct{}{}:
	case <-d.session.lost:
		return false
	case <-w.life.receive.Done():
		d.settle(verdictRequeue)
		return false
	}
	if d.session.isLost() {
		<-w.slots
		return false
	}
	w.metrics.running.Inc()
	return true
}

// pauseDelivery keeps a delivery for a while without a slot.
func (w *Worker) pauseDelivery(d *delivery, pause time.Duration) {
	if pause <= 0 {
		return
	}
	defer d.sub.hold()()
	defer d.activity.Wait()()
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-d.session.lost:
	case <-w.life.receive.Done():
	}
}

// handBack returns a message whose outcome could not be recorded, after a
// pause, so that a fault that lasts does not make it spin.
func (w *Worker) handBack(d *delivery, err error) {
	w.metrics.handedBack.Inc()
	w.cfg.Logger.Error("message goes back to the broker: its outcome could not be recorded", "queue", d.sub.queue.Name, "error", err)
	w.pauseDelivery(d, w.handBackPause())
	d.settle(verdictRequeue)
}

func (w *Worker) handBackPause() time.Duration { return min(w.cfg.SettleTimeout, backoffMost) }
