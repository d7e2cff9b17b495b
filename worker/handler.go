package worker

import (
	"context"
	"encoding/json"
	"log/slog"
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// A Handler runs the tasks of one name.
//
//   - The returned value is the task's result, and the task's state SUCCESS. It
//     must have a form in Python's JSON (see [protocol.EncodeJSON]): a struct is
//     a dictionary whose keys are the json tags of its fields, nil is None. A
//     value without such a form makes the task FAILURE with kombu's EncodeError.
//   - A returned error makes the task FAILURE, unless it is [Retry], [Reject],
//     [Ignore] or that of [Replace]. An [Error] chooses the Python class; for any
//     other error the class is RuntimeError, or what [ErrorClasses] says. With
//     [AutoRetry] the task is run again. These values may be pointers, and may be
//     wrapped in other errors.
//   - A panic makes the task FAILURE with the class RuntimeError and the stack as
//     traceback. So does a panic of middleware, or of a method of what the
//     handler returned, such as Error or MarshalJSON.
//   - ctx ends at the soft time limit (cause [ErrSoftTimeLimit]), at the hard
//     time limit (cause [ErrTimeLimit]), and when a shutdown waits no longer
//     (cause [ErrShutdown]). ctx.Deadline is the first of the two limits. A handler
//     that ignores this keeps its slot until it returns.
//   - [Logger] is the logger for the handler, and [TaskFromContext] its task.
//   - Many goroutines may call Handle at once, and may call it again for the
//     same task: execution is at least once.
type Handler interface {
	Handle(ctx context.Context, task *Task) (any, error)
}

// HandlerFunc lets a function be a Handler.
type HandlerFunc func(ctx context.Context, task *Task) (any, error)

// Handle calls f.
func (f HandlerFunc) Handle(ctx context.Context, task *Task) (any, error) { return f(ctx, task) }

// Middleware wraps a handler. The first one given to [Worker.Use] is the
// outermost.
type Middleware func(Handler) Handler

// Task is what a handler receives: the task's message and where it came from.
// Handlers must not change anything that is reachable from Message.
type Task struct {
	*protocol.Message
	// Node is the name of the worker that runs the task, as Config.Node.
	Node string
	// Queue is the name of the queue that the worker consumed the message from.
	Queue string
	// Delivery is the message as the broker delivered it, for handlers that
	// store it and publish it again later (see [Worker.Publish]). Handlers must
	// not change it. It is empty when the task did not come from a broker.
	Delivery protocol.Delivery

	logger        func(*protocol.Message) *slog.Logger // see Logger
	childrenMutex sync.Mutex
	sent          []json.RawMessage // see AddChild
	sendOptions   func(task string) registration
	update        func(ctx context.Context, state string, meta json.RawMessage) error // nil when results are ignored
	// Nil when the task did not come from a broker.
	stillUnacked   func(ctx context.Context) error
	otherConsumers func(ctx context.Context) (int, error)
}

// UpdateState stores a state that the application defines, such as PROGRESS,
// with meta as its value, which Python reads as AsyncResult.info. It tries once,
// for at most 30 s. It does nothing when the task's results are ignored or not
// stored. After the task has ended it is an error.
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

// ContextWithTask returns a context with which [TaskFromContext] returns task.
// The worker does this for every handler; tests of handlers may need it.
func ContextWithTask(ctx context.Context, task *Task) context.Context {
	return context.WithValue(ctx, taskKey{}, task)
}

// TaskFromContext returns the task of a handler's context, or nil.
func TaskFromContext(ctx context.Context) *Task {
	task, _ := ctx.Value(taskKey{}).(*Task)
	return task
}

// TaskOption is an option of a task's registration, like an argument of Celery's
// @app.task.
type TaskOption func(*registration)

// registration is a handler with the options of its task.
type registration struct {
	handler      Handler
	wrapped      Handler // handler with middleware, which is built once
	ignoreResult bool
	timeLimit    protocol.TimeLimit
	retries      *RetryPolicy  // nil without retries of the worker's own
	classes      []ErrorClass  // the task's, then the worker's
	every        time.Duration // between two starts; 0 without a rate limit

	maxStarts   int           // 0 without a limit
	sendTo      string        // a queue
	expireAfter time.Duration // 0 without an expiry

	ackEarly, rejectFailures, requeueTimeouts bool // see the options
	prepare                                   func(s protocol.Signature, args []json.RawMessage) (protocol.Prepared, error)
}

// IgnoreResult makes the worker store no results of the task. A message's own
// ignore_result takes precedence.
func IgnoreResult() TaskOption { return func(r *registration) { r.ignoreResult = true } }

// WithTimeLimit sets the time limits of the task. A message's own time limits
// take precedence.
func WithTimeLimit(limit protocol.TimeLimit) TaskOption {
	return func(r *registration) { r.timeLimit = limit }
}

// Prepare calls fn for each message of the task that this worker publishes as a
// follow-up, whether it runs the task itself or not. fn may change the arguments,
// add headers and choose the queue, as a task class in Python that overrides
// apply_async. A queue or a header of the signature takes precedence.
//
// fn must give the same each time, since a message may be published again. It is
// also called before the task in front has run, with None as that task's result.
func Prepare(fn func(s protocol.Signature, args []json.RawMessage) (protocol.Prepared, error)) TaskOption {
	return func(r *registration) { r.prepare = fn }
}
