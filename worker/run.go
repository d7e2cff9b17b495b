package worker

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// execute runs the task of an attempt in its slot, records the outcome and settles
// the deliveries. A panic of this package rejects them, since the message probably
// causes it again.
func (w *Worker) execute(a *attempt) {
	defer func() {
		if !a.first.left {
			a.releaseSlot()
		}
	}()
	defer w.rejectAfterPanic(a)
	m, err := a.begin()
	if err != nil {
		faultpoint.Hit(faultpoint.DeliveryDropped, a.first.wire.Properties.CorrelationID)
		a.end(settlementRequeue)
		return
	}
	a.registration = w.tasks[m.Task]
	a.task = w.newTask(m, a.first.sub.queue.Name)
	a.task.Delivery = a.first.wire
	faultpoint.Hit(faultpoint.SlotTaken, m.ID, m.ArgsRepr)
	if why := w.mayNotRun(m); why != "" {
		a.outcome = outcome{kind: why}
	} else if o, start := w.countStart(a); !start {
		a.outcome = o
	} else {
		if a.registration.ackEarly {
			a.acknowledge()
		}
		faultpoint.Hit(faultpoint.TaskStarting, m.ID, m.ArgsRepr)
		o, mine := w.run(a)
		if !mine {
			return
		}
		a.outcome = o
	}
	w.finish(a)
}

// finish records the outcome of an attempt and settles its deliveries.
func (w *Worker) finish(a *attempt) {
	if !a.began.IsZero() {
		a.first.activity.EndWait()
		a.endUpdates()
		a.outcome.duration = w.cfg.Now().Sub(a.began)
		faultpoint.Hit(faultpoint.TaskReturned, a.message.ID, a.message.ArgsRepr)
		if a.registration.ackEarly {
			a.outcome = finalOutcome(a.outcome)
		}
	}
	a.first.activity.Progress("recording the outcome of its task")
	w.conclude(a)
	w.reportFailure(w.lifecycle.record, a.task, a.outcome)
}

// rejectAfterPanic is deferred.
func (w *Worker) rejectAfterPanic(a *attempt) {
	if p := recover(); p != nil {
		a.end(settlementReject)
		w.reportPanic(p)
	}
}

// newTask returns what a handler receives, without what needs a broker.
func (w *Worker) newTask(m *protocol.Message, queue string) *Task {
	return &Task{Message: m, Node: w.cfg.Node, Queue: queue, logger: w.taskLogger, sendOptions: w.registration}
}

// mayNotRun returns why a task does not run: it is revoked or expired
// (docs/celery.md#receipt-and-start). It returns "" for any other task.
func (w *Worker) mayNotRun(m *protocol.Message) (outcome string) {
	switch {
	case w.registry.isRevoked(m.ID):
		return outcomeRevoked
	case m.Expires != nil && !w.cfg.Now().Before(*m.Expires):
		return outcomeExpired
	}
	return ""
}

// run runs a task's handler and returns the outcome. It returns false if another
// goroutine goes on with the attempt.
func (w *Worker) run(a *attempt) (o outcome, mine bool) {
	m, r, d := a.message, a.registration, a.first
	if err := w.canFollow(m); err != nil {
		return failureOutcome(err), true
	}
	ignored := w.ignoresResult(m, r)
	if w.cfg.TrackStarted && !ignored {
		w.storeStarted(m)
	}
	task := a.task
	task.stillUnacked = func(ctx context.Context) error { return w.stillUnacked(ctx, a) }
	task.otherConsumers = func(ctx context.Context) (int, error) { return w.otherConsumers(ctx, d.sub.queue.Name) }
	if !ignored {
		task.update = func(ctx context.Context, state string, meta json.RawMessage) error {
			a.updating.Lock()
			defer a.updating.Unlock()
			if a.ended.Load() {
				return fmt.Errorf("task %s has ended: its state cannot become %s", m.ID, state)
			}
			row := w.row(m, state)
			row.Value, row.Children = meta, withChildren(task.children(), nil)
			return w.storeOnce(ctx, row)
		}
	}
	a.began = w.cfg.Now()
	// A handler may take any time: it does not count as stuck.
	d.activity.BeginWait()
	if w.timeLimit(m, r).Hard <= 0 {
		return w.callInPlace(a)
	}
	o = runHandler(w.lifecycle.work, task, r, w.timeLimit(m, r), w.cfg.HardLimitGrace, w.lifecycle.giveUp.Done(), a.giveUp)
	a.ended.Store(true)
	return o, true
}

// Outcome is how a task ended, the result of [Worker.RunTask].
type Outcome struct {
	// State is SUCCESS, FAILURE or RETRY, or "" when the handler returned Reject,
	// Ignore or Replace.
	State string
	// Value is the result of a success as JSON.
	Value json.RawMessage
	// Exception and Traceback describe a failure, or the reason of a retry.
	Exception *protocol.Exception
	Traceback string
	// Err is the error that the handler returned, if any.
	Err error
	// Retry and Reject are set when the handler returned them, and Retry also when the
	// task's [RetryPolicy] retries it.
	Retry  *Retry
	Reject *Reject
	// Replacement is the signature of [Replace], or nil.
	Replacement *protocol.Signature
	// Children are the entries of what the handler has sent: see [Task.AddChild].
	Children []json.RawMessage
}

// RunTask runs the handler of a message, with middleware and time limits, and
// returns the outcome. It publishes, stores and acknowledges nothing. It is for
// tests, and needs no Run. The error says that the task is not registered.
func (w *Worker) RunTask(ctx context.Context, m *protocol.Message) (Outcome, error) {
	r, known := w.tasks[m.Task]
	if !known {
		return Outcome{}, fmt.Errorf("task %q is not registered", m.Task)
	}
	task := w.newTask(m, m.RoutingKey)
	o := runHandler(ctx, task, r, w.timeLimit(m, r), w.cfg.HardLimitGrace, nil, func(<-chan outcome) {})
	result := Outcome{Value: o.value, Err: o.failed.err, Children: task.children()}
	switch o.kind {
	case outcomeSuccess:
		result.State = protocol.StateSuccess
	case outcomeIgnore:
		result.Err = Ignore
	case outcomeReject:
		result.Reject, result.Err = &o.reject, o.reject
	case outcomeRetry:
		result.State, result.Retry = protocol.StateRetry, &o.retry
	case outcomeFailure:
		result.State = protocol.StateFailure
	case outcomeInterrupted:
		result.Err = ErrShutdown
	case outcomeReplaced:
		result.Replacement = &o.replacement
	}
	if result.State == protocol.StateFailure || result.State == protocol.StateRetry {
		result.Exception, result.Traceback = o.failed.stored(), o.failed.traceback
	}
	w.reportFailure(ctx, task, o)
	return result, nil
}

// timeLimit returns the hard and the soft limit. Each is the message's own, or
// else the task's, or else the worker's (docs/celery.md#time-limits).
func (w *Worker) timeLimit(m *protocol.Message, r registration) protocol.TimeLimit {
	limit := m.TimeLimit
	for _, other := range []protocol.TimeLimit{r.timeLimit, w.cfg.TimeLimit} {
		if limit.Hard == 0 {
			limit.Hard = other.Hard
		}
		if limit.Soft == 0 {
			limit.Soft = other.Soft
		}
	}
	return limit
}

// handlerCall is one call of a handler.
type handlerCall struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	task   *Task
	r      registration
}

// newCall prepares a call. The context of the handler ends with its limits, and at the
// latest when end is called.
func newCall(work context.Context, task *Task, r registration, limit protocol.TimeLimit) (c handlerCall, end func()) {
	stoppable, cancel := context.WithCancelCause(ContextWithTask(work, task))
	ctx, endLimit := limited(stoppable, limit)
	return handlerCall{ctx, cancel, task, r}, func() {
		endLimit()
		cancel(nil)
	}
}

// runHandler calls the handler with its time limits. The handler runs in a
// goroutine of its own, so that one that ignores its context does not block the
// worker. When giveUp closes, or grace after the hard limit, runHandler returns
// without the handler; releaseAfter then frees the slot once the handler returns.
//
// The grace exists because error callbacks may depend on what the handler does
// before it returns: a rollback, for example, needs the failure of its step to
// be recorded.
func runHandler(work context.Context, task *Task, r registration, limit protocol.TimeLimit, grace time.Duration, giveUp <-chan struct{}, releaseAfter func(<-chan outcome)) outcome {
	call, end := newCall(work, task, r, limit)
	defer end()
	var hard, late <-chan time.Time
	if limit.Hard > 0 {
		timer := time.NewTimer(limit.Hard)
		defer timer.Stop()
		hard = timer.C
	}
	done := make(chan outcome, 1)
	go func() { done <- call.run(func(o outcome) { done <- o }) }()
	for {
		select {
		case o := <-done:
			if (late != nil || context.Cause(call.ctx) == ErrTimeLimit) && (o.kind == outcomeFailure || o.kind == outcomeRetry) {
				return hardLimitOutcome(limit.Hard)
			}
			return o
		case <-hard:
			hard = nil
			call.cancel(ErrTimeLimit)
			timer := time.NewTimer(grace)
			defer timer.Stop()
			late = timer.C
		case <-late:
			releaseAfter(done)
			return hardLimitOutcome(limit.Hard)
		case <-giveUp:
			releaseAfter(done)
			return outcome{kind: outcomeInterrupted}
		}
	}
}

// run calls the handler and converts what it returned. Both call the program's code,
// also methods such as Error and MarshalJSON of what was returned, and functions of a
// [RetryPolicy]. So both are under the task's time limits, and a panic in either is the
// task's failure. If the handler ends its goroutine, run does not return, but calls
// exiting.
func (c *handlerCall) run(exiting func(outcome)) (o outcome) {
	finished, exits := false, false
	var value any
	var err error
	returned := false
	defer func() {
		if exits {
			exiting(o)
		}
	}()
	defer func() {
		if finished {
			return
		}
		exits = true // for what is called here, too
		panicked := &panicError{value: recover(), frames: panicFrames()}
		if returned {
			panicked.of = fmt.Sprintf("%T", value)
			if err != nil {
				panicked.of = fmt.Sprintf("%T", err)
			}
		}
		o = failureOutcome(panicked)
		if !returned {
			func() {
				// This calls the program's functions: if they panic, o stays.
				defer func() { _ = recover() }()
				o = outcomeOf(c.ctx, nil, panicked, c.task.Message, c.r)
			}()
		}
		exits = panicked.value == nil
	}()
	value, err = c.r.wrapped.Handle(c.ctx, c.task)
	returned = true
	o = outcomeOf(c.ctx, value, err, c.task.Message, c.r)
	finished = true
	return o
}
