package store

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// An ApproveRequest is an operator's approval of a run.
type ApproveRequest struct {
	RunID    string
	Approver Approver
	// Token is what the column gets: see EncryptApprovalToken.
	Token []byte
	// ExpiresAt defaults to the end of the gate's validity.
	ExpiresAt time.Time
	// Queue and Workspace are those of BeginRequest; GateService too.
	Queue       string
	Workspace   func(Run) string
	GateService func(Run) string
}

// Approved is the result of Approve.
type Approved struct {
	Run                  Run
	Gates                []Gate
	GrantedAt, ExpiresAt time.Time
	// Paused says that the run goes on after its pause before verify.
	Paused bool
}

// Approve approves a run as MoonMind's API does (docs/moonmind.md#approval): token,
// snapshot and status of the run's row. chain makes the message that starts the run's
// steps; it is parked in the same transaction, so that it cannot be lost. Publish it
// with TakeParked; otherwise a worker's sweep does.
//
//   - ErrInvalid if the run does not wait for approval, if the approver has none of
//     the gate's roles, or if the approval would have expired already. Nothing is
//     changed then.
//   - ErrNotFound if there is no such run.
func (s *Store) Approve(ctx context.Context, r ApproveRequest, chain func(Run) (taskID string, message protocol.Delivery, err error)) (Approved, error) {
	r.Approver = Approver{ID: strings.TrimSpace(clean(r.Approver.ID)), Role: clean(r.Approver.Role)}
	switch {
	case !isUUID(r.RunID):
		return Approved{}, notARun(r.RunID)
	case r.Approver.ID == "" || r.Approver.Role == "":
		return Approved{}, failure(ErrInvalid, "an approval needs the id and the role of who approves")
	case len(r.Token) == 0:
		return Approved{}, failure(ErrInvalid, "an approval needs a token")
	}
	records := withIDs([]audit.Record{{Kind: audit.ApprovalGiven, By: r.Approver.ID}})
	var approved Approved
	err := s.inTx(ctx, "approve run "+r.RunID, func(tx pgx.Tx) error {
		approved = Approved{}
		run, a, err := s.readForApprove(ctx, tx, r)
		if err != nil {
			return err
		}
		if run.Status != RunAwaitingApproval {
			return failure(ErrInvalid, "run %s is %s: only a run that waits for approval can be approved", run.ID, run.Status)
		}
		now := s.now()
		approval := Approval{Approver: r.Approver, GrantedAt: now, ExpiresAt: r.ExpiresAt.UTC()}
		a.Now = now
		if reason := a.checkTerms(run, approval, a.Record.PausedAt != nil); reason != "" {
			return failure(ErrInvalid, "run %s cannot be approved: %s", run.ID, reason)
		}
		approved = Approved{Run: run, Gates: a.Gates, GrantedAt: now, ExpiresAt: a.expiry(approval), Paused: a.Record.PausedAt != nil}
		if err := writeApproval(ctx, tx, run, a, r, approved); err != nil {
			return err
		}
		records[0].Approval = &audit.Approval{Approver: r.Approver.ID, Role: r.Approver.Role, GrantedAt: approved.GrantedAt, ExpiresAt: approved.ExpiresAt}
		texts, err := s.auditTexts(Claim{RunID: run.ID}, records...)
		if err != nil {
			return err
		}
		batch := &pgx.Batch{}
		texts.queue(batch, nil)
		if err := tx.SendBatch(ctx, batch).Close(); err != nil {
			return err
		}
		taskID, message, err := chain(run)
		if err != nil {
			return failure(ErrInvalid, "cannot make the message of run %s: %v", run.ID, err)
		}
		return parkChain(ctx, tx, run, r, clean(taskID), message)
	})
	return approved, err
}

func (s *Store) readForApprove(ctx context.Context, tx pgx.Tx, r ApproveRequest) (run Run, a approvalRow, err error) {
	batch := &pgx.Batch{}
	batch.Queue(lockStates, r.RunID, Steps())
	batch.Queue(lockRun, r.RunID)
	batch.Queue(selectRun, r.RunID).QueryRow(func(row pgx.Row) (err error) {
		if run, err = scanRun(row); errors.Is(err, pgx.ErrNoRows) {
			return failure(ErrNotFound, "Run %s not found", r.RunID)
		}
		return err
	})
	reader := queueApproval(batch, r.RunID, clean(r.Queue))
	if err := tx.SendBatch(ctx, batch).Close(); err != nil {
		return Run{}, approvalRow{}, err
	}
	service := serviceOf(run)
	if r.GateService != nil {
		service = r.GateService(run)
	}
	a, err = reader.finish(ctx, tx, run, service, s.now())
	return run, a, err
}

// isoTime is how Python prints a time with a zone.
func isoTime(t time.Time) string {
	layout := "2006-01-02T15:04:05.000000-07:00"
	if t.Truncate(time.Microsecond).Nanosecond() == 0 {
		layout = "2006-01-02T15:04:05-07:00"
	}
	return t.UTC().Format(layout)
}

// writeApproval writes the run's row as POST …/approvals does.
func writeApproval(ctx context.Context, tx pgx.Tx, run Run, a approvalRow, r ApproveRequest, approved Approved) error {
	requirement := "none"
	for _, g := range a.Gates {
		if requirement == "none" || g.Service == serviceOf(run) {
			requirement = g.Requirement
		}
	}
	block, err := json.Marshal(map[string]any{
		"required": len(a.Gates) > 0, "requirement": requirement, "status": "granted", "approver": r.Approver,
		"grantedAt": isoTime(approved.GrantedAt), "expiresAt": isoTime(approved.ExpiresAt),
	})
	if err != nil {
		return err
	}
	_, err = tx.Exec(ctx, `
		UPDATE orchestrator_runs AS r
		SET status = 'pending', approval_token = $2, started_at = NULL, completed_at = NULL,
		    metrics_snapshot = CASE jsonb_typeof(r.metrics_snapshot) WHEN 'object' THEN r.metrics_snapshot ELSE '{}' END
		        || jsonb_build_object('approval', $3::text::jsonb),
		    updated_at = now()
		WHERE r.id = $1`, run.ID, r.Token, string(block))
	return err
}

// parkChain parks the message that starts a run, and gives the run its workspace if it
// is free.
func parkChain(ctx context.Context, tx pgx.Tx, run Run, r ApproveRequest, taskID string, message protocol.Delivery) error {
	workspace, queue := clean(r.Workspace(run)), clean(r.Queue)
	hold, err := lockHold(ctx, tx, workspace, queue, run.ID)
	if err != nil {
		return err
	}
	steps := planSteps(run.Steps)
	if len(steps) == 0 {
		return failure(ErrInvalid, "the plan of run %s has no step", run.ID)
	}
	p := parkedInsert{workspace: workspace, queue: queue, turn: turnOf(run, steps[0]), step: steps[0], taskID: taskID, root: taskID, why: ParkedLost, message: message}
	batch := &pgx.Batch{}
	switch admitted := admit(hold, p.turn); {
	case admitted.take:
		queueHold(batch, workspace, run.ID, taskID)
	case admitted.grant != nil:
		queueHold(batch, workspace, admitted.grant.RunID, "")
	}
	if err := queuePark(batch, p); err != nil {
		return err
	}
	return tx.SendBatch(ctx, batch).Close()
}

// A Look returns what a waiting run would deploy from its workspace, or nil if it is
// not known now.
type Look func(ctx context.Context, run Run) *Files

// PresentAwaiting records what the runs that wait for approval would do, so that an
// approval covers that and nothing that comes later. A worker's sweep calls it. It
// writes only what has changed. It looks at the 100 runs that have changed last.
func (s *Store) PresentAwaiting(ctx context.Context, queue string, service func(Run) string, look Look) error {
	type waiting struct {
		run    Run
		named  string
		record approvalRecord
	}
	var list []waiting
	var gates []Gate
	doing := "look at the runs that wait for approval"
	err := s.retry(ctx, doing, func(ctx context.Context) error {
		list = nil
		batch := &pgx.Batch{}
		batch.Queue(selectGates).Query(func(rows pgx.Rows) (err error) {
			gates, err = pgx.CollectRows(rows, scanGate)
			return err
		})
		batch.Queue(`
			SELECT `+runColumns+`, COALESCE(r.approval_gate_id::text, ''), a.presented::text, a.paused_at
			FROM orchestrator_runs AS r
			JOIN orchestrator_action_plans AS p ON p.id = r.action_plan_id
			LEFT JOIN mm_orchestrator.approvals AS a ON a.run_id = r.id AND a.queue = $1
			WHERE r.status = 'awaiting_approval' AND COALESCE(octet_length(r.approval_token), 0) = 0
			ORDER BY r.updated_at DESC, r.id
			LIMIT 100`, queue).Query(func(rows pgx.Rows) error {
			for rows.Next() {
				var w waiting
				var presented *string
				var err error
				if w.run, err = scanRun(rows, &w.named, &presented, &w.record.PausedAt); err != nil {
					return err
				}
				if presented != nil {
					if err := json.Unmarshal([]byte(*presented), &w.record.Presented); err != nil {
						return err
					}
				}
				list = append(list, w)
			}
			return rows.Err()
		})
		return s.transaction(ctx, func(tx pgx.Tx) error { return tx.SendBatch(ctx, batch).Close() })
	})
	if err != nil {
		return err
	}
	for _, w := range list {
		apply := gatesOf(gates, service(w.run), w.named)
		if len(apply) == 0 {
			continue
		}
		now, before := effectsOf(w.run, apply), w.record.Presented
		switch {
		case w.record.PausedAt != nil && before != nil:
			now = w.record.presentedInPause(now)
		default:
			if now.Files = look(ctx, w.run); now.Files == nil && before != nil {
				now.Files = before.Files
			}
		}
		if before != nil && len(before.rowDifferences(now)) == 0 && len(before.fileDifferences(now, false)) == 0 && (before.Files != nil || now.Files == nil) {
			continue
		}
		if err := s.present(ctx, queue, w.run, now); err != nil {
			return err
		}
	}
	return nil
}

// present records what a run would do, unless it no longer waits.
func (s *Store) present(ctx context.Context, queue string, run Run, now Effects) error {
	text, err := json.Marshal(now)
	if err != nil {
		return err
	}
	return s.inTx(ctx, "record what run "+run.ID+" would do", func(tx pgx.Tx) error {
		batch := &pgx.Batch{}
		// The lock makes an approval wait, or be seen.
		batch.Queue(`SELECT 1 FROM orchestrator_runs WHERE id = $1 FOR KEY SHARE`, run.ID)
		batch.Queue(`
			INSERT INTO mm_orchestrator.approvals AS a (run_id, queue, presented, presented_at)
			SELECT r.id, $2, $3::text::json, clock_timestamp() FROM orchestrator_runs AS r
			WHERE r.id = $1 AND r.status = 'awaiting_approval' AND COALESCE(octet_length(r.approval_token), 0) = 0
			ON CONFLICT (run_id, queue) DO UPDATE SET presented = EXCLUDED.presented, presented_at = EXCLUDED.presented_at`,
			run.ID, queue, string(text))
		return tx.SendBatch(ctx, batch).Close()
	})
}

// An Unapproved is a run that EndUnapproved has ended.
type Unapproved struct {
	LostRun
	RunID string
}

// EndUnapproved ends the runs of a queue that have waited before verify for an approval
// for as long as they may, or that an operator has revoked meanwhile: verify fails, and
// the rollback's message is parked. Every worker's sweep may call it; each end is one
// transaction that checks again.
func (s *Store) EndUnapproved(ctx context.Context, queue string, rollback RollbackMessage) ([]Unapproved, error) {
	var runs []string
	doing := "look for runs that were not approved in time"
	err := s.retry(ctx, doing, func(ctx context.Context) error {
		rows, err := s.pool.Query(ctx, `
			SELECT a.run_id::text FROM mm_orchestrator.approvals AS a
			JOIN orchestrator_runs AS r ON r.id = a.run_id
			WHERE a.queue = $1 AND r.status = 'awaiting_approval' AND a.paused_at IS NOT NULL
			  AND (a.wait_until < clock_timestamp() OR EXISTS (SELECT FROM mm_orchestrator.revocations AS v WHERE v.run_id = a.run_id))`, queue)
		if err != nil {
			return err
		}
		runs, err = pgx.CollectRows(rows, pgx.RowTo[string])
		return err
	})
	var ended []Unapproved
	for _, id := range runs {
		var lost *LostRun
		if err == nil {
			lost, err = s.endInPlace(ctx, "end run "+id+", which was not approved", id, func(tx pgx.Tx, token int64) (*LostRun, error) {
				return s.endUnapproved(ctx, tx, id, queue, token, rollback)
			})
		}
		if lost != nil && err == nil {
			ended = append(ended, Unapproved{*lost, id})
		}
	}
	return ended, err
}

func (s *Store) endUnapproved(ctx context.Context, tx pgx.Tx, id, queue string, token int64, rollback RollbackMessage) (*LostRun, error) {
	var run Run
	var since, until time.Time
	var workspace, root, parent string
	var attempt int
	var due, working bool
	var revocation *Revocation
	batch := &pgx.Batch{}
	batch.Queue(lockStates, id, Steps())
	batch.Queue(lockRun, id)
	batch.Queue(selectRun, id).Query(func(rows pgx.Rows) (err error) {
		for rows.Next() {
			if run, err = scanRun(rows); err != nil {
				return err
			}
		}
		return rows.Err()
	})
	batch.Queue(`
		SELECT a.paused_at, a.wait_until, a.workspace, a.paused_attempt, a.wait_until < clock_timestamp()
		FROM mm_orchestrator.approvals AS a
		WHERE a.run_id = $1 AND a.queue = $2 AND a.paused_at IS NOT NULL
		  AND NOT EXISTS (SELECT FROM spec_workflow_task_states AS s
		                  WHERE s.orchestrator_run_id = $1 AND s.plan_step = 'verify' AND s.attempt > a.paused_attempt)`, id, queue).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			if err := rows.Scan(&since, &until, &workspace, &attempt, &due); err != nil {
				return err
			}
		}
		return rows.Err()
	})
	batch.Queue(`
		SELECT c.task_id, c.root_task_id, `+holderLives+` FROM mm_orchestrator.claims AS c
		WHERE c.run_id = $1 AND c.step = 'verify' ORDER BY c.attempt`, id).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			var lives bool
			if err := rows.Scan(&parent, &root, &lives); err != nil {
				return err
			}
			working = working || lives
		}
		return rows.Err()
	})
	queueRevocation(batch, id, &revocation)
	if err := tx.SendBatch(ctx, batch).Close(); err != nil {
		return nil, err
	}
	if run.ID == "" || run.Status != RunAwaitingApproval || attempt == 0 || working || !due && revocation == nil {
		return nil, nil
	}
	now := s.now()
	lost := &LostRun{Step: StepVerify, Message: "The run waited before verify for an approval from " + since.UTC().Format(time.RFC3339) + " until " +
		until.UTC().Format(time.RFC3339) + " and got none. Retry the run to begin again"}
	outcome := Outcome{Status: StepFailed, ErrorType: "RuntimeError", ErrorModule: "builtins", FinishedAt: now}
	if revocation == nil {
		outcome.Audit = []audit.Record{{
			Kind: audit.LimitReached, At: now, Text: lost.Message, Rule: &audit.Rule{Name: "approval.wait", Limit: until.Sub(since).Round(time.Second).String()},
		}}
	} else {
		lost.Message, outcome.ErrorType, outcome.ErrorModule = revocation.Text(), "TaskRevokedError", "celery.exceptions"
	}
	outcome.Message = lost.Message
	outcome.Traceback = "Traceback (most recent call last):\n" + strings.TrimPrefix(outcome.ErrorModule+".", "builtins.") + outcome.ErrorType + ": " + lost.Message + "\n"
	claim := Claim{RunID: id, Step: StepVerify, Attempt: attempt, TaskID: parent, Token: token, Starts: 1, StartedAt: now}
	end := conclude(finishState{status: run.Status, startedAt: run.StartedAt, hasRollback: run.HasRollback}, claim.Step, outcome)
	lost.Finished = end.finished(finishState{status: run.Status})
	parkedReady, err := s.failInPlace(ctx, tx, &claim, root, clean(s.config.Worker), outcome, end)
	if err != nil {
		return nil, err
	}
	lost.Finished.ParkedReady = parkedReady
	if err := endPause(ctx, tx, id, queue); err != nil {
		return nil, err
	}
	batch = &pgx.Batch{}
	if run.HasRollback {
		taskID, message, err := rollback(run, root, parent)
		if err != nil {
			return nil, failure(ErrInvalid, "cannot make the rollback's message of run %s: %v", id, err)
		}
		err = queuePark(batch, parkedInsert{
			workspace: workspace, queue: queue, turn: turnOf(run, StepRollback), step: StepRollback,
			taskID: clean(taskID), root: root, why: ParkedLost, message: message,
		})
		if err != nil {
			return nil, err
		}
		queueTouchHold(batch, id, "")
		lost.RollbackSent = true
	}
	return lost, tx.SendBatch(ctx, batch).Close()
}

// endPause records that a run no longer waits before verify. The API has removed the
// run's start when it has approved it.
func endPause(ctx context.Context, tx pgx.Tx, runID, queue string) error {
	_, err := tx.Exec(ctx, `
		WITH paused AS (
		    UPDATE mm_orchestrator.approvals SET paused_at = NULL, wait_until = NULL, paused_attempt = NULL, passed_for = ''
		    WHERE run_id = $1 AND queue = $2
		    RETURNING run_id, run_started_at
		)
		UPDATE orchestrator_runs AS r SET started_at = COALESCE(r.started_at, p.run_started_at) FROM paused AS p WHERE r.id = p.run_id`, runID, queue)
	return err
}

// A PendingApproval is what a run that waits for an approval shows an operator.
type PendingApproval struct {
	// Message is why the run waits: that of the state row of Step.
	Message string
	Step    Step
	Since   time.Time
	// Roles are those of the gates.
	Roles []string
	// Until is when a run that has paused before verify fails; nil for one that has
	// changed nothing.
	Until *time.Time
}

// ListPendingApprovals returns what the runs that wait for an approval wait for, by
// the run's id. service names the gate of a run.
func (s *Store) ListPendingApprovals(ctx context.Context, service func(Run) string, ids ...string) (map[string]PendingApproval, error) {
	found := map[string]PendingApproval{}
	err := s.retry(ctx, "look at the runs that wait for approval", func(ctx context.Context) error {
		clear(found)
		var gates []Gate
		batch := &pgx.Batch{}
		batch.Queue(selectGates).Query(func(rows pgx.Rows) (err error) {
			gates, err = pgx.CollectRows(rows, scanGate)
			return err
		})
		batch.Queue(`
			SELECT `+runColumns+`, COALESCE(r.approval_gate_id::text, ''), COALESCE(a.refusal, ''), COALESCE(a.refused_step, ''),
			       COALESCE(a.paused_at, a.refused_at, r.updated_at), a.wait_until
			FROM orchestrator_runs AS r
			JOIN orchestrator_action_plans AS p ON p.id = r.action_plan_id
			LEFT JOIN LATERAL (
			    SELECT * FROM mm_orchestrator.approvals AS a WHERE a.run_id = r.id
			    ORDER BY a.paused_at IS NULL, a.refused_at DESC NULLS LAST LIMIT 1) AS a ON true
			WHERE r.status = 'awaiting_approval' AND r.id::text = ANY ($1::text[])`, ids).Query(func(rows pgx.Rows) error {
			for rows.Next() {
				var p PendingApproval
				var named, step string
				run, err := scanRun(rows, &named, &p.Message, &step, &p.Since, &p.Until)
				if err != nil {
					return err
				}
				p.Step, p.Since, p.Until = Step(step), p.Since.UTC(), utc(p.Until)
				for _, g := range gatesOf(gates, service(run), named) {
					p.Roles = append(p.Roles, g.Roles...)
				}
				slices.Sort(p.Roles)
				p.Roles = slices.Compact(p.Roles)
				found[run.ID] = p
			}
			return rows.Err()
		})
		return s.transaction(ctx, func(tx pgx.Tx) error { return tx.SendBatch(ctx, batch).Close() })
	})
	return found, err
}
