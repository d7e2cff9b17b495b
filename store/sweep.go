package store

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// WorkspaceState is what a sweep sees of one workspace.
type WorkspaceState struct {
	Workspace string
	// RunID is the run that holds the workspace, "" for none. The fields below are
	// of that run.
	RunID string
	// RunStatus is "" if the run was deleted. RunGoesOn says that it exists and
	// has not ended.
	RunStatus RunStatus
	RunGoesOn bool
	// Paused says that the run has paused before verify, with its change deployed. It
	// is pending when it is approved, and until verify begins.
	Paused bool
	// Working says that a live worker runs a step of the run.
	Working bool
	// Blocked says that a parked message of the run waits for another step of it.
	// The worker with the claim on that step may be dead.
	Blocked bool
	// Parked says that messages of the run are parked, Waiting that those of other runs
	// wait for the workspace.
	Parked, Waiting bool
	// SeenAt is when a worker last had a message or a step of the run, by the
	// database's clock. Idle is how long ago that was.
	SeenAt time.Time
	Idle   time.Duration
	// LongStep says that another session has written to the steps of any run in a
	// transaction that has lasted more than 2 s, as a Python worker does while it
	// runs a step. It may have prefetched messages of other runs.
	LongStep bool
	// Version changes with each commit, by any session, that changes the run or
	// one of its state rows. It is "" for no run.
	Version string
}

// runVersion is SQL for WorkspaceState.Version; id is SQL for the run's id.
// xmin is the transaction that wrote a row. Unlike the columns with times it
// changes with every commit, even if the transaction began long ago.
func runVersion(id string) string {
	return `COALESCE((
		SELECT md5(string_agg(v.written, ' ' ORDER BY v.written))
		FROM (SELECT 'run ' || r.xmin::text AS written FROM orchestrator_runs AS r WHERE r.id = ` + id + `
		      UNION ALL
		      SELECT s.id::text || ' ' || s.xmin::text FROM spec_workflow_task_states AS s WHERE s.orchestrator_run_id = ` + id + `) AS v), '')`
}

// hasPaused is SQL for WorkspaceState.Paused, over a row h of holds.
const hasPaused = `EXISTS (SELECT FROM mm_orchestrator.approvals AS a WHERE a.run_id = h.run_id AND a.queue = h.queue AND a.paused_at IS NOT NULL)`

// longStep is SQL for WorkspaceState.LongStep. PostgreSQL may hide the start of
// another role's transaction. Such a transaction counts as long.
const longStep = `
	SELECT EXISTS (
	    SELECT FROM pg_catalog.pg_locks AS l
	    JOIN pg_catalog.pg_database AS d ON d.oid = l.database AND d.datname = current_database()
	    LEFT JOIN pg_catalog.pg_stat_activity AS a ON a.pid = l.pid
	    WHERE l.locktype = 'relation' AND l.relation = 'spec_workflow_task_states'::regclass AND l.mode = 'RowExclusiveLock' AND l.granted
	      AND l.pid <> pg_backend_pid() AND COALESCE(a.xact_start < clock_timestamp() - interval '2 seconds', true)) AS is`

// Suspect is a run that holds a workspace and may be lost: no message of it seems
// to be left.
type Suspect struct {
	Workspace, Queue, RunID string
	// Version is that of ListWorkspaces when the run was first suspected.
	Version string
	// Grace is how long no worker may have had a message or a step of the run.
	Grace time.Duration
}

// ListWorkspaces returns the workspaces of a queue that a run holds or waits for.
// unacked are the runs of which this worker has unacknowledged messages; it
// renews SeenAt of their workspaces. It changes nothing else.
func (s *Store) ListWorkspaces(ctx context.Context, queue string, unacked []string) ([]WorkspaceState, error) {
	var runs []string
	for _, run := range unacked {
		if isUUID(run) {
			runs = append(runs, run)
		}
	}
	var list []WorkspaceState
	err := s.retry(ctx, "look at the workspaces of queue "+queue, func(ctx context.Context) error {
		list = nil
		batch := &pgx.Batch{}
		if len(runs) > 0 {
			batch.Queue(`
				UPDATE mm_orchestrator.holds SET seen_at = clock_timestamp()
				WHERE queue = $1 AND run_id::text = ANY ($2::text[]) AND seen_at < clock_timestamp() - interval '1 second'`, queue, runs)
		}
		batch.Queue(`
			WITH long_step AS MATERIALIZED (`+longStep+`)
			SELECT h.workspace, COALESCE(h.run_id::text, ''), COALESCE(r.status::text, ''), `+runGoesOn+`,
			       `+hasPaused+`,
			       EXISTS (SELECT FROM mm_orchestrator.claims AS c WHERE c.run_id = h.run_id AND c.outcome IS NULL AND `+holderLives+`),
			       EXISTS (SELECT FROM mm_orchestrator.claims AS c
			               JOIN mm_orchestrator.parked AS b ON b.run_id = c.run_id AND b.step <> c.step
			               WHERE c.run_id = h.run_id AND c.outcome IS NULL AND c.holder IS NOT NULL),
			       EXISTS (SELECT FROM mm_orchestrator.parked AS p WHERE p.workspace = h.workspace AND p.run_id = h.run_id),
			       waiting.is,
			       h.seen_at, EXTRACT(EPOCH FROM clock_timestamp() - h.seen_at)::float8, `+runVersion("h.run_id")+`,
			       (SELECT l.is FROM long_step AS l)
			FROM mm_orchestrator.holds AS h
			LEFT JOIN orchestrator_runs AS r ON r.id = h.run_id
			CROSS JOIN LATERAL (
			    -- The order makes the planner read one row of the index, however many wait.
			    SELECT (SELECT p.id FROM mm_orchestrator.parked AS p
			            WHERE p.workspace = h.workspace AND p.run_id IS DISTINCT FROM h.run_id
			            ORDER BY p.rank, p.queued_at, p.run_id, p.id
			            LIMIT 1) IS NOT NULL AS is
			) AS waiting
			WHERE h.queue = $1 AND (h.run_id IS NOT NULL OR waiting.is)
			ORDER BY h.workspace`, queue).Query(func(rows pgx.Rows) error {
			for rows.Next() {
				var w WorkspaceState
				var idle float64
				err := rows.Scan(&w.Workspace, &w.RunID, &w.RunStatus, &w.RunGoesOn, &w.Paused, &w.Working, &w.Blocked, &w.Parked, &w.Waiting, &w.SeenAt, &idle, &w.Version, &w.LongStep)
				if err != nil {
					return err
				}
				w.Idle = time.Duration(idle * float64(time.Second))
				list = append(list, w)
			}
			return rows.Err()
		})
		return s.transaction(ctx, func(tx pgx.Tx) error { return tx.SendBatch(ctx, batch).Close() })
	})
	return list, err
}

// PassWorkspace gives a workspace to the first run that waits for it, or to none,
// if it is held by runID and that run has ended or was deleted. With runID "" it
// does so if no run holds the workspace. Otherwise it changes nothing.
func (s *Store) PassWorkspace(ctx context.Context, workspace, runID string) error {
	return s.inTx(ctx, "pass on workspace "+workspace, func(tx pgx.Tx) error {
		batch := &pgx.Batch{}
		batch.Queue(`SELECT 1 FROM mm_orchestrator.holds WHERE workspace = $1 FOR UPDATE`, workspace)
		batch.Queue(`
			UPDATE mm_orchestrator.holds AS h SET `+grantToNext+`
			WHERE h.workspace = $1 AND COALESCE(h.run_id::text, '') = $2
			  AND NOT EXISTS (SELECT FROM orchestrator_runs AS r WHERE r.id = h.run_id AND `+runGoesOn+`)`,
			workspace, runID)
		return tx.SendBatch(ctx, batch).Close()
	})
}

// PassPending takes the workspace from a lost run that is still pending and gives
// it to the first run that waits, or to none. It changes nothing if the run has paused
// before verify, as its change is in the workspace. The other conditions are those of
// FailLost, ErrLocked included.
func (s *Store) PassPending(ctx context.Context, suspect Suspect) error {
	if !isUUID(suspect.RunID) {
		return notARun(suspect.RunID)
	}
	return s.inTx(ctx, "pass on workspace "+suspect.Workspace+" of run "+suspect.RunID, func(tx pgx.Tx) error {
		if err := lockSuspect(ctx, tx, suspect); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, `
			UPDATE mm_orchestrator.holds AS h SET `+grantToNext+`
			WHERE h.workspace = $1 AND h.run_id = $2 AND h.seen_at < clock_timestamp() - make_interval(secs => $3::float8)
			  AND EXISTS (SELECT FROM orchestrator_runs AS r WHERE r.id = h.run_id AND r.status = 'pending')
			  AND NOT `+hasPaused+` AND `+runVersion("h.run_id")+` = $4`,
			suspect.Workspace, suspect.RunID, suspect.Grace.Seconds(), suspect.Version)
		return err
	})
}

// lockSuspect takes the locks of FinishStep, for all steps, and returns ErrLocked
// instead of waiting for a row of the shared tables. A session with such a lock
// works on the run, as a Python worker does while it runs a step. If that session
// inserted a state row, nobody sees the row before the commit, but its foreign
// key locks the run's row. The statements after lockSuspect see all that was
// committed before.
func lockSuspect(ctx context.Context, tx pgx.Tx, suspect Suspect) error {
	batch := &pgx.Batch{}
	batch.Queue(lockStates+` NOWAIT`, suspect.RunID, Steps())
	batch.Queue(lockRun+` NOWAIT`, suspect.RunID)
	batch.Queue(`SELECT 1 FROM mm_orchestrator.holds WHERE workspace = $1 FOR UPDATE`, suspect.Workspace)
	return lockedError(tx.SendBatch(ctx, batch).Close(), suspect.RunID)
}

// lockedError turns the error of a statement with NOWAIT into ErrLocked.
func lockedError(err error, runID string) error {
	var refused *pgconn.PgError
	if errors.As(err, &refused) && refused.Code == lockNotAvailable {
		return failure(ErrLocked, "run %s is in use: another session has locked its row or that of one of its steps", runID)
	}
	return err
}

// FreeClaims takes the claims of a run from dead workers, so that parked messages
// of the run's other steps can be published (rule 6 of decide). It is for a claim
// whose own message was lost: otherwise the broker delivers that message again,
// and BeginStep frees the claim. The conditions are those of FailLost, ErrLocked
// included, but messages of the run may be parked.
func (s *Store) FreeClaims(ctx context.Context, suspect Suspect) error {
	if !isUUID(suspect.RunID) {
		return notARun(suspect.RunID)
	}
	return s.inTx(ctx, "free the steps of run "+suspect.RunID, func(tx pgx.Tx) error {
		if err := lockSuspect(ctx, tx, suspect); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, `
			UPDATE mm_orchestrator.claims AS o SET holder = NULL, token = -o.token
			FROM mm_orchestrator.holds AS h
			WHERE h.workspace = $1 AND h.run_id = $2 AND h.seen_at < clock_timestamp() - make_interval(secs => $3::float8)
			  AND `+runVersion("h.run_id")+` = $4
			  AND o.run_id = h.run_id AND o.outcome IS NULL AND o.holder IS NOT NULL
			  AND NOT EXISTS (SELECT FROM mm_orchestrator.claims AS c WHERE c.run_id = h.run_id AND c.outcome IS NULL AND `+holderLives+`)`,
			suspect.Workspace, suspect.RunID, suspect.Grace.Seconds(), suspect.Version)
		return err
	})
}

// LostRun says what FailLost has done.
type LostRun struct {
	// Step is the step that was recorded as failed. It is "" if a step had failed
	// before and only its rollback was lost.
	Step Step
	// Message is that of the state row.
	Message string
	// Finished is as FinishStep returns it, if Step is set.
	Finished Finished
	// RollbackSent says that the rollback's message was parked, for TakeParked.
	RollbackSent bool
}

// RollbackMessage makes the message of a run's rollback. rootTaskID and
// parentTaskID are those of the lost chain, "" if they are not known.
type RollbackMessage func(run Run, rootTaskID, parentTaskID string) (taskID string, message protocol.Delivery, err error)

// FailLost ends a run whose messages were lost, and which would otherwise wait for
// ever. In one transaction it records that the step in progress, or else the
// next one, has failed, and parks the message of the rollback if the plan has
// one.
//
// The caller must have made sure that no message of the run is in the queue and
// that no other program's worker has one. FailLost returns nil and changes
// nothing unless
//
//   - the run holds the workspace,
//   - no worker of this program has had a message or a step of it for the grace,
//   - no live worker has a claim on a step of it,
//   - no message of it is parked,
//   - it is running, or failed and not yet rolled back, or was approved after its
//     pause before verify,
//   - and neither the run nor its states have changed since it was suspected.
//
// If the run is running and all steps of its plan have succeeded, FailLost only
// releases the workspace and returns nil.
//
// It returns ErrLocked, at once, while another session has a row of the run
// locked.
func (s *Store) FailLost(ctx context.Context, suspect Suspect, rollback RollbackMessage) (*LostRun, error) {
	if !isUUID(suspect.RunID) {
		return nil, notARun(suspect.RunID)
	}
	return s.endInPlace(ctx, "end the lost run "+suspect.RunID, suspect.RunID, func(tx pgx.Tx, token int64) (*LostRun, error) {
		seen, err := readLost(ctx, tx, suspect)
		if err != nil || !seen.isLost {
			return nil, err
		}
		return s.endLost(ctx, tx, seen, suspect, token, rollback)
	})
}

// endInPlace runs a transaction that fails a step in place of a worker, with a claim that
// has the token. end returns nil if there is nothing to end. If the answer to a commit is
// lost, the repetition returns what was committed.
func (s *Store) endInPlace(ctx context.Context, doing, runID string, end func(tx pgx.Tx, token int64) (*LostRun, error)) (*LostRun, error) {
	var lost, tried *LostRun
	token := rand.Int64N(1<<62) + 1
	err := s.inTx(ctx, doing, func(tx pgx.Tx) (err error) {
		if lost, err = end(tx, token); lost == nil && tried != nil && err == nil {
			var done bool
			if done, err = isRecorded(ctx, tx, runID, claimRecord(audit.StepEnded, token)); done {
				lost = tried
			}
		}
		if lost != nil {
			tried = lost
		}
		return err
	})
	return lost, err
}

// notARun is the error for a malformed id of a run.
func notARun(id string) error {
	return failure(ErrInvalid, "%q is not the id of a run: ids are UUIDs", cut(id, 80))
}

// lostState is what FailLost reads under its locks.
type lostState struct {
	// isLost says that all conditions of FailLost hold.
	isLost bool
	run    Run
	root   string
	// done are the steps that have succeeded.
	done map[Step]bool
	// open is the newest claim without an outcome, nil for none.
	open *claimRow
	// openStep is the step of open.
	openStep Step
	// paused says that the run has paused before verify, and was approved.
	paused bool
}

func readLost(ctx context.Context, tx pgx.Tx, suspect Suspect) (lostState, error) {
	var seen lostState
	var holds, idle, working, parked, unchanged bool
	if err := lockSuspect(ctx, tx, suspect); err != nil {
		return seen, err
	}
	runID := suspect.RunID
	batch := &pgx.Batch{}
	batch.Queue(selectRun, runID).QueryRow(func(row pgx.Row) (err error) {
		seen.run, err = scanRun(row)
		if errors.Is(err, pgx.ErrNoRows) {
			return nil // PassWorkspace takes the workspace of a deleted run
		}
		return err
	})
	batch.Queue(`
		SELECT COALESCE(h.run_id::text, '') = $2, h.root_task_id, h.seen_at < clock_timestamp() - make_interval(secs => $3::float8),
		       EXISTS (SELECT FROM mm_orchestrator.claims AS c WHERE c.run_id = h.run_id AND c.outcome IS NULL AND `+holderLives+`),
		       EXISTS (SELECT FROM mm_orchestrator.parked AS p WHERE p.run_id = h.run_id),
		       `+runVersion("h.run_id")+` = $4, `+hasPaused+`
		FROM mm_orchestrator.holds AS h
		WHERE h.workspace = $1`, suspect.Workspace, runID, suspect.Grace.Seconds(), suspect.Version).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			if err := rows.Scan(&holds, &seen.root, &idle, &working, &parked, &unchanged, &seen.paused); err != nil {
				return err
			}
		}
		return rows.Err()
	})
	batch.Queue(`
		SELECT c.step, c.attempt, c.task_id, c.worker, c.starts, c.started_at
		FROM mm_orchestrator.claims AS c
		WHERE c.run_id = $1 AND c.outcome IS NULL
		ORDER BY c.started_at DESC
		LIMIT 1`, runID).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			seen.open = &claimRow{}
			if err := rows.Scan(&seen.openStep, &seen.open.Attempt, &seen.open.TaskID, &seen.open.Worker, &seen.open.Starts, &seen.open.StartedAt); err != nil {
				return err
			}
		}
		return rows.Err()
	})
	if err := tx.SendBatch(ctx, batch).Close(); err != nil {
		return seen, err
	}
	var err error
	seen.done, err = succeededSteps(ctx, tx, runID)
	seen.paused = seen.paused && seen.run.Status == RunPending
	seen.isLost = seen.run.ID != "" && holds && idle && !working && !parked && unchanged && goesOn(seen.run) &&
		(seen.run.Status == RunRunning || seen.run.Status == RunFailed || seen.paused)
	return seen, err
}

// lostStep returns the step of a run that was lost, and has not failed before, and the message for
// its state row. The step is "" if all steps of the plan have succeeded. It is
// pure.
func (seen lostState) lostStep() (step Step, message string) {
	const end = "its message is in no queue, and no worker has it. Retry the run to begin again"
	if seen.paused {
		return StepVerify, "run was lost: step verify did not begin after the approval; " + end
	}
	if seen.open != nil && seen.openStep != StepRollback && !seen.done[seen.openStep] {
		return seen.openStep, fmt.Sprintf("run was lost: step %s was in progress on worker %s, which is not connected to the database; %s", seen.openStep, seen.open.Worker, end)
	}
	step = nextStep(seen.run.Steps, seen.done)
	return step, fmt.Sprintf("run was lost: step %s did not begin; %s", step, end)
}

func (s *Store) endLost(ctx context.Context, tx pgx.Tx, seen lostState, suspect Suspect, token int64, rollback RollbackMessage) (*LostRun, error) {
	lost := &LostRun{}
	run := seen.run
	parent := ""
	if seen.open != nil {
		parent = seen.open.TaskID
	}
	// Claims on all steps, so that a retry does not wait for a dead worker.
	_, err := tx.Exec(ctx, `
		UPDATE mm_orchestrator.claims SET holder = NULL, token = -token
		WHERE run_id = $1 AND outcome IS NULL AND holder IS NOT NULL`, run.ID)
	if err != nil {
		return nil, err
	}
	if seen.paused {
		if err := endPause(ctx, tx, run.ID, suspect.Queue); err != nil {
			return nil, err
		}
	}
	if run.Status == RunRunning || seen.paused {
		step, message := seen.lostStep()
		if step == "" {
			_, err := releaseIfComplete(ctx, tx, run)
			return nil, err
		}
		lost.Step, lost.Message = step, message
		if err := s.failLostStep(ctx, tx, seen, token, lost); err != nil {
			return nil, err
		}
	}
	if !run.HasRollback {
		// Without a rollback nothing more is to come. A failed run is only found
		// here if its plan was changed after it had failed.
		if lost.Step == "" {
			batch := &pgx.Batch{}
			queueRelease(batch, run.ID)
			return nil, tx.SendBatch(ctx, batch).Close()
		}
		return lost, nil
	}
	taskID, message, err := rollback(run, seen.root, parent)
	if err != nil {
		return nil, failure(ErrInvalid, "cannot make the rollback's message of run %s: %v", run.ID, err)
	}
	batch := &pgx.Batch{}
	err = queuePark(batch, parkedInsert{
		workspace: suspect.Workspace, queue: suspect.Queue, turn: turnOf(run, StepRollback), step: StepRollback,
		taskID: clean(taskID), root: seen.root, why: ParkedLost, message: message,
	})
	if err != nil {
		return nil, err
	}
	queueTouchHold(batch, run.ID, "")
	lost.RollbackSent = true
	return lost, tx.SendBatch(ctx, batch).Close()
}

// failLostStep records the lost step as FinishStep would.
func (s *Store) failLostStep(ctx context.Context, tx pgx.Tx, seen lostState, token int64, lost *LostRun) error {
	now := s.now()
	claim := Claim{RunID: seen.run.ID, Step: lost.Step, Attempt: 1, Token: token, Starts: 1, StartedAt: now}
	outcome := Outcome{
		Status: StepFailed, Message: lost.Message, ErrorType: "RuntimeError", ErrorModule: "builtins",
		Traceback: "Traceback (most recent call last):\nRuntimeError: " + lost.Message + "\n", FinishedAt: now,
		Audit: []audit.Record{{Kind: audit.Lost, At: now, Text: lost.Message}},
	}
	if open := seen.open; open != nil && seen.openStep == lost.Step {
		claim.Attempt, claim.TaskID, claim.Starts = open.Attempt, open.TaskID, open.Starts
		if open.StartedAt.Before(now) {
			claim.StartedAt = open.StartedAt.UTC()
		}
	}
	before := finishState{status: seen.run.Status, startedAt: seen.run.StartedAt, hasRollback: seen.run.HasRollback}
	end := conclude(before, claim.Step, outcome)
	lost.Finished = end.finished(before)
	parkedReady, err := s.failInPlace(ctx, tx, &claim, seen.root, clean(s.config.Worker), outcome, end)
	lost.Finished.ParkedReady = parkedReady
	return err
}
