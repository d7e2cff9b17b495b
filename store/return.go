package store

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// ParkedRow is a parked message as an operator sees it.
type ParkedRow struct {
	ID        int64
	Queue     string
	Workspace string
	RunID     string
	Step      Step
	TaskID    string
	Why       ParkedWhy
	Since     time.Time
	// Holder is the run that has the workspace, "" for none.
	Holder string
}

// ListParked lists the parked messages of a queue, or of all queues if it is
// "", in the order in which TakeAllParked gives them out: by queue, and
// in it rollbacks first, then high priority, then oldest run.
func (s *Store) ListParked(ctx context.Context, queue string) ([]ParkedRow, error) {
	var list []ParkedRow
	err := s.retry(ctx, "list parked messages", func(ctx context.Context) error {
		rows, err := s.pool.Query(ctx, `
			SELECT p.id, p.queue, p.workspace, p.run_id::text, p.step, p.task_id, p.why, p.parked_at, COALESCE(h.run_id::text, '')
			FROM mm_orchestrator.parked AS p
			LEFT JOIN mm_orchestrator.holds AS h ON h.workspace = p.workspace
			WHERE $1 IN ('', p.queue)
			ORDER BY p.queue, `+parkedOrder, queue)
		if err != nil {
			return err
		}
		list, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (p ParkedRow, err error) {
			err = row.Scan(&p.ID, &p.Queue, &p.Workspace, &p.RunID, &p.Step, &p.TaskID, &p.Why, &p.Since, &p.Holder)
			p.Since = p.Since.UTC()
			return p, err
		})
		return err
	})
	return list, err
}

// parkedOrder orders rows p of parked as turns do.
const parkedOrder = `p.rank, p.queued_at, p.run_id, p.id`

// NewestParked is the highest id of the queue's parked messages, 0 for none.
// What is parked later gets a higher one.
func (s *Store) NewestParked(ctx context.Context, queue string) (int64, error) {
	var id int64
	err := s.retry(ctx, "look at the parked messages of queue "+queue, func(ctx context.Context) error {
		return s.pool.QueryRow(ctx, `SELECT COALESCE(max(id), 0) FROM mm_orchestrator.parked WHERE queue = $1`, queue).Scan(&id)
	})
	return id, err
}

// TakeAllParked gives out messages of a queue whether or not their turn has
// come, in the order of turns, to be published because no worker of this
// program will. It is otherwise like TakeParked: at most 8, given to one worker
// at a time, to be followed by DropParked. Only ids up to newest are taken: a
// worker that starts meanwhile takes what is published and parks it again,
// under a higher id.
func (s *Store) TakeAllParked(ctx context.Context, queue string, newest int64) ([]ParkedMessage, error) {
	var taken []ParkedMessage
	err := s.retry(ctx, "take all parked messages of queue "+queue, func(ctx context.Context) error {
		taken = nil
		if _, err := s.workerLock.ensure(ctx); err != nil {
			return err
		}
		rows, err := s.pool.Query(ctx, `
			WITH ready AS MATERIALIZED (
			    SELECT p.id
			    FROM mm_orchestrator.parked AS p
			    WHERE p.queue = $1 AND p.id <= $5
			      AND (p.taken_by IS NULL OR p.taken_by = $2 OR p.taken_at < clock_timestamp() - make_interval(secs => $3::float8)
			           OR pg_try_advisory_xact_lock_shared(p.taken_by))
			    ORDER BY `+parkedOrder+`
			    LIMIT $4
			    FOR UPDATE OF p SKIP LOCKED
			), taken AS (
			    UPDATE mm_orchestrator.parked AS p
			    SET taken_by = $2, taken_at = clock_timestamp()
			    FROM ready
			    WHERE p.id = ready.id
			    RETURNING p.*
			)
			SELECT p.id, p.run_id::text, p.step, p.task_id, p.why, p.parked_at, p.queue, p.headers::text, p.properties::text, p.body
			FROM taken AS p
			ORDER BY `+parkedOrder,
			queue, s.workerLock.key, takenLease.Seconds(), takeLimit, newest)
		if err != nil {
			return err
		}
		taken, err = pgx.CollectRows(rows, scanParked)
		return err
	})
	return taken, err
}

// ClearHolds frees the workspaces of a queue from runs that need them no more
// or have not begun, for the last worker that leaves the queue. Nobody gives
// them on from then on, and such a run's message is in the queue like any
// other's.
//
// A run that has begun keeps its workspace: the next worker of this program,
// which may start at once, must not let another run in between two steps of it.
// When a Python worker has carried the run to its end, the next sweep sees that
// and frees the workspace.
func (s *Store) ClearHolds(ctx context.Context, queue string) error {
	return s.inTx(ctx, "free the workspaces of queue "+queue, func(tx pgx.Tx) error {
		batch := &pgx.Batch{}
		batch.Queue(`SELECT 1 FROM mm_orchestrator.holds WHERE queue = $1 AND run_id IS NOT NULL ORDER BY workspace FOR UPDATE`, queue)
		// A statement after the locks: it sees a run that has just begun.
		batch.Queue(`
			UPDATE mm_orchestrator.holds AS h SET run_id = NULL, root_task_id = '', since = clock_timestamp(), seen_at = clock_timestamp()
			WHERE h.queue = $1 AND h.run_id IS NOT NULL
			  AND NOT EXISTS (SELECT FROM orchestrator_runs AS r WHERE r.id = h.run_id AND r.status <> 'pending' AND `+runGoesOn+`)`, queue)
		return tx.SendBatch(ctx, batch).Close()
	})
}
