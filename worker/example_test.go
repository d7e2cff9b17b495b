package worker_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// A worker for the queue "shop". A Python program that declares the task as
//
//	@app.task(name="shop.add")
//	def add(x, y): ...
//
// and has task_routes = {"shop.*": {"queue": "shop"}} sends it by add.delay(2, 3).
func Example() {
	w, err := worker.New(worker.Config{
		Broker: "amqp://guest:guest@localhost:5672/",
		Queues: []string{"shop"},
		Logger: slog.Default(),
	})
	if err != nil {
		slog.Error("configuration", "error", err)
		os.Exit(1)
	}
	type addArgs struct { // positional arguments in this order, or keyword arguments
		X int `celery:"x"`
		Y int `celery:"y"`
	}
	worker.Handle(w, "shop.add", func(ctx context.Context, in addArgs) (int, error) { return in.X + in.Y, nil })

	// After the first signal running tasks finish. The second cancels them.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	go func() {
		<-ctx.Done()
		again, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		<-again.Done()
		w.StopNow()
	}()
	if err := w.Run(ctx); err != nil {
		slog.Error("worker", "error", err)
		os.Exit(1)
	}
}

func exampleWorker() *worker.Worker {
	w, err := worker.New(worker.Config{Broker: "amqp://localhost", Queues: []string{"shop"}})
	if err != nil {
		panic(err)
	}
	return w
}

// The task is called with package workertest, which needs no broker.
func ExampleHandle() {
	w := exampleWorker()
	type addArgs struct {
		X int `celery:"x"`
		Y int `celery:"y"`
	}
	worker.Handle(w, "shop.add", func(_ context.Context, in addArgs) (int, error) { return in.X + in.Y, nil })

	outcome, _ := workertest.Call(context.Background(), w, "shop.add", workertest.Args(2, 3), nil)
	fmt.Println(outcome.State, string(outcome.Value))
	outcome, _ = workertest.Call(context.Background(), w, "shop.add", workertest.Args(2), workertest.Kwargs(map[string]any{"y": 3}))
	fmt.Println(outcome.State, string(outcome.Value))
	outcome, _ = workertest.Call(context.Background(), w, "shop.add", workertest.Args(2), nil)
	fmt.Println(outcome.State, outcome.Err)
	// Output:
	// SUCCESS 5
	// SUCCESS 5
	// FAILURE TypeError: add() missing 1 required positional argument: 'y'
}

// The handler chooses the exception class that Python sees.
func ExampleError() {
	w := exampleWorker()
	worker.Handle(w, "shop.order", func(context.Context, struct {
		SKU int `celery:"sku"`
	}) (any, error) {
		return nil, worker.Error{Type: "OrderError", Module: "shop.errors", Args: []any{"no stock", 7}}
	})
	outcome, _ := workertest.Call(context.Background(), w, "shop.order", workertest.Args(7), nil)
	fmt.Println(outcome.State, outcome.Exception.Module, outcome.Exception.Repr())
	// Output:
	// FAILURE shop.errors OrderError('no stock', 7)
}

// The task is retried after 30 s, at most five times. Package workertest shows
// how to test the attempt after the last retry.
func ExampleRetry() {
	w := exampleWorker()
	worker.Handle(w, "shop.sync", func(context.Context, struct{}) (any, error) {
		return nil, worker.RetryIn(30 * time.Second).Max(5).Because(errors.New("remote is down"))
	})
	outcome, _ := workertest.Call(context.Background(), w, "shop.sync", nil, nil)
	fmt.Println(outcome.State, outcome.Exception.Repr())
	// Output:
	// RETRY RuntimeError('remote is down')
}

// One task requeues its message after a pause, the other ends without an outcome.
func ExampleReject() {
	w := exampleWorker()
	worker.Handle(w, "shop.busy", func(context.Context, struct{}) (any, error) {
		return nil, worker.Reject{Requeue: true, After: 5 * time.Second, Reason: "order is locked"}
	})
	worker.Handle(w, "shop.skip", func(context.Context, struct{}) (any, error) { return nil, worker.Ignore })
	busy, _ := workertest.Call(context.Background(), w, "shop.busy", nil, nil)
	skip, _ := workertest.Call(context.Background(), w, "shop.skip", nil, nil)
	fmt.Println(busy.Err)
	fmt.Println(skip.Err)
	// Output:
	// reject with requeue: order is locked
	// ignore this task
}

// A Go program sends a task to any Celery worker, Python's or its own. No worker
// runs here. The queue must exist: the error is ErrUnroutable otherwise.
func ExampleWorker_WithConnection() {
	w, err := worker.New(worker.Config{Broker: "amqp://guest:guest@localhost:5672/", Queues: []string{"shop"}})
	if err != nil {
		fmt.Println(err)
		return
	}
	var args []json.RawMessage
	for _, arg := range []int{2, 3} {
		text, err := protocol.EncodeJSON(arg)
		if err != nil {
			fmt.Println(err)
			return
		}
		args = append(args, text)
	}
	message, _, err := protocol.NewSignature("shop.add", args, nil).Apply(protocol.ApplyOptions{})
	if err != nil {
		fmt.Println(err)
		return
	}
	message.RoutingKey = "shop" // with the exchange "": the queue of this name
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err = w.WithConnection(ctx, func(publish func(context.Context, protocol.Publishing) error) error {
		return publish(ctx, message)
	})
	fmt.Println(message.TaskID, err)
}

// Middleware wraps the handlers of all tasks.
func ExampleWorker_Use() {
	w := exampleWorker()
	w.Use(func(next worker.Handler) worker.Handler {
		return worker.HandlerFunc(func(ctx context.Context, task *worker.Task) (any, error) {
			fmt.Println("before", task.Task)
			defer fmt.Println("after", task.Task)
			return next.Handle(ctx, task)
		})
	})
	worker.Handle(w, "shop.ping", func(ctx context.Context, _ struct{}) (string, error) {
		return "retries: " + fmt.Sprint(worker.TaskFromContext(ctx).Retries), nil
	})
	outcome, _ := workertest.Call(context.Background(), w, "shop.ping", nil, nil)
	fmt.Println(string(outcome.Value))
	// Output:
	// before shop.ping
	// after shop.ping
	// "retries: 0"
}
