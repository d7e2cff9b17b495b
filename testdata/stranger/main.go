// Command stranger is a program of somebody else: it is outside of this project's
// module and uses only what the module exports. It runs a worker and a client against
// the broker and the database that its arguments name, and prints what they did.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/client"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/results"
	"github.com/moonladderstudios/mm-orchestrator/results/postgres"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

func main() {
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(broker, database string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	backend, err := postgres.Open(ctx, database)
	if err != nil {
		return err
	}
	defer backend.Close()

	config := worker.Config{
		Broker: broker, Queues: []string{"shop"}, Results: backend, Slots: 4,
		TaskRoutes: []worker.Route{{Task: "shop.*", Queue: "shop"}},
	}
	w, err := newWorker(config)
	if err != nil {
		return err
	}
	working, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- w.Run(working) }()

	c, err := client.New(client.FromWorker(config))
	if err != nil {
		return err
	}
	defer c.Close()
	if err := use(ctx, c); err != nil {
		return err
	}
	stop()
	return <-ended
}

// newWorker registers a handler of each form.
func newWorker(config worker.Config) (*worker.Worker, error) {
	w, err := worker.New(config)
	if err != nil {
		return nil, err
	}
	w.Use(func(next worker.Handler) worker.Handler {
		return worker.HandlerFunc(func(ctx context.Context, task *worker.Task) (any, error) { return next.Handle(ctx, task) })
	})
	worker.Handle(w, "shop.add", func(_ context.Context, in addArgs) (int, error) { return in.X + in.Y, nil })
	worker.Handle(w, "shop.order", func(_ context.Context, in struct {
		SKU string `celery:"sku"`
	}) (string, error) {
		return "", &worker.Error{Module: "shop.errors", Type: "OutOfStock", Args: []any{in.SKU}}
	})
	w.Register("shop.sum", worker.FromGocelery(&sum{}))
	w.Register("shop.double", worker.Func(func(n int) int { return 2 * n }))
	return w, nil
}

type addArgs struct {
	X int `celery:"x"`
	Y int `celery:"y"`
}

// sum is a task as it was written for gocelery.
type sum struct{ a, b int }

func (s *sum) ParseKwargs(kwargs map[string]interface{}) error {
	a, okA := kwargs["a"].(float64)
	b, okB := kwargs["b"].(float64)
	if !okA || !okB {
		return errors.New("a and b are needed")
	}
	s.a, s.b = int(a), int(b)
	return nil
}

func (s *sum) RunTask() (interface{}, error) { return s.a + s.b, nil }

// use sends tasks and prints their results.
func use(ctx context.Context, c *client.Client) error {
	var n int
	added, err := c.Send(ctx, client.Task("shop.add", 2, 3), client.Countdown(20*time.Millisecond))
	if err != nil {
		return err
	}
	if err := added.Get(ctx, &n); err != nil {
		return err
	}
	fmt.Println("add:", n)

	chain, err := c.Send(ctx, client.Chain(client.Task("shop.add", 1, 2), client.Task("shop.double"), client.Task("shop.add", 100)))
	if err != nil {
		return err
	}
	if err := chain.Get(ctx, &n); err != nil {
		return err
	}
	fmt.Println("chain:", n)

	var list []int
	group, err := c.Send(ctx, client.Group(client.Task("shop.double", 5), client.Task("shop.sum").Kwarg("a", 20).Kwarg("b", 3)))
	if err != nil {
		return err
	}
	if err := group.Get(ctx, &list); err != nil {
		return err
	}
	fmt.Println("group:", list)

	failed, err := c.Send(ctx, client.Task("shop.order").Kwarg("sku", "B"))
	if err != nil {
		return err
	}
	var failure *client.TaskError
	if err := failed.Get(ctx, nil); !errors.As(err, &failure) {
		return fmt.Errorf("got %v, want a failure", err)
	}
	fmt.Println("failure:", failure.Exception.Repr())

	var outcome results.Outcome
	if outcome, err = added.Outcome(ctx); err != nil {
		return err
	}
	fmt.Println("stored:", outcome.State == protocol.StateSuccess, outcome.Task, string(outcome.Args))
	return nil
}
