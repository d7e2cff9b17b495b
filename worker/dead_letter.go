package worker

import (
	"context"
	"errors"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// Headers that the worker adds to a message in Config.DeadLetterQueue.
const (
	// HeaderReason is a text that says why the message cannot run.
	HeaderReason = "x-mm-orchestrator-reason"
	// HeaderQueue is the name of the queue that the message was consumed from.
	HeaderQueue = "x-mm-orchestrator-queue"
	// HeaderTime is the time when the worker moved the message, in RFC 3339.
	HeaderTime = "x-mm-orchestrator-time"
)

// maxReasonBytes bounds HeaderReason: all headers have to fit into one frame.
const maxReasonBytes = 1024

// deadLetter settles a delivery that can never run: it publishes the message to
// Config.DeadLetterQueue and acknowledges it or, if none is configured, rejects
// it.
func (w *Worker) deadLetter(d *delivery, taskID, reason string) {
	s, err := w.moveToDeadLetters(d, taskID, reason)
	if err != nil {
		w.handBack(d, err)
		return
	}
	d.settle(s)
}

// moveToDeadLetters publishes the message of a delivery to Config.DeadLetterQueue, and
// returns how the delivery is to be settled.
func (w *Worker) moveToDeadLetters(d *delivery, taskID, reason string) (settlement, error) {
	if w.cfg.DeadLetterQueue == "" {
		return settlementReject, nil
	}
	reason = cleanText(reason)
	if len(reason) > maxReasonBytes {
		reason = cleanText(reason[:maxReasonBytes]) + "…"
	}
	// Not with all headers: RabbitMQ routes by one of them too.
	m := d.receipt.Copy()
	m.TaskID, m.RoutingKey = taskID, w.cfg.DeadLetterQueue
	m.Headers[HeaderReason], m.Headers[HeaderQueue] = reason, d.sub.queue.Name
	m.Headers[HeaderTime] = w.cfg.Now().UTC().Format(time.RFC3339)
	// An operator may move it back, to run: that is no copy of what ends here.
	delete(m.Headers, headerCopy)
	// It stays in the queue until an operator removes it.
	m.Properties.Expiration = ""
	err := w.retry(w.lifecycle.record, "publish", func(ctx context.Context) error {
		err := w.Publish(ctx, m)
		if errors.Is(err, ErrUnroutable) {
			// It does not exist. One that exists is used whatever its properties are.
			err = w.send(ctx, broker.Publication{Message: m, Declare: &Queue{Name: w.cfg.DeadLetterQueue}})
		}
		return err
	})
	var unsendable *broker.UnsendableError
	switch {
	case errors.As(err, &unsendable):
		w.cfg.Logger.Error("message cannot be moved to the dead-letter queue and is rejected", "task_id", taskID, "error", err)
		return settlementReject, nil
	case err != nil:
		return settlementRequeue, err
	}
	return settlementAck, nil
}
