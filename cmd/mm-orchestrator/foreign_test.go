package main

import (
	"fmt"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// Two workers declare a run lost whose message is gone, but not while a foreign
// consumer on the queue may have it; the log says so.
func TestALostRunBesideAForeignConsumer(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	pool, err := pgxpool.New(t.Context(), s.database)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	d := &storetest.Database{URL: s.database, Pool: pool}
	run := d.Create(t, storetest.Seed{})
	d.Rows(t, `UPDATE orchestrator_runs SET status = 'running', started_at = now() WHERE id = $1 RETURNING id`, run)
	d.Rows(t, `INSERT INTO mm_orchestrator.holds (workspace, queue, run_id, seen_at) VALUES ('w', 'orchestrator.run', $1, now() - interval '1 hour') RETURNING queue`, run)

	// It makes the queue, and finds nothing lost within an hour.
	env := append(s.env(), "MM_ORCHESTRATOR_LOST_GRACE=1h")
	first := start(t, env, "worker", "--hostname=first@box")
	first.logLine("worker ready")
	q := s.queue(t)
	if _, err := q.ch.Consume("orchestrator.run", "foreign", false, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	workers := []*process{
		start(t, append(s.env(), "MM_ORCHESTRATOR_LOST_GRACE=1s"), "worker", "--hostname=second@box"),
		start(t, append(s.env(), "MM_ORCHESTRATOR_LOST_GRACE=1s"), "worker", "--hostname=third@box"),
	}
	for _, p := range workers {
		line := p.logLine("lost runs are not looked for: consumers that are not workers of this program are on the queue, and may have messages of any run")
		if line["consumers"] != 1.0 || line["queue"] != "orchestrator.run" {
			t.Errorf("%v", line)
		}
	}
	lost := func() error {
		if message := d.State(t, run, store.StepAnalyze)["message"]; message == nil {
			return fmt.Errorf("step analyze has no message")
		}
		return nil
	}
	// The workers have searched for lost runs for longer than the grace.
	if lost() == nil {
		t.Error("the run was found lost beside a foreign consumer")
	}
	if err := q.ch.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the run is lost", lost)
	for _, p := range workers {
		p.logLine("lost runs are looked for again: all consumers of the queue are workers of this program")
	}
}
