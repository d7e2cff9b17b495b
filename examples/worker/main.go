// Command worker is a first worker: tasks with options, middleware that counts, and a
// graceful stop. Arguments: the broker, and the database for results.
//
// After the first SIGTERM or SIGINT it receives no more, and its running tasks finish.
// After the second one their contexts end, and their messages go back to the queue.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/client"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/results/postgres"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

var errBusy = errors.New("bank is busy")

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: worker BROKER DATABASE")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		slog.Error("worker", "error", err)
		os.Exit(1)
	}
}

func run(broker, database string) error {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	ctx, stop := context.WithCancel(context.Background())
	defer stop()

	// The starts of tasks are counted in a table of their own: see MaxStarts.
	results, err := postgres.OpenConfig(ctx, postgres.Config{URL: database, StartsTable: "celery_task_starts"})
	if err != nil {
		return err
	}
	defer results.Close()
	w, err := worker.New(worker.Config{
		Broker: broker, Queues: []string{"shop"}, Slots: 4, Results: results, Logger: slog.Default(),
		ErrorClasses: []worker.ErrorClass{{Match: worker.ErrorIs(errBusy), Module: "shop.errors", Type: "Busy"}},
	})
	if err != nil {
		return err
	}
	var tasks atomic.Int64
	w.Use(func(next worker.Handler) worker.Handler {
		return worker.HandlerFunc(func(ctx context.Context, task *worker.Task) (any, error) {
			tasks.Add(1)
			return next.Handle(ctx, task)
		})
	})
	register(w)

	go func() {
		<-signals
		stop()
		<-signals
		w.StopNow()
	}()
	err = w.Run(ctx)
	fmt.Println("attempts:", tasks.Load())
	return err
}

type addArgs struct {
	X int `celery:"x"`
	Y int `celery:"y"`
}

func register(w *worker.Worker) {
	worker.Handle(w, "shop.add", func(_ context.Context, in addArgs) (int, error) { return in.X + in.Y, nil }, worker.MaxStarts(3))

	// The bank is busy twice. Each pause is a random part of 100 ms, 200 ms, and so on.
	worker.Handle(w, "shop.charge", func(ctx context.Context, _ struct{}) (int, error) {
		if attempt := worker.TaskFromContext(ctx).Retries + 1; attempt < 3 {
			return 0, errBusy
		}
		return worker.TaskFromContext(ctx).Retries, nil
	}, worker.AutoRetry(worker.RetryPolicy{For: worker.ErrorIs(errBusy), Max: 5, Backoff: 100 * time.Millisecond}))

	// An order is replaced by a chain of as many tasks as it has prices.
	worker.Handle(w, "shop.order", func(_ context.Context, in struct {
		Prices []int `celery:"prices"`
	}) (int, error) {
		steps := []client.Signature{client.Task("shop.add", 0, 0)}
		for _, price := range in.Prices {
			steps = append(steps, client.Task("shop.add", price))
		}
		return 0, worker.Replace(client.Chain(steps...))
	})

	// A report takes its time. It stops early only when the worker waits no longer.
	worker.Handle(w, "shop.report", func(ctx context.Context, _ struct{}) (string, error) {
		fmt.Println("report begins")
		select {
		case <-time.After(time.Second):
			return "written", nil
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
	}, worker.WithTimeLimit(protocol.TimeLimit{Soft: time.Minute}))
}
