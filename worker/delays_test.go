package worker_test

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// delayingProducer is a Celery program that sends a task with a countdown to a quorum
// queue. Its arguments are broker, type of the exchange and countdown.
const delayingProducer = `
import sys
from celery import Celery
from kombu import Exchange, Queue
app = Celery("shop", broker=sys.argv[1])
app.conf.task_default_queue = "orders"
app.conf.task_queues = [Queue("orders", Exchange("shop", type=sys.argv[2]), routing_key="orders.new", queue_arguments={"x-queue-type": "quorum"})]
app.conf.broker_transport_options = {"confirm_publish": True}
print(app.send_task("shop.later", countdown=int(sys.argv[3])).id)
`

// delayed returns the configuration of a worker on the queue of delayingProducer.
func (r *testEnv) delayed(exchangeType string) worker.Config {
	cfg := r.config()
	cfg.TaskQueues = []worker.Queue{{Name: "orders", Exchange: "shop", ExchangeType: exchangeType, RoutingKey: "orders.new", Type: "quorum"}}
	return cfg
}

// From 5.5 on, Celery delays a message for a quorum queue in the broker, by exchanges that
// workers declare. It reaches a Go worker on a broker that no Python worker has ever used,
// and so does its retry.
func TestPythonDelaysTasksInTheBroker(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ version, exchangeType, countdown, bits string }{
		{"5.7.0", "topic", "2", "1.0"}, {"5.7.0", "fanout", "3", "1.1"}, {"5.5.3", "topic", "2", "1.0"},
	} {
		t.Run(c.version+" "+c.exchangeType, func(t *testing.T) {
			t.Parallel()
			r := newTestEnv(t)
			w := newWorker(t, r.delayed(c.exchangeType))
			w.Register("shop.later", worker.HandlerFunc(func(_ context.Context, task *worker.Task) (any, error) {
				if task.Retries == 0 {
					return nil, worker.RetryIn(time.Millisecond)
				}
				return task.Delivery.RoutingKey, nil
			}))
			workertest.Start(t, w)
			began := time.Now()
			output, err := exec.CommandContext(t.Context(), devenv.Celery(t, c.version), "-c", delayingProducer, r.url, c.exchangeType, c.countdown).CombinedOutput()
			if err != nil {
				t.Fatalf("producer: %v: %s", err, output)
			}
			row := r.result(strings.TrimSpace(string(output)), protocol.StateSuccess, protocol.StateFailure)
			// The key shows that the message was delayed in the broker.
			if want := `"` + strings.Repeat("0.", 26) + c.bits + `.orders.new"`; row.State != protocol.StateSuccess || string(row.Value) != want {
				t.Errorf("the result is %s %s, want the routing key %s", row.State, row.Value, want)
			}
			if after := time.Since(began); after < 2*time.Second {
				t.Errorf("it ran after %v", after)
			}
		})
	}
}

// kombuDelays declares what a Celery worker declares for the queue of delayingProducer.
// Its arguments are the broker and the type of the queues that delay messages.
const kombuDelays = `
import sys
from kombu import Connection, Exchange, Queue
from kombu.transport.native_delayed_delivery import bind_queue_to_native_delayed_delivery_exchange, declare_native_delayed_delivery_exchanges_and_queues
with Connection(sys.argv[1]) as connection:
    queue = Queue("orders", Exchange("shop", type="topic"), routing_key="orders.new", queue_arguments={"x-queue-type": "quorum"})
    queue.bind(connection.default_channel).declare()
    declare_native_delayed_delivery_exchanges_and_queues(connection, sys.argv[2])
    bind_queue_to_native_delayed_delivery_exchange(connection, queue)
`

// The worker declares the same exchanges, queues and bindings as kombu. Each accepts what
// the other has declared, whatever type Celery gives to the queues.
func TestDelaysAreThoseOfKombu(t *testing.T) {
	t.Parallel()
	kombu := func(t *testing.T, r *testEnv, queueType string) {
		t.Helper()
		if output, err := exec.CommandContext(t.Context(), devenv.Celery(t, "5.7.0"), "-c", kombuDelays, r.url, queueType).CombinedOutput(); err != nil {
			t.Fatalf("kombu: %v: %s", err, output)
		}
	}
	start := func(t *testing.T, r *testEnv) {
		t.Helper()
		cfg, log := r.delayed("topic"), &lines{}
		cfg.Logger = log.logger()
		w := newWorker(t, cfg)
		registerShop(w)
		workertest.Start(t, w)
		if text := log.text(); contains(text, "WARN") {
			t.Errorf("the worker logs %s", text)
		}
	}
	ours := newTestEnv(t)
	start(t, ours)
	for _, queueType := range []string{"quorum", "classic"} {
		t.Run(queueType, func(t *testing.T) {
			t.Parallel()
			r := newTestEnv(t)
			kombu(t, r, queueType)
			before := r.definitions()
			if queueType == "quorum" {
				if own := ours.definitions(); own != before {
					t.Errorf("the worker has declared %s\nand kombu %s", own, before)
				}
				kombu(t, ours, queueType)
			}
			start(t, r)
			if after := r.definitions(); after != before {
				t.Errorf("kombu has declared %s\nand then the worker %s", before, after)
			}
		})
	}
}

// A user who may not declare them gets a worker that works, and the log says what is
// missing. Where no queue is a quorum queue or all exchanges are direct, there are none.
func TestDelaysThatAreMissing(t *testing.T) {
	t.Parallel()
	t.Run("permissions", func(t *testing.T) {
		t.Parallel()
		r := newTestEnv(t)
		user := "delays-" + strings.Trim(mustParse(t, r.url).Path, "/")
		devenv.BrokerUser(t, r.url, user, "open")
		r.manage(http.MethodPut, "permissions", "/"+user, `{"configure": "^(orders|shop)$", "write": ".*", "read": ".*"}`)
		cfg, log := r.delayed("topic"), &lines{}
		cfg.Broker, cfg.Logger = withUserInfo(r.url, user, "open"), log.logger()
		w := newWorker(t, cfg)
		registerShop(w)
		workertest.Start(t, w)
		if text := log.text(); !contains(text, "countdown") || !contains(text, "Give the user configure, write and read permission on celery_delayed_") || !contains(text, "ACCESS_REFUSED") {
			t.Errorf("the log is %s", text)
		}
		m := workertest.Message("orders.new", "shop.add", workertest.Args(2, 3), nil)
		m.Exchange = "shop"
		if row := r.result(r.send(m)); string(row.Value) != "5" {
			t.Errorf("row %+v", row)
		}
	})
	for name, queue := range map[string]worker.Queue{
		"classic": {Name: "orders", Exchange: "shop", ExchangeType: "topic"},
		"direct":  {Name: "orders", Type: "quorum"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newTestEnv(t)
			cfg := r.config()
			cfg.TaskQueues = []worker.Queue{queue}
			w := newWorker(t, cfg)
			registerShop(w)
			workertest.Start(t, w)
			if text := r.definitions(); !contains(text, "orders") || contains(text, "celery_delayed") {
				t.Errorf("declared is %s", text)
			}
		})
	}
}

func mustParse(t testing.TB, address string) *url.URL {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// manage asks RabbitMQ's management plugin about the virtual host of the test.
func (r *testEnv) manage(method, what, path, body string) []byte {
	r.t.Helper()
	address := strings.TrimSuffix(os.Getenv(devenv.EnvBrokerAPI), "/") + "/api/" + what + mustParse(r.t, r.url).Path + path
	request, err := http.NewRequestWithContext(r.t.Context(), method, address, strings.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	response, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(request)
	if err != nil {
		r.t.Fatal(err)
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode >= 300 {
		r.t.Fatalf("%s %s: %s %s %v", method, what, response.Status, answer, err)
	}
	return answer
}

// definitions returns all exchanges, queues and bindings of the virtual host, sorted.
func (r *testEnv) definitions() string {
	r.t.Helper()
	var all map[string]any
	if err := json.Unmarshal(r.manage(http.MethodGet, "definitions", "", ""), &all); err != nil {
		r.t.Fatal(err)
	}
	var texts []string
	for _, kind := range []string{"exchanges", "queues", "bindings"} {
		list, _ := all[kind].([]any)
		for _, one := range list {
			text, err := json.Marshal(one)
			if err != nil {
				r.t.Fatal(err)
			}
			texts = append(texts, kind+" "+string(text))
		}
	}
	slices.Sort(texts)
	return strings.Join(texts, "\n")
}
