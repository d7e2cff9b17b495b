package worker_test

import (
	"context"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// beat is Celery's beat at 4 o'clock: it sends the entry that it has by itself, and prints
// the id of the task.
const beat = `
import sys
from celery import Celery
from celery.beat import Scheduler
app = Celery("shop", broker=sys.argv[1], backend=sys.argv[2])
app.conf.task_default_queue = "orders"
app.conf.broker_transport_options = {"confirm_publish": True}
scheduler = Scheduler(app)
scheduler.install_default_entries({})
print(scheduler.apply_async(scheduler.schedule["celery.backend_cleanup"], advance=False).id)
`

// The task that Celery's beat sends every day removes old results on a worker that has
// registered nothing for it, and no younger ones than Config.ResultExpires says.
func TestBeatRemovesOldResults(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		version string
		expires time.Duration
		own     bool
		left    string
	}{
		"by default":  {"5.7.0", 0, false, "hour"},
		"old release": {"5.4.0", 0, false, "hour"},
		"later":       {"5.7.0", 36 * time.Hour, false, "hour day"},
		"never":       {"5.7.0", -1, false, "hour day week"},
		"own task":    {"5.7.0", 0, true, "hour day week"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newTestEnv(t)
			backend, address := newPostgres(t)
			ages := map[string]time.Duration{"hour": time.Hour, "day": 25 * time.Hour, "week": 7 * 24 * time.Hour}
			for id, age := range ages {
				if _, err := backend.Store(t.Context(), protocol.Result{TaskID: id, State: protocol.StateSuccess, Value: []byte("1"), DateDone: time.Now().Add(-age)}); err != nil {
					t.Fatal(err)
				}
			}
			cfg := r.config()
			cfg.Results, cfg.ResultExpires = backend, c.expires
			w := newWorker(t, cfg)
			registerShop(w)
			want := "" // None
			if c.own {
				want = `"own"`
				worker.Handle(w, "celery.backend_cleanup", func(context.Context, noArgs) (string, error) { return "own", nil })
			}
			workertest.Start(t, w)
			output, err := exec.CommandContext(t.Context(), devenv.Celery(t, c.version), "-c", beat, r.url, address).Output()
			if err != nil {
				t.Fatalf("beat: %v: %s", err, output)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			outcome, err := backend.Wait(ctx, strings.TrimSpace(string(output)))
			if err != nil || outcome.State != protocol.StateSuccess || string(outcome.Value) != want {
				t.Errorf("the task ends with %+v, %v, want %s", outcome, err, want)
			}
			var left []string
			for _, id := range []string{"hour", "day", "week"} {
				found, err := backend.Load(t.Context(), id)
				if err != nil {
					t.Fatal(err)
				}
				if found[0].State == protocol.StateSuccess {
					left = append(left, id)
				}
			}
			if got := strings.Join(left, " "); got != c.left {
				t.Errorf("left are %q, want %q", got, c.left)
			}
		})
	}
}

// A worker whose backend cannot remove results does not have the task: another worker
// may.
func TestCleanupNeedsABackendThatCan(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	w := newWorker(t, r.config())
	registerShop(w)
	workertest.Start(t, w)
	row := r.result(r.send(workertest.Message("orders", "celery.backend_cleanup", nil, nil)))
	if row.Exception == nil || row.Exception.Type != "NotRegistered" {
		t.Errorf("row %+v", row)
	}
}
