package store

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// auditTexts are records that are ready to be appended to the trail of one run.
type auditTexts struct {
	runID       string
	ids, bodies []string
}

// maxAppended bounds how many records one statement appends.
const maxAppended = 20_000

// withIDs gives records an ID that have none. It belongs before the first try of a
// transaction: one whose answer was lost appends the same records again, which then
// count once.
func withIDs(records []audit.Record) []audit.Record {
	records = slices.Clone(records)
	for i := range records {
		records[i].ID = cmp.Or(records[i].ID, rand.Text())
	}
	return records
}

// auditTexts completes and encodes records. Texts are redacted here, so that no caller
// can forget it.
func (s *Store) auditTexts(claim Claim, records ...audit.Record) (auditTexts, error) {
	texts := auditTexts{runID: claim.RunID, ids: []string{}, bodies: []string{}}
	if left := len(records) - maxAppended; left > 0 {
		// The rest is in the artifacts.
		records = append(records[:maxAppended:maxAppended], audit.Record{
			Kind: records[maxAppended].Kind, Text: fmt.Sprintf("%d more of this kind are not recorded one by one: see the artifacts of the run", left),
		})
	}
	for _, r := range records {
		r.ID = cmp.Or(r.ID, rand.Text())
		if r.At.IsZero() {
			r.At = s.now()
		}
		r.Run = claim.RunID
		if r.Step == "" {
			r.Step, r.Attempt, r.Start = string(claim.Step), claim.Attempt, claim.Starts
		}
		r.Worker = cmp.Or(r.Worker, s.config.Worker)
		r.Redact(s.config.Redact)
		body, err := r.Body()
		if err != nil {
			return texts, failure(ErrInvalid, "%v", err)
		}
		texts.ids, texts.bodies = append(texts.ids, clean(r.ID)), append(texts.bodies, clean(string(body)))
	}
	return texts, nil
}

// queue appends the records and sets head, unless nil. The row of the trail's head stays
// locked until the end of the transaction: it comes after the locks of the run and its
// claims, and before that of the workspace.
func (t auditTexts) queue(batch *pgx.Batch, head *audit.Head) {
	batch.Queue(`SELECT new_length, new_head FROM mm_orchestrator.audit_append($1, $2, $3)`, t.runID, t.ids, t.bodies).QueryRow(func(row pgx.Row) error {
		return scanHead(row, head)
	})
}

// scanHead reads a head, which is NULL for a run without a trail.
func scanHead(row pgx.Row, head *audit.Head) error {
	var length *int64
	var hash *string
	if err := row.Scan(&length, &hash); err != nil {
		return err
	}
	if head != nil {
		*head = audit.Start()
		if length != nil && hash != nil {
			*head = audit.Head{Length: *length, Hash: *hash}
		}
	}
	return nil
}

// claimRecord is an ID for a record of which each claim has one.
func claimRecord(kind audit.Kind, token int64) string {
	return string(kind) + "-" + strconv.FormatInt(token, 36)
}

// isRecorded says that the trail of a run has this record. A call that is repeated asks it
// for one of its own: then the try before was committed, and only the answer was lost.
func isRecorded(ctx context.Context, tx pgx.Tx, runID, id string) (is bool, err error) {
	err = tx.QueryRow(ctx, `SELECT EXISTS (SELECT FROM mm_orchestrator.audit WHERE run_id = $1 AND id = $2)`, runID, id).Scan(&is)
	return is, err
}

// Record appends records to the audit trail of a run, in the name of the step that the
// claim is for. When it returns nil, they are durable.
//
//   - The fields Seq, Prev, Run and, if they are zero, ID, At, Step, Attempt, Start and
//     Worker are set here, and texts are redacted.
//   - The claim's token is a fence. It returns ErrClaimLost, and appends nothing, if
//     another worker has taken the claim over or the step has ended.
//   - It is one statement and one round trip, two in a session's first call. After
//     ErrUnavailable the records may have been appended: with their IDs set, call it
//     again with the same ones.
func (s *Store) Record(ctx context.Context, claim Claim, records ...audit.Record) error {
	if len(records) == 0 {
		return nil
	}
	texts, err := s.auditTexts(claim, records...)
	if err != nil {
		return err
	}
	faultpoint.Hit(faultpoint.AuditBefore, claim.RunID, string(claim.Step), string(records[0].Kind))
	err = s.retry(ctx, "append to the audit trail of run "+claim.RunID, func(ctx context.Context) error {
		appendTo := func() (bool, error) {
			rows, err := s.pool.Query(ctx, `
				WITH mine AS MATERIALIZED (
				    SELECT run_id FROM mm_orchestrator.claims
				    WHERE run_id = $1 AND step = $2 AND attempt = $3 AND token = $4 AND outcome IS NULL
				    FOR NO KEY UPDATE
				)
				SELECT a.new_length FROM mine, mm_orchestrator.audit_append(mine.run_id, $5, $6) AS a`,
				claim.RunID, string(claim.Step), claim.Attempt, claim.Token, texts.ids, texts.bodies)
			if err != nil {
				return false, err
			}
			appended, err := pgx.CollectRows(rows, pgx.RowTo[int64])
			return len(appended) > 0, err
		}
		appended, err := appendTo()
		if err == nil && !appended {
			restored, err := s.restoredClaim(ctx, claim)
			if err != nil {
				return err
			}
			if restored {
				if appended, err = appendTo(); err != nil {
					return err
				}
			}
		}
		if err == nil && !appended {
			return failure(ErrClaimLost, "step %s of run %s was taken over: what it does is not recorded", claim.Step, claim.RunID)
		}
		return err
	})
	if err == nil {
		faultpoint.Hit(faultpoint.AuditRecorded, claim.RunID, string(claim.Step), string(records[0].Kind))
	}
	return err
}

// RecordByHand appends records about what an operator does with a run, without a claim.
// The caller sets By.
func (s *Store) RecordByHand(ctx context.Context, runID string, records ...audit.Record) error {
	if !isUUID(runID) {
		return notARun(runID)
	}
	texts, err := s.auditTexts(Claim{RunID: runID}, records...)
	if err != nil {
		return err
	}
	return s.inTx(ctx, "append to the audit trail of run "+runID, func(tx pgx.Tx) error {
		batch := &pgx.Batch{}
		texts.queue(batch, nil)
		return tx.SendBatch(ctx, batch).Close()
	})
}

// appendByHand appends records in a transaction that does what an operator wants. It
// comes after the locks of the run, and before that of the workspace.
func (s *Store) appendByHand(ctx context.Context, tx pgx.Tx, runID string, records ...audit.Record) error {
	texts, err := s.auditTexts(Claim{RunID: runID}, records...)
	if err != nil {
		return err
	}
	batch := &pgx.Batch{}
	texts.queue(batch, nil)
	return tx.SendBatch(ctx, batch).Close()
}

// A Trail is the audit trail of a run.
type Trail struct {
	RunID string
	// Head is what the database keeps of its length and its end.
	Head audit.Head
	// Removed is the head of the records that the retention has removed, [audit.Start]
	// for none; RemovedAt is when.
	Removed   audit.Head
	RemovedAt time.Time
}

// trailBatch is how many records ReadTrail fetches at once.
const trailBatch = 500

// ReadTrail reads the audit trail of a run, and calls entry with each record, in order.
// It returns ErrNotFound for a run without a trail.
//
//   - It needs the same memory for any length: it reads in portions.
//   - begin is called first, with what is known of the trail; records that are appended
//     after that are not read. An error of begin or entry ends it, and is returned.
//   - Records that were read twice, because the database was away meanwhile, are passed
//     once.
func (s *Store) ReadTrail(ctx context.Context, runID string, begin func(Trail) error, entry func(audit.Entry) error) error {
	if !isUUID(runID) {
		return notARun(runID)
	}
	trail := Trail{}
	doing := "read the audit trail of run " + runID
	var last int64
	err := s.retry(ctx, doing, func(ctx context.Context) error {
		var removed *time.Time
		err := s.pool.QueryRow(ctx, `
			SELECT run_id::text, length, head, removed_length, removed_head, removed_at,
			       GREATEST(length, (SELECT max(seq) FROM mm_orchestrator.audit AS a WHERE a.run_id = h.run_id))
			FROM mm_orchestrator.audit_heads AS h WHERE run_id = $1`, runID).
			Scan(&trail.RunID, &trail.Head.Length, &trail.Head.Hash, &trail.Removed.Length, &trail.Removed.Hash, &removed, &last)
		if errors.Is(err, pgx.ErrNoRows) {
			return failure(ErrNotFound, "run %s has no audit trail: no step of it was begun by a worker that keeps one", runID)
		}
		if removed != nil {
			trail.RemovedAt = removed.UTC()
		}
		return err
	})
	if err != nil {
		return err
	}
	if err := begin(trail); err != nil {
		return err
	}
	for after := int64(0); ; {
		var entries []audit.Entry
		err := s.retry(ctx, doing, func(ctx context.Context) error {
			rows, err := s.pool.Query(ctx, `
				SELECT seq, record, hash FROM mm_orchestrator.audit
				WHERE run_id = $1 AND seq > $2 AND seq <= $3 ORDER BY seq LIMIT $4`, runID, after, last, trailBatch)
			if err != nil {
				return err
			}
			entries, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (e audit.Entry, err error) {
				var text string
				err = row.Scan(&e.Seq, &text, &e.Hash)
				e.Text = []byte(text)
				return e, err
			})
			return err
		})
		if err != nil || len(entries) == 0 {
			return err
		}
		for _, e := range entries {
			if err := entry(e); err != nil {
				return err
			}
			after = e.Seq
		}
	}
}

// RemoveOldTrails removes the audit trails to which nothing was added for keep, which is
// at least a day, at most limit of them. Of each, the length, the last hash and the time
// of the removal stay. It returns the runs.
func (s *Store) RemoveOldTrails(ctx context.Context, keep time.Duration, limit int) ([]string, error) {
	if keep < 24*time.Hour {
		return nil, failure(ErrInvalid, "audit trails are kept for at least a day, not for %s", keep)
	}
	var removed []string
	err := s.retry(ctx, "remove old audit trails", func(ctx context.Context) error {
		rows, err := s.pool.Query(ctx, `
			SELECT run_id::text FROM (
			    SELECT run_id FROM mm_orchestrator.audit_heads
			    WHERE updated_at < now() - make_interval(secs => $1::float8) AND length > removed_length
			    ORDER BY updated_at LIMIT $2) AS old
			WHERE mm_orchestrator.audit_remove(run_id, make_interval(secs => $1::float8)) > 0`, keep.Seconds(), limit)
		if err != nil {
			return err
		}
		removed, err = pgx.CollectRows(rows, pgx.RowTo[string])
		return err
	})
	return removed, err
}
