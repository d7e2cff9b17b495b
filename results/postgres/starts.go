package postgres

import (
	"context"
	"math/rand/v2"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/internal/database"
	"github.com/moonladderstudios/mm-orchestrator/results"
)

var _ results.StartCounter = (*Backend)(nil)

// CountsStarts implements [results.StartCounter]: it needs [Config.StartsTable].
func (b *Backend) CountsStarts() error {
	if b.config.StartsTable == "" {
		return database.Failure(ErrInvalid, "results: starts are not counted: set StartsTable, for instance to \"celery_task_starts\"")
	}
	return nil
}

// CountStart implements [results.StartCounter]: one statement, which is a transaction. If
// its answer is lost, the next try finds the start by its time and does not count it again.
func (b *Backend) CountStart(ctx context.Context, s results.Start) (starts int, err error) {
	if err := b.checkStart(s); err != nil {
		return 0, err
	}
	at := s.At
	if at.IsZero() {
		at = time.Now().Add(-rand.N(time.Second)) // no two calls at the same time
	}
	at = at.UTC().Truncate(time.Microsecond)
	err = b.db.Retry(ctx, "count the start of task "+s.TaskID, func(ctx context.Context) error {
		return b.db.Pool.QueryRow(ctx, `
			INSERT INTO `+b.startsTable()+` AS s (task_id, attempt, starts, worker, started_at) VALUES ($1, $2, 1, $3, $4::timestamptz)
			ON CONFLICT (task_id, attempt) DO UPDATE
			SET starts = s.starts + CASE WHEN s.started_at = EXCLUDED.started_at AND s.worker = EXCLUDED.worker THEN 0 ELSE 1 END,
			    worker = EXCLUDED.worker, started_at = EXCLUDED.started_at
			RETURNING starts`, s.TaskID, s.Attempt, database.Cut(s.Worker, resultTextLength), at).Scan(&starts)
	})
	return starts, err
}

// ForgetStarts implements [results.StartCounter].
func (b *Backend) ForgetStarts(ctx context.Context, s results.Start) error {
	if err := b.checkStart(s); err != nil {
		return err
	}
	return b.db.Retry(ctx, "forget the starts of task "+s.TaskID, func(ctx context.Context) error {
		_, err := b.db.Pool.Exec(ctx, "DELETE FROM "+b.startsTable()+" WHERE task_id = $1 AND attempt = $2", s.TaskID, s.Attempt)
		return err
	})
}

func (b *Backend) checkStart(s results.Start) error {
	if err := b.CountsStarts(); err != nil {
		return results.Permanent(err)
	}
	for _, text := range []string{s.TaskID, s.Attempt} {
		if n := utf8.RuneCountInString(text); n == 0 || n > resultTextLength || text != database.Clean(text) {
			return results.Permanent(database.Failure(ErrInvalid, "task %s, attempt %s: a start needs both as texts of 1 to %d characters", database.Cut(s.TaskID, 80), database.Cut(s.Attempt, 80), resultTextLength))
		}
	}
	return nil
}

func (b *Backend) startsTable() string { return qualified(b.config.Schema, b.config.StartsTable) }

// planStarts returns the step that creates the table of the starts, which is not one of
// Celery's.
func planStarts(ctx context.Context, tx pgx.Tx, config Config) ([]Step, error) {
	if config.StartsTable == "" {
		return nil, nil
	}
	name := qualified(config.Schema, config.StartsTable)
	var exists bool
	if err := tx.QueryRow(ctx, `SELECT to_regclass($1) IS NOT NULL`, name).Scan(&exists); err != nil || exists {
		return nil, err
	}
	return []Step{{What: "create table " + name, SQL: "CREATE TABLE " + name + ` (
    task_id     varchar(155)  NOT NULL,
    attempt     varchar(155)  NOT NULL,
    starts      integer       NOT NULL CHECK (starts > 0),
    worker      varchar(155)  NOT NULL,
    started_at  timestamptz   NOT NULL,
    PRIMARY KEY (task_id, attempt)
)`}}, nil
}
