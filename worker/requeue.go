package worker

import (
	"context"
	"errors"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// A queue may count how often a message was returned to it, and drop or dead-letter it
// beyond a limit. Lost connections count, too. So the queue would drop a message that
// waits for a database after, say, twenty attempts, and the message of a task that
// runs for hours after twenty lost connections, though nothing is wrong with either.
//
// Therefore the worker replaces a message that the queue has counted: it
// publishes a copy, for which the count begins at zero, and acknowledges the old
// message when the broker has confirmed the copy. A crash in between leaves
// both.
//
// The message of a task that crashes its worker is not replaced: the limit ends
// this loop, as it should.

// headerCopy marks a message that replaces another. If the task ends before the copy is
// delivered, the copy must not run it again, although the broker does not mark it as
// redelivered.
const headerCopy = "x-mm-orchestrator-copy"

// copyTimeout bounds the publishing of a copy. After it the message is requeued
// unchanged.
const copyTimeout = 30 * time.Second

// repeats reports whether a worker may have received the message before.
func (d *delivery) repeats() bool { return d.wire.Redelivered || d.isCopy() }

// isCopy reports whether a worker has published the message in place of another.
func (d *delivery) isCopy() bool {
	_, is := d.wire.Headers[headerCopy]
	return is
}

// requeue returns a message to its queue, as a copy if its returns are counted.
func (d *delivery) requeue() {
	if d.returns > 0 && d.replace() {
		d.receipt.Ack()
		return
	}
	d.receipt.Requeue()
}

// renew replaces the message of a running task before its queue drops it, so that
// another worker receives it if this one crashes. The copy is delivered and
// attached to the running task. A copy that another worker receives after the
// end of the task runs it again; to keep this rare, renew does nothing before
// half of the limit is used up. The worker may not see the limit that the broker
// applies. If that is lower, the queue may drop the message, and the task runs to
// its end without it.
func (d *delivery) renew() {
	if wearsOut(d.returns, d.returnLimit) && d.replace() {
		d.settle(settlementAck)
	}
}

// wearsOut reports whether half of the limit of returns is used up.
func wearsOut(returns, limit int) bool { return limit > 0 && returns >= max(1, limit/2) }

// renewReturned replaces a message that is to wait, and that has waited in this
// process when an earlier connection was lost: the queue has counted a return for
// which the message is not to blame. Any other message may have crashed a worker,
// which the limit should end.
func (w *Worker) renewReturned(d *delivery) {
	if d.returns > 0 && w.registry.wasReturned(d) {
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
	if err != nil && !isLost(d.sub.session) {
		w.cfg.Logger.Warn("message cannot be replaced by a copy: its queue may drop it at its delivery limit",
			"queue", d.sub.queue.Name, "task_id", clip(d.wire.Properties.CorrelationID), "count", d.returns, "error", err)
	}
	return err == nil
}

// sendCopy publishes a copy, on the next connection if this one is lost meanwhile. When
// both connections are cut together, the worker may receive again before it has noticed
// that the one for publishing is lost.
func (d *delivery) sendCopy(ctx context.Context) error {
	m := d.receipt.Copy()
	m.Headers[headerCopy] = true
	for {
		p, err := d.sub.worker.publishing.get(ctx)
		if err != nil {
			return err
		}
		err = p.Publish(ctx, m, nil)
		if !errors.Is(err, broker.ErrUnreachable) {
			return err
		}
		select {
		case <-p.Lost():
		case <-d.sub.session.Lost():
			return err
		case <-ctx.Done():
			return err
		}
	}
}
