package database

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/moonladderstudios/mm-orchestrator/internal/timeout"
)

// DB is a pool of connections with limits on how long a call may try.
type DB struct {
	Pool *pgxpool.Pool
	// Place names the database in errors.
	Place string
	// TryTimeout bounds one try of a call. A server that does not answer in this
	// time counts as unavailable.
	TryTimeout time.Duration
	// RetryFor is how long one call retries when the connection breaks or the
	// server is unavailable.
	RetryFor time.Duration
	// Connection is how Pool connects; nil for a pool that belongs to the program.
	Connection *Connection
	// Logger is told once that statements are no longer prepared. Nil tells nobody.
	Logger *slog.Logger
	// Translate replaces the package's function of this name, if set.
	Translate func(doing string, err error) error

	tries timeout.Group
}

func (d *DB) translate(doing string, err error) error {
	if d.Translate != nil {
		return d.Translate(doing, err)
	}
	return Translate(doing, err)
}

// Retry repeats a call until it succeeds, fails for good, or RetryFor is
// over. The call must be safe to repeat when the answer to a commit was lost. A
// session that takes no writes is not used again.
//
// If an error shows a pooler with which prepared statements do not work, it repeats the
// call at once, with connections that prepare none.
func (d *DB) Retry(ctx context.Context, doing string, call func(context.Context) error) error {
	deadline := time.Now().Add(d.RetryFor)
	unprepared := false
	for n := 0; ; n++ {
		try, cancel := d.tries.Context(ctx, d.TryTimeout)
		err := d.translate(doing, call(try))
		late := try.Err() != nil
		cancel()
		if IsReadOnly(err) {
			// The next try must not have a session at the same server: the address
			// may lead to the new primary by now.
			d.Pool.Reset()
		}
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil && (late || errors.Is(err, ErrUnavailable)):
			return fmt.Errorf("cannot %s: %w", doing, ctx.Err())
		case late:
			err = Failure(ErrUnavailable, "cannot %s: no answer from %s within %s", doing, d.Place, d.TryTimeout)
		case !errors.Is(err, ErrUnavailable):
			return err
		case !unprepared && d.stopPreparing(err):
			unprepared = true
			continue
		}
		wait := Backoff(n)
		if time.Now().Add(wait).After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("cannot %s: %w; last: %v", doing, ctx.Err(), err)
		case <-time.After(wait + rand.N(wait/4+1)):
		}
	}
}

// stopPreparing makes the pool's connections prepare no statements, if err says that they
// cannot: each statement is then parsed anew, which a pooler allows. Those that are open
// are closed, when they are returned. It reports whether the call that has failed should
// be repeated.
func (d *DB) stopPreparing(err error) bool {
	var failed *Error
	if d.Connection == nil || !errors.As(err, &failed) || failed.Code != noStatement && failed.Code != duplicateStatement {
		return false
	}
	if d.Connection.unprepared.CompareAndSwap(false, true) {
		d.Pool.Reset()
		if d.Logger != nil {
			d.Logger.Warn("statements are no longer prepared, which takes longer", "database", d.Place, "reason", poolerCure)
		}
	}
	return true
}

// Backoff is the wait before try n+1: 50 ms, doubled each time, at most 1 s. So
// calls succeed within 2 s of the server being available again.
func Backoff(n int) time.Duration {
	return min(50*time.Millisecond<<min(n, 10), time.Second)
}

// InTx runs one transaction (READ COMMITTED), repeated by Retry.
func (d *DB) InTx(ctx context.Context, doing string, do func(pgx.Tx) error) error {
	return d.Retry(ctx, doing, func(ctx context.Context) error { return d.Transaction(ctx, do) })
}

// Transaction runs one transaction (READ COMMITTED) that locks rows. The server
// ends it when no statement comes for TryTimeout, after which we have
// given it up too. Otherwise, if the network fails silently, the session would
// keep its locks for the two hours of TCP's keepalive. The setting is local to
// the transaction, as a session may be shared behind a pooler.
//
// If do begins with a batch, the begin is sent with it, which saves a round trip.
func (d *DB) Transaction(ctx context.Context, do func(pgx.Tx) error) error {
	conn, err := d.Pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	set := "SET LOCAL idle_in_transaction_session_timeout = " + strconv.FormatInt(max(d.TryTimeout.Milliseconds(), 1), 10)
	return pgx.BeginFunc(ctx, beginner{&transaction{conn: conn.Conn(), settings: set}}, do)
}

// pinSettings puts the temporary schema last in the search_path. The shared
// tables are found by the role's own search_path, as Python finds them, but
// never among temporary tables, where PostgreSQL would otherwise look first. It
// also makes commits durable for a role with synchronous_commit off: a step
// whose record was lost would run again.
func pinSettings(ctx context.Context, conn *pgx.Conn) error {
	_, err := conn.Exec(ctx, `SELECT set_config(name, value, false)
		FROM (VALUES ('search_path', current_setting('search_path') || ', pg_temp', current_setting('search_path') NOT LIKE '%pg_temp%'),
		             ('synchronous_commit', 'on', current_setting('synchronous_commit') = 'off')) AS wanted (name, value, needed)
		WHERE needed`, pgx.QueryExecModeExec)
	return err
}
