package worker_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// gocelerySum is a task as gocelery's own example has it.
type gocelerySum struct {
	a, b   int
	prefix string
	ran    *sync.WaitGroup
}

func (s *gocelerySum) ParseKwargs(kwargs map[string]interface{}) error {
	a, ok := kwargs["a"].(float64)
	if !ok {
		return fmt.Errorf("undefined kwarg a")
	}
	b, ok := kwargs["b"].(float64)
	if !ok {
		return fmt.Errorf("undefined kwarg b")
	}
	if s.a != 0 || s.b != 0 {
		return errors.New("this value has been used before")
	}
	s.a, s.b = int(a), int(b)
	return nil
}

func (s *gocelerySum) RunTask() (interface{}, error) {
	if s.ran != nil {
		s.ran.Done()
		s.ran.Wait() // until all calls run at once
	}
	return fmt.Sprint(s.prefix, s.a+s.b), nil
}

func TestTasksOfGoceleryRunUnchanged(t *testing.T) {
	t.Parallel()
	w := newWorker(t, worker.Config{Broker: "amqp://localhost", Queues: []string{"orders"}})
	both := &sync.WaitGroup{}
	both.Add(2)
	w.Register("worker.sum", worker.FromGocelery(&gocelerySum{prefix: "sum "}))
	w.Register("worker.both", worker.FromGocelery(&gocelerySum{ran: both}))
	w.Register("worker.add", worker.Func(func(a, b int) int { return a + b }))
	w.Register("worker.join", worker.Func(func(ctx context.Context, prefix string, rest ...float64) (string, error) {
		if worker.TaskFromContext(ctx) == nil {
			return "", errors.New("no task in the context")
		}
		return fmt.Sprint(prefix, rest), nil
	}))
	w.Register("worker.check", worker.Func(func(n int) error {
		if n < 0 {
			return &worker.Error{Type: "ValueError", Args: []any{n}}
		}
		return nil
	}))
	call := func(task string, args []any, kwargs map[string]any) string {
		t.Helper()
		outcome, err := workertest.Call(t.Context(), w, task, workertest.Args(args...), workertest.Kwargs(kwargs))
		if err != nil {
			return err.Error()
		}
		if outcome.State != "SUCCESS" {
			return outcome.Exception.Repr()
		}
		return string(outcome.Value)
	}
	for _, tt := range []struct {
		task   string
		args   []any
		kwargs map[string]any
		want   string
	}{
		{"worker.sum", nil, map[string]any{"a": 2, "b": 3}, `"sum 5"`},
		{"worker.sum", nil, map[string]any{"a": 4, "b": 5}, `"sum 9"`},
		{"worker.sum", nil, map[string]any{"a": 2}, `TypeError('undefined kwarg b')`},
		{"worker.sum", []any{1}, nil, `TypeError('sum() takes 0 positional arguments but 1 was given')`},
		{"worker.sum", nil, map[string]any{"a": math.NaN(), "b": "x"}, `TypeError('undefined kwarg b')`},
		{"worker.add", []any{2, 3}, nil, `5`},
		{"worker.add", []any{2}, nil, `TypeError('add() takes 2 positional arguments but 1 was given')`},
		{"worker.add", []any{2, 3, 4}, nil, `TypeError('add() takes 2 positional arguments but 3 were given')`},
		{"worker.add", []any{2, 3}, map[string]any{"c": 1}, `TypeError("add() got an unexpected keyword argument 'c'")`},
		{"worker.join", []any{"n ", 1, 2.5}, nil, `"n [1 2.5]"`},
		{"worker.join", []any{"n "}, nil, `"n []"`},
		{"worker.check", []any{1}, nil, `null`},
		{"worker.check", []any{-1}, nil, `ValueError(-1)`},
	} {
		if got := call(tt.task, tt.args, tt.kwargs); got != tt.want {
			t.Errorf("%s(%v, %v): got %s, want %s", tt.task, tt.args, tt.kwargs, got, tt.want)
		}
	}
	var group sync.WaitGroup
	for i := range 2 {
		group.Go(func() {
			if got, want := call("worker.both", nil, map[string]any{"a": i, "b": 10}), fmt.Sprintf(`"%d"`, i+10); got != want {
				t.Errorf("at the same time: got %s, want %s", got, want)
			}
		})
	}
	group.Wait()
	for name, fn := range map[string]any{"no function": 1, "three results": func() (int, int, error) { return 0, 0, nil }} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s is registered", name)
				}
			}()
			worker.Func(fn)
		}()
	}
}
