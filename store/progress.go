package store

import (
	"context"
	"encoding/json"
	"time"

	"github.com/jackc/pgx/v5"
)

// Progress says how far the commands of a step have come. They run one after
// the other, and the first one that fails is the last, so that a number says
// which have ended and how.
type Progress struct {
	// Commands is how many have ended by themselves, at least 1.
	Commands int `json:"commands"`
	// Digest tells these commands from others, for whoever compares it with
	// those of the plan.
	Digest string `json:"digest"`
	// ExitCode is the last one's. All before it ended with 0.
	ExitCode int `json:"exit_code"`
	// EndedAt is when the last one ended.
	EndedAt time.Time `json:"ended_at"`
	// LogSize is the length in bytes of the step's log before the output of
	// the last one, LogEnd that with it, once it is known; 0 before.
	LogSize int64 `json:"log_size"`
	LogEnd  int64 `json:"log_end,omitempty"`
}

// RecordProgress records that commands of a step have ended, so that a worker
// which takes the step over does not run them again. When it returns nil, the
// record is durable.
//
//   - It replaces what was recorded of this attempt: a later record makes up
//     for one that could not be written.
//   - The claim fences: ErrClaimLost if it was taken over, or if the step has
//     ended. Nothing was changed then.
//   - It is one statement and one round trip, as the time from a command's end
//     to its record is that in which a crash makes it run again. Bound the
//     time that it may take with ctx.
func (s *Store) RecordProgress(ctx context.Context, claim Claim, progress Progress) error {
	progress.EndedAt = progress.EndedAt.UTC().Truncate(time.Microsecond)
	record, err := json.Marshal(progress)
	if err != nil {
		return failure(ErrInvalid, "cannot record the progress of step %s of run %s: %v", claim.Step, claim.RunID, err)
	}
	return s.retry(ctx, "record the progress of step "+string(claim.Step)+" of run "+claim.RunID, func(ctx context.Context) error {
		// Not prepared: that would be a round trip more in a new session.
		update := func() (bool, error) {
			tag, err := s.pool.Exec(ctx, `
				UPDATE mm_orchestrator.claims SET progress = $5::text::json
				WHERE run_id = $1 AND step = $2 AND attempt = $3 AND token = $4 AND outcome IS NULL`,
				pgx.QueryExecModeExec, claim.RunID, string(claim.Step), claim.Attempt, claim.Token, string(record))
			return tag.RowsAffected() > 0, err
		}
		recorded, err := update()
		if err == nil && !recorded {
			if restored, err := s.restoredClaim(ctx, claim); err != nil {
				return err
			} else if restored {
				recorded, err = update()
				if err != nil {
					return err
				}
			}
		}
		if err == nil && !recorded {
			return failure(ErrClaimLost, "step %s of run %s was taken over: its progress is not recorded", claim.Step, claim.RunID)
		}
		return err
	})
}

// parseProgress reads the column; nil is NULL.
func parseProgress(text *string) (*Progress, error) {
	if text == nil {
		return nil, nil
	}
	progress := &Progress{}
	if err := json.Unmarshal([]byte(*text), progress); err != nil {
		return nil, failure(ErrSchema, "a claim has the progress %q: %v", cut(*text, 80), err)
	}
	return progress, nil
}

// HasClaim says whether a claim is still the caller's: nobody has taken it over
// and the step has not ended. It tries once: it is asked again and again while
// a step runs.
func (s *Store) HasClaim(ctx context.Context, claim Claim) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, s.config.TryTimeout)
	defer cancel()
	var has bool
	err := s.pool.QueryRow(ctx, `
		SELECT EXISTS (SELECT FROM mm_orchestrator.claims
		WHERE run_id = $1 AND step = $2 AND attempt = $3 AND token = $4 AND outcome IS NULL)`,
		claim.RunID, string(claim.Step), claim.Attempt, claim.Token).Scan(&has)
	if err == nil && !has {
		return s.restoredClaim(ctx, claim)
	}
	return has, translate("look at the claim on step "+string(claim.Step)+" of run "+claim.RunID, err)
}
