package store_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

func as(name string, grace time.Duration) func(*store.Config) {
	return func(c *store.Config) { c.Worker, c.TakeoverGrace = name, max(grace, time.Millisecond) }
}

// cutSessions ends every session of the database but the test's own, as a restart of
// the server does, and returns how many there were.
func cutSessions(t *testing.T, d *storetest.Database) int {
	t.Helper()
	return len(d.Rows(t, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
		WHERE datname = current_database() AND application_name LIKE 'mm-orchestrator%'`))
}

func TestOneOfManyDeliveriesStarts(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	stores := []*store.Store{d.Open(t, as("one", 0)), d.Open(t, as("two", 0))}
	decisions := make([]store.Decision, 8)
	var group sync.WaitGroup
	for i := range decisions {
		group.Go(func() {
			var err error
			decisions[i], err = stores[i%2].BeginStep(t.Context(), alone(run, store.StepBuild, "t"))
			if err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	starts, busy := 0, 0
	for _, decision := range decisions {
		switch decision := decision.(type) {
		case store.Start:
			starts++
		case store.Parked:
			busy++
			if decision.Why != store.ParkedBusy || !strings.Contains(decision.Reason, "worker one runs") && !strings.Contains(decision.Reason, "worker two runs") {
				t.Errorf("%+v", decision)
			}
		}
	}
	if starts != 1 || busy != len(decisions)-1 {
		t.Errorf("%d starts, %d busy", starts, busy)
	}
}

func TestTakeOverFromADeadWorker(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	dead := d.Open(t, as("dead", time.Minute))
	begin(t, dead, run, store.StepBuild, "t")
	successor := d.Open(t, as("successor", 300*time.Millisecond))
	if !isBusy(decide(t, successor, run, store.StepBuild, "t")) {
		t.Fatal("a live worker's step must be busy")
	}
	died := time.Now()
	dead.Close() // what the server sees of a killed process
	var start store.Start
	for taken := false; !taken; {
		// Busy until the server has noticed.
		start, taken = decide(t, successor, run, store.StepBuild, "t").(store.Start)
		if time.Since(died) > 20*time.Second {
			t.Fatal("never taken over")
		}
	}
	if took := time.Since(died); took < 300*time.Millisecond {
		t.Errorf("taken over after %s, within the grace", took)
	}
	if start.Claim.Starts != 2 || start.Claim.Attempt != 1 {
		t.Errorf("claim %+v", start.Claim)
	}
	finish(t, successor, start.Claim, good(store.StepBuild))
	if detail, err := successor.FindRunDetail(t.Context(), run); err != nil || detail.States[2].Starts != 2 || detail.States[2].Worker != "successor" {
		t.Errorf("%+v, %v", detail.States, err)
	}
}

// TestRedeliveryBeforeTheDatabaseNoticesTheDeath: a broker may deliver a dead worker's
// message to another one before the database has noticed the end of the session.
func TestRedeliveryBeforeTheDatabaseNoticesTheDeath(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	successor := d.Open(t, as("successor", 0))
	for try := range 20 {
		run := d.Create(t, storetest.Seed{})
		dying := d.Open(t, as(fmt.Sprintf("dying %d", try), time.Minute))
		begin(t, dying, run, store.StepBuild, "t")
		request := alone(run, store.StepBuild, "t")
		request.Message.Redelivered = true
		asked := time.Now()
		decided := make(chan store.Decision)
		go func() {
			decision, err := successor.BeginStep(t.Context(), request)
			if err != nil {
				t.Error(err)
			}
			decided <- decision
		}()
		// The successor has read the claim before it is released.
		for len(d.Rows(t, `SELECT 1 FROM pg_stat_activity
			WHERE application_name = 'mm-orchestrator successor' AND query = 'commit' AND query_start > $1`, asked)) == 0 {
			if time.Since(asked) > 20*time.Second {
				t.Fatal("the successor has not read the claim")
			}
		}
		dying.Close()
		soon := time.Since(asked) < 500*time.Millisecond
		decision := <-decided
		if _, started := decision.(store.Start); started {
			return
		}
		if soon || !isBusy(decision) {
			t.Fatalf("%T %+v, want Start", decision, decision)
		}
		// The machine is too slow for the wait: this time proves nothing.
	}
	t.Fatal("no session ended within 500 ms")
}

// TestACutSessionKeepsItsClaim: a worker whose sessions were cut connects again
// before another worker takes its claim.
func TestACutSessionKeepsItsClaim(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	holder := d.Open(t, as("holder", time.Minute))
	claim := begin(t, holder, run, store.StepBuild, "t").Claim
	thief := d.Open(t, as("thief", 10*time.Second))
	for range 3 {
		if cutSessions(t, d) == 0 {
			t.Fatal("no session to cut")
		}
		if decision := decide(t, thief, run, store.StepBuild, "t"); !isBusy(decision) {
			t.Fatalf("%+v, want busy", decision)
		}
	}
	finish(t, holder, claim, good(store.StepBuild))
}

func TestFence(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	slow := d.Open(t, as("slow", 0))
	claim := begin(t, slow, run, store.StepBuild, "t").Claim
	// Its lock is lost for longer than the grace.
	d.Rows(t, `UPDATE mm_orchestrator.claims SET holder = 7 WHERE run_id = $1 RETURNING step`, run)
	successor := d.Open(t, as("successor", 0))
	taken := begin(t, successor, run, store.StepBuild, "t").Claim
	before, states := d.Run(t, run), d.States(t, run)
	_, err := slow.FinishStep(t.Context(), claim, bad(store.StepBuild))
	if !errors.Is(err, store.ErrClaimLost) || !strings.Contains(err.Error(), "successor") {
		t.Errorf("%v, want ErrClaimLost", err)
	}
	equal(t, "run", d.Run(t, run), before)
	equal(t, "states", d.States(t, run), states)
	equal(t, "artifacts", len(d.Artifacts(t, run)), 0)
	if err := slow.ReleaseClaim(t.Context(), claim); err != nil {
		t.Error(err)
	}
	if !isBusy(decide(t, slow, run, store.StepBuild, "t")) {
		t.Error("releasing a lost claim must not free the successor's")
	}
	first := finish(t, successor, taken, good(store.StepBuild))
	second := finish(t, successor, taken, good(store.StepBuild))
	if first != second {
		t.Errorf("finished twice: %+v, then %+v", first, second)
	}
}

// TestRetryWhileTheStepRuns: the old attempt's end is not written over the new
// one's row (docs/moonmind.md#r8).
func TestRetryWhileTheStepRuns(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	s := d.Open(t)
	claim := begin(t, s, run, store.StepBuild, "old").Claim
	d.Retry(t, run, store.StepBuild, "impatient")
	if !isBusy(decide(t, s, run, store.StepBuild, "new")) {
		t.Error("the old attempt still runs")
	}
	before := d.States(t, run)
	if _, err := s.FinishStep(t.Context(), claim, bad(store.StepBuild)); !errors.Is(err, store.ErrClaimLost) || !strings.Contains(err.Error(), "retried") {
		t.Errorf("%v, want ErrClaimLost", err)
	}
	equal(t, "states", d.States(t, run), before)
	if start := begin(t, s, run, store.StepBuild, "new"); start.Claim.Attempt != 2 || start.Claim.Starts != 1 {
		t.Errorf("%+v", start.Claim)
	}
}

func TestReleasedClaimIsFree(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	stopping := d.Open(t, as("stopping", time.Minute))
	claim := begin(t, stopping, run, store.StepBuild, "t").Claim
	if !isBusy(decide(t, stopping, run, store.StepBuild, "t")) {
		t.Error("a step that runs here must be busy here")
	}
	for range 2 {
		if err := stopping.ReleaseClaim(t.Context(), claim); err != nil {
			t.Fatal(err)
		}
	}
	other := d.Open(t, as("other", time.Minute))
	if start := begin(t, other, run, store.StepBuild, "t"); start.Claim.Starts != 2 {
		t.Errorf("%+v", start.Claim)
	}
	if _, err := stopping.FinishStep(t.Context(), claim, good(store.StepBuild)); !errors.Is(err, store.ErrClaimLost) {
		t.Errorf("%v, want ErrClaimLost", err)
	}
}

// TestServerThatKeepsRestarting: runs complete, and no step counts twice,
// while all sessions are cut again and again.
func TestServerThatKeepsRestarting(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	const runs = 4
	ids := make([]string, runs)
	for i := range ids {
		ids[i] = d.Create(t, storetest.Seed{})
	}
	s := d.Open(t)
	done, ended := context.WithCancel(t.Context())
	var group, cutter sync.WaitGroup
	cutter.Go(func() {
		// Ever more seldom: a slow machine gets through as well.
		for pause := 50 * time.Millisecond; done.Err() == nil; pause += pause / 8 {
			cutSessions(t, d)
			select {
			case <-done.Done():
			case <-time.After(pause):
			}
		}
	})
	for i, run := range ids {
		group.Go(func() {
			for _, step := range toVerify {
				decision, err := s.BeginStep(t.Context(), alone(run, step, fmt.Sprint(i, step)))
				start, ok := decision.(store.Start)
				if !ok {
					t.Errorf("begin %s: %T, %v", step, decision, err)
					return
				}
				if _, err := s.FinishStep(t.Context(), start.Claim, good(step)); err != nil {
					t.Errorf("finish %s: %v", step, err)
				}
			}
		})
	}
	group.Wait()
	ended()
	cutter.Wait()
	for _, run := range ids {
		if row := d.Run(t, run); row["status"] != "succeeded" {
			t.Errorf("run %v", row)
		}
	}
	equal(t, "starts", d.Rows(t, `SELECT max(starts) AS most, count(*) AS claims FROM mm_orchestrator.claims`),
		[]storetest.Row{{"most": 1, "claims": runs * len(toVerify)}})
}

// TestTableChangesUnderPreparedStatements: a migration of MoonMind's changes a
// column's type while we run.
func TestTableChangesUnderPreparedStatements(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	s := d.Open(t, func(c *store.Config) { c.Connections = 1 })
	for _, change := range []string{
		`SELECT 1`,
		`ALTER TABLE orchestrator_runs ALTER COLUMN instruction TYPE varchar(4000)`,
		`ALTER TABLE orchestrator_runs ADD COLUMN later integer`,
		`ALTER TABLE orchestrator_runs ALTER COLUMN target_service TYPE text`,
	} {
		if _, err := d.Pool.Exec(t.Context(), change); err != nil {
			t.Fatal(err)
		}
		if _, err := s.FindRun(t.Context(), run); err != nil {
			t.Errorf("after %s: %v", change, err)
		}
		claim := begin(t, s, run, store.StepBuild, "t").Claim
		if err := s.ReleaseClaim(t.Context(), claim); err != nil {
			t.Errorf("after %s: %v", change, err)
		}
	}
}

func TestErrorsOfOpen(t *testing.T) {
	t.Parallel()
	d := storetest.Empty(t)
	for _, c := range []struct {
		url, text string
		kind      error
	}{
		{"", "URL is empty", store.ErrInvalid},
		{"redis://:hush@h/0", "redis", store.ErrInvalid},
		{"postgresql://u:hush@h:port/d", "postgresql://***: its port is not a number", store.ErrInvalid},
		{"postgresql://u:hush@127.0.0.1:1/d", "cannot reach the database 127.0.0.1:1/d: connection refused", store.ErrUnavailable},
		{"db+postgresql+psycopg2://u:hush@/d?host=/nowhere", "no such socket", store.ErrUnavailable},
		{d.URL + "_missing", "does not exist", store.ErrRefused},
	} {
		s, err := store.Open(t.Context(), store.Config{URL: secret.New(c.url)})
		if err == nil {
			s.Close()
		}
		if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.text) || strings.Contains(err.Error(), "hush") {
			t.Errorf("%s: %v, want %v with %q", c.url, err, c.kind, c.text)
		}
	}
}

func TestCallersContext(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	run := d.Create(t, storetest.Seed{})
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.BeginStep(cancelled, alone(run, store.StepBuild, "t")); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	claim := begin(t, s, run, store.StepBuild, "t").Claim
	if _, err := s.FinishStep(cancelled, claim, good(store.StepBuild)); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	finish(t, s, claim, good(store.StepBuild))
	if err := s.Ping(t.Context()); err != nil {
		t.Error(err)
	}
	if version, err := s.ServerVersion(t.Context()); err != nil || version == "" {
		t.Errorf("%q, %v", version, err)
	}
	if !strings.Contains(s.Place(), ":") || strings.Contains(s.Place(), "@") {
		t.Errorf("place %q", s.Place())
	}
	s.Close()
	s.Close()
	if _, err := s.FindRun(t.Context(), run); err == nil {
		t.Error("a closed store must fail")
	}
}

// TestConnections: three in all, the one with the lock included.
func TestConnections(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t, func(c *store.Config) { c.Worker = "a very long node name " + strings.Repeat("ü", 60) })
	var group sync.WaitGroup
	for i := range 12 {
		run := d.Create(t, storetest.Seed{})
		group.Go(func() {
			if _, err := s.BeginStep(t.Context(), alone(run, store.StepBuild, fmt.Sprint(i))); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if n := len(d.Rows(t, `SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'mm-orchestrator a very%'`)); n > 3 {
		t.Errorf("%d connections", n)
	}
}

// Two programs read and write through a PgBouncer that gives both the same session, where
// each finds the prepared statements of the other.
func TestAPoolerThatSharesSessions(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	through := secret.New(devenv.Pooler(t, d.URL, "transaction", "default_pool_size = 1"))
	for range 2 {
		s := d.Open(t, func(c *store.Config) { c.URL = through })
		if _, err := s.FindRun(t.Context(), run); err != nil {
			t.Error(err)
		}
		if _, _, err := s.PauseQueue(t.Context(), store.Pause{Queue: "q", Mode: "finish", By: "b", Reason: "r"}); err != nil {
			t.Error(err)
		}
	}
}

// TestWithoutPreparedStatements: what Config.URL advises behind PgBouncer.
func TestWithoutPreparedStatements(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	for _, mode := range []string{"exec", "cache_describe", "simple_protocol"} {
		t.Run(mode, func(t *testing.T) {
			s := d.Open(t, func(c *store.Config) { c.URL = secret.New(d.URL + "?default_query_exec_mode=" + mode) })
			run := d.Create(t, storetest.Seed{})
			pass(t, s, run, "x", store.StepAnalyze, store.StepPatch)
			finish(t, s, begin(t, s, run, store.StepBuild, "b").Claim, store.Outcome{Status: store.StepFailed, Message: "m"})
			pass(t, s, run, "x", store.StepRollback)
			if detail, err := s.FindRunDetail(t.Context(), run); err != nil || detail.Run.Status != store.RunRolledBack || len(detail.Artifacts) != 3 {
				t.Errorf("%+v, %v", detail, err)
			}
			results := storetest.Results(t, s, "")
			equal(t, "written", save(t, results, success(mode, "1"), failed(mode), failed(mode+"2")), []bool{true, false, true})
		})
	}
}

// TestRetriesWhileStepsRun: retries by the API at any moment do not deadlock with
// steps that begin and end.
func TestRetriesWhileStepsRun(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	s := d.Open(t)
	var group sync.WaitGroup
	group.Go(func() {
		for range 20 {
			d.Retry(t, run, store.StepBuild, "again")
		}
	})
	ends := 0
	for n := range 20 {
		decision, err := s.BeginStep(t.Context(), alone(run, store.StepVerify, fmt.Sprint(n)))
		if err != nil {
			t.Fatal(err)
		}
		start, ok := decision.(store.Start)
		if !ok {
			continue
		}
		switch _, err := s.FinishStep(t.Context(), start.Claim, good(store.StepVerify)); {
		case err == nil:
			ends++
		case !errors.Is(err, store.ErrClaimLost):
			t.Fatal(err)
		}
	}
	group.Wait()
	t.Logf("%d of 20 ended", ends)
	if n := len(d.States(t, run)); n != 6 {
		t.Errorf("%d state rows, want no twins", n)
	}
}

// TestLockConfirmedAt: while a step runs, LockConfirmedAt advances, and it stops
// when the server does not answer.
func TestLockConfirmedAt(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	relay, through := workertest.NewProxy(t, d.URL)
	s := d.Open(t, as("worker", time.Minute), func(c *store.Config) { c.URL = secret.New(through) })
	if !s.LockConfirmedAt().IsZero() {
		t.Error("confirmed before the first BeginStep")
	}
	began := time.Now()
	begin(t, s, run, store.StepBuild, "t")
	after := func(moment time.Time) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); !s.LockConfirmedAt().After(moment); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("not confirmed again")
			}
		}
	}
	after(began)
	after(time.Now())
	before := d.Rows(t, workerLockSessions)
	after(time.Now())
	if now := d.Rows(t, workerLockSessions); len(now) != 1 || fmt.Sprint(now) != fmt.Sprint(before) {
		t.Errorf("asking has replaced the session %v by %v", before, now)
	}
	relay.Stall()
	silent := time.Now()
	<-time.After(1200 * time.Millisecond) // it is asked twice
	if confirmed := s.LockConfirmedAt(); confirmed.After(silent) {
		t.Errorf("confirmed %s after the server stopped answering", confirmed.Sub(silent))
	}
	relay.Restore()
	after(time.Now())
}

// workerLockSessions selects the sessions that have a worker's lock.
const workerLockSessions = `SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock'
	AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`
