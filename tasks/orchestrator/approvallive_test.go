package orchestrator

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// pauseRun submits a run and waits until it has paused before verify.
func (e *approvalEnv) pauseRun(t *testing.T) {
	t.Helper()
	e.submit(t, "pending")
	e.send(t)
	e.awaitPause(t)
}

func (e *approvalEnv) awaitPause(t *testing.T) {
	t.Helper()
	e.await(t, "the run pauses", func() bool { return e.status(t) == "awaiting_approval" })
	e.awaitQuiet(t)
}

// awaitQuiet waits until no worker has a message, and none waits in the queue.
func (e *approvalEnv) awaitQuiet(t *testing.T) {
	t.Helper()
	quiet := 0
	e.await(t, "no message is left", func() bool {
		n := 0
		for _, w := range e.workers {
			depth, err := w.QueueDepth(t.Context(), "q")
			if err != nil {
				return false
			}
			n += depth + len(w.Unacked())
		}
		if quiet++; n > 0 {
			quiet = 0
		}
		return quiet > 5 // a delivery is on its way for a moment
	})
}

func (e *approvalEnv) ended(t *testing.T) bool {
	t.Helper()
	status := e.status(t)
	return status == "rolled_back" || status == "succeeded"
}

// starts are how often the steps of the run have begun.
func (e *approvalEnv) starts(t *testing.T) string {
	t.Helper()
	var all []string
	for _, row := range e.db.Rows(t, `SELECT step, sum(starts) AS starts FROM mm_orchestrator.claims WHERE run_id = $1 GROUP BY step ORDER BY min(started_at)`, e.id) {
		all = append(all, fmt.Sprint(row["step"], " ", row["starts"]))
	}
	return strings.Join(all, ", ")
}

// begun are the commands in the ledger.
func (e *approvalEnv) begun() string {
	var all []string
	for _, line := range e.ledger() {
		if command, is := strings.CutPrefix(line, "begin run "); is {
			all = append(all, command)
		}
	}
	return strings.Join(all, " ")
}

func TestAPausedRunHoldsNothingButItsWorkspace(t *testing.T) {
	t.Parallel()
	e := newApprovalEnv(t, "pre-verify")
	e.worker(t, "one", 1, true)
	e.pauseRun(t)
	for what, sql := range map[string]string{
		"parked messages":   `SELECT count(*) AS n FROM mm_orchestrator.parked`,
		"held claims":       `SELECT count(*) AS n FROM mm_orchestrator.claims WHERE outcome IS NULL AND holder IS NOT NULL`,
		"open transactions": `SELECT count(*) AS n FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in transaction%'`,
		"rows locked by transactions": `SELECT count(*) AS n FROM pg_locks AS l JOIN pg_database AS d ON d.oid = l.database
			WHERE d.datname = current_database() AND l.relation = 'orchestrator_runs'::regclass AND l.mode <> 'AccessShareLock' AND l.pid <> pg_backend_pid() AND l.pid IN (
			    SELECT pid FROM pg_stat_activity WHERE xact_start < now() - interval '1 second')`,
	} {
		if n := e.count(t, sql); n != 0 {
			t.Errorf("%d %s", n, what)
		}
	}
	if n := e.count(t, `SELECT count(*) AS n FROM mm_orchestrator.holds WHERE run_id IS NOT NULL`); n != 1 {
		t.Errorf("%d workspaces are held, want that of the run", n)
	}
	// The worker is free: it runs a step of another workspace.
	e.create(t, "other", "normal", e.base)
	e.publish(e.chain(t, "other", "build"))
	e.await(t, "another run is carried out", func() bool { return slices.Contains(e.ledger(), "end other build") })
}

// A run that has no docker engine does not wait for one to be looked at.
func TestAPauseNeedsNoEngine(t *testing.T) {
	t.Parallel()
	e := newApprovalEnv(t, "pre-verify")
	engine, err := compose.NewEngine(compose.EngineConfig{Host: "unix://" + filepath.Join(t.TempDir(), "none.sock")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = engine.Close() })
	e.config.Engine = engine
	e.worker(t, "one", 1, true)
	e.pauseRun(t)
	e.db.Approve(t, e.id)
	e.send(t)
	e.await(t, "verify goes on", func() bool {
		return e.count(t, `SELECT count(*) AS n FROM mm_orchestrator.approvals WHERE passed_for <> ''`) == 1
	})
	same(t, "commands", e.begun(), "patch build restart")
}

// While the run waits, and when its approval is met, its messages may come several
// times, to two workers, with two chains as of two clicks, and with those of the old
// chain.
func TestMessagesComeTwiceAroundAnApproval(t *testing.T) {
	t.Parallel()
	e := newApprovalEnv(t, "pre-verify")
	e.worker(t, "one", 2, true)
	e.worker(t, "two", 2, true)
	e.pauseRun(t)
	old := e.chain(t, "chain1", "analyze", "patch", "build", "restart", "verify")
	for range 3 {
		e.publish(old)
		e.publish(e.chain(t, "chain1", "verify"))
		e.publish(e.chain(t, "chain1", "restart", "verify"))
	}
	e.awaitQuiet(t)
	if got := e.status(t); got != "awaiting_approval" {
		t.Fatalf("the run is %s", got)
	}
	e.db.Approve(t, e.id)
	e.send(t)
	e.send(t)
	e.db.Approve(t, e.id)
	for range 3 {
		e.send(t)
	}
	e.await(t, "the run ends", func() bool { return e.ended(t) })
	e.awaitQuiet(t)
	same(t, "commands", e.begun(), "patch build restart rollback")
	if n := e.count(t, `SELECT count(*) AS n FROM mm_orchestrator.parked`); n != 0 {
		t.Errorf("%d messages are parked", n)
	}
	if n := e.count(t, `SELECT count(*) AS n FROM mm_orchestrator.holds WHERE run_id IS NOT NULL`); n != 0 {
		t.Error("the workspace is still held")
	}
}

// An approval that expires while its run waits for the workspace counts no more.
func TestAnApprovalExpiresWhileTheRunWaitsForItsTurn(t *testing.T) {
	t.Parallel()
	e := newApprovalEnv(t, "pre-run")
	e.worker(t, "one", 2, true)
	e.create(t, "first", "normal", "")
	e.db.Rows(t, `UPDATE orchestrator_runs SET target_service = 'celery-worker' WHERE id = $1 RETURNING id`, e.names["first"])
	e.mark(t, "hold-first-build")
	e.publish(e.chain(t, "first", "build", "restart"))
	e.await(t, "another run has the workspace", func() bool { return len(e.ledger()) == 1 })
	e.submit(t, "awaiting_approval")
	e.db.Approve(t, e.id)
	e.send(t)
	e.await(t, "the run waits for its turn", func() bool { return e.count(t, `SELECT count(*) AS n FROM mm_orchestrator.parked`) == 1 })
	e.set(t, `metrics_snapshot = jsonb_set(metrics_snapshot, '{approval,expiresAt}', to_jsonb(to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"')))`)
	e.clear(t, "hold-first-build")
	e.await(t, "the run waits for an approval", func() bool { return e.status(t) == "awaiting_approval" })
	if text := e.message(t, store.StepAnalyze); !strings.Contains(text, "the approval has expired at") {
		t.Errorf("message %q", text)
	}
	same(t, "commands", e.begun(), "")
	e.presented(t)
	e.db.Approve(t, e.id)
	e.send(t)
	e.await(t, "the run ends", func() bool { return e.ended(t) })
	same(t, "commands after a good approval", e.begun(), "patch build restart rollback")
}

// A run that nobody approves in time is rolled back, and the next run gets the
// workspace.
func TestNobodyApprovesInTime(t *testing.T) {
	t.Parallel()
	e := newApprovalEnv(t, "pre-verify")
	e.config.ApprovalWait = 2 * time.Second
	e.worker(t, "one", 1, true)
	e.worker(t, "two", 1, true)
	e.pauseRun(t)
	e.create(t, "next", "normal", "")
	e.db.Rows(t, `UPDATE orchestrator_runs SET target_service = 'celery-worker' WHERE id = $1 RETURNING id`, e.names["next"])
	e.publish(e.chain(t, "next", "build", "restart"))
	e.await(t, "the next run has the workspace", func() bool { return slices.Contains(e.ledger(), "end next restart") })
	if text := e.message(t, store.StepVerify); !strings.HasPrefix(text, "The run waited before verify for an approval from ") || !strings.Contains(text, "and got none. Retry the run to begin again") {
		t.Errorf("message %q", text)
	}
	same(t, "commands", e.begun(), "patch build restart rollback")
	same(t, "status", e.status(t), "rolled_back")
	// An approval that comes now, and a message, change nothing.
	e.set(t, `status = 'pending', approval_token = 'late'`)
	e.send(t)
	e.awaitQuiet(t)
	same(t, "commands after a late message", e.begun(), "patch build restart rollback")
	held := e.db.Rows(t, `
		SELECT extract(epoch FROM (SELECT min(c.started_at) FROM mm_orchestrator.claims AS c WHERE c.run_id = $1 AND c.step = 'rollback') - s.finished_at)::float8 AS late
		FROM spec_workflow_task_states AS s WHERE s.orchestrator_run_id = $1 AND s.plan_step = 'verify'`, e.id)
	t.Logf("the rollback began %v s after the end of the wait was recorded", held[0]["late"])
}

// The steps that an approval sends may be lost, as when MoonMind's API cannot reach the
// broker. The run must not keep its workspace for ever, and must not leave it with its
// change in it.
func TestTheMessageOfAnApprovalIsLost(t *testing.T) {
	t.Parallel()
	e := newApprovalEnv(t, "pre-verify")
	e.worker(t, "one", 1, true)
	e.pauseRun(t)
	e.db.Approve(t, e.id)
	e.create(t, "next", "normal", "")
	e.db.Rows(t, `UPDATE orchestrator_runs SET target_service = 'celery-worker' WHERE id = $1 RETURNING id`, e.names["next"])
	e.publish(e.chain(t, "next", "build", "restart"))
	e.await(t, "the run is lost", func() bool { e.passGrace(t, e.id); return e.ended(t) })
	e.await(t, "the next run has the workspace", func() bool { return slices.Contains(e.ledger(), "end next restart") })
	order := e.checkTurns(t)
	same(t, "order", strings.Join(order, " "), "run next")
	same(t, "commands", e.begun(), "patch build restart rollback")
	same(t, "status", e.status(t), "rolled_back")
	if text := e.message(t, store.StepVerify); text != "run was lost: step verify did not begin after the approval; its message is in no queue, and no worker has it. Retry the run to begin again" {
		t.Errorf("message %q", text)
	}
}

// A run that an operator revokes is rolled back, whether it waits, is approved, or both
// at once.
func TestAPausedRunIsRevoked(t *testing.T) {
	t.Parallel()
	for name, act := range map[string]func(t *testing.T, e *approvalEnv, revoke func()){
		"while it waits":      func(_ *testing.T, _ *approvalEnv, revoke func()) { revoke() },
		"when it is approved": func(t *testing.T, e *approvalEnv, revoke func()) { e.db.Approve(t, e.id); revoke(); e.send(t) },
		"and then approved":   func(t *testing.T, e *approvalEnv, revoke func()) { revoke(); e.approveIfItWaits(t); e.send(t) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newApprovalEnv(t, "pre-verify")
			e.worker(t, "one", 1, true)
			s := e.db.Open(t)
			e.pauseRun(t)
			act(t, e, func() {
				t.Helper()
				if _, err := s.RevokeRun(t.Context(), store.Revocation{RunID: e.id, Reason: "wrong branch", By: "ops"}); err != nil {
					t.Fatal(err)
				}
			})
			e.await(t, "the run is rolled back", func() bool { return e.status(t) == "rolled_back" })
			e.awaitQuiet(t)
			same(t, "message", e.message(t, store.StepVerify), "Revoked by operator ops: wrong branch")
			same(t, "commands", e.begun(), "patch build restart rollback")
			if n := e.count(t, `SELECT count(*) AS n FROM mm_orchestrator.holds WHERE run_id IS NOT NULL`); n != 0 {
				t.Error("the workspace is still held")
			}
		})
	}
}

// approveIfItWaits is the API, which approves no run that does not wait.
func (e *approvalEnv) approveIfItWaits(t *testing.T) {
	t.Helper()
	if e.status(t) == "awaiting_approval" {
		e.db.Approve(t, e.id)
	}
}

// An approval that comes while no worker runs is met by the next one.
func TestApprovedWhileNoWorkerRuns(t *testing.T) {
	t.Parallel()
	e := newApprovalEnv(t, "pre-verify")
	stop := e.worker(t, "one", 1, true)
	e.pauseRun(t)
	stop()
	e.db.Approve(t, e.id)
	e.send(t)
	e.worker(t, "two", 1, true)
	e.await(t, "the run ends", func() bool { return e.ended(t) })
	same(t, "commands", e.begun(), "patch build restart rollback")
	same(t, "starts", e.starts(t), "analyze 1, patch 1, build 1, restart 1, verify 2, rollback 1")
}

// The same with the wait: if it is over before a worker runs again, the run is rolled
// back.
func TestTheWaitEndsWhileNoWorkerRuns(t *testing.T) {
	t.Parallel()
	e := newApprovalEnv(t, "pre-verify")
	stop := e.worker(t, "one", 1, true)
	e.pauseRun(t)
	stop()
	e.db.Rows(t, `UPDATE mm_orchestrator.approvals SET paused_at = paused_at - interval '1 hour', wait_until = now() - interval '1 second' WHERE run_id = $1 RETURNING run_id`, e.id)
	e.worker(t, "two", 1, true)
	e.await(t, "the run is rolled back", func() bool { return e.status(t) == "rolled_back" })
	same(t, "commands", e.begun(), "patch build restart rollback")
}

// The database restarts while the run waits, and once more when its approval is given
// and a worker has not met it.
func TestTheDatabaseRestartsDuringThePause(t *testing.T) {
	t.Parallel()
	e := newApprovalEnv(t, "pre-verify")
	server := devenv.OwnDatabase(t)
	e.db = storetest.At(t, server.URL)
	e.gate(t, "pre-verify")
	e.worker(t, "one", 1, true)
	e.pauseRun(t)
	restart := func(meanwhile func()) {
		t.Helper()
		server.Stop()
		meanwhile()
		server.Start()
		e.db.Pool.Reset()
	}
	restart(func() {})
	if got := e.status(t); got != "awaiting_approval" {
		t.Fatalf("after a restart of the database, the run is %s", got)
	}
	e.db.Approve(t, e.id)
	restart(func() { e.send(t) })
	e.await(t, "the run ends", func() bool { return e.ended(t) })
	same(t, "commands", e.begun(), "patch build restart rollback")
	same(t, "starts", e.starts(t), "analyze 1, patch 1, build 1, restart 1, verify 2, rollback 1")
}

// After its approval a run goes on within a second, without repeating a step.
func TestAnApprovedRunGoesOnAtOnce(t *testing.T) {
	t.Parallel()
	const rounds = 20
	e := newApprovalEnv(t, "pre-verify")
	e.worker(t, "one", 1, true)
	var took []time.Duration
	for range rounds {
		e.pauseRun(t)
		e.db.Approve(t, e.id)
		sent := time.Now()
		e.send(t)
		e.await(t, "the run ends", func() bool { return e.ended(t) })
		row := e.db.Rows(t, `SELECT started_at FROM spec_workflow_task_states WHERE orchestrator_run_id = $1 AND plan_step = 'verify'`, e.id)[0]
		began, err := time.Parse(time.RFC3339Nano, fmt.Sprint(row["started_at"]))
		if err != nil {
			t.Fatal(err)
		}
		took = append(took, began.Sub(sent))
		same(t, "starts", e.starts(t), "analyze 1, patch 1, build 1, restart 1, verify 2, rollback 1")
	}
	slices.Sort(took)
	t.Logf("verify began after the message of the approval: median %s, worst %s of %d", took[rounds/2], took[rounds-1], rounds)
	if took[rounds/2] > 5*time.Second { // a second, on a machine that does nothing else
		t.Errorf("verify began %s after the approval", took[rounds/2])
	}
}
