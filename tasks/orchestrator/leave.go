package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// ParkedMessages is the part of [store.Store] that ReturnParked uses.
type ParkedMessages interface {
	LookAtParked(ctx context.Context, queue string) (store.ParkedState, error)
	RenewParked(ctx context.Context, queue string, messages []store.StepMessage) ([]bool, error)
	TakeAllParked(ctx context.Context, queue string, newest int64) ([]store.ParkedMessage, error)
	DropParked(ctx context.Context, id int64) error
}

// QueueOfParked is where ReturnParked publishes. The methods are those of
// [worker.Worker].
type QueueOfParked interface {
	Publish(ctx context.Context, message protocol.Publishing) error
	RemoveReady(ctx context.Context, queue string, redelivered bool, choose func([]protocol.Delivery) ([]bool, error)) (int, error)
}

// A ReturnObserver is told what ReturnParked does.
type ReturnObserver struct {
	// Returned is called for each message when it has been published.
	Returned func(store.ParkedMessage)
	// Unchecked is called if the queue does not allow to look for copies: then a message
	// of which a killed worker has left a copy is in the queue twice.
	Unchecked func(error)
}

const (
	// leaveTimeout bounds the query for the remaining workers of the queue.
	leaveTimeout = 3 * time.Second
	// returnTimeout bounds the publication of one message by a worker that stops:
	// it does not wait longer for a broker that is unavailable.
	returnTimeout = 5 * time.Second
	// dropTimeout bounds the deletion of a published message. The deletion has
	// this time even if ctx has ended, because a row that remains is published
	// a second time.
	dropTimeout = 3 * time.Second
)

// ReturnParked publishes every parked message of a queue, in the order of turns
// and whether or not its turn has come. It is for a queue without any worker of
// this program, so that other consumers find the messages there. It returns how
// many it has published.
//
//   - Before that, it removes from the queue the copies of parked messages: a Python
//     worker would run their steps twice. There are copies if a worker was killed after
//     it had parked a message and before it could acknowledge it, or after it had
//     published one and before it could delete its row.
//   - It deletes a row when the broker has confirmed the message. A crash in
//     between leaves both; the next call removes the copy.
//   - It leaves messages that are parked while it runs, so that it ends.
//   - After an error the other messages stay parked.
func ReturnParked(ctx context.Context, messages ParkedMessages, queue string, broker QueueOfParked, tell ReturnObserver) (int, error) {
	state, err := messages.LookAtParked(ctx, queue)
	if err != nil || state.Newest == 0 {
		return 0, err
	}
	switch removed, err := removeCopies(ctx, messages, queue, broker, state); {
	case err == nil && removed > 0:
		if state, err = messages.LookAtParked(ctx, queue); err != nil { // they have new ids
			return 0, err
		}
	case err == nil:
	case errors.Is(err, errors.ErrUnsupported), errors.Is(err, worker.ErrMismatch):
		tell.Unchecked(fmt.Errorf("cannot look into queue %s for messages that are parked too: %w", queue, err))
	default:
		return 0, fmt.Errorf("cannot look into queue %s for messages that are parked too: %w", queue, err)
	}
	return publishTaken(ctx, messages, func() ([]store.ParkedMessage, error) { return messages.TakeAllParked(ctx, queue, state.Newest) }, broker.Publish, tell.Returned)
}

// removeCopies removes messages from the queue that are parked too. What a killed worker
// could not acknowledge is at the head of the queue, marked as redelivered. What it has
// published is anywhere.
func removeCopies(ctx context.Context, messages ParkedMessages, queue string, broker QueueOfParked, state store.ParkedState) (int, error) {
	return broker.RemoveReady(ctx, queue, !state.Sent, func(ready []protocol.Delivery) ([]bool, error) {
		steps := make([]store.StepMessage, len(ready))
		for i, d := range ready {
			steps[i] = stepOf(d)
		}
		return messages.RenewParked(ctx, queue, steps)
	})
}

// PublishParked is like ReturnParked, but publishes only messages whose turn has come,
// as a worker does. It is for a command that has ended what they waited for, and may
// run beside workers.
func PublishParked(ctx context.Context, messages interface {
	TakeParked(ctx context.Context, queue string) ([]store.ParkedMessage, error)
	DropParked(ctx context.Context, id int64) error
}, queue string, publish func(context.Context, protocol.Publishing) error, published func(store.ParkedMessage)) (int, error) {
	return publishTaken(ctx, messages, func() ([]store.ParkedMessage, error) { return messages.TakeParked(ctx, queue) }, publish, published)
}

// publishTaken publishes what take returns, until that is nothing. It returns how many
// it has published.
func publishTaken(ctx context.Context, messages interface {
	DropParked(ctx context.Context, id int64) error
}, take func() ([]store.ParkedMessage, error), publish func(context.Context, protocol.Publishing) error, published func(store.ParkedMessage)) (int, error) {
	count := 0
	for {
		batch, err := take()
		if err != nil || len(batch) == 0 {
			return count, err
		}
		for _, m := range batch {
			faultpoint.Hit(faultpoint.ParkedTaken, m.RunID, string(m.Step))
			// On an error the rest of the batch stays taken by this worker until its
			// process ends, which is next, or for 30 s.
			if err := publishWithin(ctx, returnTimeout, m, publish); err != nil {
				return count, err
			}
			faultpoint.Hit(faultpoint.ParkedPublished, m.RunID, string(m.Step))
			drop, cancel := context.WithTimeout(context.WithoutCancel(ctx), dropTimeout)
			err := messages.DropParked(drop, m.ID)
			cancel()
			if err != nil {
				return count, fmt.Errorf("the message of task %s (step %s of run %s) is in the queue, and still in the database too: %w", m.TaskID, m.Step, m.RunID, err)
			}
			count++
			if published != nil {
				published(m)
			}
		}
	}
}

func publishWithin(ctx context.Context, limit time.Duration, m store.ParkedMessage, publish func(context.Context, protocol.Publishing) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return publish(ctx, publishingOf(m))
}

// publishingOf addresses a message to its queue alone: the exchange that it came from
// may route to other queues too, and so does RabbitMQ by the header CC.
func publishingOf(m store.ParkedMessage) protocol.Publishing {
	headers := maps.Clone(m.Headers)
	delete(headers, "CC")
	return protocol.Publishing{
		TaskID: m.TaskID, Task: TaskExecutePlanStep, RoutingKey: m.Queue, Headers: headers, Properties: m.Properties, Body: m.Body,
	}
}

// ReturnCommand is the command by which an operator returns parked messages when
// no worker could.
const ReturnCommand = "mm-orchestrator parked return"

// Leave ends the sweep and removes the worker from the list of those that consume
// the queue. The last of them returns the parked messages to the queue, where a
// Python worker, or the next one of this program, finds them. While the queue is
// paused it leaves them in the database: a Python worker, which knows nothing of the
// pause, would begin their runs. Call it when no step runs any more and none can
// begin.
//
// ctx bounds it. It logs what it could not do, with the command that does it
// later. It returns attributes for the log line "worker has stopped", none if
// nothing is parked.
func (o *Orchestrator) Leave(ctx context.Context) []any {
	o.sweeping.end(ctx)
	query, cancel := context.WithTimeout(ctx, leaveTimeout)
	departure, err := o.config.Steps.LeaveQueue(query, o.config.Queue)
	cancel()
	if err != nil {
		o.log.Warn("cannot find out whether messages are parked; before a Python worker takes over, run `mm-orchestrator parked`, and `"+ReturnCommand+"` if it lists any", "error", err)
		return nil
	}
	if len(departure.Remaining) > 0 {
		if departure.Parked == 0 {
			return nil
		}
		nodes := make([]string, len(departure.Remaining))
		for i, w := range departure.Remaining {
			nodes[i] = w.Node
		}
		return []any{"parked", departure.Parked, "left_to", nodes}
	}
	count := 0
	if departure.Parked > 0 {
		pause, err := o.findPause(ctx)
		if err != nil {
			o.log.Error("cannot find out whether the queue is paused, parked messages stay in the database: before a Python worker takes over, run `"+ReturnCommand+"`", "parked", departure.Parked, "error", err)
			return []any{"parked", departure.Parked}
		}
		if pause != nil {
			o.log.Warn("queue is paused: parked messages stay in the database. `mm-orchestrator resume` returns them to the queue; before a Python worker takes over, run `"+ReturnCommand+"`",
				"parked", departure.Parked, "since", pause.Since, "by", pause.By, "reason", pause.Reason)
			return []any{"parked", departure.Parked, "paused", true}
		}
	}
	if departure.Parked > 0 {
		count, err = ReturnParked(ctx, o.config.Steps, o.config.Queue, o.broker, ReturnObserver{o.logReturned, o.logUnchecked})
	}
	if left := departure.Parked - count; err != nil || left > 0 {
		left = max(1, left)
		o.log.Error("parked messages stay in the database: before a Python worker takes over, run `"+ReturnCommand+"`", "parked", left, "returned", count, "error", err)
		return []any{"returned", count, "parked", left}
	}
	if err := o.config.Steps.ClearHolds(ctx, o.config.Queue); err != nil {
		// The next worker's sweep frees them.
		o.log.Warn("workspaces cannot be freed yet", "error", err)
	}
	if count == 0 {
		return nil
	}
	return []any{"returned", count}
}

func (o *Orchestrator) logReturned(m store.ParkedMessage) {
	o.log.Info("parked message returned to the queue, as its last worker stops", "run_id", m.RunID, "step", string(m.Step), "task_id", m.TaskID,
		"why", string(m.Why), "waited", max(0, time.Since(m.Since)).Round(time.Millisecond))
}

func (o *Orchestrator) logUnchecked(err error) {
	o.log.Warn("parked messages are returned unchecked: a Python worker runs a step twice if a worker was killed while it parked the message", "error", err)
}

// sweeping ends the sweep before the worker leaves the queue. Otherwise a sweep
// could register the worker again.
type sweeping struct {
	mu    sync.Mutex
	ended bool               // written by end
	stop  context.CancelFunc // of the running sweep, nil for none; written by begin
	done  chan struct{}      // closed when that has ended; written by begin
}

// begin returns the context of a sweep, and a function to call at its end. ok is
// false if no sweep may begin any more.
func (s *sweeping) begin(ctx context.Context) (sweep context.Context, done func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return ctx, func() {}, false
	}
	sweep, s.stop = context.WithCancel(ctx)
	s.done = make(chan struct{})
	stop, closed := s.stop, s.done
	return sweep, func() { stop(); close(closed) }, true
}

// end stops the sweep. It returns when no sweep runs, or when ctx has ended.
func (s *sweeping) end(ctx context.Context) {
	s.mu.Lock()
	s.ended = true
	stop, done := s.stop, s.done
	s.mu.Unlock()
	if stop == nil {
		return
	}
	stop()
	select {
	case <-done:
	case <-ctx.Done():
	}
}
