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

// delivery is one message from the broker. It can be settled (acknowledged,
// rejected or requeued) once, and only as long as its session is not lost.
type delivery struct {
	session     *session
	sub         *subscription
	tag         uint64
	redelivered bool
	acker       amqp.Acknowledger
	wire        protocol.Delivery // the message as the broker delivered it
	activity    *stall.Activity   // reports the progress of its goroutine to Stuck
	settled     atomic.Bool
	copied      atomic.Bool // a copy of the message may be in its queue
}

// settle settles the delivery with the broker, unless that was done already or
// the session is lost. In the latter case the broker delivers the message again.
func (d *delivery) settle(v settlement) {
	faultpoint.Hit(faultpoint.SettleBefore, d.wire.Properties.CorrelationID)
	if d.session.isLost() || d.settled.Swap(true) {
		return
	}
	var err error
	switch v {
	case settlementAck, settlementIgnored:
		err = d.acker.Ack(d.tag, false)
	case settlementReject:
		err = d.acker.Reject(d.tag, false)
	case settlementRequeue:
		err = d.requeue()
	}
	if err != nil {
		d.session.fail(fmt.Errorf("settling a delivery: %w", err))
	}
	faultpoint.Hit(faultpoint.SettleAfter, d.wire.Properties.CorrelationID)
}

// wireDelivery converts amqp091-go's delivery (see wire.go for how it marks a
// priority of 0).
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

// received handles a delivery in a goroutine of its own.
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
	w.lifecycle.deliveries.Add(1)
	go func() {
		defer w.lifecycle.deliveries.Done()
		d.activity = w.stalls.Start("message "+clip(d.wire.Properties.CorrelationID), "reading it")
		defer d.activity.End()
		w.handle(d)
	}()
}

// handle decodes a delivery, runs its task, and settles it.
func (w *Worker) handle(d *delivery) {
	defer func() {
		if p := recover(); p != nil {
			d.settle(settlementReject)
			w.reportPanic(p)
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
	if w.handleRepeated(d, message, id) {
		return
	}
	defer w.unacked.add(message)()
	if !w.waitForETA(d, message) || !w.takeSlot(d) {
		faultpoint.Hit(faultpoint.DeliveryDropped, message.ID)
		return
	}
	faultpoint.Hit(faultpoint.SlotTaken, message.ID, message.ArgsRepr)
	slot := &slot{worker: w}
	defer slot.release()
	if w.revokedOrExpired(d, message) {
		return
	}
	execution, found, v := w.executions.begin(d, id)
	if found != matchNone {
		w.attachOrSettle(d, message, found, v)
		return
	}
	w.execute(execution, message, registered, d, slot)
}

// reportPanic logs a panic of this package or of package protocol. The message is
// rejected, so that it does not end the worker or return for ever.
func (w *Worker) reportPanic(p any) {
	w.metrics.bad.WithLabelValues(badPanic).Inc()
	w.cfg.Logger.Error("message is rejected: its handling has panicked", "error", fmt.Sprint(p), "stack", goStack())
}

// acceptContent is Celery's accept_content. It is JSON only: the other formats
// can run code or need Python.
var acceptContent = []string{"application/json"}

// handleRepeated handles a delivery whose task runs in this process or has ended
// in it. It returns false for any other delivery.
func (w *Worker) handleRepeated(d *delivery, m *protocol.Message, id identity) bool {
	known, v := w.executions.attach(d, id)
	if known == matchNone {
		return false
	}
	w.attachOrSettle(d, m, known, v)
	return true
}

// attachOrSettle settles a delivery of a task that has ended. One of a running
// task is attached already and is settled with the task.
func (w *Worker) attachOrSettle(d *delivery, m *protocol.Message, known match, v settlement) {
	w.metrics.attached.Inc()
	if known == matchRunning {
		faultpoint.Hit(faultpoint.TaskAttached, m.ID, m.ArgsRepr)
		w.taskLog(m).Info("repeated delivery joins the running task")
		d.renew()
		return
	}
	w.taskLog(m).Info("repeated delivery of a task that has ended is settled without running it again")
	d.settle(v)
}

// malformed handles a message that cannot be decoded, as the table in
// docs/celery.md#bad-messages says.
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
		if _, err := w.store(w.lifecycle.record, row); err != nil {
			w.handBack(d, err)
			return
		}
	}
	if do.Reject {
		w.deadLetter(d, bad.TaskID, bad.Error())
		return
	}
	d.settle(settlementAck)
}

// unregistered handles a message whose task has no handler in this worker.
func (w *Worker) unregistered(d *delivery, head *protocol.Message) {
	w.metrics.bad.WithLabelValues(badUnregistered).Inc()
	log := w.taskLog(head).With("queue", d.sub.queue.Name)
	if w.cfg.Unregistered == RequeueUnregistered {
		log.Warn("task is not registered in this worker: its message is requeued after a pause", "pause", requeueUnregisteredPause)
		w.pauseDelivery(d, requeueUnregisteredPause)
		d.settle(settlementRequeue)
		return
	}
	log.Error("task is not registered in this worker and is rejected: register it, or let its producer use another queue")
	if head.ID != "" {
		// Celery's row has nothing of the request except the id.
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
		if _, err := w.store(w.lifecycle.record, row); err != nil {
			w.handBack(d, err)
			return
		}
	}
	w.deadLetter(d, head.ID, protocol.NotRegistered(head.Task).Text())
}

// requeueUnregisteredPause limits how often a message that no worker can run is
// delivered.
const requeueUnregisteredPause = 5 * time.Second

// revokedOrExpired handles a task that is revoked or expired before it runs
// (docs/celery.md#receipt-and-start): it stores REVOKED, acknowledges, and
// publishes nothing. It returns false for any other task.
func (w *Worker) revokedOrExpired(d *delivery, m *protocol.Message) bool {
	var why, outcome string
	switch {
	case w.revoked.has(m.ID):
		why, outcome = "revoked", outcomeRevoked
	case m.Expires != nil && !w.cfg.Now().Before(*m.Expires):
		why, outcome = "expired", outcomeExpired
	default:
		return false
	}
	w.taskLog(m).Info("task does not run", "why", why)
	exception := protocol.NewException("celery.exceptions", "TaskRevokedError", why)
	row := w.row(m, protocol.StateRevoked)
	row.Exception = &exception
	row.DateDone = w.cfg.Now()
	if !w.ignoresResult(m, w.registry[m.Task]) {
		if _, err := w.store(w.lifecycle.record, row); err != nil {
			w.handBack(d, err)
			return true
		}
	}
	w.metrics.tasks.WithLabelValues(m.Task, outcome).Inc()
	d.settle(settlementAck)
	return true
}

// waitForETA delays a message until its ETA, unacknowledged and without a slot.
// It returns false when the delivery is settled or its session is lost.
func (w *Worker) waitForETA(d *delivery, m *protocol.Message) bool {
	if w.revokedOrExpired(d, m) {
		return false
	}
	if m.ETA == nil {
		return true
	}
	wait := m.ETA.Sub(w.cfg.Now())
	if wait <= 0 {
		return true
	}
	release := d.sub.delay()
	defer release()
	defer d.activity.Wait()()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-d.session.lost: // the broker delivers the message again
		return false
	case <-w.lifecycle.receive.Done():
		d.settle(settlementRequeue)
		return false
	}
}

// takeSlot waits for a free slot. It returns false when the session is lost, or
// when the worker stops and has requeued the message.
func (w *Worker) takeSlot(d *delivery) bool {
	if w.lifecycle.receive.Err() != nil {
		d.settle(settlementRequeue)
		return false
	}
	defer d.activity.Wait()()
	select {
	case w.slots <- struct{}{}:
	case <-d.session.lost:
		return false
	case <-w.lifecycle.receive.Done():
		d.settle(settlementRequeue)
		return false
	}
	if d.session.isLost() {
		<-w.slots
		return false
	}
	w.metrics.running.Inc()
	return true
}

// pauseDelivery delays a delivery, without a slot, until the pause is over, the
// session is lost, or the worker stops.
func (w *Worker) pauseDelivery(d *delivery, pause time.Duration) {
	if pause <= 0 {
		return
	}
	defer d.sub.delay()()
	defer d.activity.Wait()()
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-d.session.lost:
	case <-w.lifecycle.receive.Done():
	}
}

// handBack requeues a message whose outcome could not be recorded. It pauses
// before, so that a lasting fault does not cause a busy loop.
func (w *Worker) handBack(d *delivery, err error) {
	w.metrics.handedBack.Inc()
	w.cfg.Logger.Error("message is requeued: its outcome could not be recorded", "queue", d.sub.queue.Name, "error", err)
	w.pauseDelivery(d, w.handBackPause())
	d.settle(settlementRequeue)
}

func (w *Worker) handBackPause() time.Duration { return min(w.cfg.RecordTimeout, backoffMax) }
