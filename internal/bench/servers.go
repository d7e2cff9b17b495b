package bench

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/results/postgres"
)

// storedBefore is how many results are in the table at the beginning of each sample,
// and known to the planner: a table that is in use, not one that was just created.
const storedBefore = 20000

// servers are the broker and the database of a run.
type servers struct {
	broker, database *devenv.OwnServer
	conn             *amqp.Connection
	channel          *amqp.Channel // with confirms
	db               *pgx.Conn
}

func startServers(ctx context.Context) (s *servers, err error) {
	s = &servers{}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	var brokerErr, databaseErr error
	var starts sync.WaitGroup
	starts.Go(func() { s.broker, brokerErr = devenv.StartOwnBroker(ctx, nil) })
	starts.Go(func() { s.database, databaseErr = devenv.StartOwnDatabase(ctx) })
	starts.Wait()
	if err = errors.Join(brokerErr, databaseErr); err != nil {
		return s, err
	}
	if err = s.connectBroker(); err != nil {
		return s, err
	}
	if s.db, err = pgx.Connect(ctx, s.database.URL); err != nil {
		return s, err
	}
	return s, s.prepareDatabase(ctx)
}

func (s *servers) connectBroker() (err error) {
	if s.conn, err = amqp.Dial(s.broker.URL); err != nil {
		return err
	}
	if s.channel, err = s.conn.Channel(); err != nil {
		return err
	}
	return s.channel.Confirm(false)
}

// prepareDatabase creates the result table. Checkpoints and vacuuming happen between
// samples only, so that they do not fall to one contender.
func (s *servers) prepareDatabase(ctx context.Context) error {
	for _, statement := range []string{
		`ALTER SYSTEM SET checkpoint_timeout = '1h'`,
		`ALTER SYSTEM SET max_wal_size = '8GB'`,
		`ALTER SYSTEM SET autovacuum = off`,
		`SELECT pg_reload_conf()`,
	} {
		if _, err := s.db.Exec(ctx, statement); err != nil {
			return err
		}
	}
	backend, err := postgres.Open(ctx, s.database.URL)
	if err != nil {
		return err
	}
	backend.Close()
	_, err = s.db.Exec(ctx, `
		INSERT INTO celery_taskmeta (id, task_id, status, result, date_done, children)
		SELECT nextval('task_id_sequence'), gen_random_uuid()::text, 'SUCCESS', '\x80044b032e', now(), '\x80045d942e'
		FROM generate_series(1, $1)`, storedBefore)
	if err != nil {
		return err
	}
	return s.tidy(ctx, "")
}

// tidy removes the results of a sample and lets the next one begin with the same
// table, statistics and log.
func (s *servers) tidy(ctx context.Context, ids string) error {
	if ids != "" {
		if _, err := s.db.Exec(ctx, `DELETE FROM celery_taskmeta WHERE task_id LIKE $1`, ids+"%"); err != nil {
			return err
		}
	}
	for _, statement := range []string{`VACUUM ANALYZE celery_taskmeta`, `CHECKPOINT`} {
		if _, err := s.db.Exec(ctx, statement); err != nil {
			return err
		}
	}
	return nil
}

// stored counts the stored results of a sample.
func (s *servers) stored(ctx context.Context, ids string) (n int, err error) {
	err = s.db.QueryRow(ctx, `SELECT count(*) FROM celery_taskmeta WHERE task_id LIKE $1 AND status = 'SUCCESS'`, ids+"%").Scan(&n)
	return n, err
}

// databaseWork is what the database has done since it started.
type databaseWork struct{ transactions, flushes, bytes float64 }

// work reads the counters once no contender is connected: a session adds to them
// when it ends. It looks from another database, whose transactions do not count. The
// columns of WAL flushes differ between versions, and some have none.
func (s *servers) work(ctx context.Context) (w databaseWork, err error) {
	config := s.db.Config()
	name := config.Database
	config.Database = "template1"
	elsewhere, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return w, err
	}
	defer func() { err = errors.Join(err, elsewhere.Close(ctx)) }()
	for sessions := 1; sessions > 0; {
		err := elsewhere.QueryRow(ctx, `
			SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND datname = $1 AND pid <> $2`,
			name, s.db.PgConn().PID()).Scan(&sessions)
		if err != nil {
			return w, err
		}
	}
	err = elsewhere.QueryRow(ctx, `
		SELECT (SELECT xact_commit FROM pg_stat_database WHERE datname = $1),
		       COALESCE((to_jsonb(w) ->> 'wal_sync')::float8, 0), COALESCE((to_jsonb(w) ->> 'wal_bytes')::float8, 0)
		FROM pg_stat_wal AS w`, name).Scan(&w.transactions, &w.flushes, &w.bytes)
	return w, err
}

func (w databaseWork) since(before databaseWork, tasks int) map[string]float64 {
	n := float64(tasks)
	return map[string]float64{
		"transactions": (w.transactions - before.transactions) / n,
		"WAL flushes":  (w.flushes - before.flushes) / n,
		"WAL bytes":    (w.bytes - before.bytes) / n,
	}
}

// declare creates a queue as Celery does.
func (s *servers) declare(queue string) error {
	_, err := s.channel.QueueDeclare(queue, true, false, false, false, nil)
	if err == nil {
		err = s.channel.ExchangeDeclare(queue, "direct", true, false, false, false, nil)
	}
	if err == nil {
		err = s.channel.QueueBind(queue, queue, queue, false, nil)
	}
	return err
}

// remove deletes a queue and returns how many messages were in it.
func (s *servers) remove(queue string) (messages int, err error) {
	messages, err = s.channel.QueueDelete(queue, false, false, false)
	if err == nil {
		err = s.channel.ExchangeDelete(queue, false, false)
	}
	return messages, err
}

// publish publishes persistent messages and returns when the broker has confirmed
// all.
func (s *servers) publish(ctx context.Context, queue string, messages ...amqp.Publishing) error {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("the broker takes too long"))
	defer cancel()
	var confirmations []*amqp.DeferredConfirmation
	for i, m := range messages {
		if ctx.Err() != nil {
			return fmt.Errorf("message %d of %d cannot be sent: %w", i+1, len(messages), context.Cause(ctx))
		}
		confirmation, err := s.channel.PublishWithDeferredConfirmWithContext(ctx, "", queue, true, false, m)
		if err != nil {
			return err
		}
		confirmations = append(confirmations, confirmation)
	}
	for _, c := range confirmations {
		confirmed, err := c.WaitContext(ctx)
		if err != nil {
			return fmt.Errorf("the broker has not confirmed a message: %w", context.Cause(ctx))
		}
		if !confirmed {
			return errors.New("the broker has refused a message")
		}
	}
	return nil
}

func (s *servers) close() error {
	if s.db != nil {
		_ = s.db.Close(context.Background())
	}
	if s.conn != nil {
		_ = s.conn.Close() // its server ends next
	}
	var failures []error
	for _, server := range []*devenv.OwnServer{s.database, s.broker} {
		if server != nil {
			failures = append(failures, server.Close())
		}
	}
	return errors.Join(failures...)
}
