package worker

import (
	"errors"
	"fmt"
	"time"
)

// errStopping is the reason of Ready when the worker is shutting down.
var errStopping = errors.New("worker is stopping")

// Health returns nil if the worker is ready to run tasks, or else the reason why
// it is not. Besides what [Worker.Ready] checks, it is an error when every slot
// is occupied by a handler that ignores its hard time limit: only a restart
// helps then. Health does not ask the broker and returns at once. It is for a
// health check.
func (w *Worker) Health() error {
	if err := w.Ready(); err != nil {
		return err
	}
	if n := w.registry.handlersGivenUp(); n >= w.cfg.Slots {
		return fmt.Errorf("all %d slots are occupied by handlers that ignore their hard time limit: restart the worker", n)
	}
	return nil
}

// Ready returns nil if the worker is connected and consumes every queue, or else
// the reason why it is not. It does not ask the broker and returns at once; the
// heartbeats notice a dead connection (see Config.Heartbeat). It is for a readiness
// probe.
func (w *Worker) Ready() error {
	select {
	case <-w.started:
	default:
		w.link.mu.Lock()
		defer w.link.mu.Unlock()
		if w.link.err != nil {
			return fmt.Errorf("worker has not started: %w", w.link.err)
		}
		return errors.New("worker has not started")
	}
	w.link.mu.Lock()
	defer w.link.mu.Unlock()
	switch {
	case w.link.hasConsumers && !isLost(w.link.current):
		return nil
	case w.link.hasConsumers:
		return fmt.Errorf("not consuming: connection lost: %w", w.link.current.Err())
	case w.link.err == errStopping:
		return errStopping
	case w.link.err == nil:
		return errors.New("not consuming: no connection to the broker")
	}
	return fmt.Errorf("not consuming for %v: %w", w.cfg.Now().Sub(w.link.since).Round(time.Second), w.link.err)
}

const stuckMin = 3 * time.Second

// Stuck returns an error that names each part of the worker that has made no
// progress for the given time, or nil. Such a part is a consumer that cannot
// accept a delivery, a message whose processing does not continue, or an outcome
// that the worker cannot record because broker or result backend is
// unavailable. Running handlers and delayed messages never count as stuck.
// Durations below 3 s count as 3 s. Stuck returns at once. It is for a liveness probe
// that restarts a process which cannot help itself.
func (w *Worker) Stuck(after time.Duration) error {
	return w.stalls.Stuck(max(after, stuckMin))
}
