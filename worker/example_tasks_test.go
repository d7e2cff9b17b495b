package worker_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/client"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

var errBusy = errors.New("bank is busy")

// charge fails twice.
func charge(ctx context.Context, _ struct{}) (string, error) {
	attempt := worker.TaskFromContext(ctx).Retries + 1
	if attempt < 3 {
		return "", fmt.Errorf("attempt %d: %w", attempt, errBusy)
	}
	return fmt.Sprint("charged in attempt ", attempt), nil
}

// A busy bank is asked again after 1 s, 2 s, 4 s, 8 s and 8 s. Without NoJitter each pause
// is a random part of that. Every other error is final.
func ExampleAutoRetry() {
	w := exampleWorker()
	worker.Handle(w, "shop.charge", charge, worker.AutoRetry(worker.RetryPolicy{
		For: worker.ErrorIs(errBusy), Max: 5, Backoff: time.Second, BackoffMax: 8 * time.Second, NoJitter: true,
	}))
	first, _ := workertest.Call(context.Background(), w, "shop.charge", nil, nil)
	fmt.Println(first.State, first.Retry.Pause(), first.Exception.Repr())

	// Run does all attempts, without their pauses.
	canvas, _ := workertest.Run(context.Background(), w, client.Task("shop.charge"))
	var result string
	err := canvas.Get(context.Background(), &result)
	fmt.Println(canvas.Results.History(canvas.ID), result, err)
	// Output:
	// RETRY 1s RuntimeError('attempt 1: bank is busy')
	// [RETRY RETRY SUCCESS] charged in attempt 3 <nil>
}

// A handler chooses the pause, and changes an argument of the next attempt.
func ExampleRetryIn() {
	w := exampleWorker()
	worker.Handle(w, "shop.poll", func(_ context.Context, in struct {
		Page int `celery:"page"`
	}) (string, error) {
		if in.Page < 3 {
			return "", worker.RetryIn(time.Minute).Max(10).Args(in.Page + 1)
		}
		return fmt.Sprint("last page ", in.Page), nil
	})
	canvas, _ := workertest.Run(context.Background(), w, client.Task("shop.poll", 1))
	var result string
	err := canvas.Get(context.Background(), &result)
	fmt.Println(canvas.Results.History(canvas.ID), result, err)
	// Output:
	// [RETRY RETRY SUCCESS] last page 3 <nil>
}

// An order becomes a chain, which the handler knows only when it runs. The caller gets
// the chain's result under the id of the order.
func ExampleReplace() {
	w := exampleWorker()
	worker.Handle(w, "shop.add", add)
	worker.Handle(w, "shop.order", func(_ context.Context, in struct {
		Prices []int `celery:"prices"`
	}) (int, error) {
		steps := []client.Signature{client.Task("shop.add", 0, in.Prices[0])}
		for _, price := range in.Prices[1:] {
			steps = append(steps, client.Task("shop.add", price))
		}
		return 0, worker.Replace(client.Chain(steps...))
	})
	canvas, _ := workertest.Run(context.Background(), w, client.Task("shop.order", []int{5, 7, 30}), client.TaskID("order-1"))
	var sum int
	err := canvas.Get(context.Background(), &sum)
	fmt.Println(canvas.ID, sum, err)
	// Output:
	// order-1 42 <nil>
}

// A caller in Python catches shop.errors.SoldOut.
func ExampleErrorClasses() {
	errSoldOut := errors.New("sold out")
	w := exampleWorker()
	worker.Handle(w, "shop.reserve", func(_ context.Context, in struct {
		SKU string `celery:"sku"`
	}) (any, error) {
		return nil, fmt.Errorf("reserve %s: %w", in.SKU, errSoldOut)
	}, worker.ErrorClasses(worker.ErrorClass{Match: worker.ErrorIs(errSoldOut), Module: "shop.errors", Type: "SoldOut"}))
	outcome, _ := workertest.Call(context.Background(), w, "shop.reserve", workertest.Args("A-7"), nil)
	fmt.Println(outcome.Exception.Module, outcome.Exception.Repr())
	// Output:
	// shop.errors SoldOut('reserve A-7: sold out')
}

// Every failed attempt is reported, with the error of Go.
func ExampleConfig_onError() {
	w, err := worker.New(worker.Config{
		Broker: "amqp://localhost", Queues: []string{"shop"},
		OnError: func(_ context.Context, f worker.TaskFailure) {
			fmt.Println(f.Task.Task, "attempt", f.Task.Retries+1, f.State, errors.Is(f.Err, errBusy))
		},
	})
	if err != nil {
		panic(err)
	}
	worker.Handle(w, "shop.charge", charge, worker.AutoRetry(worker.RetryPolicy{}))
	_, _ = workertest.Run(context.Background(), w, client.Task("shop.charge"))
	// Output:
	// shop.charge attempt 1 RETRY true
	// shop.charge attempt 2 RETRY true
}

// A handler's log lines say which attempt of which task has written them.
func ExampleLogger() {
	short := func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey || a.Key == "task_id" || a.Key == "root_id" {
			return slog.Attr{}
		}
		return a
	}
	w, err := worker.New(worker.Config{
		Broker: "amqp://localhost", Queues: []string{"shop"},
		Logger: slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{ReplaceAttr: short})),
	})
	if err != nil {
		panic(err)
	}
	worker.Handle(w, "shop.sync", func(ctx context.Context, _ struct{}) (any, error) {
		worker.Logger(ctx).Info("page is read", "page", 3)
		return nil, nil
	})
	_, _ = workertest.Call(context.Background(), w, "shop.sync", nil, nil)
	// Output:
	// level=INFO msg="page is read" task=shop.sync attempt=1 page=3
}

// tracer stands for the client of a tracing service.
type tracer struct{}

func (tracer) span(parent, name string) (end func(state string)) {
	return func(state string) { fmt.Printf("span %s of %s: %s\n", name, parent, state) }
}

// Tracing: the producer sends its trace in a header of its own, and middleware makes a
// span of each attempt. A producer in Go sets it by client.Header, one in Python by
// apply_async(headers={"traceparent": …}).
func ExampleWorker_Use_tracing() {
	w := exampleWorker()
	var traces tracer
	w.Use(func(next worker.Handler) worker.Handler {
		return worker.HandlerFunc(func(ctx context.Context, task *worker.Task) (result any, err error) {
			parent, _ := task.CustomHeaders()["traceparent"].(string)
			end := traces.span(parent, fmt.Sprintf("%s attempt %d", task.Task, task.Retries+1))
			state := "panicked"
			defer func() { end(state) }()
			result, err = next.Handle(ctx, task)
			state = fmt.Sprint(err)
			return result, err
		})
	})
	worker.Handle(w, "shop.charge", charge, worker.AutoRetry(worker.RetryPolicy{}))
	_, _ = workertest.Run(context.Background(), w, client.Task("shop.charge"), client.Header("traceparent", "00-4bf9"))
	// Output:
	// span shop.charge attempt 1 of 00-4bf9: attempt 1: bank is busy
	// span shop.charge attempt 2 of 00-4bf9: attempt 2: bank is busy
	// span shop.charge attempt 3 of 00-4bf9: <nil>
}

// Metrics: Config.Metrics has those of the worker, such as the tasks by name and outcome.
// Middleware adds those of the program. It is called once for each task name, so that
// what it keeps is kept for all tasks of that name.
func ExampleWorker_Use_metrics() {
	w := exampleWorker()
	counts := map[string]int{} // a counter of the metrics library, in a program
	w.Use(func(next worker.Handler) worker.Handler {
		return worker.HandlerFunc(func(ctx context.Context, task *worker.Task) (any, error) {
			result, err := next.Handle(ctx, task)
			if errors.Is(err, errBusy) {
				counts[task.Task+" busy"]++
			}
			return result, err
		})
	})
	worker.Handle(w, "shop.charge", charge, worker.AutoRetry(worker.RetryPolicy{}))
	_, _ = workertest.Run(context.Background(), w, client.Task("shop.charge"))
	fmt.Println(counts)
	// Output:
	// map[shop.charge busy:2]
}

// A task for a service that allows ten calls a minute, must not be called twice for one
// message, and may take 20 s. A worker with a broker applies all of it.
func ExampleRateLimit() {
	w := exampleWorker()
	worker.Handle(w, "shop.sms", func(ctx context.Context, _ struct{}) (any, error) {
		_, limited := ctx.Deadline()
		fmt.Println("the handler has a deadline:", limited)
		return nil, nil
	}, worker.RateLimit("10/m"), worker.AckEarly(), worker.WithTimeLimit(protocol.TimeLimit{Soft: 20 * time.Second}))
	outcome, _ := workertest.Call(context.Background(), w, "shop.sms", nil, nil)
	fmt.Println(outcome.State)
	// Output:
	// the handler has a deadline: true
	// SUCCESS
}
