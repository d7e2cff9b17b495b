package store

import (
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// SpecTask is a task of the Spec workflow chain, as in
// spec_workflow_task_states.task_name (docs/spec-workflow.md#tasks).
type SpecTask string

// The tasks, in the order of the chain.
const (
	SpecDiscover SpecTask = "discover_next_phase"
	SpecSubmit   SpecTask = "submit_codex_job"
	SpecPublish  SpecTask = "apply_and_publish"
)

// SpecTasks are all tasks, in the order of the chain.
var SpecTasks = []SpecTask{SpecDiscover, SpecSubmit, SpecPublish}

// SpecRunStatus is a label of the enum specworkflowrunstatus. Workers write only
// these (docs/spec-workflow.md#s10).
type SpecRunStatus string

const (
	SpecRunPending   SpecRunStatus = "pending"
	SpecRunRunning   SpecRunStatus = "running"
	SpecRunSucceeded SpecRunStatus = "succeeded"
	SpecRunFailed    SpecRunStatus = "failed"
)

// SpecPhase is a label of the enum specworkflowrunphase.
type SpecPhase string

const (
	SpecPhaseDiscover SpecPhase = "discover"
	SpecPhaseSubmit   SpecPhase = "submit"
	SpecPhaseApply    SpecPhase = "apply"
	SpecPhasePublish  SpecPhase = "publish"
	SpecPhaseComplete SpecPhase = "complete"
)

// SpecStatus is a label of the enum specworkflowtaskstatus.
type SpecStatus string

const (
	SpecQueued    SpecStatus = "queued"
	SpecRunning   SpecStatus = "running"
	SpecSucceeded SpecStatus = "succeeded"
	SpecFailed    SpecStatus = "failed"
	SpecSkipped   SpecStatus = "skipped"
)

// SpecRun is what a task reads of its row in spec_workflow_runs. A column that is
// NULL is "".
type SpecRun struct {
	ID         string
	FeatureKey string
	Status     SpecRunStatus
	Phase      SpecPhase
	Repository string
	// ArtifactsPath is the run's directory as the API sees it; usually relative.
	ArtifactsPath string
	CodexVolume   string
	// CreatedAt never changes.
	CreatedAt time.Time
	// CodexSummary is what Codex has said when it ended well the last time, "" if it has
	// not. A retry's message does not have it.
	CodexSummary string
	// CodexStatus is what the last check of Codex's credentials has found, "" if there was
	// none.
	CodexStatus string
	// QueueRegistered says whether SpecRequest.CodexQueue has a row in
	// codex_worker_shards, so that the run may refer to it.
	QueueRegistered bool
	// Digests are those of the run's artifacts, by type and path.
	Digests map[SpecFile]string
}

// SpecFile is the type and the path of an artifact of a run.
type SpecFile struct {
	Type string `json:"type"`
	Path string `json:"path"`
}

// SpecArtifact is a row of workflow_artifacts.
type SpecArtifact struct {
	SpecFile
	SizeBytes int64 `json:"size_bytes"`
	// SHA256 is bare hex; the column has the prefix sha256:.
	SHA256 string `json:"sha256"`
}

// SpecState is what is written to the row of the claimed task in
// spec_workflow_task_states.
type SpecState struct {
	Status  SpecStatus
	Message string
	// Payload is the JSON object of the row.
	Payload json.RawMessage
	// Refs are the paths of artifacts, nil for NULL.
	Refs []string
}

// SpecAudit is the row of a run in workflow_credential_audits.
type SpecAudit struct {
	// Codex and GitHub are labels of workflowcodexcredentialstatus and
	// workflowgithubcredentialstatus. An empty one was not checked: the row keeps what
	// it has of that service; a new row has invalid.
	Codex, GitHub string
	// CodexMessage and GitHubMessage say what was found, "" for NULL.
	CodexMessage, GitHubMessage string
	Notes                       string
}

// SpecWrite is what one transaction writes. Zero fields are left as they are.
type SpecWrite struct {
	// Run columns.
	Status           SpecRunStatus
	Phase            SpecPhase
	Branch, PRURL    string
	CodexTaskID      string
	CodexLogsPath    string
	CodexPatchPath   string
	PreflightStatus  string
	PreflightMessage string
	// CodexQueue and CodexVolume are written only if the shard or the volume is
	// registered (docs/spec-workflow.md#s2).
	CodexQueue, CodexVolume string
	// Started sets started_at unless it is set. Ended sets finished_at.
	Started, Ended bool

	// Placeholders inserts a queued row for each task that has none for this
	// attempt, and marks those of earlier attempts that nothing will run any more.
	Placeholders bool
	State        *SpecState
	Audit        *SpecAudit
	Artifacts    []SpecArtifact
	// Progress replaces the claim's progress.
	Progress *SpecProgress
	// Outcome ends the claim.
	Outcome *SpecOutcome
}

// SpecOutcome is how a task ended: with a result, or with a failure.
type SpecOutcome struct {
	// Result is what the task returned, nil after a failure.
	Result json.RawMessage `json:"result,omitempty"`
	// ErrorType is Python's class of the failure, "" after a success. Message is its
	// argument.
	ErrorType string `json:"error_type,omitempty"`
	Message   string `json:"message,omitempty"`
}

// SpecClaim is the right to run one task of a run. The token is the fence.
type SpecClaim struct {
	RunID   string
	Task    SpecTask
	Attempt int
	TaskID  string
	Token   int64
	// Starts counts how often the task was started, this start included.
	Starts int
	// Progress is what an earlier worker has recorded of this task.
	Progress SpecProgress
}

// SpecRequest asks for the right to run a task.
type SpecRequest struct {
	RunID   string
	Task    SpecTask
	Attempt int
	// TaskID is Celery's. One task id is one unit of work.
	TaskID string
	// CodexQueue is the queue that the context of the chain names, or "".
	CodexQueue string
}

// SpecDecision is an answer of BeginSpec: [SpecStart], [SpecDone] or [SpecBusy].
type SpecDecision interface{ specDecision() }

// SpecStart: run the task.
type SpecStart struct {
	Claim SpecClaim
	Run   SpecRun
}

// SpecDone: this task has ended already. Nothing was written.
type SpecDone struct{ Outcome SpecOutcome }

// SpecBusy: a live worker runs this task, or another task of the run. Nothing was
// written.
type SpecBusy struct {
	// Worker is its node name.
	Worker string
	Task   SpecTask
}

func (SpecStart) specDecision() {}
func (SpecDone) specDecision()  {}
func (SpecBusy) specDecision()  {}

// BeginSpec asks for the right to run a task of a Spec workflow run, and writes
// what open returns for it in the same transaction.
//
//   - After [SpecStart] the caller has the claim. It must end it by a WriteSpec with
//     an Outcome, or else by ReleaseSpec.
//   - A claim whose holder is dead is taken over once the holder's lock was free for
//     Config.TakeoverGrace; BeginSpec waits for that.
//   - ErrNotFound if there is no such run, and ErrInvalid for a malformed run id. In
//     both cases nothing was written.
func (s *Store) BeginSpec(ctx context.Context, request SpecRequest, open func(SpecStart) SpecWrite) (SpecDecision, error) {
	request.TaskID, request.CodexQueue = clean(request.TaskID), clean(request.CodexQueue)
	switch {
	case !isUUID(request.RunID):
		return nil, notARun(request.RunID)
	case request.TaskID == "":
		return nil, failure(ErrInvalid, "task %s of run %s has no task id", request.Task, request.RunID)
	}
	token := rand.Int64N(1<<62) + 1
	s.register(token)
	faultpoint.Hit(faultpoint.BeginBefore, request.RunID, string(request.Task))
	decision, err := s.beginSpec(ctx, request, token, open)
	if _, started := decision.(SpecStart); started && err == nil {
		faultpoint.Hit(faultpoint.BeginCommitted, request.RunID, string(request.Task))
	} else {
		// If the answer to a commit was lost, the claim has this worker as its holder
		// and a token that nobody has: the next delivery takes it.
		s.unregister(token)
	}
	return decision, err
}

func (s *Store) beginSpec(ctx context.Context, request SpecRequest, token int64, open func(SpecStart) SpecWrite) (decision SpecDecision, err error) {
	suspected := suspicions{}
	var session int
	for {
		var claims []claimRow
		tries := 0
		err = s.retry(ctx, "begin task "+string(request.Task)+" of run "+request.RunID, func(ctx context.Context) error {
			current, err := s.workerLock.ensure(ctx)
			if err != nil {
				return err
			}
			if tries++; tries > 1 || current != session {
				suspected, session = suspicions{}, current
			}
			return s.transaction(ctx, func(tx pgx.Tx) (err error) {
				decision, claims, err = s.beginSpecInTx(ctx, tx, request, token, suspected, open)
				return err
			})
		})
		if err != nil || decision != nil {
			return decision, err
		}
		suspected = suspected.next(claims, time.Now())
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(min(recheckPause, s.config.TakeoverGrace)):
		}
	}
}

// beginSpecInTx returns a nil decision if the state must be read again in a moment,
// because a holder may be dead.
func (s *Store) beginSpecInTx(ctx context.Context, tx pgx.Tx, request SpecRequest, token int64, suspected suspicions, open func(SpecStart) SpecWrite) (SpecDecision, []claimRow, error) {
	run, err := readSpecRun(ctx, tx, request)
	if err != nil {
		return nil, nil, err
	}
	faultpoint.Hit(faultpoint.BeginLocked, request.RunID, string(request.Task))
	claims, mine, done, err := s.readSpecClaims(ctx, tx, request, token)
	if err != nil || done != nil {
		return done, nil, err
	}
	suspected.confirm(claims, s.config.TakeoverGrace)
	start := SpecStart{Run: run, Claim: SpecClaim{RunID: run.ID, Task: request.Task, Attempt: request.Attempt, TaskID: request.TaskID, Token: token, Starts: 1}}
	if mine != nil {
		start.Claim.Starts, start.Claim.Progress = mine.Starts+1, mine.recorded
		if mine.Token == token { // the answer to the commit of an earlier try was lost
			start.Claim.Starts = mine.Starts
			return start, nil, nil
		}
	}
	for _, c := range claims {
		switch c.Holder {
		case holderAlive, holderSelf:
			return SpecBusy{Worker: c.Worker, Task: SpecTask(c.Step)}, nil, nil
		case holderSuspected:
			faultpoint.Hit(faultpoint.HolderSuspected, request.RunID, string(request.Task))
			return nil, claims, nil
		}
	}
	if _, err := tx.Exec(ctx, `
		UPDATE mm_orchestrator.spec_claims SET holder = NULL, token = -token
		WHERE run_id = $1 AND holder IS NOT NULL AND outcome IS NULL`, run.ID); err != nil {
		return nil, nil, err
	}
	if _, err := tx.Exec(ctx, `
		INSERT INTO mm_orchestrator.spec_claims AS c (run_id, task_id, task, attempt, holder, worker, token, starts, started_at)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
		ON CONFLICT (run_id, task_id) DO UPDATE
		SET holder = EXCLUDED.holder, worker = EXCLUDED.worker, token = EXCLUDED.token, starts = EXCLUDED.starts, started_at = EXCLUDED.started_at`,
		run.ID, request.TaskID, string(request.Task), request.Attempt, s.workerLock.key, s.config.Worker, token, start.Claim.Starts, s.now()); err != nil {
		return nil, nil, err
	}
	err = s.writeSpec(ctx, tx, start.Claim, open(start))
	faultpoint.Hit(faultpoint.BeginWritten, request.RunID, string(request.Task))
	return start, nil, err
}

// specClaimRow is a claim with what the task has recorded.
type specClaimRow struct {
	claimRow
	recorded SpecProgress
}

// readSpecClaims reads the claims of a run that have a holder, and that of the
// request. done is set if that one has ended.
func (s *Store) readSpecClaims(ctx context.Context, tx pgx.Tx, request SpecRequest, token int64) (claims []claimRow, mine *specClaimRow, done SpecDecision, err error) {
	rows, err := tx.Query(ctx, `
		SELECT task, task_id, worker, token, starts, holder, outcome::text, progress::text,
		       CASE WHEN outcome IS NULL AND holder <> $3 THEN pg_try_advisory_xact_lock_shared(holder) END
		FROM mm_orchestrator.spec_claims
		WHERE run_id = $1 AND (task_id = $2 OR outcome IS NULL AND holder IS NOT NULL)`, request.RunID, request.TaskID, s.workerLock.key)
	if err != nil {
		return nil, nil, nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var c specClaimRow
		var holder *int64
		var outcome, progress *string
		var free *bool
		if err := rows.Scan(&c.Step, &c.TaskID, &c.Worker, &c.Token, &c.Starts, &holder, &outcome, &progress, &free); err != nil {
			return nil, nil, nil, err
		}
		c.Holder = s.holderState(holder, free, c.Token)
		if progress != nil {
			if err := json.Unmarshal([]byte(*progress), &c.recorded); err != nil {
				return nil, nil, nil, err
			}
		}
		if c.TaskID == request.TaskID {
			if outcome != nil {
				var ended SpecDone
				if err := json.Unmarshal([]byte(*outcome), &ended.Outcome); err != nil {
					return nil, nil, nil, err
				}
				return nil, nil, ended, nil
			}
			mine = &c
		}
		if holder != nil && c.Token != token {
			claims = append(claims, c.claimRow)
		}
	}
	return claims, mine, nil, rows.Err()
}

// readSpecRun locks the run and reads it.
func readSpecRun(ctx context.Context, tx pgx.Tx, request SpecRequest) (SpecRun, error) {
	run := SpecRun{Digests: map[SpecFile]string{}}
	err := tx.QueryRow(ctx, `
		SELECT id::text, feature_key, status::text, phase::text, COALESCE(repository, ''), COALESCE(artifacts_path, ''), COALESCE(codex_volume, ''), created_at,
		       COALESCE((SELECT c.progress->'codex'->>'message' FROM mm_orchestrator.spec_claims c
		                 WHERE c.run_id = spec_workflow_runs.id AND c.progress->'codex'->>'outcome' = 'finished'
		                 ORDER BY c.started_at DESC LIMIT 1), ''),
		       COALESCE((SELECT a.codex_status::text FROM workflow_credential_audits a WHERE a.workflow_run_id = spec_workflow_runs.id AND a.codex_checked_at IS NOT NULL), ''),
		       EXISTS (SELECT FROM codex_worker_shards WHERE queue_name = $2)
		FROM spec_workflow_runs WHERE id = $1
		FOR UPDATE`, request.RunID, request.CodexQueue).
		Scan(&run.ID, &run.FeatureKey, &run.Status, &run.Phase, &run.Repository, &run.ArtifactsPath, &run.CodexVolume, &run.CreatedAt, &run.CodexSummary, &run.CodexStatus, &run.QueueRegistered)
	if errors.Is(err, pgx.ErrNoRows) {
		return run, failure(ErrNotFound, "Workflow run %s not found", request.RunID)
	}
	if err != nil {
		return run, err
	}
	rows, err := tx.Query(ctx, `SELECT artifact_type::text, path, digest FROM workflow_artifacts WHERE workflow_run_id = $1 AND digest IS NOT NULL`, run.ID)
	if err != nil {
		return run, err
	}
	var file SpecFile
	var digest string
	_, err = pgx.ForEachRow(rows, []any{&file.Type, &file.Path, &digest}, func() error {
		run.Digests[file] = digest
		return nil
	})
	return run, err
}

// WriteSpec writes what a task has done, in one transaction. The claim's token is
// the fence: ErrClaimLost, with nothing written, if another worker has the task or
// if the claim has ended. A repeated call with the same Outcome is no error.
func (s *Store) WriteSpec(ctx context.Context, claim SpecClaim, write SpecWrite) error {
	for _, a := range write.Artifacts {
		if n := utf8.RuneCountInString(a.Path); n > maxPath {
			return failure(ErrInvalid, "artifact path %q… has %d characters, at most %d fit", cut(a.Path, 40), n, maxPath)
		}
	}
	ended := false
	faultpoint.Hit(faultpoint.SpecWriteBefore, claim.RunID, string(claim.Task))
	err := s.inTx(ctx, "record task "+string(claim.Task)+" of run "+claim.RunID, func(tx pgx.Tx) error {
		ended = false
		// The run is locked first, as in BeginSpec.
		if _, err := tx.Exec(ctx, `SELECT 1 FROM spec_workflow_runs WHERE id = $1 FOR UPDATE`, claim.RunID); err != nil {
			return err
		}
		var token int64
		err := tx.QueryRow(ctx, `SELECT token, outcome IS NOT NULL FROM mm_orchestrator.spec_claims WHERE run_id = $1 AND task_id = $2 FOR UPDATE`,
			claim.RunID, claim.TaskID).Scan(&token, &ended)
		switch {
		case errors.Is(err, pgx.ErrNoRows) || err == nil && token != claim.Token:
			return failure(ErrClaimLost, "task %s of run %s was taken over by another worker: what this one has done is not recorded", claim.Task, claim.RunID)
		case err != nil:
			return err
		case ended && write.Outcome != nil:
			return nil // the answer to an earlier commit was lost
		case ended:
			return failure(ErrClaimLost, "task %s of run %s has ended", claim.Task, claim.RunID)
		}
		if err := s.writeSpec(ctx, tx, claim, write); err != nil {
			return err
		}
		faultpoint.Hit(faultpoint.SpecWriteWritten, claim.RunID, string(claim.Task))
		return nil
	})
	if err == nil {
		faultpoint.Hit(faultpoint.SpecWriteCommitted, claim.RunID, string(claim.Task))
	}
	if err == nil && write.Outcome != nil || errors.Is(err, ErrClaimLost) {
		s.unregister(claim.Token)
	}
	return err
}

// writeSpec writes in one round trip.
func (s *Store) writeSpec(ctx context.Context, tx pgx.Tx, claim SpecClaim, w SpecWrite) error {
	now := s.now()
	batch := &pgx.Batch{}
	if w.Placeholders {
		names := make([]string, len(SpecTasks))
		for i, task := range SpecTasks {
			names[i] = string(task)
		}
		batch.Queue(`
			UPDATE spec_workflow_task_states SET status = 'skipped', message = 'Not run: the run was retried as attempt ' || $2::integer
			WHERE workflow_run_id = $1 AND attempt < $2 AND status = 'queued'`, claim.RunID, claim.Attempt)
		batch.Queue(`
			INSERT INTO spec_workflow_task_states (id, workflow_run_id, task_name, status, attempt, payload)
			SELECT gen_random_uuid(), $1, name, 'queued', $3, '{}' FROM unnest($2::text[]) AS name
			ON CONFLICT (workflow_run_id, task_name, attempt) DO NOTHING`, claim.RunID, names, claim.Attempt)
	}
	batch.Queue(`
		UPDATE spec_workflow_runs SET
		    status = COALESCE(NULLIF($2, '')::specworkflowrunstatus, status),
		    phase = COALESCE(NULLIF($3, '')::specworkflowrunphase, phase),
		    branch_name = COALESCE(NULLIF($4, ''), branch_name),
		    pr_url = COALESCE(NULLIF($5, ''), pr_url),
		    codex_task_id = COALESCE(NULLIF($6, ''), codex_task_id),
		    codex_logs_path = COALESCE(NULLIF($7, ''), codex_logs_path),
		    codex_patch_path = COALESCE(NULLIF($8, ''), codex_patch_path),
		    codex_preflight_status = COALESCE(NULLIF($9, '')::codexpreflightstatus, codex_preflight_status),
		    codex_preflight_message = CASE WHEN $9 = '' THEN codex_preflight_message ELSE NULLIF($10, '') END,
		    codex_queue = COALESCE((SELECT queue_name FROM codex_worker_shards WHERE queue_name = $11), codex_queue),
		    codex_volume = COALESCE((SELECT name FROM codex_auth_volumes WHERE name = $12), codex_volume),
		    started_at = CASE WHEN $13 THEN COALESCE(started_at, $15) ELSE started_at END,
		    finished_at = CASE WHEN $14 THEN $15 ELSE finished_at END
		WHERE id = $1`,
		claim.RunID, string(w.Status), string(w.Phase), cut(w.Branch, 255), cut(w.PRURL, 512), cut(w.CodexTaskID, 255), clean(w.CodexLogsPath), clean(w.CodexPatchPath),
		w.PreflightStatus, headOf(w.PreflightMessage), clean(w.CodexQueue), clean(w.CodexVolume), w.Started, w.Ended, now)
	if w.State != nil {
		if err := queueSpecState(batch, claim, *w.State, now); err != nil {
			return err
		}
	}
	if a := w.Audit; a != nil {
		batch.Queue(`
			INSERT INTO workflow_credential_audits AS w
			       (id, workflow_run_id, codex_status, github_status, checked_at, notes, codex_message, github_message, codex_checked_at, github_checked_at, environment_snapshot)
			VALUES (gen_random_uuid(), $1, COALESCE(NULLIF($2::text, ''), 'invalid')::workflowcodexcredentialstatus, COALESCE(NULLIF($3::text, ''), 'invalid')::workflowgithubcredentialstatus,
			        $5, NULLIF($4, ''), NULLIF($6, ''), NULLIF($7, ''), CASE WHEN $2 <> '' THEN $5::timestamptz END, CASE WHEN $3 <> '' THEN $5::timestamptz END, 'null')
			ON CONFLICT (workflow_run_id) DO UPDATE
			SET checked_at = EXCLUDED.checked_at, notes = EXCLUDED.notes,
			    codex_status = CASE WHEN $2 <> '' THEN EXCLUDED.codex_status ELSE w.codex_status END,
			    codex_message = CASE WHEN $2 <> '' THEN EXCLUDED.codex_message ELSE w.codex_message END,
			    codex_checked_at = COALESCE(EXCLUDED.codex_checked_at, w.codex_checked_at),
			    github_status = CASE WHEN $3 <> '' THEN EXCLUDED.github_status ELSE w.github_status END,
			    github_message = CASE WHEN $3 <> '' THEN EXCLUDED.github_message ELSE w.github_message END,
			    github_checked_at = COALESCE(EXCLUDED.github_checked_at, w.github_checked_at)`,
			claim.RunID, a.Codex, a.GitHub, headOf(a.Notes), now, headOf(a.CodexMessage), headOf(a.GitHubMessage))
	}
	for _, a := range w.Artifacts {
		batch.Queue(`
			INSERT INTO workflow_artifacts (id, workflow_run_id, artifact_type, path, size_bytes, digest)
			VALUES (gen_random_uuid(), $1, $2::text::workflowartifacttype, $3, $4, 'sha256:' || $5::text)
			ON CONFLICT (workflow_run_id, artifact_type, path) DO UPDATE SET size_bytes = EXCLUDED.size_bytes, digest = EXCLUDED.digest`,
			claim.RunID, a.Type, clean(a.Path), a.SizeBytes, a.SHA256)
	}
	if w.Progress != nil {
		text, err := json.Marshal(w.Progress)
		if err == nil {
			text, err = cleanJSON(text)
		}
		if err != nil {
			return failure(ErrInvalid, "cannot record the progress of task %s of run %s: %v", claim.Task, claim.RunID, err)
		}
		batch.Queue(`UPDATE mm_orchestrator.spec_claims SET progress = $3 WHERE run_id = $1 AND task_id = $2`, claim.RunID, claim.TaskID, string(text))
	}
	if w.Outcome != nil {
		outcome := *w.Outcome
		outcome.Message = clean(outcome.Message)
		text, err := json.Marshal(outcome)
		if err != nil {
			return failure(ErrInvalid, "cannot record the outcome of task %s of run %s: %v", claim.Task, claim.RunID, err)
		}
		batch.Queue(`UPDATE mm_orchestrator.spec_claims SET holder = NULL, finished_at = $3, outcome = $4 WHERE run_id = $1 AND task_id = $2`,
			claim.RunID, claim.TaskID, now, string(text))
	}
	return tx.SendBatch(ctx, batch).Close()
}

// queueSpecState upserts the row of the claimed task. A row that begins to run has
// nothing of an earlier run of the same attempt.
func queueSpecState(batch *pgx.Batch, claim SpecClaim, state SpecState, now time.Time) error {
	payload, err := cleanJSON(state.Payload)
	if err != nil {
		return err
	}
	var refs *string
	if state.Refs != nil {
		text, err := json.Marshal(state.Refs)
		if err != nil {
			return failure(ErrInvalid, "cannot record the artifacts of task %s of run %s: %v", claim.Task, claim.RunID, err)
		}
		list := string(text)
		refs = &list
	}
	batch.Queue(`
		INSERT INTO spec_workflow_task_states AS s
		       (id, workflow_run_id, task_name, attempt, status, message, payload, artifact_refs, started_at, finished_at)
		VALUES (gen_random_uuid(), $1, $2, $3, $4::text::specworkflowtaskstatus, $5, $6::text::jsonb, $7::text::jsonb,
		        CASE WHEN $4 = 'running' THEN $8::timestamptz END, CASE WHEN $4 <> 'running' THEN $8::timestamptz END)
		ON CONFLICT (workflow_run_id, task_name, attempt) DO UPDATE
		SET status = EXCLUDED.status, message = EXCLUDED.message, payload = EXCLUDED.payload, artifact_refs = EXCLUDED.artifact_refs,
		    started_at = COALESCE(EXCLUDED.started_at, s.started_at), finished_at = EXCLUDED.finished_at`,
		claim.RunID, string(claim.Task), claim.Attempt, string(state.Status), headOf(state.Message), string(payload), refs, now)
	return nil
}

// ReleaseSpec gives a claim back that the caller does not end, so that the next
// delivery continues at once. It does nothing if another worker has the task.
func (s *Store) ReleaseSpec(ctx context.Context, claim SpecClaim) error {
	defer s.unregister(claim.Token)
	return s.inTx(ctx, "release task "+string(claim.Task)+" of run "+claim.RunID, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `
			UPDATE mm_orchestrator.spec_claims SET holder = NULL, starts = GREATEST(starts - 1, 1)
			WHERE run_id = $1 AND task_id = $2 AND token = $3 AND outcome IS NULL`, claim.RunID, claim.TaskID, claim.Token)
		return err
	})
}
