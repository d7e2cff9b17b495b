package workertest_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// The worker needs a valid configuration, but connects to nothing.
func syncWorker() *worker.Worker {
	w, err := worker.New(worker.Config{Broker: "amqp://localhost", Queues: []string{"shop"}})
	if err != nil {
		panic(err)
	}
	worker.Handle(w, "shop.sync", func(_ context.Context, in struct {
		SKU int `celery:"sku"`
	}) (string, error) {
		if in.SKU == 0 {
			return "", worker.Retry{}.Max(2).Because(errors.New("remote is down"))
		}
		return fmt.Sprint("synced ", in.SKU), nil
	})
	return w
}

func ExampleCall() {
	w := syncWorker()
	outcome, err := workertest.Call(context.Background(), w, "shop.sync", nil, workertest.Kwargs(map[string]any{"sku": 7}))
	fmt.Println(outcome.State, string(outcome.Value), err)
	outcome, err = workertest.Call(context.Background(), w, "shop.sync", workertest.Args(0), nil)
	fmt.Println(outcome.State, outcome.Exception.Repr(), err)
	// Output:
	// SUCCESS "synced 7" <nil>
	// RETRY RuntimeError('remote is down') <nil>
}

// Call always makes a first attempt. A message with options, here with the number
// of earlier attempts, is decoded and given to RunTask.
func ExampleDecoded() {
	w := syncWorker()
	message, err := workertest.Decoded(workertest.Message("shop", "shop.sync", workertest.Args(0), nil, workertest.Option("retries", 2)))
	if err != nil {
		fmt.Println(err)
		return
	}
	outcome, err := w.RunTask(context.Background(), message)
	fmt.Println(outcome.State, outcome.Exception.Repr(), err)
	// Output:
	// FAILURE RuntimeError('remote is down') <nil>
}
