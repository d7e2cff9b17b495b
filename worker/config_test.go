package worker_test

import (
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

func TestValidateNamesEveryInvalidField(t *testing.T) {
	t.Parallel()
	err := worker.Config{
		Broker:              "http://user:hunter2@host;amqp://user:hunter2@host:port",
		Queues:              []string{"a", "a", "", "unknown"},
		TaskQueues:          []worker.Queue{{Name: "a", ExchangeType: "x-delayed"}, {Name: "a"}, {Name: "b", Arguments: map[string]any{"x": struct{}{}}}},
		RefuseUnknownQueues: true,
		TaskRoutes:          []worker.Route{{Task: "x.["}, {Queue: "q"}},
		Slots:               -1,
		Node:                "nobody",
		TimeLimit:           protocol.TimeLimit{Hard: -1},
		RecordTimeout:       -time.Second,
	}.Validate()
	if err == nil {
		t.Fatal("no error")
	}
	for _, part := range []string{"Broker", `"a" twice`, `exchange type "x-delayed"`, `queue "b"`, `names "unknown"`, `the name ""`, `"x.["`,
		"without a task name", "Slots is -1", `Node is "nobody"`, "TimeLimit", "RecordTimeout is -1s"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("no %s in:\n%v", part, err)
		}
	}
	if strings.Contains(err.Error(), "hunter2") {
		t.Errorf("the error contains the password: %v", err)
	}
}

func TestRunNeedsATaskAndCannotBeCalledTwice(t *testing.T) {
	t.Parallel()
	w := newWorker(t, worker.Config{Broker: "amqp://localhost:1", Queues: []string{"q"}, StartTimeout: -1})
	if err := w.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "no task is registered") {
		t.Errorf("got %v", err)
	}
	registerShop(w)
	if err := w.Ready(); err == nil {
		t.Error("ready before Run")
	}
	_ = w.Run(t.Context())
	if err := w.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "called twice") {
		t.Errorf("got %v", err)
	}
}
