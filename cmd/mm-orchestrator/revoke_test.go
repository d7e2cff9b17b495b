package main

import (
	"os/user"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// A run is revoked while a step runs: the step fails at once with the reason, all its
// processes end, and the run is rolled back.
func TestRevokeARunningRun(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	dir := t.TempDir()
	env := append(s.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sh,sleep", "MM_ORCHESTRATOR_SHUTDOWN_GRACE=2s")
	worker := start(t, env, "worker", "--hostname=w1@box")
	worker.logLine("worker ready")
	id := s.submit(t, "--without=analyze", "--without=patch", "--without=restart", "--without=verify", "--set=build.command="+tree(dir),
		`--set=rollback.strategies=[{"type": "literal", "commands": [["sleep", "3"]]}]`)
	pids := waitForTree(t, dir)
	begin := time.Now()
	p := start(t, append(s.env(), "USER=ann"), "runs", "revoke", id, "--reason", "wrong branch")
	if code := p.exit(); code != exitOK {
		t.Errorf("exit code %d: %s", code, p.stderr.String())
	}
	if took := time.Since(begin); took > 5*time.Second+slowMachine {
		t.Errorf("revoke took %v", took)
	}
	for _, want := range []string{"asked worker w1@box to stop step build", "run " + id} {
		if !strings.Contains(p.stdout.String(), want) {
			t.Errorf("output %q lacks %q", p.stdout.String(), want)
		}
	}
	p = start(t, s.env(), "runs", "revoke", id)
	if code := p.exit(); code != exitFailure || !strings.Contains(p.stderr.String(), "a rollback cannot be revoked, nothing was changed") {
		t.Errorf("during the rollback: exit %d: %s", code, p.stderr.String())
	}
	s.waitForStep(t, id, "rollback", "succeeded")
	assertNoneAlive(t, pids)
	if build := s.step(t, id, "build"); build.Status != "failed" || !strings.HasPrefix(build.Message, "Revoked by operator ann@") || !strings.Contains(build.Message, ": wrong branch") {
		t.Errorf("build is %+v", build)
	}
	if got := s.run(t, id).Run.Status; got != "rolled_back" {
		t.Errorf("the run is %s", got)
	}
	again := start(t, s.env(), "runs", "revoke", id)
	if code := again.exit(); code != exitFailure || !strings.Contains(again.stderr.String(), "is already rolled_back") {
		t.Errorf("again: exit %d: %s", code, again.stderr.String())
	}
}

// A run that a Python worker has left behind is ended without a worker.
func TestRevokeALostRun(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	pool, err := pgxpool.New(t.Context(), s.database)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	d := &storetest.Database{URL: s.database, Pool: pool}
	id := d.Create(t, storetest.Seed{})
	d.Rows(t, `UPDATE orchestrator_runs SET status = 'running', started_at = now() WHERE id = $1 RETURNING id`, id)
	d.Rows(t, `UPDATE spec_workflow_task_states SET status = 'succeeded', plan_step_status = 'succeeded', celery_task_id = 'py', started_at = now(), finished_at = now()
		WHERE orchestrator_run_id = $1 AND plan_step = 'analyze' RETURNING id`, id)
	p := start(t, s.env(), "runs", "revoke", id, "--wait", "0s")
	if code := p.exit(); code != exitFailure || !strings.Contains(p.stderr.String(), "If no message of it is left, use --lost") {
		t.Errorf("exit %d: %s%s", code, p.stdout.String(), p.stderr.String())
	}
	p = start(t, s.env(), "runs", "revoke", id, "--lost")
	if code := p.exit(); code != exitOK || !strings.Contains(p.stdout.String(), "was running and is now failed. Nothing of it is rolled back; these steps had succeeded: analyze") {
		t.Errorf("exit %d: %s%s", code, p.stdout.String(), p.stderr.String())
	}
	if got := s.run(t, id).Run.Status; got != "failed" {
		t.Errorf("the run is %s", got)
	}
}

// A run is revoked before it starts: a worker that starts later runs none of its steps.
func TestRevokeAWaitingRun(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	id := s.submitSleep(t, 600)
	p := start(t, s.env(), "runs", "revoke", id)
	if code := p.exit(); code != exitOK || !strings.Contains(p.stdout.String(), "had not started") {
		t.Errorf("exit %d: %s%s", code, p.stdout.String(), p.stderr.String())
	}
	worker := start(t, s.env(), "worker")
	worker.logLine("task failed")
	if build := s.step(t, id, "build"); build.Status != "failed" || build.StartedAt != nil {
		t.Errorf("build is %+v", build)
	}
	for _, args := range [][]string{{"runs", "revoke"}, {"runs", "revoke", "x"}} {
		if bad := start(t, s.env(), args...); bad.exit() != exitUsage {
			t.Errorf("%s: exit %d", args, bad.code)
		}
	}
}

// Without USER, as under docker exec, a revocation names the user of the process.
func TestOperatorWithoutUSER(t *testing.T) {
	t.Parallel()
	current, err := user.Current()
	if err != nil {
		t.Skip(err)
	}
	if got := (&program{}).operator(); !strings.HasPrefix(got, current.Username+"@") {
		t.Errorf("operator %q, want the user %s", got, current.Username)
	}
	if got := (&program{env: environment{"USER=ann"}}).operator(); !strings.HasPrefix(got, "ann@") {
		t.Errorf("operator %q, want ann", got)
	}
}
