package store

import (
	"context"
	"fmt"
	"sync"

	"github.com/jackc/pgx/v5"
)

// ownTableNames are the tables of schema mm_orchestrator without which a
// worker cannot work.
var ownTableNames = []string{"claims", "holds", "parked", "revocations", "workers"}

// CheckOwnSchema says whether the schema mm_orchestrator is there, and is of
// this program's version or a newer one. It tries once: it is for health
// checks, and ErrSchema names the cure.
func (s *Store) CheckOwnSchema(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.config.TryTimeout)
	defer cancel()
	doing := "look at schema mm_orchestrator of " + s.place
	var schema bool
	var missing []string
	err := s.pool.QueryRow(ctx, `
		SELECT to_regnamespace('mm_orchestrator') IS NOT NULL,
		       ARRAY(SELECT name FROM unnest($1::text[]) AS name WHERE to_regclass('mm_orchestrator.' || name) IS NULL)`,
		append([]string{"schema_versions"}, ownTableNames...)).Scan(&schema, &missing)
	switch {
	case err != nil:
		return translate(doing, err)
	case !schema:
		return failure(ErrSchema, "database %s has no schema mm_orchestrator: run `mm-orchestrator migrate`", s.place)
	case len(missing) > 0:
		return failure(ErrSchema, "schema mm_orchestrator of %s has no table %s: drop the schema and run `mm-orchestrator migrate`", s.place, missing[0])
	}
	var version int
	err = s.pool.QueryRow(ctx, `SELECT COALESCE(max(version), 0) FROM mm_orchestrator.schema_versions`).Scan(&version)
	if err == nil && version < newestVersion() {
		return failure(ErrSchema, "schema mm_orchestrator of %s is of version %d, this program needs %d: run `mm-orchestrator migrate`", s.place, version, newestVersion())
	}
	return translate(doing, err)
}

// A givenClaim is what the row of a claim has besides what [Claim] tells.
type givenClaim struct{ root, workspace, queue string }

// givenClaims are those that this Store has given out and that are neither
// finished nor released, by token.
type givenClaims struct {
	mu   sync.Mutex
	list map[int64]givenClaim
}

func (g *givenClaims) add(token int64, claim givenClaim) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.list == nil {
		g.list = map[int64]givenClaim{}
	}
	g.list[token] = claim
}

func (g *givenClaims) remove(token int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.list, token)
}

func (g *givenClaims) find(token int64) (givenClaim, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	claim, found := g.list[token]
	return claim, found
}

// restoreClaim writes the row of a claim again that this Store has given out,
// and that went with the whole schema: rows of claims are never deleted
// otherwise. The step that runs goes on under it, and its end is recorded, so
// that nothing is run twice. It says whether it did.
//
// It does not while another row has the attempt's place, as when another worker
// was given the step since the schema is back, or when MoonMind's row does
// not say any more that this start of the step is in progress. Of the workspace
// it takes the hold again, unless another run has it.
func (s *Store) restoreClaim(ctx context.Context, tx pgx.Tx, claim Claim) (bool, error) {
	given, found := s.given.find(claim.Token)
	if !found {
		return false, nil
	}
	batch := &pgx.Batch{}
	batch.Queue(lockStates, claim.RunID, []string{string(claim.Step)})
	batch.Queue(lockRun, claim.RunID)
	restored := false
	batch.Queue(`
		INSERT INTO mm_orchestrator.claims (run_id, step, attempt, task_id, root_task_id, holder, worker, token, starts, started_at, handed_back)
		SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11
		WHERE EXISTS (SELECT FROM spec_workflow_task_states AS s
		              WHERE s.orchestrator_run_id = $1 AND s.plan_step::text = $2 AND s.attempt = $3
		                AND s.plan_step_status = 'in_progress' AND s.celery_task_id = $12 AND s.started_at = $10)
		  AND NOT EXISTS (SELECT FROM spec_workflow_task_states AS s
		                  WHERE s.orchestrator_run_id = $1 AND s.plan_step::text = $2 AND s.attempt > $3)
		ON CONFLICT (run_id, step, attempt) DO NOTHING
		RETURNING true`,
		claim.RunID, string(claim.Step), claim.Attempt, claim.TaskID, given.root, s.workerLock.key, clean(s.config.Worker), claim.Token,
		claim.Starts, claim.StartedAt, claim.HandedBack, cut(claim.TaskID, 255)).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			restored = true
		}
		return rows.Err()
	})
	if err := tx.SendBatch(ctx, batch).Close(); err != nil || !restored {
		return false, err
	}
	_, err := tx.Exec(ctx, `
		INSERT INTO mm_orchestrator.holds AS h (workspace, queue, run_id, root_task_id) VALUES ($1, $2, $3, $4)
		ON CONFLICT (workspace) DO UPDATE SET run_id = EXCLUDED.run_id, root_task_id = EXCLUDED.root_task_id
		WHERE h.run_id IS NULL`, given.workspace, given.queue, claim.RunID, given.root)
	if err == nil {
		s.config.Logger.Warn("the claim on a step was gone, with the schema mm_orchestrator: it is written again", "run_id", claim.RunID, "step", string(claim.Step))
	}
	return true, err
}

// restoredClaim is restoreClaim in a transaction of its own, once.
func (s *Store) restoredClaim(ctx context.Context, claim Claim) (restored bool, err error) {
	if _, given := s.given.find(claim.Token); !given {
		return false, nil
	}
	err = s.transaction(ctx, func(tx pgx.Tx) error {
		restored, err = s.restoreClaim(ctx, tx, claim)
		return err
	})
	if err != nil {
		return false, translate(fmt.Sprintf("restore the claim on step %s of run %s", claim.Step, claim.RunID), err)
	}
	return restored, nil
}
