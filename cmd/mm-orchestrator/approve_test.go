package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// submitAwaiting submits a run of one short step for whose service a gate requires an
// approval of role sre, as MoonMind's API leaves it.
func (s testEnv) submitAwaiting(t *testing.T, requirement string) string {
	t.Helper()
	run := s.submitQuick(t, "normal")
	s.queue(t).take("orchestrator.run")
	s.exec(t, fmt.Sprintf(`
		INSERT INTO approval_gates (id, service_name, requirement, approver_roles, valid_for_minutes)
		SELECT gen_random_uuid(), lower(target_service), '%s', '{sre}', 60 FROM orchestrator_runs WHERE id = '%s'
		ON CONFLICT (service_name) DO UPDATE SET requirement = EXCLUDED.requirement`, requirement, run))
	s.exec(t, fmt.Sprintf(`
		UPDATE orchestrator_runs AS r SET status = 'awaiting_approval', approval_gate_id = g.id, metrics_snapshot = COALESCE(r.metrics_snapshot, '{}') ||
		       '{"approval": {"required": true, "requirement": "%s", "status": "awaiting"}}'
		FROM approval_gates AS g WHERE r.id = '%s' AND g.service_name = lower(r.target_service)`, requirement, run))
	return run
}

// `runs approve` says what it covers, refuses whom the gate does not name and a run
// that does not wait, and starts the run; a repetition changes nothing.
func TestApproveByHand(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	run := s.submitAwaiting(t, "pre-run")
	env := append(s.env(), "ENCRYPTION_MASTER_KEY=key of the API", "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sleep")
	approve := func(want int, args ...string) string {
		t.Helper()
		p := start(t, env, append([]string{"runs", "approve"}, args...)...)
		if code := p.exit(); code != want {
			t.Errorf("%s: exit code %d: %s%s", args, code, p.stdout.String(), p.stderr.String())
		}
		return p.stdout.String() + p.stderr.String()
	}
	status := func() string { return s.run(t, run).Run.Status }
	for _, args := range [][]string{{}, {run}, {run, "--by", "ops-417"}, {run, "--role", "sre", "--by", " "}} {
		approve(exitUsage, args...)
	}
	if out := approve(exitFailure, run, "--by", "ops-417", "--role", "intern"); !strings.Contains(out, "cannot be approved") || !strings.Contains(out, "intern") {
		t.Errorf("a role without the right: %s", out)
	}
	if p := start(t, append(s.env(), "ENCRYPTION_MASTER_KEY="), "runs", "approve", run, "--by", "ops-417", "--role", "sre"); p.exit() != exitFailure || !strings.Contains(p.stderr.String(), "ENCRYPTION_MASTER_KEY is not set") {
		t.Errorf("without a key: %s", p.stderr.String())
	}
	out := approve(exitOK, run, "--dry-run")
	for _, words := range []string{"run        " + run + ", awaiting_approval", "gate       pre-run, approved by the roles sre", "plan       build (SHA-256 ", "no worker has looked at it yet", "nothing was changed"} {
		if !strings.Contains(out, words) {
			t.Errorf("dry run prints %q, without %q", out, words)
		}
	}
	if got := status(); got != "awaiting_approval" {
		t.Errorf("the run is %s", got)
	}
	w := start(t, env, "worker")
	w.logLine("worker ready")
	if out := approve(exitOK, run[:8], "--by", "ops-417", "--role", "sre"); !strings.Contains(out, "run "+run+" is approved by ops-417 (sre) until 2") {
		t.Errorf("it prints %q", out)
	}
	s.waitForStep(t, run, "build", "succeeded")
	if n := s.queryInt(t, `SELECT count(*) FROM orchestrator_runs WHERE octet_length(approval_token) > 20
		AND metrics_snapshot -> 'approval' -> 'approver' = '{"id": "ops-417", "role": "sre"}' AND metrics_snapshot -> 'approval' ->> 'status' = 'granted'`); n != 1 {
		t.Errorf("the row does not say who has approved")
	}
	if out := approve(exitOK, run, "--by", "ops-417", "--role", "sre"); !strings.Contains(out, "was approved by ops-417 (sre) at 2") {
		t.Errorf("again: %q", out)
	}
	if out := approve(exitFailure, run, "--by", "somebody", "--role", "sre"); !strings.Contains(out, "only a run that waits for approval can be approved") {
		t.Errorf("by another: %q", out)
	}
	if n := s.queryInt(t, `SELECT count(*) FROM mm_orchestrator.audit WHERE record::json ->> 'kind' = 'approval-given' AND record::json -> 'approval' ->> 'role' = 'sre' AND record::json ->> 'by' = 'ops-417'`); n != 1 {
		t.Errorf("%d audit records of the approval, want one", n)
	}
	if n := s.queryInt(t, `SELECT count(*) FROM mm_orchestrator.claims WHERE starts = 1`); n != 1 {
		t.Errorf("%d steps were run, want one, once", n)
	}
}

// A long instruction is cut where a secret stands: no half of it is shown.
func TestApproveShowsNoPartOfASecret(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	run := s.submitAwaiting(t, "pre-run")
	s.command(t, "migrate")
	s.exec(t, `UPDATE orchestrator_runs SET instruction = repeat('x', 390) || ' hunter2-and-more'`)
	p := start(t, append(s.env(), "MY_PASSWORD=hunter2-and-more"), "runs", "approve", run, "--dry-run")
	if code := p.exit(); code != exitOK || strings.Contains(p.stdout.String(), "hunter2") || !strings.Contains(p.stdout.String(), "asked for  xxxx") {
		t.Errorf("exit code %d: %s%s", code, p.stdout.String(), p.stderr.String())
	}
}

// An approval while the queue is paused starts the run when the pause ends.
func TestApproveWhilePaused(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	run := s.submitAwaiting(t, "pre-run")
	env := append(s.env(), "ENCRYPTION_MASTER_KEY=key of the API", "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sleep")
	w := start(t, env, "worker")
	w.logLine("worker ready")
	s.command(t, "pause", "--reason", "x")
	if p := start(t, env, "runs", "approve", run, "--by", "ops-417", "--role", "sre"); p.exit() != exitOK {
		t.Fatal(p.stderr.String())
	}
	if out := s.command(t, "runs", run); !strings.Contains(out, "build waiting since") || !strings.Contains(out, "queue orchestrator.run is paused") {
		t.Errorf("it prints %q", out)
	}
	s.command(t, "resume")
	s.waitForStep(t, run, "build", "succeeded")
}

// Whose approval a run waits for depends on the policy file, which names the compose
// service of a target. A file with a mistake does not keep anybody from looking at runs.
func TestRunsNameTheApproversOfThePolicyFile(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	run := s.submitAwaiting(t, "pre-run")
	s.exec(t, `INSERT INTO approval_gates (id, service_name, requirement, approver_roles, valid_for_minutes) VALUES (gen_random_uuid(), 'web', 'pre-run', '{release}', 60)`)
	target := s.run(t, run).Run.TargetService
	file := filepath.Join(t.TempDir(), "profiles.yaml")
	for text, want := range map[string]struct{ roles, note string }{
		"services:\n  " + target + ":\n    compose: {service: web}\n": {"for an approval by release or sre", ""},
		"services: {}\n":        {"for an approval by sre", ""},
		"services: [mistake]\n": {"for an approval by sre", "The approval gates below are those of the built-in policy"},
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, args := range [][]string{{"runs"}, {"runs", run}} {
			p := start(t, append(s.env(), "MM_ORCHESTRATOR_PROFILES="+file), args...)
			if code := p.exit(); code != exitOK || !strings.Contains(p.stdout.String(), want.roles+"\n") || !strings.Contains(p.stderr.String(), want.note) || want.note == "" && p.stderr.String() != "" {
				t.Errorf("%s with %q: exit code %d, want %q: %s%s", args, text, code, want, p.stdout.String(), p.stderr.String())
			}
		}
	}
}
