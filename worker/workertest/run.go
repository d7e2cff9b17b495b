package workertest

import (
	"context"
	"encoding/json"
	"log/slog"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// Call runs the handler of a task without a broker, with the worker's middleware and
// time limits, and returns the outcome. It publishes and stores nothing. The
// error says that the task is not registered or that the arguments do not make a
// message.
func Call(ctx context.Context, w *worker.Worker, task string, args []json.RawMessage, kwargs protocol.Object) (worker.Outcome, error) {
	message, err := Decoded(Message("workertest", task, args, kwargs))
	if err != nil {
		return worker.Outcome{}, err
	}
	return w.RunTask(ctx, message)
}

// Start runs a worker until the test ends, and returns when the worker consumes. At
// the end of the test it stops the worker without waiting for running tasks, and
// an error of Run fails the test. stop does this earlier and returns Run's error.
func Start(t testing.TB, w *worker.Worker) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	var result error
	go func() {
		defer close(ended)
		result = w.Run(ctx)
	}()
	stop = func() error {
		cancel()
		w.StopNow()
		<-ended
		return result
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Errorf("worker ended with: %v", err)
		}
	})
	select {
	case <-w.Started():
	case <-ended:
		t.Fatalf("worker did not start: %v", result)
	case <-time.After(30 * time.Second):
		t.Fatal("worker did not start within 30 s")
	}
	return stop
}

// Logger returns a logger that writes to the test's log.
func Logger(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}
