package worker

import (
	"encoding/json"
	"errors"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// received serves a delivery if nothing else can come until it is settled, or else hands
// it to another goroutine.
func (w *Worker) received(sub *subscription, from broker.Delivery) {
	activity := w.stalls.StartOf("consumer of queue", sub.queue.Name, "receiving")
	faultpoint.Hit(faultpoint.ConsumerTook, from.Message.Properties.CorrelationID)
	w.metrics.received.Inc()
	d := &delivery{
		registry:    w.registry,
		sub:         sub,
		wire:        from.Message,
		receipt:     from.Receipt,
		returns:     from.Returns,
		returnLimit: from.ReturnLimit,
		passOn:      from.PassOn,
		changed:     make(chan struct{}, 1),
	}
	state := d.receive()
	if state == stateReceived && d.passOn != nil {
		activity.End()
		w.serve(d)
		return
	}
	defer activity.End()
	switch state {
	case stateReceived:
		w.runners.Run(d)
	case stateSettling:
		d.tell()
	}
}

// serve is all that happens to a delivery in a goroutine: until its end, or until it is
// parked, and then from its wait on. It returns true if the goroutine may serve another one.
func (w *Worker) serve(d *delivery) (again bool) {
	exits, parked := true, false
	defer func() {
		if parked || d.left {
			return
		}
		if exits {
			w.exited(d)
		}
		w.served(d)
	}()
	if d.activity == nil {
		d.activity = w.stalls.StartOf("message", clip(d.wire.Properties.CorrelationID), "reading it")
		parked = w.handle(d)
	} else {
		w.afterWait(d)
	}
	exits = false
	return parked || !d.left
}

// exited requeues a delivery whose goroutine ends before it is settled: the result backend
// or other code of the program has called runtime.Goexit.
func (w *Worker) exited(d *delivery) {
	w.cfg.Logger.Error("message is requeued: its goroutine was ended", "queue", d.sub.queue.Name, "task_id", clip(d.wire.Properties.CorrelationID))
	if a, _ := d.granted(); a != nil && a.first == d {
		a.end(settlementRequeue)
		return
	}
	d.settle(settlementRequeue)
}

// served ends what serve has begun.
func (w *Worker) served(d *delivery) {
	d.activity.End()
	w.registry.handlers.Done()
}

// handle reads a delivery, waits for its ETA and for a slot, runs its task, and
// settles it. It returns true if the delivery is parked.
func (w *Worker) handle(d *delivery) (parked bool) {
	defer w.rejectAfterReading(d)

	faultpoint.Hit(faultpoint.DeliveryReceived, d.wire.Properties.CorrelationID)
	eta, proceed := w.read(d)
	if !proceed {
		return false
	}
	if !w.waitForETA(d, eta) {
		faultpoint.Hit(faultpoint.DeliveryDropped, d.wire.Properties.CorrelationID)
		return false
	}
	if w.waitForSlot(d) {
		return true
	}
	w.afterWait(d)
	return false
}

// rejectAfterReading rejects a message whose goroutine has panicked outside of an attempt.
// It is deferred.
func (w *Worker) rejectAfterReading(d *delivery) {
	if p := recover(); p != nil {
		d.settle(settlementReject)
		w.reportPanic(p)
	}
}

// read decodes a delivery. It returns false if no task has to run for it: the
// delivery is settled then, or has joined the attempt of its task.
func (w *Worker) read(d *delivery) (eta *time.Time, proceed bool) {
	m, err := d.decode()
	if err != nil {
		// The body of a task without a handler does not matter.
		head, headErr := d.decodeHeader()
		if headErr != nil || w.isRegistered(head) {
			w.malformed(d, err)
			return nil, false
		}
		m = head
	}
	if !w.isRegistered(m) {
		w.unregistered(d, m)
		return nil, false
	}
	faultpoint.Hit(faultpoint.DeliveryDecoded, m.ID, m.ArgsRepr)
	if found := d.read(m, identify(m, d.wire.Body)); found != matchNone {
		w.repeated(d, m, found)
		return nil, false
	}
	if why := w.mayNotRun(m); why != "" {
		d.refuse()
		if err := w.recordRevoked(m, w.tasks[m.Task], why); err != nil {
			w.handBack(d, err)
			return nil, false
		}
		d.settle(settlementAck)
		return nil, false
	}
	w.renewReturned(d)
	return m.ETA, true
}

func (w *Worker) isRegistered(m *protocol.Message) bool {
	_, known := w.tasks[m.Task]
	return known
}

// repeated handles a delivery whose task runs in this process, or has ended in it.
func (w *Worker) repeated(d *delivery, m *protocol.Message, found match) {
	w.metrics.attached.Inc()
	if found == matchRunning {
		faultpoint.Hit(faultpoint.TaskAttached, m.ID, m.ArgsRepr)
		w.taskLog(m).Info("repeated delivery joins the running task")
		d.sub.adjust() // the attempt may pause
		d.renew()
		return
	}
	w.taskLog(m).Info("repeated delivery of a task that has ended is settled without running it again")
	d.tell()
}

// malformed handles a message that cannot be decoded, as the table in
// docs/celery.md#bad-messages says.
func (w *Worker) malformed(d *delivery, err error) {
	d.refuse()
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
	d.refuse()
	w.metrics.bad.WithLabelValues(badUnregistered).Inc()
	log := w.taskLog(head).With("queue", d.sub.queue.Name)
	if w.cfg.Unregistered == RequeueUnregistered {
		log.Warn("task is not registered in this worker: its message is requeued after a pause", "pause", requeueUnregisteredPause)
		w.delay(d, requeueUnregisteredPause)
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

// waitForETA delays a message until its ETA, unacknowledged and without a slot.
// It returns false when the delivery has left meanwhile.
func (w *Worker) waitForETA(d *delivery, eta *time.Time) bool {
	if eta == nil {
		return true
	}
	wait := eta.Sub(w.cfg.Now())
	return wait <= 0 || w.delay(d, wait)
}

// delay lets a delivery wait without a slot. It returns false when the delivery has
// left meanwhile: with its connection, at a shutdown, or replaced by a copy.
func (w *Worker) delay(d *delivery, pause time.Duration) bool {
	if pause <= 0 {
		return true
	}
	d.delay()
	defer d.activity.Wait()()
	timer := time.NewTimer(pause)
	defer timer.Stop()
	for {
		switch d.now() {
		case stateDelayed:
		case stateSettling:
			d.tell()
			return false
		default:
			return false
		}
		select {
		case <-timer.C:
			return true
		case <-d.changed:
		}
	}
}

// waitForSlot waits for the rate limit of its task, and in line for a slot. It returns
// true if the delivery is parked instead of waiting.
func (w *Worker) waitForSlot(d *delivery) (parked bool) {
	d.wait()
	d.activity.BeginWait()
	if d.park() {
		return true
	}
	for {
		state, pause := d.turn()
		if state != stateWaiting && state != stateLimited {
			break
		}
		var early <-chan time.Time // nil: only another goroutine ends the wait
		if pause > 0 {
			early = time.After(pause)
		}
		select {
		case <-d.changed:
		case <-early:
		}
	}
	return false
}

// afterWait runs the task of a delivery that has a slot. If the delivery has left meanwhile,
// or has joined the attempt of an equal message, it does what is left to do.
func (w *Worker) afterWait(d *delivery) {
	defer w.rejectAfterReading(d)
	d.activity.EndWait()
	a, found := d.granted()
	switch {
	case found == matchNone && a == nil:
		faultpoint.Hit(faultpoint.DeliveryDropped, d.wire.Properties.CorrelationID)
		d.tell() // at a shutdown
	case a == nil || a.first != d:
		head, err := d.decodeHeader()
		if err == nil {
			w.repeated(d, head, found)
		}
	default:
		w.execute(a)
	}
}

// handBack requeues a message whose outcome could not be recorded. It pauses
// before, so that a lasting fault does not cause a busy loop.
func (w *Worker) handBack(d *delivery, err error) {
	w.metrics.handedBack.Inc()
	w.cfg.Logger.Error("message is requeued: its outcome could not be recorded", "queue", d.sub.queue.Name, "error", err)
	w.delay(d, w.handBackPause())
	d.settle(settlementRequeue)
}
