package store

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// LiveWorker is a worker of this program that consumes a queue.
type LiveWorker struct {
	// Key is that of the worker's advisory lock. Claims name their holder by it.
	Key   int64
	Queue string
	// Node is the worker's node name, such as "orchestrator@box".
	Node  string
	Since time.Time
}

// RegisterWorker records that this Store's worker consumes a queue, until
// LeaveQueue or the end of its session.
//
//   - It acquires the worker's lock first, so that others see that the worker is
//     alive.
//   - Call it repeatedly: the row may be lost with the schema, or while the session
//     is down. If the row exists, nothing is written.
//   - After LeaveQueue it does nothing.
func (s *Store) RegisterWorker(ctx context.Context, queue string) error {
	return s.retry(ctx, "register as a worker of queue "+queue, func(ctx context.Context) error {
		if s.hasLeft() {
			return nil
		}
		if _, err := s.workerLock.ensure(ctx); err != nil {
			return err
		}
		tag, err := s.pool.Exec(ctx, `
			INSERT INTO mm_orchestrator.workers (key, queue, node) VALUES ($1, $2, $3)
			ON CONFLICT (key, queue) DO NOTHING`, s.workerLock.key, clean(queue), clean(s.config.Worker))
		if err != nil || tag.RowsAffected() == 0 {
			return err
		}
		// This also deletes the row of a live worker whose session is down at this
		// moment. That worker registers again.
		_, err = s.pool.Exec(ctx, withActivity+`
			DELETE FROM mm_orchestrator.workers AS w
			WHERE w.queue = $1 AND NOT EXISTS (SELECT FROM living AS l WHERE l.key = w.key)`, clean(queue))
		return err
	})
}

// CountOtherConsumers records that this Store's worker has own consumers on a queue
// at the broker, and returns how many the other live workers of this program have
// recorded within maxAge. The result may be too high by consumers that have ended
// within maxAge, and too low by those that have just started.
//
// Workers that have not called RegisterWorker are not counted.
func (s *Store) CountOtherConsumers(ctx context.Context, queue string, own int, maxAge time.Duration) (others int, err error) {
	err = s.retry(ctx, "count the consumers of queue "+queue, func(ctx context.Context) error {
		_, err := s.pool.Exec(ctx, `
			UPDATE mm_orchestrator.workers SET consumers = $3, consumers_at = clock_timestamp()
			WHERE key = $1 AND queue = $2`, s.workerLock.key, queue, own)
		if err != nil {
			return err
		}
		return s.pool.QueryRow(ctx, withActivity+`
			SELECT COALESCE(sum(w.consumers), 0)
			FROM mm_orchestrator.workers AS w
			JOIN living AS l ON l.key = w.key
			WHERE w.queue = $2 AND w.key <> $1 AND w.consumers_at > clock_timestamp() - make_interval(secs => $3::float8)`,
			s.workerLock.key, queue, maxAge.Seconds()).Scan(&others)
	})
	return others, err
}

// ListWorkers returns the live workers that consume the queue, or any queue if it
// is "", by queue and time of registration.
func (s *Store) ListWorkers(ctx context.Context, queue string) ([]LiveWorker, error) {
	var list []LiveWorker
	err := s.retry(ctx, "list the workers of queue "+queue, func(ctx context.Context) (err error) {
		list, err = listWorkers(ctx, s.pool, queue)
		return err
	})
	return list, err
}

// querier is a pool, a connection or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

func listWorkers(ctx context.Context, q querier, queue string) ([]LiveWorker, error) {
	rows, err := q.Query(ctx, withActivity+`
		SELECT w.key, w.queue, w.node, w.registered_at
		FROM mm_orchestrator.workers AS w
		JOIN living AS l ON l.key = w.key
		WHERE $1 IN ('', w.queue)
		ORDER BY w.queue, w.registered_at, w.key`, queue)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, scanLiveWorker)
}

func scanLiveWorker(row pgx.CollectableRow) (w LiveWorker, err error) {
	err = row.Scan(&w.Key, &w.Queue, &w.Node, &w.Since)
	w.Since = w.Since.UTC()
	return w, err
}

// Departure is what LeaveQueue finds when a worker has stopped consuming.
type Departure struct {
	// Remaining are the live workers that still consume the queue. Without any,
	// no worker will publish the parked messages.
	Remaining []LiveWorker
	// Parked counts the queue's parked messages.
	Parked int
}

// LeaveQueue deletes the registration of this Store's worker, and returns the
// workers that remain. If several workers leave at once, exactly one of them gets
// a Departure without Remaining: each waits for the row locks of the others and
// then sees which have left.
//
// Call it when this worker runs no step and will begin none: a message that it
// parks later might never be published.
func (s *Store) LeaveQueue(ctx context.Context, queue string) (Departure, error) {
	s.mu.Lock()
	s.left = true
	s.mu.Unlock()
	var d Departure
	err := s.inTx(ctx, "leave queue "+queue, func(tx pgx.Tx) (err error) {
		d = Departure{}
		if _, err := tx.Exec(ctx, `SELECT 1 FROM mm_orchestrator.workers WHERE queue = $1 ORDER BY key FOR UPDATE`, queue); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `DELETE FROM mm_orchestrator.workers WHERE key = $1 AND queue = $2`, s.workerLock.key, queue); err != nil {
			return err
		}
		if d.Remaining, err = listWorkers(ctx, tx, queue); err != nil {
			return err
		}
		return tx.QueryRow(ctx, `SELECT count(*) FROM mm_orchestrator.parked WHERE queue = $1`, queue).Scan(&d.Parked)
	})
	return d, err
}

func (s *Store) hasLeft() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.left
}
