package postgres_test

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/results/postgres"
)

// statements counts what a pool sends.
type statements struct {
	n    atomic.Int64
	told atomic.Pointer[chan struct{}] // nil, or gets an element at the end of each statement
}

func (s *statements) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	s.n.Add(1)
	return ctx
}

func (s *statements) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {
	if told := s.told.Load(); told != nil {
		select {
		case *told <- struct{}{}:
		default:
		}
	}
}

// tables opens a backend in an empty database with a pool of one connection.
func tables(t testing.TB) (*postgres.Backend, *pgxpool.Pool, *statements) {
	t.Helper()
	config, err := pgxpool.ParseConfig(devenv.Database(t))
	if err != nil {
		t.Fatal(err)
	}
	config.MaxConns = 1
	sent := &statements{}
	config.ConnConfig.Tracer = sent
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	b, err := postgres.New(pool, postgres.Config{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.EnsureTables(t.Context()); err != nil {
		t.Fatal(err)
	}
	return b, pool, sent
}

func store(t testing.TB, b *postgres.Backend, id, state string, want bool) {
	t.Helper()
	o := outcome(id, "3")
	o.State = state
	written, err := b.Store(t.Context(), o)
	if err != nil || written[0] != want {
		t.Fatalf("%s %s: written %v, want %v: %v", id, state, written, want, err)
	}
}

func number(t testing.TB, pool *pgxpool.Pool, query string) (n int) {
	t.Helper()
	if err := pool.QueryRow(t.Context(), query).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// A result costs one round trip and one commit.
func TestAResultIsOneStatement(t *testing.T) {
	t.Parallel()
	b, _, sent := tables(t)
	for i, state := range []string{protocol.StateSuccess, protocol.StateFailure, protocol.StateStarted, "PROGRESS"} {
		store(t, b, fmt.Sprintf("first %d", i), state, true) // it reads the columns
		before := sent.n.Load()
		store(t, b, fmt.Sprintf("second %d", i), state, true)
		if n := sent.n.Load() - before; n != 1 {
			t.Errorf("%s took %d statements", state, n)
		}
	}
}

// A table that was analyzed when it had a few rows is never scanned as it grows.
func TestAGrowingTableIsNotScanned(t *testing.T) {
	t.Parallel()
	b, pool, _ := tables(t)
	execute(t, pool.Config().ConnString(), `
		INSERT INTO celery_taskmeta (id, task_id, status) SELECT nextval('task_id_sequence'), 'old ' || n, 'SUCCESS' FROM generate_series(1, 20) AS n`,
		`ANALYZE celery_taskmeta`)
	for i := range 20 { // until PostgreSQL has chosen its plans
		store(t, b, fmt.Sprint("warm ", i), protocol.StateStarted, true)
		store(t, b, fmt.Sprint("warm ", i), protocol.StateSuccess, true)
	}
	execute(t, pool.Config().ConnString(), `
		INSERT INTO celery_taskmeta (id, task_id, status) SELECT nextval('task_id_sequence'), 'more ' || n, 'SUCCESS' FROM generate_series(1, 5000) AS n`)
	read := func() int {
		// Otherwise the session reports its counters within a second.
		if _, err := pool.Exec(t.Context(), `SELECT pg_stat_force_next_flush()`); err != nil {
			t.Skip("this PostgreSQL has no pg_stat_force_next_flush:", err)
		}
		return number(t, pool, `SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'celery_taskmeta'`)
	}
	before := read()
	for i := range 20 {
		store(t, b, fmt.Sprint("new ", i), protocol.StateStarted, true)
		store(t, b, fmt.Sprint("new ", i), protocol.StateSuccess, true)
	}
	if n := read() - before; n != 0 {
		t.Errorf("40 results scanned the table %d times", n)
	}
}

// Celery's id is an integer of 32 bits, and a task may report its progress for ever.
func TestProgressUsesNoNumbersOfTheSequence(t *testing.T) {
	t.Parallel()
	b, pool, _ := tables(t)
	for range 50 {
		store(t, b, "task", "PROGRESS", true)
	}
	store(t, b, "task", protocol.StateSuccess, true)
	store(t, b, "task", "PROGRESS", false)
	store(t, b, "task", protocol.StateSuccess, false)
	if n := number(t, pool, `SELECT last_value FROM task_id_sequence`); n > 4 {
		t.Errorf("53 outcomes of one task have used %d numbers", n)
	}
	if n := number(t, pool, `SELECT count(*) FROM celery_taskmeta`); n != 1 {
		t.Errorf("the table has %d rows", n)
	}
}

func BenchmarkStore(b *testing.B) {
	for _, state := range []string{protocol.StateSuccess, protocol.StateStarted} {
		b.Run(state, func(b *testing.B) {
			backend, _, _ := tables(b)
			o := outcome("", "3")
			o.State, o.DateDone = state, time.Now()
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				o.TaskID = fmt.Sprintf("%08x-0000-4000-8000-000000000000", i)
				if _, err := backend.Store(b.Context(), o); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// A table that was copied without the position of its sequence, as a dump of the table alone
// does it, gives numbers that are taken.
func TestASequenceThatIsBehindLosesNoResult(t *testing.T) {
	t.Parallel()
	b, pool, _ := tables(t)
	execute(t, pool.Config().ConnString(), `INSERT INTO celery_taskmeta (id, task_id, status) SELECT n, 'old ' || n, 'FAILURE' FROM generate_series(1, 500) AS n`)
	store(t, b, "one", protocol.StateSuccess, true)
	store(t, b, "two", protocol.StateStarted, true)
	store(t, b, "old 7", protocol.StateSuccess, true)
	if written, err := b.Store(t.Context(), outcome("three", "3"), outcome("four", "4")); err != nil || !written[0] || !written[1] {
		t.Errorf("%v, %v", written, err)
	}
	if n := number(t, pool, `SELECT count(*) FROM celery_taskmeta WHERE id > 500 AND status IN ('SUCCESS', 'STARTED')`); n != 4 {
		t.Errorf("%d new rows", n)
	}
}

// Many slots and workers find at the same time that the sequence is behind. One of them moves
// it: numbers of 32 bits must not be wasted.
func TestASequenceThatIsBehindIsMovedByMany(t *testing.T) {
	t.Parallel()
	url := devenv.Database(t)
	backends := make([]*postgres.Backend, 2)
	for i := range backends {
		var err error
		if backends[i], err = postgres.Open(t.Context(), url); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(backends[i].Close)
	}
	execute(t, url, `INSERT INTO celery_taskmeta (id, task_id, status) SELECT n, 'old ' || n, 'FAILURE' FROM generate_series(1, 50000) AS n`)
	var all sync.WaitGroup
	const many = 16
	for i := range many {
		all.Go(func() {
			for j := range 20 {
				if written, err := backends[i%2].Store(t.Context(), outcome(fmt.Sprintf("new %d %d", i, j), "1")); err != nil || !written[0] {
					t.Errorf("%v, %v", written, err)
				}
			}
		})
	}
	all.Wait()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	var last int
	if err := conn.QueryRow(t.Context(), `SELECT last_value FROM task_id_sequence`).Scan(&last); err != nil {
		t.Fatal(err)
	}
	if most := 50_000 + many*(20+3); last > most {
		t.Errorf("the sequence is at %d, want at most %d", last, most)
	}
}
