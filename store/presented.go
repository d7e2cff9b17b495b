package store

import (
	"context"
	"encoding/json"
	"time"

	"github.com/jackc/pgx/v5"
)

// Presented is what an approval of a run would cover, or covers.
type Presented struct {
	Effects
	// Steps are those of the plan, in its order.
	Steps []Step
	// Requirements and Roles are those of the gates that apply.
	Requirements, Roles []string
	// LookedAt is when a worker has recorded what it saw of the workspace, nil if none
	// has.
	LookedAt *time.Time
	// Paused says that the run has paused before verify: it is deployed already.
	Paused bool
	// Approver, Role and GrantedAt are those of the approval in the run's row, "" for
	// none.
	Approver, Role, GrantedAt string
}

// FindPresented returns what an approval of a run covers. queue is that of its worker,
// service names the gate of a run. ErrNotFound if there is no such run.
func (s *Store) FindPresented(ctx context.Context, runID, queue string, service func(Run) string) (Presented, error) {
	if !isUUID(runID) {
		return Presented{}, notARun(runID)
	}
	var p Presented
	err := s.retry(ctx, "read what run "+runID+" would do", func(ctx context.Context) error {
		p = Presented{}
		var run Run
		var named string
		var gates []Gate
		var seen approvalRecord
		batch := &pgx.Batch{}
		batch.Queue(`
			SELECT `+runColumns+`, COALESCE(r.approval_gate_id::text, ''),
			       COALESCE(a.block -> 'approver' ->> 'id', ''), COALESCE(a.block -> 'approver' ->> 'role', ''), COALESCE(a.block ->> 'grantedAt', '')
			FROM orchestrator_runs AS r
			JOIN orchestrator_action_plans AS p ON p.id = r.action_plan_id
			CROSS JOIN LATERAL (SELECT CASE WHEN r.metrics_snapshot -> 'approval' ->> 'status' = 'granted' THEN r.metrics_snapshot -> 'approval' END AS block) AS a
			WHERE r.id = $1`, runID).QueryRow(func(row pgx.Row) (err error) {
			run, err = scanRun(row, &named, &p.Approver, &p.Role, &p.GrantedAt)
			if err == pgx.ErrNoRows {
				return failure(ErrNotFound, "Run %s not found", runID)
			}
			return err
		})
		batch.Queue(selectGates).Query(func(rows pgx.Rows) (err error) {
			gates, err = pgx.CollectRows(rows, scanGate)
			return err
		})
		batch.Queue(`SELECT presented::text, presented_at, paused_at FROM mm_orchestrator.approvals WHERE run_id = $1 AND queue = $2`, runID, clean(queue)).Query(func(rows pgx.Rows) error {
			for rows.Next() {
				var presented *string
				if err := rows.Scan(&presented, &p.LookedAt, &seen.PausedAt); err != nil {
					return err
				}
				if presented != nil {
					if err := json.Unmarshal([]byte(*presented), &seen.Presented); err != nil {
						return err
					}
				}
			}
			return rows.Err()
		})
		if err := s.transaction(ctx, func(tx pgx.Tx) error { return tx.SendBatch(ctx, batch).Close() }); err != nil {
			return err
		}
		apply := gatesOf(gates, service(run), named)
		p.Effects = effectsOf(run, apply)
		if seen.Presented != nil {
			p.Files, p.Images = seen.Presented.Files, seen.Presented.Images
		}
		for _, g := range apply {
			p.Requirements, p.Roles = append(p.Requirements, g.Requirement), append(p.Roles, g.Roles...)
		}
		p.Steps, p.LookedAt, p.Paused = planSteps(run.Steps), utc(p.LookedAt), seen.PausedAt != nil
		return nil
	})
	return p, err
}
