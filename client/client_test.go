package client_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/goleak"

	"github.com/moonladderstudios/mm-orchestrator/client"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/results"
	"github.com/moonladderstudios/mm-orchestrator/results/postgres"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testEnv is a virtual host of the test's own, with a client of the queues of the
// captured programs.
type testEnv struct {
	t       testing.TB
	url     string
	client  *client.Client
	channel *amqp.Channel
}

func newTestEnv(t testing.TB, backend results.Backend) *testEnv {
	t.Helper()
	e := &testEnv{t: t, url: devenv.Broker(t)}
	conn, err := amqp.Dial(e.url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if e.channel, err = conn.Channel(); err != nil {
		t.Fatal(err)
	}
	e.client = e.newClient(func(c *client.Config) { c.Results = backend })
	return e
}

func (e *testEnv) newClient(change func(*client.Config)) *client.Client {
	e.t.Helper()
	config := client.Config{
		Broker: e.url, DefaultQueue: "orders",
		TaskQueues: []worker.Queue{{Name: "orders"}, {Name: "mail", Exchange: "shop", RoutingKey: "mail.send"}},
	}
	change(&config)
	c, err := client.New(config)
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(c.Close)
	return c
}

// take removes all messages from the queues and returns them.
func (e *testEnv) take(queues ...string) []amqp.Delivery {
	e.t.Helper()
	var all []amqp.Delivery
	for _, queue := range queues {
		for {
			d, ok, err := e.channel.Get(queue, true)
			if err != nil {
				e.t.Fatal(err)
			}
			if !ok {
				break
			}
			all = append(all, d)
		}
	}
	return all
}

func TestWhatNoQueueReceivesIsTold(t *testing.T) {
	t.Parallel()
	env := newTestEnv(t, nil)
	if _, err := env.client.Send(t.Context(), add(1, 2)); err != nil {
		t.Fatal(err)
	}
	_, err := env.client.Send(t.Context(), add(1, 2), client.Exchange("amq.direct", "nowhere"))
	if !errors.Is(err, worker.ErrUnroutable) || !strings.Contains(err.Error(), "shop.add") {
		t.Errorf("no queue: %v", err)
	}
	if _, err := env.client.Send(t.Context(), add(1, 2), client.Exchange("missing", "x")); !errors.Is(err, worker.ErrUnroutable) {
		t.Errorf("no exchange: %v", err)
	}
	if err := env.client.Revoke(t.Context(), "id"); !errors.Is(err, worker.ErrUnroutable) {
		t.Errorf("revoke without workers: %v", err)
	}
	strict := env.newClient(func(c *client.Config) { c.RefuseUnknownQueues = true })
	if _, err := strict.Send(t.Context(), add(1, 2), client.Queue("other")); err == nil || !strings.Contains(err.Error(), `"other"`) {
		t.Errorf("unknown queue: %v", err)
	}
	if n := len(env.take("orders")); n != 1 {
		t.Errorf("%d messages", n)
	}
}

func TestRoutesAreThoseOfTheWorker(t *testing.T) {
	t.Parallel()
	env := newTestEnv(t, nil)
	config := worker.Config{
		Broker: env.url, Queues: []string{"orders"}, TaskQueues: []worker.Queue{{Name: "orders"}, {Name: "mail", Exchange: "shop", RoutingKey: "mail.send"}},
		TaskRoutes: []worker.Route{{Task: "shop.mail*", Queue: "mail"}},
	}
	c, err := client.New(client.FromWorker(config))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, s := range []client.Signature{client.Task("shop.mail.send"), add(), client.Task("shop.mail.other").With(client.Queue("orders"))} {
		if _, err := c.Send(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	if mail, orders := env.take("mail"), env.take("orders"); len(mail) != 1 || len(orders) != 2 || mail[0].Headers["task"] != "shop.mail.send" {
		t.Errorf("%d in mail, %d in orders", len(mail), len(orders))
	}
}

// A lost connection costs nothing but time, and an absent broker is told at once.
func TestTheConnectionIsMadeAgain(t *testing.T) {
	t.Parallel()
	env := newTestEnv(t, nil)
	proxy, through := workertest.NewProxy(t, env.url)
	c := env.newClient(func(c *client.Config) { c.Broker = through })
	for range 3 {
		var group sync.WaitGroup
		for range 8 {
			group.Go(func() {
				if _, err := c.Send(t.Context(), add(1, 2)); err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
		proxy.CutOnce()
	}
	proxy.Cut()
	if _, err := c.Send(t.Context(), add(1, 2)); !errors.Is(err, worker.ErrUnreachable) {
		t.Errorf("without a broker: %v", err)
	}
	proxy.Restore()
	if _, err := c.Send(t.Context(), add(1, 2)); err != nil {
		t.Error(err)
	}
	if n := len(env.take("orders")); n < 25 {
		t.Errorf("%d messages", n)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	proxy.Stall()
	if _, err := c.Send(ctx, add(1, 2)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("broker that does not answer: %v", err)
	}
	proxy.Restore()
	c.Close()
	c.Close()
	if _, err := c.Send(t.Context(), add(1, 2)); !errors.Is(err, client.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestWhatCannotBeSent(t *testing.T) {
	t.Parallel()
	c, err := client.New(client.Config{Broker: "amqp://localhost"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for want, s := range map[string]client.Signature{
		"argument 2 of task shop.add":  add(1, make(chan int)),
		"argument x of task shop.add":  add().Kwarg("x", func() {}),
		"client: a task needs a name":  {},
		" needs a name":                client.Task(""),
		"a task needs a name":          client.Chain(add(), client.Signature{}),
		"task needs a name":            client.Group(add(), client.Chain(client.Signature{}.Kwarg("x", 1))),
		"needs a name":                 add().With(client.Link(client.Signature{})),
		"at least one task":            client.Chain(),
		"is a chord":                   client.Chain(client.Group(add(), add()), add()),
		"task 1 of a chain of 2":       client.Chain(add(), client.Group(add(), client.Chain(client.Group(add(), add()), add()))),
		"callbacks":                    client.Group(add(), add()).With(client.Link(add())),
		"stamp t":                      add().With(client.Stamp("t", make(chan int))),
		"header h":                     client.Chain(add(), add().With(client.Header("h", make(chan int)))),
		"argument 1 of task shop.note": add().With(client.LinkError(client.Task("shop.note", make(chan int)))),
	} {
		if _, _, err := c.Messages(t.Context(), s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	if err := c.Result("x").Get(t.Context(), nil); !errors.Is(err, client.ErrNoResults) {
		t.Errorf("without a backend: %v", err)
	}
	if _, err := client.New(client.Config{Broker: "redis://x"}); err == nil || !strings.Contains(err.Error(), "Broker") {
		t.Errorf("%v", err)
	}
}

// A signature is a value: what is made from it does not change it.
func TestSignaturesAreValues(t *testing.T) {
	t.Parallel()
	c, err := client.New(client.Config{Broker: "amqp://localhost"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	base := client.Chain(add(1, 1).Kwarg("a", 1), add(2)).With(client.Priority(1), client.LinkError(onerr()))
	_ = base.With(client.Priority(9), client.LinkError(onerr()), client.Stamp("a", 1)).Immutable().Kwarg("a", 2)
	ids := map[string]bool{}
	for range 2 {
		messages, _, err := c.Messages(t.Context(), base, client.LinkError(onerr(7)))
		if err != nil {
			t.Fatal(err)
		}
		m := messages[0]
		ids[m.TaskID] = true
		if *m.Properties.Priority != 1 || strings.Count(string(m.Body), "shop.onerr") != 4 || strings.Contains(string(m.Body), `"a": 2`) || m.Headers["stamped_headers"] != nil {
			t.Errorf("%v %s", m.Headers, m.Body)
		}
	}
	if len(ids) != 2 {
		t.Error("a signature that was sent twice has one id")
	}
}

// In a handler the running task is the parent; a worker of this library runs what the
// client sends.
func TestFromAHandler(t *testing.T) {
	t.Parallel()
	backend := &workertest.Results{}
	env := newTestEnv(t, backend)
	config := worker.Config{Broker: env.url, Queues: []string{"orders"}, Results: backend, Slots: 2, Logger: workertest.Logger(t)}
	w, err := worker.New(config)
	if err != nil {
		t.Fatal(err)
	}
	seen := make(chan *protocol.Message, 10)
	worker.Handle(w, "shop.split", func(ctx context.Context, _ struct{}) (string, error) {
		r, err := env.client.Send(ctx, client.Chain(client.Task("shop.part", 1), client.Task("shop.part", 2)))
		if err != nil {
			return "", err
		}
		return r.ID, nil
	})
	worker.Handle(w, "shop.part", func(ctx context.Context, in struct {
		N []int `celery:"*"`
	}) (int, error) {
		seen <- worker.TaskFromContext(ctx).Message
		return len(in.N), nil
	})
	workertest.Start(t, w)
	first, err := env.client.Send(t.Context(), client.Task("shop.split"))
	if err != nil {
		t.Fatal(err)
	}
	last := get[string](t, first)
	equal(t, "last", get[int](t, env.client.Result(last)), 2)
	for _, parent := range []string{first.ID, ""} {
		m := <-seen
		if m.RootID != first.ID || parent != "" && m.ParentID != parent {
			t.Errorf("root %s, parent %s of %s", m.RootID, m.ParentID, first.ID)
		}
	}
}

func TestAGroupCollectsAndAnEarlierRevokedTaskEndsTheWait(t *testing.T) {
	t.Parallel()
	backend := &workertest.Results{}
	c, err := client.New(client.Config{Broker: "amqp://localhost", Results: backend})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, chain, err := c.Messages(t.Context(), client.Chain(add(1), add(2), add(3)))
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- chain.Get(t.Context(), nil) }()
	gone := protocol.NewException("celery.exceptions", "TaskRevokedError", "expired")
	_, err = backend.Store(t.Context(),
		results.Outcome{TaskID: chain.Parent.Parent.ID, State: protocol.StateSuccess},
		results.Outcome{TaskID: chain.Parent.ID, State: protocol.StateRevoked, Exception: &gone})
	if err != nil {
		t.Fatal(err)
	}
	var failure *client.TaskError
	if err := <-ended; !errors.As(err, &failure) || err.Error() != "task "+chain.Parent.ID+" ended with REVOKED: TaskRevokedError: expired" {
		t.Errorf("%v", err)
	}
	// Neither does a group at the chain's end wait, nor one in it.
	group := client.Group(client.Chain(add(3), client.Group(add(4), add(5))), add(6))
	_, end, err := c.Messages(t.Context(), client.Chain(add(1), add(2), group))
	if err != nil {
		t.Fatal(err)
	}
	if _, err = backend.Store(t.Context(), results.Outcome{TaskID: end.Parent.Parent.ID, State: protocol.StateRevoked, Exception: &gone}); err != nil {
		t.Fatal(err)
	}
	patient, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := end.Get(patient, nil); !errors.As(err, &failure) || failure.TaskID != end.Parent.Parent.ID {
		t.Errorf("%v", err)
	}
	short, cancelShort := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancelShort()
	if err := c.Result("unknown").Get(short, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

// An id that celery_taskmeta can never hold costs its own result, and nothing else:
// the worker tries once, and what follows is sent.
func TestAnIDThatTheTableCannotHold(t *testing.T) {
	t.Parallel()
	backend, err := postgres.Open(t.Context(), devenv.Database(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(backend.Close)
	env := newTestEnv(t, backend)
	w, err := worker.New(worker.Config{Broker: env.url, Queues: []string{"orders"}, Results: backend, Logger: workertest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	var runs atomic.Int32
	worker.Handle(w, "shop.add", func(_ context.Context, in struct {
		X int `celery:"x"`
		Y int `celery:"y"`
	}) (int, error) {
		runs.Add(1)
		return in.X + in.Y, nil
	})
	workertest.Start(t, w)
	followed := protocol.NewID()
	_, err = env.client.Send(t.Context(), add(1, 2), client.TaskID(strings.Repeat("x", 200)), client.Link(add(10).With(client.TaskID(followed))))
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "callback", get[int](t, env.client.Result(followed)), 13)
	second, err := env.client.Send(t.Context(), add(1, 1))
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "next task", get[int](t, second), 2)
	equal(t, "runs", runs.Load(), int32(3))
}

// A failure whose arguments only Python can read says so, with the worker's traceback.
func TestFailureThatOnlyPythonCanRead(t *testing.T) {
	t.Parallel()
	results := &workertest.Results{}
	unreadable := errors.New("the exception cannot be read: it contains an object of Python's \"shop.Point\"")
	if _, err := results.Store(t.Context(), protocol.Result{TaskID: "a", State: protocol.StateFailure, Unreadable: unreadable, Traceback: "OutOfStock: Point(1)\n"}); err != nil {
		t.Fatal(err)
	}
	c, err := client.New(client.Config{Broker: "amqp://localhost", Results: results})
	if err != nil {
		t.Fatal(err)
	}
	var failure *client.TaskError
	if err := c.Result("a").Get(t.Context(), nil); !errors.As(err, &failure) || !strings.Contains(err.Error(), unreadable.Error()) || failure.Traceback != "OutOfStock: Point(1)\n" {
		t.Errorf("the failure is %v", err)
	}
}
