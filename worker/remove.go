package worker

import (
	"context"
	"errors"
	"fmt"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// removeBatch is how many messages RemoveReady shows at a time, and so its memory.
const removeBatch = 64

// RemoveReady removes single messages from a queue: those that choose chooses of the ready
// ones. It is for a program that knows of messages that must not be delivered again, such
// as those that a worker has recorded elsewhere and could not acknowledge before it was
// killed. It connects by itself, and needs no Run.
//
//   - choose gets the messages in the order of the queue, up to 64 at a time, each once,
//     and none that was published after the call began.
//   - If redelivered is set, only messages that were delivered before are shown: those at
//     the head of the queue that the broker marks as redelivered.
//   - The other messages stay, in their places and marked as redelivered. A message of
//     which the queue has counted half of the returns that it allows is replaced by a copy
//     at the end of the queue. Until RemoveReady returns, no worker receives the messages
//     that were shown.
//
// It returns how many were removed. After an error, or if the process ends, some of the
// chosen messages may still be in the queue. The error is errors.ErrUnsupported if
// Config.Transport cannot take single messages.
func (w *Worker) RemoveReady(ctx context.Context, queue string, redelivered bool, choose func([]protocol.Delivery) ([]bool, error)) (removed int, err error) {
	q, err := w.routes.queue(queue)
	if err != nil {
		return 0, err
	}
	consumer, err := w.broker.OpenConsumer(ctx, nil)
	if err != nil {
		return 0, err
	}
	defer consumer.Close()
	getter, ok := consumer.(broker.Getter)
	if !ok {
		return 0, fmt.Errorf("broker %s: taking single messages of queue %q: %w", consumer.Place(), queue, errors.ErrUnsupported)
	}
	r := remover{worker: w, getter: getter, queue: q, redelivered: redelivered, left: 1}
	for r.left > 0 {
		batch, err := r.next(ctx)
		if err != nil || len(batch) == 0 {
			return removed, err
		}
		messages := make([]protocol.Delivery, len(batch))
		for i, d := range batch {
			messages[i] = d.Message
		}
		chosen, err := choose(messages)
		if err != nil {
			return removed, err
		}
		for i, d := range batch {
			if !chosen[i] {
				if err := r.keep(ctx, d); err != nil {
					return removed, err
				}
				continue
			}
			d.Receipt.Ack()
			removed++
		}
	}
	if removed > 0 {
		// An acknowledgement has no answer. That to a later request says that the broker
		// has it, or else that the connection is lost.
		_, _, _, err = getter.Get(ctx, q)
	}
	return removed, err
}

// remover takes the messages for one call of RemoveReady. What it does not settle returns
// to the queue when the connection is closed.
type remover struct {
	worker      *Worker
	getter      broker.Getter
	queue       broker.Queue
	redelivered bool
	// left is how many messages are to be looked at still, at least 1 before the first
	// was taken.
	left  int
	began bool
}

// next takes the next batch.
func (r *remover) next(ctx context.Context) (batch []broker.Delivery, err error) {
	for r.left > 0 && len(batch) < removeBatch {
		d, behind, ok, err := r.getter.Get(ctx, r.queue)
		if err != nil {
			return nil, err
		}
		if r.began {
			r.left--
		} else {
			r.began, r.left = true, behind
		}
		if !ok || r.redelivered && !d.Message.Redelivered {
			r.left = 0
			break
		}
		batch = append(batch, d)
	}
	return batch, nil
}

// keep replaces a message that the queue might drop when it is returned once more.
func (r *remover) keep(ctx context.Context, d broker.Delivery) error {
	if !wearsOut(d.Returns, d.ReturnLimit) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, copyTimeout)
	defer cancel()
	m := d.Receipt.Copy()
	m.Headers[headerCopy] = true
	err := r.worker.WithConnection(ctx, func(publish func(context.Context, protocol.Publishing) error) error { return publish(ctx, m) })
	if err == nil {
		d.Receipt.Ack()
	}
	return err
}
