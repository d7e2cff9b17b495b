package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// command runs the program to its end, which must be with exit code 0, and returns
// its output.
func (s testEnv) command(t *testing.T, args ...string) string {
	t.Helper()
	p := start(t, s.env(), args...)
	if code := p.exit(); code != exitOK {
		t.Fatalf("%s: exit code %d: %s", args, code, p.stderr.String())
	}
	return p.stdout.String()
}

// submitQuick submits a run of one short step.
func (s testEnv) submitQuick(t *testing.T, priority string) string {
	t.Helper()
	return s.submit(t, "--without=analyze", "--without=patch", "--without=restart", "--without=verify", "--without=rollback", `--set=build.command=["sleep","0"]`, "--priority="+priority)
}

// While a queue is paused, no worker begins a new run, a run that has begun goes on,
// and everything that an operator looks at says so: runs, doctor, parked, /readyz,
// the metric and one log line. A resume publishes within a second.
func TestPauseAndResume(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	env := append(s.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sleep", "MM_ORCHESTRATOR_LISTEN=127.0.0.1:0")
	workers := []probedWorker{start(t, env, "worker", "--hostname=w1@box").probedWorker(), start(t, env, "worker", "--hostname=w2@box").probedWorker()}
	begun := s.submit(t, "--without=analyze", "--without=patch", "--without=verify", "--without=rollback", `--set=build.command=["sleep","2"]`, `--set=restart.command=["sleep","0"]`)
	s.waitForStep(t, begun, "build", "in_progress")
	if out := s.command(t, "pause", "--reason", "database upgrade", "--by", "lead@office"); !strings.HasPrefix(out, "queue orchestrator.run is paused since 2") ||
		!strings.Contains(out, " by lead@office: database upgrade\nrun "+begun+" (running) goes on to its end\n") {
		t.Errorf("pause prints %q", out)
	}
	normal, high := s.submitQuick(t, "normal"), s.submitQuick(t, "high")
	s.waitForParked(t, 2)
	for _, w := range workers {
		line := w.logLine("queue is paused: no new run begins until `mm-orchestrator resume`")
		if line["by"] != "lead@office" || line["reason"] != "database upgrade" || line["mode"] != "finish" {
			t.Errorf("log line %v", line)
		}
		if status, body := ask(t, w.url+"/readyz"); status != http.StatusOK || !strings.HasPrefix(body, "ok\npaused: queue orchestrator.run is paused since 2") || !strings.Contains(body, "database upgrade") {
			t.Errorf("/readyz: %d %s", status, body)
		}
		if status, body := ask(t, w.url+"/healthz"); status != http.StatusOK || strings.Contains(body, "paused") {
			t.Errorf("/healthz: %d %s", status, body)
		}
		if _, body := ask(t, w.url+"/metrics"); !strings.Contains(body, "\nmm_orchestrator_paused 1\n") {
			t.Errorf("the metric is not 1")
		}
	}
	list := s.command(t, "runs")
	first, rest, _ := strings.Cut(list, "\n")
	if !strings.HasPrefix(first, "queue orchestrator.run is paused since 2") || !strings.HasSuffix(first, " by lead@office: database upgrade") ||
		strings.Count(rest, "queue orchestrator.run is paused") != 2 {
		t.Errorf("runs prints:\n%s", list)
	}
	if out := s.command(t, "parked"); !strings.HasPrefix(out, first+"\n") || strings.Count(out, "the queue was paused") != 2 {
		t.Errorf("parked prints:\n%s", out)
	}
	if got := doctorFinding(t, s, "pause"); got.Status != statusNote || !strings.Contains(got.Found, "database upgrade") || !strings.Contains(got.Cure, "mm-orchestrator resume") {
		t.Errorf("doctor: %+v", got)
	}
	eventually(t, "the next step of the run that has begun ends", func() error {
		if step := s.step(t, begun, "restart"); step.FinishedAt == nil {
			return fmt.Errorf("it is %s", step.Status)
		}
		return nil
	})
	if out := s.command(t, "pause", "--park", "--reason", "database upgrade, until 14:00"); !strings.HasPrefix(out, "the pause has a new reason; queue orchestrator.run is paused since "+strings.TrimPrefix(first[:strings.Index(first, " by ")], "queue orchestrator.run is paused since ")+" by lead@office, runs that have begun wait too: database upgrade, until 14:00") {
		t.Errorf("a second pause prints %q", out)
	}
	for _, w := range workers {
		eventually(t, "the worker logs the new reason", func() error {
			if strings.Count(w.stderr.String(), "queue is paused: no new run") != 2 {
				return fmt.Errorf("it has not")
			}
			return nil
		})
	}
	for _, run := range []string{normal, high} {
		if status := s.run(t, run).Run.Status; status != "pending" {
			t.Errorf("run %s is %s", run, status)
		}
	}

	begin := time.Now()
	out := s.command(t, "resume")
	if words := "queue orchestrator.run is no longer paused. It was paused since 2"; !strings.Contains(out, words) {
		t.Errorf("resume prints %q, without %q", out, words)
	}
	// A worker that has seen the end of the pause may return the message first.
	byWorker := slices.ContainsFunc(workers, func(w probedWorker) bool {
		log := w.stderr.String()
		return strings.Contains(log, "parked message returned to the queue") && strings.Contains(log, high)
	})
	if words := "run " + high + ": message of step build returned to queue orchestrator.run\n"; !byWorker && !strings.Contains(out, words) {
		t.Errorf("resume prints %q, without %q, and no worker has returned the message", out, words)
	}
	s.waitForStep(t, high, "build", "succeeded")
	if took := time.Since(begin); took > time.Second+slowMachine {
		t.Errorf("the first run began %s after the resume", took)
	}
	s.waitForStep(t, normal, "build", "succeeded")
	for _, w := range workers {
		w.logLine("pause of the queue has ended")
		if n := strings.Count(w.stderr.String(), "queue is paused: no new run"); n != 2 {
			t.Errorf("%d log lines say that the queue is paused, want one for each reason", n)
		}
		if status, body := ask(t, w.url+"/readyz"); status != http.StatusOK || strings.TrimSpace(body) != "ok" {
			t.Errorf("/readyz: %d %s", status, body)
		}
		eventually(t, "the metric is 0", func() error {
			if _, body := ask(t, w.url+"/metrics"); !strings.Contains(body, "\nmm_orchestrator_paused 0\n") {
				return fmt.Errorf("it is not")
			}
			return nil
		})
	}
	if out := s.command(t, "resume"); out != "queue orchestrator.run is not paused\n" {
		t.Errorf("a second resume prints %q", out)
	}
	var history []pauseLine
	if err := json.Unmarshal([]byte(s.command(t, "pause", "--list", "--json")), &history); err != nil || len(history) != 1 ||
		history[0].By != "lead@office" || history[0].ChangedAt == nil || history[0].ChangedBy == "" || history[0].ResumedAt == nil || history[0].ResumedBy == "" {
		t.Errorf("history %+v, %v", history, err)
	}
}

// The last worker that stops while the queue is paused keeps the parked messages. A
// resume publishes those whose turn has come although no worker is alive, and the
// next worker begins at once.
func TestPauseOutlivesWorkers(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	env := append(s.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sleep")
	w := start(t, env, "worker")
	w.logLine("worker ready")
	s.command(t, "pause", "--reason", "move to another rack")
	normal, high := s.submitQuick(t, "normal"), s.submitQuick(t, "high")
	s.waitForParked(t, 2)
	w.signal(syscall.SIGTERM)
	if code := w.exit(); code != exitOK {
		t.Errorf("exit code %d", code)
	}
	if line := w.logLine("worker has stopped"); line["parked"] != 2.0 || line["paused"] != true {
		t.Errorf("the worker logs %v", line)
	}
	w.logLine("queue is paused: parked messages stay in the database. `mm-orchestrator resume` returns them to the queue; before a Python worker takes over, run `mm-orchestrator parked return`")
	s.waitForParked(t, 2)
	if left := s.queue(t).look("orchestrator.run"); len(left) != 0 {
		t.Errorf("%d messages are in the queue", len(left))
	}
	// The pause applies to a worker that starts later.
	second := start(t, env, "worker")
	second.logLine("queue is paused: no new run begins until `mm-orchestrator resume`")
	second.signal(syscall.SIGTERM)
	second.exit()
	s.waitForParked(t, 2)

	out := s.command(t, "resume")
	if !strings.Contains(out, "run "+high+": message") || strings.Contains(out, normal) {
		t.Errorf("resume prints %q, want the run of high priority, which gets the workspace first", out)
	}
	if ready := s.queue(t).look("orchestrator.run"); len(ready) != 1 || runOfMessage(t, ready[0]) != high {
		t.Errorf("%d messages are in the queue", len(ready))
	}
	third := start(t, env, "worker")
	third.logLine("worker ready")
	s.waitForStep(t, high, "build", "succeeded")
	s.waitForStep(t, normal, "build", "succeeded")
}

// Without a reachable broker, a resume ends the pause all the same, and says what is
// left.
func TestResumeWithoutBroker(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	w := start(t, append(s.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sleep"), "worker")
	w.logLine("worker ready")
	s.command(t, "pause", "--reason", "x")
	run := s.submitQuick(t, "normal")
	s.waitForParked(t, 1)
	away := s
	away.broker = "amqp://127.0.0.1:1//"
	p := start(t, away.env(), "resume")
	if code := p.exit(); code != exitUnavailable || !strings.Contains(p.stdout.String(), "is no longer paused") || !strings.Contains(p.stderr.String(), "a worker publishes them") {
		t.Errorf("exit code %d: %s%s", code, p.stdout.String(), p.stderr.String())
	}
	s.waitForStep(t, run, "build", "succeeded")
}

func TestPauseUsage(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	for _, c := range []struct{ args, want string }{
		{"pause", "pause needs --reason"},
		{"pause --reason=", "pause needs --reason"},
		{"pause --list --park", "--list changes nothing: remove it, or --park"},
		{"freeze", "pause"},
	} {
		p := start(t, s.env(), strings.Fields(c.args)...)
		if code := p.exit(); code != exitUsage || !strings.Contains(p.stderr.String(), c.want) {
			t.Errorf("%s: exit code %d: %s", c.args, code, p.stderr.String())
		}
	}
	if out := s.command(t, "pause", "--list"); out != "queue orchestrator.run was never paused\n" {
		t.Errorf("%q", out)
	}
}
