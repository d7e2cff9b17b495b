package store

import (
	"context"
	"time"
)

// CheckClaim is what a worker asks again and again while it runs a step: whether
// the step is still its own, and whether an operator wants the run to end. It
// returns the request to end the run, nil for none.
//
//   - It returns ErrClaimLost if another worker has taken the claim over, or if
//     the step has ended. After any other error the answer is unknown.
//   - It is one statement and one round trip, and is not retried.
func (s *Store) CheckClaim(ctx context.Context, claim Claim) (*Revocation, error) {
	ctx, cancel := context.WithTimeout(ctx, s.config.TryTimeout)
	defer cancel()
	var has bool
	var reason, by *string
	var at *time.Time
	err := s.pool.QueryRow(ctx, `
		SELECT EXISTS (SELECT FROM mm_orchestrator.claims
		               WHERE run_id = $1 AND step = $2 AND attempt = $3 AND token = $4 AND outcome IS NULL),
		       r.reason, r.revoked_by, r.revoked_at
		FROM (VALUES ($1::uuid)) AS asked (run_id) LEFT JOIN mm_orchestrator.revocations AS r USING (run_id)`,
		claim.RunID, string(claim.Step), claim.Attempt, claim.Token).Scan(&has, &reason, &by, &at)
	if err != nil {
		return nil, translate("look at the claim on step "+string(claim.Step)+" of run "+claim.RunID, err)
	}
	if !has {
		restored, err := s.restoredClaim(ctx, claim)
		if err != nil {
			return nil, err
		}
		if !restored {
			return nil, failure(ErrClaimLost, "step %s of run %s, on which this worker was working", claim.Step, claim.RunID)
		}
	}
	if at == nil {
		return nil, nil
	}
	return &Revocation{RunID: claim.RunID, Reason: *reason, By: *by, At: at.UTC()}, nil
}
