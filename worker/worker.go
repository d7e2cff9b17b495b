package worker

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
	"github.com/moonladderstudios/mm-orchestrator/internal/timeout"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
	"github.com/moonladderstudios/mm-orchestrator/worker/internal/runners"
)

// Worker consumes task messages and runs their handlers. [New] makes one.
//
//   - Register, Handle and Use must be called before Run.
//   - Run may be called once. The worker has goroutines only while Run runs, except
//     those of handlers that ignore the end of their context.
//   - Health, Ready, Stuck, Revoke, Started, StopNow, Unacked, Publish, QueueDepth
//     and QueueConsumers may be called at any time by any goroutine.
//   - Inspect, WithConnection and RunTask need no Run.
type Worker struct {
	cfg        Config
	tasks      map[string]registration
	middleware []Middleware
	routes     router
	metrics    *workerMetrics

	// replyTo and origin identify this worker in messages that it publishes
	// (docs/celery.md#applying-a-signature).
	replyTo string
	origin  string

	started     chan struct{}
	ended       chan struct{} // closed when Run returns
	stopNow     chan struct{}
	stopNowOnce sync.Once

	broker         broker.Broker
	registry       *registry
	stalls         stall.Detector
	runners        *runners.Pool[*delivery]
	link           sessionLink
	publishing     publishingLink
	faults         connectionFaults
	stores         timeout.Group // of calls of the result backend
	lifecycle      lifecycle     // begun by Run
	sessions       atomic.Int64  // how many sessions have consumed so far
	receivingEnded chan struct{} // closed when no goroutine receives any more

	mu     sync.Mutex
	frozen bool // written by Run: no registration any more
}

// waitingRunnersMax bounds how many goroutines wait for a delivery, with many slots. There
// are as many as slots otherwise: a delivery that waits for a slot has none.
const waitingRunnersMax = 64

// New returns a worker. It connects to nothing. The error names every invalid
// field of the configuration.
func New(cfg Config) (*Worker, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.WithDefaults()
	cfg.Logger = guardLogger(cfg.Logger)
	transport, err := cfg.transport()
	if err != nil {
		return nil, err
	}
	metrics, err := newMetrics(cfg.Metrics)
	if err != nil {
		return nil, err
	}
	w := &Worker{
		cfg:            cfg,
		tasks:          map[string]registration{},
		routes:         newRouter(cfg),
		metrics:        metrics,
		replyTo:        newID(),
		origin:         fmt.Sprintf("gen%d@%s", os.Getpid(), hostname()),
		started:        make(chan struct{}),
		ended:          make(chan struct{}),
		stopNow:        make(chan struct{}),
		broker:         transport,
		registry:       newRegistry(cfg.Slots, metrics, cfg.Now),
		receivingEnded: make(chan struct{}),
	}
	w.runners = runners.New(min(cfg.Slots, waitingRunnersMax), w.ended, w.serve)
	w.registry.resume = w.runners.Run
	return w, nil
}

// Register registers the handler of a task name. It panics when the name is empty
// or registered already, when handler is nil, or when Run has been called: these
// are errors in the program.
func (w *Worker) Register(name string, handler Handler, options ...TaskOption) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.frozen {
		panic(fmt.Sprintf("worker: task %q registered after Run", name))
	}
	if _, taken := w.tasks[name]; taken || name == "" || handler == nil {
		panic(fmt.Sprintf("worker: task %q cannot be registered: it needs a name that is not registered yet, and a handler", name))
	}
	r := registration{handler: handler}
	for _, option := range options {
		option(&r)
	}
	for _, class := range r.classes {
		if class.Match == nil || class.Type == "" {
			panic(fmt.Sprintf("worker: task %q: an ErrorClass needs Match and Type", name))
		}
	}
	r.classes = append(r.classes, w.cfg.ErrorClasses...)
	w.tasks[name] = w.wrapped(r)
	w.registry.limit(name, r.every)
}

// Use adds middleware to every handler, including handlers that are registered
// later. The first middleware is the outermost. It is called once for each task
// name, when the first task of that name runs. Use panics when Run has been
// called.
func (w *Worker) Use(middleware ...Middleware) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.frozen {
		panic("worker: middleware added after Run")
	}
	w.middleware = append(w.middleware, middleware...)
	for name, r := range w.tasks {
		w.tasks[name] = w.wrapped(r)
	}
}

// Handle registers a function that receives the task's arguments as the fields of
// In and returns the result. See [Bind] for how arguments become fields, and
// [Handler] for what a function may return and when its context ends. A task
// without arguments has struct{} as In. [TaskFromContext] gives the function the
// task's id, retries and headers. Handle panics where Register or Bind does.
func Handle[In, Out any](w *Worker, name string, fn func(ctx context.Context, in In) (Out, error), options ...TaskOption) {
	w.Register(name, Typed(name, fn), options...)
}

// Typed returns a [Handler] that calls a function with typed arguments, for
// [Worker.Register]. The name is that of the task; error texts contain it.
func Typed[In, Out any](name string, fn func(ctx context.Context, in In) (Out, error)) Handler {
	return &typedHandler[In, Out]{newBinder[In](name), fn}
}

type typedHandler[In, Out any] struct {
	bind *binder[In]
	fn   func(ctx context.Context, in In) (Out, error)
}

func (h *typedHandler[In, Out]) Handle(ctx context.Context, task *Task) (any, error) {
	var in In
	if err := h.bind.into(&in, task.Args, task.Kwargs); err != nil {
		return nil, err
	}
	return h.fn(ctx, in)
}

func (h *typedHandler[In, Out]) positional() []string { return h.bind.positionalNames() }

// positional lists the parameters that the handler takes by position, if it says so.
func (r registration) positional() []string {
	if h, ok := r.handler.(interface{ positional() []string }); ok {
		return h.positional()
	}
	return nil
}

// Tasks lists the registered task names in alphabetical order: after the call of Run also
// celery.backend_cleanup, if the worker has it by itself (see Config.ResultExpires).
func (w *Worker) Tasks() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	names := make([]string, 0, len(w.tasks))
	for name := range w.tasks {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Started returns a channel that is closed when the worker consumes all queues
// for the first time.
func (w *Worker) Started() <-chan struct{} { return w.started }

// StopNow shortens a shutdown: the worker cancels the contexts of running tasks
// with the cause [ErrShutdown], waits for Config.StopTimeout, and requeues the
// messages of those that have not ended by then. Before the end of Run's context
// it starts the shutdown. Further calls do nothing.
func (w *Worker) StopNow() { w.stopNowOnce.Do(func() { close(w.stopNow) }) }

// Revoke makes this worker skip the given tasks if they have not begun: it stores
// REVOKED and acknowledges their messages (docs/celery.md#revokes). Running tasks
// continue. The worker remembers the last 50000 ids.
func (w *Worker) Revoke(taskIDs ...string) {
	for _, id := range taskIDs {
		w.registry.revoke(id)
	}
}

// registration returns that of a task, or the zero one.
func (w *Worker) registration(task string) registration { return w.tasks[task] }

// sender returns what follow-up messages say about their sender.
func (w *Worker) sender() protocol.Sender {
	return protocol.Sender{ReplyTo: w.replyTo, Origin: w.origin, Now: w.cfg.Now(), Prepare: w.prepare}
}

// prepare calls the function that the task was registered with: see [Prepare].
func (w *Worker) prepare(s protocol.Signature, args []json.RawMessage) (prepared protocol.Prepared, err error) {
	r := w.tasks[s.Task]
	if r.prepare == nil {
		return protocol.Prepared{Args: args}, nil
	}
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("preparing a message of task %s panicked: %v", s.Task, p)
		}
	}()
	return r.prepare(s, args)
}

// wrapped returns the registration with today's middleware around its handler.
// Middleware is called when a task runs, so that its panic is the task's failure.
func (w *Worker) wrapped(r registration) registration {
	middleware := slices.Clone(w.middleware)
	build := sync.OnceValue(func() Handler {
		h := r.handler
		for _, wrap := range slices.Backward(middleware) {
			h = wrap(h)
		}
		return h
	})
	r.wrapped = HandlerFunc(func(ctx context.Context, task *Task) (any, error) { return build().Handle(ctx, task) })
	return r
}
