package orchestrator

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// A worker hands a step back for as long as the database is unavailable. A quorum
// queue with a delivery limit must not drop the message meanwhile.
func TestAnOutageOfTheDatabaseOutlastsTheDeliveryLimit(t *testing.T) {
	t.Parallel()
	const limit, handedBack = 1, 3
	r := newLiveEnv(t)
	proxy, through := workertest.NewProxy(t, r.db.URL)
	s := r.db.Open(t, func(c *store.Config) {
		c.URL, c.Worker, c.TakeoverGrace = secret.New(through), "one", 10*time.Millisecond
		c.RetryFor, c.ConnectTimeout = 10*time.Millisecond, time.Second // the length of an attempt
	})
	config := r.config
	config.Steps, config.Node, config.Logger, config.HandBackDelay = s, "one", workertest.Logger(t), 10*time.Millisecond
	o, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	w, err := worker.New(worker.Config{
		Broker: r.url, Queues: []string{"q"}, Node: "one@test", Logger: workertest.Logger(t),
		TaskQueues: []worker.Queue{{Name: "q", Type: "quorum", Arguments: map[string]any{"x-delivery-limit": limit}}},
		Results:    storetest.Results(t, s, protocol.EncodingJSON),
	})
	if err != nil {
		t.Fatal(err)
	}
	var tries atomic.Int32
	w.Use(func(next worker.Handler) worker.Handler {
		return worker.HandlerFunc(func(ctx context.Context, task *worker.Task) (any, error) {
			tries.Add(1)
			return next.Handle(ctx, task)
		})
	})
	o.Register(w)
	workertest.Start(t, w)
	r.create(t, "n", "normal", "")

	proxy.Cut()
	r.publish(r.chain(t, "n", "build", "restart"))
	r.await(t, "the step was handed back often", func() bool { return tries.Load() > handedBack })
	proxy.Restore()
	r.await(t, "the run ends", func() bool { return r.count(t, unfinished) == 0 })
	same(t, "ledger", strings.Join(r.ledger(), ", "), "begin n build, end n build, begin n restart, end n restart")
}
