package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/audit"
)

// A RollbackRequest is an operator's request to roll back a run that has ended.
type RollbackRequest struct {
	RunID string
	// Reason and By may be "".
	Reason, By string
	At         time.Time
	// PreviousStatus and CompletedAt are those of the run before the request.
	PreviousStatus RunStatus
	CompletedAt    time.Time
}

// Text says for an operator who asked for the rollback, when and why.
func (r RollbackRequest) Text() string {
	text := "requested"
	if r.By != "" {
		text += " by " + r.By
	}
	text += " at " + r.At.UTC().Format(time.RFC3339)
	if r.Reason != "" {
		text += ": " + r.Reason
	}
	return text
}

// RequestedRollback is the result of RequestRollback.
type RequestedRollback struct {
	RollbackRequest
	// Obstacles say why the run is not rolled back, each in a sentence without a
	// full stop. Nothing was changed if there are any.
	Obstacles []string
	// Already says that the rollback was requested before and has not ended.
	Already bool
}

// RequestRollback makes the rollback due of a run that has succeeded, or whose
// rollback has failed. queue is the one that the caller works for; by and reason are
// those of request.
//
//   - In one transaction, the run becomes failed and not completed, as after a failed
//     step whose rollback is to come; it takes its workspace, so that no other run
//     begins there; and the rollback's message is parked. Call TakeParked
//     afterwards, and publish. If the caller dies first, the sweep of a worker
//     publishes it. From then on it is a rollback as any other.
//   - It changes nothing, and returns Obstacles, if the run is not in that state; if
//     nothing is recorded about its change, or a worker that keeps no record has had
//     a part in it; if another run holds the workspace; or if another run for the same
//     service, or in the same workspace, has begun to change something since this one
//     ended, and was not rolled back.
//   - A second call before the rollback has ended changes nothing.
//   - What the engine and the workspace have is for the caller to look at.
//   - Without message it only looks.
//   - ErrNotFound if there is no such run; ErrInvalid for a malformed run id; ErrLocked if
//     another run takes the workspace at this moment.
func (s *Store) RequestRollback(ctx context.Context, queue string, request RollbackRequest, message RollbackMessage) (RequestedRollback, error) {
	if !isUUID(request.RunID) {
		return RequestedRollback{}, notARun(request.RunID)
	}
	request.Reason, request.By, request.At = headOf(strings.TrimSpace(clean(request.Reason))), cut(clean(request.By), 255), s.now()
	records := withIDs([]audit.Record{{Kind: audit.RollbackRequested, By: request.By, Text: request.Reason}})
	var result, tried RequestedRollback // tried is what the try before would have done
	err := s.inTx(ctx, "roll back run "+request.RunID, func(tx pgx.Tx) error {
		result = RequestedRollback{RollbackRequest: request}
		seen, err := readEnded(ctx, tx, request.RunID)
		if err != nil {
			return err
		}
		if tried.PreviousStatus != "" {
			if done, err := isRecorded(ctx, tx, request.RunID, records[0].ID); done || err != nil {
				result = tried
				return err
			}
		}
		if r := seen.request; r != nil && seen.run.Status == RunFailed && seen.run.CompletedAt == nil {
			result.RollbackRequest, result.Already = *r, true
			return nil
		}
		if result.Obstacles = seen.obstacles(clean(queue)); len(result.Obstacles) > 0 {
			return nil
		}
		result.PreviousStatus, result.CompletedAt = seen.run.Status, *seen.run.CompletedAt
		if message == nil {
			return nil
		}
		tried = result
		texts, err := s.auditTexts(Claim{RunID: seen.run.ID}, records...)
		if err != nil {
			return err
		}
		batch := &pgx.Batch{}
		texts.queue(batch, nil)
		if err := tx.SendBatch(ctx, batch).Close(); err != nil {
			return err
		}
		hold, err := lockHold(ctx, tx, seen.workspace, clean(queue), seen.run.ID)
		if err != nil {
			return err
		}
		if hold.RunID != "" && hold.RunID != seen.run.ID {
			return failure(ErrLocked, "run %s has just taken the workspace %s: run %s is not rolled back, and nothing was changed", hold.RunID, seen.workspace, seen.run.ID)
		}
		return writeRollbackRequest(ctx, tx, seen, clean(queue), result.RollbackRequest, message)
	})
	return result, err
}

// endedRun is what RequestRollback reads under its locks.
type endedRun struct {
	run Run
	// queue and workspace are "" if nothing is recorded about the change of the run.
	queue, workspace string
	recorded         bool
	reduced          bool
	ranElsewhere     bool
	// holder is the other run that holds the workspace, "" for none.
	holder string
	// active says that a worker has a claim on a step, or that a message is parked.
	active bool
	// request is the newest request for the run, nil for none.
	request *RollbackRequest
	// newer are other runs that have changed something since this one ended.
	newer []newerRun
}

// newerRun is a run that has begun to change something later.
type newerRun struct {
	ID     string
	Status RunStatus
	Step   Step
	Since  time.Time
}

func readEnded(ctx context.Context, tx pgx.Tx, runID string) (endedRun, error) {
	var seen endedRun
	batch := &pgx.Batch{}
	batch.Queue(lockStates, runID, Steps())
	batch.Queue(lockRun, runID)
	batch.Queue(selectRun, runID).QueryRow(func(row pgx.Row) (err error) {
		if seen.run, err = scanRun(row); errors.Is(err, pgx.ErrNoRows) {
			return failure(ErrNotFound, "Run %s not found", runID)
		}
		return err
	})
	// Locked: RemoveChange removes what the record names under this lock.
	batch.Queue(`
		SELECT c.queue, c.workspace, c.record IS NOT NULL, c.reduced_at IS NOT NULL, c.ran_elsewhere,
		       COALESCE((SELECT h.run_id::text FROM mm_orchestrator.holds AS h WHERE h.workspace = c.workspace AND h.run_id <> c.run_id), '')
		FROM mm_orchestrator.changes AS c WHERE c.run_id = $1 FOR UPDATE`, runID).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			if err := rows.Scan(&seen.queue, &seen.workspace, &seen.recorded, &seen.reduced, &seen.ranElsewhere, &seen.holder); err != nil {
				return err
			}
		}
		return rows.Err()
	})
	batch.Queue(`
		SELECT EXISTS (SELECT FROM mm_orchestrator.parked WHERE run_id = $1)
		    OR EXISTS (SELECT FROM mm_orchestrator.claims AS c WHERE c.run_id = $1 AND c.outcome IS NULL AND `+holderLives+`)`,
		runID).QueryRow(func(row pgx.Row) error { return row.Scan(&seen.active) })
	queueRollbackRequest(batch, runID, &seen.request)
	// The state rows tell also of runs of a Python worker. A step that was refused
	// before it changed anything counts too: only its rollback proves that.
	batch.Queue(`
		SELECT DISTINCT ON (o.id) o.id::text, o.status::text, s.plan_step::text, s.started_at
		FROM orchestrator_runs AS own
		JOIN orchestrator_runs AS o ON o.id <> own.id
		JOIN spec_workflow_task_states AS s ON s.orchestrator_run_id = o.id
		LEFT JOIN mm_orchestrator.changes AS c ON c.run_id = own.id
		LEFT JOIN mm_orchestrator.changes AS oc ON oc.run_id = o.id
		WHERE own.id = $1
		  AND (lower(o.target_service) = lower(own.target_service) OR oc.workspace = c.workspace)
		  AND s.plan_step IN ('patch', 'build', 'restart') AND s.started_at > own.completed_at
		  AND o.status <> 'rolled_back'
		ORDER BY o.id, s.started_at DESC`, runID).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			var n newerRun
			if err := rows.Scan(&n.ID, &n.Status, &n.Step, &n.Since); err != nil {
				return err
			}
			seen.newer = append(seen.newer, n)
		}
		return rows.Err()
	})
	return seen, tx.SendBatch(ctx, batch).Close()
}

// obstacles says what stands in the way of a rollback. It is pure.
func (seen endedRun) obstacles(queue string) []string {
	run := seen.run
	switch {
	case run.Status == RunRolledBack:
		return []string{"it is rolled back already"}
	case run.Status == RunFailed && run.CompletedAt == nil:
		return []string{"it has failed, and its rollback is to come without this"}
	case run.Status != RunSucceeded && run.Status != RunFailed:
		return []string{fmt.Sprintf("it is %s, and has not ended: `mm-orchestrator runs revoke` stops it and rolls it back", run.Status)}
	case run.CompletedAt == nil:
		return []string{fmt.Sprintf("it is %s, and has no time of its end", run.Status)}
	}
	var list []string
	add := func(format string, args ...any) { list = append(list, fmt.Sprintf(format, args...)) }
	if !run.HasRollback {
		add("its plan has no rollback")
	}
	switch {
	case seen.workspace == "" || !seen.recorded || seen.reduced:
		add("what takes it back is not kept: it was removed, or no worker of this program has run it")
	case seen.ranElsewhere:
		add("a worker that keeps no record, in Python or of an older version, has run steps of it")
	case seen.queue != queue:
		add("it belongs to queue %s, and this is queue %s: run this where the workers of that queue run, or add --queue %s", seen.queue, queue, seen.queue)
	}
	if seen.holder != "" {
		add("run %s holds the workspace %s: wait for its end", seen.holder, seen.workspace)
	}
	if seen.active {
		add("a worker still has a step or a message of it")
	}
	for _, n := range seen.newer {
		add("run %s (%s) has begun to %s at %s, later than this run: take that one back first", n.ID, n.Status, n.Step, n.Since.UTC().Format(time.RFC3339))
	}
	return list
}

func writeRollbackRequest(ctx context.Context, tx pgx.Tx, seen endedRun, queue string, r RollbackRequest, makeMessage RollbackMessage) error {
	taskID, message, err := makeMessage(seen.run, "", "")
	if err != nil {
		return failure(ErrInvalid, "cannot make the rollback's message of run %s: %v", seen.run.ID, err)
	}
	taskID = clean(taskID)
	batch := &pgx.Batch{}
	// The snapshot forgets the end of the run, and an earlier rollback, as at a retry.
	batch.Queue(`
		UPDATE orchestrator_runs AS r
		SET status = 'failed', completed_at = NULL, updated_at = now(),
		    metrics_snapshot = CASE
		        WHEN jsonb_typeof(r.metrics_snapshot) = 'object' AND jsonb_typeof(r.metrics_snapshot -> 'steps') = 'object'
		        THEN r.metrics_snapshot - 'run' || jsonb_build_object('steps', (r.metrics_snapshot -> 'steps') - 'rollback')
		        ELSE r.metrics_snapshot END
		WHERE r.id = $1`, seen.run.ID)
	batch.Queue(`
		UPDATE spec_workflow_task_states AS s
		SET status = 'queued', plan_step_status = 'pending', celery_state = 'PENDING', celery_task_id = NULL,
		    message = $2, payload = NULL, artifact_refs = '[]', started_at = NULL, finished_at = NULL
		WHERE s.orchestrator_run_id = $1 AND s.plan_step = 'rollback'
		  AND s.attempt = (SELECT max(n.attempt) FROM spec_workflow_task_states AS n WHERE n.orchestrator_run_id = $1 AND n.plan_step = 'rollback')`,
		seen.run.ID, headOf("Rollback "+r.Text()))
	batch.Queue(`
		INSERT INTO mm_orchestrator.rollback_requests (run_id, task_id, reason, requested_by, requested_at, previous_status, completed_at)
		VALUES ($1, $2, $3, $4, $5, $6, $7)`,
		seen.run.ID, taskID, r.Reason, r.By, r.At, string(r.PreviousStatus), r.CompletedAt)
	err = queuePark(batch, parkedInsert{
		workspace: seen.workspace, queue: queue, turn: turnOf(seen.run, StepRollback), step: StepRollback,
		taskID: taskID, root: taskID, why: ParkedRequested, message: message,
	})
	if err != nil {
		return err
	}
	queueHold(batch, seen.workspace, seen.run.ID, taskID)
	return tx.SendBatch(ctx, batch).Close()
}

// queueRollbackRequest reads the newest request for the rollback of a run into found,
// which stays nil if there is none, or if a step has run since: the run was retried.
func queueRollbackRequest(batch *pgx.Batch, runID string, found **RollbackRequest) {
	batch.Queue(`
		SELECT reason, requested_by, requested_at, previous_status, completed_at
		FROM mm_orchestrator.rollback_requests AS request
		WHERE run_id = $1
		  AND NOT EXISTS (SELECT FROM spec_workflow_task_states AS s
		                  WHERE s.orchestrator_run_id = $1 AND s.plan_step <> 'rollback' AND s.started_at > request.requested_at)
		ORDER BY id DESC LIMIT 1`, runID).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			r := RollbackRequest{RunID: runID}
			if err := rows.Scan(&r.Reason, &r.By, &r.At, &r.PreviousStatus, &r.CompletedAt); err != nil {
				return err
			}
			r.At, r.CompletedAt = r.At.UTC(), r.CompletedAt.UTC()
			*found = &r
		}
		return rows.Err()
	})
}
