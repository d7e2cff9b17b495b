package postgres_test

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/results"
	"github.com/moonladderstudios/mm-orchestrator/results/postgres"
)

// log collects the lines of a logger.
type log struct {
	mu    sync.Mutex
	lines strings.Builder
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lines.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lines.String()
}

// Behind a PgBouncer that shares its sessions between clients, and knows no prepared
// statements, programs work side by side, although they would give their statements the
// same names. No call fails, even without retries.
func TestAPoolerThatSharesSessions(t *testing.T) {
	t.Parallel()
	for _, sessions := range []int{1, 3} {
		t.Run(fmt.Sprint(sessions, " sessions"), func(t *testing.T) {
			t.Parallel()
			through := devenv.Pooler(t, devenv.Database(t), "transaction", fmt.Sprintf("default_pool_size = %d", sessions))
			const programs, slots, tasks = 3, 4, 20
			backends, logs := make([]*postgres.Backend, programs), make([]log, programs)
			for i := range backends {
				backends[i] = open(t, postgres.Config{URL: through, StartsTable: "celery_task_starts", RetryFor: -1, Logger: slog.New(slog.NewTextHandler(&logs[i], nil))})
			}
			var all sync.WaitGroup
			for i, b := range backends {
				for slot := range slots {
					all.Go(func() {
						for n := range tasks {
							id := fmt.Sprint(i, " ", slot, " ", n)
							o := outcome(id, "1")
							started := o
							started.State, started.DateDone = protocol.StateStarted, time.Time{}
							_, err := b.CountStart(t.Context(), results.Start{TaskID: id, Attempt: "1", Worker: "w"})
							if err == nil {
								_, err = b.Store(t.Context(), started)
							}
							if err == nil {
								_, err = b.Store(t.Context(), o)
							}
							if err == nil {
								_, err = b.Store(t.Context(), outcome("a "+id, "1"), outcome("b "+id, "1"))
							}
							if err != nil {
								t.Error(err)
								return
							}
							if got, err := b.Load(t.Context(), id); err != nil || got[0].State != protocol.StateSuccess || !got[0].DateDone.Equal(o.DateDone) {
								t.Errorf("%+v, %v", got, err)
							}
						}
					})
				}
			}
			all.Wait()
			if n, err := backends[0].Cleanup(t.Context(), -time.Hour*24*365*100); err != nil || n != programs*slots*tasks*3 {
				t.Errorf("%d rows, %v", n, err)
			}
			told := 0
			for i := range logs {
				if n := strings.Count(logs[i].String(), "default_query_exec_mode=exec"); n > 1 {
					t.Errorf("said %d times:\n%s", n, &logs[i])
				} else {
					told += n
				}
			}
			if told == 0 {
				t.Error("nobody has said what to add to the address")
			}
		})
	}
}

// The mode of a program's own pool is the program's: the error says which one.
func TestAPoolOfTheProgramBehindAPoolerThatSharesSessions(t *testing.T) {
	t.Parallel()
	through := devenv.Pooler(t, devenv.Database(t), "transaction", "default_pool_size = 1")
	store := func(url string) error {
		pool, err := pgxpool.New(t.Context(), url)
		if err != nil {
			t.Fatal(err)
		}
		defer pool.Close()
		b, err := postgres.New(pool, postgres.Config{RetryFor: 200 * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		if _, err = b.EnsureTables(t.Context()); err == nil {
			_, err = b.Store(t.Context(), outcome("a", "1"))
		}
		return err
	}
	if err := store(through); err != nil {
		t.Fatal(err)
	}
	if err := store(through); !errors.Is(err, postgres.ErrUnavailable) || results.IsPermanent(err) || !strings.Contains(err.Error(), "default_query_exec_mode=exec") {
		t.Errorf("%v", err)
	}
	if err := store(through + "?default_query_exec_mode=exec"); err != nil {
		t.Error(err)
	}
}
