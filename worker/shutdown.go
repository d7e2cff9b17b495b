package worker

import (
	"context"
	"errors"
	"sync"
	"time"
)

// lifecycle has the contexts of the phases of Run. They end in this order.
type lifecycle struct {
	// base has the values of Run's context, and does not end.
	base context.Context
	// receive ends when the worker starts no more tasks.
	receive context.Context
	// work ends when running handlers must return; its cause is ErrShutdown.
	work context.Context
	// giveUp ends when the worker waits for running handlers no longer.
	giveUp context.Context
	// record ends when the worker stops trying to record outcomes.
	record context.Context

	endReceive, endGiveUp, endRecord context.CancelFunc
	endWork                          context.CancelCauseFunc
}

func (l *lifecycle) begin(parent context.Context) {
	// The phases inherit the values of parent, but not its end.
	l.base = context.WithoutCancel(parent)
	l.receive, l.endReceive = context.WithCancel(l.base)
	l.work, l.endWork = context.WithCancelCause(l.base)
	l.giveUp, l.endGiveUp = context.WithCancel(l.base)
	l.record, l.endRecord = context.WithCancel(l.base)
}

func (l *lifecycle) end() {
	l.endReceive()
	l.endWork(ErrShutdown)
	l.endGiveUp()
	l.endRecord()
}

// Run connects, declares the queues, consumes them and runs tasks. When the
// connection is lost, it reconnects without limit. When ctx ends or StopNow is
// called, it shuts down:
//
//  1. The worker cancels its consumers and requeues the messages whose tasks do
//     not run yet, delayed ones included.
//  2. Running tasks continue, and their outcomes are recorded, until all have
//     ended, ShutdownTimeout is over, or StopNow is called.
//  3. The worker cancels the contexts of the tasks that still run, with the
//     cause ErrShutdown. They have StopTimeout to return. The messages of those
//     that return an error, or do not return, are requeued.
//  4. The worker calls Config.BeforeStopped and closes the connection.
//
// Run returns nil after a shutdown. It returns an error only if it could not
// begin to consume: compare with ErrUnreachable, ErrCredentials, ErrVhost,
// ErrMismatch and ErrPermission. It is an error, too, if no task is registered,
// or if Run was called before.
func (w *Worker) Run(ctx context.Context) error {
	if err := w.freeze(); err != nil {
		return err
	}
	w.lifecycle.begin(ctx)
	defer w.lifecycle.end()
	context.AfterFunc(w.lifecycle.giveUp, w.giveUpHandlers)
	defer close(w.ended)

	// ctx ends the attempts to make the first connection. Later connections
	// outlive it, because outcomes still have to be recorded.
	starting, cancel := context.WithCancel(ctx)
	defer cancel()
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		select {
		case <-w.stopNow:
			cancel()
		case <-starting.Done():
		}
	}()
	first, err := w.start(starting)
	if err != nil {
		cancel()
		<-stopped
		// Deliveries of one queue may have arrived before another queue failed.
		w.registry.close()
		w.lifecycle.end()
		w.registry.handlers.Wait()
		if ctx.Err() != nil || w.stopping() {
			return nil
		}
		return err
	}

	var connections sync.WaitGroup
	connections.Go(func() { w.keepConnected(first) })
	connections.Go(w.keepPublishing)
	select {
	case <-ctx.Done():
	case <-w.stopNow:
	}
	w.drain()
	w.lifecycle.endRecord()
	connections.Wait()
	cancel()
	<-stopped
	return nil
}

func (w *Worker) freeze() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.frozen {
		return errors.New("worker: Run was called twice; make a new worker")
	}
	if len(w.tasks) == 0 {
		return errors.New("worker: no task is registered")
	}
	if err := w.checkStartCounter(); err != nil {
		return err
	}
	w.addCleanup()
	w.frozen = true
	return nil
}

func (w *Worker) stopping() bool {
	select {
	case <-w.stopNow:
		return true
	default:
		return false
	}
}

// receivingTimeout is how long a shutdown waits until nothing is received any more: a
// broker that does not answer by then counts as lost.
const receivingTimeout = 30 * time.Second

// drain shuts down in the order that Run documents.
func (w *Worker) drain() {
	timeout := max(w.cfg.ShutdownTimeout, 0)
	w.cfg.Logger.Info("worker is stopping: it starts no more tasks and waits for running ones", "tasks", w.registry.attempts(), "at_most", timeout)
	limit := time.Now().Add(timeout + w.cfg.StopTimeout)
	w.registry.drain()
	w.lifecycle.endReceive()
	// Messages are requeued when the consumers are cancelled, so that the broker does
	// not deliver them to this worker again.
	if !waitFor(w.receivingEnded, receivingTimeout, w.stopNow) && w.stopping() {
		waitFor(w.receivingEnded, w.cfg.StopTimeout/10, nil)
	}
	w.registry.close()

	idle := make(chan struct{})
	go func() {
		w.registry.handlers.Wait()
		close(idle)
	}()
	if !waitFor(idle, timeout, w.stopNow) {
		if n := w.registry.attempts(); n > 0 {
			w.cfg.Logger.Warn("worker is stopping now: running tasks are cancelled", "tasks", n, "at_most", w.cfg.StopTimeout)
		}
		limit = time.Now().Add(w.cfg.StopTimeout)
		w.lifecycle.endWork(ErrShutdown)
		// The last tenth is for recording the outcomes of handlers that return
		// just in time.
		if !waitFor(idle, w.cfg.StopTimeout*9/10, nil) {
			w.lifecycle.endGiveUp()
			if !waitFor(idle, w.cfg.StopTimeout/10, nil) {
				w.lifecycle.endRecord()
				<-idle
			}
		}
	}
	if n := w.registry.handlersGivenUp(); n > 0 {
		w.cfg.Logger.Error("handlers ignore the end of their context: the worker stops without them", "handlers", n)
	}
	w.cfg.Logger.Info("worker has stopped", w.beforeStopped(limit)...)
}

const (
	// beforeStoppedMax and beforeStoppedMin bound the time for BeforeStopped.
	// beforeStoppedHurried is what StopNow leaves of it.
	beforeStoppedMax     = 10 * time.Second
	beforeStoppedMin     = 500 * time.Millisecond
	beforeStoppedHurried = time.Second
)

// beforeStopped calls Config.BeforeStopped with a context that ends at limit,
// within the bounds above.
func (w *Worker) beforeStopped(limit time.Time) []any {
	if w.cfg.BeforeStopped == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(w.lifecycle.base, min(max(time.Until(limit), beforeStoppedMin), beforeStoppedMax))
	var watcher sync.WaitGroup
	defer watcher.Wait()
	defer cancel()
	if !w.stopping() {
		// StopNow during BeforeStopped shortens its time. An earlier StopNow is
		// included in limit.
		watcher.Go(func() {
			select {
			case <-w.stopNow:
				if sleep(ctx, beforeStoppedHurried) {
					cancel()
				}
			case <-ctx.Done():
			}
		})
	}
	return w.cfg.BeforeStopped(ctx)
}

// waitFor waits for done, at most for limit or until sooner is closed. It reports
// whether done is closed.
func waitFor(done <-chan struct{}, limit time.Duration, sooner <-chan struct{}) bool {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-timer.C:
	case <-sooner:
	}
	select {
	case <-done:
		return true
	default:
		return false
	}
}
