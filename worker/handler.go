package worker

import (
	"context"
	"encoding/json"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// A Handler runs one task.
//
//   - The returned value becomes the task's result, SUCCESS; it must be
//     something that Python's JSON can hold (see [protocol.EncodeJSON]).
//   - A returned error is FAILURE, unless it is [Retry], [Reject] or [Ignore].
//     [Error] chooses the Python class; any other error is RuntimeError.
//   - A panic is a FAILURE with the stack as traceback.
//   - ctx ends at the soft time limit (cause [ErrSoftTimeLimit]), at the hard
//     one (cause [ErrTimeLimit]) and when the worker is told to stop at once
//     (cause [ErrShutdown]). A handler that goes on regardless keeps its slot.
//   - It may be called by many goroutines at once, and again for the same
//     task: execution is at least once.
type Handler interface {
	Handle(ctx context.Context, task *Task) (any, error)
}

// HandlerFunc is a function that is a Handler.
type HandlerFunc func(ctx context.Context, task *Task) (any, error)

// Handle calls f.
func (f HandlerFunc) Handle(ctx context.Context, task *Task) (any, error) { return f(ctx, task) }

// Middleware wraps handlers. The first given to [Worker.Use] is the outermost.
type Middleware func(Handler) Handler

// Task is a message on its way through a handler. Everything reachable from
// the Message is read-only.
type Task struct {
	*protocol.Message
	// Node is the name of the worker that runs the task.
	Node string
	// Queue is the name of the consumed queue that the message came from.
	Queue string
	// Delivery is the message as the broker handed it over, for handlers that
	// keep it and publish it again later (see [Worker.Publish]). Read-only,
	// and empty when the task came from no broker.
	Delivery protocol.Delivery

	update func(ctx context.Context, state string, meta json.RawMessage) error
	held   func(ctx context.Context) error // nil when the task came from no broker, as the next
	others func(ctx context.Context) (int, error)
}

// UpdateState stores a state of the application's own, such as PROGRESS, with
// meta as its value. It does nothing when the task's results are ignored.
func (t *Task) UpdateState(ctx context.Context, state string, meta any) error {
	value, err := protocol.EncodeJSON(meta)
	if err != nil {
		return err
	}
	if t.update == nil {
		return nil
	}
	return t.update(ctx, state, value)
}

type taskKey struct{}

// ContextWithTask returns a context that carries task, as handlers get it.
func ContextWithTask(ctx context.Context, task *Task) context.Context {
	return context.WithValue(ctx, taskKey{}, task)
}

// TaskFromContext returns the task that ctx was made for, or nil.
func TaskFromContext(ctx context.Context) *Task {
	task, _ := ctx.Value(taskKey{}).(*Task)
	return task
}

// TaskOption is a property of a task as it is registered, like an argument of
// Celery's @app.task.
type TaskOption func(*registration)

// registration is what a worker knows about one task name.
type registration struct {
	handler      Handler
	ignoreResult bool
	timeLimit    protocol.TimeLimit
}

// IgnoreResult keeps no results of the task unless a message says otherwise.
func IgnoreResult() TaskOption { return func(r *registration) { r.ignoreResult = true } }

// WithTimeLimit gives the task limits of its own, which a message may replace.
func WithTimeLimit(limit protocol.TimeLimit) TaskOption {
	return func(r *registration) { r.timeLimit = limit }
}
