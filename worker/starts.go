package worker

import (
	"context"
	"fmt"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/results"
)

// MaxStarts ends a task that kills its worker again and again, which a broker would
// deliver for ever. The worker counts each start in the result backend before it calls the
// handler, and forgets it when the attempt has ended. After n starts without an end the
// task fails with the class WorkerLostError: FAILURE is stored for it and for the later
// steps of its chain, its error callbacks are published, and its message goes to
// Config.DeadLetterQueue or, without one, is rejected to the queue's dead-letter exchange.
//
//   - It needs a result backend that counts, a [results.StartCounter], such as that of
//     package results/postgres with StartsTable. Without one Run returns an error.
//   - A retry and a replacement begin at zero. A shutdown, a [Reject] with Requeue and an
//     outcome that cannot be recorded are ends. A [RequeueTimeouts] is none.
//   - A worker that is cut off from the broker while it runs the task counts as one that
//     has died, as soon as another one receives the message.
//   - While the backend cannot be reached, the task does not start.
//
// MaxStarts panics if n is less than 1. Without it there is no limit. Celery limits lost
// child processes by max_retries (retry_on_worker_lost, from 5.7 on), but not lost workers.
func MaxStarts(n int) TaskOption {
	if n < 1 {
		panic(fmt.Sprintf("worker: MaxStarts(%d): want at least 1", n))
	}
	return func(r *registration) { r.maxStarts = n }
}

// checkStartCounter returns an error if a task has MaxStarts and nothing counts.
func (w *Worker) checkStartCounter() error {
	for name, r := range w.tasks {
		if r.maxStarts == 0 {
			continue
		}
		counter, ok := w.cfg.Results.(results.StartCounter)
		if !ok {
			return fmt.Errorf("worker: task %q has MaxStarts, which Config.Results cannot count: use a results.StartCounter, such as results/postgres with StartsTable", name)
		}
		if err := counter.CountsStarts(); err != nil {
			return fmt.Errorf("worker: task %q has MaxStarts: %w", name, err)
		}
	}
	return nil
}

// startOf identifies an attempt.
func (w *Worker) startOf(m *protocol.Message) results.Start {
	return results.Start{TaskID: m.ID, Attempt: fmt.Sprintf("%d.%d", m.Retries, m.ReplacedTaskNesting), Worker: w.cfg.Node}
}

// countStart counts the start of an attempt's task. It returns false with the outcome if
// the task must not start.
func (w *Worker) countStart(a *attempt) (o outcome, start bool) {
	most := a.registration.maxStarts
	if most == 0 {
		return outcome{}, true
	}
	begins := w.startOf(a.message)
	begins.At = time.Now()
	var starts int
	err := w.retry(w.lifecycle.record, "store", func(ctx context.Context) (err error) {
		defer catch(&err)
		ctx, cancel := w.stores.Context(ctx, storeTimeout)
		defer cancel()
		starts, err = w.cfg.Results.(results.StartCounter).CountStart(ctx, begins)
		if results.IsPermanent(err) {
			// Its row could not be stored either.
			w.taskLog(a.message).Error("starts of the task are not counted", "error", err)
			return nil
		}
		return err
	})
	switch {
	case err != nil:
		reason := fmt.Sprintf("its start cannot be counted: %v", err)
		return outcome{kind: outcomeReject, reject: Reject{Requeue: true, After: w.handBackPause(), Reason: reason}}, false
	case starts > most:
		o := failureOutcome(&Error{Type: "WorkerLostError", Module: "billiard.exceptions",
			Args: []any{fmt.Sprintf("Worker exited prematurely: the task was started %d times, and no worker lived to its end.", most)}})
		o.startedTooOften = true
		return o, false
	}
	a.counted = true
	return outcome{}, true
}

// forgetStarts forgets the starts of an attempt that has ended. If that fails, the starts
// count when the same message is delivered once more.
func (w *Worker) forgetStarts(a *attempt) {
	ended := a.counted && !(a.outcome.timedOut && a.registration.requeueTimeouts)
	if !ended && !a.outcome.startedTooOften {
		return
	}
	err := func() (err error) {
		defer catch(&err)
		ctx, cancel := w.stores.Context(w.lifecycle.record, storeTimeout)
		defer cancel()
		return w.cfg.Results.(results.StartCounter).ForgetStarts(ctx, w.startOf(a.message))
	}()
	if err != nil {
		w.taskLog(a.message).Warn("starts of a task that has ended are not forgotten", "error", err)
	}
}
