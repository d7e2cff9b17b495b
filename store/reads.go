package store

import (
	"context"
	"encoding/json"
	"time"

	"github.com/jackc/pgx/v5"
)

// runColumns are SQL for the columns of a run r and its plan p, which scanRun reads.
const runColumns = `
	r.id::text, r.instruction, r.target_service, r.priority::text, r.status::text, COALESCE(r.artifact_root, ''),
	r.queued_at, r.started_at, r.completed_at, p.steps::text`

// selectRun reads a run with its plan.
const selectRun = `
	SELECT ` + runColumns + `
	FROM orchestrator_runs AS r
	JOIN orchestrator_action_plans AS p ON p.id = r.action_plan_id
	WHERE r.id = $1`

// scanRun reads runColumns, and into further what follows them in the row.
func scanRun(row pgx.Row, further ...any) (Run, error) {
	var run Run
	var steps string
	err := row.Scan(append([]any{&run.ID, &run.Instruction, &run.TargetService, &run.Priority, &run.Status, &run.ArtifactRoot,
		&run.QueuedAt, &run.StartedAt, &run.CompletedAt, &steps}, further...)...)
	if err != nil {
		return Run{}, err
	}
	run.QueuedAt, run.StartedAt, run.CompletedAt = run.QueuedAt.UTC(), utc(run.StartedAt), utc(run.CompletedAt)
	run.Steps = json.RawMessage(steps)
	run.HasRollback = hasRollback(run.Steps)
	return run, nil
}

func utc(t *time.Time) *time.Time {
	if t == nil {
		return nil
	}
	u := t.UTC()
	return &u
}

// FindRun returns a run with its plan, or ErrNotFound.
func (s *Store) FindRun(ctx context.Context, runID string) (Run, error) {
	if !isUUID(runID) {
		return Run{}, notARun(runID)
	}
	var run Run
	err := s.retry(ctx, "read run "+runID, func(ctx context.Context) (err error) {
		run, err = scanRun(s.pool.QueryRow(ctx, selectRun, runID))
		if err == pgx.ErrNoRows {
			return failure(ErrNotFound, "Run %s not found", runID)
		}
		return err
	})
	return run, err
}

// RunFilter selects runs for ListRuns. The zero value selects the newest 20.
type RunFilter struct {
	// Status, if set, selects the runs with this status.
	Status RunStatus
	// TargetService, if set, selects the runs for this service.
	TargetService string
	// Limit defaults to 20 and is at most 1000.
	Limit int
	// Offset is how many runs to skip.
	Offset int
}

// ListedRun is a run and what it does, as ListRuns returns it.
type ListedRun struct {
	Run
	Activity
}

// ListRuns returns runs by queued_at, newest first, with what each does at the
// moment. Steps and HasRollback are set as by FindRun.
func (s *Store) ListRuns(ctx context.Context, filter RunFilter) ([]ListedRun, error) {
	if filter.Limit <= 0 {
		filter.Limit = 20
	}
	var runs []ListedRun
	err := s.retry(ctx, "list runs", func(ctx context.Context) error {
		rows, err := s.pool.Query(ctx, withActivity+`,
			r AS MATERIALIZED (
			    SELECT r.* FROM orchestrator_runs AS r
			    WHERE ($1 = '' OR r.status::text = $1) AND ($2 = '' OR r.target_service = $2)
			    ORDER BY r.queued_at DESC, r.id
			    LIMIT $3 OFFSET $4)
			SELECT `+runColumns+`, `+activityColumns+`
			FROM r
			JOIN orchestrator_action_plans AS p ON p.id = r.action_plan_id `+activityOf+`
			ORDER BY r.queued_at DESC, r.id`,
			string(filter.Status), clean(filter.TargetService), min(filter.Limit, 1000), max(filter.Offset, 0))
		if err != nil {
			return err
		}
		runs, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (ListedRun, error) {
			var does activityRow
			run, err := scanRun(row, does.targets()...)
			return ListedRun{run, does.activity()}, err
		})
		return err
	})
	return runs, err
}

// RunDetail is a run with all that is recorded about it.
type RunDetail struct {
	Run Run
	Activity
	// Revocation is an operator's request that no worker has carried out yet, or nil.
	Revocation *Revocation
	// RollbackRequest is the newest request to roll the run back after its end, or nil.
	RollbackRequest *RollbackRequest
	// Snapshot is metrics_snapshot, or nil.
	Snapshot json.RawMessage
	// States are the newest attempts of the steps, in plan order.
	States []StepState
	// Artifacts are ordered by created_at, as the API lists them.
	Artifacts []RegisteredArtifact
}

// StepState is a row of spec_workflow_task_states.
type StepState struct {
	Step    Step
	Attempt int
	// Status is plan_step_status: pending, in_progress, succeeded, failed or
	// skipped.
	Status string
	// CeleryState and CeleryTaskID are "" for NULL.
	CeleryState  string
	CeleryTaskID string
	Message      string
	// Payload is nil for NULL.
	Payload json.RawMessage
	// ArtifactIDs is empty for NULL.
	ArtifactIDs []string
	StartedAt   *time.Time
	FinishedAt  *time.Time
	// Starts counts the starts of this attempt by workers of this program.
	Starts int
	// Worker is the node name of the last of these workers, or "".
	Worker string
}

// RegisteredArtifact is a row of orchestrator_run_artifacts.
type RegisteredArtifact struct {
	ID string
	Artifact
	CreatedAt time.Time
}

// FindRunDetail returns a run with all its details from one snapshot of the database,
// or ErrNotFound.
func (s *Store) FindRunDetail(ctx context.Context, runID string) (RunDetail, error) {
	if !isUUID(runID) {
		return RunDetail{}, notARun(runID)
	}
	var detail RunDetail
	err := s.retry(ctx, "read run "+runID, func(ctx context.Context) error {
		detail = RunDetail{}
		options := pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}
		return pgx.BeginTxFunc(ctx, s.pool, options, func(tx pgx.Tx) error { return readDetail(ctx, tx, runID, &detail) })
	})
	return detail, err
}

func readDetail(ctx context.Context, tx pgx.Tx, runID string, detail *RunDetail) error {
	batch := &pgx.Batch{}
	batch.Queue(selectRun, runID).QueryRow(func(row pgx.Row) (err error) {
		detail.Run, err = scanRun(row)
		if err == pgx.ErrNoRows {
			return failure(ErrNotFound, "Run %s not found", runID)
		}
		return err
	})
	queueActivity(batch, runID, &detail.Activity)
	queueRevocation(batch, runID, &detail.Revocation)
	queueRollbackRequest(batch, runID, &detail.RollbackRequest)
	batch.Queue(`SELECT metrics_snapshot::text FROM orchestrator_runs WHERE id = $1`, runID).QueryRow(func(row pgx.Row) error {
		var snapshot *string
		if err := row.Scan(&snapshot); err != nil {
			return err
		}
		if snapshot != nil {
			detail.Snapshot = json.RawMessage(*snapshot)
		}
		return nil
	})
	batch.Queue(`
		SELECT DISTINCT ON (s.plan_step) s.plan_step::text, s.attempt, COALESCE(s.plan_step_status::text, ''),
		       COALESCE(s.celery_state::text, ''), COALESCE(s.celery_task_id, ''), COALESCE(s.message, ''), s.payload::text,
		       ARRAY(SELECT jsonb_array_elements_text(CASE jsonb_typeof(s.artifact_refs) WHEN 'array' THEN s.artifact_refs ELSE '[]' END)),
		       s.started_at, s.finished_at, COALESCE(c.starts, 0), COALESCE(c.worker, '')
		FROM spec_workflow_task_states AS s
		LEFT JOIN mm_orchestrator.claims AS c
		       ON c.run_id = s.orchestrator_run_id AND c.step = s.plan_step::text AND c.attempt = s.attempt
		WHERE s.orchestrator_run_id = $1
		ORDER BY s.plan_step, s.attempt DESC`, runID).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			var state StepState
			var payload *string
			if err := rows.Scan(&state.Step, &state.Attempt, &state.Status, &state.CeleryState, &state.CeleryTaskID, &state.Message,
				&payload, &state.ArtifactIDs, &state.StartedAt, &state.FinishedAt, &state.Starts, &state.Worker); err != nil {
				return err
			}
			if payload != nil {
				state.Payload = json.RawMessage(*payload)
			}
			state.StartedAt, state.FinishedAt = utc(state.StartedAt), utc(state.FinishedAt)
			detail.States = append(detail.States, state)
		}
		return rows.Err()
	})
	batch.Queue(`
		SELECT id::text, artifact_type::text, path, COALESCE(checksum, ''), COALESCE(size_bytes, 0), created_at
		FROM orchestrator_run_artifacts
		WHERE run_id = $1
		ORDER BY created_at, path`, runID).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			var a RegisteredArtifact
			if err := rows.Scan(&a.ID, &a.Type, &a.Path, &a.Checksum, &a.SizeBytes, &a.CreatedAt); err != nil {
				return err
			}
			a.CreatedAt = a.CreatedAt.UTC()
			detail.Artifacts = append(detail.Artifacts, a)
		}
		return rows.Err()
	})
	return tx.SendBatch(ctx, batch).Close()
}
