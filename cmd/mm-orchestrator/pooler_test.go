package main

import (
	"errors"
	"strings"
	"syscall"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// A worker does not start behind a PgBouncer that breaks session locks. One line says
// why and what to do.
func TestPgBouncerThatBreaksSessionLocksIsRefused(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	for _, mode := range []string{"transaction", "statement"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			through := devenv.Pooler(t, s.database, mode)
			p := start(t, s.env(), "worker", "--database-url", through, "--result-backend", "disabled://", "--queue", mode)
			if code := p.exit(); code != exitConfig {
				t.Errorf("exit code %d", code)
			}
			lines := strings.Split(strings.TrimSpace(p.stderr.String()), "\n")
			for _, want := range []string{"connection pooler", "Connect to PostgreSQL directly, or to a pool with pool_mode=session"} {
				if len(lines) != 1 || !strings.Contains(lines[0], want) {
					t.Errorf("%d lines, or no %q:\n%s", len(lines), want, p.stderr.String())
				}
			}
			f := runDoctor(t, s.env(), exitFailure, "--database-url", through)["session"]
			if f.Status != statusFail || !strings.Contains(f.Found, "pool_mode=session") {
				t.Errorf("doctor: %+v", f)
			}
		})
	}
}

// A worker works behind a PgBouncer that keeps sessions, and its death is noticed:
// the next worker takes over its step.
func TestPgBouncerThatKeepsSessionsWorks(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	s.database = devenv.Pooler(t, s.database, "session")
	dir := t.TempDir()
	env := append(s.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sh")
	p := start(t, env, "worker")
	p.logLine("worker ready")
	id := s.submitTree(t, "build", dir)
	waitForTree(t, dir)
	p.signal(syscall.SIGKILL)
	p.exit()
	endTree(t, dir)
	start(t, env, "worker").logLine("worker ready")
	s.waitForStep(t, id, "build", "succeeded")
	eventually(t, "a second start is counted", func() error {
		if s.step(t, id, "build").Starts != 2 {
			return errors.New("it is not")
		}
		return nil
	})
}
