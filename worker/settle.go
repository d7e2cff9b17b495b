package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// settle tells everybody how a task ended.
//
//   - success: publish what follows, store SUCCESS, acknowledge. A crash in
//     between repeats it all under the same ids, and loses nothing.
//   - failure: store FAILURE first; if a SUCCESS stands, this was a repeated
//     run and stays without effect. Else mark the later links of the chain,
//     publish the error callbacks, acknowledge
//     (docs/celery.md#publish-store-acknowledge).
//   - retry: publish the retry, store RETRY, acknowledge.
//   - reject without requeue: as a failure, but rejected at the end (Celery
//     5.7; older ones left the task PENDING for ever).
//   - reject with requeue, and ignore: nothing but the broker is told.
//
// A fault of broker or database on the way is tried again, and at last the
// message goes back; it never makes a failure of finished work.
func (w *Worker) settle(e *execution, m *protocol.Message, r registration, o outcome, slot *slot) {
	log := w.taskLog(m)
	v, err := w.concludeSafely(m, r, &o)
	switch {
	case o.kind == outcomeReject && o.reject.Requeue && o.reject.After > 0:
		slot.leave()
		log.Info("task is handed back after a pause", "pause", o.reject.After, "reason", o.reject.Reason)
		w.pause(e, o.reject.After)
	case err != nil:
		w.metrics.handedBack.Inc()
		log.Error("message goes back to the broker: the task's outcome could not be recorded", "outcome", o.kind, "error", err)
		slot.leave()
		w.pause(e, w.handBackPause())
		v = verdictRequeue
	}
	w.metrics.taskEnded(m.Task, o.kind, o.took)
	logOutcome(log, o)
	for _, d := range w.running.end(e, v) {
		d.settle(e.verdictOn(d, v))
	}
}

// rejection is the failure that a task shows which was given up.
func rejection(r Reject) failure {
	var reason any
	if r.Reason != "" {
		reason = r.Reason
	}
	exception := Error{Type: "Reject", Module: "celery.exceptions", Args: []any{reason, false}}.exception()
	return failure{exception: exception, err: r}
}

func logOutcome(log interface {
	Info(string, ...any)
	Warn(string, ...any)
}, o outcome) {
	switch o.kind {
	case outcomeFailure:
		log.Warn("task failed", "duration", o.took, "error", o.failed.err.Error())
	case outcomeRetry:
		log.Info("task is tried again", "duration", o.took, "pause", o.retry.delay(), "error", o.failed.err.Error())
	case outcomeInterrupted:
		log.Warn("task was interrupted by the shutdown and goes back to the broker", "duration", o.took)
	default:
		log.Info("task ended", "outcome", o.kind, "duration", o.took)
	}
}

// pause keeps an execution for a while. What holds its message may change
// meanwhile, as connections come and go.
func (w *Worker) pause(e *execution, d time.Duration) {
	w.running.mu.Lock()
	sub := e.deliveries[0].sub
	w.running.mu.Unlock()
	defer sub.hold()()
	defer e.began.activity.Wait()()
	sleep(w.life.receive, d)
}

// concludeSafely is conclude, with a panic (of a result backend, say) as an
// error: the work is done, so its message must not be lost.
func (w *Worker) concludeSafely(m *protocol.Message, r registration, o *outcome) (v verdict, err error) {
	defer func() {
		if p := recover(); p != nil {
			v, err = verdictRequeue, fmt.Errorf("panic: %v\n%s", p, goStack())
		}
	}()
	return w.conclude(m, r, o)
}

// conclude publishes and stores; it makes a failure of the outcome when no
// message can be made of what follows it.
func (w *Worker) conclude(m *protocol.Message, r registration, o *outcome) (verdict, error) {
	var impossible, err error
	switch o.kind {
	case outcomeSuccess:
		impossible, err = w.succeed(m, r, o.value)
	case outcomeRetry:
		impossible, err = w.retry(m, r, *o)
	}
	if impossible != nil {
		took := o.took
		*o = failureOutcome(impossible)
		o.took = took
	}
	switch o.kind {
	case outcomeFailure:
		return verdictAck, w.fail(m, r, o.failed)
	case outcomeReject:
		if o.reject.Requeue {
			return verdictRequeue, nil
		}
		return verdictReject, w.fail(m, r, rejection(o.reject))
	case outcomeInterrupted:
		return verdictRequeue, nil
	case outcomeIgnore:
		return verdictDrop, nil
	}
	return verdictAck, err
}

// succeed publishes callbacks and the next link, then stores SUCCESS.
// impossible is an error of the message itself.
func (w *Worker) succeed(m *protocol.Message, r registration, value json.RawMessage) (impossible, err error) {
	plan, err := protocol.AfterSuccess(m, value, w.sender())
	if err != nil {
		return err, nil
	}
	messages, err := w.address(plan.FollowUps)
	if err != nil {
		return err, nil
	}
	row := w.row(m, protocol.StateSuccess)
	row.Value, row.Children, row.DateDone = value, plan.Children, w.cfg.Now()
	if err := w.publishAll(m, messages); err != nil {
		return nil, err
	}
	if w.ignoresResult(m, r) {
		return nil, nil
	}
	faultpoint.Hit(faultpoint.ResultBefore, m.ID, m.ArgsRepr)
	_, err = w.store(w.life.settle, row)
	faultpoint.Hit(faultpoint.ResultStored, m.ID, m.ArgsRepr)
	return nil, err
}

func (w *Worker) fail(m *protocol.Message, r registration, f failure) error {
	if !w.ignoresResult(m, r) || w.cfg.StoreErrorsEvenIfIgnored {
		row := w.row(m, protocol.StateFailure)
		row.Exception, row.Traceback, row.DateDone = &f.exception, f.traceback, w.cfg.Now()
		faultpoint.Hit(faultpoint.ResultBefore, m.ID, m.ArgsRepr)
		written, err := w.store(w.life.settle, row)
		if err != nil {
			return err
		}
		faultpoint.Hit(faultpoint.ResultStored, m.ID, m.ArgsRepr)
		if !written[0] {
			w.taskLog(m).Warn("task failed in a repeated run after it had succeeded: the success stands", "error", f.err.Error())
			return nil
		}
		faultpoint.Hit(faultpoint.LaterBefore, m.ID, m.ArgsRepr)
		if _, err := w.store(w.life.settle, laterRows(m, row)...); err != nil {
			return err
		}
		faultpoint.Hit(faultpoint.LaterStored, m.ID, m.ArgsRepr)
	}
	plan, err := protocol.AfterFailure(m, w.sender())
	if err != nil {
		// canFollow has refused such a message: its error is f. It has no
		// error callbacks that anybody could call.
		return nil
	}
	messages, err := w.address(plan.FollowUps)
	if err != nil {
		return nil // as above
	}
	return w.publishAll(m, messages)
}

// laterRows are the links behind a failed one: they will never run, and
// whoever waits for the last must be told (docs/celery.md#after-failure).
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
		})
	}
	return rows
}

func (w *Worker) retry(m *protocol.Message, r registration, o outcome) (impossible, err error) {
	now := w.cfg.Now()
	options := protocol.RetryOptions{Now: now, Queue: o.retry.Queue}
	if delay := o.retry.delay(); delay > 0 {
		options.ETA = now.Add(delay)
	}
	message, err := protocol.RetryMessage(m, options)
	if err != nil {
		return err, nil
	}
	if _, err := amqpPublishing(message); err != nil {
		return err, nil
	}
	delete(message.Headers, headerCopy) // it replaces nothing
	to := outgoing{message: message}
	if message.Exchange == "" {
		if to.way.queue, err = w.routes.queue(message.RoutingKey); err != nil {
			return err, nil
		}
	}
	if err := w.publishAll(m, []outgoing{to}); err != nil {
		return nil, err
	}
	if w.ignoresResult(m, r) {
		return nil, nil
	}
	row := w.row(m, protocol.StateRetry)
	row.Exception, row.Traceback = &o.failed.exception, o.failed.traceback
	_, err = w.store(w.life.settle, row)
	return nil, err
}

// row is the result row of a message, without its outcome.
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
	}
}

// ignoresResult: the message decides; when it says nothing, the task does
// (docs/celery.md#ignored-results, from Celery 5.6 on).
func (w *Worker) ignoresResult(m *protocol.Message, r registration) bool {
	if m.IgnoreResult != nil {
		return *m.IgnoreResult
	}
	return r.ignoreResult
}

// storeStarted is for information only: it is tried once.
func (w *Worker) storeStarted(m *protocol.Message) {
	value, err := protocol.EncodeJSON(struct {
		PID      int    `json:"pid"`
		Hostname string `json:"hostname"`
	}{os.Getpid(), w.cfg.Node})
	if err == nil {
		row := w.row(m, protocol.StateStarted)
		row.Value = value
		err = w.storeOnce(w.life.settle, row)
	}
	if err != nil {
		w.taskLog(m).Warn("state STARTED was not stored", "error", err)
	}
}

// storeTimeout bounds one attempt to store.
const storeTimeout = 30 * time.Second

func (w *Worker) storeOnce(ctx context.Context, row protocol.Result) error {
	if w.cfg.Results == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	_, err := w.cfg.Results.Store(ctx, row)
	return err
}

// store writes results, however often that takes within SettleTimeout. What
// the backend can never take is logged and counts as written.
func (w *Worker) store(ctx context.Context, rows ...protocol.Result) ([]bool, error) {
	written := make([]bool, len(rows))
	for i := range written {
		written[i] = true
	}
	if w.cfg.Results == nil || len(rows) == 0 {
		return written, nil
	}
	err := w.insist(ctx, "store", func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, storeTimeout)
		defer cancel()
		got, err := w.cfg.Results.Store(ctx, rows...)
		switch {
		case IsPermanent(err):
			w.cfg.Logger.Error("result can never be stored", "task_id", rows[0].TaskID, "task", rows[0].Task, "error", err)
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

func (w *Worker) publishAll(m *protocol.Message, messages []outgoing) error {
	for _, o := range messages {
		faultpoint.Hit(faultpoint.PublishBefore, m.ID, m.ArgsRepr)
		if err := w.insist(w.life.settle, "publish", func(ctx context.Context) error { return w.send(ctx, o) }); err != nil {
			return err
		}
		faultpoint.Hit(faultpoint.PublishConfirmed, m.ID, m.ArgsRepr)
	}
	return nil
}

// insist tries until it succeeds, ctx ends, or SettleTimeout is used up. Time
// without a connection does not count: the work is done, and nobody else can
// be told meanwhile. The first failure is logged, and the last returned.
func (w *Worker) insist(ctx context.Context, what string, try func(context.Context) error) error {
	left := w.cfg.SettleTimeout
	for failures := 1; ; failures++ {
		began := time.Now()
		err := try(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		var unsendable *unsendableError
		if errors.As(err, &unsendable) {
			return err
		}
		w.metrics.faults.WithLabelValues(what).Inc()
		if failures == 1 {
			w.cfg.Logger.Warn("task's outcome cannot be recorded yet", "doing", what, "error", err)
		}
		pause := jitter(min(backoff(failures), insistMost))
		if !errors.Is(err, ErrUnreachable) {
			if left -= time.Since(began) + pause; left <= 0 {
				return fmt.Errorf("%s: tried for %v: %w", what, w.cfg.SettleTimeout, err)
			}
		}
		if !sleep(ctx, pause) {
			return fmt.Errorf("%s: %w", what, err)
		}
	}
}
