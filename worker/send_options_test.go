package worker_test

import (
	"context"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/client"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// What a worker sends for a task goes to the task's queue with the task's expiry, unless
// the signature says otherwise: the next step of a chain, and what a handler sends.
func TestTaskOptionsForWhatIsSent(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	cfg := r.config()
	cfg.Queues, cfg.DefaultQueue = []string{"orders", "mail", "other", "routed"}, "orders"
	cfg.TaskRoutes = []worker.Route{{Task: "shop.*", Queue: "routed"}}
	w := newWorker(t, cfg)
	c, err := client.New(client.FromWorker(cfg))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	expiries := make(chan time.Duration, 10)
	worker.Handle(w, "shop.mail", func(ctx context.Context, _ noArgs) (string, error) {
		task := worker.TaskFromContext(ctx)
		if task.Expires == nil {
			expiries <- 0
		} else {
			expiries <- time.Until(*task.Expires)
		}
		return task.Queue, nil
	}, worker.SendTo("mail"), worker.ExpireAfter(time.Hour))
	worker.Handle(w, "shop.plain", func(ctx context.Context, _ noArgs) (string, error) {
		return worker.TaskFromContext(ctx).Queue, nil
	})
	worker.Handle(w, "shop.start", func(ctx context.Context, _ noArgs) (any, error) {
		_, err := c.Send(ctx, client.Task("shop.mail"), client.TaskID("sent"))
		return nil, err
	})
	workertest.Start(t, w)
	step := func(task, id string, options ...protocol.Member) protocol.Signature {
		s := protocol.NewSignature(task, nil, nil, append(options, workertest.Option("task_id", id))...)
		text, err := protocol.ParseSignature([]byte(`{"task": "` + task + `", "args": [], "kwargs": {}, "immutable": true, "options": {}}`))
		if err != nil {
			t.Fatal(err)
		}
		if s, err = text.WithOptions(s.Options...); err != nil {
			t.Fatal(err)
		}
		return s
	}
	r.send(workertest.Message("orders", "shop.start", nil, nil, workertest.Option("chain", []protocol.Signature{
		step("shop.plain", "plain"),
		step("shop.mail", "own", workertest.Option("queue", "other"), workertest.Option("expires", 60)),
		step("shop.mail", "next"),
	})))
	for id, want := range map[string]string{"sent": "mail", "next": "mail", "own": "other", "plain": "routed"} {
		if row := r.result(id); string(row.Value) != `"`+want+`"` {
			t.Errorf("%s went to %s, want %s", id, row.Value, want)
		}
	}
	var long, short int
	for range 3 {
		switch left := receive(t, "a mail", expiries); {
		case left > 50*time.Minute && left <= time.Hour:
			long++
		case left > 0 && left <= time.Minute:
			short++
		}
	}
	if long != 2 || short != 1 {
		t.Errorf("%d messages have the task's expiry and %d the signature's, want 2 and 1", long, short)
	}
}
