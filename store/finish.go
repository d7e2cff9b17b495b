package store

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/internal/database"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// Lengths of columns, in characters (docs/moonmind.md#writing-conventions).
const (
	maxPath         = 1024
	maxArtifactRoot = 1024
	maxChecksum     = 128
)

// FinishStep records the end of a step in one transaction: artifacts, state row,
// snapshot and run (docs/moonmind.md#state-rows), and the outcome, with which
// BeginStep answers a repeated delivery.
//
//   - The claim's token is a fence. It returns ErrClaimLost, and records nothing,
//     if another worker has taken the claim over, or if the step was retried
//     under a new attempt. Messages that waited for the step may be published
//     then.
//   - If the run was retried while its rollback ran, the end of the rollback does
//     not change the run.
//   - A second call returns the same as the first.
//   - After any other error the caller still has the claim, and must call
//     FinishStep again or ReleaseClaim.
//   - ErrInvalid for an outcome that the tables cannot store, such as an unknown
//     artifact type or a path of more than 1024 characters. It removes NUL bytes,
//     replaces invalid UTF-8, and cuts a long message.
func (s *Store) FinishStep(ctx context.Context, claim Claim, outcome Outcome) (Finished, error) {
	outcome, err := storable(outcome)
	if err != nil {
		return Finished{}, err
	}
	outcome.FinishedAt = outcome.FinishedAt.UTC().Truncate(time.Microsecond)
	if outcome.FinishedAt.Before(claim.StartedAt) {
		// The clock was set back while the step ran. Durations are not negative.
		outcome.FinishedAt = claim.StartedAt
	}
	record, err := json.Marshal(outcome)
	if err != nil {
		return Finished{}, failure(ErrInvalid, "cannot record the outcome of step %s of run %s: %v", claim.Step, claim.RunID, err)
	}
	outcome.Audit = withIDs(outcome.Audit)
	faultpoint.Hit(faultpoint.FinishBefore, claim.RunID, string(claim.Step))
	var finished Finished
	superseded := false
	err = s.inTx(ctx, "finish step "+string(claim.Step)+" of run "+claim.RunID, func(tx pgx.Tx) error {
		superseded = false
		before, err := lockForFinish(ctx, tx, claim)
		if errors.Is(err, errNoClaim) {
			if restored, restoreErr := s.restoreClaim(ctx, tx, claim); restoreErr != nil {
				return restoreErr
			} else if restored {
				before, err = lockForFinish(ctx, tx, claim)
			}
		}
		if errors.Is(err, errNoClaim) {
			err = failure(ErrClaimLost, "there is no claim on step %s of run %s, attempt %d", claim.Step, claim.RunID, claim.Attempt)
		}
		if err != nil {
			return err
		}
		faultpoint.Hit(faultpoint.FinishLocked, claim.RunID, string(claim.Step))
		switch {
		case before.token != claim.Token:
			return failure(ErrClaimLost, "step %s of run %s was taken over by worker %s: this end of it is not recorded",
				claim.Step, claim.RunID, before.worker)
		case before.hasOutcome:
			// The answer to an earlier commit was lost.
			end := conclude(before, claim.Step, outcome)
			finished = end.finished(before)
			batch := &pgx.Batch{}
			auditTexts{runID: claim.RunID, ids: []string{}, bodies: []string{}}.queue(batch, &finished.AuditHead)
			queueParkedReady(batch, claim.RunID, &finished.ParkedReady)
			return tx.SendBatch(ctx, batch).Close()
		case before.attempt != claim.Attempt:
			superseded = true
			batch := &pgx.Batch{}
			batch.Queue(`
				UPDATE mm_orchestrator.claims SET holder = NULL
				WHERE run_id = $1 AND step = $2 AND attempt = $3`, claim.RunID, string(claim.Step), claim.Attempt)
			queueTouchHold(batch, claim.RunID, "")
			return tx.SendBatch(ctx, batch).Close()
		}
		end := conclude(before, claim.Step, outcome)
		finished = end.finished(before)
		queue := ""
		if issued := s.issuedClaim(claim.Token); issued != nil {
			queue = issued.queue
		}
		batch, err := s.finishBatch(claim, queue, outcome, end, record, &finished)
		if err != nil {
			return err
		}
		faultpoint.Hit(faultpoint.FinishWritten, claim.RunID, string(claim.Step))
		return database.SendLast(ctx, tx, batch)
	})
	if err == nil && superseded {
		err = failure(ErrClaimLost, "step %s of run %s was retried while attempt %d ran: the end of that attempt is not recorded",
			claim.Step, claim.RunID, claim.Attempt)
	}
	if err != nil {
		if errors.Is(err, ErrClaimLost) {
			s.unregister(claim.Token)
		}
		return Finished{}, err
	}
	faultpoint.Hit(faultpoint.FinishCommitted, claim.RunID, string(claim.Step))
	s.unregister(claim.Token)
	return finished, nil
}

// storable repairs what the columns would refuse. Its error names what cannot be
// repaired.
func storable(o Outcome) (Outcome, error) {
	if o.Status != StepSucceeded && o.Status != StepFailed {
		return o, failure(ErrInvalid, "outcome status %q: a step ends as succeeded or failed", o.Status)
	}
	o.Message = headOf(o.Message)
	o.ErrorType, o.ErrorModule, o.Traceback = clean(o.ErrorType), clean(o.ErrorModule), clean(o.Traceback)
	o.ArtifactRoot = clean(o.ArtifactRoot)
	if n := utf8.RuneCountInString(o.ArtifactRoot); n > maxArtifactRoot {
		return o, failure(ErrInvalid, "artifact root has %d characters, at most %d fit", n, maxArtifactRoot)
	}
	if len(o.Payload) == 0 || string(o.Payload) == "null" {
		o.Payload = nil
	} else {
		payload, err := cleanJSON(o.Payload)
		if err != nil {
			return o, err
		}
		o.Payload = payload
	}
	// A file registered twice is one row, at the place of the first registration
	// and with the values of the last.
	type key struct{ typ, path string }
	at := map[key]int{}
	var artifacts []Artifact
	for _, a := range o.Artifacts {
		a.Path = clean(a.Path)
		switch n := utf8.RuneCountInString(a.Path); {
		case n > maxPath:
			return o, failure(ErrInvalid, "artifact path %q… has %d characters, at most %d fit", cut(a.Path, 40), n, maxPath)
		case len(a.Checksum) > maxChecksum:
			return o, failure(ErrInvalid, "checksum of artifact %s has %d characters, at most %d fit", a.Path, len(a.Checksum), maxChecksum)
		case a.SizeBytes < 0:
			return o, failure(ErrInvalid, "size of artifact %s is %d", a.Path, a.SizeBytes)
		}
		k := key{a.Type, a.Path}
		if i, again := at[k]; again {
			artifacts[i] = a
			continue
		}
		at[k] = len(artifacts)
		artifacts = append(artifacts, a)
	}
	o.Artifacts = artifacts
	return o, nil
}

// errNoClaim: table claims has no row of the claim.
var errNoClaim = errors.New("there is no such claim")

// finishState is what FinishStep reads before it writes.
type finishState struct {
	status    RunStatus
	startedAt *time.Time
	// completedAt matters only if the step has an outcome already.
	completedAt *time.Time
	hasRollback bool
	// lastStep is the last step of the plan, the rollback not counted.
	lastStep Step
	// afterVerify says that the plan has steps after verify, verified in such a plan that
	// the newest attempt of verify has succeeded.
	afterVerify, verified bool
	// attempt is the step's highest.
	attempt    int
	token      int64
	worker     string
	hasOutcome bool
}

// lockForFinish takes the locks that begin takes, and that of the rollback's state
// row, which a successful verify writes. It returns errNoClaim if the claim has no
// row.
func lockForFinish(ctx context.Context, tx pgx.Tx, claim Claim) (finishState, error) {
	var before finishState
	batch := &pgx.Batch{}
	batch.Queue(lockStates, claim.RunID, []string{string(claim.Step), string(StepRollback)})
	batch.Queue(lockRun, claim.RunID)
	batch.Queue(selectRun, claim.RunID).QueryRow(func(row pgx.Row) error {
		run, err := scanRun(row)
		if err == pgx.ErrNoRows {
			return failure(ErrNotFound, "Run %s not found", claim.RunID)
		}
		before.status, before.startedAt, before.completedAt = run.Status, run.StartedAt, run.CompletedAt
		before.hasRollback, before.lastStep = run.HasRollback, lastStep(run.Steps)
		before.afterVerify = before.lastStep != StepVerify && slices.Contains(planSteps(run.Steps), StepVerify)
		return err
	})
	batch.Queue(`
		SELECT c.token, c.worker, c.outcome IS NOT NULL,
		       COALESCE((SELECT max(s.attempt) FROM spec_workflow_task_states AS s
		                 WHERE s.orchestrator_run_id = c.run_id AND s.plan_step::text = c.step), c.attempt)
		FROM mm_orchestrator.claims AS c
		WHERE c.run_id = $1 AND c.step = $2 AND c.attempt = $3
		FOR UPDATE OF c`, claim.RunID, string(claim.Step), claim.Attempt).QueryRow(func(row pgx.Row) error {
		err := row.Scan(&before.token, &before.worker, &before.hasOutcome, &before.attempt)
		if err == pgx.ErrNoRows {
			return errNoClaim
		}
		return err
	})
	err := tx.SendBatch(ctx, batch).Close()
	if err == nil && before.afterVerify {
		err = tx.QueryRow(ctx, `
			SELECT COALESCE((SELECT plan_step_status = 'succeeded' FROM spec_workflow_task_states
			                 WHERE orchestrator_run_id = $1 AND plan_step = 'verify'
			                 ORDER BY attempt DESC LIMIT 1), false)`, claim.RunID).Scan(&before.verified)
	}
	return before, err
}

// runChange is what the end of a step changes of its run.
type runChange struct {
	// status is the new one, or "" if it does not change.
	status RunStatus
	// completedAt is zero if the run has not ended.
	completedAt time.Time
	// runStarted repairs a run that has no started_at, which completed_at
	// needs (ck_orchestrator_runs_timestamps).
	runStarted time.Time
	// skipRollback: verify has succeeded, so the rollback is not needed.
	skipRollback bool
	// releaseHold: the run gives its workspace up, as nothing more is to come. Its
	// status may still be running: if its plan ends before verify, or if somebody
	// sends its steps one by one. In the latter case the next step takes the
	// workspace again.
	releaseHold bool
}

// succeeds says that a run has succeeded once a step has: with verify, or in a plan with
// steps after verify with the last of them, since a run that has ended runs no step.
func (b finishState) succeeds(step Step, nothingFollows bool) bool {
	if !b.afterVerify {
		return step == StepVerify
	}
	return (step == StepVerify || b.verified) && (step == b.lastStep || nothingFollows)
}

// conclude says how the end of a step changes its run
// (docs/moonmind.md#state-rows). It is pure.
func conclude(before finishState, step Step, outcome Outcome) runChange {
	var end runChange
	if step == StepRollback {
		switch before.status {
		case RunPending, RunRunning, RunAwaitingApproval:
			// The run was failed when the rollback began, so it was retried since,
			// although the API may not have raised the rollback's own attempt.
			return end
		}
	}
	ended := true
	switch {
	case outcome.Status == StepFailed:
		end.status = RunFailed
		// If a rollback is to come, the run is failed but not completed.
		ended = step == StepRollback || !before.hasRollback
	case step == StepRollback:
		end.status = RunRolledBack
	case before.succeeds(step, outcome.NothingFollows):
		end.status = RunSucceeded
		end.skipRollback = before.hasRollback
	default:
		ended = false
	}
	end.releaseHold = ended || outcome.NothingFollows || outcome.Status == StepSucceeded && step == before.lastStep
	if ended {
		end.completedAt = outcome.FinishedAt
		end.runStarted = outcome.FinishedAt
		if before.startedAt != nil {
			end.runStarted = *before.startedAt
		}
		// The clocks of two machines may differ, and a CHECK constraint refuses a
		// run that is completed before it started.
		if end.completedAt.Before(end.runStarted) {
			end.completedAt = end.runStarted
		}
	}
	return end
}

func (c runChange) finished(before finishState) Finished {
	f := Finished{Status: before.status, RunEnded: !c.completedAt.IsZero()}
	if c.status != "" {
		f.Status = c.status
	}
	if f.RunEnded {
		f.Duration = c.completedAt.Sub(c.runStarted)
	}
	return f
}

// endRecords are those of the audit trail about the end of a step.
func endRecords(claim Claim, outcome Outcome, end runChange) []audit.Record {
	step := audit.Record{
		ID: claimRecord(audit.StepEnded, claim.Token), Kind: audit.StepEnded, At: outcome.FinishedAt, Status: string(outcome.Status), Text: outcome.Message,
		DurationMS: max(0, outcome.FinishedAt.Sub(claim.StartedAt).Milliseconds()),
	}
	for _, a := range outcome.Artifacts {
		step.Artifacts = append(step.Artifacts, audit.Artifact{Type: a.Type, Path: a.Path, SHA256: a.Checksum, SizeBytes: a.SizeBytes})
	}
	records := append(slices.Clone(outcome.Audit), step)
	if !end.completedAt.IsZero() {
		records = append(records, audit.Record{
			ID: claimRecord(audit.RunEnded, claim.Token), Kind: audit.RunEnded, At: outcome.FinishedAt, Status: string(end.status),
			DurationMS: max(0, end.completedAt.Sub(end.runStarted).Milliseconds()),
		})
	}
	return records
}

// finishBatch returns all writes of a step's end. They set finished.AuditHead, and
// finished.ParkedReady if parked messages may be published after the commit.
func (s *Store) finishBatch(claim Claim, queue string, outcome Outcome, end runChange, record []byte, finished *Finished) (*pgx.Batch, error) {
	texts, err := s.auditTexts(claim, endRecords(claim, outcome, end)...)
	if err != nil {
		return nil, err
	}
	types := make([]string, len(outcome.Artifacts))
	paths := make([]string, len(outcome.Artifacts))
	checksums := make([]string, len(outcome.Artifacts))
	sizes := make([]int64, len(outcome.Artifacts))
	for i, a := range outcome.Artifacts {
		types[i], paths[i], checksums[i], sizes[i] = a.Type, a.Path, a.Checksum, a.SizeBytes
	}
	celeryState := "SUCCESS"
	if outcome.Status == StepFailed {
		celeryState = "FAILURE"
	}
	batch := &pgx.Batch{}

	// A repeated registration keeps the row and its id (docs/moonmind.md#r1,
	// docs/moonmind.md#r4): readers hold references to it.
	batch.Queue(`
		INSERT INTO orchestrator_run_artifacts (id, run_id, artifact_type, path, checksum, size_bytes)
		SELECT gen_random_uuid(), $1, given.type::orchestratorrunartifacttype, given.path, NULLIF(given.checksum, ''), given.size
		FROM unnest($2::text[], $3::text[], $4::text[], $5::bigint[]) AS given (type, path, checksum, size)
		ON CONFLICT (run_id, artifact_type, path) DO UPDATE
		SET checksum = EXCLUDED.checksum, size_bytes = EXCLUDED.size_bytes`,
		claim.RunID, types, paths, checksums, sizes)

	// Every column is overwritten, with NULL where the outcome has nothing, so that
	// nothing of an earlier attempt stays (docs/moonmind.md#c14).
	batch.Queue(`
		INSERT INTO spec_workflow_task_states AS s
		       (id, orchestrator_run_id, plan_step, attempt, task_name, status, plan_step_status, celery_state,
		        celery_task_id, message, payload, artifact_refs, started_at, finished_at)
		SELECT gen_random_uuid(), $1, $2::text::orchestratorplanstep, $3, $2::text, $4::text::specworkflowtaskstatus,
		       $4::text::orchestratorplanstepstatus, $5::text::orchestratortaskstate, $6, $7, $8::text::jsonb,
		       COALESCE((SELECT jsonb_agg(a.id::text ORDER BY ref.n)
		                 FROM unnest($9::text[], $10::text[]) WITH ORDINALITY AS ref (type, path, n)
		                 JOIN orchestrator_run_artifacts AS a
		                   ON a.run_id = $1 AND a.artifact_type::text = ref.type AND a.path = ref.path), '[]'),
		       $11, $12
		ON CONFLICT (orchestrator_run_id, plan_step, attempt) DO UPDATE
		SET status = EXCLUDED.status, plan_step_status = EXCLUDED.plan_step_status, celery_state = EXCLUDED.celery_state,
		    celery_task_id = EXCLUDED.celery_task_id, message = EXCLUDED.message, payload = EXCLUDED.payload,
		    artifact_refs = EXCLUDED.artifact_refs, started_at = EXCLUDED.started_at, finished_at = EXCLUDED.finished_at`,
		claim.RunID, string(claim.Step), claim.Attempt, string(outcome.Status), celeryState, cut(claim.TaskID, 255),
		outcome.Message, nullText(outcome.Payload), types, paths, claim.StartedAt, outcome.FinishedAt)

	stepEntry := snapshotEntry(string(outcome.Status), outcome.FinishedAt.Sub(claim.StartedAt), claim.Attempt)
	runEntry := "{}"
	if !end.completedAt.IsZero() {
		runEntry = `{"run": ` + snapshotEntry(string(end.status), end.completedAt.Sub(end.runStarted), 1) + `}`
	}
	// The snapshot is completed (docs/moonmind.md#c16), and what else is in it
	// stays. A value that is not an object is replaced. updated_at is the start of
	// the transaction, as in Python.
	batch.Queue(`
		UPDATE orchestrator_runs AS r
		SET status = COALESCE(NULLIF($2::text, '')::orchestratorrunstatus, r.status),
		    completed_at = CASE WHEN $2::text = '' THEN r.completed_at ELSE $3::timestamptz END,
		    started_at = COALESCE(r.started_at, $4::timestamptz),
		    artifact_root = COALESCE(NULLIF($5, ''), r.artifact_root),
		    metrics_snapshot = base.snapshot
		        || jsonb_build_object('steps',
		               CASE jsonb_typeof(base.snapshot -> 'steps') WHEN 'object' THEN base.snapshot -> 'steps' ELSE '{}' END
		               || jsonb_build_object($6::text, $7::text::jsonb))
		        || $8::text::jsonb,
		    updated_at = now()
		FROM (SELECT CASE jsonb_typeof(metrics_snapshot) WHEN 'object' THEN metrics_snapshot ELSE '{}' END AS snapshot
		      FROM orchestrator_runs WHERE id = $1) AS base
		WHERE r.id = $1`,
		claim.RunID, string(end.status), nullTime(end.completedAt), nullTime(end.runStarted), outcome.ArtifactRoot,
		string(claim.Step), stepEntry, runEntry)

	if end.status != "" {
		// The run has failed or ended, so nothing is left to revoke. A retry must
		// not find an old request.
		batch.Queue(`DELETE FROM mm_orchestrator.revocations WHERE run_id = $1`, claim.RunID)
	}
	if end.skipRollback {
		// In the rollback's newest attempt, like every write
		// (docs/moonmind.md#r5). What an earlier rollback left in the row is
		// cleared, since this attempt did not run.
		batch.Queue(`
			INSERT INTO spec_workflow_task_states AS s
			       (id, orchestrator_run_id, plan_step, attempt, task_name, status, plan_step_status, celery_state,
			        message, artifact_refs, finished_at)
			SELECT gen_random_uuid(), $1, 'rollback', COALESCE(max(attempt), 1), 'rollback', 'skipped', 'skipped', 'SUCCESS',
			       'Rollback not required', '[]', $2::timestamptz
			FROM spec_workflow_task_states
			WHERE orchestrator_run_id = $1 AND plan_step = 'rollback'
			ON CONFLICT (orchestrator_run_id, plan_step, attempt) DO UPDATE
			SET status = EXCLUDED.status, plan_step_status = EXCLUDED.plan_step_status, celery_state = EXCLUDED.celery_state,
			    celery_task_id = NULL, message = EXCLUDED.message, payload = NULL, artifact_refs = EXCLUDED.artifact_refs,
			    started_at = NULL, finished_at = EXCLUDED.finished_at`,
			claim.RunID, end.completedAt)
	}
	batch.Queue(`
		UPDATE mm_orchestrator.claims SET holder = NULL, finished_at = $4, outcome = $5::text::json
		WHERE run_id = $1 AND step = $2 AND attempt = $3`,
		claim.RunID, string(claim.Step), claim.Attempt, outcome.FinishedAt, string(record))

	if left := outcome.LeftBehind; left != nil {
		text, err := json.Marshal(left)
		if err != nil {
			return nil, err
		}
		batch.Queue(`
			INSERT INTO mm_orchestrator.approvals AS a (run_id, queue, left_behind) VALUES ($1, $2, $3::text::json)
			ON CONFLICT (run_id, queue) DO UPDATE SET left_behind = EXCLUDED.left_behind`, claim.RunID, queue, string(text))
	}
	texts.queue(batch, &finished.AuditHead)
	// The workspace is locked last: see lockHold.
	if end.releaseHold {
		queueRelease(batch, claim.RunID)
	} else {
		queueTouchHold(batch, claim.RunID, "")
	}
	queueParkedReady(batch, claim.RunID, &finished.ParkedReady)
	return batch, nil
}

// failInPlace records, in place of a worker, that a step has failed. It counts as
// the newest attempt (docs/moonmind.md#r5), at least claim.Attempt, which it sets.
// The token in the claim's row is replaced, so that a previous holder can record
// nothing any more, and with it the start, which is that of the state row: a row
// that differs from its claim counts as another program's (queueStartChange).
func (s *Store) failInPlace(ctx context.Context, tx pgx.Tx, claim *Claim, root, worker string, outcome Outcome, end runChange) (parkedReady bool, err error) {
	err = tx.QueryRow(ctx, `
		SELECT COALESCE(max(attempt), $3) FROM spec_workflow_task_states
		WHERE orchestrator_run_id = $1 AND plan_step::text = $2`, claim.RunID, string(claim.Step), claim.Attempt).Scan(&claim.Attempt)
	if err != nil {
		return false, err
	}
	_, err = tx.Exec(ctx, `
		INSERT INTO mm_orchestrator.claims (run_id, step, attempt, task_id, root_task_id, worker, token, starts, started_at)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
		ON CONFLICT (run_id, step, attempt) DO UPDATE
		SET token = EXCLUDED.token, holder = NULL, started_at = EXCLUDED.started_at`,
		claim.RunID, string(claim.Step), claim.Attempt, claim.TaskID, root, worker, claim.Token, claim.Starts, claim.StartedAt)
	if err != nil {
		return false, err
	}
	record, err := json.Marshal(outcome)
	if err != nil {
		return false, failure(ErrInvalid, "cannot record that step %s of run %s has failed: %v", claim.Step, claim.RunID, err)
	}
	var finished Finished
	batch, err := s.finishBatch(*claim, "", outcome, end, record, &finished)
	if err == nil {
		err = tx.SendBatch(ctx, batch).Close()
	}
	return finished.ParkedReady, err
}

// snapshotEntry is {"status": …, "durationMs": …} with a float as Python writes
// it: down to microseconds, and always with a decimal point. After a retry it also
// has the attempt.
func snapshotEntry(status string, duration time.Duration, attempt int) string {
	ms := strconv.FormatFloat(float64(max(duration, 0).Microseconds())/1000, 'f', -1, 64)
	if !strings.Contains(ms, ".") {
		ms += ".0"
	}
	entry := `{"status": "` + status + `", "durationMs": ` + ms
	if attempt > 1 {
		entry += `, "attempt": ` + strconv.Itoa(attempt)
	}
	return entry + "}"
}

func nullTime(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

func nullText(text []byte) *string {
	if text == nil {
		return nil
	}
	s := string(text)
	return &s
}
