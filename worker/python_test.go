package worker_test

import (
	"context"
	"os/exec"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// producer is a Celery program without code of this project. It prints the task
// ids.
const producer = `
import sys
from celery import Celery, chain, signature
app = Celery("shop", broker=sys.argv[1])
app.conf.task_default_queue = "orders"
# Without confirms, RabbitMQ 4.3 may drop what a process has sent that ends at once.
app.conf.broker_transport_options = {"confirm_publish": True}
add = lambda *args: signature("shop.add", args=args, app=app)
print(app.send_task("shop.add", args=(2, 3), headers={"x-big": 2**40, "x-negative": -2**40, "x-small": -5}).id)
print(chain(add(1, 2), add(10), add(100)).apply_async().id)
print(app.send_task("shop.add", kwargs={"x": 1, "y": 2}, compression="zlib", countdown=0.2, expires=60).id)
print(app.send_task("shop.add", args=(1,)).id)
`

func TestPythonProducer(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"5.4.0", "5.7.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			r := newTestEnv(t)
			w := newWorker(t, r.config())
			registerShop(w)
			headers := make(chan map[string]any, 10)
			w.Use(func(next worker.Handler) worker.Handler {
				return worker.HandlerFunc(func(ctx context.Context, task *worker.Task) (any, error) {
					headers <- task.Headers
					return next.Handle(ctx, task)
				})
			})
			workertest.Start(t, w)
			output, err := exec.CommandContext(t.Context(), devenv.Celery(t, version), "-c", producer, r.url).Output()
			if err != nil {
				t.Fatalf("producer: %v: %s", err, output)
			}
			ids := strings.Fields(string(output))
			for i, want := range []string{"5", "113", "3"} {
				if row := r.result(ids[i]); row.State != protocol.StateSuccess || string(row.Value) != want {
					t.Errorf("task %d: got %s %s, want SUCCESS %s", i, row.State, row.Value, want)
				}
			}
			if row := r.result(ids[3]); row.Exception == nil || row.Exception.Repr() != `TypeError("add() missing 1 required positional argument: 'y'")` {
				t.Errorf("wrong arguments give %+v", row)
			}
			first := receive(t, "the first task", headers)
			if first["x-big"] != int64(1)<<40 || first["x-negative"] != -int64(1)<<40 || first["x-small"] != int32(-5) {
				t.Errorf("headers are %v", first)
			}
		})
	}
}
