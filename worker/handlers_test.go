package worker_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/client"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

type noArgs struct{}

func callWorker(t *testing.T) *worker.Worker {
	return newWorker(t, worker.Config{Broker: "amqp://localhost", Queues: []string{"q"}})
}

// attempt calls a task as the attempt after so many retries.
func attempt(t *testing.T, w *worker.Worker, task string, retries int) worker.Outcome {
	t.Helper()
	m, err := workertest.Decoded(workertest.Message("q", task, nil, nil, workertest.Option("retries", retries)))
	if err != nil {
		t.Fatal(err)
	}
	outcome, err := w.RunTask(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	return outcome
}

// What a Retry says about pause and number, with and without a policy.
func TestRetriesSayPauseAndNumber(t *testing.T) {
	t.Parallel()
	busy := errors.New("busy")
	none := worker.RetryPolicy{}
	slow := worker.RetryPolicy{Pause: time.Minute, Max: 1}
	for name, c := range map[string]struct {
		retry   error
		policy  *worker.RetryPolicy
		retries int
		state   string
		pause   time.Duration
	}{
		"defaults":                {worker.Retry{}, nil, 2, "RETRY", 3 * time.Minute},
		"more than three":         {worker.Retry{}, nil, 3, "FAILURE", 0},
		"at once":                 {worker.RetryIn(0), nil, 0, "RETRY", 0},
		"no retry":                {worker.RetryIn(time.Second).Max(0), nil, 0, "FAILURE", 0},
		"one":                     {worker.RetryIn(time.Second).Max(1), nil, 0, "RETRY", time.Second},
		"no limit":                {worker.RetryIn(time.Second).Max(-1), nil, 1000, "RETRY", time.Second},
		"the policy's":            {worker.Retry{}, &slow, 0, "RETRY", time.Minute},
		"the policy's number":     {worker.RetryIn(time.Second), &slow, 1, "FAILURE", 0},
		"more than the policy's":  {worker.RetryIn(time.Second).Max(2), &slow, 1, "RETRY", time.Second},
		"by the policy":           {busy, &none, 2, "RETRY", 3 * time.Minute},
		"by the policy, too many": {busy, &none, 3, "FAILURE", 0},
		"no policy":               {busy, nil, 0, "FAILURE", 0},
	} {
		w := callWorker(t)
		var options []worker.TaskOption
		if c.policy != nil {
			options = append(options, worker.AutoRetry(*c.policy))
		}
		worker.Handle(w, "task", func(context.Context, noArgs) (any, error) { return nil, c.retry }, options...)
		got := attempt(t, w, "task", c.retries)
		if got.State != c.state || got.Retry != nil && got.Retry.Pause() != c.pause {
			t.Errorf("%s: %s %v, want %s after %v", name, got.State, got.Retry, c.state, c.pause)
		}
	}
	w := callWorker(t)
	worker.Handle(w, "task", func(context.Context, noArgs) (any, error) { return nil, worker.RetryIn(1).Max(0) })
	if got := attempt(t, w, "task", 0); !strings.HasPrefix(got.Exception.Repr(), `MaxRetriesExceededError("Can't retry task[`) {
		t.Errorf("without a reason: %s", got.Exception.Repr())
	}
}

func TestBackoffGrowsToItsMaximum(t *testing.T) {
	t.Parallel()
	pauses := func(p worker.RetryPolicy) (all []time.Duration) {
		p.Max = -1
		w := callWorker(t)
		worker.Handle(w, "task", func(context.Context, noArgs) (any, error) { return nil, errors.New("busy") }, worker.AutoRetry(p))
		for _, retries := range []int{0, 1, 2, 3, 100} {
			all = append(all, attempt(t, w, "task", retries).Retry.Pause())
		}
		return all
	}
	s := time.Second
	if got := pauses(worker.RetryPolicy{Backoff: s, BackoffMax: 5 * s, NoJitter: true}); !slices.Equal(got, []time.Duration{s, 2 * s, 4 * s, 5 * s, 5 * s}) {
		t.Errorf("pauses are %v", got)
	}
	if got := pauses(worker.RetryPolicy{Backoff: s, NoJitter: true}); got[4] != 10*time.Minute {
		t.Errorf("without BackoffMax the longest is %v, want Celery's 10 min", got[4])
	}
	if got := pauses(worker.RetryPolicy{Pause: 7 * s}); !slices.Equal(got, []time.Duration{7 * s, 7 * s, 7 * s, 7 * s, 7 * s}) {
		t.Errorf("pauses without back-off are %v", got)
	}
	most := []time.Duration{s, 2 * s, 4 * s, 5 * s, 5 * s}
	var different bool
	for range 20 {
		got := pauses(worker.RetryPolicy{Backoff: s, BackoffMax: 5 * s})
		for i, pause := range got {
			if pause < 0 || pause > most[i] {
				t.Fatalf("a pause with jitter is %v, want at most %v", pause, most[i])
			}
			different = different || pause != most[i]
		}
	}
	if !different {
		t.Error("no pause has jitter")
	}
}

type outOfStock struct{ sku string }

func (e *outOfStock) Error() string { return "no " + e.sku }

func TestPolicyChoosesItsErrors(t *testing.T) {
	t.Parallel()
	busy, broken := errors.New("busy"), errors.New("broken")
	type args struct {
		Kind string `celery:"kind"`
	}
	handler := func(ctx context.Context, in args) (any, error) {
		switch in.Kind {
		case "busy":
			return nil, fmt.Errorf("bank: %w", busy)
		case "broken":
			return nil, broken
		case "stock":
			return nil, &outOfStock{"A"}
		case "panic":
			panic("oh")
		case "reject":
			return nil, worker.Reject{}
		}
		return make(chan int), nil // no form in JSON
	}
	w := callWorker(t)
	worker.Handle(w, "some", handler, worker.AutoRetry(worker.RetryPolicy{For: worker.ErrorIs(busy)}))
	worker.Handle(w, "all", handler, worker.AutoRetry(worker.RetryPolicy{}))
	worker.Handle(w, "most", handler, worker.AutoRetry(worker.RetryPolicy{Never: worker.ErrorAs[*outOfStock]()}))
	worker.Handle(w, "bad", handler, worker.AutoRetry(worker.RetryPolicy{For: func(error) bool { panic("in For") }}))
	for call, want := range map[string]string{
		"some busy": "RETRY", "some broken": "FAILURE", "some panic": "FAILURE",
		"all busy": "RETRY", "all panic": "RETRY", "all wrong": "FAILURE", "all reject": "", "all value": "FAILURE",
		"most broken": "RETRY", "most stock": "FAILURE",
		"bad busy": "FAILURE", "bad panic": "FAILURE",
	} {
		task, kind, _ := strings.Cut(call, " ")
		arguments := workertest.Args(kind)
		if kind == "wrong" {
			arguments = nil
		}
		got, err := workertest.Call(t.Context(), w, task, arguments, nil)
		if err != nil || got.State != want {
			t.Errorf("%s: %q %v, want %q", call, got.State, err, want)
		}
	}
}

func TestErrorsHaveTheirClass(t *testing.T) {
	t.Parallel()
	w := newWorker(t, worker.Config{Broker: "amqp://localhost", Queues: []string{"q"}, ErrorClasses: []worker.ErrorClass{
		{Match: worker.ErrorIs(fs.ErrNotExist), Type: "FileNotFoundError"},
		{Match: worker.ErrorAs[*outOfStock](), Type: "Worse", Module: "shop"},
	}})
	stock := worker.ErrorClass{Match: worker.ErrorAs[*outOfStock](), Module: "shop.errors", Type: "OutOfStock", Args: func(err error) []any {
		var e *outOfStock
		errors.As(err, &e)
		return []any{e.sku, 3}
	}}
	for name, err := range map[string]error{
		"mapped":  fmt.Errorf("order: %w", &outOfStock{"A-7"}),
		"worker":  fmt.Errorf("read: %w", fs.ErrNotExist),
		"typed":   worker.Error{Type: "KeyError", Args: []any{"k"}, Err: &outOfStock{"A-7"}},
		"unknown": errors.New("x"),
		"retried": worker.Retry{}.Because(&outOfStock{"A-7"}),
	} {
		worker.Handle(w, name, func(context.Context, noArgs) (any, error) { return nil, err }, worker.ErrorClasses(stock))
	}
	for name, want := range map[string]string{
		"mapped": "shop.errors OutOfStock('A-7', 3)", "worker": "builtins FileNotFoundError('read: file does not exist')",
		"typed": "builtins KeyError('k')", "unknown": "builtins RuntimeError('x')", "retried": "shop.errors OutOfStock('A-7', 3)",
	} {
		got, err := workertest.Call(t.Context(), w, name, nil, nil)
		if err != nil || got.Exception.Module+" "+got.Exception.Repr() != want {
			t.Errorf("%s: %s %s, %v; want %s", name, got.Exception.Module, got.Exception.Repr(), err, want)
		}
	}
	var stockError *outOfStock
	if got, _ := workertest.Call(t.Context(), w, "mapped", nil, nil); !errors.As(got.Err, &stockError) {
		t.Errorf("the error of the handler is lost: %v", got.Err)
	}
}

// A retry has new arguments as Celery's Task.retry gives them.
func TestRetryReplacesArguments(t *testing.T) {
	t.Parallel()
	type args struct {
		A int `celery:"a"`
		B int `celery:"b,optional"`
		C int `celery:"c,optional"`
	}
	for name, c := range map[string]struct {
		retry        worker.Retry
		args, kwargs string
	}{
		"none":               {worker.RetryIn(0), `[1]`, `{"b": 2, "c": 3}`},
		"args":               {worker.RetryIn(0).Args(7, 8), `[7, 8]`, `{"c": 3}`},
		"kwargs":             {worker.RetryIn(0).Kwargs(map[string]any{"a": 7, "c": 9}), `[7]`, `{"c": 9}`},
		"both":               {worker.RetryIn(0).Args(7).Kwargs(map[string]any{"b": 8}), `[7]`, `{"b": 8}`},
		"fewer":              {worker.RetryIn(0).Args(), `[]`, `{"b": 2, "c": 3}`},
		"no keyword":         {worker.RetryIn(0).Kwargs(nil), `[1]`, `{}`},
		"with other options": {worker.RetryIn(0).Max(9).Queue("other").Args("x"), `["x"]`, `{"b": 2, "c": 3}`},
	} {
		w := callWorker(t)
		worker.Handle(w, "task", func(context.Context, args) (any, error) { return nil, c.retry })
		m, err := workertest.Decoded(workertest.Message("q", "task", workertest.Args(1), workertest.Kwargs(map[string]any{"b": 2, "c": 3})))
		if err != nil {
			t.Fatal(err)
		}
		outcome, err := w.RunTask(t.Context(), m)
		if err != nil || outcome.Retry == nil {
			t.Fatalf("%s: %+v, %v", name, outcome, err)
		}
		again, err := outcome.Retry.Message(m, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		got, err := workertest.Decoded(again)
		if err != nil {
			t.Fatal(err)
		}
		if string(got.RawArgs) != c.args || string(got.RawKwargs) != c.kwargs || got.ETA != nil {
			t.Errorf("%s: %s %s %v, want %s %s at once", name, got.RawArgs, got.RawKwargs, got.ETA, c.args, c.kwargs)
		}
	}
	w := callWorker(t)
	worker.Handle(w, "task", func(context.Context, noArgs) (any, error) { return nil, worker.RetryIn(0).Args(make(chan int)) })
	if got := attempt(t, w, "task", 0); got.State != "FAILURE" || got.Exception.Type != "EncodeError" {
		t.Errorf("an argument without a form: %s %v", got.State, got.Exception)
	}
}

// With a broker: the worker retries by the policy, stores RETRY with the reason, keeps the
// arguments of the retry, and tells OnError of every attempt.
func TestPolicyRetriesWithABroker(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	var mu sync.Mutex
	var failures []string
	cfg.OnError = func(ctx context.Context, f worker.TaskFailure) {
		mu.Lock()
		defer mu.Unlock()
		failures = append(failures, fmt.Sprint(f.State, " ", f.Exception.Repr(), " ", f.Task.Retries, " ", f.Panicked, " ", worker.TaskFromContext(ctx) == f.Task))
		panic("of the program's collector")
	}
	w := newWorker(t, cfg)
	var reasons []string
	r.results.Fail(func(rows []protocol.Result) error {
		if rows[0].State == protocol.StateRetry {
			reasons = append(reasons, rows[0].Exception.Repr())
		}
		return nil
	})
	worker.Handle(w, "shop.pay", func(ctx context.Context, in struct {
		N int `celery:"n"`
	}) (int, error) {
		switch worker.TaskFromContext(ctx).Retries {
		case 0:
			return 0, errors.New("busy")
		case 1:
			return 0, worker.RetryIn(0).Because(errors.New("again")).Args(in.N + 1)
		case 2:
			panic("third")
		}
		return in.N, nil
	}, worker.AutoRetry(worker.RetryPolicy{Backoff: time.Millisecond}))
	workertest.Start(t, w)
	row := r.result(r.send(workertest.Message("orders", "shop.pay", workertest.Args(5), nil)))
	if row.State != "SUCCESS" || string(row.Value) != "6" {
		t.Fatalf("row %+v", row)
	}
	if want := []string{"RuntimeError('busy')", "RuntimeError('again')", "RuntimeError('panic: third')"}; !slices.Equal(reasons, want) {
		t.Errorf("rows RETRY have %v, want %v", reasons, want)
	}
	mu.Lock()
	defer mu.Unlock()
	want := []string{"RETRY RuntimeError('busy') 0 false true", "RETRY RuntimeError('again') 1 false true", "RETRY RuntimeError('panic: third') 2 true true"}
	if !slices.Equal(failures, want) {
		t.Errorf("OnError was told %v, want %v", failures, want)
	}
}

func TestContextHasTheDeadlineOfTheLimit(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		limit protocol.TimeLimit
		want  time.Duration
		class string
	}{
		"none":         {protocol.TimeLimit{}, 0, ""},
		"soft":         {protocol.TimeLimit{Soft: 100 * time.Millisecond, Hard: time.Hour}, 100 * time.Millisecond, "SoftTimeLimitExceeded()"},
		"hard":         {protocol.TimeLimit{Hard: 100 * time.Millisecond}, 100 * time.Millisecond, "TimeLimitExceeded(0.1)"},
		"hard is less": {protocol.TimeLimit{Soft: time.Hour, Hard: 100 * time.Millisecond}, 100 * time.Millisecond, "TimeLimitExceeded(0.1)"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := callWorker(t)
			began := time.Now()
			var deadline time.Time
			worker.Handle(w, "task", func(ctx context.Context, _ noArgs) (any, error) {
				var ok bool
				if deadline, ok = ctx.Deadline(); !ok {
					return nil, nil
				}
				<-ctx.Done()
				return nil, ctx.Err()
			}, worker.WithTimeLimit(c.limit))
			got, err := workertest.Call(t.Context(), w, "task", nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			if c.want == 0 {
				if !deadline.IsZero() || got.State != "SUCCESS" {
					t.Errorf("deadline %v, state %s", deadline, got.State)
				}
				return
			}
			if left := deadline.Sub(began); left < c.want || left > c.want+time.Minute {
				t.Errorf("the deadline is after %v, want %v", left, c.want)
			}
			if got.Exception == nil || got.Exception.Repr() != c.class {
				t.Errorf("failed with %v, want %s", got.Exception, c.class)
			}
		})
	}
}

func TestLoggerAndCustomHeadersOfAHandler(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	w := newWorker(t, worker.Config{Broker: "amqp://localhost", Queues: []string{"q"}, Logger: slog.New(slog.NewJSONHandler(&log, nil))})
	var custom map[string]any
	worker.Handle(w, "task", func(ctx context.Context, _ noArgs) (any, error) {
		worker.Logger(ctx).Info("at work", "n", 1)
		custom = worker.TaskFromContext(ctx).CustomHeaders()
		return nil, nil
	})
	m := workertest.Message("q", "task", nil, nil, workertest.Option("retries", 1), workertest.Option("headers", map[string]any{"tenant": "a", "n": 3}))
	m.Headers["x-death"], m.Headers["x-first-death-queue"], m.Headers["x-delivery-count"] = []any{}, "q", int64(1)
	message, err := workertest.Decoded(m)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.RunTask(t.Context(), message); err != nil {
		t.Fatal(err)
	}
	var line map[string]any
	if err := json.Unmarshal(log.Bytes(), &line); err != nil {
		t.Fatalf("%v: %s", err, log.Bytes())
	}
	if line["task"] != "task" || line["task_id"] != m.TaskID || line["root_id"] != m.TaskID || line["attempt"] != 2.0 || line["n"] != 1.0 {
		t.Errorf("line is %s", log.Bytes())
	}
	if len(custom) != 2 || custom["tenant"] != "a" || custom["n"] != int32(3) {
		t.Errorf("custom headers are %v", custom)
	}
	if worker.Logger(t.Context()) != slog.Default() {
		t.Error("outside of a handler it is another logger than slog.Default")
	}
}

// The goroutine of a handler is also that of its delivery.
func TestHandlerThatEndsItsGoroutineFailsAndFreesItsSlot(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	cfg.Slots = 1
	w := newWorker(t, cfg)
	registerShop(w)
	w.Register("shop.exit", worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) {
		runtime.Goexit()
		return nil, nil
	}))
	w.Register("shop.exit_early", worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) {
		runtime.Goexit()
		return nil, nil
	}), worker.AckEarly())
	workertest.Start(t, w)
	for _, task := range []string{"shop.exit", "shop.exit_early"} {
		row := r.result(r.send(workertest.Message("orders", task, nil, nil)))
		if row.State != protocol.StateFailure || row.Exception == nil || !strings.Contains(row.Exception.Text(), "ended its goroutine without returning") {
			t.Errorf("%s: row is %s, %v", task, row.State, row.Exception)
		}
		if row := r.result(r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil))); row.State != protocol.StateSuccess {
			t.Errorf("the task after %s is %s", task, row.State)
		}
	}
}

// readsRows is a broker that notes, for each message that is published, what the row of
// its task says then.
type readsRows struct {
	broker.Broker
	results *workertest.Results
	states  chan string
}

type publisherReadsRows struct {
	broker.Publisher
	broker *readsRows
}

func (b *readsRows) OpenPublisher(ctx context.Context) (broker.Publisher, error) {
	p, err := b.Broker.OpenPublisher(ctx)
	return &publisherReadsRows{p, b}, err
}

func (p *publisherReadsRows) Publish(ctx context.Context, m protocol.Publishing, declare *broker.Queue) error {
	row, _ := p.broker.results.Find(m.TaskID)
	p.broker.states <- row.State
	return p.Publisher.Publish(ctx, m, declare)
}

// Once the retry is published, it may end in another slot, and its FAILURE must stay.
func TestRetryIsStoredBeforeItIsPublished(t *testing.T) {
	t.Parallel()
	states := make(chan string, 10)
	_, w, c, results := newMemoryEnv(t, func(cfg *worker.Config) {
		cfg.Transport = &readsRows{cfg.Transport, cfg.Results.(*workertest.Results), states}
	})
	w.Register("shop.retry", worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) {
		return nil, worker.RetryIn(0).Max(1)
	}))
	workertest.Start(t, w)
	sent, err := c.Send(t.Context(), client.Task("shop.retry"))
	if err != nil {
		t.Fatal(err)
	}
	if row, err := results.WaitState(t.Context(), sent.ID); err != nil || row.State != protocol.StateFailure {
		t.Errorf("%+v, %v", row, err)
	}
	var last string
	for len(states) > 0 {
		last = <-states // of the retry: the client may publish with the same broker
	}
	if last != protocol.StateRetry {
		t.Errorf("the row says %q when the retry is published", last)
	}
}
