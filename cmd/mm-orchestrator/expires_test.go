package main

import (
	"fmt"
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"
)

// Celery's beat has old results removed by the worker that receives its task. As in
// MoonMind, they are kept for a week, or as long as RESULT_EXPIRES says.
func TestWorkerRemovesOldResults(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		env  environment
		left int
	}{
		"by default": {nil, 2}, "shorter": {environment{"CELERY_RESULT_EXPIRES=86400"}, 1}, "never": {environment{"RESULT_EXPIRES=0"}, 3},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newTestEnv(t)
			w := start(t, append(s.env(), c.env...), "worker")
			w.logLine("worker ready")
			s.execAsOwner(t, `INSERT INTO celery_taskmeta (id, task_id, status, date_done)
				SELECT nextval('task_id_sequence'), age, 'SUCCESS', now() AT TIME ZONE 'UTC' - age::interval FROM unnest(ARRAY['1 hour', '6 days', '8 days']) AS age`)
			message := amqp.Publishing{
				Headers:     amqp.Table{"task": "celery.backend_cleanup", "id": "cleanup"},
				ContentType: "application/json", ContentEncoding: "utf-8", CorrelationId: "cleanup",
				Body: []byte(`[[], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]`),
			}
			if err := s.queue(t).ch.Publish("", "orchestrator.run", true, false, message); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the task has succeeded", func() error {
				if s.queryInt(t, `SELECT count(*) FROM celery_taskmeta WHERE task_id = 'cleanup' AND status = 'SUCCESS'`) == 0 {
					return fmt.Errorf("it has not: %s", w.stderr.String())
				}
				return nil
			})
			if n := s.queryInt(t, `SELECT count(*) FROM celery_taskmeta WHERE task_id <> 'cleanup'`); n != c.left {
				t.Errorf("%d results are left, want %d", n, c.left)
			}
		})
	}
}
