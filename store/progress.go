package store

import (
	"context"
	"encoding/json"
	"time"

	"github.com/jackc/pgx/v5"
)

// Progress says which commands of a step have ended. Commands run one after the
// other, and none runs after one that failed, so that their number and the exit
// code of the last say it all.
type Progress struct {
	// Commands is how many have ended by themselves, at least 1.
	Commands int `json:"commands"`
	// Digest identifies the commands, so that a worker can see whether those of the
	// plan are still the same.
	Digest string `json:"digest"`
	// ExitCode is that of the last command. All before it ended with 0.
	ExitCode int `json:"exit_code"`
	// EndedAt is when the last command ended.
	EndedAt time.Time `json:"ended_at"`
	// LogSize is the length of the step's log before the output of the last
	// command, in bytes. LogEnd is that after it, 0 while not known.
	LogSize int64 `json:"log_size"`
	LogEnd  int64 `json:"log_end,omitempty"`
}

// RecordProgress records that commands of a step have ended, so that a worker
// which takes the step over does not run them again. When it returns nil, the
// record is durable.
//
//   - It replaces the earlier record of the attempt, so that a later record makes
//     up for one that could not be written.
//   - The claim's token is a fence. It returns ErrClaimLost, and changes nothing,
//     if another worker has taken the claim over or the step has ended.
//   - It is one statement and one round trip: if the worker crashes between the
//     end of a command and its record, the command runs again. Bound its time
//     with ctx.
func (s *Store) RecordProgress(ctx context.Context, claim Claim, progress Progress) error {
	progress.EndedAt = progress.EndedAt.UTC().Truncate(time.Microsecond)
	record, err := json.Marshal(progress)
	if err != nil {
		return failure(ErrInvalid, "cannot record the progress of step %s of run %s: %v", claim.Step, claim.RunID, err)
	}
	return s.retry(ctx, "record the progress of step "+string(claim.Step)+" of run "+claim.RunID, func(ctx context.Context) error {
		// Not prepared, which would cost another round trip in a new session.
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

// parseProgress reads the column progress; nil is NULL.
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
