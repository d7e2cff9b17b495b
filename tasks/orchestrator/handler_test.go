package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/worker"
)

func TestWorkerErrors(t *testing.T) {
	t.Parallel()
	if err := workerError(ErrStop); !errors.Is(err, worker.Ignore) {
		t.Error(err)
	}
	var reject worker.Reject
	if err := workerError(&HandBackError{After: time.Second, Reason: "r"}); !errors.As(err, &reject) || !reject.Requeue || reject.After != time.Second {
		t.Error(err)
	}
	var failure *worker.Error
	if err := workerError(keyError("x")); !errors.As(err, &failure) || failure.Type != "KeyError" || fmt.Sprint(failure.Args) != "[x]" {
		t.Error(err)
	}
	if err := workerError(nil); err != nil {
		t.Error(err)
	}
}

func TestBothTasksAreRegistered(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	o, err := New(b.config)
	if err != nil {
		t.Fatal(err)
	}
	w, err := worker.New(worker.Config{Broker: "amqp://127.0.0.1", Queues: []string{"q"}})
	if err != nil {
		t.Fatal(err)
	}
	o.Register(w)
	for _, name := range []string{TaskExecutePlanStep, TaskHealthCheck} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s is not registered", name)
				}
			}()
			w.Register(name, worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) { return nil, nil }))
		}()
	}
}
