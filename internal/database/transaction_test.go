package database

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

func open(t *testing.T) *DB {
	t.Helper()
	config, err := pgxpool.ParseConfig(devenv.Database(t))
	if err != nil {
		t.Fatal(err)
	}
	// As a role or a database may have it.
	config.ConnConfig.RuntimeParams["default_transaction_isolation"] = "repeatable read"
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return &DB{Pool: pool, Place: "the test's database", TryTimeout: 5 * time.Second, RetryFor: time.Second}
}

// A transaction has its settings and its rollback however it begins.
func TestTransactionBeginsWithItsFirstStatement(t *testing.T) {
	t.Parallel()
	db := open(t)
	const show = `SELECT current_setting('idle_in_transaction_session_timeout') || ', ' || current_setting('transaction_isolation'), pg_current_xact_id_if_assigned() IS NULL`
	failure := errors.New("no")
	for name, first := range map[string]func(context.Context, pgx.Tx, *string) error{
		"a batch with functions": func(ctx context.Context, tx pgx.Tx, settings *string) error {
			batch := &pgx.Batch{}
			batch.Queue(show).QueryRow(func(row pgx.Row) error { var b bool; return row.Scan(settings, &b) })
			return tx.SendBatch(ctx, batch).Close()
		},
		"a batch with results": func(ctx context.Context, tx pgx.Tx, settings *string) error {
			batch := &pgx.Batch{}
			batch.Queue(show)
			results := tx.SendBatch(ctx, batch)
			var b bool
			return errors.Join(results.QueryRow().Scan(settings, &b), results.Close())
		},
		"a row": func(ctx context.Context, tx pgx.Tx, settings *string) error {
			var b bool
			return tx.QueryRow(ctx, show).Scan(settings, &b)
		},
		"a savepoint": func(ctx context.Context, tx pgx.Tx, settings *string) error {
			var b bool
			return pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error { return tx.QueryRow(ctx, show).Scan(settings, &b) })
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var table string
			for _, want := range []error{failure, nil} {
				var settings string
				err := db.Transaction(t.Context(), func(tx pgx.Tx) error {
					if err := first(t.Context(), tx, &settings); err != nil {
						return err
					}
					// A second batch is in the same transaction.
					batch := &pgx.Batch{}
					batch.Queue(`SELECT 'transaction_test_' || pg_backend_pid()`).QueryRow(func(row pgx.Row) error { return row.Scan(&table) })
					if err := tx.SendBatch(t.Context(), batch).Close(); err != nil {
						return err
					}
					if _, err := tx.Exec(t.Context(), "CREATE TABLE "+table+" ()"); err != nil {
						return err
					}
					return want
				})
				if !errors.Is(err, want) || settings != "5s, read committed" {
					t.Errorf("want error %v, and 5s, read committed: %v, %s", want, err, settings)
				}
				var there bool
				if err := db.Pool.QueryRow(t.Context(), `SELECT to_regclass($1) IS NOT NULL`, table).Scan(&there); err != nil || there != (want == nil) {
					t.Errorf("after error %v the table exists: %t, %v", want, there, err)
				}
			}
			if _, err := db.Pool.Exec(t.Context(), "DROP TABLE "+table); err != nil {
				t.Error(err)
			}
		})
	}
}

// After a batch that fails, the session is free of the transaction.
func TestTransactionWhoseFirstBatchFails(t *testing.T) {
	t.Parallel()
	db := open(t)
	for _, statement := range []string{`SELECT 1/0`, `SELECT nothing FROM nowhere`} {
		err := db.Transaction(t.Context(), func(tx pgx.Tx) error {
			batch := &pgx.Batch{}
			batch.Queue(statement)
			return tx.SendBatch(t.Context(), batch).Close()
		})
		if err == nil {
			t.Errorf("%s: no error", statement)
		}
		conn, err := db.Pool.Acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if status := conn.Conn().PgConn().TxStatus(); status != 'I' {
			t.Errorf("%s: the session is in state %c", statement, status)
		}
		conn.Release()
	}
	if err := db.Transaction(t.Context(), func(pgx.Tx) error { return nil }); err != nil {
		t.Errorf("a transaction without a statement: %v", err)
	}
	if total := db.Pool.Stat().AcquiredConns(); total != 0 {
		t.Errorf("%d connections are not given back", total)
	}
}
