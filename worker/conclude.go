package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/results"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// conclude records the outcome of a task (it publishes and stores) and then
// settles the task's deliveries (docs/celery.md#publish-store-acknowledge).
//
//   - success: publish the follow-ups, store SUCCESS, acknowledge. A crash in
//     between repeats this with the same ids and loses nothing.
//   - failure: store FAILURE first. If SUCCESS is stored already, this was a
//     repeated run, and nothing more is done. Otherwise store FAILURE for the
//     later tasks of the chain, publish the error callbacks, acknowledge.
//   - failure of a task that was started too often (see MaxStarts): as above, but
//     its message becomes a dead letter.
//   - retry: store RETRY, publish the retry, acknowledge.
//   - replaced: publish the replacement, acknowledge. It stores the result.
//   - reject without requeue: as for a failure, but reject in the end, as Celery
//     does from 5.7 on (before, the task stayed PENDING for ever).
//   - reject with requeue, and ignore: publish and store nothing.
//
// A fault of broker or result backend is retried until RecordTimeout, and then
// the message is requeued. It never turns finished work into a failure, with one
// exception: a follow-up that no queue takes, though the broker answers. The task
// then fails with this reason, and its error callbacks are published.
func (w *Worker) conclude(a *attempt) {
	o := &a.outcome
	s, err := w.recordSafely(a)
	switch {
	case o.kind == outcomeReject && o.reject.Requeue && o.reject.After > 0:
		w.taskLog(a.message).Info("task is requeued after a pause", "pause", o.reject.After, "reason", o.reject.Reason)
		w.pause(a, o.reject.After)
	case err != nil && a.acknowledged:
		w.reportLost(a, err)
	case err != nil:
		w.metrics.handedBack.Inc()
		w.taskLog(a.message).Error("message is requeued: the task's outcome could not be recorded", "outcome", o.kind, "error", err)
		w.pause(a, w.handBackPause())
		s = settlementRequeue
	}
	w.forgetStarts(a)
	if o.kind != outcomeRevoked && o.kind != outcomeExpired {
		w.metrics.taskEnded(a.message.Task, o.kind, o.duration)
		w.logOutcome(a.message, o)
	}
	// A success comes from the delivery's own goroutine, which has nothing left to do.
	a.first.returnsSoon.Store(o.kind == outcomeSuccess)
	a.end(s)
}

// rejection returns the failure that is stored for a task whose handler rejected
// it without requeue.
func rejection(r Reject) failure {
	var reason any
	if r.Reason != "" {
		reason = r.Reason
	}
	exception := Error{Type: "Reject", Module: "celery.exceptions", Args: []any{reason, false}}.exception()
	return failure{exception: exception, err: r, text: r.Error()}
}

func (w *Worker) logOutcome(m *protocol.Message, o *outcome) {
	if o.kind == outcomeSuccess && !w.cfg.Logger.Enabled(context.Background(), slog.LevelInfo) {
		return // the logger of a task is not needed for most
	}
	log := w.taskLog(m)
	switch o.kind {
	case outcomeFailure:
		log.Warn("task failed", "duration", o.duration, "error", o.failed.text)
	case outcomeRetry:
		log.Info("task will be retried", "duration", o.duration, "pause", o.retry.Pause(), "error", o.failed.text)
	case outcomeInterrupted:
		log.Warn("task was interrupted by the shutdown: its message is requeued", "duration", o.duration)
	default:
		log.Info("task ended", "outcome", o.kind, "duration", o.duration)
	}
}

// pause delays an attempt, without a slot, until the pause is over or the worker
// stops. It does not end with a connection: the deliveries of a later one are
// delayed and settled, too.
func (w *Worker) pause(a *attempt, pause time.Duration) {
	a.pause()
	defer a.first.activity.Wait()()
	sleep(w.lifecycle.receive, pause)
}

// handBackPause is the pause before a message is requeued whose outcome could not be
// recorded.
func (w *Worker) handBackPause() time.Duration { return min(w.cfg.RecordTimeout, backoffMax) }

// recordSafely calls record and returns a panic, for example of the result
// backend, as an error: the work is done, so that its message must not be lost.
func (w *Worker) recordSafely(a *attempt) (s settlement, err error) {
	defer func() {
		if p := recover(); p != nil {
			s, err = settlementRequeue, fmt.Errorf("panic: %v\n%s", p, goStack())
		}
	}()
	return w.record(a)
}

// record publishes and stores, and returns how to settle the deliveries. It
// changes the outcome to a failure when a follow-up has no valid message.
func (w *Worker) record(a *attempt) (settlement, error) {
	m, r, o := a.message, a.registration, &a.outcome
	var impossible, err error
	switch o.kind {
	case outcomeSuccess:
		impossible, err = w.recordSuccess(a, o.value)
	case outcomeRetry:
		impossible, err = w.recordRetry(a)
	case outcomeReplaced:
		impossible, err = w.recordReplaced(m, o.replacement)
	case outcomeRevoked, outcomeExpired:
		err = w.recordRevoked(m, r, o.kind)
	}
	if impossible != nil {
		duration := o.duration
		*o = failureOutcome(impossible)
		o.duration = duration
	}
	switch o.kind {
	case outcomeFailure:
		if o.timedOut && r.requeueTimeouts && !r.ackEarly {
			return settlementRequeue, nil
		}
		err := w.recordFailure(a, o.failed)
		if err == nil && o.startedTooOften {
			return w.moveToDeadLetters(a.first, m.ID, o.failed.text)
		}
		return r.settlementOfFailure(), err
	case outcomeReject:
		if o.reject.Requeue {
			return settlementRequeue, nil
		}
		return settlementReject, w.recordFailure(a, rejection(o.reject))
	case outcomeInterrupted:
		return settlementRequeue, nil
	case outcomeIgnore:
		return settlementIgnored, nil
	}
	return settlementAck, err
}

// recordRevoked stores REVOKED for a task that does not run because it is revoked
// or expired. Nothing follows it.
func (w *Worker) recordRevoked(m *protocol.Message, r registration, outcome string) error {
	w.taskLog(m).Info("task does not run", "why", outcome)
	exception := protocol.NewException("celery.exceptions", "TaskRevokedError", outcome)
	row := w.row(m, protocol.StateRevoked)
	row.Exception, row.DateDone = &exception, w.cfg.Now()
	if w.storesErrors(m, r) {
		if _, err := w.store(w.lifecycle.record, row); err != nil {
			return err
		}
	}
	w.metrics.tasks.WithLabelValues(m.Task, outcome).Inc()
	return nil
}

// recordSuccess publishes the callbacks and the next task of the chain, then
// stores SUCCESS. The error impossible means that a follow-up has no valid
// message.
func (w *Worker) recordSuccess(a *attempt, value json.RawMessage) (impossible, err error) {
	m, r := a.message, a.registration
	messages, plan, err := w.afterSuccess(m, value)
	if err != nil {
		return err, nil
	}
	row := w.row(m, protocol.StateSuccess)
	row.Value, row.Children, row.DateDone = value, withChildren(a.task.children(), plan.Children), w.cfg.Now()
	// A callback that no queue takes makes the task fail: then its chain must not go on.
	if err := w.publishAll(m, messages[:plan.Callbacks], messages[plan.Callbacks:]); err != nil {
		return nobodyTakes(err)
	}
	if w.ignoresResult(m, r) {
		return nil, nil
	}
	faultpoint.Hit(faultpoint.ResultBefore, m.ID, m.ArgsRepr)
	_, err = w.store(w.lifecycle.record, row)
	faultpoint.Hit(faultpoint.ResultStored, m.ID, m.ArgsRepr)
	return nil, err
}

func (w *Worker) recordFailure(a *attempt, f failure) error {
	m, r := a.message, a.registration
	if w.storesErrors(m, r) {
		row := w.row(m, protocol.StateFailure)
		row.Exception, row.Traceback, row.DateDone = &f.exception, f.traceback, w.cfg.Now()
		row.Children = withChildren(a.task.children(), nil)
		faultpoint.Hit(faultpoint.ResultBefore, m.ID, m.ArgsRepr)
		written, err := w.store(w.lifecycle.record, row)
		if err != nil {
			return err
		}
		faultpoint.Hit(faultpoint.ResultStored, m.ID, m.ArgsRepr)
		if !written[0] {
			w.taskLog(m).Warn("repeated run of a task failed after an earlier run had succeeded: the stored SUCCESS is kept", "error", f.text)
			return nil
		}
		faultpoint.Hit(faultpoint.LaterBefore, m.ID, m.ArgsRepr)
		if _, err := w.store(w.lifecycle.record, laterRows(m, row)...); err != nil {
			return err
		}
		faultpoint.Hit(faultpoint.LaterStored, m.ID, m.ArgsRepr)
	}
	messages, err := w.afterFailure(m)
	if err != nil {
		// canFollow has refused such a message before, and f is its error. Its
		// error callbacks cannot be published.
		return nil
	}
	return w.publishErrorCallbacks(m, messages)
}

// nobodyTakes splits the error of a publication. It is impossible if no queue has
// taken the message during all of RecordTimeout: then the task fails with this
// reason, rather than that its handler runs again and again. After any other error
// the message is requeued.
func nobodyTakes(err error) (impossible, other error) {
	var tried *triedError
	if errors.As(err, &tried) && errors.Is(err, ErrUnroutable) {
		return err, nil
	}
	return nil, err
}

// laterRows returns failures for the later tasks of a failed task's chain. They
// will never run, and callers that wait for the last one must see the failure
// (docs/celery.md#after-failure).
func laterRows(m *protocol.Message, failed protocol.Result) []protocol.Result {
	var rows []protocol.Result
	for _, step := range protocol.LaterSteps(m) {
		retries := 0
		rows = append(rows, protocol.Result{
			TaskID:     step.TaskID,
			State:      failed.State,
			Exception:  failed.Exception,
			Traceback:  failed.Traceback,
			HasRequest: true,
			Task:       step.Task,
			Args:       step.Args,
			Kwargs:     step.Kwargs,
			Retries:    &retries,
			DateDone:   failed.DateDone,
			ReplyTo:    step.ReplyTo, CorrelationID: step.TaskID,
			RootID: step.RootID, ParentID: step.ParentID, Group: step.Group,
		})
	}
	return rows
}

// recordRetry stores RETRY, and then publishes the retry. In the other order, as in
// Celery, the retry could end in another slot or worker before RETRY is stored: its
// FAILURE would be overwritten, and whoever waits for the task would wait for ever.
func (w *Worker) recordRetry(a *attempt) (impossible, err error) {
	m, r, o := a.message, a.registration, a.outcome
	message, err := o.retry.Message(m, w.cfg.Now())
	if err != nil {
		return err, nil
	}
	if err := w.broker.CheckMessage(message); err != nil {
		return err, nil
	}
	delete(message.Headers, headerCopy) // the retry is no copy of another message
	to := broker.Publication{Message: message}
	if message.Exchange == "" {
		queue, err := w.routes.queue(message.RoutingKey)
		if err != nil {
			return err, nil
		}
		to.Declare = &queue
	}
	if w.storesErrors(m, r) {
		row := w.row(m, protocol.StateRetry)
		row.Exception, row.Traceback = o.failed.stored(), o.failed.traceback
		row.Children = withChildren(append(a.task.children(), ownChild(m)), nil)
		if _, err := w.store(w.lifecycle.record, row); err != nil {
			return nil, err
		}
	}
	return nobodyTakes(w.publishAll(m, []broker.Publication{to}))
}

// row returns the result row of a message, without an outcome.
func (w *Worker) row(m *protocol.Message, state string) protocol.Result {
	retries := m.Retries
	return protocol.Result{
		TaskID:     m.ID,
		State:      state,
		HasRequest: true,
		Task:       m.Task,
		Args:       m.RawArgs,
		Kwargs:     m.RawKwargs,
		Worker:     w.cfg.Node,
		Queue:      m.RoutingKey,
		Retries:    &retries,
		Stamps:     protocol.StampsJSON(m),
		ReplyTo:    m.Properties.ReplyTo, CorrelationID: m.Properties.CorrelationID,
		RootID: m.RootID, ParentID: m.ParentID, Group: m.Group,
	}
}

// ignoresResult reports whether no result is stored. The message's ignore_result
// takes precedence over the task's option, as in Celery from 5.6 on
// (docs/celery.md#ignored-results).
func (w *Worker) ignoresResult(m *protocol.Message, r registration) bool {
	if m.IgnoreResult != nil {
		return *m.IgnoreResult
	}
	return r.ignoreResult
}

// storesErrors reports whether FAILURE, RETRY and REVOKED are stored: store_errors of
// Celery's request and handle_error_state of its tracer (docs/celery.md#ignored-results).
func (w *Worker) storesErrors(m *protocol.Message, r registration) bool {
	return !w.ignoresResult(m, r) || w.cfg.StoreErrorsEvenIfIgnored
}

// storeStarted stores STARTED. It tries once, since this is only information.
func (w *Worker) storeStarted(m *protocol.Message) {
	value, err := protocol.EncodeJSON(struct {
		PID      int    `json:"pid"`
		Hostname string `json:"hostname"`
	}{os.Getpid(), w.cfg.Node})
	if err == nil {
		row := w.row(m, protocol.StateStarted)
		row.Value = value
		err = w.storeOnce(w.lifecycle.record, row)
	}
	if err != nil {
		w.taskLog(m).Warn("state STARTED was not stored", "error", err)
	}
}

// storeTimeout bounds one call of the result backend.
const storeTimeout = 30 * time.Second

// storeOnce stores a state that is only information. A panic of the result
// backend is an error: it must not end the task.
func (w *Worker) storeOnce(ctx context.Context, row protocol.Result) (err error) {
	defer catch(&err)
	if w.cfg.Results == nil {
		return nil
	}
	ctx, cancel := w.stores.Context(ctx, storeTimeout)
	defer cancel()
	_, err = w.cfg.Results.Store(ctx, row)
	return err
}

// store stores results, with retries until RecordTimeout. A result that the
// backend can never store (see results.Permanent) is logged and counts as written.
func (w *Worker) store(ctx context.Context, rows ...protocol.Result) ([]bool, error) {
	written := make([]bool, len(rows))
	for i := range written {
		written[i] = true
	}
	if w.cfg.Results == nil || len(rows) == 0 {
		return written, nil
	}
	err := w.retry(ctx, "store", func(ctx context.Context) error {
		ctx, cancel := w.stores.Context(ctx, storeTimeout)
		defer cancel()
		got, err := w.cfg.Results.Store(ctx, rows...)
		switch {
		case results.IsPermanent(err):
			w.cfg.Logger.Error("result cannot be stored: its task counts as recorded without it", "task_id", rows[0].TaskID, "task", rows[0].Task, "error", err)
			return nil
		case err == nil && len(got) == len(rows):
			written = got
		case err == nil:
			return fmt.Errorf("result backend answered for %d of %d results", len(got), len(rows))
		}
		return err
	})
	return written, err
}

// triedError is the last error of a call that was tried for all of RecordTimeout.
type triedError struct {
	what string
	time time.Duration
	err  error
}

func (e *triedError) Error() string {
	return fmt.Sprintf("%s: tried for %v: %v", e.what, e.time, e.err)
}
func (e *triedError) Unwrap() error { return e.err }

// retry calls try until it succeeds, ctx ends, or RecordTimeout is used up. Time
// without a connection does not count, since the message could not be requeued
// either, and for a publication neither does time in which the broker accepts no
// messages. retry logs the first failure and returns the last.
func (w *Worker) retry(ctx context.Context, what string, try func(context.Context) error) error {
	elapsed := w.link.usable.elapsed
	if what == "publish" {
		elapsed = w.publishing.accepting
	}
	began := elapsed()
	for failures := 1; ; failures++ {
		err := try(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		var unsendable *broker.UnsendableError
		if errors.As(err, &unsendable) {
			return err
		}
		w.metrics.faults.WithLabelValues(what).Inc()
		if failures == 1 {
			w.cfg.Logger.Warn("task's outcome cannot be recorded yet: retrying", "doing", what, "error", err)
		}
		pause := jitter(min(backoff(failures), retryPauseMax))
		if elapsed()-began+pause >= w.cfg.RecordTimeout {
			return &triedError{what, w.cfg.RecordTimeout, err}
		}
		if !sleep(ctx, pause) {
			return fmt.Errorf("%s: %w", what, err)
		}
	}
}
