package database

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

// After a fail-over the sessions of before may be at a server that takes no writes any
// more, and answers. A call does not use them again: a new session leads to the primary.
func TestASessionThatTakesNoWritesIsReplaced(t *testing.T) {
	t.Parallel()
	db := open(t)
	if _, err := db.Pool.Exec(t.Context(), `CREATE TABLE t (n int)`); err != nil {
		t.Fatal(err)
	}
	write := map[string]func(context.Context) error{
		"a statement": func(ctx context.Context) error {
			_, err := db.Pool.Exec(ctx, `INSERT INTO t VALUES (1)`)
			return err
		},
		"a transaction": func(ctx context.Context) error {
			return db.Transaction(ctx, func(tx pgx.Tx) error {
				_, err := tx.Exec(ctx, `INSERT INTO t VALUES (1)`)
				return err
			})
		},
	}
	for name, call := range write {
		for _, conn := range db.Pool.AcquireAllIdle(t.Context()) {
			if _, err := conn.Exec(t.Context(), `SET default_transaction_read_only = on`); err != nil {
				t.Fatal(err)
			}
			if err := CheckWrites(t.Context(), conn.Conn()); !IsReadOnly(err) || !strings.Contains(err.Error(), "default_transaction_read_only") {
				t.Errorf("the session is not called read-only: %v", err)
			}
			conn.Release()
		}
		if err := call(t.Context()); !IsReadOnly(Translate("write", err)) || !errors.Is(Translate("write", err), ErrUnavailable) {
			t.Fatalf("%s in a session that takes no writes: %v", name, err)
		}
		if err := db.Retry(t.Context(), "write", call); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
