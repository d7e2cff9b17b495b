package postgres_test

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/results"
	"github.com/moonladderstudios/mm-orchestrator/results/postgres"
)

func TestStartsAreCountedOnce(t *testing.T) {
	t.Parallel()
	database := devenv.Database(t)
	config := postgres.Config{URL: database, StartsTable: "celery_task_starts"}
	b := open(t, config)
	other := open(t, config) // the table exists
	count := func(b *postgres.Backend, id, attempt string) int {
		t.Helper()
		n, err := b.CountStart(t.Context(), results.Start{TaskID: id, Attempt: attempt, Worker: "w@h"})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	var wait sync.WaitGroup
	seen := make([]int, 20)
	for i := range seen {
		wait.Go(func() { seen[i] = count([]*postgres.Backend{b, other}[i%2], "a", "0.0") })
	}
	wait.Wait()
	numbers := map[int]bool{}
	for _, n := range seen {
		numbers[n] = true
	}
	if len(numbers) != 20 || !numbers[1] || !numbers[20] {
		t.Errorf("20 starts are counted as %v", seen)
	}
	if n := count(b, "a", "1.0"); n != 1 {
		t.Errorf("another attempt has %d", n)
	}
	if err := other.ForgetStarts(t.Context(), results.Start{TaskID: "a", Attempt: "0.0"}); err != nil {
		t.Fatal(err)
	}
	if n, m := count(b, "a", "0.0"), count(b, "a", "1.0"); n != 1 || m != 2 {
		t.Errorf("after one was forgotten the counts are %d and %d, want 1 and 2", n, m)
	}
	if _, err := b.CountStart(t.Context(), results.Start{TaskID: strings.Repeat("x", 156), Attempt: "0.0"}); !results.IsPermanent(err) {
		t.Errorf("an id that is too long: %v", err)
	}
	execute(t, database, `UPDATE celery_task_starts SET started_at = now() - interval '2 days' WHERE attempt = '0.0'`)
	if _, err := b.Cleanup(t.Context(), 24*time.Hour); err != nil {
		t.Fatal(err)
	}
	if n, m := count(b, "a", "0.0"), count(b, "a", "1.0"); n != 1 || m != 3 {
		t.Errorf("after the cleanup the counts are %d and %d, want 1 and 3", n, m)
	}
}

// losing is a connection that ends when the next answer comes, which nobody sees.
type losing struct {
	net.Conn
	armed *atomic.Bool
}

func (c losing) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err == nil && c.armed.CompareAndSwap(true, false) {
		_ = c.Close()
		return 0, io.EOF
	}
	return n, err
}

// A start counts once if the answer to it is lost, also if the worker has to ask again.
func TestAStartWhoseAnswerIsLostCountsOnce(t *testing.T) {
	t.Parallel()
	database := devenv.Database(t)
	open(t, postgres.Config{URL: database, StartsTable: "celery_task_starts"})
	config, err := pgxpool.ParseConfig(database)
	if err != nil {
		t.Fatal(err)
	}
	config.MaxConns = 1
	dial := config.ConnConfig.DialFunc
	var lose atomic.Bool
	config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		return losing{conn, &lose}, err
	}
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	retries, err := postgres.New(pool, postgres.Config{StartsTable: "celery_task_starts"})
	if err != nil {
		t.Fatal(err)
	}
	fails, err := postgres.New(pool, postgres.Config{StartsTable: "celery_task_starts", RetryFor: -1})
	if err != nil {
		t.Fatal(err)
	}
	first := results.Start{TaskID: "a", Attempt: "0.0", Worker: "w@h", At: time.Now()}
	count := func(b *postgres.Backend, s results.Start, want int) {
		t.Helper()
		if n, err := b.CountStart(t.Context(), s); err != nil || n != want {
			t.Errorf("counted as %d (%v), want %d", n, err, want)
		}
	}
	count(retries, results.Start{TaskID: "b", Attempt: "0.0"}, 1) // prepares the statement
	lose.Store(true)
	count(retries, first, 1)
	lose.Store(true)
	count(retries, results.Start{TaskID: "b", Attempt: "0.0"}, 2) // without a time

	second := first
	second.At = first.At.Add(time.Millisecond)
	count(retries, results.Start{TaskID: "b", Attempt: "0.0"}, 3) // prepares it again
	lose.Store(true)
	if _, err := fails.CountStart(t.Context(), second); !errors.Is(err, postgres.ErrUnavailable) {
		t.Errorf("a lost answer: %v", err)
	}
	count(retries, second, 2)
	second.Worker = "other@h"
	count(retries, second, 3)
}

// Without the setting nothing is created, and nothing can be counted.
func TestStartsNeedTheirTable(t *testing.T) {
	t.Parallel()
	database := devenv.Database(t)
	b := open(t, postgres.Config{URL: database})
	if err := b.CountsStarts(); !errors.Is(err, postgres.ErrInvalid) {
		t.Errorf("%v", err)
	}
	if _, err := b.CountStart(t.Context(), results.Start{TaskID: "a", Attempt: "0.0"}); !results.IsPermanent(err) {
		t.Errorf("%v", err)
	}
	execute(t, database, `CREATE TABLE celery_task_starts (a integer)`) // it does not exist yet
	kept := open(t, postgres.Config{URL: database, StartsTable: "none", KeepTables: true})
	if _, err := kept.CountStart(t.Context(), results.Start{TaskID: "a", Attempt: "0.0"}); !errors.Is(err, postgres.ErrSchema) {
		t.Errorf("a table that does not exist: %v", err)
	}
}
