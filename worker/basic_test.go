package worker_test

import (
	"context"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

type addArgs struct {
	X int `celery:"x"`
	Y int `celery:"y"`
}

func add(_ context.Context, in addArgs) (int, error) { return in.X + in.Y, nil }

func TestTaskRunsAndItsResultIsStored(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	w := newWorker(t, r.config())
	worker.Handle(w, "shop.add", add)
	stop := workertest.Start(t, w)
	id := r.send(workertest.Message("orders", "shop.add", workertest.Args(2, 3), nil))
	row := r.result(id)
	if row.State != protocol.StateSuccess || string(row.Value) != "5" {
		t.Errorf("got %s %s, want SUCCESS 5", row.State, row.Value)
	}
	if err := w.Health(); err != nil {
		t.Errorf("health: %v", err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if n := r.depth("orders"); n != 0 {
		t.Errorf("%d messages remain in the queue", n)
	}
}
