package store

import (
	"context"
	"encoding/json"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// scan reads the columns record::text and ran_elsewhere.
func (c *ChangeState) scan(row pgx.Row) error {
	var record *string
	if err := row.Scan(&record, &c.RunElsewhere); err != nil {
		return err
	}
	c.Record = nil
	if record != nil {
		c.Record = json.RawMessage(*record)
	}
	return nil
}

// queueStartChange makes the row of a run's change, if it has none, and reads it
// into start.Change.
//
// A state row was written by a worker that makes no claims, or has been since, if
// it differs from the claims. queueStart gives row and claim the same started_at.
// A retry by the API clears the row's started_at and leaves celery_task_id.
func queueStartChange(batch *pgx.Batch, start *Start, queue, workspace string) {
	batch.Queue(`
		INSERT INTO mm_orchestrator.changes AS c (run_id, queue, workspace, ran_elsewhere)
		SELECT $1, $2, $3, EXISTS (
		    SELECT FROM spec_workflow_task_states AS s
		    WHERE s.orchestrator_run_id = $1 AND s.plan_step IN ('patch', 'build', 'restart')
		      AND (s.started_at IS NOT NULL OR s.celery_task_id IS NOT NULL)
		      AND NOT EXISTS (
		          SELECT FROM mm_orchestrator.claims AS mine
		          WHERE mine.run_id = s.orchestrator_run_id AND mine.step = s.plan_step::text
		            AND CASE WHEN s.started_at IS NOT NULL THEN mine.started_at = s.started_at
		                     ELSE left(mine.task_id, 255) = s.celery_task_id END))
		ON CONFLICT (run_id) DO UPDATE
		SET ran_elsewhere = c.ran_elsewhere OR EXCLUDED.ran_elsewhere, updated_at = GREATEST(now(), c.updated_at)
		RETURNING record::text, ran_elsewhere`,
		start.Claim.RunID, queue, workspace).QueryRow(start.Change.scan)
}

// RecordChange records what a run changes, before the caller does what the record
// says. When it returns nil, the record is durable, and the next BeginStep of any
// step of the run returns it.
//
//   - It replaces the earlier record of the run.
//   - The claim's token is a fence. It returns ErrClaimLost, and changes nothing,
//     if another worker has taken the claim over or the step has ended.
//   - It is one statement and one round trip. After ErrUnavailable the record may have
//     been written: call it again, with the same record or a later one.
//   - ErrInvalid for a record that is no JSON object.
//   - records are appended to the run's audit trail with it: the intent
//     of what the caller is about to do, for instance. See Record.
func (s *Store) RecordChange(ctx context.Context, claim Claim, record json.RawMessage, records ...audit.Record) error {
	texts, err := s.auditTexts(claim, records...)
	if err != nil {
		return err
	}
	record, err = cleanJSON(record)
	if err != nil {
		return err
	}
	if len(record) == 0 || record[0] != '{' {
		return failure(ErrInvalid, "the record of the change of run %s is no JSON object", claim.RunID)
	}
	var issued issuedClaim
	if known := s.issuedClaim(claim.Token); known != nil {
		issued = *known
	}
	faultpoint.Hit(faultpoint.ChangeBefore, claim.RunID, string(claim.Step))
	err = s.retry(ctx, "record the change of run "+claim.RunID, func(ctx context.Context) error {
		// The claim is locked until the commit: BeginStep of another worker, which
		// takes it over, comes after the record and returns it, or before, and then
		// the token differs. The row is missing only after the schema was created
		// again (restore.go).
		write := func() (bool, error) {
			tag, err := s.pool.Exec(ctx, `
				WITH mine AS MATERIALIZED (
				    SELECT run_id FROM mm_orchestrator.claims
				    WHERE run_id = $1 AND step = $2 AND attempt = $3 AND token = $4 AND outcome IS NULL
				    FOR NO KEY UPDATE
				), written AS (
				    INSERT INTO mm_orchestrator.changes AS c (run_id, queue, workspace, record)
				    SELECT run_id, $6, $7, $5::text::json FROM mine
				    ON CONFLICT (run_id) DO UPDATE
				    SET record = EXCLUDED.record, reduced_at = NULL, updated_at = GREATEST(now(), c.updated_at)
				    RETURNING run_id
				)
				SELECT a.new_length FROM written, mm_orchestrator.audit_append(written.run_id, $8, $9) AS a`,
				claim.RunID, string(claim.Step), claim.Attempt, claim.Token, string(record), issued.queue, issued.workspace, texts.ids, texts.bodies)
			return tag.RowsAffected() > 0, err
		}
		recorded, err := write()
		if err == nil && !recorded {
			if restored, err := s.restoredClaim(ctx, claim); err != nil {
				return err
			} else if restored {
				if recorded, err = write(); err != nil {
					return err
				}
			}
		}
		if err == nil && !recorded {
			return failure(ErrClaimLost, "step %s of run %s was taken over: what it changes is not recorded", claim.Step, claim.RunID)
		}
		return err
	})
	if err == nil {
		faultpoint.Hit(faultpoint.ChangeRecorded, claim.RunID, string(claim.Step))
	}
	return err
}
