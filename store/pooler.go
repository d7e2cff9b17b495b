package store

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
)

// crowd is how many transactions CheckSession opens beside the session that
// it judges, and crowdTime how long each may take to get a server.
const (
	crowd     = 4
	crowdTime = 2 * time.Second
)

// CheckSession finds a connection pooler that gives a client another server
// session for each transaction, such as PgBouncer with pool_mode=transaction.
// The worker's advisory lock would stay behind in a session of somebody
// else's: a dead worker would seem alive for ever, or a live one dead. It is
// ErrInvalid then, with the cure. A pooler that keeps sessions is fine.
//
// A direct connection is known by the server's process id, which poolers
// replace by a number of their own. Behind a pooler several transactions are
// held open at once, so that the session's own server is taken by one of them
// if the pooler has let go of it.
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
	key := rand.Int64N(1<<62) + 1
	if _, err := session.Exec(ctx, `SELECT pg_advisory_lock($1)`, pgx.QueryExecModeExec, key); err != nil {
		return false, err
	}
	for range crowd {
		other, err := connect()
		if err != nil {
			break // the pool is full: all its servers are taken
		}
		defer other.Close(context.WithoutCancel(ctx))
		limit, cancel := context.WithTimeout(ctx, crowdTime)
		_, err = other.Exec(limit, `BEGIN`, pgx.QueryExecModeExec)
		cancel()
		if err != nil {
			break
		}
	}
	limit, cancel := context.WithTimeout(ctx, crowdTime)
	defer cancel()
	now, err := pid(limit)
	switch {
	case err != nil && ctx.Err() == nil && limit.Err() != nil:
		// It waits for a server, so it had none of its own.
		return true, nil
	case err != nil:
		return false, err
	}
	if now == first {
		_, err = session.Exec(ctx, `SELECT pg_advisory_unlock($1)`, pgx.QueryExecModeExec, key)
	}
	return now != first, err
}

// Skew is how far this machine's clock is ahead of the database's, give or
// take half the time of a round trip.
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
