package store

import (
	"context"
	"encoding/json"
	"errors"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// Lengths of columns, in characters (docs/moonmind.md#writing-conventions).
const (
	maxPath         = 1024
	maxArtifactRoot = 1024
	maxChecksum     = 128
)

// FinishStep records how a step ended: artifacts, state row, snapshot, run
// (docs/moonmind.md#state-rows), and the outcome for whoever delivers it again.
// All of it or nothing.
//
//   - The claim fences: ErrClaimLost if it was taken over, or if the step was
//     retried under a new attempt meanwhile; nothing was recorded then, but
//     messages that waited for the step may be published now.
//   - A rollback of a run that was retried meanwhile leaves the run as the
//     retry has it.
//   - Called twice, it answers twice the same.
//   - After any other error the claim is still held: call again, or
//     ReleaseClaim.
//   - ErrInvalid for an outcome that the tables cannot hold, such as an
//     artifact type that is not a label or a path of more than 1024 characters.
//     NUL bytes and invalid UTF-8 are mended, a long message is cut.
func (s *Store) FinishStep(ctx context.Context, claim Claim, outcome Outcome) (Finished, error) {
	outcome, err := storable(outcome)
	if err != nil {
		return Finished{}, err
	}
	outcome.FinishedAt = outcome.FinishedAt.UTC().Truncate(time.Microsecond)
	if outcome.FinishedAt.Before(claim.StartedAt) {
		// The clock was set back while the step ran: no negative durations.
		outcome.FinishedAt = claim.StartedAt
	}
	record, err := json.Marshal(outcome)
	if err != nil {
		return Finished{}, failure(ErrInvalid, "cannot record the outcome of step %s of run %s: %v", claim.Step, claim.RunID, err)
	}
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
			return failure(ErrClaimLost, "step %s of run %s was taken over by worker %s: nothing of this one is recorded",
				claim.Step, claim.RunID, before.worker)
		case before.hasOutcome:
			// The answer to an earlier commit was lost.
			end := conclude(before, claim.Step, outcome)
			finished = end.finished(before)
			batch := &pgx.Batch{}
			queueUnpark(batch, claim.RunID, &finished.ParkedReady)
			return tx.SendBatch(ctx, batch).Close()
		case before.attempt != claim.Attempt:
			superseded = true
			batch := &pgx.Batch{}
			batch.Queue(`
				UPDATE mm_orchestrator.claims SET holder = NULL
				WHERE run_id = $1 AND step = $2 AND attempt = $3`, claim.RunID, string(claim.Step), claim.Attempt)
			queueSeen(batch, claim.RunID, "")
			return tx.SendBatch(ctx, batch).Close()
		}
		end := conclude(before, claim.Step, outcome)
		finished = end.finished(before)
		err = writeFinish(ctx, tx, claim, outcome, end, record, &finished.ParkedReady)
		faultpoint.Hit(faultpoint.FinishWritten, claim.RunID, string(claim.Step))
		return err
	})
	if err == nil && superseded {
		err = failure(ErrClaimLost, "step %s of run %s was retried while attempt %d ran: nothing of it is recorded",
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

// storable mends what the columns refuse and names what cannot be mended.
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
	// The same file registered twice is one row: its place is the first, its
	// contents are the last.
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

// errNoClaim: the claim has no row.
var errNoClaim = errors.New("there is no such claim")

// beforeFinish is what FinishStep finds.
type beforeFinish struct {
	status    RunStatus
	startedAt *time.Time
	// completedAt matters only when the outcome is there already.
	completedAt *time.Time
	hasRollback bool
	// lastStep of the plan, the rollback not counted.
	lastStep Step
	// attempt is the highest of the step.
	attempt    int
	token      int64
	worker     string
	hasOutcome bool
}

// lockForFinish takes the same locks as begin, and the one on the rollback's
// state, which a good verify writes.
func lockForFinish(ctx context.Context, tx pgx.Tx, claim Claim) (beforeFinish, error) {
	var before beforeFinish
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
	return before, tx.SendBatch(ctx, batch).Close()
}

// ending is what a step's end makes of its run.
type ending struct {
	// status is "" if the run's stays.
	status RunStatus
	// completedAt is zero if the run has not ended.
	completedAt time.Time
	// runStarted repairs a run that has no started_at, which completed_at
	// needs (ck_orchestrator_runs_timestamps).
	runStarted time.Time
	// skipRollback: verify was good, the rollback is not needed.
	skipRollback bool
	// workOver: the run has nothing left to do and gives its workspace up. A
	// run whose plan ends before verify stays running all the same, and so does
	// one whose steps are sent one by one, as somebody may do by hand: it takes
	// the workspace again with the next.
	workOver bool
}

// conclude says what becomes of the run (docs/moonmind.md#state-rows). Pure.
func conclude(before beforeFinish, step Step, outcome Outcome) ending {
	var end ending
	if step == StepRollback {
		switch before.status {
		case RunPending, RunRunning, RunAwaitingApproval:
			// It was failed when the rollback began, so it was retried since. The
			// API may have left the rollback's own attempt as it was.
			return end
		}
	}
	ended := true
	switch {
	case outcome.Status == StepFailed:
		end.status = RunFailed
		// With a rollback to come the run is failed but not complete.
		ended = step == StepRollback || !before.hasRollback
	case step == StepVerify:
		end.status = RunSucceeded
		end.skipRollback = before.hasRollback
	case step == StepRollback:
		end.status = RunRolledBack
	default:
		ended = false
	}
	end.workOver = ended || outcome.NothingFollows || outcome.Status == StepSucceeded && step == before.lastStep
	if ended {
		end.completedAt = outcome.FinishedAt
		end.runStarted = outcome.FinishedAt
		if before.startedAt != nil {
			end.runStarted = *before.startedAt
		}
		// Two machines' clocks may disagree; the CHECK does not care why.
		if end.completedAt.Before(end.runStarted) {
			end.completedAt = end.runStarted
		}
	}
	return end
}

func (e ending) finished(before beforeFinish) Finished {
	f := Finished{Status: before.status, RunEnded: !e.completedAt.IsZero()}
	if e.status != "" {
		f.Status = e.status
	}
	if f.RunEnded {
		f.Duration = e.completedAt.Sub(e.runStarted)
	}
	return f
}

// writeFinish writes everything in one round trip. unpark is set when parked
// messages can be published after it.
func writeFinish(ctx context.Context, tx pgx.Tx, claim Claim, outcome Outcome, end ending, record []byte, unpark *bool) error {
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

	// The row was begun afresh, so that the outcome says all of it: no payload
	// is NULL, not what an earlier attempt left (docs/moonmind.md#c14).
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

	stepEntry := snapshotEntry(string(outcome.Status), outcome.FinishedAt.Sub(claim.StartedAt))
	runEntry := "{}"
	if !end.completedAt.IsZero() {
		runEntry = `{"run": ` + snapshotEntry(string(end.status), end.completedAt.Sub(end.runStarted)) + `}`
	}
	// The snapshot is complete (docs/moonmind.md#c16), and whatever else is in
	// it stays. A value that is not an object is replaced, as there is nothing
	// to add to. Python's updated_at is the transaction's start as well.
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
		// The run has failed or ended: nothing is left to revoke, and a retry
		// must not meet an old wish.
		batch.Queue(`DELETE FROM mm_orchestrator.revocations WHERE run_id = $1`, claim.RunID)
	}
	if end.skipRollback {
		// On the rollback's newest attempt, like every write
		// (docs/moonmind.md#r5). What an earlier rollback left in the row goes:
		// this one was not run.
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

	// The lock of the workspace is the last one.
	if end.workOver {
		queueRelease(batch, claim.RunID)
	} else {
		queueSeen(batch, claim.RunID, "")
	}
	queueUnpark(batch, claim.RunID, unpark)
	return tx.SendBatch(ctx, batch).Close()
}

// snapshotEntry is {"status": …, "durationMs": …} with a float as Python
// writes it: microseconds after the point, and a point always.
func snapshotEntry(status string, duration time.Duration) string {
	ms := strconv.FormatFloat(float64(max(duration, 0).Microseconds())/1000, 'f', -1, 64)
	if !strings.Contains(ms, ".") {
		ms += ".0"
	}
	return `{"status": "` + status + `", "durationMs": ` + ms + `}`
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
