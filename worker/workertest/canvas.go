package workertest

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/client"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// Canvas is what [Run] has done.
type Canvas struct {
	// Result is what a client that has sent the signature reads.
	*client.Result
	// Results has the stored results of all tasks, and their history.
	Results *Results
	// Sent are the messages in the order in which they were sent.
	Sent []protocol.Publishing
	// Elsewhere are those of tasks that the worker has not registered. They were
	// not run: their results stay PENDING.
	Elsewhere []protocol.Publishing
}

// mostMessages ends a canvas that retries or calls itself for ever.
const mostMessages = 10000

// Run sends a signature and runs all that follows from it, without a broker, one task
// after the other: chains, groups, callbacks, error callbacks, retries and replacements.
// It returns when nothing is left to run. The results are stored as a worker stores them, so that
// Get, State and Children of the canvas return what they would for a client.
//
//   - Pauses, ETA, countdown and expiry are skipped: every message runs at once.
//   - Of the options of a task, those for its messages have no effect, which are Prepare,
//     SendTo and ExpireAfter, nor have those for a broker: RateLimit, MaxStarts, and the
//     options of acknowledgement. The results of tasks with IgnoreResult are stored, too.
//     To test with these options, [Start] the worker, for instance with the broker of
//     package worker/broker/memory.
//   - A handler that sends tasks with a client of its own sends them to a broker: give
//     the handler its client by an interface, and test with another one.
//
// The error says that a message cannot be made or read, that a task asks to be requeued,
// or that it does not end.
func Run(ctx context.Context, w *worker.Worker, s client.Signature, options ...client.Option) (*Canvas, error) {
	c := &Canvas{Results: &Results{}}
	sender, err := client.New(client.Config{Broker: "amqp://localhost", DefaultQueue: "workertest", Results: c.Results})
	if err != nil {
		return nil, err
	}
	messages, result, err := sender.Messages(ctx, s, options...)
	if err != nil {
		return nil, err
	}
	c.Result = result
	r := canvasRun{canvas: c, worker: w, left: messages, registered: map[string]bool{}}
	for _, name := range w.Tasks() {
		r.registered[name] = true
	}
	for len(r.left) > 0 {
		if len(c.Sent) >= mostMessages {
			return c, fmt.Errorf("workertest: the canvas has not ended after %d messages", mostMessages)
		}
		next := r.left[0]
		r.left = r.left[1:]
		c.Sent = append(c.Sent, next)
		if !r.registered[next.Task] {
			c.Elsewhere = append(c.Elsewhere, next)
			continue
		}
		if err := r.run(ctx, next); err != nil {
			return c, err
		}
	}
	return c, nil
}

type canvasRun struct {
	canvas     *Canvas
	worker     *worker.Worker
	left       []protocol.Publishing
	registered map[string]bool
}

// sender is that of follow-ups.
func canvasSender() protocol.Sender {
	return protocol.Sender{ReplyTo: "workertest", Origin: "gen1@workertest", Now: time.Now()}
}

// run runs the task of one message, as a worker does: follow-ups first, then the
// result.
func (r *canvasRun) run(ctx context.Context, message protocol.Publishing) error {
	m, err := Decoded(message)
	if err != nil {
		return err
	}
	var outcome worker.Outcome
	if err := protocol.CheckCanvas(m); err != nil {
		outcome = failedWith(canvasException(err))
	} else if outcome, err = r.worker.RunTask(ctx, m); err != nil {
		return err
	}
	row := resultRow(m)
	switch {
	case outcome.Reject != nil && outcome.Reject.Requeue:
		return fmt.Errorf("workertest: task %s (id %s) asks to be requeued: %w", m.Task, m.ID, outcome.Err)
	case outcome.Reject != nil:
		reason := json.RawMessage("null")
		if text := outcome.Reject.Reason; text != "" {
			reason = encode(text)
		}
		outcome = failedWith(protocol.Exception{Module: "celery.exceptions", Type: "Reject", Args: []json.RawMessage{reason, json.RawMessage("false")}})
	case outcome.Retry != nil:
		again, err := outcome.Retry.Message(m, time.Now())
		if err != nil {
			return err
		}
		r.left = append(r.left, again)
		row.State, row.Exception, row.Traceback = protocol.StateRetry, outcome.Exception, outcome.Traceback
		row.Children = children(append(outcome.Children, json.RawMessage(`[["`+m.ID+`", null], null]`)), nil)
		return r.store(ctx, row)
	case outcome.Replacement != nil:
		plan, err := protocol.ReplaceTask(m, *outcome.Replacement, canvasSender())
		if err == nil {
			r.follow(plan)
			return nil
		}
		outcome = failedWith(canvasException(err))
	case outcome.State == "":
		return nil // ignored
	}
	row.State, row.Value, row.Exception, row.Traceback, row.DateDone = outcome.State, outcome.Value, outcome.Exception, outcome.Traceback, time.Now()
	if outcome.State == protocol.StateSuccess {
		plan, err := protocol.AfterSuccess(m, outcome.Value, canvasSender())
		if err != nil {
			return err
		}
		row.Children = children(outcome.Children, plan.Children)
		r.follow(plan)
		return r.store(ctx, row)
	}
	row.Children = children(outcome.Children, nil)
	rows := []protocol.Result{row}
	for _, step := range protocol.LaterSteps(m) {
		later := row
		later.TaskID, later.Task, later.Args, later.Kwargs = step.TaskID, step.Task, step.Args, step.Kwargs
		later.ReplyTo, later.CorrelationID, later.RootID, later.ParentID, later.Group = step.ReplyTo, step.TaskID, step.RootID, step.ParentID, step.Group
		later.Worker, later.Queue, later.Children, later.Stamps = "", "", nil, nil
		later.Retries = new(int)
		rows = append(rows, later)
	}
	plan, err := protocol.AfterFailure(m, canvasSender())
	if err == nil {
		r.follow(plan)
	}
	return r.store(ctx, rows...)
}

func (r *canvasRun) follow(plan protocol.Plan) {
	for _, f := range plan.FollowUps {
		f.Publishing.RoutingKey = "workertest"
		r.left = append(r.left, f.Publishing)
	}
}

func (r *canvasRun) store(ctx context.Context, rows ...protocol.Result) error {
	_, err := r.canvas.Results.Store(ctx, rows...)
	return err
}

// children are what a handler has sent, and what follows its task.
func children(sent []json.RawMessage, planned json.RawMessage) json.RawMessage {
	if len(sent) == 0 {
		return planned
	}
	var later []json.RawMessage
	if planned != nil && protocol.DecodeJSON(planned, &later) != nil {
		return planned
	}
	return encode(append(sent, later...))
}

func failedWith(e protocol.Exception) worker.Outcome {
	return worker.Outcome{State: protocol.StateFailure, Exception: &e}
}

func canvasException(err error) protocol.Exception {
	if own, ok := err.(interface{ Exception() protocol.Exception }); ok {
		return own.Exception()
	}
	return protocol.NewException("builtins", "RuntimeError", err.Error())
}

func resultRow(m *protocol.Message) protocol.Result {
	retries := m.Retries
	return protocol.Result{
		TaskID: m.ID, HasRequest: true, Task: m.Task, Args: m.RawArgs, Kwargs: m.RawKwargs,
		Worker: "workertest@localhost", Queue: m.RoutingKey, Retries: &retries, Stamps: protocol.StampsJSON(m),
		ReplyTo: m.Properties.ReplyTo, CorrelationID: m.Properties.CorrelationID, RootID: m.RootID, ParentID: m.ParentID, Group: m.Group,
	}
}
