package worker_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/results"
	"github.com/moonladderstudios/mm-orchestrator/results/postgres"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// deadly is the environment of a process that is a worker whose task kills it: broker and
// database.
const deadly = "WORKER_TEST_DEADLY"

// TestDeadlyWorker is no test: it is the worker of TestTaskThatKillsItsWorkerEnds.
func TestDeadlyWorker(t *testing.T) {
	broker, database, ok := strings.Cut(os.Getenv(deadly), " ")
	if !ok {
		t.Skip("it is for a process of another test")
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	backend, err := postgres.OpenConfig(ctx, postgres.Config{URL: database, StartsTable: "celery_task_starts"})
	if err != nil {
		t.Fatal(err)
	}
	defer backend.Close()
	w := newWorker(t, worker.Config{Broker: broker, Queues: []string{"orders"}, Results: backend, DeadLetterQueue: "dead", Logger: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	worker.Handle(w, "shop.deadly", func(context.Context, noArgs) (any, error) {
		return nil, syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}, worker.MaxStarts(2))
	worker.Handle(w, "shop.failed", func(context.Context, struct {
		ID string `celery:"id"`
	}) (any, error) {
		cancel()
		return nil, nil
	})
	if err := w.Run(ctx); err != nil {
		t.Fatal(err)
	}
}

// A task that kills its worker fails after so many starts, in whichever process: with the
// reason, for the later steps of its chain too, with its error callback, and its message
// is a dead letter.
func TestTaskThatKillsItsWorkerEnds(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	database := devenv.Database(t)
	backend, err := postgres.OpenConfig(t.Context(), postgres.Config{URL: database, StartsTable: "celery_task_starts"})
	if err != nil {
		t.Fatal(err)
	}
	defer backend.Close()
	if _, err := r.channel.QueueDeclare("orders", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := r.channel.QueueDeclare("dead", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	dead, err := r.channel.Consume("dead", "", true, false, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	signature := func(task, id string) []protocol.Signature {
		return []protocol.Signature{protocol.NewSignature(task, nil, nil, workertest.Option("task_id", id), workertest.Option("queue", "orders"))}
	}
	id := r.send(workertest.Message("orders", "shop.deadly", nil, nil, workertest.Option("link_error", signature("shop.failed", "told")), workertest.Option("chain", signature("shop.next", "next"))))
	for run := 1; run <= 3; run++ {
		command := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestDeadlyWorker$")
		command.Env = append(os.Environ(), deadly+"="+r.url+" "+database)
		output, err := command.CombinedOutput()
		var exit *exec.ExitError
		killed := errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
		if killed != (run <= 2) || !killed && err != nil {
			t.Fatalf("worker %d ended with %v: %s", run, err, output)
		}
	}
	rows, err := backend.Load(t.Context(), id, "next", "told")
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range rows[:2] {
		if row.Exception == nil || row.Exception.Repr() != "WorkerLostError('Worker exited prematurely: the task was started 2 times, and no worker lived to its end.')" {
			t.Errorf("row %+v", row)
		}
	}
	if rows[2].State != "SUCCESS" {
		t.Errorf("the error callback is %s", rows[2].State)
	}
	letter := receive(t, "the dead letter", (<-chan amqp.Delivery)(dead))
	if reason, _ := letter.Headers[worker.HeaderReason].(string); letter.CorrelationId != id || !strings.Contains(reason, "started 2 times") {
		t.Errorf("dead letter %s: %v", letter.CorrelationId, letter.Headers)
	}
	if n, err := backend.CountStart(t.Context(), results.Start{TaskID: id, Attempt: "0.0"}); err != nil || n != 1 {
		t.Errorf("the count is %d, %v after the end of the task, want 1", n, err)
	}
}

// Only deaths count: ends of every other kind do not, and a retry begins at zero.
func TestStartsThatEndAreForgotten(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	w := newWorker(t, r.config())
	var runs atomic.Int32
	worker.Handle(w, "shop.again", func(ctx context.Context, _ noArgs) (int32, error) {
		switch n := runs.Add(1); {
		case n <= 3:
			return 0, worker.Reject{Requeue: true}
		case worker.TaskFromContext(ctx).Retries < 3:
			return 0, worker.RetryIn(0).Max(3)
		default:
			return n, nil
		}
	}, worker.MaxStarts(1))
	workertest.Start(t, w)
	id := r.send(workertest.Message("orders", "shop.again", nil, nil))
	if row := r.result(id); row.State != "SUCCESS" || string(row.Value) != "7" {
		t.Fatalf("row %+v", row)
	}
	// The worker of a first start has died.
	start := results.Start{TaskID: "died", Attempt: "0.0"}
	if _, err := r.results.CountStart(t.Context(), start); err != nil {
		t.Fatal(err)
	}
	row := r.result(r.send(workertest.Message("orders", "shop.again", nil, nil, workertest.Option("task_id", "died"))))
	if row.Exception == nil || row.Exception.Type != "WorkerLostError" || runs.Load() != 7 {
		t.Errorf("after %d runs: %+v", runs.Load(), row)
	}
}

// A hard time limit that is requeued counts as a start without an end.
func TestRequeuedTimeoutsCount(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	w := newWorker(t, r.config())
	var runs atomic.Int32
	worker.Handle(w, "shop.slow", func(ctx context.Context, _ noArgs) (any, error) {
		runs.Add(1)
		<-ctx.Done()
		return nil, ctx.Err()
	}, worker.MaxStarts(2), worker.RequeueTimeouts(), worker.WithTimeLimit(protocol.TimeLimit{Hard: 1}))
	workertest.Start(t, w)
	if row := r.result(r.send(workertest.Message("orders", "shop.slow", nil, nil))); row.Exception == nil || row.Exception.Type != "WorkerLostError" || runs.Load() != 2 {
		t.Errorf("after %d runs: %+v", runs.Load(), row)
	}
}

// plainResults is a backend that counts no starts.
type plainResults struct{ results.Backend }

func TestMaxStartsNeedsABackendThatCounts(t *testing.T) {
	t.Parallel()
	database := devenv.Database(t)
	backend, err := postgres.Open(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer backend.Close()
	for name, b := range map[string]results.Backend{"none": nil, "plain": plainResults{}, "no table": backend} {
		w := newWorker(t, worker.Config{Broker: "amqp://127.0.0.1:1", Queues: []string{"q"}, Results: b})
		worker.Handle(w, "task", func(context.Context, noArgs) (any, error) { return nil, nil }, worker.MaxStarts(1))
		if err := w.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "MaxStarts") || !strings.Contains(fmt.Sprint(err), "StartsTable") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
