package main

import (
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// The handlers are tested without a broker.
func TestHandlers(t *testing.T) {
	w, err := newWorker(worker.Config{Broker: "amqp://localhost", Queues: []string{"shop"}})
	if err != nil {
		t.Fatal(err)
	}
	outcome, err := workertest.Call(t.Context(), w, "shop.sum", nil, workertest.Kwargs(map[string]any{"a": 2, "b": 3}))
	if err != nil || outcome.State != "SUCCESS" || string(outcome.Value) != "5" {
		t.Errorf("%+v, %v", outcome, err)
	}
	outcome, err = workertest.Call(t.Context(), w, "shop.add", workertest.Args(2), nil)
	if err != nil || outcome.Exception.Repr() != `TypeError("add() missing 1 required positional argument: 'y'")` {
		t.Errorf("%+v, %v", outcome, err)
	}
}
