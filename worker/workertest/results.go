package workertest

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/results"
)

// Results is a results.Backend in memory. Like the other backends it never
// overwrites SUCCESS. The zero value is ready for use. Its methods may be called
// by many goroutines at once.
type Results struct {
	mu      sync.Mutex
	rows    map[string]protocol.Result
	order   []string
	history map[string][]string
	calls   int
	fault   func(rows []protocol.Result) error
	changed chan struct{}
	starts  map[results.Start]int
}

// Store implements results.Backend.
func (r *Results) Store(ctx context.Context, rows ...protocol.Result) ([]bool, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls++
	r.wake()
	if r.fault != nil {
		if err := r.fault(rows); err != nil {
			return nil, err
		}
	}
	if r.rows == nil {
		r.rows, r.history = map[string]protocol.Result{}, map[string][]string{}
	}
	written := make([]bool, len(rows))
	for i, row := range rows {
		old, exists := r.rows[row.TaskID]
		if exists && old.State == protocol.StateSuccess {
			continue
		}
		if !exists {
			r.order = append(r.order, row.TaskID)
		}
		r.rows[row.TaskID] = row
		r.history[row.TaskID] = append(r.history[row.TaskID], row.State)
		written[i] = true
	}
	return written, nil
}

// wake wakes all callers of WaitFor. The caller has locked r.mu.
func (r *Results) wake() {
	if r.changed != nil {
		close(r.changed)
		r.changed = nil
	}
}

// Fail injects faults: Store calls fault first, and returns its error unless that is
// nil. Fail(nil) ends this.
func (r *Results) Fail(fault func(rows []protocol.Result) error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fault = fault
}

// Calls returns how often Store was called.
func (r *Results) Calls() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.calls
}

// Find returns the stored result of a task, and whether there is one.
func (r *Results) Find(taskID string) (protocol.Result, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	row, ok := r.rows[taskID]
	return row, ok
}

// List returns all results in the order in which they were first stored.
func (r *Results) List() []protocol.Result {
	r.mu.Lock()
	defer r.mu.Unlock()
	rows := make([]protocol.Result, 0, len(r.order))
	for _, id := range r.order {
		rows = append(rows, r.rows[id])
	}
	return rows
}

// History lists the states that were stored for a task, oldest first.
func (r *Results) History(taskID string) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.history[taskID])
}

// CountsStarts implements results.StartCounter.
func (r *Results) CountsStarts() error { return nil }

// CountStart implements results.StartCounter. A test calls it to say that a worker has died
// in an attempt: the first one of a task is "0.0", the first retry "1.0".
func (r *Results) CountStart(ctx context.Context, s results.Start) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.starts == nil {
		r.starts = map[results.Start]int{}
	}
	s.Worker, s.At = "", time.Time{} // every call is for another start: no answer is lost
	r.starts[s]++
	return r.starts[s], nil
}

// ForgetStarts implements results.StartCounter.
func (r *Results) ForgetStarts(ctx context.Context, s results.Start) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	s.Worker, s.At = "", time.Time{}
	delete(r.starts, s)
	return ctx.Err()
}

// Load implements results.Backend.
func (r *Results) Load(ctx context.Context, taskIDs ...string) ([]protocol.Result, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	rows := make([]protocol.Result, len(taskIDs))
	for i, id := range taskIDs {
		row, stored := r.Find(id)
		if !stored {
			row = protocol.Result{TaskID: id, State: protocol.StatePending}
		}
		rows[i] = row
	}
	return rows, nil
}

// Wait implements results.Backend: it waits until a task has ended.
func (r *Results) Wait(ctx context.Context, taskID string) (protocol.Result, error) {
	return r.WaitState(ctx, taskID, protocol.StateSuccess, protocol.StateFailure, protocol.StateRevoked)
}

// WaitState waits until a task has one of the states, and returns its result.
// Without states it waits as Wait does. It returns an error when ctx ends first.
func (r *Results) WaitState(ctx context.Context, taskID string, states ...string) (protocol.Result, error) {
	if len(states) == 0 {
		return r.Wait(ctx, taskID)
	}
	var found protocol.Result
	err := r.WaitFor(ctx, func() bool {
		found = r.rows[taskID]
		return slices.Contains(states, found.State)
	})
	if err != nil {
		return found, fmt.Errorf("task %s is %q, want one of %v: %w", taskID, found.State, states, err)
	}
	return found, nil
}

// WaitFor waits until condition returns true, and calls it after every Store.
// condition must not call methods of r, which is locked meanwhile. WaitFor
// returns the cause of ctx when that ends first.
func (r *Results) WaitFor(ctx context.Context, condition func() bool) error {
	for {
		r.mu.Lock()
		holds := condition()
		if r.changed == nil {
			r.changed = make(chan struct{})
		}
		changed := r.changed
		r.mu.Unlock()
		if holds {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
