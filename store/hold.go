package store

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// A turn is what orders the runs that wait for a workspace: a rollback first,
// then high priority, then the run that was queued first.
type turn struct {
	RunID    string
	Rank     int
	QueuedAt time.Time
}

// Ranks, as in the column mm_orchestrator.parked.rank.
const (
	rankRollback = iota
	rankHigh
	rankNormal
)

func turnOf(run Run, step Step) turn {
	t := turn{RunID: run.ID, Rank: rankNormal, QueuedAt: run.QueuedAt}
	switch {
	case step == StepRollback:
		t.Rank = rankRollback
	case run.Priority == "high":
		t.Rank = rankHigh
	}
	return t
}

// precedes says that t comes before other. The order is that of the index
// parked_order.
func (t turn) precedes(other turn) bool {
	switch {
	case t.Rank != other.Rank:
		return t.Rank < other.Rank
	case !t.QueuedAt.Equal(other.QueuedAt):
		return t.QueuedAt.Before(other.QueuedAt)
	}
	return t.RunID < other.RunID
}

// holdRow is the hold of a workspace, read under its row lock.
type holdRow struct {
	// RunID is the run that holds the workspace, "" for none.
	RunID string
	// Next is the first of the other runs that wait for it, nil for none, and while a run
	// holds it. A run that waits for the end of a pause is none of them.
	Next *turn
}

// admission is the answer of admit. One of start, wait and grant is set.
type admission struct {
	// start: the run holds the workspace. take, with start: it does not yet, and
	// must take it.
	start, take bool
	// wait: another run holds the workspace.
	wait bool
	// grant: nobody holds the workspace, and this run has waited for it and comes
	// first.
	grant *turn
}

// admit says whether a step that can start may use its workspace. It is pure.
// The first of these rules that applies decides:
//
//  1. The run holds the workspace: start, whichever runs wait. So a rollback
//     never waits for other runs.
//  2. Another run holds it: wait.
//  3. Nobody holds it, and a run with an earlier turn waits: grant it to that run.
//  4. Otherwise: take it and start.
func admit(hold holdRow, own turn) admission {
	switch {
	case hold.RunID == own.RunID:
		return admission{start: true}
	case hold.RunID != "":
		return admission{wait: true}
	case hold.Next != nil && hold.Next.precedes(own):
		return admission{grant: hold.Next}
	}
	return admission{start: true, take: true}
}

// runGoesOn is SQL over a row r of orchestrator_runs, all NULL if there is no such
// run: the run exists and has not ended. A failed run goes on until its rollback
// has ended. goesOn is the same in Go.
const runGoesOn = `(r.id IS NOT NULL AND r.status NOT IN ('succeeded', 'rolled_back') AND NOT (r.status = 'failed' AND r.completed_at IS NOT NULL))`

func goesOn(run Run) bool {
	switch run.Status {
	case RunSucceeded, RunRolledBack:
		return false
	case RunFailed:
		return run.CompletedAt == nil
	}
	return true
}

// lockHold locks the row of a workspace, and inserts it if there is none. Every
// transaction takes this lock last, after those of states and runs.
func lockHold(ctx context.Context, tx pgx.Tx, workspace, queue, runID string) (holdRow, error) {
	var hold holdRow
	batch := &pgx.Batch{}
	batch.Queue(`
		INSERT INTO mm_orchestrator.holds AS h (workspace, queue) VALUES ($1, $2)
		ON CONFLICT (workspace) DO UPDATE SET queue = EXCLUDED.queue
		RETURNING COALESCE(h.run_id::text, '')`, workspace, queue).QueryRow(func(row pgx.Row) error {
		return row.Scan(&hold.RunID)
	})
	// A statement after the lock, so that it sees all messages parked before. Nobody is
	// next while a run holds the workspace: during a pause all may have to be read.
	batch.Queue(`
		SELECT p.run_id::text, p.rank, p.queued_at
		FROM mm_orchestrator.parked AS p
		JOIN orchestrator_runs AS r ON r.id = p.run_id
		WHERE p.workspace = $1 AND p.run_id <> $2 AND `+runGoesOn+` AND NOT `+isPaused+`
		  AND (SELECT h.run_id IS NULL FROM mm_orchestrator.holds AS h WHERE h.workspace = $1)
		ORDER BY p.rank, p.queued_at, p.run_id
		LIMIT 1`, workspace, runID).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			hold.Next = &turn{}
			if err := rows.Scan(&hold.Next.RunID, &hold.Next.Rank, &hold.Next.QueuedAt); err != nil {
				return err
			}
		}
		return rows.Err()
	})
	return hold, tx.SendBatch(ctx, batch).Close()
}

// queueHold gives a workspace, whose row is locked, to a run.
func queueHold(batch *pgx.Batch, workspace, runID, rootTaskID string) {
	batch.Queue(`
		UPDATE mm_orchestrator.holds
		SET run_id = $2, root_task_id = $3, since = clock_timestamp(), seen_at = clock_timestamp()
		WHERE workspace = $1`, workspace, runID, rootTaskID)
}

// queueTouchHold records that a worker has had a message of the run just now.
func queueTouchHold(batch *pgx.Batch, runID, rootTaskID string) {
	batch.Queue(`
		UPDATE mm_orchestrator.holds
		SET seen_at = clock_timestamp(), root_task_id = COALESCE(NULLIF($2, ''), root_task_id)
		WHERE run_id = $1`, runID, rootTaskID)
}

// queueRelease passes each workspace of a run on to the first run that waits for
// it. The first statement locks, so that the second one sees all that wait.
func queueRelease(batch *pgx.Batch, runID string) {
	batch.Queue(`SELECT 1 FROM mm_orchestrator.holds WHERE run_id = $1 ORDER BY workspace FOR UPDATE`, runID)
	batch.Queue(`UPDATE mm_orchestrator.holds AS h SET `+grantToNext+` WHERE h.run_id = $1`, runID)
}

// grantToNext is the SET of an UPDATE of holds AS h whose rows are locked. It
// passes over runs that have ended, whose messages have no effect and need no
// workspace, and over those that wait for the end of a pause.
const grantToNext = `
		(run_id, root_task_id) = (
		    SELECT n.run_id, COALESCE(n.root_task_id, '')
		    FROM (SELECT 1) AS always
		    LEFT JOIN LATERAL (
		        SELECT p.run_id, p.root_task_id
		        FROM mm_orchestrator.parked AS p
		        JOIN orchestrator_runs AS r ON r.id = p.run_id
		        WHERE p.workspace = h.workspace AND p.run_id IS DISTINCT FROM h.run_id AND ` + runGoesOn + ` AND NOT ` + isPaused + `
		        ORDER BY p.rank, p.queued_at, p.run_id
		        LIMIT 1) AS n ON true),
		since = clock_timestamp(), seen_at = clock_timestamp()`

// queueParkedReady reads whether messages of the run, or of any run that holds a
// workspace, are parked. They can probably be published; TakeParked checks.
func queueParkedReady(batch *pgx.Batch, runID string, found *bool) {
	// From the workspaces to the messages, of which there may be very many. LIMIT makes
	// sure that the planner keeps this order.
	batch.Queue(`
		SELECT EXISTS (SELECT FROM mm_orchestrator.parked AS p WHERE p.run_id = $1)
		    OR EXISTS (SELECT FROM mm_orchestrator.holds AS h
		               CROSS JOIN LATERAL (SELECT FROM mm_orchestrator.parked AS p WHERE p.run_id = h.run_id LIMIT 1) AS waiting)`,
		runID).QueryRow(func(row pgx.Row) error { return row.Scan(found) })
}

// releaseIfComplete passes on the workspaces of a run that has nothing left to
// do. BeginStep calls it when a message of the run has no effect. parkedReady
// says whether parked messages may be published.
func releaseIfComplete(ctx context.Context, tx pgx.Tx, run Run) (parkedReady bool, err error) {
	complete := !goesOn(run)
	if !complete && run.Status == RunRunning {
		done, err := succeededSteps(ctx, tx, run.ID)
		if err != nil {
			return false, err
		}
		complete = nextStep(run.Steps, done) == ""
	}
	if !complete {
		return false, nil
	}
	batch := &pgx.Batch{}
	queueRelease(batch, run.ID)
	queueParkedReady(batch, run.ID, &parkedReady)
	return parkedReady, tx.SendBatch(ctx, batch).Close()
}

// succeededSteps are those whose newest attempt has succeeded.
func succeededSteps(ctx context.Context, tx pgx.Tx, runID string) (map[Step]bool, error) {
	rows, err := tx.Query(ctx, `
		SELECT DISTINCT ON (plan_step) plan_step::text, COALESCE(plan_step_status::text, '')
		FROM spec_workflow_task_states
		WHERE orchestrator_run_id = $1
		ORDER BY plan_step, attempt DESC`, runID)
	if err != nil {
		return nil, err
	}
	done := map[Step]bool{}
	var step Step
	var status StepStatus
	_, err = pgx.ForEachRow(rows, []any{&step, &status}, func() error {
		done[step] = status == StepSucceeded
		return nil
	})
	return done, err
}
