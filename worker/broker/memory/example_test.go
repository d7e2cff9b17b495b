package memory_test

import (
	"context"
	"fmt"

	"github.com/moonladderstudios/mm-orchestrator/client"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker/memory"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// A worker and a client in one process, without a server.
func Example() {
	config := worker.Config{Transport: memory.New(), Queues: []string{"shop"}, Results: &workertest.Results{}}
	w, err := worker.New(config)
	if err != nil {
		fmt.Println(err)
		return
	}
	worker.Handle(w, "shop.add", func(_ context.Context, in struct {
		X int `celery:"x"`
		Y int `celery:"y"`
	}) (int, error) {
		return in.X + in.Y, nil
	})
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	ended := make(chan error)
	go func() { ended <- w.Run(ctx) }()

	c, err := client.New(client.FromWorker(config))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer c.Close()
	result, err := c.Send(ctx, client.Chain(client.Task("shop.add", 1, 2), client.Task("shop.add", 3)))
	if err != nil {
		fmt.Println(err)
		return
	}
	var sum int
	if err := result.Get(ctx, &sum); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(sum)
	stop()
	fmt.Println(<-ended)
	// Output:
	// 6
	// <nil>
}
