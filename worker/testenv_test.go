package worker_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/internal/wire"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// testEnv is a virtual host of the test's own, with a connection for publishing and
// inspecting.
type testEnv struct {
	t       testing.TB
	url     string
	results *workertest.Results
	channel *amqp.Channel
	conn    *amqp.Connection
	stop    func() error // stops the worker, in tests that set it
}

func newTestEnv(t testing.TB) *testEnv {
	t.Helper()
	return newTestEnvAt(t, devenv.Broker(t))
}

func newTestEnvAt(t testing.TB, url string) *testEnv {
	t.Helper()
	r := &testEnv{t: t, url: url, results: &workertest.Results{}}
	r.reconnect()
	t.Cleanup(func() { _ = r.conn.Close() })
	return r
}

// reconnect makes the connection, also after a restart of the broker.
func (r *testEnv) reconnect() {
	r.t.Helper()
	r.conn = r.dial()
	var err error
	if r.channel, err = r.conn.Channel(); err != nil {
		r.t.Fatal(err)
	}
}

// version is RabbitMQ's.
func (r *testEnv) version() string {
	version, _ := r.conn.Properties["version"].(string)
	return version
}

// atLeast reports whether RabbitMQ has this version or a later one.
func (r *testEnv) atLeast(major, minor int) bool {
	r.t.Helper()
	var a, b int
	if _, err := fmt.Sscanf(r.version(), "%d.%d", &a, &b); err != nil {
		r.t.Fatalf("version of RabbitMQ %q: %v", r.version(), err)
	}
	return a > major || a == major && b >= minor
}

// dial connects as the worker does, so that a priority of 0 can be sent.
func (r *testEnv) dial() *amqp.Connection {
	r.t.Helper()
	uri, err := amqp.ParseURI(r.url)
	if err != nil {
		r.t.Fatal(err)
	}
	raw, err := net.Dial("tcp", net.JoinHostPort(uri.Host, fmt.Sprint(uri.Port)))
	if err != nil {
		r.t.Fatal(err)
	}
	conn, err := amqp.Open(wire.New(raw), amqp.Config{
		SASL: []amqp.Authentication{uri.PlainAuth()}, Vhost: uri.Vhost, Locale: "en_US", FrameSize: 131072, Heartbeat: 10 * time.Second,
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return conn
}

// config returns the configuration of a worker on the queue "orders".
func (r *testEnv) config() worker.Config {
	return worker.Config{
		Broker:  r.url,
		Queues:  []string{"orders"},
		Node:    "w1@shop",
		Results: r.results,
		Logger:  workertest.Logger(r.t),
	}
}

func newWorker(t testing.TB, cfg worker.Config) *worker.Worker {
	t.Helper()
	w, err := worker.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// send publishes a message and returns its task id.
func (r *testEnv) send(m protocol.Publishing) string {
	r.t.Helper()
	out := amqp.Publishing{
		Headers: table(m.Headers), ContentType: m.Properties.ContentType, ContentEncoding: m.Properties.ContentEncoding,
		DeliveryMode: amqp.Persistent, CorrelationId: m.Properties.CorrelationID, ReplyTo: m.Properties.ReplyTo,
		Expiration: m.Properties.Expiration, Body: m.Body,
	}
	if p := m.Properties.Priority; p != nil {
		if out.Priority = *p; *p == 0 {
			out.Priority, out.DeliveryMode = 1, amqp.Persistent|wire.PriorityZero
		}
	}
	if err := r.channel.PublishWithContext(r.t.Context(), m.Exchange, m.RoutingKey, false, false, out); err != nil {
		r.t.Fatal(err)
	}
	return m.TaskID
}

func table(values map[string]any) amqp.Table {
	if values == nil {
		return nil
	}
	t := amqp.Table{}
	for k, v := range values {
		t[k] = field(v)
	}
	return t
}

func field(value any) any {
	switch v := value.(type) {
	case map[string]any:
		return table(v)
	case []any:
		list := make([]any, len(v))
		for i := range v {
			list[i] = field(v[i])
		}
		return list
	case int:
		return int32(v)
	case json.Number:
		if n, err := v.Int64(); err == nil {
			return int32(n)
		}
		n, _ := v.Float64()
		return n
	}
	return value
}

// result waits for the final row of a task.
func (r *testEnv) result(id string, states ...string) protocol.Result {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), time.Minute)
	defer cancel()
	row, err := r.results.WaitState(ctx, id, states...)
	if err != nil {
		r.t.Fatal(err)
	}
	return row
}

// depth returns how many messages are ready in a queue.
func (r *testEnv) depth(queue string) int {
	r.t.Helper()
	ch, err := r.conn.Channel()
	if err != nil {
		r.t.Fatal(err)
	}
	defer ch.Close()
	q, err := ch.QueueDeclarePassive(queue, true, false, false, false, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	return q.Messages
}

// eventually polls a condition that nothing signals.
func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("timed out waiting: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// receive waits for a signal.
func receive[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(time.Minute):
		t.Fatalf("timed out waiting: %s", what)
		panic("unreachable")
	}
}

func withUserInfo(address, user, password string) string {
	u, err := url.Parse(address)
	if err != nil {
		panic(err)
	}
	u.User = url.UserPassword(user, password)
	return u.String()
}

func contains(text, part string) bool { return strings.Contains(text, part) }
