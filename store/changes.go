package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// Change is what the database knows about the change of a run, and about the run.
type Change struct {
	ChangeState
	RunID string
	// Queue and Workspace are those of the run's steps. Only a worker of the queue
	// reaches the files and images that the record names.
	Queue, Workspace string
	// TargetService and RunStatus are "" if the run was deleted.
	TargetService string
	RunStatus     RunStatus
	// Over says that no step of the run is to come unless it is retried: it has
	// ended or was deleted, or holds no workspace and has no message parked.
	Over bool
	// LastAt is when the run ended, or else when anything was last recorded of it.
	LastAt time.Time
	// Reduced says that RemoveChange has removed all but what its caller kept.
	Reduced bool
	// CreatedAt is when the first step of the run began.
	CreatedAt time.Time
}

// ChangeFilter selects changes of runs.
type ChangeFilter struct {
	// Queue is the queue of the run's steps, "" for any.
	Queue string
	// RunID is "" for any run.
	RunID string
	// Over selects those of runs that are over, at least for Age.
	Over bool
	Age  time.Duration
	// NotReduced leaves out those that are reduced.
	NotReduced bool
	// Limit is how many are returned; 0 means all.
	Limit int
}

// changeOver is SQL for Change.Over. A run that is running or failed may be over:
// its plan ends before verify, or somebody sends its steps one by one.
const changeOver = `(
	(r.id IS NULL OR r.status IN ('succeeded', 'failed', 'rolled_back', 'running'))
	AND NOT EXISTS (SELECT FROM mm_orchestrator.holds AS h WHERE h.run_id = c.run_id)
	AND NOT EXISTS (SELECT FROM mm_orchestrator.parked AS p WHERE p.run_id = c.run_id)
	AND NOT EXISTS (SELECT FROM mm_orchestrator.claims AS k WHERE k.run_id = c.run_id AND k.outcome IS NULL AND k.holder IS NOT NULL))`

// changeLastAt is SQL for Change.LastAt.
const changeLastAt = `GREATEST(c.updated_at, COALESCE(r.completed_at, r.updated_at))`

// selectChanges selects what a ChangeFilter says.
const selectChanges = `
	SELECT c.record::text, c.ran_elsewhere, c.run_id::text, c.queue, c.workspace, COALESCE(r.target_service, ''), COALESCE(r.status::text, ''),
	       ` + changeOver + `, ` + changeLastAt + `, c.reduced_at IS NOT NULL, c.created_at
	FROM mm_orchestrator.changes AS c
	LEFT JOIN orchestrator_runs AS r ON r.id = c.run_id
	WHERE ($1::text = '' OR c.queue = $1)
	  AND ($2::text = '' OR c.run_id::text = $2)
	  AND (NOT $3::boolean OR ` + changeLastAt + ` <= clock_timestamp() - make_interval(secs => $4::float8) AND ` + changeOver + `)
	  AND (NOT $5::boolean OR c.reduced_at IS NULL)
	ORDER BY c.created_at, c.run_id
	LIMIT NULLIF($6::bigint, 0)`

func (f ChangeFilter) args() []any {
	return []any{clean(f.Queue), strings.ToLower(f.RunID), f.Over, f.Age.Seconds(), f.NotReduced, f.Limit}
}

func scanChange(row pgx.Row) (Change, error) {
	var c Change
	var record *string
	err := row.Scan(&record, &c.RunElsewhere, &c.RunID, &c.Queue, &c.Workspace, &c.TargetService, &c.RunStatus, &c.Over, &c.LastAt, &c.Reduced, &c.CreatedAt)
	if record != nil {
		c.Record = json.RawMessage(*record)
	}
	c.LastAt, c.CreatedAt = c.LastAt.UTC(), c.CreatedAt.UTC()
	return c, err
}

// ListChanges returns the changes of runs, those of the oldest first.
func (s *Store) ListChanges(ctx context.Context, filter ChangeFilter) ([]Change, error) {
	if filter.RunID != "" && !isUUID(filter.RunID) {
		return nil, notARun(filter.RunID)
	}
	var list []Change
	err := s.retry(ctx, "list the changes of runs", func(ctx context.Context) error {
		rows, err := s.pool.Query(ctx, selectChanges, filter.args()...)
		if err != nil {
			return err
		}
		list, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (Change, error) { return scanChange(row) })
		return err
	})
	return list, err
}

// RemoveChange removes the change of one run, filter.RunID, if it is one that the
// filter selects. remove removes what the record names; it returns a record of
// what is left of it, or nil for nothing.
//
//   - remove runs under a lock. BeginStep of a retry of the run waits for it and
//     finds the change as remove has left it. A second RemoveChange of the run
//     does not wait.
//   - The lock is lost if remove takes longer than Config.TryTimeout, with whose
//     end ctx ends. The record stays then.
//   - After an error of remove, which RemoveChange returns, the record stays.
//     remove will be called again with it, also after a crash.
//   - ErrNotFound if the filter does not select a change, or somebody else has
//     locked it.
func (s *Store) RemoveChange(ctx context.Context, filter ChangeFilter, remove func(context.Context, Change) (left json.RawMessage, err error)) error {
	if !isUUID(filter.RunID) {
		return notARun(filter.RunID)
	}
	doing := "remove the change of run " + filter.RunID
	ctx, cancel := context.WithTimeoutCause(ctx, s.config.TryTimeout, fmt.Errorf("removing the change of run %s took longer than %s", filter.RunID, s.config.TryTimeout))
	defer cancel()
	var removing error
	err := s.transaction(ctx, func(tx pgx.Tx) error {
		// Two statements: the second reads the run after the lock is granted.
		var locked bool
		err := tx.QueryRow(ctx, `SELECT true FROM mm_orchestrator.changes WHERE run_id = $1 FOR UPDATE SKIP LOCKED`, filter.RunID).Scan(&locked)
		if err != nil {
			return err
		}
		found, err := scanChange(tx.QueryRow(ctx, selectChanges, filter.args()...))
		if err != nil {
			return err
		}
		left, err := remove(ctx, found)
		if err == nil && left != nil {
			left, err = cleanJSON(left)
		}
		switch {
		case err != nil:
			removing = err
			return err
		case left == nil:
			_, err = tx.Exec(ctx, `DELETE FROM mm_orchestrator.changes WHERE run_id = $1`, filter.RunID)
		default:
			// updated_at stays: it says since when the run is over.
			_, err = tx.Exec(ctx, `UPDATE mm_orchestrator.changes SET record = $2::text::json, reduced_at = now() WHERE run_id = $1`, filter.RunID, string(left))
		}
		return err
	})
	switch {
	case removing != nil:
		return removing
	case errors.Is(err, pgx.ErrNoRows):
		return failure(ErrNotFound, "run %s has no change that can be removed now", filter.RunID)
	}
	return translate(doing, err)
}
