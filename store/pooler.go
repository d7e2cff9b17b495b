package store

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
)

// probeTransactions is how many transactions CheckSession opens beside the session
// that it checks. probeTimeout is how long each may wait for a server session.
const (
	probeTransactions = 4
	probeTimeout      = 2 * time.Second
)

// CheckSession returns ErrInvalid, with the cure, if a connection pooler gives each
// transaction another server session, as PgBouncer does with
// pool_mode=transaction. The worker's advisory lock would then belong to a session
// of another client: a dead worker could look alive for ever, or a live one dead.
// A pooler with one server session for each client is accepted.
//
// In a direct connection the server's process id is the one of the protocol's
// start; poolers send a number of their own there. Behind a pooler CheckSession
// opens several transactions at once. If the pooler does not reserve the server
// session of the checked client, one of them gets it.
func (s *Store) CheckSession(ctx context.Context) error {
	pooled := false
	err := s.retry(ctx, "check the session at "+s.place, func(ctx context.Context) (err error) {
		pooled, err = s.sessionChanges(ctx)
		return err
	})
	if err != nil {
		return err
	}
	if pooled {
		return failure(ErrInvalid, "database %s is reached through a connection pooler that gives every transaction another session (PgBouncer with pool_mode=transaction or statement): "+
			"a worker's lock does not last there. Connect to PostgreSQL directly, or to a pool with pool_mode=session", s.place)
	}
	return nil
}

func (s *Store) sessionChanges(ctx context.Context) (bool, error) {
	connect := func() (*pgx.Conn, error) {
		limit, cancel := context.WithTimeout(ctx, s.workerLock.connect.ConnectTimeout)
		defer cancel()
		return s.workerLock.dial(limit)
	}
	session, err := connect()
	if err != nil {
		return false, err
	}
	defer session.Close(context.WithoutCancel(ctx))
	pid := func(ctx context.Context) (pid uint32, err error) {
		err = session.QueryRow(ctx, `SELECT pg_backend_pid()`, pgx.QueryExecModeExec).Scan(&pid)
		return pid, err
	}
	first, err := pid(ctx)
	if err != nil || first == session.PgConn().PID() {
		return false, err
	}
	// With pool_mode=statement a pooler refuses transactions. This client is asked, not
	// one of those below: theirs may be refused because the pool is full.
	if _, err := session.Exec(ctx, `BEGIN`, pgx.QueryExecModeExec); err != nil {
		if isPooler(err) {
			return true, nil
		}
		return false, err
	}
	if _, err := session.Exec(ctx, `ROLLBACK`, pgx.QueryExecModeExec); err != nil {
		return false, err
	}
	key := rand.Int64N(1<<62) + 1
	if _, err := session.Exec(ctx, `SELECT pg_advisory_lock($1)`, pgx.QueryExecModeExec, key); err != nil {
		return false, err
	}
	for range probeTransactions {
		other, err := connect()
		if err != nil {
			break // the pool is full: all its server sessions are in use
		}
		defer other.Close(context.WithoutCancel(ctx))
		limit, cancel := context.WithTimeout(ctx, probeTimeout)
		_, err = other.Exec(limit, `BEGIN`, pgx.QueryExecModeExec)
		cancel()
		if err != nil {
			break
		}
	}
	limit, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	now, err := pid(limit)
	switch {
	case err != nil && ctx.Err() == nil && limit.Err() != nil:
		// The statement waits for a server session, so the client had none reserved.
		return true, nil
	case err != nil:
		return false, err
	}
	if now == first {
		_, err = session.Exec(ctx, `SELECT pg_advisory_unlock($1)`, pgx.QueryExecModeExec, key)
	}
	return now != first, err
}

// Skew returns how far this machine's clock is ahead of the database's, to within
// half a round trip.
func (s *Store) Skew(ctx context.Context) (time.Duration, error) {
	var skew time.Duration
	err := s.retry(ctx, "read the clock of "+s.place, func(ctx context.Context) error {
		var theirs time.Time
		before := time.Now()
		if err := s.pool.QueryRow(ctx, `SELECT clock_timestamp()`, pgx.QueryExecModeExec).Scan(&theirs); err != nil {
			return err
		}
		middle := before.Add(time.Since(before) / 2)
		skew = middle.Sub(theirs)
		return nil
	})
	return skew, err
}
