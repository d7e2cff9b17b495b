package main

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

func (s testEnv) exec(t *testing.T, sql string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), s.database)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if _, err := conn.Exec(t.Context(), sql); err != nil {
		t.Fatal(err)
	}
}

// The schema is dropped while a worker runs a step: the worker is unhealthy and says
// what to do, no message fails or is lost, and the step continues. After migrate its
// end is recorded, and other runs continue.
func TestSchemaDroppedUnderAWorker(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	over := filepath.Join(t.TempDir(), "over")
	p := start(t, append(s.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sh,sleep"), "worker", "--concurrency=2")
	listen, _ := p.logLine("worker ready")["listen"].(string)
	id := s.submit(t, "--without=analyze", "--without=patch", "--without=verify", "--without=rollback",
		fmt.Sprintf(`--set=build.command=["sh","-c","until [ -e %s ]; do sleep 0.02; done"]`, over), `--set=restart.command=["sleep","0"]`)
	s.waitForStep(t, id, "build", "in_progress")

	s.exec(t, `DROP SCHEMA mm_orchestrator CASCADE`)
	const cure = "run `mm-orchestrator migrate`"
	eventually(t, "the worker is unhealthy and says what to do", func() error {
		if status, body := ask(t, "http://"+listen+"/healthz"); status != http.StatusServiceUnavailable || !strings.Contains(body, " has no schema mm_orchestrator") || !strings.Contains(body, cure) {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
	for _, args := range [][]string{{"runs"}, {"runs", "--json"}, {"runs", id}, {"runs", "revoke", id}, {"parked"}, {"parked", "return"}} {
		c := start(t, s.env(), args...)
		if code := c.exit(); code != exitConfig || !strings.Contains(c.stderr.String(), cure) || strings.Count(c.stderr.String(), "\n") != 1 || strings.Contains(c.stderr.String(), "SQLSTATE") {
			t.Errorf("%s: exit %d: %s%s", args, code, c.stdout.String(), c.stderr.String())
		}
	}
	second := s.submitSleep(t, 0)
	line := p.logLine("step cannot be begun, handing the message back")
	if line["run_id"] != second || !strings.Contains(fmt.Sprint(line["error"]), cure) {
		t.Errorf("the second run: %v", line)
	}
	if err := os.WriteFile(over, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	line = p.logLine("end of step cannot be recorded yet, waiting for the database")
	if line["run_id"] != id || !strings.Contains(fmt.Sprint(line["error"]), cure) {
		t.Errorf("the step that ran: %v", line)
	}

	if m := start(t, s.env(), "migrate"); m.exit() != exitOK {
		t.Fatalf("migrate: %s", m.stderr.String())
	}
	s.waitForStep(t, id, "build", "succeeded")
	s.waitForStep(t, id, "restart", "succeeded")
	s.waitForStep(t, second, "build", "succeeded")
	if build := s.step(t, id, "build"); build.Starts != 1 {
		t.Errorf("build was started %d times", build.Starts)
	}
	eventually(t, "the worker is healthy again", func() error {
		if status, body := ask(t, "http://"+listen+"/healthz"); status != http.StatusOK {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
	if n := s.queryInt(t, `SELECT count(*) FROM celery_taskmeta WHERE status <> 'SUCCESS'`); n != 0 {
		t.Errorf("%d results are no success", n)
	}
	if n := s.queryInt(t, `SELECT count(*) FROM mm_orchestrator.workers`); n != 1 {
		t.Errorf("%d workers are registered", n)
	}
}
