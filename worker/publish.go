package worker

import (
	"context"
	"errors"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// outgoing is a message with its destination.
type outgoing struct {
	message     protocol.Publishing
	destination destination
}

// routeFollowUps gives follow-up messages their exchange and routing key.
func (w *Worker) routeFollowUps(followUps []protocol.FollowUp) ([]outgoing, error) {
	messages := make([]outgoing, 0, len(followUps))
	for _, f := range followUps {
		own := f.Destination
		if own == (protocol.Destination{}) {
			own.Queue = f.Queue
		}
		to, err := w.routes.resolve(f.Publishing.Task, own)
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

// send is sendOn on the current connection for publishing.
func (w *Worker) send(ctx context.Context, o outgoing) error {
	p, err := w.publishing.get(ctx)
	if err != nil {
		return err
	}
	return w.sendOn(ctx, p, o)
}

// sendOn declares the message's queue, as Celery does, and publishes the message
// once. A queue or exchange that was deleted after its declaration is declared
// again.
func (w *Worker) sendOn(ctx context.Context, p *publisher, o outgoing) error {
	declared, err := w.declareDestination(ctx, p, o.destination.queue)
	if err != nil {
		return err
	}
	err = p.publish(ctx, o.message)
	if errors.Is(err, ErrUnroutable) && o.destination.queue.Name != "" && !declared {
		p.undeclare(ctx, o.destination.queue.Name)
		if _, err := w.declareDestination(ctx, p, o.destination.queue); err != nil {
			return err
		}
		err = p.publish(ctx, o.message)
	}
	if err != nil {
		return err
	}
	w.metrics.published.Inc()
	return nil
}

// declareDestination declares a queue unless that was done on this connection. It
// reports whether it has declared the queue now.
func (w *Worker) declareDestination(ctx context.Context, p *publisher, queue Queue) (declared bool, err error) {
	if queue.Name == "" {
		return false, nil
	}
	declared, err = p.declare(ctx, queue)
	var mismatch *MismatchError
	if errors.As(err, &mismatch) {
		// The queue exists with other properties, but may still receive the
		// message. If it does not, the broker returns the message.
		w.cfg.Logger.Info("publishing to a queue whose declaration differs", "queue", queue.Name, "error", err)
		return declared, p.acceptDeclaration(ctx, queue.Name)
	}
	return declared, err
}
