package store

import (
	"time"

	"github.com/jackc/pgx/v5"
)

// Activity is what a run does at the moment. All fields are nil if the run has
// ended or its next message is in the queue.
type Activity struct {
	Working *Working
	Waiting *Waiting
	// WaitingForStep is a step that waits for another step of the run, such as a
	// step that was retried while the rollback runs.
	WaitingForStep *WaitingForStep
	// Paused is a step that waits for the end of a pause of its queue.
	Paused *Paused
}

// Paused is a step's wait for the end of a pause.
type Paused struct {
	// Step is the step whose message is parked.
	Step  Step
	Since time.Time
	Queue string
	// Keeps is the workspace that the run keeps meanwhile, "" for none.
	Keeps string
}

// WaitingForStep is a step's wait for another step of its run.
type WaitingForStep struct {
	// Step is the step whose message is parked.
	Step  Step
	Since time.Time
	// For is the step that it waits for.
	For Working
}

// Working is a step that a worker of this program runs.
type Working struct {
	Step    Step
	Attempt int
	// Worker is the worker's node name. Alive says whether it has its lock. If it
	// is not alive, another worker takes the step over when the broker redelivers
	// the step's message.
	Worker string
	Alive  bool
	// Since is when the attempt was last started; Starts counts its starts.
	Since  time.Time
	Starts int
}

// Waiting is a run's wait for its workspace.
type Waiting struct {
	// Step is the step whose message is parked.
	Step  Step
	Since time.Time
	// Workspace is the queue's name, a colon and the directory.
	Workspace string
	// Holder is the run that holds the workspace. If it is "", the run whose Place is
	// 1 gets the workspace within moments.
	Holder string
	// Place is the position among the runs that wait; 1 is next.
	Place int
}

// withActivity is SQL in front of a query that joins activityOf. living has the
// keys of the live workers. Reading pg_locks is one scan and takes no lock, unlike
// holderLives.
const withActivity = `
	WITH living AS MATERIALIZED (
	    SELECT (l.classid::bigint << 32) | l.objid::bigint AS key
	    FROM pg_catalog.pg_locks AS l
	    JOIN pg_catalog.pg_database AS d ON d.oid = l.database AND d.datname = current_database()
	    WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.mode = 'ExclusiveLock' AND l.granted
	)`

// activityOf is SQL that joins to a row r of orchestrator_runs what the run does.
// Its columns are activityColumns, which activityRow scans.
const activityOf = `
	LEFT JOIN LATERAL (
	    SELECT c.step, c.attempt, c.worker, c.started_at, c.starts, EXISTS (SELECT FROM living AS l WHERE l.key = c.holder) AS alive
	    FROM mm_orchestrator.claims AS c
	    WHERE c.run_id = r.id AND c.outcome IS NULL AND c.holder IS NOT NULL
	    ORDER BY c.started_at DESC
	    LIMIT 1) AS working ON true
	LEFT JOIN LATERAL (
	    SELECT p.step, p.parked_at, p.workspace, h.run_id AS holder,
	           1 + (SELECT count(DISTINCT o.run_id)
	                FROM mm_orchestrator.parked AS o
	                JOIN orchestrator_runs AS r ON r.id = o.run_id
	                WHERE o.workspace = p.workspace AND o.run_id IS DISTINCT FROM h.run_id
	                  AND (o.rank, o.queued_at, o.run_id) < (p.rank, p.queued_at, p.run_id)
	                  AND ` + runGoesOn + `
	               ) AS place
	    FROM mm_orchestrator.parked AS p
	    JOIN mm_orchestrator.holds AS h ON h.workspace = p.workspace
	    WHERE p.run_id = r.id AND h.run_id IS DISTINCT FROM r.id AND ` + runGoesOn + `
	    ORDER BY p.rank, p.id
	    LIMIT 1) AS waiting ON true
	LEFT JOIN LATERAL (
	    SELECT p.step, p.parked_at
	    FROM mm_orchestrator.parked AS p
	    WHERE p.run_id = r.id AND p.step <> working.step AND ` + runGoesOn + `
	    ORDER BY p.rank, p.parked_at, p.id
	    LIMIT 1) AS behind ON true
	LEFT JOIN LATERAL (
	    SELECT p.step, p.parked_at, p.queue, CASE WHEN h.run_id = r.id THEN p.workspace ELSE '' END AS keeps
	    FROM mm_orchestrator.parked AS p
	    JOIN mm_orchestrator.holds AS h ON h.workspace = p.workspace
	    WHERE p.run_id = r.id AND ` + isPaused + `
	    ORDER BY p.rank, p.id
	    LIMIT 1) AS paused ON true`

const activityColumns = `
	working.step, working.attempt, working.worker, working.started_at, working.starts, working.alive,
	waiting.step, waiting.parked_at, waiting.workspace, COALESCE(waiting.holder::text, ''), waiting.place::int,
	behind.step, behind.parked_at,
	paused.step, paused.parked_at, paused.queue, paused.keeps`

// activityRow scans the columns activityColumns, which are NULL for what a run does
// not do.
type activityRow struct {
	step, waitingStep, behindStep    *Step
	pausedStep                       *Step
	pausedSince                      *time.Time
	pausedQueue, keeps               *string
	attempt, starts                  *int
	worker, workspace                *string
	startedAt, parkedAt, behindSince *time.Time
	alive                            *bool
	holder                           string
	place                            *int
}

func (a *activityRow) targets() []any {
	return []any{
		&a.step, &a.attempt, &a.worker, &a.startedAt, &a.starts, &a.alive,
		&a.waitingStep, &a.parkedAt, &a.workspace, &a.holder, &a.place, &a.behindStep, &a.behindSince,
		&a.pausedStep, &a.pausedSince, &a.pausedQueue, &a.keeps,
	}
}

func (a *activityRow) activity() (found Activity) {
	if a.step != nil {
		found.Working = &Working{Step: *a.step, Attempt: *a.attempt, Worker: *a.worker, Alive: *a.alive, Since: a.startedAt.UTC(), Starts: *a.starts}
	}
	if a.step != nil && a.behindStep != nil {
		found.WaitingForStep = &WaitingForStep{Step: *a.behindStep, Since: a.behindSince.UTC(), For: *found.Working}
	}
	if a.waitingStep != nil {
		found.Waiting = &Waiting{Step: *a.waitingStep, Since: a.parkedAt.UTC(), Workspace: *a.workspace, Holder: a.holder, Place: *a.place}
	}
	if a.pausedStep != nil {
		found.Paused = &Paused{Step: *a.pausedStep, Since: a.pausedSince.UTC(), Queue: *a.pausedQueue, Keeps: *a.keeps}
		if found.Waiting != nil && found.Waiting.Holder == "" {
			found.Waiting = nil // the workspace is free: it waits for nothing but the end of the pause
		}
	}
	return found
}

// queueActivity reads the activity of one run.
func queueActivity(batch *pgx.Batch, runID string, into *Activity) {
	batch.Queue(withActivity+` SELECT `+activityColumns+` FROM orchestrator_runs AS r `+activityOf+` WHERE r.id = $1`, runID).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			var row activityRow
			if err := rows.Scan(row.targets()...); err != nil {
				return err
			}
			*into = row.activity()
		}
		return rows.Err()
	})
}
