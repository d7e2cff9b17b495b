// Command chain calls tasks of the worker in the folder beside it: a chain, a task that
// is retried, one that is replaced, and one that takes longer than this program waits for.
// Arguments: the broker, and the database for results.
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/client"
	"github.com/moonladderstudios/mm-orchestrator/results/postgres"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: chain BROKER DATABASE")
		os.Exit(2)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := run(ctx, os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, broker, database string) error {
	results, err := postgres.Open(ctx, database)
	if err != nil {
		return err
	}
	defer results.Close()
	c, err := client.New(client.Config{Broker: broker, DefaultQueue: "shop", Results: results})
	if err != nil {
		return err
	}
	defer c.Close()
	for _, call := range []struct {
		what string
		task client.Signature
	}{
		{"chain", client.Chain(client.Task("shop.add", 1, 2), client.Task("shop.add", 10), client.Task("shop.add", 100))},
		{"retries", client.Task("shop.charge")},
		{"order", client.Task("shop.order", []int{5, 7, 30})},
	} {
		result, err := c.Send(ctx, call.task)
		if err != nil {
			return err
		}
		var n int
		if err := result.Get(ctx, &n); err != nil {
			return err
		}
		fmt.Println(call.what+":", n)
	}
	report, err := c.Send(ctx, client.Task("shop.report"))
	if err != nil {
		return err
	}
	fmt.Println("report:", report.ID)
	return nil
}
