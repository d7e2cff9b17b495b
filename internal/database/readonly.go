package database

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
)

// readOnly is the SQLSTATE of a write in a read-only transaction.
const readOnly = "25006"

// readOnlyError says that a session takes no writes.
type readOnlyError struct{ standby bool }

func (e *readOnlyError) Error() string {
	if e.standby {
		return "the server is a standby and takes no writes: connect to the primary, or name all servers and target_session_attrs=read-write in the address"
	}
	return "its transactions are read-only (default_transaction_read_only is on), and a worker has to write"
}

// IsReadOnly says that a session takes no writes, by an error of CheckWrites or one
// that Translate has returned. A new session may take them: after a fail-over the old
// server may still answer in the sessions that it has.
func IsReadOnly(err error) bool {
	var session *readOnlyError
	var own *Error
	return errors.As(err, &session) || errors.As(err, &own) && own.Code == readOnly
}

// CheckWrites is like Ping, and also fails if the session takes no writes. A standby
// answers a ping, and gives advisory locks, as a primary does.
func CheckWrites(ctx context.Context, conn *pgx.Conn) error {
	// Any standby, and any session whose default is to write nothing, says on.
	answer, err := show(ctx, conn, "SHOW transaction_read_only")
	if err != nil || answer != "on" {
		return err
	}
	answer, err = show(ctx, conn, "SELECT pg_is_in_recovery()")
	if err != nil {
		return err
	}
	return &readOnlyError{standby: answer == "t"}
}

// show returns the text of a single value. It is one round trip in every
// query_exec_mode.
func show(ctx context.Context, conn *pgx.Conn, sql string) (string, error) {
	results, err := conn.PgConn().Exec(ctx, sql).ReadAll()
	if err != nil {
		return "", err
	}
	if len(results) != 1 || len(results[0].Rows) != 1 || len(results[0].Rows[0]) != 1 {
		return "", errors.New("the server does not answer " + sql)
	}
	return string(results[0].Rows[0][0]), nil
}
