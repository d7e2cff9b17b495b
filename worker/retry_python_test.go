package worker_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
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

// askCelery answers what Celery makes of retries, pauses and rates.
const askCelery = `
import json, sys
from celery import Celery
from celery.app.task import Context
from celery.utils.time import get_exponential_backoff_interval, rate
app = Celery("shop", broker="memory://")

@app.task(name="shop.task", bind=True, max_retries=None)
def task(self, a, b=0, c=0): ...

def retry(call):
    sent = []
    app.amqp.send_task_message = lambda producer, name, message, **options: sent.append(message)
    task.request_stack.push(Context({"id": "i", "task": "shop.task", "retries": 1, "args": [1], "kwargs": {"b": 2, "c": 3}, "delivery_info": {"exchange": "", "routing_key": "orders"}}, called_directly=False))
    try:
        task.retry(throw=False, countdown=0, **call)
    finally:
        task.request_stack.pop()
    (message,) = sent
    return [message.body[0], message.body[1], message.headers["eta"], message.headers["retries"]]

asked = json.load(sys.stdin)
json.dump({
    "retries": [retry(call) for call in asked["retries"]],
    "rates": [rate(text) for text in asked["rates"]],
    "pauses": [get_exponential_backoff_interval(3, n, 50) for n in asked["pauses"]],
}, sys.stdout)
`

// Arguments of a retry, pauses of a back-off and rates are Celery's.
func TestRetriesPausesAndRatesEqualPythons(t *testing.T) {
	t.Parallel()
	calls := []string{`{}`, `{"args": [7, 8]}`, `{"kwargs": {"a": 7, "c": 9}}`, `{"args": [7], "kwargs": {"b": 8}}`, `{"kwargs": {}}`, `{"args": [7, 8, 9]}`, `{"kwargs": {"b": 5}}`}
	rates := []string{"10/m", "2/h", "0.5/s", "4", "0", "0/s", "100/s", "7/h"}
	pauses := []int{0, 1, 2, 3, 4, 5, 6, 30}
	var asked struct {
		Retries []json.RawMessage `json:"retries"`
		Rates   []string          `json:"rates"`
		Pauses  []int             `json:"pauses"`
	}
	for _, call := range calls {
		asked.Retries = append(asked.Retries, json.RawMessage(call))
	}
	asked.Rates, asked.Pauses = rates, pauses
	text, err := json.Marshal(asked)
	if err != nil {
		t.Fatal(err)
	}
	command := exec.CommandContext(t.Context(), devenv.Celery(t, "5.7.0"), "-W", "ignore", "-c", askCelery)
	command.Stdin = bytes.NewReader(text)
	var stderr strings.Builder
	command.Stderr = &stderr
	out, err := command.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	var answers struct {
		Retries [][]any
		Rates   []float64
		Pauses  []int
	}
	if err := json.Unmarshal(out, &answers); err != nil {
		t.Fatal(err)
	}
	for i, call := range calls {
		var given struct {
			Args   []any
			Kwargs map[string]any
		}
		if err := protocol.DecodeJSON(json.RawMessage(call), &given); err != nil {
			t.Fatal(err)
		}
		retry := worker.RetryIn(0).Max(-1)
		if given.Args != nil {
			retry = retry.Args(given.Args...)
		}
		if given.Kwargs != nil {
			retry = retry.Kwargs(given.Kwargs)
		}
		w := callWorker(t)
		worker.Handle(w, "shop.task", func(context.Context, struct {
			A any `celery:"a"`
			B int `celery:"b,optional"`
			C int `celery:"c,optional"`
		}) (any, error) {
			return nil, retry
		})
		m, err := workertest.Decoded(workertest.Message("orders", "shop.task", workertest.Args(1), workertest.Kwargs(map[string]any{"b": 2, "c": 3}), workertest.Option("retries", 1)))
		if err != nil {
			t.Fatal(err)
		}
		outcome, err := w.RunTask(t.Context(), m)
		if err != nil {
			t.Fatal(err)
		}
		message, err := outcome.Retry.Message(m, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		var body []json.RawMessage
		if err := json.Unmarshal(message.Body, &body); err != nil {
			t.Fatal(err)
		}
		got, _ := json.Marshal([]any{body[0], body[1], message.Headers["eta"], message.Headers["retries"]})
		want, _ := json.Marshal(answers.Retries[i])
		if compact(got) != compact(want) {
			t.Errorf("retry with %s: %s, Python has %s", call, got, want)
		}
	}
	for i, text := range rates {
		every, err := worker.ParseRate(text)
		want := answers.Rates[i]
		if want != 0 {
			want = float64(time.Second) / want
		}
		if err != nil || (float64(every)-want) > 1 || (want-float64(every)) > 1 {
			t.Errorf("rate %s: every %v, %v; Python has %v", text, every, err, time.Duration(want))
		}
	}
	w := callWorker(t)
	worker.Handle(w, "task", func(context.Context, noArgs) (any, error) { return nil, errors.New("busy") },
		worker.AutoRetry(worker.RetryPolicy{Max: -1, Backoff: 3 * time.Second, BackoffMax: 50 * time.Second, NoJitter: true}))
	for i, n := range pauses {
		if got := attempt(t, w, "task", n).Retry.Pause(); got != time.Duration(answers.Pauses[i])*time.Second {
			t.Errorf("pause before retry %d: %v, Python has %d s", n+1, got, answers.Pauses[i])
		}
	}
}

func compact(text []byte) string {
	var out bytes.Buffer
	if json.Compact(&out, text) != nil {
		return string(text)
	}
	return out.String()
}

const readRows = `
import sys
from celery import Celery
app = Celery("shop", broker=sys.argv[1], backend=sys.argv[2])
retried, failed = (app.AsyncResult(id) for id in sys.argv[3:])
print(retried.state, retried.result, retried.traceback.splitlines()[-1])
try:
    failed.get(timeout=60)
except Exception as error:
    print(type(error).__module__, repr(error))
`

// Python reads a retry without a reason as None, and a class that the worker has chosen.
func TestPythonReadsRetriesAndClasses(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"5.4.0", "5.7.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			r := newTestEnv(t)
			cfg := r.config()
			backend, url := newPostgres(t)
			cfg.Results = backend
			w := newWorker(t, cfg)
			worker.Handle(w, "shop.retried", func(context.Context, noArgs) (any, error) { return nil, worker.RetryIn(time.Hour) })
			worker.Handle(w, "shop.failed", func(context.Context, noArgs) (any, error) { return nil, &outOfStock{"A"} },
				worker.AutoRetry(worker.RetryPolicy{Max: 1, Pause: -1}),
				worker.ErrorClasses(worker.ErrorClass{Match: worker.ErrorAs[*outOfStock](), Type: "LookupError"}))
			workertest.Start(t, w)
			ids := []string{r.send(workertest.Message("orders", "shop.retried", nil, nil)), r.send(workertest.Message("orders", "shop.failed", nil, nil))}
			eventually(t, "both tasks have run", func() bool {
				rows, err := backend.Load(t.Context(), ids...)
				return err == nil && slices.Equal([]string{rows[0].State, rows[1].State}, []string{protocol.StateRetry, protocol.StateFailure})
			})
			output, err := exec.CommandContext(t.Context(), devenv.Celery(t, version), append([]string{"-W", "ignore", "-c", readRows, r.url, url}, ids...)...).CombinedOutput()
			lines := strings.Split(strings.TrimSpace(string(output)), "\n")
			if err != nil || !slices.Contains(lines, "RETRY None celery.exceptions.Retry: Retry in 3600s") || !slices.Contains(lines, "builtins LookupError('no A')") {
				t.Errorf("%v: %s", err, output)
			}
		})
	}
}
