package worker_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/client"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/results"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

func TestFailuresShowTheirClass(t *testing.T) {
	t.Parallel()
	type none struct{}
	w := newWorker(t, worker.Config{Broker: "amqp://localhost", Queues: []string{"q"}})
	fails := map[string]func(context.Context, none) (any, error){
		"plain": func(context.Context, none) (any, error) { return nil, errors.New("no such\x00 file") },
		"typed": func(context.Context, none) (any, error) { return nil, worker.Error{Type: "KeyError", Args: []any{"k"}} },
		"wrapped": func(context.Context, none) (any, error) {
			return nil, errors.Join(errors.New("x"), &worker.Error{Type: "ShopError", Module: "shop", Err: errors.New("why")})
		},
		"panic":       func(context.Context, none) (any, error) { panic("at the disco") },
		"unencodable": func(context.Context, none) (any, error) { return make(chan int), nil },
		"retried":     func(context.Context, none) (any, error) { r := worker.RetryIn(time.Second); return nil, &r },
		"ignored":     func(context.Context, none) (any, error) { return nil, worker.Ignore },
		"rejected":    func(context.Context, none) (any, error) { return nil, worker.Reject{Requeue: true} },
	}
	for name, fn := range fails {
		worker.Handle(w, name, fn)
	}
	for name, want := range map[string]struct{ state, exception, traceback string }{
		"plain":       {"FAILURE", `RuntimeError('no such\\x00 file')`, `RuntimeError: no such\x00 file`},
		"typed":       {"FAILURE", `KeyError('k')`, `KeyError: 'k'`},
		"wrapped":     {"FAILURE", `ShopError('why')`, `shop.ShopError: why`},
		"panic":       {"FAILURE", `RuntimeError('panic: at the disco')`, "outcome_test.go"},
		"unencodable": {"FAILURE", `EncodeError(`, "EncodeError"},
		"retried":     {"RETRY", "", "celery.exceptions.Retry: Retry in 1s"},
		"ignored":     {"", "", ""},
		"rejected":    {"", "", ""},
	} {
		got, err := workertest.Call(t.Context(), w, name, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		exception := ""
		if got.Exception != nil {
			exception = got.Exception.Repr()
		}
		if got.State != want.state || !strings.HasPrefix(exception, want.exception) || !strings.Contains(got.Traceback, want.traceback) {
			t.Errorf("%s: got %q %s\n%s\nwant %+v", name, got.State, exception, got.Traceback, want)
		}
	}
}

// panicking panics in each method that the worker calls.
type panicking struct{ in string }

func (p panicking) call(method string) {
	if p.in == method {
		panic("in " + method)
	}
}
func (p panicking) Error() string                { p.call("Error"); return "failed" }
func (p panicking) Is(error) bool                { p.call("Is"); return false }
func (p panicking) As(any) bool                  { p.call("As"); return false }
func (p panicking) Unwrap() error                { p.call("Unwrap"); return nil }
func (p panicking) MarshalJSON() ([]byte, error) { p.call("MarshalJSON"); return []byte("1"), nil }

type panickingText struct{}

func (panickingText) MarshalText() ([]byte, error) { panic("in MarshalText") }

type panickingException struct{ panicking }

func (p panickingException) Exception() protocol.Exception {
	p.call("Exception")
	return protocol.NewException("builtins", "RuntimeError")
}

// A panic in any method of what a handler returned, or of middleware, makes the
// task a failure, which is stored. Before, the message was rejected without a
// row, and the task was PENDING for ever.
func TestPanicInWhatAHandlerReturnedIsAFailure(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	cfg.TrackStarted = true
	w := newWorker(t, cfg)
	type none struct{}
	results := map[string]struct {
		value any
		err   error
	}{
		"Error":             {nil, panicking{"Error"}},
		"Is":                {nil, panicking{"Is"}},
		"As":                {nil, panicking{"As"}},
		"Unwrap":            {nil, panicking{"Unwrap"}},
		"Exception":         {nil, panickingException{panicking{"Exception"}}},
		"Error of wrapped":  {nil, fmt.Errorf("wrapped: %w", errors.Join(panicking{"Unwrap"}))},
		"Error of retry":    {nil, worker.Retry{}.Because(panicking{"Error"})},
		"Error of Err":      {nil, worker.Error{Err: panicking{"Error"}}},
		"argument":          {nil, worker.Error{Args: []any{panicking{"MarshalJSON"}}}},
		"MarshalJSON":       {panicking{"MarshalJSON"}, nil},
		"MarshalJSON below": {map[string]any{"a": []any{panicking{"MarshalJSON"}}}, nil},
		"MarshalText":       {panickingText{}, nil},
		"key":               {map[panickingText]int{{}: 1}, nil},
		"Goexit":            {nil, exiting{}},
	}
	ids := map[string]string{}
	for name, result := range results {
		worker.Handle(w, name, func(context.Context, none) (any, error) { return result.value, result.err })
	}
	worker.Handle(w, "middleware", func(context.Context, none) (any, error) { return nil, nil })
	w.Use(func(next worker.Handler) worker.Handler {
		return worker.HandlerFunc(func(ctx context.Context, task *worker.Task) (any, error) { return next.Handle(ctx, task) })
	})
	var panics atomic.Bool
	w.Use(func(next worker.Handler) worker.Handler {
		if panics.Load() {
			panic("in middleware")
		}
		return next
	})
	workertest.Start(t, w)
	for name := range results {
		ids[name] = r.send(workertest.Message("orders", name, nil, nil))
	}
	for name, id := range ids {
		row := r.result(id, protocol.StateFailure)
		if row.Exception == nil || row.Exception.Type != "RuntimeError" || !strings.Contains(row.Exception.Text(), "that the handler returned") {
			t.Errorf("%s: got %+v", name, row.Exception)
		}
	}
	panics.Store(true)
	r.results.Fail(func(rows []protocol.Result) error {
		if rows[0].State == protocol.StateStarted {
			panic("in the result backend")
		}
		return nil
	})
	row := r.result(r.send(workertest.Message("orders", "middleware", nil, nil)), protocol.StateFailure)
	if text := row.Exception.Text(); text != "panic: in middleware" {
		t.Errorf("middleware: got %s", text)
	}
}

// Middleware that keeps something for each task, such as a limit, needs it to be
// built once.
func TestMiddlewareIsBuiltOncePerTaskName(t *testing.T) {
	t.Parallel()
	w := newWorker(t, worker.Config{Broker: "amqp://localhost", Queues: []string{"q"}})
	var built, ran atomic.Int32
	count := func(next worker.Handler) worker.Handler {
		built.Add(1)
		return worker.HandlerFunc(func(ctx context.Context, task *worker.Task) (any, error) {
			ran.Add(1)
			return next.Handle(ctx, task)
		})
	}
	w.Use(count)
	registerShop(w)
	w.Use(count)
	for range 5 {
		if o, err := workertest.Call(t.Context(), w, "shop.add", workertest.Args(1, 2), nil); err != nil || string(o.Value) != "3" {
			t.Fatalf("%+v, %v", o, err)
		}
	}
	if built.Load() != 2 || ran.Load() != 10 {
		t.Errorf("two middlewares were built %d times and ran %d times for 5 tasks, want 2 and 10", built.Load(), ran.Load())
	}
}

// panickingLog panics at each line about a task, as a handler does that expects an
// attribute of another type.
type panickingLog struct{ lines chan string }

func (l panickingLog) Enabled(context.Context, slog.Level) bool { return true }
func (l panickingLog) WithAttrs([]slog.Attr) slog.Handler       { return l }
func (l panickingLog) WithGroup(string) slog.Handler            { panic("no groups") }
func (l panickingLog) Handle(_ context.Context, r slog.Record) error {
	if strings.HasPrefix(r.Message, "task") && r.NumAttrs() > 0 {
		panic("in the log handler")
	}
	select {
	case l.lines <- r.Message:
	default:
	}
	return nil
}

// The program's log handler may panic: no task is lost, and none runs again.
func TestPanicOfTheLogHandlerLosesNoTask(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	log := panickingLog{make(chan string, 1000)}
	cfg := r.config()
	cfg.Logger = slog.New(log)
	w := newWorker(t, cfg)
	type none struct{}
	var runs atomic.Int32
	worker.Handle(w, "fails", func(context.Context, none) (any, error) { runs.Add(1); return nil, errors.New("no") })
	errback := protocol.NewSignature("told", nil, nil, workertest.Option("task_id", "errback"), workertest.Option("queue", "orders"))
	worker.Handle(w, "told", func(context.Context, struct {
		ID string `celery:"id"`
	}) (any, error) {
		return 1, nil
	})
	stop := workertest.Start(t, w)
	id := r.send(workertest.Message("orders", "fails", nil, nil, workertest.Option("link_error", []json.RawMessage{errback.Text()})))
	r.result(id, protocol.StateFailure)
	r.result("errback", protocol.StateSuccess)
	if err := stop(); err != nil {
		t.Error(err)
	}
	if n := runs.Load(); n != 1 || r.depth("orders") != 0 {
		t.Errorf("the task ran %d times, %d messages remain", n, r.depth("orders"))
	}
	close(log.lines)
	var told bool
	for line := range log.lines {
		told = told || strings.HasPrefix(line, "task failed (the log handler panicked")
	}
	if !told {
		t.Error("no line says that the log handler panicked")
	}
}

// exiting ends the goroutine that asks for its text.
type exiting struct{}

func (exiting) Error() string { runtime.Goexit(); return "" }

func TestTimeLimits(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	registry := prometheus.NewRegistry()
	cfg := r.config()
	cfg.Metrics = registry
	cfg.HardLimitGrace = 50 * time.Millisecond
	w := newWorker(t, cfg)
	registerShop(w)
	release := make(chan struct{})
	w.Register("shop.stubborn", worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) {
		<-release
		return nil, nil
	}))
	workertest.Start(t, w)

	// The error callback is published once, although Python publishes it twice.
	m := workertest.Message("orders", "shop.stubborn", nil, nil,
		workertest.Option("time_limit", 0.2), workertest.Option("link_error", json.RawMessage(
			`{"task": "shop.add", "args": [1, 2], "kwargs": {}, "options": {"task_id": "errback"}, "subtask_type": null, "immutable": true}`)))
	row := r.result(r.send(m))
	if row.Exception == nil || row.Exception.Repr() != "TimeLimitExceeded(0.2)" || row.Traceback != "" {
		t.Errorf("row is %+v, want TimeLimitExceeded without traceback", row)
	}
	// The handler that ignores its limit occupies the only slot.
	if err := w.Health(); err == nil || !strings.Contains(err.Error(), "restart the worker") {
		t.Errorf("health is %v, want an error about the slot", err)
	}
	close(release)
	r.result("errback")
	eventually(t, "the slot is free", func() bool { return w.Health() == nil })
}

// The error callback is published after the handler has returned: it may depend on
// what the handler does before it returns.
func TestHardLimitWaitsForTheHandlerToReturn(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	cfg.Slots = 2 // one for the error callback, if it comes too early
	w := newWorker(t, cfg)
	var ended atomic.Bool
	w.Register("shop.tidy", worker.HandlerFunc(func(ctx context.Context, _ *worker.Task) (any, error) {
		<-ctx.Done()
		time.Sleep(300 * time.Millisecond) // time for an error callback to come too early
		ended.Store(true)
		return nil, context.Cause(ctx)
	}), worker.WithTimeLimit(protocol.TimeLimit{Hard: 200 * time.Millisecond}))
	called := make(chan bool, 1)
	w.Register("shop.failed", worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) {
		called <- ended.Load()
		return nil, nil
	}))
	workertest.Start(t, w)
	id := r.send(workertest.Message("orders", "shop.tidy", nil, nil, workertest.Option("link_error", json.RawMessage(
		`{"task": "shop.failed", "args": [], "kwargs": {}, "options": {"task_id": "errback"}, "subtask_type": null, "immutable": true}`))))
	if !receive(t, "the error callback", called) {
		t.Error("the error callback ran before the handler had returned")
	}
	if row := r.result(id); row.Exception == nil || row.Exception.Repr() != "TimeLimitExceeded(0.2)" {
		t.Errorf("row is %+v, want TimeLimitExceeded", row)
	}
}

func TestSuccessIsKeptWhenARepeatedRunFails(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	w := newWorker(t, r.config())
	registerShop(w)
	workertest.Start(t, w)
	m := workertest.Message("orders", "shop.fail", nil, nil, workertest.Option("link_error", json.RawMessage(
		`{"task": "shop.add", "args": [1, 2], "kwargs": {}, "options": {"task_id": "errback"}, "subtask_type": null, "immutable": true}`)))
	if _, err := r.results.Store(t.Context(), protocol.Result{TaskID: m.TaskID, State: protocol.StateSuccess}); err != nil {
		t.Fatal(err)
	}
	r.send(m)
	r.result(r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 1), nil)))
	if _, sent := r.results.Find("errback"); sent {
		t.Error("the error callback of a task that had succeeded was published")
	}
}

// When a message is delivered again, its error callback has the same id.
func TestErrorCallbackKeepsItsIDWhenPublishedAgain(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	w := newWorker(t, r.config())
	var runs atomic.Int32
	called := make(chan string, 2)
	w.Register("shop.fail", worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) {
		runs.Add(1)
		return nil, errors.New("no")
	}))
	w.Register("shop.failed", worker.HandlerFunc(func(_ context.Context, task *worker.Task) (any, error) {
		called <- task.ID
		return nil, nil
	}))
	workertest.Start(t, w)
	errback := protocol.NewSignature("shop.failed", nil, nil, workertest.Option("queue", "orders"))
	m := workertest.Message("orders", "shop.fail", nil, nil, workertest.Option("link_error", []json.RawMessage{errback.Text()}))
	r.send(m)
	first := receive(t, "error callback", called)
	r.send(m)
	if again := receive(t, "error callback", called); again != first || runs.Load() != 2 {
		t.Errorf("after %d runs the error callback has the ids %s and %s, want the same id", runs.Load(), first, again)
	}
}

func TestFaultsOfTheBackendAreRetried(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	w := newWorker(t, r.config())
	registerShop(w)
	workertest.Start(t, w)
	left := 3
	r.results.Fail(func([]protocol.Result) error {
		if left--; left >= 0 {
			return errors.New("database is unavailable")
		}
		return nil
	})
	if row := r.result(r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil))); row.State != protocol.StateSuccess {
		t.Errorf("row is %s", row.State)
	}
}

func TestPermanentFaultsOfTheBackendAreNotRetried(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	w := newWorker(t, r.config())
	registerShop(w)
	stop := workertest.Start(t, w)
	r.results.Fail(func(rows []protocol.Result) error {
		if rows[0].Task == "shop.mail" {
			return results.Permanent(errors.New("id is too long"))
		}
		return nil
	})
	r.send(workertest.Message("orders", "shop.mail", workertest.Args("bob"), nil))
	r.result(r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil)))
	if err := stop(); err != nil {
		t.Error(err)
	}
	if n := r.depth("orders"); n != 0 {
		t.Errorf("%d messages remain, want none", n)
	}
}

func TestTaskFailsWhenAFollowUpIsUnroutable(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	cfg.RecordTimeout = 200 * time.Millisecond
	w := newWorker(t, cfg)
	registerShop(w)
	stop := workertest.Start(t, w)
	id := r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil, workertest.Option("link", json.RawMessage(
		`{"task": "x.y", "args": [], "kwargs": {}, "options": {"exchange": "amq.topic", "routing_key": "nobody"}, "subtask_type": null, "immutable": true}`))))
	row := r.result(id)
	if text := row.Exception.Repr(); row.State != protocol.StateFailure || !strings.Contains(text, `to exchange "amq.topic" with routing key "nobody"`) {
		t.Errorf("%s %s, want a FAILURE that names exchange and routing key", row.State, text)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if n := r.depth("orders"); n != 0 {
		t.Errorf("%d messages are in the queue, want none", n)
	}
}

func TestTasksWithInvalidFollowUpsFailBeforeTheyRun(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	w := newWorker(t, r.config())
	registerShop(w)
	g := newGatedTask()
	w.Register("shop.gated", g)
	workertest.Start(t, w)
	const (
		chord = `{"task": "celery.chord", "args": [], "kwargs": {"header": [], "body": {}, "kwargs": {}}, "options": {}, "subtask_type": "chord", "immutable": false}`
		group = `{"task": "celery.group", "args": [], "kwargs": {"tasks": []}, "options": {}, "subtask_type": "group", "immutable": false}`
		add   = `{"task": "shop.add", "args": [1], "kwargs": {}, "options": {}, "subtask_type": null, "immutable": false}`
	)
	for name, embed := range map[string]struct{ option, value string }{
		"chord":                  {"link", chord},
		"error callback":         {"link_error", chord},
		"routing key":            {"link", `{"task": "x.y", "args": [], "kwargs": {}, "options": {"exchange": "e", "routing_key": "` + strings.Repeat("k", 300) + `"}, "subtask_type": null, "immutable": true}`},
		"headers":                {"link", `{"task": "x.y", "args": [], "kwargs": {}, "options": {"headers": {"h": "` + strings.Repeat("k", 140000) + `"}}, "subtask_type": null, "immutable": true}`},
		"next step":              {"chain", "[" + add + "," + chord + "]"}, // the first step is the last one here
		"later step":             {"chain", "[" + chord + "," + add + "]"},
		"group that is followed": {"chain", "[" + add + "," + group + "," + add + "]"},
		"member of a chord":      {"chord", chord},
	} {
		row := r.result(r.send(workertest.Message("orders", "shop.gated", nil, nil, workertest.Option(embed.option, json.RawMessage(embed.value)))))
		if row.State != protocol.StateFailure {
			t.Errorf("%s: row is %s, want FAILURE", name, row.State)
		}
	}
	if n := g.runs.Load(); n != 0 {
		t.Errorf("the task ran %d times, want never", n)
	}
	if n := w.Reconnects(); n != 0 {
		t.Errorf("the connection was lost %d times", n)
	}
}

func TestDelayedMessagesDoNotBlockOthers(t *testing.T) {
	t.Parallel()
	for _, queueType := range []string{"", "quorum"} {
		t.Run("queue type "+queueType, func(t *testing.T) {
			t.Parallel()
			r := newTestEnv(t)
			cfg := r.config() // one slot
			cfg.TaskQueues = []worker.Queue{{Name: "orders", Type: queueType}}
			w := newWorker(t, cfg)
			registerShop(w)
			busy := make(chan struct{}, 100)
			w.Register("shop.busy", worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) {
				busy <- struct{}{}
				return nil, worker.Reject{Requeue: true, After: time.Minute}
			}))
			stop := workertest.Start(t, w)
			for range 40 {
				r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil, workertest.Option("countdown", 60)))
			}
			r.send(workertest.Message("orders", "shop.busy", nil, nil))
			receive(t, "the task that asks for a pause runs", busy)
			soon := workertest.Message("orders", "shop.add", workertest.Args(3, 4), nil, workertest.Option("countdown", 0.3))
			r.send(soon)
			r.result(r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil)))
			r.result(soon.TaskID)
			if err := stop(); err != nil {
				t.Error(err)
			}
			// The shutdown requeues delayed messages at once.
			eventually(t, "the 41 delayed messages are in the queue", func() bool { return r.depth("orders") == 41 })
		})
	}
}

func TestRevokedTasksDoNotRun(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	w := newWorker(t, r.config())
	registerShop(w)
	workertest.Start(t, w)
	w.Revoke("unwanted")
	m := workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil, workertest.Option("task_id", "unwanted"))
	row := r.result(r.send(m))
	if row.State != protocol.StateRevoked || row.Exception.Repr() != "TaskRevokedError('revoked')" {
		t.Errorf("row is %s %v", row.State, row.Exception)
	}
}

func TestStartedIsStoredWhenTracked(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	cfg.TrackStarted = true
	w := newWorker(t, cfg)
	registerShop(w)
	worker.Handle(w, "shop.quiet", add, worker.IgnoreResult())
	workertest.Start(t, w)
	quiet := workertest.Message("orders", "shop.quiet", workertest.Args(1, 2), nil)
	quiet.Headers["ignore_result"] = nil
	r.send(quiet)
	id := r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil))
	r.result(id)
	if got, want := r.results.History(id), []string{"STARTED", "SUCCESS"}; !slices.Equal(got, want) {
		t.Errorf("states are %v, want %v", got, want)
	}
	if _, stored := r.results.Find(quiet.TaskID); stored {
		t.Error("a result was stored although it is to be ignored")
	}
}

// Of an ignored result nothing is stored; with StoreErrorsEvenIfIgnored everything is but a
// success, as with Celery's task_store_errors_even_if_ignored.
func TestErrorsOfIgnoredResults(t *testing.T) {
	t.Parallel()
	for _, stored := range []bool{false, true} {
		t.Run(fmt.Sprint("stored ", stored), func(t *testing.T) {
			t.Parallel()
			_, w, _, results := newMemoryEnv(t, func(cfg *worker.Config) { cfg.StoreErrorsEvenIfIgnored = stored })
			registerShop(w)
			retried := make(chan struct{}, 1)
			worker.Handle(w, "shop.flaky", func(ctx context.Context, _ noArgs) (any, error) {
				if worker.TaskFromContext(ctx).Retries == 0 {
					return nil, worker.RetryIn(0)
				}
				retried <- struct{}{}
				return nil, nil
			})
			stop := workertest.Start(t, w)
			w.Revoke("revoked")
			states := map[string]string{"failed": "FAILURE", "revoked": "REVOKED", "expired": "REVOKED", "retried": "RETRY"}
			for id, task := range map[string]string{"failed": "shop.fail", "revoked": "shop.fail", "expired": "shop.fail", "retried": "shop.flaky"} {
				options := []protocol.Member{workertest.Option("task_id", id), workertest.Option("ignore_result", true)}
				if id == "expired" {
					options = append(options, workertest.Option("expires", "2020-01-01T00:00:00+00:00"))
				}
				if err := w.Publish(t.Context(), workertest.Message("orders", task, nil, nil, options...)); err != nil {
					t.Fatal(err)
				}
			}
			receive(t, "the retry", retried)
			eventually(t, "all are received", func() bool { return w.Received() == 5 })
			for id := range states {
				eventually(t, "the task that is "+id+" has a state", func() bool { return !stored || len(results.History(id)) > 0 })
			}
			if err := stop(); err != nil {
				t.Fatal(err)
			}
			for id, state := range states {
				var want []string
				if stored {
					want = []string{state}
				}
				if got := results.History(id); !slices.Equal(got, want) {
					t.Errorf("states of the task that is %s are %v, want %v", id, got, want)
				}
			}
		})
	}
}

func TestUnregisteredTasksAreRequeuedIfConfigured(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	cfg.Unregistered = worker.RequeueUnregistered
	w := newWorker(t, cfg)
	registerShop(w)
	stop := workertest.Start(t, w)
	id := r.send(workertest.Message("orders", "not.here", nil, nil))
	r.result(r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil)))
	if err := stop(); err != nil {
		t.Error(err)
	}
	if _, stored := r.results.Find(id); stored {
		t.Error("a result was stored")
	}
	if n := r.depth("orders"); n != 1 {
		t.Errorf("%d messages are in the queue, want 1", n)
	}
}

func TestRoutes(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	for _, name := range []string{"exact", "pattern", "own", "fallback"} {
		// The declaration differs from the worker's, which publishes nevertheless.
		if _, err := r.channel.QueueDeclare(name, true, false, false, false, amqp.Table{"x-max-length": int32(10)}); err != nil {
			t.Fatal(err)
		}
	}
	cfg := r.config()
	cfg.DefaultQueue = "fallback"
	cfg.TaskRoutes = []worker.Route{{Task: "mail.*", Queue: "pattern"}, {Task: "mail.send", Queue: "exact"}}
	w := newWorker(t, cfg)
	registerShop(w)
	workertest.Start(t, w)
	link := func(task, options string) json.RawMessage {
		return json.RawMessage(`{"task": "` + task + `", "args": [], "kwargs": {}, "options": {` + options + `}, "subtask_type": null, "immutable": true}`)
	}
	r.result(r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil, workertest.Option("link", []json.RawMessage{
		link("mail.send", ""), link("mail.read", ""), link("mail.send", `"queue": "own"`), link("other", ""), link("shop.add", ""),
	}))))
	for name, want := range map[string]int{"exact": 1, "pattern": 1, "own": 1, "fallback": 2} {
		if n := r.depth(name); n != want {
			t.Errorf("queue %s got %d messages, want %d", name, n, want)
		}
	}
}

func TestPanicOfTheBackendLosesNoMessage(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	cfg.RecordTimeout = 50 * time.Millisecond // which bounds the pause before it is requeued, too
	w := newWorker(t, cfg)
	registerShop(w)
	workertest.Start(t, w)
	first := true
	r.results.Fail(func([]protocol.Result) error {
		if first {
			first = false
			panic("backend")
		}
		return nil
	})
	if row := r.result(r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil))); row.State != protocol.StateSuccess {
		t.Errorf("row is %s", row.State)
	}
}

// BenchmarkTasks runs tasks with a real broker, with one slot and with eight, and one
// message at a time.
func BenchmarkTasks(b *testing.B) {
	for _, tt := range []struct {
		name            string
		slots, prefetch int
	}{{"slots=1", 1, 4}, {"slots=8", 8, 32}, {"prefetch=1", 1, 1}} {
		b.Run(tt.name, func(b *testing.B) {
			b.ReportAllocs()
			r := newTestEnv(b)
			cfg := r.config()
			cfg.Logger, cfg.Slots, cfg.Prefetch = nil, tt.slots, tt.prefetch
			w := newWorker(b, cfg)
			registerShop(w)
			if _, err := r.channel.QueueDeclare("orders", true, false, false, false, nil); err != nil {
				b.Fatal(err)
			}
			var last string
			for range b.N {
				last = r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil))
			}
			b.ResetTimer()
			workertest.Start(b, w)
			r.result(last)
		})
	}
}

// slowStates is a result backend in which a state that is no outcome takes 100 ms, or less
// if its task has failed.
type slowStates struct {
	*workertest.Results
	storing, failed chan struct{}
}

func (b *slowStates) Store(ctx context.Context, rows ...protocol.Result) ([]bool, error) {
	if rows[0].State != "PROGRESS" {
		defer close(b.failed)
		return b.Results.Store(ctx, rows...)
	}
	close(b.storing)
	select {
	case <-b.failed:
	case <-time.After(100 * time.Millisecond):
	}
	return b.Results.Store(context.WithoutCancel(ctx), rows...)
}

// A progress report that is slow must not replace the failure: whoever waits for the task
// would wait for ever.
func TestAStateStoredLateDoesNotReplaceTheOutcome(t *testing.T) {
	t.Parallel()
	for name, limit := range map[string]time.Duration{"in another goroutine": 0, "given up": time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			states := &slowStates{storing: make(chan struct{}), failed: make(chan struct{})}
			_, w, c, results := newMemoryEnv(t, func(cfg *worker.Config) {
				states.Results = cfg.Results.(*workertest.Results)
				cfg.Results, cfg.HardLimitGrace = states, time.Millisecond
			})
			updated := make(chan error, 1)
			w.Register("shop.slow", worker.HandlerFunc(func(ctx context.Context, task *worker.Task) (any, error) {
				go func() { updated <- task.UpdateState(context.WithoutCancel(ctx), "PROGRESS", 1) }()
				<-states.storing
				if limit > 0 {
					<-states.failed
				}
				return nil, errors.New("fails")
			}), worker.WithTimeLimit(protocol.TimeLimit{Hard: limit}))
			workertest.Start(t, w)
			sent, err := c.Send(t.Context(), client.Task("shop.slow"))
			if err != nil {
				t.Fatal(err)
			}
			receive(t, "the failure is stored", states.failed)
			if err := <-updated; err != nil {
				t.Error(err)
			}
			if got := results.History(sent.ID); !slices.Equal(got, []string{"PROGRESS", protocol.StateFailure}) {
				t.Errorf("states %v", got)
			}
		})
	}
}

// goexitOnce is a result backend that ends the goroutine of its first caller, as a call of
// t.FailNow in a test's backend does.
type goexitOnce struct {
	*workertest.Results
	done atomic.Bool
}

func (b *goexitOnce) Store(ctx context.Context, rows ...protocol.Result) ([]bool, error) {
	if b.done.CompareAndSwap(false, true) {
		runtime.Goexit()
	}
	return b.Results.Store(ctx, rows...)
}

// A worker of one slot receives in the goroutine that the backend ends.
func TestABackendThatEndsItsGoroutineLosesNoMessage(t *testing.T) {
	t.Parallel()
	for _, task := range []string{"shop.add", "shop.unknown"} {
		t.Run(task, func(t *testing.T) {
			t.Parallel()
			r := newTestEnv(t)
			cfg := r.config()
			cfg.Results = &goexitOnce{Results: r.results}
			w := newWorker(t, cfg)
			registerShop(w)
			stop := workertest.Start(t, w)
			for range 2 {
				r.result(r.send(workertest.Message("orders", task, workertest.Args(1, 2), nil)))
			}
			if err := stop(); err != nil {
				t.Error(err)
			}
			if n := r.depth("orders"); n != 0 {
				t.Errorf("%d messages remain", n)
			}
		})
	}
}
