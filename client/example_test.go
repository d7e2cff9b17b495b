package client_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/client"
	"github.com/moonladderstudios/mm-orchestrator/results/postgres"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// A program that calls a task, waits for its result, and tells a failure of the task
// from one of its own.
func Example() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	backend, err := postgres.Open(ctx, "db+postgresql://shop:shop@localhost/shop")
	if err != nil {
		log.Fatal(err)
	}
	defer backend.Close()
	c, err := client.New(client.Config{Broker: "amqp://guest:guest@localhost:5672/", Results: backend})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	result, err := c.Send(ctx, client.Task("shop.add", 2, 3), client.Queue("shop"), client.Countdown(10*time.Second))
	switch {
	case errors.Is(err, worker.ErrUnroutable):
		log.Fatal("no such queue: ", err)
	case err != nil:
		log.Fatal(err)
	}
	var sum int
	var failure *client.TaskError
	switch err := result.Get(ctx, &sum); {
	case errors.As(err, &failure):
		log.Printf("the task raised %s\n%s", failure.Exception.Repr(), failure.Traceback)
	case err != nil:
		log.Fatal(err)
	}
}

// In a chain each task gets the result of the one before, in front of its own
// arguments, unless it is immutable. Messages shows what Send would publish: the first
// task, with the others in it.
func ExampleChain() {
	c, err := client.New(client.Config{Broker: "amqp://localhost"})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	order := client.Chain(
		client.Task("shop.reserve", "B-7"),
		client.Task("shop.charge").Kwarg("cents", 990),
		client.Task("shop.thank").Immutable().With(client.Queue("mail")),
	).With(client.LinkError(client.Task("shop.release", "B-7").Immutable()))
	messages, last, err := c.Messages(context.Background(), order)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(len(messages), messages[0].Task, messages[0].Headers["argsrepr"], "to", messages[0].RoutingKey)
	fmt.Println(last.Parent.Parent.ID == messages[0].TaskID)
	// Output:
	// 1 shop.reserve ('B-7',) to celery
	// true
}

// A handler sends further tasks with its own context: the running task is their
// parent.
func ExampleFromWorker() {
	config := worker.Config{Broker: "amqp://localhost", Queues: []string{"shop"}}
	w, err := worker.New(config)
	if err != nil {
		log.Fatal(err)
	}
	c, err := client.New(client.FromWorker(config))
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	worker.Handle(w, "shop.import", func(ctx context.Context, in struct {
		Files []string `celery:"files"`
	}) (string, error) {
		var parts []client.Signature
		for _, file := range in.Files {
			parts = append(parts, client.Task("shop.import_file", file))
		}
		result, err := c.Send(ctx, client.Group(parts...))
		if err != nil {
			return "", worker.RetryIn(time.Second).Because(err)
		}
		return result.ID, nil
	})
	fmt.Println(w.Tasks())
	// Output: [shop.import]
}
