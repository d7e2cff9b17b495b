package workertest_test

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/client"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

func canvasWorker() *worker.Worker {
	w, err := worker.New(worker.Config{Broker: "amqp://localhost", Queues: []string{"shop"}})
	if err != nil {
		panic(err)
	}
	worker.Handle(w, "shop.add", func(_ context.Context, in struct {
		X int `celery:"x"`
		Y int `celery:"y"`
	}) (int, error) {
		return in.X + in.Y, nil
	})
	worker.Handle(w, "shop.flaky", func(ctx context.Context, in struct {
		Fails int `celery:"fails"`
	}) (string, error) {
		if n := worker.TaskFromContext(ctx).Retries; n < in.Fails {
			return "", worker.Retry{}.Max(2).Because(errors.New("busy"))
		}
		return "done", nil
	})
	worker.Handle(w, "shop.note", func(_ context.Context, in struct {
		All []any `celery:"*"`
	}) (string, error) {
		return fmt.Sprint(in.All...), nil
	})
	w.Register("shop.drop", worker.Func(func() error { return worker.Reject{} }))
	w.Register("shop.reject", worker.Func(func(requeue bool) error { return worker.Reject{Requeue: requeue, Reason: "bad"} }))
	return w
}

func ExampleRun() {
	order := client.Chain(client.Task("shop.add", 1, 2), client.Task("shop.add", 10), client.Group(client.Task("shop.add", 100), client.Task("shop.add", 200)))
	canvas, err := workertest.Run(context.Background(), canvasWorker(), order)
	if err != nil {
		fmt.Println(err)
		return
	}
	var sums []int
	err = canvas.Get(context.Background(), &sums)
	fmt.Println(sums, err, len(canvas.Sent))
	// Output: [113 213] <nil> 4
}

func TestRunDoesWhatWorkersDo(t *testing.T) {
	t.Parallel()
	run := func(s client.Signature, options ...client.Option) *workertest.Canvas {
		t.Helper()
		c, err := workertest.Run(t.Context(), canvasWorker(), s, options...)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	state := func(c *workertest.Canvas, id string) string {
		row, _ := c.Results.Find(id)
		return row.State + " " + string(row.Value)
	}
	flaky := run(client.Task("shop.flaky", 2))
	if history := flaky.Results.History(flaky.ID); !reflect.DeepEqual(history, []string{"RETRY", "RETRY", "SUCCESS"}) {
		t.Errorf("history %v", history)
	}
	var failure *client.TaskError
	failed := run(client.Chain(client.Task("shop.flaky", 3), client.Task("shop.add", 1)),
		client.LinkError(client.Task("shop.note").With(client.TaskID("told")), client.Task("python.told")))
	if err := failed.Get(t.Context(), nil); !errors.As(err, &failure) || failure.Exception.Repr() != "RuntimeError('busy')" {
		t.Errorf("%v", err)
	}
	if got := state(failed, failed.ID); got != "FAILURE " {
		t.Errorf("later task is %s", got)
	}
	if got := state(failed, "told"); got != `SUCCESS "`+failed.Parent.ID+`"` {
		t.Errorf("error callback is %s", got)
	}
	if len(failed.Elsewhere) != 1 || failed.Elsewhere[0].Task != "python.told" {
		t.Errorf("elsewhere %v", failed.Elsewhere)
	}
	linked := run(client.Task("shop.add", 1, 2), client.Link(client.Task("shop.note", "sum").With(client.TaskID("linked"))))
	children, err := linked.Children(t.Context())
	if err != nil || len(children) != 1 || children[0].ID != "linked" || state(linked, "linked") != `SUCCESS "3sum"` && state(linked, "linked") != `SUCCESS "3 sum"` {
		t.Errorf("children %v, %v, %s", children, err, state(linked, "linked"))
	}
	rejected := run(client.Task("shop.reject", false))
	if err := rejected.Get(t.Context(), nil); !errors.As(err, &failure) || failure.Exception.Repr() != "Reject('bad', False)" {
		t.Errorf("%v", err)
	}
	unexplained := run(client.Task("shop.drop"))
	if err := unexplained.Get(t.Context(), nil); !errors.As(err, &failure) || failure.Exception.Repr() != "Reject(None, False)" {
		t.Errorf("%v", err)
	}
	if _, err := workertest.Run(t.Context(), canvasWorker(), client.Task("shop.reject", true)); err == nil {
		t.Error("a requeue has no error")
	}
	wrong := run(client.Task("shop.add", 1))
	if err := wrong.Get(t.Context(), nil); !errors.As(err, &failure) || failure.Exception.Type != "TypeError" {
		t.Errorf("%v", err)
	}
}
