package orchestrator

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// ParkedMessages is what the return of parked messages needs of the database.
// [store.Store] is it.
type ParkedMessages interface {
	NewestParked(ctx context.Context, queue string) (int64, error)
	TakeAllParked(ctx context.Context, queue string, newest int64) ([]store.ParkedMessage, error)
	DropParked(ctx context.Context, id int64) error
}

const (
	// leaveTimeout bounds the question who else works on the queue.
	leaveTimeout = 3 * time.Second
	// returnTimeout bounds the publication of one message by a worker that
	// stops: a broker that is away for longer is not waited for.
	returnTimeout = 5 * time.Second
	// dropTimeout is what the deletion of a published message gets beyond the
	// end of everything: the row left behind would be a second message.
	dropTimeout = 3 * time.Second
)

// ReturnParked publishes every parked message of a queue, whether or not its
// turn has come, in the order of turns: for the consumers that remain when no
// worker of this program does. It returns how many messages the queue has again.
//
//   - A row is deleted when the broker has confirmed its message. A crash in
//     between leaves both, which is harmless here; a Python worker may begin
//     that one step twice.
//   - What is parked while it runs stays, so that it ends.
//   - returned is told of each message; it may be nil.
//   - An error leaves the rest parked.
func ReturnParked(ctx context.Context, messages ParkedMessages, queue string, publish func(context.Context, protocol.Publishing) error, returned func(store.ParkedMessage)) (int, error) {
	count := 0
	newest, err := messages.NewestParked(ctx, queue)
	if err != nil || newest == 0 {
		return 0, err
	}
	for {
		batch, err := messages.TakeAllParked(ctx, queue, newest)
		if err != nil || len(batch) == 0 {
			return count, err
		}
		for _, m := range batch {
			faultpoint.Hit(faultpoint.ParkedTaken, m.RunID, string(m.Step))
			// What is not published stays taken until this process has ended, which
			// comes next, or for 30 s.
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
			if returned != nil {
				returned(m)
			}
		}
	}
}

func publishWithin(ctx context.Context, limit time.Duration, m store.ParkedMessage, publish func(context.Context, protocol.Publishing) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return publish(ctx, publishingOf(m))
}

// publishingOf addresses a message to its queue itself: the exchange it came
// by may lead to others too.
func publishingOf(m store.ParkedMessage) protocol.Publishing {
	return protocol.Publishing{
		TaskID: m.TaskID, Task: TaskExecutePlanStep, RoutingKey: m.Queue, Headers: m.Headers, Properties: m.Properties, Body: m.Body,
	}
}

// ReturnCommand is what an operator runs when a worker could not do it.
const ReturnCommand = "mm-orchestrator parked return"

// Leave is the worker's last act, when no step runs any more and none will
// begin: the sweep ends, the worker is taken off the list of those that consume
// the queue, and the last one of them gives the parked messages back to the
// queue. So a Python worker finds every message where it looks, and the next
// worker of this program too.
//
// ctx bounds it. It logs what could not be done, with the command that does it
// later, and returns what the line that the worker has stopped should say, as
// slog takes it: nothing, if nothing is parked.
func (o *Orchestrator) Leave(ctx context.Context) []any {
	o.sweeping.end(ctx)
	ask, cancel := context.WithTimeout(ctx, leaveTimeout)
	departure, err := o.config.Steps.LeaveQueue(ask, o.config.Queue)
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
		count, err = ReturnParked(ctx, o.config.Steps, o.config.Queue, o.broker.Publish, o.logReturned)
	}
	if left := departure.Parked - count; err != nil || left > 0 {
		left = max(1, left)
		o.log.Error("parked messages stay in the database: before a Python worker takes over, run `"+ReturnCommand+"`", "parked", left, "returned", count, "error", err)
		return []any{"returned", count, "parked", left}
	}
	if err := o.config.Steps.ClearHolds(ctx, o.config.Queue); err != nil {
		// The next worker's sweep does it.
		o.log.Warn("workspaces are not freed yet", "error", err)
	}
	if count == 0 {
		return nil
	}
	return []any{"returned", count}
}

func (o *Orchestrator) logReturned(m store.ParkedMessage) {
	o.log.Info("parked message is back in the queue, as its last worker stops", "run_id", m.RunID, "step", string(m.Step), "task_id", m.TaskID,
		"why", string(m.Why), "waited", max(0, time.Since(m.Since)).Round(time.Millisecond))
}

// sweeping ends the sweep before the worker leaves: afterwards a sweep would
// register it again.
type sweeping struct {
	mu    sync.Mutex
	ended bool               // written by end
	stop  context.CancelFunc // of the sweep that runs, nil for none; written by begin
	done  chan struct{}      // closed when it has ended; written by begin
}

// begin returns the context of a sweep, and what its end must call; ok is
// false if it shall not begin any more.
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

// end returns when no sweep runs, or when ctx has ended.
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
