package database

import (
	"context"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// A transaction begins with its first statement. If that is a batch, begin, settings
// and batch are one round trip. A transaction without a statement sends nothing.
type transaction struct {
	// Tx is the begun transaction; nil before.
	pgx.Tx
	conn *pgx.Conn
	// settings is the statement that follows the begin.
	settings string
	closed   bool
	// committed says that SendLast has committed it.
	committed bool
}

// begin names the isolation level: a role or a database may have another default, with
// which the statements after a lock do not see what was committed before it was granted.
const begin = "begin isolation level read committed"

// SendLast sends the last batch of a transaction of [DB] and commits it, in one round
// trip. An error may mean that the answer was lost, and the transaction committed.
func SendLast(ctx context.Context, tx pgx.Tx, batch *pgx.Batch) error {
	t, isOwn := tx.(*transaction)
	if !isOwn {
		return tx.SendBatch(ctx, batch).Close()
	}
	whole := &pgx.Batch{QueuedQueries: slices.Clone(batch.QueuedQueries)}
	whole.Queue("commit").Exec(func(tag pgconn.CommandTag) error {
		if tag.String() != "COMMIT" {
			return pgx.ErrTxCommitRollback
		}
		return nil
	})
	if err := t.SendBatch(ctx, whole).Close(); err != nil {
		return err
	}
	t.committed = true
	return nil
}

// start begins the transaction, if it has not begun.
func (t *transaction) start(ctx context.Context) (err error) {
	switch {
	case t.Tx != nil:
		return nil
	case t.closed:
		return pgx.ErrTxClosed
	}
	tx, err := t.conn.BeginTx(ctx, pgx.TxOptions{BeginQuery: begin + "; " + t.settings})
	if err != nil {
		return err
	}
	t.Tx = tx
	return nil
}

func (t *transaction) SendBatch(ctx context.Context, batch *pgx.Batch) pgx.BatchResults {
	if t.Tx != nil || t.closed {
		if err := t.start(ctx); err != nil {
			return pgx.FailedBatchResults(batch, err)
		}
		return t.Tx.SendBatch(ctx, batch)
	}
	whole := &pgx.Batch{}
	whole.BeginTx(pgx.TxOptions{BeginQuery: begin})
	whole.Queue(t.settings)
	own := whole.Len()
	whole.QueuedQueries = append(whole.QueuedQueries, batch.QueuedQueries...)
	results := t.conn.SendBatch(ctx, whole)
	t.Tx = results.Tx()
	for range own {
		_, _ = results.Exec() // an error is that of the next results, and of Close
	}
	return results
}

func (t *transaction) Exec(ctx context.Context, sql string, arguments ...any) (pgconn.CommandTag, error) {
	if err := t.start(ctx); err != nil {
		return pgconn.CommandTag{}, err
	}
	return t.Tx.Exec(ctx, sql, arguments...)
}

func (t *transaction) Query(ctx context.Context, sql string, arguments ...any) (pgx.Rows, error) {
	if err := t.start(ctx); err != nil {
		return nil, err
	}
	return t.Tx.Query(ctx, sql, arguments...)
}

func (t *transaction) QueryRow(ctx context.Context, sql string, arguments ...any) pgx.Row {
	if err := t.start(ctx); err != nil {
		return failedRow{err}
	}
	return t.Tx.QueryRow(ctx, sql, arguments...)
}

type failedRow struct{ err error }

func (r failedRow) Scan(...any) error { return r.err }

// Begin begins a savepoint.
func (t *transaction) Begin(ctx context.Context) (pgx.Tx, error) {
	if err := t.start(ctx); err != nil {
		return nil, err
	}
	return t.Tx.Begin(ctx)
}

func (t *transaction) CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, source pgx.CopyFromSource) (int64, error) {
	if err := t.start(ctx); err != nil {
		return 0, err
	}
	return t.Tx.CopyFrom(ctx, table, columns, source)
}

func (t *transaction) Prepare(ctx context.Context, name, sql string) (*pgconn.StatementDescription, error) {
	if err := t.start(ctx); err != nil {
		return nil, err
	}
	return t.Tx.Prepare(ctx, name, sql)
}

func (t *transaction) Conn() *pgx.Conn { return t.conn }

func (t *transaction) Commit(ctx context.Context) error {
	if t.committed {
		return nil
	}
	if t.Tx != nil {
		return t.Tx.Commit(ctx)
	}
	return t.end()
}

func (t *transaction) Rollback(ctx context.Context) error {
	if t.committed {
		return pgx.ErrTxClosed
	}
	if t.Tx != nil {
		return t.Tx.Rollback(ctx)
	}
	return t.end()
}

// end ends a transaction that has not begun.
func (t *transaction) end() error {
	if t.closed {
		return pgx.ErrTxClosed
	}
	t.closed = true
	return nil
}

// beginner gives the transaction to pgx.BeginFunc, which commits it or rolls it back,
// also after a panic.
type beginner struct{ *transaction }

func (b beginner) Begin(context.Context) (pgx.Tx, error) { return b.transaction, nil }
