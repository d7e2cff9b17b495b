package store

import (
	"bytes"
	"context"
	"slices"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
)

// ParkedRow describes a parked message to an operator.
type ParkedRow struct {
	ID        int64
	Queue     string
	Workspace string
	RunID     string
	Step      Step
	TaskID    string
	Why       ParkedWhy
	Since     time.Time
	// Holder is the run that holds the workspace, "" for none.
	Holder string
}

// ListParked returns the parked messages of a queue, or of all queues if it is "",
// by queue and in the order of TakeAllParked: rollbacks first, then high priority,
// then the run queued first.
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

// parkedOrder is SQL that orders rows p of parked by turn.
const parkedOrder = `p.rank, p.queued_at, p.run_id, p.id`

// ParkedState is the state of a queue's parked messages.
type ParkedState struct {
	// Newest is the highest id, 0 for none. Messages that are parked later get higher
	// ids.
	Newest int64
	// Sent says that some were to be published and are still parked. The broker may have
	// them too: nobody knows whether their publisher has died before or after that.
	Sent bool
}

// LookAtParked returns the state of a queue's parked messages.
func (s *Store) LookAtParked(ctx context.Context, queue string) (ParkedState, error) {
	var parked ParkedState
	err := s.retry(ctx, "look at the parked messages of queue "+queue, func(ctx context.Context) error {
		return s.pool.QueryRow(ctx, `
			SELECT COALESCE(max(id), 0), COALESCE(bool_or(taken_by IS NOT NULL), false) FROM mm_orchestrator.parked WHERE queue = $1`, queue).Scan(&parked.Newest, &parked.Sent)
	})
	return parked, err
}

// RenewParked says of each message whether it is parked for a queue, so that another copy
// of it must not stay in the queue. It gives those a new id, as if they had been parked
// anew: whoever was publishing one, and has lost its lock or its time meanwhile, does not
// delete it any more. A message that a live worker is publishing does not count as parked:
// the copy in the queue is the one that stays.
func (s *Store) RenewParked(ctx context.Context, queue string, messages []StepMessage) ([]bool, error) {
	keys := make([][]byte, len(messages))
	for i, m := range messages {
		keys[i] = m.key()
	}
	renewed := make([]bool, len(messages))
	err := s.retry(ctx, "renew parked messages of queue "+queue, func(ctx context.Context) error {
		if _, err := s.workerLock.ensure(ctx); err != nil {
			return err
		}
		rows, err := s.pool.Query(ctx, `
			UPDATE mm_orchestrator.parked AS p SET id = DEFAULT
			WHERE p.queue = $1 AND p.message_key = ANY ($4) AND `+canBeTaken+`
			RETURNING p.message_key`, queue, s.workerLock.key, takenLease.Seconds(), keys)
		if err != nil {
			return err
		}
		found, err := pgx.CollectRows(rows, pgx.RowTo[[]byte])
		for i, key := range keys {
			renewed[i] = slices.ContainsFunc(found, func(other []byte) bool { return bytes.Equal(key, other) })
		}
		return err
	})
	return renewed, err
}

// canBeTaken is SQL over a row p of parked: no other worker is publishing it. $2 is the
// key of this Store's worker, $3 are the seconds of takenLease.
const canBeTaken = `(p.taken_by IS NULL OR p.taken_by = $2 OR p.taken_at < clock_timestamp() - make_interval(secs => $3::float8)
	OR pg_try_advisory_xact_lock_shared(p.taken_by))`

// TakeAllParked is like TakeParked, but takes messages whether or not they can be
// started, in the order of turns. It is for returning them to the queue when no
// worker of this program is left to publish them. At most 8 are returned and
// reserved; call DropParked after each was published.
//
// Only ids up to newest are taken. A worker that starts meanwhile may receive a
// published message and park it again, under a higher id; without this limit the
// two would go on for ever.
func (s *Store) TakeAllParked(ctx context.Context, queue string, newest int64) ([]ParkedMessage, error) {
	var taken []ParkedMessage
	err := s.retry(ctx, "take all parked messages of queue "+queue, func(ctx context.Context) error {
		taken = nil
		if _, err := s.workerLock.ensure(ctx); err != nil {
			return err
		}
		rows, err := s.pool.Query(ctx, `
			WITH candidates AS MATERIALIZED (
			    SELECT c.id
			    FROM mm_orchestrator.holds AS h
			    CROSS JOIN LATERAL (
			        SELECT p.id
			        FROM mm_orchestrator.parked AS p
			        WHERE p.workspace = h.workspace AND p.queue = $1 AND p.id <= $4 AND `+canBeTaken+`
			        ORDER BY `+parkedOrder+`
			        LIMIT `+strconv.Itoa(takeLimit)+`) AS c
			), ready AS MATERIALIZED (
			    SELECT p.id
			    FROM candidates
			    JOIN mm_orchestrator.parked AS p ON p.id = candidates.id
			    WHERE `+canBeTaken+` -- again, under the lock
			    ORDER BY `+parkedOrder+`
			    LIMIT `+strconv.Itoa(takeLimit)+`
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
			queue, s.workerLock.key, takenLease.Seconds(), newest)
		if err != nil {
			return err
		}
		taken, err = pgx.CollectRows(rows, scanParked)
		return err
	})
	return taken, err
}

// ClearHolds releases the workspaces of a queue that are held by runs which have
// ended, were deleted or have not begun. The last worker that leaves the queue
// calls it, since no worker is left to pass these workspaces on.
//
// A run that has begun keeps its workspace. A worker of this program may start at
// once, and must not let another run in between two steps of this one. If a
// Python worker ends the run, the next sweep releases the workspace.
func (s *Store) ClearHolds(ctx context.Context, queue string) error {
	return s.inTx(ctx, "free the workspaces of queue "+queue, func(tx pgx.Tx) error {
		batch := &pgx.Batch{}
		batch.Queue(`SELECT 1 FROM mm_orchestrator.holds WHERE queue = $1 AND run_id IS NOT NULL ORDER BY workspace FOR UPDATE`, queue)
		// A statement after the locks, so that it sees a run that has just begun.
		batch.Queue(`
			UPDATE mm_orchestrator.holds AS h SET run_id = NULL, root_task_id = '', since = clock_timestamp(), seen_at = clock_timestamp()
			WHERE h.queue = $1 AND h.run_id IS NOT NULL
			  AND NOT EXISTS (SELECT FROM orchestrator_runs AS r WHERE r.id = h.run_id AND r.status <> 'pending' AND `+runGoesOn+`)`, queue)
		return tx.SendBatch(ctx, batch).Close()
	})
}
