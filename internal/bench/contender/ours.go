package contender

import (
	"context"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"

	"github.com/moonladderstudios/mm-orchestrator/results/postgres"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

type argument struct {
	Value int64 `celery:"value"`
}

// Ours runs a worker of package worker until SIGTERM, with its defaults except for
// what s says.
func Ours(s Spec) error {
	p, err := s.open()
	if err != nil {
		return err
	}
	go endWithParent()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	config := worker.Config{
		Broker: s.Broker, Queues: []string{s.Queue}, Slots: s.Slots, Prefetch: s.Prefetch,
		Logger: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
	if s.Results {
		// As Celery without result_extended, which is its default and what the others store.
		backend, err := postgres.OpenConfig(ctx, postgres.Config{
			URL: s.Database, KeepTables: true, Connections: s.Slots, OmitRequest: true,
		})
		if err != nil {
			return err
		}
		defer backend.Close()
		config.Results = backend
	}
	w, err := worker.New(config)
	if err != nil {
		return err
	}
	worker.Handle(w, Noop, func(_ context.Context, in argument) (int64, error) { return in.Value, nil })
	worker.Handle(w, Timed, func(_ context.Context, in argument) (int64, error) { return 0, p.age(in.Value) })
	mark := func(context.Context, argument) (int64, error) {
		if err := p.line("value", int64(runtime.NumGoroutine())); err != nil {
			return 0, err
		}
		return 0, p.mark()
	}
	worker.Handle(w, Mark, mark)
	worker.Handle(w, Rest, func(ctx context.Context, in argument) (int64, error) {
		debug.FreeOSMemory() // what is garbage already says nothing about what is kept
		return mark(ctx, in)
	})
	return w.Run(ctx)
}
