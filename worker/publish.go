package worker

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// canFollow returns an error if a follow-up of the task can never be published: a
// chord, or a signature that does not make a valid message
// (docs/celery.md#groups-and-chords). The task then fails before its handler
// runs, rather than after it has done its work.
func (w *Worker) canFollow(m *protocol.Message) error {
	if e := m.Embed; e.Chord == nil && len(e.Callbacks) == 0 && len(e.Errbacks) == 0 && len(e.Chain) == 0 {
		return nil // as most tasks
	}
	if err := protocol.CheckLaterSteps(m); err != nil {
		return err
	}
	if _, _, err := w.afterSuccess(m, nil); err != nil {
		return err
	}
	_, err := w.afterFailure(m)
	return err
}

// afterSuccess returns the messages that follow a task which has succeeded, those of
// plan.FollowUps. The error says that one of them can never be published.
func (w *Worker) afterSuccess(m *protocol.Message, value json.RawMessage) (messages []broker.Publication, plan protocol.Plan, err error) {
	if len(m.Embed.Callbacks) == 0 && len(m.Embed.Chain) == 0 {
		return nil, protocol.Plan{}, nil // as most tasks
	}
	plan, err = protocol.AfterSuccess(m, value, w.sender())
	if err != nil {
		return nil, protocol.Plan{}, err
	}
	messages, err = w.routeFollowUps(plan.FollowUps)
	return messages, plan, err
}

// afterFailure returns the error callbacks of a task.
func (w *Worker) afterFailure(m *protocol.Message) ([]broker.Publication, error) {
	plan, err := protocol.AfterFailure(m, w.sender())
	if err != nil {
		return nil, err
	}
	return w.routeFollowUps(plan.FollowUps)
}

// routeFollowUps gives follow-up messages their exchange and routing key.
func (w *Worker) routeFollowUps(followUps []protocol.FollowUp) ([]broker.Publication, error) {
	messages := make([]broker.Publication, 0, len(followUps))
	for _, f := range followUps {
		own := f.Destination
		if own == (protocol.Destination{}) {
			own.Queue = cmp.Or(f.Queue, w.tasks[f.Publishing.Task].sendTo)
		}
		to, err := w.routes.resolve(f.Publishing.Task, own)
		if err != nil {
			return nil, &broker.UnsendableError{Task: f.Publishing.Task, ID: f.Publishing.TaskID, Err: err}
		}
		m := f.Publishing
		m.Exchange, m.RoutingKey = to.exchange, to.routingKey
		w.tasks[m.Task].expire(&m, w.cfg.Now())
		m.Properties.Priority = w.priority(m, f.Destination)
		if r, known := w.tasks[m.Task]; known && m.Headers["ignore_result"] == nil {
			// Null would mean the same, but Celery's workers write the value that
			// they know.
			m.Headers["ignore_result"] = r.ignoreResult
		}
		if err := w.broker.CheckMessage(m); err != nil {
			return nil, err
		}
		messages = append(messages, broker.Publication{Message: m, Declare: &to.queue})
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

// publishTogetherMax bounds how many messages of a task are published together.
const publishTogetherMax = 64

// publishAll publishes what follows a task, several messages together. Each group waits
// until all messages of the one before are in their queues.
func (w *Worker) publishAll(m *protocol.Message, groups ...[]broker.Publication) error {
	for _, messages := range groups {
		for some := range slices.Chunk(messages, publishTogetherMax) {
			if _, err := w.publishTogether(m, some); err != nil {
				return err
			}
		}
	}
	return nil
}

// publishErrorCallbacks publishes the error callbacks of a task, several together. One
// that no queue takes is lost and logged: its task has failed already.
func (w *Worker) publishErrorCallbacks(m *protocol.Message, messages []broker.Publication) error {
	for some := range slices.Chunk(messages, publishTogetherMax) {
		left, err := w.publishTogether(m, some)
		if lost, other := nobodyTakes(err); lost == nil && other != nil {
			return other
		}
		for _, one := range left {
			if !errors.Is(one.err, ErrUnroutable) {
				return fmt.Errorf("publish: %w", one.err)
			}
		}
		for _, one := range left {
			w.taskLog(m).Error("error callback is lost: no queue has taken it", "callback", one.message.Message.Task, "callback_id", one.message.Message.TaskID, "error", one.err)
		}
	}
	return nil
}

// unpublished is a message that is not in a queue for certain, and why.
type unpublished struct {
	message broker.Publication
	err     error
}

// publishTogether publishes messages together, and again those that are left, until none is
// left or RecordTimeout is over. The error is one of theirs.
func (w *Worker) publishTogether(m *protocol.Message, messages []broker.Publication) (left []unpublished, err error) {
	for range messages {
		faultpoint.Hit(faultpoint.PublishBefore, m.ID, m.ArgsRepr)
	}
	again := messages
	err = w.retry(w.lifecycle.record, "publish", func(ctx context.Context) error {
		left = w.sendAll(ctx, again)
		if len(left) == 0 {
			return nil
		}
		if len(left) < len(again) {
			again = make([]broker.Publication, len(left))
			for i, one := range left {
				again[i] = one.message
			}
		}
		return worst(left)
	})
	for range len(messages) - len(left) {
		faultpoint.Hit(faultpoint.PublishConfirmed, m.ID, m.ArgsRepr)
	}
	return left, err
}

// worst returns the error that decides about a task: first that a message can never be
// sent, then that no queue takes one.
func worst(left []unpublished) error {
	err := left[0].err
	for _, one := range left {
		if unsendable := (*broker.UnsendableError)(nil); errors.As(one.err, &unsendable) {
			return one.err
		}
		if errors.Is(one.err, ErrUnroutable) && !errors.Is(err, ErrUnroutable) {
			err = one.err
		}
	}
	return err
}

// sendAll publishes messages on the current connection for publishing, and returns those
// that are left, in their order.
func (w *Worker) sendAll(ctx context.Context, messages []broker.Publication) (left []unpublished) {
	p, err := w.publishing.get(ctx)
	if err != nil {
		return allLeft(nil, messages, err)
	}
	together, can := p.(broker.BatchPublisher)
	if !can || len(messages) == 1 {
		for i, o := range messages {
			err := w.sendOn(ctx, p, o)
			switch {
			case errors.Is(err, ErrUnroutable):
				left = append(left, unpublished{o, err}) // the broker answers, so that others may be taken
			case err != nil:
				return allLeft(left, messages[i:], err)
			}
		}
		return left
	}
	errs := together.PublishAll(ctx, messages)
	if len(errs) != len(messages) {
		return allLeft(nil, messages, fmt.Errorf("the transport has answered for %d of %d messages", len(errs), len(messages)))
	}
	for i, err := range errs {
		if err == nil {
			w.metrics.published.Inc()
			continue
		}
		left = append(left, unpublished{messages[i], err})
	}
	return left
}

// allLeft adds messages that are left for the same reason.
func allLeft(left []unpublished, messages []broker.Publication, err error) []unpublished {
	for _, o := range messages {
		left = append(left, unpublished{o, err})
	}
	return left
}

// send publishes a message on the current connection for publishing.
func (w *Worker) send(ctx context.Context, o broker.Publication) error {
	p, err := w.publishing.get(ctx)
	if err != nil {
		return err
	}
	return w.sendOn(ctx, p, o)
}

// sendOn declares the message's queue, as Celery does, and publishes the message
// once. A queue or exchange that was deleted after its declaration is declared
// again.
func (w *Worker) sendOn(ctx context.Context, p broker.Publisher, o broker.Publication) error {
	if err := p.Publish(ctx, o.Message, o.Declare); err != nil {
		return err
	}
	w.metrics.published.Inc()
	return nil
}

// Publish publishes a message unchanged, as persistent unless its properties say
// transient, and waits for the broker's confirm: nil means that the message is
// in a queue. While there is no connection it waits for one until ctx ends. So
// it does before Run connects and after Run has returned: give it a ctx that
// ends. It may be called during the shutdown, and by handlers.
//
// m.Exchange and m.RoutingKey say where it goes; the exchange "" with the name of
// a queue as routing key is that queue. Config.TaskRoutes are not applied.
//
// The error is ErrUnroutable when no queue received the message, and a
// [broker.UnsendableError] when none ever can. After any other error the message may or
// may not be in the queue, so that a retry may publish it twice.
func (w *Worker) Publish(ctx context.Context, m protocol.Publishing) error {
	return w.send(ctx, broker.Publication{Message: m})
}

// WithConnection connects once, without consuming or declaring anything, and
// calls do with a function that does what [Worker.Publish] does on that
// connection. It closes the connection when do returns. It is for a program that
// only publishes, and needs no Run. It returns the error of the connection, as
// Run does, or that of do.
func (w *Worker) WithConnection(ctx context.Context, do func(publish func(context.Context, protocol.Publishing) error) error) error {
	p, err := w.broker.OpenPublisher(ctx)
	if err != nil {
		return err
	}
	defer p.Close()
	return do(func(ctx context.Context, m protocol.Publishing) error {
		return w.sendOn(ctx, p, broker.Publication{Message: m})
	})
}
