package worker_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// signatureOf returns a signature with one argument and the given options, which are
// the members of a JSON object.
func signatureOf(task, options string) json.RawMessage {
	return json.RawMessage(fmt.Sprintf(`{"task": %q, "args": ["own"], "kwargs": {}, "options": {%s}, "subtask_type": null, "immutable": false}`, task, options))
}

// What Prepare returns is in the message of a follow-up: arguments, headers and queue.
// A queue or a header of the signature takes precedence, and messages of other tasks
// stay as they are.
func TestPrepareChangesFollowUps(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	w := newWorker(t, r.config())
	var mu sync.Mutex
	given := map[string]int{} // by the arguments that Prepare got
	prepare := func(s protocol.Signature, args []json.RawMessage) (protocol.Prepared, error) {
		mu.Lock()
		defer mu.Unlock()
		texts := make([]string, len(args))
		for i, arg := range args {
			texts[i] = string(arg)
		}
		given[s.Task+"("+strings.Join(texts, ", ")+")"]++
		return protocol.Prepared{Args: append(args, json.RawMessage(`"prepared"`)),
			Headers: map[string]string{"x-tenant": "prepared", "x-only": "prepared"}, Queue: "prepared"}, nil
	}
	one := worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) { return 1, nil })
	w.Register("shop.one", one)
	w.Register("shop.prepared", one, worker.Prepare(prepare))
	w.Register("shop.plain", one)
	stop := workertest.Start(t, w)
	r.result(r.send(workertest.Message("orders", "shop.one", nil, nil, workertest.Option("link", []json.RawMessage{
		signatureOf("shop.prepared", ""),
		signatureOf("shop.prepared", `"queue": "own", "headers": {"x-tenant": "own"}`),
		signatureOf("shop.plain", `"queue": "plain"`),
	}))))
	if err := stop(); err != nil {
		t.Error(err)
	}
	for queue, want := range map[string]struct {
		args           string
		tenant, second any
	}{
		"prepared": {`[1, "own", "prepared"]`, "prepared", "prepared"},
		"own":      {`[1, "own", "prepared"]`, "own", "prepared"},
		"plain":    {`[1, "own"]`, nil, nil},
	} {
		d, ok, err := r.channel.Get(queue, true)
		if err != nil || !ok {
			t.Errorf("queue %s: message %v, %v", queue, ok, err)
			continue
		}
		if !strings.HasPrefix(string(d.Body), "["+want.args+", ") || d.Headers["x-tenant"] != want.tenant || d.Headers["x-only"] != want.second {
			t.Errorf("queue %s: %s, headers x-tenant %v, x-only %v", queue, d.Body, d.Headers["x-tenant"], d.Headers["x-only"])
		}
	}
	// Each is also prepared before the task runs, with None as its result.
	for _, call := range []string{`shop.prepared(null, "own")`, `shop.prepared(1, "own")`} {
		if given[call] != 2 {
			t.Errorf("Prepare was called %d times as %s, want 2 of %v", given[call], call, given)
		}
	}
}

// A follow-up that cannot be prepared makes its task fail before the handler has run.
func TestFollowUpThatCannotBePrepared(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	w := newWorker(t, r.config())
	var runs atomic.Int32
	w.Register("shop.one", worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) { return runs.Add(1), nil }))
	for task, prepare := range map[string]func(protocol.Signature, []json.RawMessage) (protocol.Prepared, error){
		"shop.refused": func(protocol.Signature, []json.RawMessage) (protocol.Prepared, error) {
			return protocol.Prepared{}, errors.New("no such tenant")
		},
		"shop.panics": func(protocol.Signature, []json.RawMessage) (protocol.Prepared, error) { panic("no such tenant") },
	} {
		w.Register(task, worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) { return nil, nil }), worker.Prepare(prepare))
	}
	workertest.Start(t, w)
	for _, task := range []string{"shop.refused", "shop.panics"} {
		row := r.result(r.send(workertest.Message("orders", "shop.one", nil, nil, workertest.Option("link", []json.RawMessage{signatureOf(task, "")}))))
		if row.State != protocol.StateFailure || !strings.Contains(row.Exception.Repr(), "no such tenant") {
			t.Errorf("%s: task is %s %v, want FAILURE with the reason", task, row.State, row.Exception)
		}
	}
	if n := runs.Load(); n != 0 {
		t.Errorf("the handler ran %d times, want never", n)
	}
}
