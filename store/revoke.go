package store

import (
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// A Revocation is an operator's word that a run shall end.
type Revocation struct {
	RunID string
	// Reason and By may be "".
	Reason, By string
	At         time.Time
}

// Text is how it reads in the row of the step that it ends.
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

// Revoked says what RevokeRun has done.
type Revoked struct {
	Revocation
	// PreviousStatus is the run's status when it was revoked.
	PreviousStatus RunStatus
	// Ended: the run had not begun, or awaited approval, and has failed now, for
	// good. Succeeded are steps that it had behind it all the same, in the plan's
	// order; they are not rolled back.
	Ended     bool
	Succeeded []Step
	// TooLate: the run had failed or ended already. Nothing was changed.
	TooLate bool
	// RollingBack: it had failed, and its rollback runs or is to come. TooLate is
	// set as well.
	RollingBack bool
	// Step, Worker and Since are of the step that is running, if one is: its
	// worker will notice, or, with Alive false, whoever takes the step over.
	// Otherwise the run fails when its next step begins.
	Step   Step
	Worker string
	Alive  bool
	Since  time.Time
}

// RevokeRun ends a run at an operator's wish.
//
//   - A run of which no step was ever begun is failed and complete when this
//     returns, without rollback. Its first step shows why; its message, when
//     it comes, is answered with that failure. So is a run that awaits approval
//     and of which nothing runs: no message of it is under way that could begin
//     a step or a rollback.
//   - A rollback is not revoked.
//   - Of any other run that is under way the wish is recorded: FindRevocation
//     has it until the run has failed. Called again it replaces the reason.
//   - ErrNotFound if there is no such run; ErrInvalid for what is no run id.
func (s *Store) RevokeRun(ctx context.Context, r Revocation) (Revoked, error) {
	if !isUUID(r.RunID) {
		return Revoked{}, failure(ErrInvalid, "%q is not the id of a run: ids are UUIDs", cut(r.RunID, 80))
	}
	r.Reason, r.By, r.At = headOf(strings.TrimSpace(clean(r.Reason))), cut(clean(r.By), 255), s.now()
	var revoked Revoked
	token := rand.Int64N(1<<62) + 1
	err := s.inTx(ctx, "revoke run "+r.RunID, func(tx pgx.Tx) error {
		revoked = Revoked{Revocation: r}
		run, begun, err := s.lockForRevoke(ctx, tx, &revoked)
		if err != nil {
			return err
		}
		switch revoked.PreviousStatus = run.Status; {
		case run.Status == RunFailed && run.CompletedAt == nil && (run.HasRollback || revoked.Step == StepRollback):
			revoked.TooLate, revoked.RollingBack = true, true
			return nil
		case run.Status == RunSucceeded, run.Status == RunFailed, run.Status == RunRolledBack:
			revoked.TooLate = true
			return nil
		case !begun, run.Status == RunAwaitingApproval && !revoked.Alive:
			revoked.Ended = true
			return s.endUnbegun(ctx, tx, run, &revoked, token)
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

// lockForRevoke takes the locks of begin and finish, for all steps, and says
// whether any was ever begun, by a worker of this program or another.
func (s *Store) lockForRevoke(ctx context.Context, tx pgx.Tx, revoked *Revoked) (run Run, begun bool, err error) {
	steps := make([]string, 0, len(knownSteps))
	for step := range knownSteps {
		steps = append(steps, string(step))
	}
	batch := &pgx.Batch{}
	batch.Queue(lockStates, revoked.RunID, steps)
	batch.Queue(lockRun, revoked.RunID)
	batch.Queue(selectRun, revoked.RunID).QueryRow(func(row pgx.Row) (err error) {
		if run, err = scanRun(row); errors.Is(err, pgx.ErrNoRows) {
			return failure(ErrNotFound, "Run %s not found", revoked.RunID)
		}
		return err
	})
	batch.Queue(`
		SELECT EXISTS (SELECT FROM mm_orchestrator.claims WHERE run_id = $1)
		    OR EXISTS (SELECT FROM spec_workflow_task_states WHERE orchestrator_run_id = $1 AND started_at IS NOT NULL)`,
		revoked.RunID).QueryRow(func(row pgx.Row) error { return row.Scan(&begun) })
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
	err = tx.SendBatch(ctx, batch).Close()
	return run, begun, err
}

// endUnbegun fails the step of a run that would come next, in place of a
// worker, and with it the run.
func (s *Store) endUnbegun(ctx context.Context, tx pgx.Tx, run Run, revoked *Revoked, token int64) error {
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
		Status: StepFailed, Message: r.Text(), FinishedAt: r.At,
		ErrorType: "TaskRevokedError", ErrorModule: "celery.exceptions",
		Traceback: "Traceback (most recent call last):\ncelery.exceptions.TaskRevokedError: " + r.Text() + "\n",
	}
	record, err := json.Marshal(outcome)
	if err != nil {
		return err
	}
	claim := Claim{RunID: run.ID, Step: nextStep(run.Steps, done), Attempt: 1, Token: token, StartedAt: r.At}
	if claim.Step == "" {
		_, err := tx.Exec(ctx, `
			UPDATE orchestrator_runs
			SET status = 'failed', started_at = COALESCE(started_at, $2), completed_at = $2, updated_at = now()
			WHERE id = $1`, run.ID, r.At)
		return err
	}
	err = tx.QueryRow(ctx, `
		SELECT COALESCE(max(attempt), 1) FROM spec_workflow_task_states
		WHERE orchestrator_run_id = $1 AND plan_step::text = $2`, run.ID, string(claim.Step)).Scan(&claim.Attempt)
	if err != nil {
		return err
	}
	_, err = tx.Exec(ctx, `
		INSERT INTO mm_orchestrator.claims (run_id, step, attempt, task_id, worker, token, started_at)
		VALUES ($1, $2, $3, '', $4, $5, $6)
		ON CONFLICT (run_id, step, attempt) DO UPDATE SET token = EXCLUDED.token, holder = NULL`, run.ID, string(claim.Step), claim.Attempt, r.By, token, r.At)
	if err != nil {
		return err
	}
	end := ending{status: RunFailed, completedAt: r.At, runStarted: r.At, workOver: true}
	unpark := false // the sweep of a worker publishes what is let in
	if err := writeFinish(ctx, tx, claim, outcome, end, record, &unpark); err != nil {
		return err
	}
	// No task has run it: the column has no id, and the step no start.
	_, err = tx.Exec(ctx, `
		UPDATE spec_workflow_task_states SET celery_task_id = NULL, started_at = NULL
		WHERE orchestrator_run_id = $1 AND plan_step::text = $2 AND attempt = $3`, run.ID, string(claim.Step), claim.Attempt)
	return err
}

// FindRevocation returns the wish that a run shall end, or ErrNotFound. It
// tries once: it is asked again and again while a step runs.
func (s *Store) FindRevocation(ctx context.Context, runID string) (Revocation, error) {
	ctx, cancel := context.WithTimeout(ctx, s.config.TryTimeout)
	defer cancel()
	r := Revocation{RunID: runID}
	err := s.pool.QueryRow(ctx, `SELECT reason, revoked_by, revoked_at FROM mm_orchestrator.revocations WHERE run_id = $1`, runID).
		Scan(&r.Reason, &r.By, &r.At)
	r.At = r.At.UTC()
	return r, translate("read whether run "+runID+" was revoked", err)
}
