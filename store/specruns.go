package store

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// A NewSpecRun is a run of the Spec workflow that is about to be published.
type NewSpecRun struct {
	ID         string
	FeatureKey string
	// Repository is owner/name, "" for that of the worker's settings.
	Repository string
	// ArtifactsPath is the run's directory as workers see it.
	ArtifactsPath string
	// ChainID is the task id of the last task of the chain.
	ChainID string
}

// SpecConflict is the error of CreateSpecRun and RetrySpecRun for a feature that has an
// active run.
type SpecConflict struct{ FeatureKey, RunID string }

func (e *SpecConflict) Error() string {
	return fmt.Sprintf("Workflow already active for feature '%s' (run_id=%s)", e.FeatureKey, e.RunID)
}

// CreateSpecRun inserts a pending run, as MoonMind's API does.
//
//   - *SpecConflict, and nothing written, if the feature has a pending or running run. Two
//     calls at once cannot both insert one (docs/spec-workflow.md#s11); MoonMind's API,
//     which does not take part in the lock, still can.
//   - ErrInvalid for a text that does not fit.
func (s *Store) CreateSpecRun(ctx context.Context, run NewSpecRun) error {
	for what, limit := range map[string]struct {
		text string
		most int
	}{"feature": {run.FeatureKey, 255}, "repository": {run.Repository, 255}, "artifacts path": {run.ArtifactsPath, 512}} {
		if limit.text != clean(limit.text) || len([]rune(limit.text)) > limit.most {
			return failure(ErrInvalid, "the %s %q has more than %d characters, or NUL", what, cut(limit.text, 80), limit.most)
		}
	}
	return s.refusing(ctx, "create a Spec workflow run", func(tx pgx.Tx) (refusal, err error) {
		if conflict, err := specConflict(ctx, tx, run.FeatureKey, run.ID); conflict != nil || err != nil {
			return conflict, err
		}
		// A repeated insert: the answer to a commit was lost.
		_, err = tx.Exec(ctx, `
			INSERT INTO spec_workflow_runs (id, feature_key, repository, artifacts_path, celery_chain_id, status, phase)
			VALUES ($1, $2, NULLIF($3, ''), NULLIF($4, ''), $5, 'pending', 'discover') ON CONFLICT (id) DO NOTHING`,
			run.ID, run.FeatureKey, run.Repository, run.ArtifactsPath, run.ChainID)
		return nil, err
	})
}

// refusing runs a transaction that may refuse what is asked of it. Then it writes nothing,
// and the refusal is returned as it is.
func (s *Store) refusing(ctx context.Context, doing string, do func(pgx.Tx) (refusal, err error)) error {
	var refused error
	err := s.inTx(ctx, doing, func(tx pgx.Tx) (err error) {
		if refused, err = do(tx); err == nil && refused != nil {
			return failure(ErrInvalid, "%v", refused)
		}
		return err
	})
	if refused != nil && errors.Is(err, ErrInvalid) {
		return refused
	}
	return err
}

// specConflict locks the feature for the transaction, and returns a SpecConflict if
// another run of it is active.
func specConflict(ctx context.Context, tx pgx.Tx, feature, own string) (conflict, err error) {
	if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock(hashtextextended('mm_orchestrator.spec_feature ' || $1, 0))`, feature); err != nil {
		return nil, err
	}
	var active string
	err = tx.QueryRow(ctx, `
		SELECT id::text FROM spec_workflow_runs WHERE feature_key = $1 AND status IN ('pending', 'running') AND id <> $2
		ORDER BY created_at DESC LIMIT 1`, feature, own).Scan(&active)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil, nil
	case err != nil:
		return nil, err
	}
	return &SpecConflict{feature, active}, nil
}

// FailUnpublishedSpecRun ends a run whose chain could not be published.
func (s *Store) FailUnpublishedSpecRun(ctx context.Context, id string) error {
	return s.inTx(ctx, "end run "+id, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `UPDATE spec_workflow_runs SET status = 'failed', finished_at = $2 WHERE id = $1 AND status IN ('pending', 'running')`, id, s.now())
		return err
	})
}

// SpecTaskRow is a row of spec_workflow_task_states.
type SpecTaskRow struct {
	Task       SpecTask
	Attempt    int
	Status     SpecStatus
	Message    string
	Payload    json.RawMessage
	StartedAt  *time.Time
	FinishedAt *time.Time
}

// SpecArtifactRow is a row of workflow_artifacts.
type SpecArtifactRow struct {
	Type, Path string
	SizeBytes  *int64
	Digest     string
}

// SpecAuditRow is a row of workflow_credential_audits.
type SpecAuditRow struct {
	SpecAudit
	CheckedAt time.Time
}

// SpecDoing is a task that has begun and not ended.
type SpecDoing struct {
	Task    SpecTask
	Attempt int
	// Worker is the node that started it last, Since when, and Starts how often it was
	// started.
	Worker string
	Since  time.Time
	Starts int
	// Alive says that this worker runs it now.
	Alive bool
	// Progress is what it has done so far.
	Progress SpecProgress
}

// SpecRunRow is a row of spec_workflow_runs.
type SpecRunRow struct {
	ID, FeatureKey, Repository                 string
	Status                                     SpecRunStatus
	Phase                                      SpecPhase
	Branch, PRURL                              string
	CodexTaskID, CodexLogsPath, CodexPatchPath string
	CodexVolume                                string
	PreflightStatus, PreflightMessage          string
	ArtifactsPath, ChainID                     string
	CreatedAt                                  time.Time
	StartedAt, FinishedAt                      *time.Time
	// Doing is what an active run does, nil for nothing.
	Doing *SpecDoing
	// Failure is the message of the task that has failed last, of a failed run.
	Failure string
}

// SpecRunDetail is a run with all that belongs to it.
type SpecRunDetail struct {
	Run SpecRunRow
	// Tasks are all attempts, in the order of the chain, the oldest attempt first.
	Tasks     []SpecTaskRow
	Artifacts []SpecArtifactRow
	// Audit is nil if no credential was checked.
	Audit *SpecAuditRow
}

// SpecRunFilter chooses runs. Zero fields choose all.
type SpecRunFilter struct {
	Status     SpecRunStatus
	FeatureKey string
	Prefix     IDPrefix
	// Limit is required.
	Limit int
}

const specRunSelect = `
	SELECT r.id::text, r.feature_key, COALESCE(r.repository, ''), r.status::text, r.phase::text, COALESCE(r.branch_name, ''), COALESCE(r.pr_url, ''),
	       COALESCE(r.codex_task_id, ''), COALESCE(r.codex_logs_path, ''), COALESCE(r.codex_patch_path, ''), COALESCE(r.codex_volume, ''),
	       COALESCE(r.codex_preflight_status::text, ''), COALESCE(r.codex_preflight_message, ''), COALESCE(r.artifacts_path, ''), COALESCE(r.celery_chain_id, ''),
	       r.created_at, r.started_at, r.finished_at,
	       CASE WHEN r.status = 'failed' THEN COALESCE((
	           SELECT t.message FROM spec_workflow_task_states t WHERE t.workflow_run_id = r.id AND t.status = 'failed'
	           ORDER BY t.finished_at DESC NULLS LAST, t.attempt DESC LIMIT 1), '') ELSE '' END
	FROM spec_workflow_runs r`

// ListSpecRuns lists runs, newest first. It reads only.
func (s *Store) ListSpecRuns(ctx context.Context, filter SpecRunFilter) (list []SpecRunRow, err error) {
	least, most := filter.Prefix.bounds()
	err = s.inTx(ctx, "list Spec workflow runs", func(tx pgx.Tx) error {
		rows, err := tx.Query(ctx, specRunSelect+`
			WHERE ($1 = '' OR r.status::text = $1) AND ($2 = '' OR r.feature_key = $2) AND ($3 = '' OR r.id BETWEEN NULLIF($3, '')::uuid AND NULLIF($4, '')::uuid)
			ORDER BY r.created_at DESC, r.id LIMIT $5`, string(filter.Status), clean(filter.FeatureKey), least, most, filter.Limit)
		if err != nil {
			return err
		}
		list, err = pgx.CollectRows(rows, scanSpecRun)
		if err != nil {
			return err
		}
		return addSpecDoing(ctx, tx, list)
	})
	return list, err
}

// bounds are the least and the greatest id with the prefix, "" for the zero prefix.
func (p IDPrefix) bounds() (least, most string) {
	if p.digits == "" {
		return "", ""
	}
	rest := 32 - len(p.digits)
	return hyphenated(p.digits + strings.Repeat("0", rest)), hyphenated(p.digits + strings.Repeat("f", rest))
}

func scanSpecRun(row pgx.CollectableRow) (r SpecRunRow, err error) {
	err = row.Scan(&r.ID, &r.FeatureKey, &r.Repository, &r.Status, &r.Phase, &r.Branch, &r.PRURL, &r.CodexTaskID, &r.CodexLogsPath, &r.CodexPatchPath, &r.CodexVolume,
		&r.PreflightStatus, &r.PreflightMessage, &r.ArtifactsPath, &r.ChainID, &r.CreatedAt, &r.StartedAt, &r.FinishedAt, &r.Failure)
	return r, err
}

// addSpecDoing adds what active runs do.
func addSpecDoing(ctx context.Context, tx pgx.Tx, runs []SpecRunRow) error {
	active := map[string]*SpecRunRow{}
	var ids []string
	for i := range runs {
		if r := &runs[i]; r.Status == SpecRunPending || r.Status == SpecRunRunning {
			active[r.ID] = r
			ids = append(ids, r.ID)
		}
	}
	if len(ids) == 0 {
		return nil
	}
	// A worker is alive if its lock is taken; the lock that this takes ends with the
	// transaction.
	rows, err := tx.Query(ctx, `
		SELECT run_id::text, task, attempt, worker, started_at, starts, progress::text, holder IS NOT NULL AND NOT pg_try_advisory_xact_lock_shared(holder)
		FROM mm_orchestrator.spec_claims WHERE run_id = ANY($1::uuid[]) AND outcome IS NULL ORDER BY started_at`, ids)
	if err != nil {
		return err
	}
	var id string
	var doing SpecDoing
	var progress *string
	_, err = pgx.ForEachRow(rows, []any{&id, &doing.Task, &doing.Attempt, &doing.Worker, &doing.Since, &doing.Starts, &progress, &doing.Alive}, func() error {
		own := doing
		if progress != nil {
			if err := json.Unmarshal([]byte(*progress), &own.Progress); err != nil {
				return err
			}
		}
		active[id].Doing = &own
		return nil
	})
	return err
}

// FindSpecRun returns a run with its tasks, artifacts and credential audit, or
// ErrNotFound. It reads only.
func (s *Store) FindSpecRun(ctx context.Context, id string) (detail SpecRunDetail, err error) {
	if !isUUID(id) {
		return detail, notARun(id)
	}
	err = s.inTx(ctx, "read Spec workflow run "+id, func(tx pgx.Tx) error {
		detail, err = readSpecDetail(ctx, tx, id, "")
		return err
	})
	return detail, err
}

// readSpecDetail reads a run; lock is FOR UPDATE or "".
func readSpecDetail(ctx context.Context, tx pgx.Tx, id, lock string) (d SpecRunDetail, err error) {
	if lock != "" {
		if _, err := tx.Exec(ctx, `SELECT 1 FROM spec_workflow_runs WHERE id = $1 FOR UPDATE`, id); err != nil {
			return d, err
		}
	}
	rows, err := tx.Query(ctx, specRunSelect+` WHERE r.id = $1`, id)
	if err != nil {
		return d, err
	}
	runs, err := pgx.CollectRows(rows, scanSpecRun)
	if err != nil {
		return d, err
	}
	if len(runs) == 0 {
		return d, failure(ErrNotFound, "Workflow run %s not found", id)
	}
	if err := addSpecDoing(ctx, tx, runs); err != nil {
		return d, err
	}
	d.Run = runs[0]
	if rows, err = tx.Query(ctx, `
		SELECT task_name::text, attempt, status::text, COALESCE(message, ''), COALESCE(payload, '{}')::text, started_at, finished_at
		FROM spec_workflow_task_states WHERE workflow_run_id = $1`, id); err != nil {
		return d, err
	}
	d.Tasks, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (t SpecTaskRow, err error) {
		var payload string
		err = row.Scan(&t.Task, &t.Attempt, &t.Status, &t.Message, &payload, &t.StartedAt, &t.FinishedAt)
		t.Payload = json.RawMessage(payload)
		return t, err
	})
	if err != nil {
		return d, err
	}
	slices.SortFunc(d.Tasks, func(a, b SpecTaskRow) int {
		return cmp.Or(slices.Index(SpecTasks, a.Task)-slices.Index(SpecTasks, b.Task), a.Attempt-b.Attempt)
	})
	if rows, err = tx.Query(ctx, `SELECT artifact_type::text, path, size_bytes, COALESCE(digest, '') FROM workflow_artifacts WHERE workflow_run_id = $1 ORDER BY created_at, path`, id); err != nil {
		return d, err
	}
	d.Artifacts, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (a SpecArtifactRow, err error) {
		err = row.Scan(&a.Type, &a.Path, &a.SizeBytes, &a.Digest)
		return a, err
	})
	if err != nil {
		return d, err
	}
	var audit SpecAuditRow
	err = tx.QueryRow(ctx, `
		SELECT codex_status::text, github_status::text, COALESCE(codex_message, ''), COALESCE(github_message, ''), COALESCE(notes, ''), checked_at
		FROM workflow_credential_audits WHERE workflow_run_id = $1`, id).
		Scan(&audit.Codex, &audit.GitHub, &audit.CodexMessage, &audit.GitHubMessage, &audit.Notes, &audit.CheckedAt)
	switch {
	case err == nil:
		d.Audit = &audit
	case !errors.Is(err, pgx.ErrNoRows):
		return d, err
	}
	return d, nil
}

// SpecRetry is how a failed run goes on.
type SpecRetry struct {
	// From is the first task that runs again, as Attempt.
	From    SpecTask
	Attempt int
	// ChainID is the task id of the last task of the chain, which no other retry has.
	ChainID string
	// Artifact is the file with the token of the retry, nil for none.
	Artifact *SpecArtifact
}

// RetrySpecRun makes a failed run run again, as MoonMind's API does: plan decides how, by
// the run as it is. plan may write files; it is called again if the transaction is.
//
//   - The run is running in the phase of the first task, its rows for the new attempt are
//     queued, and those that an earlier attempt has left so are skipped.
//   - An error of plan is returned as it is, with nothing written.
//   - *SpecConflict, and nothing written, if the feature has another active run.
func (s *Store) RetrySpecRun(ctx context.Context, id string, plan func(SpecRunDetail) (SpecRetry, error)) error {
	if !isUUID(id) {
		return notARun(id)
	}
	chain := "" // what the try before has written, unless it has failed
	return s.refusing(ctx, "retry Spec workflow run "+id, func(tx pgx.Tx) (refusal, err error) {
		d, err := readSpecDetail(ctx, tx, id, "FOR UPDATE")
		if err != nil {
			return nil, err
		}
		if chain != "" && d.Run.ChainID == chain {
			return nil, nil // the answer to its commit was lost
		}
		if conflict, err := specConflict(ctx, tx, d.Run.FeatureKey, id); conflict != nil || err != nil {
			return conflict, err
		}
		retry, refusal := plan(d)
		if refusal != nil {
			return refusal, nil
		}
		chain = retry.ChainID
		phase := map[SpecTask]SpecPhase{SpecDiscover: SpecPhaseDiscover, SpecSubmit: SpecPhaseSubmit, SpecPublish: SpecPhaseApply}[retry.From]
		again := SpecTasks[slices.Index(SpecTasks, retry.From):]
		batch := &pgx.Batch{}
		batch.Queue(`UPDATE spec_workflow_runs SET status = 'running', phase = $2::text::specworkflowrunphase, finished_at = NULL, celery_chain_id = $3 WHERE id = $1`, id, string(phase), retry.ChainID)
		batch.Queue(`
			UPDATE spec_workflow_task_states SET status = 'skipped', message = 'Not run: the run was retried as attempt ' || $2::integer
			WHERE workflow_run_id = $1 AND attempt < $2 AND status = 'queued'`, id, retry.Attempt)
		for _, task := range again {
			batch.Queue(`
				INSERT INTO spec_workflow_task_states (id, workflow_run_id, task_name, status, attempt, payload)
				VALUES (gen_random_uuid(), $1, $2, 'queued', $3, '{}') ON CONFLICT (workflow_run_id, task_name, attempt) DO NOTHING`, id, string(task), retry.Attempt)
		}
		if a := retry.Artifact; a != nil {
			batch.Queue(`
				INSERT INTO workflow_artifacts (id, workflow_run_id, artifact_type, path, size_bytes, digest)
				VALUES (gen_random_uuid(), $1, $2::text::workflowartifacttype, $3, $4, 'sha256:' || $5::text)
				ON CONFLICT (workflow_run_id, artifact_type, path) DO UPDATE SET size_bytes = EXCLUDED.size_bytes, digest = EXCLUDED.digest`, id, a.Type, clean(a.Path), a.SizeBytes, a.SHA256)
		}
		return nil, tx.SendBatch(ctx, batch).Close()
	})
}

// A StuckSpecRun is an active run of which nothing was seen for a while: no worker has a
// task of it, and no row has changed.
type StuckSpecRun struct {
	ID, FeatureKey string
	// Queue is that of its Codex tasks, "" if that is not registered.
	Queue string
	// Since is when a row of the run has changed last.
	Since time.Time
}

// specSince is when a row of a run has changed last, or a task of it has begun or ended.
const specSince = `
	GREATEST(r.updated_at, r.created_at,
	         (SELECT max(t.updated_at) FROM spec_workflow_task_states t WHERE t.workflow_run_id = r.id),
	         (SELECT max(GREATEST(c.started_at, c.finished_at)) FROM mm_orchestrator.spec_claims c WHERE c.run_id = r.id))`

// ListStuckSpecRuns lists active runs without a live worker of which nothing was seen for
// a while. Whether their messages still are in a queue is not for the database to say.
func (s *Store) ListStuckSpecRuns(ctx context.Context, quiet time.Duration) (list []StuckSpecRun, err error) {
	err = s.inTx(ctx, "look for Spec workflow runs that are stuck", func(tx pgx.Tx) error {
		rows, err := tx.Query(ctx, `
			WITH quiet AS (
			    SELECT r.id, r.feature_key, COALESCE(r.codex_queue, '') AS queue, `+specSince+` AS since
			    FROM spec_workflow_runs r WHERE r.status IN ('pending', 'running'))
			SELECT id::text, feature_key, queue, since FROM quiet q
			WHERE since < now() - $1::interval
			  AND NOT EXISTS (SELECT FROM mm_orchestrator.spec_claims c WHERE c.run_id = q.id AND c.outcome IS NULL AND c.holder IS NOT NULL
			                  AND NOT pg_try_advisory_xact_lock_shared(c.holder))
			ORDER BY since LIMIT 100`, quiet)
		if err != nil {
			return err
		}
		list, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (r StuckSpecRun, err error) {
			err = row.Scan(&r.ID, &r.FeatureKey, &r.Queue, &r.Since)
			return r, err
		})
		return err
	})
	return list, err
}

// FailStuckSpecRun fails a run, and the task that it has come to, with a reason. It does
// nothing, and returns false, if the run has ended, has a live worker, or has changed
// since it was listed.
func (s *Store) FailStuckSpecRun(ctx context.Context, run StuckSpecRun, reason string) (failed bool, err error) {
	err = s.inTx(ctx, "fail Spec workflow run "+run.ID, func(tx pgx.Tx) error {
		failed = false
		if _, err := tx.Exec(ctx, `SELECT 1 FROM spec_workflow_runs WHERE id = $1 FOR UPDATE`, run.ID); err != nil {
			return err
		}
		var same bool
		err := tx.QueryRow(ctx, `
			SELECT `+specSince+` = $2 AND NOT EXISTS (
			    SELECT FROM mm_orchestrator.spec_claims c WHERE c.run_id = r.id AND c.outcome IS NULL AND c.holder IS NOT NULL AND NOT pg_try_advisory_xact_lock_shared(c.holder))
			FROM spec_workflow_runs r WHERE r.id = $1 AND r.status IN ('pending', 'running')`, run.ID, run.Since).Scan(&same)
		if errors.Is(err, pgx.ErrNoRows) || err == nil && !same {
			return nil
		}
		if err != nil {
			return err
		}
		payload, err := json.Marshal(map[string]string{"status": string(SpecFailed), "message": reason, "code": "run_lost"})
		if err != nil {
			return err
		}
		now := s.now()
		batch := &pgx.Batch{}
		// The first task of the newest attempt that has not ended.
		batch.Queue(`
			UPDATE spec_workflow_task_states SET status = 'failed', message = $2, payload = $3::text::jsonb, finished_at = $4
			WHERE id = (SELECT id FROM spec_workflow_task_states WHERE workflow_run_id = $1 AND status IN ('queued', 'running')
			            ORDER BY attempt DESC, array_position($5::text[], task_name::text) LIMIT 1)`,
			run.ID, headOf(reason), string(payload), now, []string{string(SpecDiscover), string(SpecSubmit), string(SpecPublish)})
		batch.Queue(`UPDATE spec_workflow_runs SET status = 'failed', finished_at = $2 WHERE id = $1`, run.ID, now)
		failed = true
		return tx.SendBatch(ctx, batch).Close()
	})
	return failed, err
}
