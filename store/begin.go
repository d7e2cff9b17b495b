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

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

const (
	// lookAgain is how often BeginStep looks at a holder that seems to be dead.
	lookAgain = 100 * time.Millisecond
	// deathTold is how long the database may need to see that a worker is dead
	// whose message the broker has delivered again: milliseconds, but more on
	// a busy machine, where the broker is often the first to know.
	deathTold = time.Second
	// lateAnswer is when the answer to the commit that gives a claim comes too
	// late to be believed: whoever was cut off meanwhile may have been counted
	// dead, and the claim taken over. It is well below Config.TakeoverGrace.
	lateAnswer = time.Second
)

// knownSteps are the labels of the enum orchestratorplanstep.
var knownSteps = map[Step]bool{
	StepAnalyze: true, StepPatch: true, StepBuild: true,
	StepRestart: true, StepVerify: true, StepRollback: true,
}

// BeginStep asks for the right to run one step, and records the start.
//
//   - It is one transaction, committed before it returns: readers see the step
//     in_progress while it runs (docs/moonmind.md#r9).
//   - After [Start] the caller holds the claim and must call FinishStep, or
//     ReleaseClaim if it will not: until then every other delivery of the step
//     is [Parked].
//   - The first step of a run takes the workspace, and FinishStep gives it on
//     when the run ends. Until then the steps of other runs are [Parked]. High
//     priority comes first, then who was queued first.
//   - After any other decision no table of MoonMind's was written.
//   - A claim whose holder is dead is taken over. It must be seen dead for
//     Config.TakeoverGrace, for which BeginStep waits. With a message that was
//     delivered again it waits up to 1 s longer for a holder to be seen dead
//     that still seems to live: the broker may have known first.
//   - A commit that is answered after more than 1 s is looked at again: the
//     claim may have been taken over meanwhile.
//   - After an error nobody has the claim: if its commit may have been done, the
//     Store gives it back as soon as the database answers.
//   - ErrNotFound, with Python's words, if there is no such run; ErrInvalid
//     for what is not a run id or a step.
//
// The rules are those of decide.
func (s *Store) BeginStep(ctx context.Context, request BeginRequest) (Decision, error) {
	request.TaskID = clean(request.TaskID)
	request.RootTaskID = clean(request.RootTaskID)
	switch {
	case !isUUID(request.RunID):
		return nil, failure(ErrInvalid, "%q is not the id of a run: ids are UUIDs", cut(request.RunID, 80))
	case !knownSteps[request.Step]:
		return nil, failure(ErrInvalid, "%q is not a step of a plan", cut(string(request.Step), 80))
	case request.Workspace == nil:
		return nil, failure(ErrInvalid, "step %s of run %s was begun without a workspace", request.Step, request.RunID)
	case request.TaskID == "":
		return nil, failure(ErrInvalid, "step %s of run %s came without a task id", request.Step, request.RunID)
	}
	// The token is drawn and registered before the first try: if the answer to
	// the commit is lost, the next try recognises the claim as its own, and a
	// second delivery in this process never sees it as abandoned.
	token := rand.Int64N(1<<62) + 1
	faultpoint.Hit(faultpoint.BeginBefore, request.RunID, string(request.Step))
	s.register(token)
	decision, uncertain, err := s.begin(ctx, request, token)
	switch _, started := decision.(Start); {
	case uncertain:
		s.giveBackLater(request.RunID, token)
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

// begin looks until there is a decision. uncertain goes with an error: the claim
// may have been taken.
func (s *Store) begin(ctx context.Context, request BeginRequest, token int64) (decision Decision, uncertain bool, err error) {
	doing := "begin step " + string(request.Step) + " of run " + request.RunID
	gone := sightings{}
	var session int
	arrived := time.Now()
	for {
		var seen situation
		var asOf time.Time
		tries := 0
		decision = nil
		err = s.retry(ctx, doing, func(ctx context.Context) error {
			current, err := s.workerLock.ensure(ctx)
			if err != nil {
				return err
			}
			// A lost connection is a break, the lock's own included: the server
			// may have restarted, and a holder's session is then as new as ours.
			if tries++; tries > 1 || current != session {
				gone, session = sightings{}, current
			}
			seen = situation{MayHaveDied: request.Message.Redelivered && time.Since(arrived) < deathTold}
			return s.transaction(ctx, func(tx pgx.Tx) (err error) {
				decision, err = s.beginInTx(ctx, tx, request, token, &seen, gone)
				asOf = time.Now()
				// What follows is the commit.
				if _, starts := decision.(Start); starts && err == nil {
					uncertain = true
				}
				return err
			})
		})
		if err != nil {
			return nil, uncertain, err
		}
		start, isStart := decision.(Start)
		switch {
		case isStart && time.Since(asOf) > lateAnswer:
			continue // the next look finds the claim, if it is still ours
		case isStart:
			start.OwnedAt = asOf
			s.given.add(token, givenClaim{root: request.RootTaskID, workspace: clean(request.Workspace(start.Run)), queue: clean(request.Queue)})
			return start, false, nil
		}
		// It was read under the run's lock: no earlier try has taken the claim.
		uncertain = false
		if decision != nil {
			return decision, false, nil
		}
		gone = gone.next(slices.Concat(seen.Claims, seen.OtherSteps), time.Now())
		if len(gone) > 0 {
			faultpoint.Hit(faultpoint.HolderSuspected, request.RunID, string(request.Step))
		}
		select {
		case <-ctx.Done():
			return nil, false, ctx.Err()
		case <-time.After(min(lookAgain, s.config.TakeoverGrace)):
		}
	}
}

// sightings are claims, by token, whose holders were gone at every look, with
// the time of the first.
type sightings map[int64]time.Time

// next adds a look: who is there again is forgotten.
func (g sightings) next(claims []claimRow, now time.Time) sightings {
	next := sightings{}
	for _, c := range claims {
		if c.Holder == holderGone || c.Holder == holderDead {
			next[c.Token] = now
			if since, before := g[c.Token]; before {
				next[c.Token] = since
			}
		}
	}
	return next
}

// believe turns holders that are gone into dead ones when they have been so for
// the whole grace.
func (g sightings) believe(claims []claimRow, grace time.Duration) {
	for i := range claims {
		if since, before := g[claims[i].Token]; before && claims[i].Holder == holderGone && time.Since(since) >= grace {
			claims[i].Holder = holderDead
		}
	}
}

// beginInTx reads, decides and writes. It returns a decision, or nil if a
// holder must be looked at again.
func (s *Store) beginInTx(ctx context.Context, tx pgx.Tx, request BeginRequest, token int64, seen *situation, gone sightings) (Decision, error) {
	mine, err := s.readSituation(ctx, tx, request, token, seen)
	if err != nil {
		return nil, err
	}
	gone.believe(seen.Claims, s.config.TakeoverGrace)
	gone.believe(seen.OtherSteps, s.config.TakeoverGrace)
	faultpoint.Hit(faultpoint.BeginLocked, request.RunID, string(request.Step))
	claim := Claim{RunID: seen.Run.ID, Step: request.Step, Attempt: seen.attempt(), TaskID: request.TaskID, Token: token}
	if mine != nil {
		claim.Attempt, claim.Starts, claim.HandedBack, claim.StartedAt = mine.Attempt, mine.Starts, mine.HandedBack, mine.StartedAt
		started := seen.Run.StartedAt != nil && seen.Run.StartedAt.Equal(mine.StartedAt)
		return Start{Claim: claim, Run: seen.Run, RunStarted: started, Progress: mine.Progress}, nil
	}
	v := decide(*seen, request)
	if v.wait != nil {
		return nil, nil
	}
	if v.done != nil || v.stop != "" {
		unpark := false
		if seen.Holds {
			if unpark, err = releaseIfOver(ctx, tx, seen.Run); err != nil {
				return nil, err
			}
		}
		if v.done != nil {
			return Done{Outcome: *v.done, ParkedReady: unpark}, nil
		}
		if len(v.free) > 0 {
			batch := &pgx.Batch{}
			queueFree(batch, seen.Run.ID, v.free)
			queueUnpark(batch, seen.Run.ID, &unpark)
			if err := tx.SendBatch(ctx, batch).Close(); err != nil {
				return nil, err
			}
		}
		return Stop{Reason: v.stop, ParkedReady: unpark}, nil
	}
	parked, err := s.takeWorkspace(ctx, tx, request, seen.Run, v.busy)
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
	}
	progress, err := s.writeStart(ctx, tx, claim, request, v.free)
	if err != nil {
		return nil, err
	}
	faultpoint.Hit(faultpoint.BeginWritten, request.RunID, string(request.Step))
	return Start{Claim: claim, Run: run, RunStarted: started, Progress: progress, PreviousWorker: v.before}, nil
}

// queueFree takes claims from holders that are dead. The token changes, so that
// one which lives all the same has lost its claim: see HasClaim.
func queueFree(batch *pgx.Batch, runID string, tokens []int64) {
	batch.Queue(`
		UPDATE mm_orchestrator.claims SET holder = NULL, token = -token
		WHERE run_id = $1 AND token = ANY ($2) AND outcome IS NULL`, runID, tokens)
}

// lockStates and lockRun are the locks of begin and finish, in the order in
// which MoonMind's API and Python worker come to these rows: the states first,
// by primary key, as SQLAlchemy flushes them. With ours the other way round, an
// API retry and a step could lock each other out, and the API would answer 500.
const lockStates = `
	SELECT 1 FROM spec_workflow_task_states
	WHERE orchestrator_run_id = $1 AND plan_step::text = ANY ($2)
	ORDER BY id
	FOR UPDATE`

const lockRun = `SELECT 1 FROM orchestrator_runs WHERE id = $1 FOR UPDATE`

// readSituation locks the step's states and the run, and reads what decide
// needs, in one round trip. Statements after the locks see what was committed
// before these were given. mine is the claim that carries token: an earlier
// try of this very call was committed, and its answer lost.
func (s *Store) readSituation(ctx context.Context, tx pgx.Tx, request BeginRequest, token int64, seen *situation) (mine *claimRow, err error) {
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
	// The shared form of the lock: two workers that look at one dead holder do
	// not take each other for it.
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
			switch {
			case holder == nil:
				c.Holder = holderNone
			case free != nil && *free:
				c.Holder = holderGone
			case free != nil:
				c.Holder = holderLive
			case s.isRegistered(c.Token):
				c.Holder = holderHere
			}
			if c.Step != request.Step {
				if c.Holder != holderNone {
					seen.OtherSteps = append(seen.OtherSteps, c)
				}
				continue
			}
			seen.Claims = append(seen.Claims, c)
			if c.Token == token && c.Outcome == nil {
				mine = &c
			}
		}
		return rows.Err()
	})
	batch.Queue(`SELECT EXISTS (SELECT FROM mm_orchestrator.holds WHERE run_id = $1)`, request.RunID).QueryRow(func(row pgx.Row) error {
		return row.Scan(&seen.Holds)
	})
	return mine, tx.SendBatch(ctx, batch).Close()
}

// takeWorkspace makes the workspace the run's, or parks the message: because
// another run has it, or because of busy, not nil, a claim on a step of the run.
func (s *Store) takeWorkspace(ctx context.Context, tx pgx.Tx, request BeginRequest, run Run, busy *claimRow) (*Parked, error) {
	workspace := clean(request.Workspace(run))
	hold, err := lockHold(ctx, tx, workspace, clean(request.Queue), run.ID)
	if err != nil {
		return nil, err
	}
	p := parcel{
		workspace: workspace, queue: clean(request.Queue), turn: turnOf(run, request.Step), step: request.Step,
		taskID: request.TaskID, root: request.RootTaskID, why: ParkedWorkspace, message: request.Message,
	}
	batch := &pgx.Batch{}
	parked := &Parked{}
	switch a := admit(hold, p.turn); {
	case busy != nil:
		p.why = ParkedBusy
		parked.Reason = fmt.Sprintf("worker %s runs step %s of this run since %s", busy.Worker, busy.Step, busy.StartedAt.Format(time.RFC3339))
		if busy.Holder == holderGone {
			parked.Reason += "; the worker is gone, and the message of its step has not come back yet"
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
		queueSeen(batch, run.ID, request.RootTaskID)
	}
	if parked != nil {
		parked.Why = p.why
		if err := queuePark(batch, p); err != nil {
			return nil, err
		}
	}
	return parked, tx.SendBatch(ctx, batch).Close()
}

// writeStart records a start (docs/moonmind.md#start-of-a-step, but without the
// faults docs/moonmind.md#c14, docs/moonmind.md#r3 and docs/moonmind.md#r5):
// the state row of the newest attempt begins afresh, a pending run becomes
// running, the claim is ours, and those in free, of earlier attempts too, are
// taken from their dead holders. It returns how far an attempt that was begun
// before had come.
func (s *Store) writeStart(ctx context.Context, tx pgx.Tx, claim Claim, request BeginRequest, free []int64) (progress *Progress, err error) {
	batch := &pgx.Batch{}
	if len(free) > 0 {
		queueFree(batch, claim.RunID, free)
	}
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
	// beside a later started_at (docs/moonmind.md#r3).
	batch.Queue(`
		UPDATE orchestrator_runs
		SET status = 'running', started_at = $2, completed_at = NULL, updated_at = now()
		WHERE id = $1 AND status = 'pending'`, claim.RunID, claim.StartedAt)
	// progress: what RETURNING reads is the row under its lock, and whoever
	// held the claim before records nothing any more. An attempt that has ended
	// and begins again, as a rollback may, begins at its first command.
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
		progress, err = parseProgress(text)
		return err
	})
	err = tx.SendBatch(ctx, batch).Close()
	return progress, err
}

// ReleaseClaim hands a claim back that will not be finished here: the worker
// is stopping, or FinishStep failed. The next delivery of the step, to anyone,
// may start it at once. The state row stays in_progress until then. It may be
// called twice, and after the claim was lost; in this Store the claim is free
// even if the database cannot be told. After an error the Store goes on telling
// it until it answers, or until Close.
func (s *Store) ReleaseClaim(ctx context.Context, claim Claim) error {
	s.unregister(claim.Token)
	err := s.retry(ctx, "release step "+string(claim.Step)+" of run "+claim.RunID, func(ctx context.Context) error {
		_, err := s.pool.Exec(ctx, `
			UPDATE mm_orchestrator.claims SET holder = NULL, handed_back = handed_back + 1
			WHERE run_id = $1 AND step = $2 AND attempt = $3 AND token = $4 AND holder IS NOT NULL`,
			claim.RunID, string(claim.Step), claim.Attempt, claim.Token)
		return err
	})
	if err != nil {
		s.giveBackLater(claim.RunID, claim.Token)
	}
	return err
}
