package store_test

import (
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// TestAStepReadsNoMoreWhileManyRunsWait counts the rows that the database reads for a
// run, the sweeps meanwhile and the return of what is parked: fewer than wait.
func TestAStepReadsNoMoreWhileManyRunsWait(t *testing.T) {
	t.Parallel()
	const queued = 20_000 // in small tables the planner prefers to read all rows
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	// What a session has read is counted at its end, at the latest.
	session, err := pgx.Connect(t.Context(), d.OwnerURL)
	if err != nil {
		t.Fatal(err)
	}
	for _, statement := range []string{
		`SET application_name = 'queues'`,
		`INSERT INTO mm_orchestrator.holds (workspace, queue, run_id) SELECT 'w', 'q', id FROM orchestrator_runs`,
		`INSERT INTO orchestrator_runs (id, instruction, target_service, priority, status, metrics_snapshot, artifact_root, action_plan_id)
		 SELECT gen_random_uuid(), instruction, target_service, priority, status, metrics_snapshot, artifact_root, action_plan_id
		 FROM orchestrator_runs CROSS JOIN generate_series(1, 20000)`,
		`INSERT INTO mm_orchestrator.parked (workspace, queue, run_id, step, task_id, message_key, why, rank, queued_at, headers, properties, body)
		 SELECT 'w', 'q', id, 'analyze', 'parked', sha256(id::text::bytea), 'workspace', 2, queued_at, '{}', '{}', ''
		 FROM orchestrator_runs WHERE id NOT IN (SELECT run_id FROM mm_orchestrator.holds)`,
		`VACUUM ANALYZE`,
	} {
		if _, err := session.Exec(t.Context(), statement); err != nil {
			t.Fatal(err)
		}
	}
	if err := session.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	read := func() float64 {
		t.Helper()
		const sessions = `SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND (usename <> current_user OR application_name = 'queues')`
		for len(d.Rows(t, sessions)) > 0 {
		}
		return d.Rows(t, `
			SELECT (SELECT sum(seq_tup_read) FROM pg_stat_user_tables) + (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes) AS n`)[0]["n"].(float64)
	}
	before := read()
	s := d.Open(t)
	for _, step := range toVerify {
		claim := starts(t, s, shared("w", run, step, string(step)))
		if list, err := s.ListWorkspaces(t.Context(), "q", []string{run}); err != nil || len(list) != 1 || !list[0].Waiting {
			t.Fatalf("%+v, %v", list, err)
		}
		if messages := take(t, s, "q"); len(messages) != 0 {
			t.Fatalf("during the run: %+v", messages)
		}
		finish(t, s, claim, good(step))
	}
	if next := taken(t, s, "q"); next != "parked" {
		t.Fatalf("published at the end of the run: %q", next)
	}
	for range 2 {
		if messages, err := s.TakeAllParked(t.Context(), "q", 1<<62); err != nil || len(messages) == 0 {
			t.Fatalf("%+v, %v", messages, err)
		}
	}
	s.Close()
	if n := read() - before; n > queued/2 {
		t.Errorf("%.0f rows are read while %d runs wait", n, queued)
	}
}
