package store

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// TooFewConnections says that a worker would get fewer connections than it needs at
// the same time. Such a worker would start, and then hand back every step, since
// it connects the session of its lock last.
type TooFewConnections struct {
	// Place is the database, Need the number of connections that a worker needs.
	Place string
	Need  int
	// Busy says that others use the missing connections, so that waiting may help.
	// Otherwise a limit is too low even for one worker alone.
	Busy bool
	// Why is the reason, and Cure what to do, both in words.
	Why, Cure string
}

func (e *TooFewConnections) Error() string {
	return fmt.Sprintf("database %s gives too few connections: %s; a worker needs %d at a time: one for each step, one for probes, and one that proves it alive", e.Place, e.Why, e.Need)
}

// Unwrap returns ErrUnavailable if waiting may help, else ErrInvalid.
func (e *TooFewConnections) Unwrap() error {
	if e.Busy {
		return ErrUnavailable
	}
	return ErrInvalid
}

// Permanent says that a retry cannot succeed.
func (e *TooFewConnections) Permanent() bool { return !e.Busy }

// mostDialled bounds how many connections are opened at the same moment.
const mostDialled = 16

// CheckConnections opens, all at once, the connections that a worker with these
// stores needs: those of both pools, and one for the worker's lock. results is nil
// if results are stored through tables, or not at all. The error is a
// *TooFewConnections if not all can be opened.
//
// The pools keep their connections, so that a worker starts with what it needs.
// CheckConnections does not retry. If a limit in the catalogs is too low, it opens
// nothing.
func CheckConnections(ctx context.Context, tables, results *Store) error {
	caller := ctx
	ctx, cancel := context.WithTimeout(ctx, tables.config.ConnectTimeout)
	defer cancel()
	var release sync.WaitGroup
	done := make(chan struct{})
	defer release.Wait()
	defer close(done)

	need := tables.config.Connections + 1
	limits, err := tables.readLimits(ctx)
	if err != nil {
		return translate("read the limits of "+tables.place, err)
	}
	var limitsOfResults connectionLimits
	if results != nil {
		if limitsOfResults, err = results.readLimits(ctx); err != nil {
			return translate("read the limits of "+results.place, err)
		}
		if limits.share(&limitsOfResults) {
			need += results.config.Connections
		} else if short := limitsOfResults.tooLow(results.place, results.config.Connections); short != nil {
			return short
		}
	}
	if short := limits.tooLow(tables.place, need); short != nil {
		return short
	}

	type opening struct {
		store *Store
		open  func(context.Context) (release func(), err error)
	}
	var openings []opening
	for range tables.config.Connections {
		openings = append(openings, opening{tables, tables.borrow})
	}
	if results != nil {
		for range results.config.Connections {
			openings = append(openings, opening{results, results.borrow})
		}
	}
	openings = append(openings, opening{tables, tables.openSession})

	var mu sync.Mutex
	opened := map[*Store]int{}
	failed := map[*Store]error{}
	var group sync.WaitGroup
	dialling := make(chan struct{}, mostDialled)
	for _, o := range openings {
		group.Go(func() {
			dialling <- struct{}{}
			giveBack, err := o.open(ctx)
			<-dialling
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				if failed[o.store] == nil || isTooMany(err) {
					failed[o.store] = err
				}
				return
			}
			opened[o.store]++
			release.Go(func() {
				<-done
				giveBack()
			})
		})
	}
	group.Wait()
	for _, s := range []*Store{tables, results} {
		if s == nil || failed[s] == nil {
			continue
		}
		if caller.Err() != nil || !isTooMany(failed[s]) && !isPooler(failed[s]) && ctx.Err() == nil {
			return translate("open the connections that a worker needs to "+s.place, failed[s])
		}
		if s == results {
			limits, need = limitsOfResults, results.config.Connections
		}
		return limits.tooMany(s.place, need, opened[s], failed[s])
	}
	return nil
}

// borrow takes a connection from the pool, which opens one if needed.
func (s *Store) borrow(ctx context.Context) (func(), error) {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	return conn.Release, nil
}

// openSession opens a session like that of the worker's lock. It does not lock,
// since a worker that is only checked must not appear alive.
func (s *Store) openSession(ctx context.Context) (func(), error) {
	conn, err := pgx.ConnectConfig(ctx, s.workerLock.connect)
	if err != nil {
		return nil, err
	}
	closing := func() { _ = conn.Close(context.WithoutCancel(ctx)) }
	// A pooler accepts connections without one to the server until there is a
	// statement.
	if _, err := conn.Exec(ctx, `SELECT 1`, pgx.QueryExecModeExec); err != nil {
		closing()
		return nil, err
	}
	return closing, nil
}

// LockError returns why this worker does not have its lock at the moment, for
// example because the database takes no writes: no step can begin then. It is nil
// before the lock is first needed, and while the first session connects.
func (s *Store) LockError() error {
	s.workerLock.mu.Lock()
	defer s.workerLock.mu.Unlock()
	select {
	case <-s.workerLock.acquired:
		return nil
	default:
	}
	err := s.workerLock.lastErr
	if !s.workerLock.started || s.workerLock.session == 0 && err == nil {
		return nil
	}
	if err == nil {
		err = errNoSession
	}
	return translate("acquire this worker's lock at "+s.place, err)
}

// isTooMany says that a limit of the server is reached.
func isTooMany(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == "53300"
}

// isPooler says that the error is PgBouncer's own, for example because it has too
// many clients.
func isPooler(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == "08P01"
}

// connectionLimits are the limits and the use of connections, as the catalogs have
// them for a role. A negative limit means that there is none.
type connectionLimits struct {
	// server identifies the server.
	server         string
	role, database string // quoted where SQL needs it
	// The limits. ofServer does not count connections reserved for other roles.
	ofRole, ofDatabase, ofServer int
	// Connections that others than this process use: of the role, in the database,
	// and in all.
	byRole, byDatabase, byAll int
	// workers counts those that belong to this program.
	workers int
}

// readLimits uses a connection of the pool.
func (s *Store) readLimits(ctx context.Context) (connectionLimits, error) {
	var l connectionLimits
	err := s.pool.QueryRow(ctx, `
		SELECT concat(inet_server_addr(), ' ', inet_server_port(), ' ', pg_postmaster_start_time()), quote_ident(session_user), quote_ident(current_database()),
		       CASE WHEN r.rolsuper THEN -1 ELSE r.rolconnlimit END, CASE WHEN r.rolsuper THEN -1 ELSE d.datconnlimit END,
		       current_setting('max_connections')::int
		       - CASE WHEN r.rolsuper THEN 0 ELSE current_setting('superuser_reserved_connections')::int
		                                        + COALESCE(current_setting('reserved_connections', true), '0')::int END,
		       used.by_role, used.by_database, used.by_all, used.workers
		FROM pg_catalog.pg_roles AS r, pg_catalog.pg_database AS d, LATERAL (
		    SELECT count(*) FILTER (WHERE a.usesysid = r.oid) AS by_role, count(*) FILTER (WHERE a.datid = d.oid) AS by_database, count(*) AS by_all,
		           count(*) FILTER (WHERE a.application_name LIKE 'mm-orchestrator%') AS workers
		    FROM pg_catalog.pg_stat_activity AS a
		    WHERE a.datid IS NOT NULL AND a.usesysid IS NOT NULL) AS used
		WHERE r.rolname = session_user AND d.datname = current_database()`, pgx.QueryExecModeExec).
		Scan(&l.server, &l.role, &l.database, &l.ofRole, &l.ofDatabase, &l.ofServer, &l.byRole, &l.byDatabase, &l.byAll, &l.workers)
	l.leaveOut(int(s.pool.Stat().TotalConns()))
	return l, err
}

// leaveOut subtracts connections of this process from those in use.
func (l *connectionLimits) leaveOut(own int) {
	for _, n := range []*int{&l.byRole, &l.byDatabase, &l.byAll, &l.workers} {
		*n = max(*n-own, 0)
	}
}

// share says whether the same limits apply to both.
func (l *connectionLimits) share(other *connectionLimits) bool {
	if l.server != other.server || l.role != other.role || l.database != other.database {
		return false
	}
	l.leaveOut(1) // that of the other store, which ran readLimits
	return true
}

// tooLow returns the limit that is too low even without other connections, or nil.
func (l connectionLimits) tooLow(place string, need int) *TooFewConnections {
	short := &TooFewConnections{Place: place, Need: need}
	switch {
	case l.ofRole >= 0 && l.ofRole < need:
		short.Why = fmt.Sprintf("role %s may have %d", l.role, l.ofRole)
		short.Cure = fmt.Sprintf("As a superuser, run: ALTER ROLE %s CONNECTION LIMIT %d; as many again for each further worker", l.role, need)
	case l.ofDatabase >= 0 && l.ofDatabase < need:
		short.Why = fmt.Sprintf("the database may have %d", l.ofDatabase)
		short.Cure = fmt.Sprintf("As its owner, run: ALTER DATABASE %s CONNECTION LIMIT %d; as many again for each further worker", l.database, need)
	case l.ofServer < need:
		short.Why = fmt.Sprintf("the server has %d for such roles", l.ofServer)
		short.Cure = fmt.Sprintf("Raise its max_connections by %d or more", need-l.ofServer)
	default:
		return nil
	}
	return short
}

// tooMany explains why not all that are needed could be opened.
func (l connectionLimits) tooMany(place string, need, opened int, err error) *TooFewConnections {
	short := &TooFewConnections{Place: place, Need: need, Busy: true}
	first := fmt.Sprintf("%d could be opened", opened)
	switch {
	case l.ofRole >= 0 && l.ofRole-l.byRole < need:
		short.Why = fmt.Sprintf("%s, as role %s may have %d, of which others use %d", first, l.role, l.ofRole, l.byRole)
		short.Cure = fmt.Sprintf("End what uses them, or run as a superuser: ALTER ROLE %s CONNECTION LIMIT %d", l.role, l.byRole+need)
	case l.ofDatabase >= 0 && l.ofDatabase-l.byDatabase < need:
		short.Why = fmt.Sprintf("%s, as the database may have %d, of which others use %d", first, l.ofDatabase, l.byDatabase)
		short.Cure = fmt.Sprintf("End what uses them, or run as its owner: ALTER DATABASE %s CONNECTION LIMIT %d", l.database, l.byDatabase+need)
	case l.ofServer-l.byAll < need && isTooMany(err):
		short.Why = fmt.Sprintf("%s, as the server has %d for such roles, of which others use %d", first, l.ofServer, l.byAll)
		short.Cure = "End what uses them, or raise the server's max_connections"
	default:
		// No limit of the server is reached, so a pooler in between has one.
		reason := "the others were not answered in time"
		var pg *pgconn.PgError
		if errors.As(err, &pg) {
			reason = oneLine(pg.Message)
		}
		short.Why = fmt.Sprintf("%s (%s)", first, reason)
		short.Cure = fmt.Sprintf("If a pooler such as PgBouncer is in between, let its pool (pool_size, max_db_connections, max_user_connections) and max_client_conn have %d for each worker", need)
		short.Busy = l.workers > 0
	}
	return short
}
