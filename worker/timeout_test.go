package worker_test

import (
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

const (
	// acknowledgeWithin is RabbitMQ's consumer_timeout in this test. Its default is
	// 30 min.
	acknowledgeWithin = time.Second
	// backWithin is how soon a worker consumes after its broker has restarted;
	// measuredWithin is what a test on a busy machine can require.
	backWithin     = 2 * time.Second
	measuredWithin = 10 * backWithin
)

// longTask starts a worker on a queue with the given name and type, and a task that
// runs until the test releases it.
func longTask(t *testing.T, r *testEnv, queue, queueType string) (w *worker.Worker, g *gatedTask, id string, stop func() error) {
	t.Helper()
	cfg := r.config()
	cfg.Queues = []string{queue}
	cfg.TaskQueues = []worker.Queue{{Name: queue, Type: queueType}}
	if queueType == "quorum" {
		// Less than the number of timeouts that follow. Before 4.3 each counts.
		cfg.TaskQueues[0].Arguments = map[string]any{"x-delivery-limit": 2}
	}
	w = newWorker(t, cfg)
	registerShop(w)
	g = newGatedTask()
	w.Register("shop.gated", g)
	stop = workertest.Start(t, w)
	m := chainOf("shop.gated", "next-of-"+queue)
	m.RoutingKey = queue
	id = r.send(m)
	receive(t, "the task begins", g.began)
	return w, g, id, stop
}

// ranOnce expects that the task ran once, that its chain continued, and that the
// queue is empty. It stops the worker.
func ranOnce(t *testing.T, r *testEnv, g *gatedTask, id, queue string, stop func() error) {
	t.Helper()
	for _, id := range []string{id, "next-of-" + queue} {
		if row := r.result(id); row.State != protocol.StateSuccess {
			t.Errorf("%s: task %s is %s, want SUCCESS", queue, id, row.State)
		}
	}
	// A timeout at the moment of a publication or an acknowledgement may leave the
	// next task in the queue twice, or return the message once more. All of these
	// are delivered before a message that is sent now.
	last := workertest.Message(queue, "shop.add", workertest.Args(1, 2), nil)
	r.result(r.send(last))
	// After the stop, unacknowledged messages are in the queue again.
	if err := stop(); err != nil {
		t.Error(err)
	}
	if n := g.runs.Load(); n != 1 {
		t.Errorf("%s: the task ran %d times, want once", queue, n)
	}
	if n := r.depth(queue); n != 0 {
		t.Errorf("%s: %d messages were not acknowledged", queue, n)
	}
}

// RabbitMQ takes a message back from a consumer that has not acknowledged it
// for consumer_timeout: up to 4.2 it closes the channel with 406, from 4.3 on it
// cancels the consumer, and does so for quorum queues only. Celery then runs the
// task again, once per timeout.
func TestAcknowledgementTimeoutAndRestartOfTheBrokerDoNotRepeatATask(t *testing.T) {
	t.Parallel()
	broker := devenv.OwnBroker(t, map[string]int{
		"consumer_timeout":      int(acknowledgeWithin.Milliseconds()),
		"channel_tick_interval": 500, // ms between two checks of the timeout
	})
	kinds := []string{"classic", "quorum"}

	t.Run("timeout", func(t *testing.T) {
		for _, kind := range kinds {
			t.Run(kind, func(t *testing.T) {
				t.Parallel()
				r := newTestEnvAt(t, broker.URL)
				queue := "timeout-" + kind
				w, g, id, stop := longTask(t, r, queue, kind)
				// The task has to run through several timeouts.
				<-time.After(10 * acknowledgeWithin)
				switch n := w.Reconnects(); {
				case kind == "classic" && r.atLeast(4, 3):
					if n != 0 {
						t.Errorf("the broker took the message back %d times, want never from a classic queue of %s", n, r.version())
					}
				case n < 3:
					t.Errorf("the broker took the message back %d times, want at least 3", n)
				default:
					eventually(t, "the message is delivered again", func() bool { return w.Attached() >= n })
					t.Logf("RabbitMQ %s took the message back %d times", r.version(), n)
				}
				close(g.release)
				ranOnce(t, r, g, id, queue, stop)
			})
		}
	})

	t.Run("restart", func(t *testing.T) {
		type running struct {
			queue    string
			env      *testEnv
			worker   *worker.Worker
			task     *gatedTask
			id       string
			stop     func() error
			attached int // before the restart
		}
		var tasks []*running
		for _, kind := range kinds {
			r := &running{queue: "restart-" + kind, env: newTestEnvAt(t, broker.URL)}
			r.worker, r.task, r.id, r.stop = longTask(t, r.env, r.queue, kind)
			tasks = append(tasks, r)
		}
		broker.Stop()
		for _, r := range tasks {
			r.attached = r.worker.Attached()
		}
		broker.Start()
		back := time.Now()
		for _, r := range tasks {
			eventually(t, "the message is delivered again", func() bool { return r.worker.Attached() > r.attached })
			took := time.Since(back)
			t.Logf("%s: delivered again %d ms after the broker was back", r.queue, took.Milliseconds())
			if took > measuredWithin {
				t.Errorf("%s: delivered again %v after the broker was back, want %v on an idle machine", r.queue, took, backWithin)
			}
		}
		for _, r := range tasks {
			close(r.task.release)
			r.env.reconnect()
			ranOnce(t, r.env, r.task, r.id, r.queue, r.stop)
		}
	})
}
