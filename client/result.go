package client

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/results"
)

// Result is the future result of a task: Python's AsyncResult, or GroupResult. Its
// methods read Config.Results, and return [ErrNoResults] if there is none. Many
// goroutines may call them at once; they must not change the fields.
type Result struct {
	// ID is the id of the task or, of a group, of the group.
	ID string
	// Parent is the result of the task before it in a chain, or nil.
	Parent *Result
	// Members are the results of a group's tasks, in their order; nil for a task.
	Members []*Result

	client *Client
	group  bool
}

// entry is the result in Celery's list of children: [[id, parent], members].
func (r *Result) entry() json.RawMessage {
	var tuple func(r *Result) any
	tuple = func(r *Result) any {
		var parent any
		if r.Parent != nil {
			parent = tuple(r.Parent)
		}
		var members any
		if r.group {
			list := []any{}
			for _, m := range r.Members {
				list = append(list, tuple(m))
			}
			members = list
		}
		return []any{[]any{r.ID, parent}, members}
	}
	return encode(tuple(r))
}

// TaskError is the failure of a task: what get raises in Python.
type TaskError struct {
	// TaskID is the task, State FAILURE or REVOKED.
	TaskID, State string
	// Exception is the Python exception. Its Type is the name of the class.
	Exception protocol.Exception
	// Traceback is the worker's text, or "".
	Traceback string
}

// Error is one line: the task, its state, and the exception.
func (e *TaskError) Error() string {
	text := e.Exception.Type
	if message := e.Exception.Text(); message != "" {
		text += ": " + message
	}
	return fmt.Sprintf("task %s ended with %s: %s", e.TaskID, e.State, text)
}

// Get waits until the task has ended, and decodes what it returned into the variable
// that into points to, as [protocol.DecodeJSON] does; nil discards it. Of a group it
// is a slice with the results of all tasks, in their order.
//
// The error is a [*TaskError] when this task, or an earlier one of its chain, has
// failed or was revoked; the error of ctx when that ends first. A task that was never
// sent, or whose result is ignored, never ends: give a ctx that does.
func (r *Result) Get(ctx context.Context, into any) error {
	value, err := r.wait(ctx, nil)
	if err != nil || into == nil {
		return err
	}
	if err := protocol.DecodeJSON(value, into); err != nil {
		return fmt.Errorf("client: result of task %s: %w", r.ID, err)
	}
	return nil
}

// wait returns the value of a task or a group as JSON. before are the tasks in front of
// the groups that it is in.
func (r *Result) wait(ctx context.Context, before []*Result) (json.RawMessage, error) {
	if r.client.results == nil {
		return nil, ErrNoResults
	}
	if r.group {
		before = append(slices.Clip(before), r.parents()...)
		values := make([]json.RawMessage, len(r.Members))
		for i, member := range r.Members {
			value, err := member.wait(ctx, before)
			if err != nil {
				return nil, err
			}
			values[i] = value
			before = nil // they have succeeded
		}
		return protocol.EncodeJSON(values)
	}
	outcome, err := r.waitTask(ctx, before)
	switch {
	case err != nil:
		return nil, err
	case outcome.Unreadable != nil:
		return nil, fmt.Errorf("client: %w", outcome.Unreadable)
	case outcome.Value == nil:
		return json.RawMessage("null"), nil
	}
	return outcome.Value, nil
}

// parents are the earlier tasks of the chain.
func (r *Result) parents() []*Result {
	var all []*Result
	for one := r.Parent; one != nil && !one.group; one = one.Parent {
		all = append(all, one)
	}
	return all
}

// waitTask waits for the task and, at the same time, for a failure of an earlier task
// of its chain, or of one before its group: after a revoked or expired task no later
// one ever ends, and Python workers mark no task of a group after a failed one.
func (r *Result) waitTask(ctx context.Context, before []*Result) (results.Outcome, error) {
	type answer struct {
		of      *Result
		outcome results.Outcome
		err     error
	}
	watch, cancel := context.WithCancel(ctx)
	answers, watched := make(chan answer), 0
	for _, one := range slices.Concat([]*Result{r}, r.parents(), before) {
		watched++
		go func() {
			outcome, err := r.client.results.Wait(watch, one.ID)
			answers <- answer{one, outcome, err}
		}()
	}
	defer func() { // the goroutines have returned when this function has
		cancel()
		for range watched {
			<-answers
		}
	}()
	for {
		a := <-answers
		watched--
		switch {
		case a.err != nil && ctx.Err() != nil:
			return a.outcome, fmt.Errorf("client: waiting for task %s: %w", r.ID, context.Cause(ctx))
		case a.err != nil:
			return a.outcome, a.err
		case a.outcome.State != protocol.StateSuccess:
			return a.outcome, failure(a.outcome)
		case a.of == r:
			return a.outcome, nil
		}
	}
}

func failure(o results.Outcome) error {
	e := &TaskError{TaskID: o.TaskID, State: o.State, Traceback: o.Traceback}
	switch {
	case o.Exception != nil:
		e.Exception = *o.Exception
	case o.Unreadable != nil: // the last line of the traceback says more
		e.Exception = protocol.NewException("builtins", "Exception", o.Unreadable.Error())
	default:
		e.Exception = protocol.NewException("builtins", "Exception")
	}
	return e
}

// Outcome returns all that is stored about the task now: state, value or exception,
// traceback, worker, times. It does not wait.
func (r *Result) Outcome(ctx context.Context) (results.Outcome, error) {
	if r.client.results == nil {
		return results.Outcome{}, ErrNoResults
	}
	outcomes, err := r.client.results.Load(ctx, r.ID)
	if err != nil {
		return results.Outcome{}, err
	}
	return outcomes[0], nil
}

// State returns the state of the task: PENDING if nothing is stored, which is also
// that of an unknown task; STARTED, RETRY, SUCCESS, FAILURE, REVOKED, or a state of the
// application's own. A group is SUCCESS when all its tasks are, FAILURE when one has
// failed or was revoked, and otherwise PENDING.
func (r *Result) State(ctx context.Context) (string, error) {
	if r.group {
		return r.groupState(ctx)
	}
	outcome, err := r.Outcome(ctx)
	return outcome.State, err
}

func (r *Result) groupState(ctx context.Context) (string, error) {
	state := protocol.StateSuccess
	for _, member := range r.Members {
		one, err := member.State(ctx)
		switch {
		case err != nil:
			return "", err
		case one == protocol.StateFailure || one == protocol.StateRevoked:
			return protocol.StateFailure, nil
		case one != protocol.StateSuccess:
			state = protocol.StatePending
		}
	}
	return state, nil
}

// Traceback returns the traceback of a task that failed or will be retried, or "".
func (r *Result) Traceback(ctx context.Context) (string, error) {
	outcome, err := r.Outcome(ctx)
	return outcome.Traceback, err
}

// Children returns the results of the tasks that this one has started: its callbacks
// and the next task of its chain. Python workers before 5.7 do not store them in a
// database.
func (r *Result) Children(ctx context.Context) ([]*Result, error) {
	outcome, err := r.Outcome(ctx)
	if err != nil || outcome.Children == nil {
		return nil, err
	}
	return r.client.parseResults(outcome.Children)
}

// parseResults parses Celery's nested lists of results: [[id, parent], members].
func (c *Client) parseResults(text json.RawMessage) ([]*Result, error) {
	var entries [][]json.RawMessage
	if err := protocol.DecodeJSON(text, &entries); err != nil {
		return nil, fmt.Errorf("client: list of children: %w", err)
	}
	var found []*Result
	for _, entry := range entries {
		var identity []json.RawMessage
		r := &Result{client: c}
		if len(entry) == 0 {
			return nil, fmt.Errorf("client: list of children has an empty entry")
		}
		err := protocol.DecodeJSON(entry[0], &identity)
		if err == nil && len(identity) > 0 {
			err = protocol.DecodeJSON(identity[0], &r.ID)
		}
		if err == nil && len(entry) > 1 && string(entry[1]) != "null" {
			r.group = true
			r.Members, err = c.parseResults(entry[1])
		}
		if err != nil {
			return nil, fmt.Errorf("client: list of children: %w", err)
		}
		found = append(found, r)
	}
	return found, nil
}

// Revoke is [Client.Revoke] of the task, or of all tasks of a group.
func (r *Result) Revoke(ctx context.Context) error {
	if !r.group {
		return r.client.Revoke(ctx, r.ID)
	}
	var ids []string
	for _, member := range r.Members {
		ids = append(ids, member.ID)
	}
	return r.client.Revoke(ctx, ids...)
}
