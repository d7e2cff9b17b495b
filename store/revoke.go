package store

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/audit"
)

// A Revocation is an operator's request to end a run.
type Revocation struct {
	RunID string
	// Reason and By may be "".
	Reason, By string
	At         time.Time
	// Lost says that no message of the run is left, as after a Python worker has died
	// or failed without a record: see RevokeRun. It is not recorded.
	Lost bool
}

// Text is the message of the step that the revocation ends.
func (r Revocation) Text() string {
	text := "Revoked by operator"
	if r.By != "" {
		text += " " + r.By
	}
	if r.Reason != "" {
		text += ": " + r.Reason
	}
	return text
}

// Revoked is the result of RevokeRun.
type Revoked struct {
	Revocation
	// PreviousStatus is the run's status when it was revoked.
	PreviousStatus RunStatus
	// Ended: the run had not started, or awaited approval, or was lost. It has failed
	// now and is completed. Succeeded are its steps that had succeeded before, in the plan's
	// order; they are not rolled back.
	Ended     bool
	Succeeded []Step
	// TooLate: the run had already failed or ended. Nothing was changed.
	TooLate bool
	// RollingBack: the run had failed, and its rollback runs or is to come. TooLate
	// is set as well.
	RollingBack bool
	// Step, Worker and Since are those of the running step, if there is one. Its
	// worker ends it, or, if Alive is false, the worker that takes it over does.
	// If no step is running, the run fails when its next step begins.
	Step   Step
	Worker string
	Alive  bool
	Since  time.Time
}

// RevokeRun ends a run at an operator's request.
//
//   - If no step of the run was ever started, RevokeRun fails and completes the
//     run itself, without rollback. The state row of the next step has the reason,
//     and BeginStep answers that step's message with the failure. It does the same
//     for a run that awaits approval and of which no live worker runs a step,
//     since no message of such a run can start a step or a rollback. One that has
//     paused before verify is rolled back instead: EndUnapproved does that.
//   - A rollback cannot be revoked.
//   - With Lost set, RevokeRun fails and completes any other run in the same way,
//     without rollback: nobody else could end a run that no worker of this program has
//     ever had a message of. ErrNotLost if a worker of this program has a step or a
//     parked message of it, or if it holds a workspace, since then a worker ends it
//     (FailLost). ErrLocked, at once, while another session has locked its rows.
//   - For any other run that has not ended, RevokeRun records the request:
//     BeginStep and CheckClaim return it until the run has failed. A second call
//     replaces the reason.
//   - ErrNotFound if there is no such run; ErrInvalid for a malformed run id.
func (s *Store) RevokeRun(ctx context.Context, r Revocation) (Revoked, error) {
	if !isUUID(r.RunID) {
		return Revoked{}, notARun(r.RunID)
	}
	r.Reason, r.By, r.At = headOf(strings.TrimSpace(clean(r.Reason))), cut(clean(r.By), 255), s.now()
	var revoked Revoked
	token := rand.Int64N(1<<62) + 1
	id := claimRecord(audit.Revoked, token)
	var tried Revoked // what an earlier try would have done
	err := s.inTx(ctx, "revoke run "+r.RunID, func(tx pgx.Tx) error {
		revoked = Revoked{Revocation: r}
		defer func() {
			if revoked.Ended {
				tried = revoked
			}
		}()
		run, started, paused, err := s.lockForRevoke(ctx, tx, &revoked)
		if err != nil {
			return err
		}
		if tried.Ended {
			if done, err := isRecorded(ctx, tx, run.ID, id); done || err != nil {
				revoked = tried
				return err
			}
		}
		switch revoked.PreviousStatus = run.Status; {
		case run.Status == RunFailed && run.CompletedAt == nil && (run.HasRollback || revoked.Step == StepRollback):
			revoked.TooLate, revoked.RollingBack = true, true
			return nil
		case run.Status == RunSucceeded, run.Status == RunFailed, run.Status == RunRolledBack:
			revoked.TooLate = true
			return nil
		case !started, run.Status == RunAwaitingApproval && !revoked.Alive && !paused:
			revoked.Ended = true
			return s.failNextStep(ctx, tx, run, &revoked, token, id)
		case r.Lost:
			if err := checkLost(ctx, tx, run.ID); err != nil {
				return err
			}
			revoked.Ended = true
			return s.failNextStep(ctx, tx, run, &revoked, token, id)
		}
		if err := s.appendByHand(ctx, tx, run.ID, revokedRecord(r, id)); err != nil {
			return err
		}
		_, err = tx.Exec(ctx, `
			INSERT INTO mm_orchestrator.revocations (run_id, reason, revoked_by, revoked_at)
			VALUES ($1, $2, $3, $4)
			ON CONFLICT (run_id) DO UPDATE
			SET reason = EXCLUDED.reason, revoked_by = EXCLUDED.revoked_by, revoked_at = EXCLUDED.revoked_at`,
			run.ID, r.Reason, r.By, r.At)
		return err
	})
	return revoked, err
}

// checkLost returns ErrNotLost if a worker of this program knows the run, and will end it.
func checkLost(ctx context.Context, tx pgx.Tx, runID string) error {
	var known bool
	err := tx.QueryRow(ctx, `
		SELECT EXISTS (SELECT FROM mm_orchestrator.claims WHERE run_id = $1 AND outcome IS NULL AND holder IS NOT NULL)
		    OR EXISTS (SELECT FROM mm_orchestrator.parked WHERE run_id = $1)
		    OR EXISTS (SELECT FROM mm_orchestrator.holds WHERE run_id = $1)`, runID).Scan(&known)
	if err == nil && known {
		err = failure(ErrNotLost, "run %s has the workspace, a parked message or a running step, so that a worker of this program ends it and rolls it back. Nothing was changed", runID)
	}
	return err
}

// revokedRecord is the record of the audit trail.
func revokedRecord(r Revocation, id string) audit.Record {
	return audit.Record{ID: id, Kind: audit.Revoked, At: r.At, By: r.By, Text: r.Reason}
}

// lockForRevoke takes the locks of begin and finish, for all steps. started says
// whether any worker, of this program or another, has ever started a step, paused
// whether the run has paused before verify.
func (s *Store) lockForRevoke(ctx context.Context, tx pgx.Tx, revoked *Revoked) (run Run, started, paused bool, err error) {
	batch := &pgx.Batch{}
	wait := ""
	if revoked.Lost {
		wait = ` NOWAIT` // a Python worker may be at a step of it, however long
	}
	batch.Queue(lockStates+wait, revoked.RunID, Steps())
	batch.Queue(lockRun+wait, revoked.RunID)
	batch.Queue(selectRun, revoked.RunID).QueryRow(func(row pgx.Row) (err error) {
		if run, err = scanRun(row); errors.Is(err, pgx.ErrNoRows) {
			return failure(ErrNotFound, "Run %s not found", revoked.RunID)
		}
		return err
	})
	batch.Queue(`
		SELECT EXISTS (SELECT FROM mm_orchestrator.claims WHERE run_id = $1)
		    OR EXISTS (SELECT FROM spec_workflow_task_states WHERE orchestrator_run_id = $1 AND started_at IS NOT NULL)`,
		revoked.RunID).QueryRow(func(row pgx.Row) error { return row.Scan(&started) })
	batch.Queue(`SELECT EXISTS (SELECT FROM mm_orchestrator.approvals WHERE run_id = $1 AND paused_at IS NOT NULL)`, revoked.RunID).QueryRow(func(row pgx.Row) error {
		return row.Scan(&paused)
	})
	batch.Queue(`
		SELECT c.step, c.worker, c.started_at, `+holderLives+` FROM mm_orchestrator.claims AS c
		WHERE c.run_id = $1 AND c.outcome IS NULL AND c.holder IS NOT NULL
		ORDER BY c.started_at DESC LIMIT 1`, revoked.RunID).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			var step string
			if err := rows.Scan(&step, &revoked.Worker, &revoked.Since, &revoked.Alive); err != nil {
				return err
			}
			revoked.Step, revoked.Since = Step(step), revoked.Since.UTC()
		}
		return rows.Err()
	})
	if err = tx.SendBatch(ctx, batch).Close(); revoked.Lost {
		err = lockedError(err, revoked.RunID)
	}
	return run, started, paused, err
}

// failNextStep records, in place of a worker, that the next step of a run has
// failed, and with it the run.
func (s *Store) failNextStep(ctx context.Context, tx pgx.Tx, run Run, revoked *Revoked, token int64, id string) error {
	r := revoked.Revocation
	done, err := succeededSteps(ctx, tx, run.ID)
	if err != nil {
		return err
	}
	for _, step := range planSteps(run.Steps) {
		if done[step] {
			revoked.Succeeded = append(revoked.Succeeded, step)
		}
	}
	outcome := Outcome{
		Status: StepFailed, Message: r.Text(), FinishedAt: r.At, Audit: []audit.Record{revokedRecord(r, id)},
		ErrorType: "TaskRevokedError", ErrorModule: "celery.exceptions",
		Traceback: "Traceback (most recent call last):\ncelery.exceptions.TaskRevokedError: " + r.Text() + "\n",
	}
	claim := Claim{RunID: run.ID, Step: nextStep(run.Steps, done), Attempt: 1, Token: token, Starts: 1, StartedAt: r.At}
	if claim.Step == "" {
		err := s.appendByHand(ctx, tx, run.ID, revokedRecord(r, id),
			audit.Record{ID: claimRecord(audit.RunEnded, token), Kind: audit.RunEnded, At: r.At, Status: string(RunFailed)})
		if err != nil {
			return err
		}
		_, err = tx.Exec(ctx, `
			UPDATE orchestrator_runs
			SET status = 'failed', started_at = COALESCE(started_at, $2), completed_at = GREATEST(started_at, $2), updated_at = now()
			WHERE id = $1`, run.ID, r.At)
		return err
	}
	end := runChange{status: RunFailed, completedAt: r.At, runStarted: r.At, releaseHold: true}
	if run.StartedAt != nil {
		end.runStarted = *run.StartedAt
		if end.completedAt.Before(end.runStarted) {
			end.completedAt = end.runStarted
		}
	}
	// The sweep of a worker publishes parked messages.
	if _, err := s.failInPlace(ctx, tx, &claim, "", r.By, outcome, end); err != nil {
		return err
	}
	// No task has run the step, so it has no task id and no start.
	_, err = tx.Exec(ctx, `
		UPDATE spec_workflow_task_states SET celery_task_id = NULL, started_at = NULL
		WHERE orchestrator_run_id = $1 AND plan_step::text = $2 AND attempt = $3`, run.ID, string(claim.Step), claim.Attempt)
	return err
}

// queueRevocation reads the request to end a run into found, which stays nil if
// there is none.
func queueRevocation(batch *pgx.Batch, runID string, found **Revocation) {
	batch.Queue(`SELECT reason, revoked_by, revoked_at FROM mm_orchestrator.revocations WHERE run_id = $1`, runID).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			r := Revocation{RunID: runID}
			if err := rows.Scan(&r.Reason, &r.By, &r.At); err != nil {
				return err
			}
			r.At = r.At.UTC()
			*found = &r
		}
		return rows.Err()
	})
}
