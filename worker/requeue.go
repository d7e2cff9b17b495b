package worker

import (
	"context"
	"maps"
	"reflect"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// A quorum queue drops or dead-letters a message that was returned to it more
// often than its delivery limit allows. From RabbitMQ 4.0 on the default limit
// is 20. Lost channels and connections count, and before 4.3 also the
// acknowledgement timeout and basic.nack. So the queue would drop a message that
// waits for a database after twenty attempts, and the message of a task that
// runs for hours after twenty timeouts, though nothing is wrong with either.
//
// Therefore the worker replaces a message that the queue has counted: it
// publishes a copy, for which the count begins at zero, and acknowledges the old
// message when the broker has confirmed the copy. A crash in between leaves
// both.
//
// The message of a task that crashes its worker is not replaced: the limit ends
// this loop, as it should.

const (
	// headerCount has the number of returns that a quorum queue has counted. It
	// is absent at first. From RabbitMQ 4.3 on, headerAcquired has the number of
	// deliveries.
	headerCount    = "x-delivery-count"
	headerAcquired = "x-acquired-count"
	// headerCopy marks a message that replaces another. If the task ends before
	// the copy is delivered, the copy must not run it again, although the broker
	// does not mark it as redelivered.
	headerCopy = "x-mm-orchestrator-copy"
)

// copyTimeout bounds the publishing of a copy. After it the message is requeued
// unchanged.
const copyTimeout = 30 * time.Second

// defaultDeliveryLimit is RabbitMQ's default from 4.0 on.
const defaultDeliveryLimit = 20

// returns is how many returns of this message its queue has counted.
func (d *delivery) returns() int { return integer(d.wire.Headers[headerCount]) }

func integer(value any) int {
	switch n := reflect.ValueOf(value); {
	case n.CanInt():
		return int(n.Int())
	case n.CanUint():
		return int(n.Uint())
	}
	return 0
}

// repeats reports whether a worker may have received the message before.
func (d *delivery) repeats() bool {
	_, copied := d.wire.Headers[headerCopy]
	return d.redelivered || copied
}

// requeue returns a message to its queue, as a copy if its returns are counted.
func (d *delivery) requeue() error {
	if d.returns() > 0 && d.replace() {
		return d.acker.Ack(d.tag, false)
	}
	return d.acker.Nack(d.tag, false, true)
}

// renew replaces the message of a running task before its queue drops it, so that
// another worker receives it if this one crashes. The copy is delivered and
// attached to the running task. A copy that another worker receives after the
// end of the task runs it again; to keep this rare, renew does nothing before
// half of the limit is used up. The worker does not see a limit that a policy
// sets. If that is lower, the queue may drop the message, and the task runs to
// its end without it.
func (d *delivery) renew() {
	limit := defaultDeliveryLimit
	if own, set := d.sub.queue.Arguments["x-delivery-limit"]; set {
		limit = integer(own)
	}
	if limit > 0 && d.returns() >= max(1, limit/2) && d.replace() {
		d.settle(settlementAck)
	}
}

// renewReturned replaces a message that is to wait, and that has waited in this
// process when an earlier connection was lost: the queue has counted a return for
// which the message is not to blame. Any other message may have crashed a worker,
// which the limit should end.
func (w *Worker) renewReturned(d *delivery) {
	if d.returns() > 0 && w.registry.wasReturned(d) {
		w.registry.handlers.Go(d.renew)
	}
}

// replace publishes a copy of the message to the delivery's queue only. It returns
// true when the broker has confirmed the copy.
func (d *delivery) replace() bool {
	w := d.sub.worker
	d.markCopied()
	ctx, cancel := context.WithTimeout(w.lifecycle.record, copyTimeout)
	defer cancel()
	err := d.sendCopy(ctx)
	if err != nil && !d.sub.session.isLost() {
		w.cfg.Logger.Warn("message cannot be replaced by a copy: its queue may drop it at its delivery limit",
			"queue", d.sub.queue.Name, "task_id", clip(d.wire.Properties.CorrelationID), "count", d.wire.Headers[headerCount], "error", err)
	}
	return err == nil
}

func (d *delivery) sendCopy(ctx context.Context) error {
	headers := maps.Clone(d.wire.Headers)
	delete(headers, headerCount)
	delete(headers, headerAcquired)
	headers[headerCopy] = true
	m := protocol.Publishing{
		TaskID: d.wire.Properties.CorrelationID, RoutingKey: d.sub.queue.Name,
		Headers: headers, Properties: d.wire.Properties, Body: d.wire.Body,
	}
	p, err := d.sub.worker.publishing.get(ctx)
	if err != nil {
		return err
	}
	return p.publish(ctx, m)
}
