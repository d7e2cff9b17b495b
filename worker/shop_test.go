package worker_test

import (
	"context"
	"errors"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// registerShop registers the tasks of the Python app that produced the files in
// testdata/celery.
func registerShop(w *worker.Worker) {
	type none struct{}
	type text struct {
		Text string `celery:"text,optional"`
	}
	type varargs struct {
		Args   []any          `celery:"*"`
		Kwargs map[string]any `celery:"**"`
	}
	worker.Handle(w, "shop.add", add)
	worker.Handle(w, "shop.step", func(ctx context.Context, in struct {
		N int `celery:"n"`
	}) (any, error) {
		return struct {
			Step int    `json:"step"`
			ID   string `json:"id"`
		}{in.N, worker.TaskFromContext(ctx).ID}, nil
	})
	worker.Handle(w, "shop.fail", func(_ context.Context, in text) (any, error) {
		if in.Text == "" {
			in.Text = "boom"
		}
		return nil, worker.Error{Type: "ValueError", Args: []any{in.Text, 42}}
	})
	worker.Handle(w, "shop.failcustom", func(context.Context, none) (any, error) {
		return nil, &worker.Error{Type: "OrderError", Module: "labapp", Args: []any{"no stock for ü", map[string]int{"sku": 7}}}
	})
	worker.Handle(w, "shop.onok", func(_ context.Context, in varargs) (any, error) {
		if in.Kwargs == nil {
			in.Kwargs = map[string]any{}
		}
		return []any{"ok", in.Args, in.Kwargs}, nil
	})
	worker.Handle(w, "shop.onerr", func(context.Context, varargs) (any, error) { return nil, nil })
	worker.Handle(w, "shop.onerr_old", func(context.Context, text) (any, error) { return nil, nil })
	worker.Handle(w, "shop.mail", func(_ context.Context, in text) (string, error) { return in.Text, nil })
	worker.Handle(w, "shop.retry", func(context.Context, struct {
		N int `celery:"n"`
	}) (any, error) {
		return nil, worker.RetryIn(500 * time.Millisecond).Max(2).Because(worker.Error{Type: "KeyError", Args: []any{"nope"}})
	})
	worker.Handle(w, "shop.sleep", func(ctx context.Context, in struct {
		Seconds float64 `celery:"n"`
	}) (any, error) {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(time.Duration(in.Seconds * float64(time.Second))):
			return in.Seconds, nil
		}
	})
	worker.Handle(w, "shop.reject", func(context.Context, none) (any, error) { return nil, worker.Reject{Reason: "no"} })
	worker.Handle(w, "shop.ignore", func(context.Context, none) (any, error) { return nil, worker.Ignore })
	worker.Handle(w, "shop.upd", func(ctx context.Context, _ none) (any, error) {
		err := worker.TaskFromContext(ctx).UpdateState(ctx, "PROGRESS", map[string]int{"done": 3})
		return nil, errors.Join(err, worker.Ignore)
	})
}
