package store

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// serviceOf is the service whose gate applies if the caller does not say.
func serviceOf(run Run) string { return strings.ToLower(strings.TrimSpace(run.TargetService)) }

// selectGates reads all gates. There is one for each service at most.
const selectGates = `
	SELECT id::text, service_name, requirement::text, ARRAY(SELECT COALESCE(role, '') FROM unnest(approver_roles) AS role), valid_for_minutes
	FROM approval_gates
	WHERE requirement <> 'none'
	ORDER BY service_name`

func scanGate(row pgx.CollectableRow) (Gate, error) {
	var g Gate
	var minutes int64
	err := row.Scan(&g.ID, &g.Service, &g.Requirement, &g.Roles, &minutes)
	g.Valid = maxValid
	if minutes < int64(maxValid/time.Minute) {
		g.Valid = time.Duration(minutes) * time.Minute
	}
	return g, err
}

// ListGates returns the gates that require an approval, by their service.
func (s *Store) ListGates(ctx context.Context) ([]Gate, error) {
	var gates []Gate
	err := s.retry(ctx, "read the approval gates", func(ctx context.Context) error {
		rows, err := s.pool.Query(ctx, selectGates)
		if err != nil {
			return err
		}
		gates, err = pgx.CollectRows(rows, scanGate)
		return err
	})
	return gates, err
}

// An approvalReader collects what queueApproval reads.
type approvalReader struct {
	approvalRow
	gates []Gate
	named string
}

// queueApproval reads what is known about the approval of a run. Call finish when the
// batch is done.
func queueApproval(batch *pgx.Batch, runID, queue string) *approvalReader {
	a := &approvalReader{}
	batch.Queue(selectGates).Query(func(rows pgx.Rows) (err error) {
		a.gates, err = pgx.CollectRows(rows, scanGate)
		return err
	})
	batch.Queue(`
		SELECT r.approval_token, (r.metrics_snapshot -> 'approval')::text, COALESCE(r.approval_gate_id::text, ''), age(p.xmin) < age(r.xmin)
		FROM orchestrator_runs AS r
		JOIN orchestrator_action_plans AS p ON p.id = r.action_plan_id
		WHERE r.id = $1`, runID).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			var block *string
			if err := rows.Scan(&a.Token, &block, &a.named, &a.PlanNewer); err != nil {
				return err
			}
			if block != nil {
				a.Block = json.RawMessage(*block)
			}
		}
		return rows.Err()
	})
	batch.Queue(`SELECT `+approvalColumns+` FROM mm_orchestrator.approvals WHERE run_id = $1 AND queue = $2`, runID, queue).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			if err := a.Record.scan(rows); err != nil {
				return err
			}
		}
		return rows.Err()
	})
	return a
}

const approvalColumns = `presented::text, presented_at, approved::text, acted_for, left_behind::text, paused_at, wait_until,
	COALESCE(paused_attempt, 0), run_started_at, spent_key, passed_for`

func (r *approvalRecord) scan(row pgx.Row) error {
	var presented, approved, left *string
	var presentedAt *time.Time
	err := row.Scan(&presented, &presentedAt, &approved, &r.ActedFor, &left, &r.PausedAt, &r.WaitUntil, &r.PausedAttempt, &r.RunStartedAt, &r.SpentKey, &r.PassedFor)
	if err != nil {
		return err
	}
	r.PausedAt, r.WaitUntil, r.RunStartedAt = utc(r.PausedAt), utc(r.WaitUntil), utc(r.RunStartedAt)
	if presentedAt != nil {
		r.PresentedAt = presentedAt.UTC()
	}
	for _, column := range []struct {
		text *string
		into any
	}{{presented, &r.Presented}, {approved, &r.Approved}, {left, &r.LeftBehind}} {
		if column.text != nil {
			if err := json.Unmarshal([]byte(*column.text), column.into); err != nil {
				return err
			}
		}
	}
	return nil
}

// finish completes what was read. service names the gate of the run's service. It asks
// the database only if a worker meets an approval for the first time.
func (a *approvalReader) finish(ctx context.Context, tx pgx.Tx, run Run, service string, now time.Time) (approvalRow, error) {
	a.Gates, a.Now = gatesOf(a.gates, service, a.named), now
	if len(a.Gates) == 0 {
		return a.approvalRow, nil
	}
	approval, reason := a.read()
	if reason != "" || a.Record.Approved != nil && a.Record.Approved.Key == approval.Key {
		return a.approvalRow, nil
	}
	rows, err := tx.Query(ctx, `
		SELECT o.id::text, o.metrics_snapshot #>> '{approval,grantedAt}'
		FROM orchestrator_runs AS o
		WHERE o.approval_token = $1 AND o.id <> $2
		UNION ALL
		SELECT m.run_id::text, NULL FROM mm_orchestrator.approvals AS m
		WHERE (m.approval_key = $3 OR m.spent_key = $3) AND m.run_id <> $2`, a.Token, run.ID, approval.Key)
	if err != nil {
		return a.approvalRow, err
	}
	var other string
	var granted *string
	_, err = pgx.ForEachRow(rows, []any{&other, &granted}, func() error {
		if granted != nil {
			if t, err := time.Parse(time.RFC3339Nano, *granted); err != nil || !t.Equal(approval.GrantedAt) {
				return nil // the same words, used again
			}
		}
		a.CopiedFrom = other
		return nil
	})
	return a.approvalRow, err
}

// queueMet records the approval that a worker has met, and what it covers.
func queueMet(batch *pgx.Batch, runID, queue string, approval Approval) error {
	text, err := json.Marshal(approval)
	if err != nil {
		return err
	}
	batch.Queue(`
		INSERT INTO mm_orchestrator.approvals AS a (run_id, queue, approved, approval_key) VALUES ($1, $2, $3::text::json, $4)
		ON CONFLICT (run_id, queue) DO UPDATE SET approved = EXCLUDED.approved, approval_key = EXCLUDED.approval_key`,
		runID, queue, string(text), approval.Key)
	return nil
}

// A notApproved is a step that needs an approval and has none, or whose run has to
// pause.
type notApproved struct {
	run     Run
	step    Step
	attempt int
	queue   string
	gates   []Gate
	// message is for the state row and the log.
	message string
	// presented is what the next approval would cover.
	presented Effects
	// paused says that the run keeps its workspace, and what it has done. pauses says
	// that the pause begins with this.
	paused, pauses bool
	// claim is that of the step, nil if it has none.
	claim *Claim
	// deadClaims are freed.
	deadClaims []int64
}

// writeNotApproved puts a run back to where MoonMind's API approves it: it awaits
// approval, without a token. The step's row says why. It is the only place that does
// so, whether BeginStep has found the reason or the step itself.
func (s *Store) writeNotApproved(ctx context.Context, tx pgx.Tx, n notApproved, parkedReady *bool) error {
	presented, err := json.Marshal(n.presented)
	if err != nil {
		return err
	}
	batch := &pgx.Batch{}
	if len(n.deadClaims) > 0 {
		queueFreeClaims(batch, n.run.ID, n.deadClaims)
	}
	batch.Queue(`
		INSERT INTO spec_workflow_task_states AS s
		       (id, orchestrator_run_id, plan_step, attempt, task_name, status, plan_step_status, message, artifact_refs)
		VALUES (gen_random_uuid(), $1, $2::text::orchestratorplanstep, $3, $2::text, 'queued', 'pending', $4, '[]')
		ON CONFLICT (orchestrator_run_id, plan_step, attempt) DO UPDATE
		SET status = EXCLUDED.status, plan_step_status = EXCLUDED.plan_step_status, celery_state = NULL, celery_task_id = NULL,
		    message = EXCLUDED.message, payload = NULL, artifact_refs = EXCLUDED.artifact_refs, started_at = NULL, finished_at = NULL`,
		n.run.ID, string(n.step), n.attempt, headOf(n.message))
	requirement, gate := "", ""
	for _, g := range n.gates {
		// The API shows one gate: the one of the service, which it knows too.
		if requirement == "" || g.Service == serviceOf(n.run) {
			requirement, gate = g.Requirement, g.ID
		}
	}
	batch.Queue(`
		UPDATE orchestrator_runs AS r
		SET status = 'awaiting_approval', approval_token = NULL, approval_gate_id = COALESCE(r.approval_gate_id, NULLIF($3, '')::uuid),
		    metrics_snapshot = CASE jsonb_typeof(r.metrics_snapshot) WHEN 'object' THEN r.metrics_snapshot ELSE '{}' END
		        || jsonb_build_object('approval', jsonb_build_object('required', true, 'requirement', $2::text, 'status', 'awaiting')),
		    updated_at = now()
		WHERE r.id = $1`, n.run.ID, requirement, gate)
	if n.claim != nil {
		batch.Queue(`
			UPDATE mm_orchestrator.claims SET holder = NULL, handed_back = handed_back + 1
			WHERE run_id = $1 AND step = $2 AND attempt = $3 AND token = $4`,
			n.run.ID, string(n.step), n.attempt, n.claim.Token)
	}
	batch.Queue(`
		INSERT INTO mm_orchestrator.approvals AS a (run_id, queue, presented, presented_at, refusal, refused_step, refused_at)
		VALUES ($1, $2, $3::text::json, clock_timestamp(), $4, $5, clock_timestamp())
		ON CONFLICT (run_id, queue) DO UPDATE
		SET presented = EXCLUDED.presented, presented_at = EXCLUDED.presented_at,
		    refusal = EXCLUDED.refusal, refused_step = EXCLUDED.refused_step, refused_at = EXCLUDED.refused_at`,
		n.run.ID, n.queue, string(presented), headOf(n.message), string(n.step))
	texts, err := s.auditTexts(Claim{RunID: n.run.ID, Step: n.step, Attempt: n.attempt}, n.record())
	if err != nil {
		return err
	}
	texts.queue(batch, nil)
	if n.paused {
		queueTouchHold(batch, n.run.ID, "")
	} else {
		queueRelease(batch, n.run.ID)
	}
	queueParkedReady(batch, n.run.ID, parkedReady)
	return tx.SendBatch(ctx, batch).Close()
}

// record is the one of the audit trail.
func (n notApproved) record() audit.Record {
	kind := audit.ApprovalRefused
	if n.pauses {
		kind = audit.Paused
	}
	return audit.Record{Kind: kind, Text: n.message, Approval: &audit.Approval{Requirement: requirementOf(n.gates), Digest: n.presented.digest()}}
}

// grantedRecord is the record of the audit trail about an approval that a run acts under.
func grantedRecord(approval Approval, gates []Gate) audit.Record {
	digest := approval.Effects.digest()
	return audit.Record{
		ID: string(audit.ApprovalGranted) + "-" + approval.Key + "-" + digest, Kind: audit.ApprovalGranted,
		Approval: &audit.Approval{Approver: approval.Approver.ID, Role: approval.Approver.Role, GrantedAt: approval.GrantedAt, ExpiresAt: approval.ExpiresAt,
			Requirement: requirementOf(gates), Digest: digest},
	}
}

func requirementOf(gates []Gate) string {
	var all []string
	for _, g := range gates {
		all = append(all, g.Requirement)
	}
	slices.Sort(all)
	return strings.Join(slices.Compact(all), ", ")
}

// digest identifies the effects.
func (e Effects) digest() string {
	text, _ := json.Marshal(e) // texts and lists of them always encode
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

// notApprovedText is the message of a step that was refused.
func notApprovedText(step Step, reason string, gates []Gate) string {
	return fmt.Sprintf("Step %s was not run: %s. The run waits for an approval by %s", step, reason, whom(gates))
}

// An ApprovalCheck is what a worker has seen before the first effect of a step.
type ApprovalCheck struct {
	// Files is the workspace, Images the images of the service's containers.
	Files  *Files
	Images []string
	// Acts says that the step is about to change something.
	Acts bool
	// Wait is how long a run may pause before verify.
	Wait time.Duration
	// Service names the service whose gate applies.
	Service string
}

// NotApproved says why a step must not go on. The run waits for an approval, and the
// claim is released.
type NotApproved struct {
	// Message is that of the state row.
	Message string
	// Paused says that the run has come to its pause before verify, with nothing
	// refused.
	Paused bool
	// Violation says that the run does not wait, and that the caller still has the
	// claim: the step must fail with Message, and is rolled back.
	Violation bool
	// ParkedReady says that parked messages may be published: see TakeParked.
	ParkedReady bool
}

// CheckApproval asks, in the name of a step that has begun, whether the run's approval
// covers what the worker is about to do: immediately before the first effect, and
// before verify of a run that has to pause. Nil means that it does.
//
//   - Otherwise the run waits for an approval, the claim is released, and the caller
//     ends the step without an outcome. A run that has to pause before verify is paused
//     by this.
//   - The claim's token is a fence: ErrClaimLost if another worker has the step.
//   - The first look at the workspace under an approval is what the approval covers, if
//     no worker has looked while the run waited.
func (s *Store) CheckApproval(ctx context.Context, claim Claim, check ApprovalCheck) (*NotApproved, error) {
	var issued issuedClaim
	if known := s.issuedClaim(claim.Token); known != nil {
		issued = *known
	}
	faultpoint.Hit(faultpoint.ApprovalBefore, claim.RunID, string(claim.Step))
	var not *NotApproved
	err := s.inTx(ctx, "check the approval of run "+claim.RunID, func(tx pgx.Tx) error {
		not = nil
		run, a, err := s.lockForApproval(ctx, tx, claim, issued.queue, check.Service)
		if err != nil {
			return err
		}
		submission := issued.root
		if submission == "" {
			submission = claim.TaskID
		}
		v := judgeApproval(run, a, approvalRequest{step: claim.Step, attempt: claim.Attempt, submission: submission})
		now := effectsOf(run, a.Gates)
		now.Files, now.Images = check.Files, check.Images
		paused := a.Record.pausedFor(claim.Attempt) && claim.Step == StepVerify
		if v.refuse == "" && v.check {
			v.refuse = v.approval.differs(a.Record, now, paused)
		}
		n := notApproved{run: run, step: claim.Step, attempt: claim.Attempt, queue: issued.queue, gates: a.Gates, presented: now, paused: paused, claim: &claim}
		switch {
		case v.refuse != "":
			if paused {
				n.presented = a.Record.presentedInPause(now)
			}
			n.message = notApprovedText(claim.Step, v.refuse, a.Gates)
			not = &NotApproved{Message: n.message}
			return s.writeNotApproved(ctx, tx, n, &not.ParkedReady)
		case v.guard:
			if left := a.Record.LeftBehind; left != nil && claim.Starts == 1 {
				if changed := (Effects{Files: left.Files}).fileDifferences(now, true); len(changed) > 0 {
					not = &NotApproved{Violation: true, Message: "Changed by somebody else while the run was carried out: " + strings.Join(changed, "; ") + ". The approval does not cover that"}
				}
			}
			return nil
		case v.pause:
			if left := a.Record.LeftBehind; left != nil {
				n.presented.Files, n.presented.Images = left.Files, left.Images
			}
			not = &NotApproved{Paused: true}
			return s.writePause(ctx, tx, n, a, issued.workspace, check.Wait, not)
		}
		return s.writePassed(ctx, tx, claim, issued.queue, submission, a.Gates, v, now, check.Acts)
	})
	if err != nil {
		return nil, err
	}
	if not != nil && not.Violation {
		return not, nil
	}
	if not != nil {
		s.unregister(claim.Token)
		faultpoint.Hit(faultpoint.ApprovalRefused, claim.RunID, string(claim.Step))
		return not, nil
	}
	faultpoint.Hit(faultpoint.ApprovalChecked, claim.RunID, string(claim.Step))
	return nil, nil
}

// differs says how the workspace differs from what is approved, or "". A run that is
// retried may also find it as its own last step has left it.
func (approval *Approval) differs(known approvalRecord, now Effects, paused bool) string {
	changed := approval.Effects.fileDifferences(now, paused)
	if len(changed) == 0 {
		return ""
	}
	if left := known.LeftBehind; left != nil && !paused && left.Files != nil && now.Files != nil && left.Files.equal(*now.Files, false) {
		return ""
	}
	if paused {
		return "changed after the run was deployed: " + strings.Join(changed, "; ")
	}
	return "changed after the run was approved: " + strings.Join(changed, "; ")
}

// lockForApproval takes the locks of begin and finish, and reads the run and its
// approval.
func (s *Store) lockForApproval(ctx context.Context, tx pgx.Tx, claim Claim, queue, service string) (Run, approvalRow, error) {
	var run Run
	batch := &pgx.Batch{}
	batch.Queue(lockStates, claim.RunID, []string{string(claim.Step)})
	batch.Queue(lockRun, claim.RunID)
	batch.Queue(selectRun, claim.RunID).QueryRow(func(row pgx.Row) (err error) {
		if run, err = scanRun(row); errors.Is(err, pgx.ErrNoRows) {
			return failure(ErrNotFound, "Run %s not found", claim.RunID)
		}
		return err
	})
	mine := false
	batch.Queue(`
		SELECT true FROM mm_orchestrator.claims
		WHERE run_id = $1 AND step = $2 AND attempt = $3 AND token = $4 AND outcome IS NULL
		  AND NOT EXISTS (SELECT FROM spec_workflow_task_states AS s
		                  WHERE s.orchestrator_run_id = $1 AND s.plan_step::text = $2 AND s.attempt > $3)
		FOR UPDATE`, claim.RunID, string(claim.Step), claim.Attempt, claim.Token).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			mine = true
		}
		return rows.Err()
	})
	reader := queueApproval(batch, claim.RunID, queue)
	if err := tx.SendBatch(ctx, batch).Close(); err != nil {
		return Run{}, approvalRow{}, err
	}
	if !mine {
		return Run{}, approvalRow{}, failure(ErrClaimLost, "step %s of run %s was taken over or retried: its approval is not looked at", claim.Step, claim.RunID)
	}
	if service == "" {
		service = serviceOf(run)
	}
	a, err := reader.finish(ctx, tx, run, service, s.now())
	return run, a, err
}

// writePause pauses a run before verify.
func (s *Store) writePause(ctx context.Context, tx pgx.Tx, n notApproved, a approvalRow, workspace string, wait time.Duration, not *NotApproved) error {
	spent := ""
	if approval, reason := a.read(); reason == "" {
		spent = approval.Key
	}
	var since, until time.Time
	err := tx.QueryRow(ctx, `
		INSERT INTO mm_orchestrator.approvals AS a (run_id, queue, paused_at, wait_until, paused_attempt, workspace, run_started_at, spent_key)
		VALUES ($1, $2, clock_timestamp(), clock_timestamp() + make_interval(secs => $3::float8), $4, $5, $6, $7)
		ON CONFLICT (run_id, queue) DO UPDATE
		SET paused_at = EXCLUDED.paused_at, wait_until = EXCLUDED.wait_until, paused_attempt = EXCLUDED.paused_attempt,
		    workspace = EXCLUDED.workspace, run_started_at = EXCLUDED.run_started_at, spent_key = EXCLUDED.spent_key, passed_for = ''
		RETURNING paused_at, wait_until`,
		n.run.ID, n.queue, wait.Seconds(), n.attempt, workspace, n.run.StartedAt, spent).Scan(&since, &until)
	if err != nil {
		return err
	}
	n.paused, n.pauses = true, true
	n.message = fmt.Sprintf("The run is deployed and waits before verify for an approval by %s, from %s until %s. Without one it fails then, and is rolled back",
		whom(n.gates), since.UTC().Format(time.RFC3339), until.UTC().Format(time.RFC3339))
	not.Message = n.message
	return s.writeNotApproved(ctx, tx, n, &not.ParkedReady)
}

// writePassed records that the approval covers the step, and from when on the run is
// carried out under it.
func (s *Store) writePassed(ctx context.Context, tx pgx.Tx, claim Claim, queue, submission string, gates []Gate, v approvalVerdict, now Effects, acts bool) error {
	if !v.check {
		return nil
	}
	approval := *v.approval
	learned := v.met
	if approval.Effects.Files == nil && now.Files != nil {
		approval.Effects.Files, learned = now.Files, true
	}
	batch := &pgx.Batch{}
	if learned {
		if err := queueMet(batch, claim.RunID, queue, approval); err != nil {
			return err
		}
		texts, err := s.auditTexts(claim, grantedRecord(approval, gates))
		if err != nil {
			return err
		}
		texts.queue(batch, nil)
	}
	switch {
	case claim.Step == StepVerify:
		batch.Queue(`
			UPDATE mm_orchestrator.approvals SET passed_for = $3
			WHERE run_id = $1 AND queue = $2 AND paused_at IS NOT NULL`, claim.RunID, queue, submission)
	case acts:
		batch.Queue(`
			UPDATE mm_orchestrator.approvals
			SET acted_for = $3, passed_for = '', paused_at = NULL, wait_until = NULL, paused_attempt = NULL
			WHERE run_id = $1 AND queue = $2`, claim.RunID, queue, submission)
	}
	return tx.SendBatch(ctx, batch).Close()
}
