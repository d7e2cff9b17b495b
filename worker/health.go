package worker

import (
	"errors"
	"fmt"
	"time"
)

// errStopping is why a worker that stops does not consume.
var errStopping = errors.New("worker is stopping")

// Health says whether the worker is alive and able to consume: nil, or an
// error that says why not. It does not ask the broker and returns at once; a
// dead connection is noticed by heartbeats within two of their intervals.
//
// Between a lost connection and the next one it is an error, as it is when
// every slot is held by a handler that ignores its hard time limit.
func (w *Worker) Health() error {
	if err := w.Ready(); err != nil {
		return err
	}
	if n := w.abandoned.Load(); n >= int64(w.cfg.Slots) {
		return fmt.Errorf("all %d slots are held by handlers that went on after their hard time limit: restart the worker", n)
	}
	return nil
}

// Ready says whether the worker is connected and every queue has its
// consumer.
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
	case w.link.consuming && !w.link.session.isLost():
		return nil
	case w.link.consuming:
		return fmt.Errorf("not consuming: connection lost: %w", w.link.session.lostErr)
	case w.link.err == errStopping:
		return errStopping
	case w.link.err == nil:
		return errors.New("not consuming: no connection to the broker")
	}
	return fmt.Errorf("not consuming for %v: %w", w.cfg.Now().Sub(w.link.since).Round(time.Second), w.link.err)
}

// Stuck names what should move by itself and has not for so long, or is nil: a
// consumer that could not take a delivery, a message that is neither read, nor
// waits, nor runs, or an outcome that cannot be recorded while broker and
// result backend are away. Handlers may take any time. Less than 3 s count as
// 3 s. It returns at once.
func (w *Worker) Stuck(after time.Duration) error { return w.stalls.Stuck(max(after, 3*beatTime)) }
