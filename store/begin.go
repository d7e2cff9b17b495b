package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/internal/database"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

const (
	// recheckPause is the wait before BeginStep looks again at a holder that may
	// be dead.
	recheckPause = 100 * time.Millisecond
	// deathLag bounds how much later than the broker the database may notice the
	// death of a worker. It is milliseconds, but more on a busy machine, where the
	// broker often delivers the message again before the database frees the lock.
	deathLag = time.Second
	// maxCommitTime is the longest that the commit of a claim may take. After
	// that BeginStep reads the claim again: the connection may have been cut
	// meanwhile, and another worker may have taken the claim over. It is well
	// below Config.TakeoverGrace.
	maxCommitTime = time.Second
)

// BeginStep asks for the right to run one step, and records the start.
//
//   - It is one transaction, committed before it returns: readers see the step
//     in_progress while it runs (docs/moonmind.md#r9).
//   - After [Start] the caller holds the claim. It must call FinishStep, or else
//     ReleaseClaim. Until then every other delivery of the step is [Parked].
//   - The first step of a run takes the workspace, and FinishStep passes it on
//     when the run ends. Until then the steps of other runs are [Parked]. Among
//     those that wait, high priority comes first, then the run queued first.
//   - While the queue is paused, steps that need not run now are [Parked]: see
//     PauseQueue.
//   - A run that needs an approval, and has none that covers the step, goes back to
//     where MoonMind's API approves it: awaiting_approval, without a token. The state
//     row of the step says why, and the answer is [Stop] with Refused set.
//   - Any other decision but Start writes to no table of MoonMind's.
//   - BeginStep takes over a claim whose holder is dead. The holder's lock must
//     be free for Config.TakeoverGrace; BeginStep waits for that. If the message
//     was redelivered and the holder still has its lock, BeginStep waits up to
//     1 s longer: the broker may have noticed the death first.
//   - If the answer to the commit takes more than 1 s, BeginStep reads the claim
//     again, since another worker may have taken it over meanwhile.
//   - After an error nobody has the claim. If its commit may have succeeded, the
//     Store releases it as soon as the database answers.
//   - ErrNotFound, in Python's words, if there is no such run; ErrInvalid for a
//     malformed run id, an unknown step or an incomplete request.
//
// decide has the rules.
func (s *Store) BeginStep(ctx context.Context, request BeginRequest) (Decision, error) {
	request.TaskID = clean(request.TaskID)
	request.RootTaskID = clean(request.RootTaskID)
	switch {
	case !isUUID(request.RunID):
		return nil, notARun(request.RunID)
	case !request.Step.Known():
		return nil, failure(ErrInvalid, "%q is not a step of a plan", cut(string(request.Step), 80))
	case request.Workspace == nil:
		return nil, failure(ErrInvalid, "step %s of run %s has no workspace: BeginRequest.Workspace is required", request.Step, request.RunID)
	case request.TaskID == "":
		return nil, failure(ErrInvalid, "step %s of run %s has no task id", request.Step, request.RunID)
	}
	// The token is registered before the first try. If the answer to the commit is
	// lost, the next try recognises the claim as its own, and a second delivery in
	// this process finds it held (holderSelf).
	token := rand.Int64N(1<<62) + 1
	faultpoint.Hit(faultpoint.BeginBefore, request.RunID, string(request.Step))
	s.register(token)
	decision, mayHaveClaimed, err := s.begin(ctx, request, token)
	switch _, started := decision.(Start); {
	case mayHaveClaimed:
		s.releaseLater(request.RunID, token)
	case !started:
		s.unregister(token)
	}
	if err != nil {
		return nil, err
	}
	point := faultpoint.BeginCommitted
	if _, parked := decision.(Parked); parked {
		point = faultpoint.ParkCommitted
	}
	faultpoint.Hit(point, request.RunID, string(request.Step))
	return decision, nil
}

// begin reads the state again and again until there is a decision.
// mayHaveClaimed is set together with an error: the commit of the claim may have
// succeeded.
func (s *Store) begin(ctx context.Context, request BeginRequest, token int64) (decision Decision, mayHaveClaimed bool, err error) {
	doing := "begin step " + string(request.Step) + " of run " + request.RunID
	suspected := suspicions{}
	var session int
	arrived := time.Now()
	for {
		var seen beginState
		var ownedAt time.Time
		tries := 0
		decision = nil
		err = s.retry(ctx, doing, func(ctx context.Context) error {
			current, err := s.workerLock.ensure(ctx)
			if err != nil {
				return err
			}
			// After a lost connection, of the pool or of the lock, the suspicions
			// start anew: the server may have restarted, and then the holder needs
			// as long to connect again as we did.
			if tries++; tries > 1 || current != session {
				suspected, session = suspicions{}, current
			}
			seen = beginState{JustRedelivered: request.Message.Redelivered && time.Since(arrived) < deathLag}
			return s.transaction(ctx, func(tx pgx.Tx) (err error) {
				decision, err = s.beginInTx(ctx, tx, request, token, &seen, suspected, func() {
					mayHaveClaimed, ownedAt = true, time.Now()
				})
				return err
			})
		})
		if err != nil {
			return nil, mayHaveClaimed, err
		}
		start, isStart := decision.(Start)
		switch {
		case isStart && time.Since(ownedAt) > maxCommitTime:
			continue // the next round finds the claim, if it is still ours
		case isStart:
			start.OwnedAt = ownedAt
			s.issue(token, issuedClaim{root: request.RootTaskID, workspace: clean(request.Workspace(start.Run)), queue: clean(request.Queue)})
			return start, false, nil
		}
		// The state was read under the run's lock and has no claim with our token:
		// no earlier try took it.
		mayHaveClaimed = false
		if decision != nil {
			return decision, false, nil
		}
		suspected = suspected.next(slices.Concat(seen.StepClaims, seen.OtherClaims), time.Now())
		if len(suspected) > 0 {
			faultpoint.Hit(faultpoint.HolderSuspected, request.RunID, string(request.Step))
		}
		select {
		case <-ctx.Done():
			return nil, false, ctx.Err()
		case <-time.After(min(recheckPause, s.config.TakeoverGrace)):
		}
	}
}

// suspicions has, by the token of a claim, since when every look has found its
// holder suspected.
type suspicions map[int64]time.Time

// next adds a look. A holder that has its lock again is no longer suspected.
func (s suspicions) next(claims []claimRow, now time.Time) suspicions {
	next := suspicions{}
	for _, c := range claims {
		if c.Holder == holderSuspected || c.Holder == holderDead {
			next[c.Token] = now
			if since, known := s[c.Token]; known {
				next[c.Token] = since
			}
		}
	}
	return next
}

// confirm marks holders as dead that have been suspected for the whole grace.
func (s suspicions) confirm(claims []claimRow, grace time.Duration) {
	for i := range claims {
		if since, known := s[claims[i].Token]; known && claims[i].Holder == holderSuspected && time.Since(since) >= grace {
			claims[i].Holder = holderDead
		}
	}
}

// beginInTx reads the state, decides, and writes. It returns nil if the state
// must be read again in a moment (verdict.recheck). It calls claims before it returns
// a Start, and before the claim can have been committed.
func (s *Store) beginInTx(ctx context.Context, tx pgx.Tx, request BeginRequest, token int64, seen *beginState, suspected suspicions, claims func()) (Decision, error) {
	mine, err := s.readBeginState(ctx, tx, request, token, seen)
	if err != nil {
		return nil, err
	}
	suspected.confirm(seen.StepClaims, s.config.TakeoverGrace)
	suspected.confirm(seen.OtherClaims, s.config.TakeoverGrace)
	faultpoint.Hit(faultpoint.BeginLocked, request.RunID, string(request.Step))
	claim := Claim{RunID: seen.Run.ID, Step: request.Step, Attempt: seen.attempt(), TaskID: request.TaskID, Token: token}
	if mine != nil {
		claim.Attempt, claim.Starts, claim.HandedBack, claim.StartedAt = mine.Attempt, mine.Starts, mine.HandedBack, mine.StartedAt
		started := seen.Run.StartedAt != nil && seen.Run.StartedAt.Equal(mine.StartedAt)
		approval := judgeApproval(seen.Run, seen.Approval, approvalRequest{step: request.Step, attempt: mine.Attempt, submission: request.submission()})
		claims()
		return Start{Claim: claim, Run: seen.Run, RunStarted: started, Progress: mine.Progress, RootTaskID: request.RootTaskID, Change: seen.Change, Revocation: seen.Revocation,
			RollbackRequest: seen.RollbackRequest, Approval: seen.Approval.start(approval)}, nil
	}
	v := decide(*seen, request)
	if v.recheck != nil {
		return nil, nil
	}
	if v.done != nil || v.stop != "" {
		parkedReady := false
		if seen.HoldsWorkspace {
			if parkedReady, err = releaseIfComplete(ctx, tx, seen.Run); err != nil {
				return nil, err
			}
		}
		if v.done != nil {
			return Done{Outcome: *v.done, ParkedReady: parkedReady}, nil
		}
		if len(v.deadClaims) > 0 {
			batch := &pgx.Batch{}
			queueFreeClaims(batch, seen.Run.ID, v.deadClaims)
			queueParkedReady(batch, seen.Run.ID, &parkedReady)
			if err := tx.SendBatch(ctx, batch).Close(); err != nil {
				return nil, err
			}
		}
		return Stop{Reason: v.stop, ParkedReady: parkedReady}, nil
	}
	if v.approval.met {
		// Also for a step that has to wait: what is changed meanwhile is not covered.
		batch := &pgx.Batch{}
		if err := queueMet(batch, seen.Run.ID, clean(request.Queue), *v.approval.approval); err != nil {
			return nil, err
		}
		texts, err := s.auditTexts(Claim{RunID: seen.Run.ID, Step: request.Step, Attempt: seen.attempt()}, grantedRecord(*v.approval.approval, seen.Approval.Gates))
		if err != nil {
			return nil, err
		}
		texts.queue(batch, nil)
		if err := tx.SendBatch(ctx, batch).Close(); err != nil {
			return nil, err
		}
	}
	if v.refused != "" {
		return s.refuse(ctx, tx, request, *seen, v)
	}
	if v.paused != nil && seen.HasBegun {
		if err := s.recordPaused(ctx, tx, claim, *v.paused); err != nil {
			return nil, err
		}
	}
	parked, writes, err := s.takeWorkspace(ctx, tx, request, *seen, v)
	if err != nil {
		return nil, err
	}
	if parked != nil {
		faultpoint.Hit(faultpoint.ParkWritten, request.RunID, string(request.Step))
		return *parked, nil
	}
	claim.Starts, claim.HandedBack, claim.StartedAt = v.starts, v.handedBack, s.now()
	run := seen.Run
	started := run.Status == RunPending
	if started {
		run.Status, run.StartedAt, run.CompletedAt = RunRunning, &claim.StartedAt, nil
		// A run that goes on after its pause has started before it.
		if r := seen.Approval.Record; request.Step == StepVerify && r.pausedFor(claim.Attempt) && r.RunStartedAt != nil {
			run.StartedAt = r.RunStartedAt
		}
	}
	start := Start{Claim: claim, Run: run, RunStarted: started, RootTaskID: request.RootTaskID, PreviousWorker: v.previousWorker, Revocation: seen.Revocation,
		RollbackRequest: seen.RollbackRequest, Approval: seen.Approval.start(v.approval)}
	start.afterPause = request.Step == StepVerify && seen.Approval.Record.pausedFor(claim.Attempt)
	if err := s.queueStart(writes, &start, request, v.deadClaims); err != nil {
		return nil, err
	}
	faultpoint.Hit(faultpoint.BeginWritten, request.RunID, string(request.Step))
	claims()
	if err := database.SendLast(ctx, tx, writes); err != nil {
		return nil, err
	}
	return start, nil
}

// queueFreeClaims takes claims from holders that are dead. The token changes, so
// that a worker that was wrongly taken for dead has lost its claim: see CheckClaim.
func queueFreeClaims(batch *pgx.Batch, runID string, tokens []int64) {
	batch.Queue(`
		UPDATE mm_orchestrator.claims SET holder = NULL, token = -token
		WHERE run_id = $1 AND token = ANY ($2) AND outcome IS NULL`, runID, tokens)
}

// lockStates and lockRun are the row locks of begin and finish. Their order is
// that in which MoonMind's API and Python worker write these rows: the states
// first, by primary key, as SQLAlchemy flushes them. In another order an API
// retry and a step could deadlock, and the API would answer 500.
const lockStates = `
	SELECT 1 FROM spec_workflow_task_states
	WHERE orchestrator_run_id = $1 AND plan_step::text = ANY ($2)
	ORDER BY id
	FOR UPDATE`

const lockRun = `SELECT 1 FROM orchestrator_runs WHERE id = $1 FOR UPDATE`

// readBeginState locks the step's states and the run, and reads what decide
// needs, in one round trip. The statements after the locks see all that was
// committed before the locks were granted. mine is the claim with this token: an
// earlier try of the same call committed it, and the answer was lost.
func (s *Store) readBeginState(ctx context.Context, tx pgx.Tx, request BeginRequest, token int64, seen *beginState) (mine *claimRow, err error) {
	batch := &pgx.Batch{}
	batch.Queue(lockStates, request.RunID, []string{string(request.Step)})
	batch.Queue(lockRun, request.RunID)
	batch.Queue(selectRun, request.RunID).QueryRow(func(row pgx.Row) error {
		run, err := scanRun(row)
		if errors.Is(err, pgx.ErrNoRows) {
			return failure(ErrNotFound, "Run %s not found", request.RunID)
		}
		seen.Run = run
		return err
	})
	batch.Queue(`
		SELECT s.attempt, COALESCE(s.plan_step_status::text, ''), COALESCE(s.celery_task_id, ''), COALESCE(s.message, ''),
		       s.payload::text, s.finished_at,
		       (SELECT json_agg(json_build_object('type', a.artifact_type, 'path', a.path,
		                   'checksum', COALESCE(a.checksum, ''), 'size_bytes', COALESCE(a.size_bytes, 0)) ORDER BY ref.n)
		        FROM jsonb_array_elements_text(CASE jsonb_typeof(s.artifact_refs) WHEN 'array' THEN s.artifact_refs ELSE '[]' END)
		             WITH ORDINALITY AS ref (id, n)
		        JOIN orchestrator_run_artifacts AS a ON a.run_id = s.orchestrator_run_id AND a.id::text = ref.id)::text
		FROM spec_workflow_task_states AS s
		WHERE s.orchestrator_run_id = $1 AND s.plan_step::text = $2
		ORDER BY s.attempt DESC
		LIMIT 1`, request.RunID, string(request.Step)).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			var state stateRow
			var payload, artifacts *string
			var finished *time.Time
			if err := rows.Scan(&state.Attempt, &state.PlanStepStatus, &state.CeleryTaskID, &state.Message, &payload, &finished, &artifacts); err != nil {
				return err
			}
			if payload != nil && *payload != "null" {
				state.Payload = json.RawMessage(*payload)
			}
			if finished != nil {
				state.FinishedAt = finished.UTC()
			}
			if artifacts != nil {
				if err := json.Unmarshal([]byte(*artifacts), &state.Artifacts); err != nil {
					return err
				}
			}
			seen.State = &state
		}
		return rows.Err()
	})
	// The shared form of the lock: two workers that test the lock of one dead
	// holder at once must not take each other for the holder.
	batch.Queue(`
		SELECT step, attempt, task_id, worker, token, starts, handed_back, started_at, root_task_id = $4, holder, outcome::text, progress::text,
		       CASE WHEN outcome IS NULL AND holder <> $3 THEN pg_try_advisory_xact_lock_shared(holder) END
		FROM mm_orchestrator.claims
		WHERE run_id = $1 AND (step = $2 OR outcome IS NULL AND holder IS NOT NULL)
		ORDER BY attempt, started_at`, request.RunID, string(request.Step), s.workerLock.key, request.RootTaskID).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			var c claimRow
			var holder *int64
			var outcome, progress *string
			var free *bool
			if err := rows.Scan(&c.Step, &c.Attempt, &c.TaskID, &c.Worker, &c.Token, &c.Starts, &c.HandedBack, &c.StartedAt, &c.SameSubmission, &holder, &outcome, &progress, &free); err != nil {
				return err
			}
			if c.Progress, err = parseProgress(progress); err != nil {
				return err
			}
			c.StartedAt = c.StartedAt.UTC()
			if outcome != nil {
				c.Outcome = &Outcome{}
				if err := json.Unmarshal([]byte(*outcome), c.Outcome); err != nil {
					return err
				}
			}
			c.Holder = s.holderState(holder, free, c.Token)
			if c.Step != request.Step {
				if c.Holder != holderNone {
					seen.OtherClaims = append(seen.OtherClaims, c)
				}
				continue
			}
			seen.StepClaims = append(seen.StepClaims, c)
			if c.Token == token && c.Outcome == nil {
				mine = &c
			}
		}
		return rows.Err()
	})
	// Locked: RemoveChange removes what the record names under this lock.
	batch.Queue(`
		SELECT record::text, ran_elsewhere FROM mm_orchestrator.changes WHERE run_id = $1 FOR UPDATE`, request.RunID).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			if err := seen.Change.scan(rows); err != nil {
				return err
			}
		}
		return rows.Err()
	})
	queueRevocation(batch, request.RunID, &seen.Revocation)
	approval := queueApproval(batch, request.RunID, clean(request.Queue))
	queuePause(batch, clean(request.Queue), &seen.Pause)
	if request.Step == StepRollback {
		queueRollbackRequest(batch, request.RunID, &seen.RollbackRequest)
	}
	batch.Queue(`SELECT `+runHasBegun+` FROM orchestrator_runs AS r WHERE r.id = $1`, request.RunID).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			if err := rows.Scan(&seen.HasBegun); err != nil {
				return err
			}
		}
		return rows.Err()
	})
	batch.Queue(`SELECT EXISTS (SELECT FROM mm_orchestrator.holds WHERE run_id = $1)`, request.RunID).QueryRow(func(row pgx.Row) error {
		return row.Scan(&seen.HoldsWorkspace)
	})
	if err := tx.SendBatch(ctx, batch).Close(); err != nil {
		return nil, err
	}
	service := serviceOf(seen.Run)
	if request.GateService != nil {
		service = request.GateService(seen.Run)
	}
	seen.Approval, err = approval.finish(ctx, tx, seen.Run, service, s.now())
	return mine, err
}

// refuse puts a run back to where it waits for an approval.
func (s *Store) refuse(ctx context.Context, tx pgx.Tx, request BeginRequest, seen beginState, v verdict) (Decision, error) {
	n := notApproved{
		run: seen.Run, step: request.Step, attempt: seen.attempt(), queue: clean(request.Queue), gates: seen.Approval.Gates,
		message: notApprovedText(request.Step, v.refused, seen.Approval.Gates), presented: effectsOf(seen.Run, seen.Approval.Gates),
		paused: request.Step == StepVerify && seen.Approval.Record.pausedFor(seen.attempt()), deadClaims: v.deadClaims,
	}
	if n.paused {
		n.presented = seen.Approval.Record.presentedInPause(n.presented)
	}
	stop := Stop{Reason: n.message, Refused: true}
	err := s.writeNotApproved(ctx, tx, n, &stop.ParkedReady)
	return stop, err
}

// takeWorkspace parks the message: because the verdict is busy or paused, or because
// another run has the workspace. Otherwise parked is nil, and writes gives the
// workspace to the run. They are sent with those of queueStart and the commit, in one
// round trip.
func (s *Store) takeWorkspace(ctx context.Context, tx pgx.Tx, request BeginRequest, seen beginState, v verdict) (parked *Parked, writes *pgx.Batch, err error) {
	run, busy := seen.Run, v.busy
	workspace := clean(request.Workspace(run))
	hold, err := lockHold(ctx, tx, workspace, clean(request.Queue), run.ID)
	if err != nil {
		return nil, nil, err
	}
	p := parkedInsert{
		workspace: workspace, queue: clean(request.Queue), turn: turnOf(run, request.Step), step: request.Step,
		taskID: request.TaskID, root: request.RootTaskID, why: ParkedWorkspace, message: request.Message,
	}
	batch := &pgx.Batch{}
	parked = &Parked{}
	switch a := admit(hold, p.turn); {
	case busy != nil:
		p.why = ParkedBusy
		parked.Reason = fmt.Sprintf("worker %s runs step %s of this run since %s", busy.Worker, busy.Step, busy.StartedAt.Format(time.RFC3339))
		if busy.Holder == holderSuspected {
			parked.Reason += "; that worker is not connected to the database, and the broker has not yet redelivered the message of its step"
		}
	case v.paused != nil:
		p.why = ParkedPaused
		parked.Reason = v.paused.Text()
		if len(v.deadClaims) > 0 {
			queueFreeClaims(batch, run.ID, v.deadClaims)
		}
		// A run that has begun keeps its workspace, with what it has done there.
		if hold.RunID == run.ID && seen.HasBegun {
			queueTouchHold(batch, run.ID, request.RootTaskID)
		} else if hold.RunID == run.ID {
			queueRelease(batch, run.ID)
			queueParkedReady(batch, run.ID, &parked.ParkedReady)
		}
	case a.wait:
		parked.Reason = fmt.Sprintf("run %s has the workspace %s", hold.RunID, workspace)
	case a.grant != nil:
		parked.Reason = fmt.Sprintf("run %s has waited for the workspace %s", a.grant.RunID, workspace)
		parked.ParkedReady = true
		queueHold(batch, workspace, a.grant.RunID, "")
	case a.take:
		parked = nil
		queueHold(batch, workspace, run.ID, request.RootTaskID)
	default:
		parked = nil
		queueTouchHold(batch, run.ID, request.RootTaskID)
	}
	if parked == nil {
		return nil, batch, nil
	}
	parked.Why = p.why
	if err := queuePark(batch, p); err != nil {
		return nil, nil, err
	}
	return parked, nil, tx.SendBatch(ctx, batch).Close()
}

// queueStart records a start (docs/moonmind.md#start-of-a-step, but without the
// faults docs/moonmind.md#c14, docs/moonmind.md#r3 and docs/moonmind.md#r5):
// it resets the state row of the newest attempt, sets a pending run to running,
// takes the claim, and takes deadClaims, also those of earlier attempts, from
// their holders. It sets start.Progress, for an attempt that was started before,
// and start.Change, once batch was sent, which has what takeWorkspace has left to be
// written.
func (s *Store) queueStart(batch *pgx.Batch, start *Start, request BeginRequest, deadClaims []int64) error {
	claim := start.Claim
	if len(deadClaims) > 0 {
		queueFreeClaims(batch, claim.RunID, deadClaims)
	}
	// Before the claims are written, with which it compares the state rows.
	queueStartChange(batch, start, clean(request.Queue), clean(request.Workspace(start.Run)))
	// artifact_refs: SQL NULL in a row that Python would insert, [] in one that
	// the API seeded, as both leave them.
	batch.Queue(`
		INSERT INTO spec_workflow_task_states AS s
		       (id, orchestrator_run_id, plan_step, attempt, task_name, status, plan_step_status, celery_state, celery_task_id, started_at)
		VALUES (gen_random_uuid(), $1, $2::text::orchestratorplanstep, $3, $2::text, 'running', 'in_progress', 'STARTED', $4, $5)
		ON CONFLICT (orchestrator_run_id, plan_step, attempt) DO UPDATE
		SET status = EXCLUDED.status, plan_step_status = EXCLUDED.plan_step_status, celery_state = EXCLUDED.celery_state,
		    celery_task_id = EXCLUDED.celery_task_id, started_at = EXCLUDED.started_at,
		    message = NULL, payload = NULL, artifact_refs = '[]', finished_at = NULL`,
		claim.RunID, string(claim.Step), claim.Attempt, cut(claim.TaskID, 255), claim.StartedAt)
	// completed_at: an API retry leaves the old one, and the CHECK refuses it
	// beside a later started_at (docs/moonmind.md#r3). The snapshot of a retried run
	// forgets the steps that are to run again, and the end of the run: until they
	// have ended anew, readers would take those of the earlier attempt for theirs.
	batch.Queue(`
		UPDATE orchestrator_runs AS r
		SET status = 'running', started_at = $2, completed_at = NULL, updated_at = now(),
		    metrics_snapshot = CASE
		        WHEN jsonb_typeof(r.metrics_snapshot) = 'object' AND jsonb_typeof(r.metrics_snapshot -> 'steps') = 'object'
		        THEN r.metrics_snapshot - 'run' || jsonb_build_object('steps', (r.metrics_snapshot -> 'steps') - ARRAY(
		            SELECT s.plan_step::text FROM spec_workflow_task_states AS s
		            WHERE s.orchestrator_run_id = r.id AND s.attempt > 1 AND (s.plan_step_status = 'pending' OR s.plan_step::text = $3)))
		        ELSE r.metrics_snapshot END
		WHERE r.id = $1 AND r.status = 'pending'`, claim.RunID, start.Run.StartedAt, string(claim.Step))
	// progress: RETURNING reads the row under its lock, after which the previous
	// holder can record nothing. An attempt that has ended and starts again, as a
	// rollback may, starts at its first command.
	batch.Queue(`
		INSERT INTO mm_orchestrator.claims AS c
		       (run_id, step, attempt, task_id, root_task_id, holder, worker, token, starts, started_at, handed_back)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
		ON CONFLICT (run_id, step, attempt) DO UPDATE
		SET task_id = EXCLUDED.task_id, root_task_id = EXCLUDED.root_task_id, holder = EXCLUDED.holder, worker = EXCLUDED.worker,
		    token = EXCLUDED.token, starts = EXCLUDED.starts, started_at = EXCLUDED.started_at, handed_back = EXCLUDED.handed_back,
		    finished_at = NULL, outcome = NULL, progress = CASE WHEN c.outcome IS NULL THEN c.progress END
		RETURNING progress::text`,
		claim.RunID, string(claim.Step), claim.Attempt, claim.TaskID, request.RootTaskID, s.workerLock.key, clean(s.config.Worker),
		claim.Token, claim.Starts, claim.StartedAt, claim.HandedBack).QueryRow(func(row pgx.Row) error {
		var text *string
		if err := row.Scan(&text); err != nil {
			return err
		}
		var err error
		start.Progress, err = parseProgress(text)
		return err
	})
	texts, err := s.auditTexts(claim, startRecords(*start)...)
	if err != nil {
		return err
	}
	texts.queue(batch, nil)
	return nil
}

// startRecords are those of the audit trail about the start of a step.
func startRecords(start Start) []audit.Record {
	claim, run := start.Claim, start.Run
	var records []audit.Record
	switch {
	case start.RunStarted && run.StartedAt != nil && !run.StartedAt.Equal(claim.StartedAt):
		records = append(records, audit.Record{
			ID: claimRecord(audit.Resumed, claim.Token), Kind: audit.Resumed, At: claim.StartedAt, Text: "the run goes on after its pause before verify",
		})
	case start.RunStarted:
		records = append(records, audit.Record{
			ID: claimRecord(audit.RunStarted, claim.Token), Kind: audit.RunStarted, At: claim.StartedAt,
			Text: fmt.Sprintf("service %s, priority %s", cut(run.TargetService, 200), run.Priority),
		})
	}
	step := audit.Record{ID: claimRecord(audit.StepStarted, claim.Token), Kind: audit.StepStarted, At: claim.StartedAt}
	if start.PreviousWorker != "" && !start.afterPause {
		step.Text = fmt.Sprintf("worker %s has left the step unfinished", start.PreviousWorker)
	}
	return append(records, step)
}

// ReleaseClaim gives up a claim whose step will not be finished here: the worker
// stops, or FinishStep failed. The next delivery of the step, to any worker, may
// start it at once. The state row stays in_progress until then.
//
// The records are appended to the run's audit trail with it.
//
// It may be called twice, and after the claim was lost. Within this Store the
// claim is free even after an error; the Store then retries until the database
// answers, or until Close.
func (s *Store) ReleaseClaim(ctx context.Context, claim Claim, records ...audit.Record) error {
	s.unregister(claim.Token)
	texts, err := s.auditTexts(claim, records...)
	if err != nil {
		return err
	}
	err = s.retry(ctx, "release step "+string(claim.Step)+" of run "+claim.RunID, func(ctx context.Context) error {
		_, err := s.pool.Exec(ctx, `
			WITH released AS (
			    UPDATE mm_orchestrator.claims SET holder = NULL, handed_back = handed_back + 1
			    WHERE run_id = $1 AND step = $2 AND attempt = $3 AND token = $4 AND holder IS NOT NULL
			    RETURNING run_id
			)
			SELECT a.new_length FROM released, mm_orchestrator.audit_append(released.run_id, $5, $6) AS a`,
			claim.RunID, string(claim.Step), claim.Attempt, claim.Token, texts.ids, texts.bodies)
		return err
	})
	if err != nil {
		s.releaseLater(claim.RunID, claim.Token)
	}
	return err
}
