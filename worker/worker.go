package worker

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Worker consumes task messages and runs their handlers.
//
//   - Register, Handle and Use are called before Run; nothing else is.
//   - Run is called once. No goroutine exists before it, and none after it
//     but those of handlers that ignore the end of their context.
//   - Health, Ready, Stuck, Revoke, Started, StopNow, Unacked, Publish, QueueDepth and QueueConsumers
//     may be called at any time by any goroutine.
type Worker struct {
	cfg      Config
	registry map[string]registration
	wrap     []Middleware
	routes   router
	metrics  *workerMetrics

	// replyTo and origin are this worker's own marks on messages that it
	// publishes (docs/celery.md#applying-a-signature).
	replyTo string
	origin  string

	started     chan struct{}
	stopNow     chan struct{}
	stopNowOnce sync.Once

	running   attachments
	inHand    messageSet
	stalls    stall.Detector
	revoked   *idSet
	link      link
	slots     chan struct{} // one element for each slot that is taken
	abandoned atomic.Int64  // handlers that keep a slot after their time
	life      life          // begun by Run
	sessions  atomic.Int64  // how many have consumed
	quiet     chan struct{} // closed when nothing is received any more

	mu     sync.Mutex
	frozen bool // written by Run: no registration any more
}

// New makes a worker. It does not touch the network. The error names every
// field of the configuration that cannot be worked with.
func New(cfg Config) (*Worker, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.WithDefaults()
	metrics, err := newMetrics(cfg.Metrics)
	if err != nil {
		return nil, err
	}
	return &Worker{
		cfg:      cfg,
		registry: map[string]registration{},
		routes:   newRouter(cfg),
		metrics:  metrics,
		replyTo:  newID(),
		origin:   fmt.Sprintf("gen%d@%s", os.Getpid(), hostname()),
		started:  make(chan struct{}),
		stopNow:  make(chan struct{}),
		running:  newAttachments(recentOutcomes),
		inHand:   messageSet{messages: map[*protocol.Message]struct{}{}},
		revoked:  newIDSet(rememberedRevocations),
		slots:    make(chan struct{}, cfg.Slots),
		quiet:    make(chan struct{}),
	}, nil
}

// Register sets the handler of a task name. It panics when the name is empty
// or taken, or when Run has been called: these are mistakes of the program.
func (w *Worker) Register(name string, handler Handler, options ...TaskOption) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.frozen {
		panic(fmt.Sprintf("worker: task %q registered after Run", name))
	}
	if _, taken := w.registry[name]; taken || name == "" || handler == nil {
		panic(fmt.Sprintf("worker: task %q cannot be registered: a name must be given once, with a handler", name))
	}
	r := registration{handler: handler}
	for _, option := range options {
		option(&r)
	}
	w.registry[name] = r
}

// Use wraps every handler, also those registered later. The first middleware
// given is the outermost.
func (w *Worker) Use(middleware ...Middleware) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.frozen {
		panic("worker: middleware added after Run")
	}
	w.wrap = append(w.wrap, middleware...)
}

// Handle registers a function that takes the task's arguments as the fields
// of In and returns the result. See [Bind] for how arguments become fields.
func Handle[In, Out any](w *Worker, name string, fn func(ctx context.Context, in In) (Out, error), options ...TaskOption) {
	w.Register(name, Typed(name, fn), options...)
}

// Typed makes a Handler of a function with typed arguments. The name is used
// in the text of argument errors.
func Typed[In, Out any](name string, fn func(ctx context.Context, in In) (Out, error)) Handler {
	bind := newBinder[In](name)
	return HandlerFunc(func(ctx context.Context, task *Task) (any, error) {
		var in In
		if err := bind.into(&in, task.Args, task.Kwargs); err != nil {
			return nil, err
		}
		return fn(ctx, in)
	})
}

// Tasks lists the registered names in order.
func (w *Worker) Tasks() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	names := make([]string, 0, len(w.registry))
	for name := range w.registry {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Started is closed when the worker consumes for the first time.
func (w *Worker) Started() <-chan struct{} { return w.started }

// StopNow ends a shutdown sooner: running tasks get their context cancelled
// with [ErrShutdown], have Config.StopTimeout to return, and what has not
// ended by then goes back to the broker. Before the end of Run's context it
// also starts the shutdown.
func (w *Worker) StopNow() { w.stopNowOnce.Do(func() { close(w.stopNow) }) }

// Revoke makes this worker refuse tasks that have not begun: they are stored
// as REVOKED and acknowledged (docs/celery.md#revokes). The last 50000 ids are
// kept.
func (w *Worker) Revoke(taskIDs ...string) {
	for _, id := range taskIDs {
		w.revoked.add(id)
	}
}

// sender is this worker as the author of follow-ups.
func (w *Worker) sender() protocol.Sender {
	return protocol.Sender{ReplyTo: w.replyTo, Origin: w.origin, Now: w.cfg.Now()}
}

func (w *Worker) handlerOf(r registration) Handler {
	h := r.handler
	for _, middleware := range slices.Backward(w.wrap) {
		h = middleware(h)
	}
	return h
}
