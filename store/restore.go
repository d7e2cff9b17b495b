package store

import (
	"context"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"
)

// neededTables are the tables of schema mm_orchestrator that a worker needs, and the
// version of the schema from which on they exist.
var neededTables = []struct {
	name  string
	since int
}{{"schema_versions", 0}, {"claims", 1}, {"holds", 2}, {"parked", 2}, {"revocations", 3}, {"workers", 5}, {"changes", 6}, {"approvals", 7}, {"audit", 8}, {"audit_heads", 8}, {"pauses", 9}, {"rollback_requests", 10}, {"spec_claims", 11}}

// CheckOwnSchema checks that the schema mm_orchestrator exists in this program's
// version or a newer one. Otherwise it returns ErrSchema, which says what to do.
// It does not retry, as it is for health checks.
func (s *Store) CheckOwnSchema(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.config.TryTimeout)
	defer cancel()
	doing := "look at schema mm_orchestrator of " + s.place
	names := make([]string, len(neededTables))
	for i, table := range neededTables {
		names[i] = table.name
	}
	var schema bool
	var missing []string
	err := s.pool.QueryRow(ctx, `
		SELECT to_regnamespace('mm_orchestrator') IS NOT NULL,
		       ARRAY(SELECT name FROM unnest($1::text[]) AS name WHERE to_regclass('mm_orchestrator.' || name) IS NULL)`,
		names).Scan(&schema, &missing)
	switch {
	case err != nil:
		return translate(doing, err)
	case !schema:
		return failure(ErrSchema, "database %s has no schema mm_orchestrator: run `mm-orchestrator migrate`", s.place)
	}
	version := 0
	if !slices.Contains(missing, "schema_versions") {
		err = s.pool.QueryRow(ctx, `SELECT COALESCE(max(version), 0) FROM mm_orchestrator.schema_versions`).Scan(&version)
		if err != nil {
			return translate(doing, err)
		}
	}
	for _, table := range neededTables {
		if table.since <= version && slices.Contains(missing, table.name) {
			return failure(ErrSchema, "schema mm_orchestrator of %s has no table %s: drop the schema and run `mm-orchestrator migrate`", s.place, table.name)
		}
	}
	if version < newestVersion() {
		return failure(ErrSchema, "schema mm_orchestrator of %s is of version %d, this program needs %d: run `mm-orchestrator migrate`", s.place, version, newestVersion())
	}
	return nil
}

// An issuedClaim is what the row of a claim has besides what [Claim] tells.
type issuedClaim struct{ root, workspace, queue string }

// restoreClaim inserts the row of a claim of this Store again after the schema
// was dropped and created again; a claim's row is never deleted otherwise. The
// running step goes on under the claim and its end is recorded, so that it does
// not run twice. The result says whether a row was inserted.
//
// It inserts nothing if the attempt has a row again, since another worker took
// the step meanwhile, or if MoonMind's state row no longer says that this start
// of the step is in progress. It also takes the hold of the workspace again,
// unless another run has it.
func (s *Store) restoreClaim(ctx context.Context, tx pgx.Tx, claim Claim) (bool, error) {
	issued := s.issuedClaim(claim.Token)
	if issued == nil {
		return false, nil
	}
	batch := &pgx.Batch{}
	batch.Queue(lockStates, claim.RunID, []string{string(claim.Step)})
	batch.Queue(lockRun, claim.RunID)
	restored := false
	batch.Queue(`
		INSERT INTO mm_orchestrator.claims (run_id, step, attempt, task_id, root_task_id, holder, worker, token, starts, started_at, handed_back)
		SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11
		WHERE EXISTS (SELECT FROM spec_workflow_task_states AS s
		              WHERE s.orchestrator_run_id = $1 AND s.plan_step::text = $2 AND s.attempt = $3
		                AND s.plan_step_status = 'in_progress' AND s.celery_task_id = $12 AND s.started_at = $10)
		  AND NOT EXISTS (SELECT FROM spec_workflow_task_states AS s
		                  WHERE s.orchestrator_run_id = $1 AND s.plan_step::text = $2 AND s.attempt > $3)
		ON CONFLICT (run_id, step, attempt) DO NOTHING
		RETURNING true`,
		claim.RunID, string(claim.Step), claim.Attempt, claim.TaskID, issued.root, s.workerLock.key, clean(s.config.Worker), claim.Token,
		claim.Starts, claim.StartedAt, claim.HandedBack, cut(claim.TaskID, 255)).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			restored = true
		}
		return rows.Err()
	})
	if err := tx.SendBatch(ctx, batch).Close(); err != nil || !restored {
		return false, err
	}
	_, err := tx.Exec(ctx, `
		INSERT INTO mm_orchestrator.holds AS h (workspace, queue, run_id, root_task_id) VALUES ($1, $2, $3, $4)
		ON CONFLICT (workspace) DO UPDATE SET run_id = EXCLUDED.run_id, root_task_id = EXCLUDED.root_task_id
		WHERE h.run_id IS NULL`, issued.workspace, issued.queue, claim.RunID, issued.root)
	if err == nil {
		s.config.Logger.Warn("schema mm_orchestrator was created again while a step ran: its claim is restored", "run_id", claim.RunID, "step", string(claim.Step))
	}
	return true, err
}

// restoredClaim is restoreClaim in a transaction of its own, without retries.
func (s *Store) restoredClaim(ctx context.Context, claim Claim) (restored bool, err error) {
	if s.issuedClaim(claim.Token) == nil {
		return false, nil
	}
	err = s.transaction(ctx, func(tx pgx.Tx) error {
		restored, err = s.restoreClaim(ctx, tx, claim)
		return err
	})
	if err != nil {
		return false, translate(fmt.Sprintf("restore the claim on step %s of run %s", claim.Step, claim.RunID), err)
	}
	return restored, nil
}
