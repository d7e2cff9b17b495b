package worker_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/client"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/results/postgres"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker/memory"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// registerReplacing registers tasks that are replaced by others.
func registerReplacing(w *worker.Worker) {
	worker.Handle(w, "shop.add", add)
	worker.Handle(w, "shop.note", func(_ context.Context, in struct {
		Args []any `celery:"*"`
	}) (string, error) {
		return fmt.Sprint(in.Args...), nil
	})
	replacements := map[string]client.Signature{
		"task":   client.Task("shop.add", 2, 3),
		"own id": client.Task("shop.add", 2, 3).With(client.TaskID("of its own")),
		"chain":  client.Chain(client.Task("shop.add", 2, 3), client.Task("shop.add", 10)),
		"fails":  client.Chain(client.Task("shop.add", 2, 3), client.Task("shop.boom"), client.Task("shop.note")),
		"group":  client.Group(client.Task("shop.add", 2, 3), client.Task("shop.add", 4, 5)),
		"wrong":  client.Task("shop.add", make(chan int)),
		"again":  client.Task("shop.replaced", "chain"),
	}
	worker.Handle(w, "shop.boom", func(context.Context, struct {
		Args []any `celery:"*"`
	}) (any, error) {
		return nil, worker.Error{Type: "ValueError", Args: []any{"boom"}}
	})
	worker.Handle(w, "shop.replaced", func(_ context.Context, in struct {
		By string `celery:"by"`
	}) (int, error) {
		return 0, worker.Replace(replacements[in.By])
	})
}

// Whoever waits for a replaced task gets the result of the replacement, in Python too,
// and callbacks, error callbacks and the rest of the chain follow it.
func TestReplacedTaskWithABroker(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	w := newWorker(t, r.config())
	registerReplacing(w)
	workertest.Start(t, w)
	signature := func(task string, args []json.RawMessage, options ...protocol.Member) []protocol.Signature {
		return []protocol.Signature{protocol.NewSignature(task, args, nil, options...)}
	}
	option := workertest.Option
	send := func(by, id string, options ...protocol.Member) string {
		return r.send(workertest.Message("orders", "shop.replaced", workertest.Args(by), nil, append(options,
			option("task_id", id), option("link", signature("shop.note", workertest.Args("linked"), option("task_id", id+" linked"))),
			option("link_error", signature("shop.note", nil, option("task_id", id+" failed"))))...))
	}
	for by, want := range map[string]string{"task": "5", "own id": "5", "chain": "15", "again": "15"} {
		id := send(by, "id of "+by, option("chain", signature("shop.add", workertest.Args(100), option("task_id", "after "+by))))
		if row := r.result(id); row.State != "SUCCESS" || string(row.Value) != want {
			t.Errorf("%s: %s %s, want %s", by, row.State, row.Value, want)
		}
		if row := r.result(id + " linked"); string(row.Value) != `"`+want+` linked"` && string(row.Value) != `"`+want+`linked"` {
			t.Errorf("%s: the callback got %s", by, row.Value)
		}
		var n int
		fmt.Sscan(want, &n)
		if row := r.result("after " + by); string(row.Value) != fmt.Sprint(n+100) || row.RootID != id {
			t.Errorf("%s: the next step is %s with root %s", by, row.Value, row.RootID)
		}
	}
	for by, class := range map[string]string{"fails": "ValueError", "group": "NotImplementedError", "wrong": "EncodeError", "unknown": ""} {
		id := send(by, "id of "+by, option("chain", signature("shop.add", workertest.Args(100), option("task_id", "after "+by), option("reply_to", "client"), option("group_id", "g"))))
		row := r.result(id)
		if row.Exception == nil || class != "" && row.Exception.Type != class {
			t.Errorf("%s: %s %v, want %s", by, row.State, row.Exception, class)
		}
		row = r.result("after " + by)
		if row.State != "FAILURE" || row.ReplyTo != "client" || row.CorrelationID != "after "+by || row.Group != "g" || row.RootID != id {
			t.Errorf("%s: the later step is %+v", by, row)
		}
		r.result(id + " failed")
	}
}

// readFirst is a broker whose worker has read a replacement before its publication returns.
type readFirst struct {
	*memory.Broker
	read func(nesting int32) bool
}

type readFirstPublisher struct {
	broker.Publisher
	broker *readFirst
}

func (b *readFirst) OpenPublisher(ctx context.Context) (broker.Publisher, error) {
	p, err := b.Broker.OpenPublisher(ctx)
	return &readFirstPublisher{p, b}, err
}

func (p *readFirstPublisher) Publish(ctx context.Context, m protocol.Publishing, declare *broker.Queue) error {
	err := p.Publisher.Publish(ctx, m, declare)
	if nesting, _ := m.Headers["replaced_task_nesting"].(int32); nesting > 0 {
		for ctx.Err() == nil && !p.broker.read(nesting) {
			runtime.Gosched()
		}
	}
	return err
}

// A task polls by replacing itself with the same call. The new message has the id, the
// retries and the body of the old one, and is no repetition of it: neither while the old
// one is still unacknowledged, nor when it is delivered again after the end of that.
func TestTaskThatReplacesItselfByTheSameCall(t *testing.T) {
	t.Parallel()
	const rounds = 3
	poll := func(w *worker.Worker, wait func()) *atomic.Int32 {
		var round atomic.Int32
		worker.Handle(w, "shop.poll", func(_ context.Context, in struct {
			Job string `celery:"job"`
		}) (int32, error) {
			n := round.Add(1)
			if n < rounds {
				wait()
				return 0, worker.Replace(client.Task("shop.poll", in.Job))
			}
			return n, nil
		})
		return &round
	}
	send := func(t *testing.T, c *client.Client, s client.Signature) string {
		t.Helper()
		result, err := c.Send(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		return result.ID
	}
	expect := func(t *testing.T, w *worker.Worker, results *workertest.Results, id string, repetitions int) {
		t.Helper()
		var row protocol.Result
		eventually(t, "the task ends, or its message is taken for a repetition", func() bool {
			row, _ = results.Find(id)
			return row.State != "" || w.Attached() > repetitions
		})
		if row.State != protocol.StateSuccess || string(row.Value) != fmt.Sprint(rounds) {
			t.Errorf("the task is %q %s with %d repetitions, want SUCCESS after %d rounds", row.State, row.Value, w.Attached(), rounds)
		}
	}
	t.Run("read before the old one is acknowledged", func(t *testing.T) {
		t.Parallel()
		var b *readFirst
		_, w, c, results := newMemoryEnv(t, func(cfg *worker.Config) {
			b = &readFirst{Broker: cfg.Transport.(*memory.Broker)}
			cfg.Transport = b
		})
		round := poll(w, func() {})
		b.read = func(nesting int32) bool { return round.Load() > nesting || w.Attached() > 0 }
		workertest.Start(t, w)
		expect(t, w, results, send(t, c, client.Task("shop.poll", "7")), 0)
	})
	t.Run("delivered again after the end of the old one", func(t *testing.T) {
		t.Parallel()
		b, w, c, results := newMemoryEnv(t, func(cfg *worker.Config) { cfg.Slots, cfg.Prefetch = 1, 4 })
		g, polling, proceed := newGatedTask(), make(chan struct{}, rounds), make(chan struct{})
		w.Register("shop.gated", g)
		poll(w, func() { polling <- struct{}{}; <-proceed })
		workertest.Start(t, w)
		id := send(t, c, client.Task("shop.poll", "7"))
		receive(t, "the first round", polling)
		send(t, c, client.Task("shop.gated"))
		eventually(t, "the other task waits for the slot", func() bool { return len(w.Unacked()) == 2 })
		close(proceed)
		receive(t, "the other task has the slot", g.began)
		eventually(t, "the replacement waits", func() bool { return len(w.Unacked()) == 2 || w.Attached() > 0 })
		b.Disconnect()
		eventually(t, "the worker consumes again", func() bool { return w.Reconnects() == 1 && w.Attached() > 0 })
		close(g.release)
		expect(t, w, results, id, 1)
	})
}

// Each round of a task that replaces itself by a chain has tasks of its own: the failure of
// a later one is recorded, and its error callback is sent.
func TestTaskThatReplacesItselfByAChain(t *testing.T) {
	t.Parallel()
	_, w, c, results := newMemoryEnv(t, nil)
	var asked atomic.Int32
	worker.Handle(w, "shop.ask", func(context.Context, noArgs) (bool, error) {
		if n := asked.Add(1); n < 3 {
			return false, nil
		}
		return false, worker.Error{Type: "ValueError", Args: []any{"no answer"}}
	})
	worker.Handle(w, "shop.poll", func(context.Context, struct {
		Done bool `celery:"done"`
	}) (any, error) {
		return nil, worker.Replace(client.Chain(client.Task("shop.ask"), client.Task("shop.poll")))
	})
	worker.Handle(w, "shop.told", func(_ context.Context, in struct {
		ID string `celery:"id"`
	}) (string, error) {
		return in.ID, nil
	})
	workertest.Start(t, w)
	result, err := c.Send(t.Context(), client.Task("shop.poll", false), client.LinkError(client.Task("shop.told").With(client.TaskID("told"))))
	if err != nil {
		t.Fatal(err)
	}
	var row, told protocol.Result
	eventually(t, "the task and its error callback end", func() bool {
		row, _ = results.Find(result.ID)
		told, _ = results.Find("told")
		return row.State != "" && told.State != ""
	})
	if row.State != protocol.StateFailure || row.Exception.Repr() != "ValueError('no answer')" {
		t.Errorf("the task is %q %v, want the failure of the third question", row.State, row.Exception)
	}
	if failed, _ := results.Find(strings.Trim(string(told.Value), `"`)); told.State != protocol.StateSuccess || failed.Task != "shop.ask" || failed.State != protocol.StateFailure {
		t.Errorf("the error callback is %q and was told of %+v", told.State, failed)
	}
}

const replacingCaller = `
import sys
from celery import Celery
app = Celery("shop", broker=sys.argv[1], backend=sys.argv[2])
app.conf.task_default_queue = "orders"
app.conf.broker_transport_options = {"confirm_publish": True}
replaced = app.signature("shop.replaced", args=("chain",))
add = lambda *args: app.signature("shop.add", args=args)
result = (replaced | add(100)).apply_async()
print(result.get(timeout=60), result.parent.get(timeout=60))
print(app.send_task("shop.replaced", args=("task",)).get(timeout=60))
retried = app.send_task("shop.parent", args=(3,))
print(retried.get(timeout=60), [child.get(timeout=60) for child in retried.children])
`

func TestPythonGetsTheResultOfAReplacement(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"5.4.0", "5.7.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			r := newTestEnv(t)
			cfg := r.config()
			backend, url := newPostgres(t)
			cfg.Results = backend
			w := newWorker(t, cfg)
			registerReplacing(w)
			registerParent(t, w, cfg, r)
			workertest.Start(t, w)
			output, err := exec.CommandContext(t.Context(), devenv.Celery(t, version), "-W", "ignore", "-c", replacingCaller, r.url, url).CombinedOutput()
			want := "115 15\n5\n3 [7]\n"
			if version == "5.4.0" {
				want = "115 15\n5\n" // it has no children in the database
			}
			if got := string(output); !strings.HasPrefix(got, want) || version != "5.4.0" && err != nil {
				t.Errorf("%v: %s", err, output)
			}
		})
	}
}

// registerParent registers a task that sends others with its context.
func registerParent(t *testing.T, w *worker.Worker, cfg worker.Config, r *testEnv) {
	c, err := client.New(client.FromWorker(cfg))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	worker.Handle(w, "shop.parent", func(ctx context.Context, in struct {
		N int `celery:"n"`
	}) (int, error) {
		task := worker.TaskFromContext(ctx)
		if in.N == 3 {
			_, err := c.Send(ctx, client.Task("shop.add", 3, 4))
			return 3, err
		}
		if task.Retries == 0 {
			if _, err := c.Send(ctx, client.Task("shop.add", 1, 1), client.TaskID("c1")); err != nil {
				return 0, err
			}
			if err := task.UpdateState(ctx, "PROGRESS", nil); err != nil {
				return 0, err
			}
			return 0, worker.RetryIn(0)
		}
		chain := client.Chain(client.Task("shop.add", 1, 1).With(client.TaskID("first")), client.Task("shop.add", 1).With(client.TaskID("second")))
		for _, s := range []client.Signature{client.Task("shop.add", 1, 1).With(client.TaskID("c2")), chain, client.Group(
			client.Task("shop.add", 1, 1).With(client.TaskID("m1")),
			client.Chain(client.Task("shop.add", 1, 1).With(client.TaskID("m2a")), client.Task("shop.add", 1).With(client.TaskID("m2b")))).With(client.TaskID("g"))} {
			if _, err := c.Send(ctx, s); err != nil {
				return 0, err
			}
		}
		if in.N == 1 {
			return 0, worker.Error{Type: "ValueError"}
		}
		return 1, nil
	})
}

// What a handler has sent are the children of its row, in each state and as Celery writes
// them: of a chain the first task, of a group the members with what is before them.
func TestChildrenOfAHandler(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	var rows []string
	r.results.Fail(func(all []protocol.Result) error {
		if all[0].Task == "shop.parent" {
			rows = append(rows, all[0].State+" "+string(all[0].Children))
		}
		return nil
	})
	w := newWorker(t, cfg)
	worker.Handle(w, "shop.add", add)
	registerParent(t, w, cfg, r)
	workertest.Start(t, w)
	sent := `[["c2", null], null], [["first", null], null], [["g", null], [[["m1", null], null], [["m2b", [["m2a", null], null]], null]]]`
	for n, want := range map[int][]string{
		0: {`PROGRESS [[["c1", null], null]]`, `RETRY [[["c1", null], null], [["p0", null], null]]`, `SUCCESS [` + sent + `, [["linked", null], null]]`},
		1: {`PROGRESS [[["c1", null], null]]`, `RETRY [[["c1", null], null], [["p1", null], null]]`, `FAILURE [` + sent + `]`},
	} {
		rows = nil
		r.result(r.send(workertest.Message("orders", "shop.parent", workertest.Args(n), nil, workertest.Option("task_id", fmt.Sprint("p", n)),
			workertest.Option("link", []protocol.Signature{protocol.NewSignature("shop.add", workertest.Args(1), nil, workertest.Option("task_id", "linked"))}))))
		if !slices.Equal(rows, want) {
			t.Errorf("rows of %d\ngot  %s\nwant %s", n, strings.Join(rows, "\n     "), strings.Join(want, "\n     "))
		}
	}
}

// Without a broker the same happens.
func TestReplacedTaskInWorkertest(t *testing.T) {
	t.Parallel()
	for by, want := range map[string]string{"task": "SUCCESS 5 105", "chain": "SUCCESS 15 115", "again": "SUCCESS 15 115", "group": "FAILURE NotImplementedError", "fails": "FAILURE ValueError"} {
		w := callWorker(t)
		registerReplacing(w)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		canvas, err := workertest.Run(ctx, w, client.Chain(client.Task("shop.replaced", by).With(client.TaskID("r")), client.Task("shop.add", 100).With(client.TaskID("after"))))
		if err != nil {
			t.Fatal(err)
		}
		row, _ := canvas.Results.Find("r")
		after, _ := canvas.Results.Find("after")
		got := fmt.Sprint(row.State, " ", string(row.Value), " ", string(after.Value))
		if row.Exception != nil {
			got = row.State + " " + row.Exception.Type
		}
		if got != want || after.State != row.State {
			t.Errorf("%s: %s and then %s, want %s", by, got, after.State, want)
		}
	}
}

// newPostgres returns a result backend in a database of the test's own, and its address
// for Celery.
func newPostgres(t *testing.T) (*postgres.Backend, string) {
	t.Helper()
	database := devenv.Database(t)
	backend, err := postgres.Open(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(backend.Close)
	return backend, strings.Replace(database, "postgres://", "db+postgresql+psycopg2://", 1)
}
