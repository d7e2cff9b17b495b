package orchestrator

import (
	"context"
	"errors"
	"slices"

	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// The tasks of MoonMind's orchestrator worker
// (docs/moonmind.md#queue-and-tasks).
const (
	TaskExecutePlanStep = "moonmind.workflows.orchestrator.tasks.execute_plan_step"
	TaskHealthCheck     = "moonmind.workflows.orchestrator.tasks.health_check"
)

// stepArgs are the arguments of execute_plan_step.
type stepArgs struct {
	RunID string `celery:"run_id"`
	Step  string `celery:"step_name"`
}

// Register makes the worker run both tasks, and uses it to publish parked
// messages.
func (o *Orchestrator) Register(w *worker.Worker) {
	o.broker = w
	worker.Handle(w, TaskExecutePlanStep, o.executePlanStep)
	worker.Handle(w, TaskHealthCheck, func(context.Context, struct{}) (string, error) { return "ok", nil })
}

// executePlanStep translates between a worker's task and [Orchestrator.Execute].
func (o *Orchestrator) executePlanStep(ctx context.Context, args stepArgs) (Result, error) {
	request := Request{RunID: args.RunID, Step: args.Step}
	if task := worker.TaskFromContext(ctx); task != nil {
		request.TaskID, request.RootTaskID = task.ID, task.RootID
		request.Delivery, request.StillUnacked, request.OtherConsumers = task.Delivery, task.StillUnacked, task.OtherConsumers
		embed := task.Embed
		request.NoNext = len(embed.Chain) == 0 && len(embed.Callbacks) == 0 && embed.Chord == nil
		request.NoErrback = len(embed.Errbacks) == 0 && embed.Chord == nil
	}
	result, err := o.Execute(ctx, request, isTimeLimit)
	var failure *Failure
	if errors.As(err, &failure) {
		// Most failures have been recorded and are clean; those of a message that
		// no step was begun for are not.
		clean := *failure
		clean.Arg, clean.Traceback = o.clean(failure.Arg), o.clean(failure.traceback())
		err = &clean
	}
	return result, workerError(err)
}

// isTimeLimit says that a cause ends one task only, and not the worker.
func isTimeLimit(cause error) bool {
	return slices.ContainsFunc([]error{worker.ErrSoftTimeLimit, worker.ErrTimeLimit}, func(limit error) bool {
		return errors.Is(cause, limit)
	})
}

// workerError converts an error of Execute to the one that tells the worker what
// to do with the message. Any other error is the cause of a context that has
// ended, which the worker knows.
func workerError(err error) error {
	var failure *Failure
	var back *HandBackError
	switch {
	case errors.As(err, &failure):
		return &worker.Error{
			Type: failure.Type, Module: failure.Module, Args: []any{failure.Arg}, Traceback: failure.traceback(), Err: failure,
		}
	case errors.Is(err, ErrStop):
		return worker.Ignore
	case errors.As(err, &back):
		return worker.Reject{Requeue: true, After: back.After, Reason: back.Reason}
	}
	return err
}
