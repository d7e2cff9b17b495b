package store

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/audit"
)

// PauseMode says what a pause means for runs that have begun.
type PauseMode string

// The modes, as in the column mm_orchestrator.pauses.mode.
const (
	// PauseFinish: a run that has begun goes on to its end.
	PauseFinish PauseMode = "finish"
	// PausePark: the running step ends, and the message of the next one is parked.
	// Its run keeps the workspace.
	PausePark PauseMode = "park"
)

// A Pause is an operator's request that workers begin no new run of a queue.
// A rollback never waits for the end of a pause.
type Pause struct {
	Queue  string
	Mode   PauseMode
	Reason string
	// By may be "".
	By    string
	Since time.Time
	// ChangedBy and ChangedAt say who paused again, with a new reason or mode, and
	// when. ChangedAt is nil if nobody did.
	ChangedBy string
	ChangedAt *time.Time
	// ResumedBy and ResumedAt say who ended the pause, and when. ResumedAt is nil
	// while it is open.
	ResumedBy string
	ResumedAt *time.Time
}

// Text says for an operator that the queue is paused: since when, by whom and why.
func (p Pause) Text() string {
	text := fmt.Sprintf("queue %s is paused since %s", p.Queue, p.Since.UTC().Format(time.RFC3339))
	if p.By != "" {
		text += " by " + p.By
	}
	return text + ": " + p.Reason
}

// pausedBy returns the pause for which a step has to wait that could otherwise
// begin, or nil. It is pure. These steps do not wait:
//
//   - a rollback: it repairs a service;
//   - a step that was in progress when its worker died or stopped: a pause lets
//     running steps end;
//   - the steps of a run that has begun, unless the mode is PausePark;
//   - the next step of a run that was revoked: it only fails, and the rollback
//     follows.
//
// isPaused is the same in SQL.
func (s beginState) pausedBy(step Step) *Pause {
	switch {
	case s.Pause == nil, step == StepRollback, s.Revocation != nil:
		return nil
	case s.State != nil && s.State.PlanStepStatus == "in_progress":
		return nil
	case s.Pause.Mode == PauseFinish && s.HasBegun:
		return nil
	}
	return s.Pause
}

// runHasBegun is SQL over a row r of orchestrator_runs: the present submission of
// the run has begun. A run that is retried after its end begins anew. The API sets
// started_at to NULL when it approves a run, also one that has paused for its
// approval between two steps.
const runHasBegun = `(r.status <> 'pending' OR r.completed_at IS NULL AND (r.started_at IS NOT NULL
	OR EXISTS (SELECT FROM spec_workflow_task_states AS done
	           WHERE done.orchestrator_run_id = r.id AND done.plan_step_status = 'succeeded')))`

// isPaused is SQL over a row p of parked and the row r of its run, all NULL if there
// is no such run: BeginStep would park the message again because the queue is
// paused. A message of a run that has ended, or of none, has no effect and does not
// wait.
const isPaused = `(p.step <> 'rollback' AND ` + runGoesOn + `
	AND EXISTS (SELECT FROM mm_orchestrator.pauses AS pause
	            WHERE pause.queue = p.queue AND pause.resumed_at IS NULL AND (pause.mode = 'park' OR NOT ` + runHasBegun + `))
	AND NOT EXISTS (SELECT FROM mm_orchestrator.revocations AS revoked WHERE revoked.run_id = p.run_id)
	AND (SELECT state.plan_step_status::text FROM spec_workflow_task_states AS state
	     WHERE state.orchestrator_run_id = p.run_id AND state.plan_step::text = p.step
	     ORDER BY state.attempt DESC LIMIT 1) IS DISTINCT FROM 'in_progress')`

const pauseColumns = `queue, mode, reason, paused_by, since, changed_by, changed_at, resumed_by, resumed_at`

func scanPause(row pgx.CollectableRow) (Pause, error) {
	var p Pause
	err := row.Scan(&p.Queue, &p.Mode, &p.Reason, &p.By, &p.Since, &p.ChangedBy, &p.ChangedAt, &p.ResumedBy, &p.ResumedAt)
	p.Since = p.Since.UTC()
	for _, t := range []*time.Time{p.ChangedAt, p.ResumedAt} {
		if t != nil {
			*t = t.UTC()
		}
	}
	return p, err
}

// queuePause reads the open pause of a queue. The lock on its row makes Resume wait
// for the transaction, so that Resume sees every message that was parked for the
// pause.
func queuePause(batch *pgx.Batch, queue string, into **Pause) {
	batch.Queue(`SELECT `+pauseColumns+` FROM mm_orchestrator.pauses WHERE queue = $1 AND resumed_at IS NULL FOR SHARE`, queue).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			p, err := scanPause(rows)
			if err != nil {
				return err
			}
			*into = &p
		}
		return rows.Err()
	})
}

// recordPaused records that a run which has begun waits before this step. Other runs
// have no trail yet.
func (s *Store) recordPaused(ctx context.Context, tx pgx.Tx, claim Claim, pause Pause) error {
	// The ID: a message that is delivered again while it is parked is no second pause.
	id := fmt.Sprintf("%s-%s-%d-%d", audit.Paused, claim.Step, claim.Attempt, pause.Since.UnixMicro())
	texts, err := s.auditTexts(claim, audit.Record{ID: id, Kind: audit.Paused, By: pause.By, Text: pause.Text()})
	if err != nil {
		return err
	}
	batch := &pgx.Batch{}
	texts.queue(batch, nil)
	return tx.SendBatch(ctx, batch).Close()
}

// recordResumed records the end of a pause for the runs of which recordPaused has
// recorded that they wait, and which have not gone on since.
func (s *Store) recordResumed(ctx context.Context, tx pgx.Tx, pause Pause) error {
	since := strconv.FormatInt(pause.Since.UnixMicro(), 10)
	// In the order of their ids: the heads of their trails are locked.
	rows, err := tx.Query(ctx, `
		SELECT DISTINCT p.run_id::text, p.step FROM mm_orchestrator.parked AS p
		WHERE p.queue = $1 AND p.why = $2
		  AND EXISTS (SELECT FROM mm_orchestrator.audit AS a WHERE a.run_id = p.run_id AND a.id LIKE $3)
		ORDER BY 1, 2`, pause.Queue, string(ParkedPaused), string(audit.Paused)+"-%-"+since)
	if err != nil {
		return err
	}
	waiting, err := pgx.CollectRows(rows, pgx.RowToStructByPos[struct {
		Run  string
		Step Step
	}])
	if err != nil || len(waiting) == 0 {
		return err
	}
	batch := &pgx.Batch{}
	for _, w := range waiting {
		texts, err := s.auditTexts(Claim{RunID: w.Run, Step: w.Step}, audit.Record{
			ID: fmt.Sprintf("%s-%s-%s", audit.Resumed, w.Step, since), Kind: audit.Resumed, By: pause.ResumedBy,
			Text: fmt.Sprintf("the pause of queue %s has ended, which began at %s", pause.Queue, pause.Since.Format(time.RFC3339)),
		})
		if err != nil {
			return err
		}
		texts.queue(batch, nil)
	}
	return tx.SendBatch(ctx, batch).Close()
}

// PauseQueue pauses a queue: p.Queue, Mode, Reason and By. If the queue is paused
// already, the pause gets the new mode and reason and keeps Since and By; already
// is true then. It returns the pause.
//
// Steps that begin before the commit are not affected. ErrInvalid without a queue, a
// reason or a known mode.
func (s *Store) PauseQueue(ctx context.Context, p Pause) (pause Pause, already bool, err error) {
	p.Queue, p.Reason, p.By = clean(p.Queue), headOf(strings.TrimSpace(clean(p.Reason))), cut(clean(p.By), 255)
	switch {
	case p.Queue == "" || p.Reason == "":
		return Pause{}, false, failure(ErrInvalid, "a pause needs a queue and a reason")
	case p.Mode != PauseFinish && p.Mode != PausePark:
		return Pause{}, false, failure(ErrInvalid, "%q is no mode of a pause: it is %s or %s", cut(string(p.Mode), 80), PauseFinish, PausePark)
	}
	var tried *Pause // what the try before would have written
	// clock_timestamp: since must not be later than a change of a pause whose
	// transaction began before and waited.
	err = s.inTx(ctx, "pause queue "+p.Queue, func(tx pgx.Tx) error {
		if tried != nil {
			var done bool
			err := tx.QueryRow(ctx, `
				SELECT EXISTS (SELECT FROM mm_orchestrator.pauses WHERE queue = $1 AND since = $2 AND changed_at IS NOT DISTINCT FROM $3)`,
				p.Queue, tried.Since, tried.ChangedAt).Scan(&done)
			if done || err != nil { // only the answer to its commit was lost
				return err
			}
		}
		rows, err := tx.Query(ctx, `
			INSERT INTO mm_orchestrator.pauses AS pause (queue, mode, reason, paused_by, since)
			VALUES ($1, $2, $3, $4, clock_timestamp())
			ON CONFLICT (queue) WHERE resumed_at IS NULL DO UPDATE
			SET mode = EXCLUDED.mode, reason = EXCLUDED.reason, changed_by = EXCLUDED.paused_by,
			    changed_at = GREATEST(pause.since, clock_timestamp())
			RETURNING `+pauseColumns, p.Queue, string(p.Mode), p.Reason, p.By)
		if err != nil {
			return err
		}
		pause, err = pgx.CollectExactlyOneRow(rows, scanPause)
		tried, already = &pause, pause.ChangedAt != nil
		return err
	})
	return pause, already, err
}

// ResumeQueue ends the pause of a queue and gives each free workspace of the queue to
// the run that waits for it and comes first. It returns the pause, nil if the queue
// is not paused.
//
// Call TakeParked afterwards, and publish: it then returns every message that was
// parked for the pause and whose turn has come. If the caller dies first, the sweep
// of a worker publishes them.
func (s *Store) ResumeQueue(ctx context.Context, queue, by string) (*Pause, error) {
	queue = clean(queue)
	var ended, tried *Pause // tried is what the try before would have ended
	err := s.inTx(ctx, "resume queue "+queue, func(tx pgx.Tx) error {
		ended = nil
		batch := &pgx.Batch{}
		batch.Queue(`
			UPDATE mm_orchestrator.pauses SET resumed_by = $2, resumed_at = GREATEST(since, clock_timestamp())
			WHERE queue = $1 AND resumed_at IS NULL
			RETURNING `+pauseColumns, queue, cut(clean(by), 255)).Query(func(rows pgx.Rows) error {
			for rows.Next() {
				p, err := scanPause(rows)
				if err != nil {
					return err
				}
				ended = &p
			}
			return rows.Err()
		})
		if err := tx.SendBatch(ctx, batch).Close(); err != nil {
			return err
		}
		if ended == nil && tried != nil {
			var done bool
			err := tx.QueryRow(ctx, `SELECT EXISTS (SELECT FROM mm_orchestrator.pauses WHERE queue = $1 AND since = $2 AND resumed_at = $3)`,
				queue, tried.Since, tried.ResumedAt).Scan(&done)
			if err != nil {
				return err
			}
			if done { // and only the answer to its commit was lost
				ended = tried
				return nil
			}
		}
		if tried = ended; ended != nil {
			if err := s.recordResumed(ctx, tx, *ended); err != nil {
				return err
			}
		}
		batch = &pgx.Batch{}
		// All holds, not only those that are free: a run that ends at this moment may
		// have found the queue paused, and have passed its workspace on to none.
		batch.Queue(`SELECT 1 FROM mm_orchestrator.holds WHERE queue = $1 ORDER BY workspace FOR UPDATE`, queue)
		batch.Queue(`
			UPDATE mm_orchestrator.holds AS h SET `+grantToNext+`
			WHERE h.queue = $1 AND h.run_id IS NULL
			  AND EXISTS (SELECT FROM mm_orchestrator.parked AS p WHERE p.workspace = h.workspace)`, queue)
		return tx.SendBatch(ctx, batch).Close()
	})
	return ended, err
}

// FindPause returns the open pause of a queue, or nil. It does not retry, as it is for
// health checks and sweeps, which come again.
func (s *Store) FindPause(ctx context.Context, queue string) (*Pause, error) {
	ctx, cancel := context.WithTimeout(ctx, s.config.TryTimeout)
	defer cancel()
	rows, err := s.pool.Query(ctx, `SELECT `+pauseColumns+` FROM mm_orchestrator.pauses WHERE queue = $1 AND resumed_at IS NULL`, clean(queue))
	if err != nil {
		return nil, translate("look whether queue "+queue+" is paused", err)
	}
	list, err := pgx.CollectRows(rows, scanPause)
	if err != nil {
		return nil, translate("look whether queue "+queue+" is paused", err)
	}
	if len(list) == 0 {
		return nil, nil
	}
	return &list[0], nil
}

// ListPauses returns pauses: open ones first, then the newest.
func (s *Store) ListPauses(ctx context.Context, filter PauseFilter) ([]Pause, error) {
	var list []Pause
	err := s.retry(ctx, "list the pauses of queues", func(ctx context.Context) error {
		rows, err := s.pool.Query(ctx, `
			SELECT `+pauseColumns+` FROM mm_orchestrator.pauses
			WHERE $1 IN ('', queue) AND ($2 OR resumed_at IS NULL)
			ORDER BY resumed_at IS NOT NULL, since DESC, id DESC
			LIMIT NULLIF($3::bigint, 0)`, clean(filter.Queue), filter.Ended, filter.Limit)
		if err != nil {
			return err
		}
		list, err = pgx.CollectRows(rows, scanPause)
		return err
	})
	return list, err
}

// PauseFilter selects pauses.
type PauseFilter struct {
	// Queue is "" for any.
	Queue string
	// Ended selects also those that have ended.
	Ended bool
	// Limit is how many are returned; 0 means all.
	Limit int
}
