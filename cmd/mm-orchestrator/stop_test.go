package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// tree is a command that ignores SIGTERM and starts a daemon in a separate session,
// which ignores it too. Both append their pids to a file. If the file "over" exists,
// the command succeeds at once.
func tree(dir string) string {
	script := fmt.Sprintf(`cd %s
		[ -e over ] && exit 0
		trap '' TERM
		(setsid sh -c 'trap "" TERM; echo $$ >>pids; while :; do sleep 600; done' </dev/null >/dev/null 2>&1 &)
		until [ -s pids ]; do sleep 0.01; done
		echo $$ >>pids
		touch complete
		while :; do sleep 600; done`, dir)
	command, _ := json.Marshal([]string{"sh", "-c", script})
	return string(command)
}

// waitForTree waits until the processes of tree run, and returns their pids.
func waitForTree(t *testing.T, dir string) (pids []int) {
	t.Helper()
	eventually(t, "the step's processes run", func() error {
		_, err := os.Stat(filepath.Join(dir, "complete"))
		return err
	})
	text, err := os.ReadFile(filepath.Join(dir, "pids"))
	if err != nil {
		t.Fatal(err)
	}
	for _, word := range strings.Fields(string(text)) {
		pid, err := strconv.Atoi(word)
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	t.Cleanup(func() {
		for _, pid := range pids {
			if isAlive(pid) {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	})
	return pids
}

// endTree makes the next start of the tree succeed at once.
func endTree(t *testing.T, dir string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "over"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

// isAlive reports whether a process runs. Zombies do not count.
func isAlive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.HasPrefix(string(stat[strings.LastIndexByte(string(stat), ')')+1:]), " Z")
}

func assertNoneAlive(t *testing.T, pids []int) {
	t.Helper()
	for _, pid := range pids {
		if isAlive(pid) {
			t.Errorf("process %d of the step survived", pid)
		}
	}
}

// submitTree publishes a run in which one step runs the tree. Steps before it
// do almost nothing, those after it are not in the plan.
func (s testEnv) submitTree(t *testing.T, step, dir string) string {
	t.Helper()
	var args []string
	switch step {
	case "patch":
		args = []string{"--without=build", "--without=restart", "--without=verify", "--without=rollback", "--set=patch.commands=[" + tree(dir) + "]"}
	case "build":
		args = []string{"--without=patch", "--without=restart", "--without=verify", "--without=rollback", "--set=build.command=" + tree(dir)}
	case "restart":
		args = []string{"--without=patch", "--without=build", "--without=verify", "--without=rollback", "--set=restart.command=" + tree(dir)}
	case "rollback":
		args = []string{"--without=patch", "--without=restart", "--without=verify", `--set=build.command=["false"]`,
			`--set=rollback.strategies=[{"type": "literal", "commands": [` + tree(dir) + `]}]`}
	}
	return s.submit(t, append([]string{"--without=analyze"}, args...)...)
}

func (s testEnv) git(t *testing.T) {
	t.Helper()
	for _, args := range [][]string{{"init", "-q"}, {"-c", "user.name=t", "-c", "user.email=t@example.com", "commit", "-q", "--allow-empty", "-m", "start"}} {
		cmd := exec.Command("git", args...)
		cmd.Dir = s.workspace
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %s: %v\n%s", args, err, out)
		}
	}
}

// stepKinds are the steps that run programs; analyze and verify have tests of
// their own.
// claimOf returns the claim's columns about the starts of a step.
func (s testEnv) claimOf(t *testing.T, id, step string) (text string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), s.database)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if err := conn.QueryRow(t.Context(), `SELECT format('%s starts, %s handed back', starts, handed_back)
		FROM mm_orchestrator.claims WHERE run_id = $1 AND step = $2`, id, step).Scan(&text); err != nil {
		t.Fatal(err)
	}
	return text
}

var stepKinds = []string{"patch", "build", "restart", "rollback"}

// childrenOf are the living processes whose parent is pid.
func childrenOf(t *testing.T, pid int) (children []int) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		stat, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		// After the name, which may hold anything: state, parent.
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		child, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if len(fields) > 1 && fields[0] != "Z" && fields[1] == strconv.Itoa(pid) {
			children = append(children, child)
		}
	}
	return children
}

// At the end of the grace the worker kills all processes of the step, returns the
// message to the queue, and exits in time. The next worker runs the step at once.
func TestSIGTERMEndsAStepInTime(t *testing.T) {
	t.Parallel()
	for _, step := range stepKinds {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			s := newTestEnv(t)
			s.git(t)
			dir := t.TempDir()
			const grace = 2 * time.Second
			env := append(s.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sh,false", "MM_ORCHESTRATOR_SHUTDOWN_GRACE="+grace.String())
			p := start(t, env, "worker")
			p.logLine("worker ready")
			id := s.submitTree(t, step, dir)
			pids := append(waitForTree(t, dir), childrenOf(t, p.cmd.Process.Pid)...)
			begin := time.Now()
			p.signal(syscall.SIGTERM)
			if code := p.exit(); code != exitOK {
				t.Errorf("exit code %d", code)
			}
			if took := time.Since(begin); took > grace+time.Second+slowMachine {
				t.Errorf("the end took %v", took)
			}
			assertNoneAlive(t, pids)
			if got := s.step(t, id, step).Status; got != "in_progress" {
				t.Errorf("the step is %s", got)
			}
			endTree(t, dir)
			next := start(t, env, "worker")
			next.logLine("worker ready")
			s.waitForStep(t, id, step, "succeeded")
			// The worker released the claim; nobody took it over from a dead worker.
			if got, want := s.claimOf(t, id, step), "2 starts, 1 handed back"; got != want {
				t.Errorf("the claim says %s, want %s", got, want)
			}
		})
	}
}

// verify has no process and waits for a service that never answers. It ends in time
// too, its message returns to the queue, and the next worker verifies at once.
func TestSIGTERMEndsVerifyInTime(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, mute string }{{"refused", ""}, {"no answer", "deaf"}} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newTestEnv(t)
			var well atomic.Bool
			asked := make(chan struct{}, 1)
			over := make(chan struct{})
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				select {
				case asked <- struct{}{}:
				default:
				}
				switch {
				case well.Load():
				case tt.mute != "":
					select {
					case <-over:
					case <-r.Context().Done():
					}
				default:
					w.WriteHeader(http.StatusServiceUnavailable)
				}
			}))
			t.Cleanup(server.Close)
			t.Cleanup(func() { close(over) })
			const grace = time.Second
			env := append(s.env(), "MM_ORCHESTRATOR_SHUTDOWN_GRACE="+grace.String())
			p := start(t, env, "worker")
			p.logLine("worker ready")
			id := s.submit(t, "--without=analyze", "--without=patch", "--without=build", "--without=restart", "--without=rollback",
				fmt.Sprintf(`--set=verify.healthcheck={"url": %q, "timeoutSeconds": 600}`, server.URL))
			select {
			case <-asked:
			case <-time.After(testTimeout):
				t.Fatal("the service is not asked")
			}
			begin := time.Now()
			p.signal(syscall.SIGTERM)
			if code := p.exit(); code != exitOK {
				t.Errorf("exit code %d", code)
			}
			if took := time.Since(begin); took > grace+time.Second+slowMachine {
				t.Errorf("the end took %v", took)
			}
			if got := s.step(t, id, "verify").Status; got != "in_progress" {
				t.Errorf("verify is %s", got)
			}
			well.Store(true)
			start(t, env, "worker").logLine("worker ready")
			s.waitForStep(t, id, "verify", "succeeded")
		})
	}
}

// analyze has no process and takes milliseconds. If it is stopped at its start, it still
// finishes within the grace and is recorded.
func TestSIGTERMLetsAnalyzeFinish(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	path, err := builtForChaos()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	holdAt(t, dir, "artifacts.opened")
	const grace = 4 * time.Second
	p := startProgram(t, path, append(s.env(), "MM_CHAOS_DIR="+dir, "MM_ORCHESTRATOR_SHUTDOWN_GRACE="+grace.String()), "worker")
	p.logLine("worker ready")
	id := s.submit(t, "--without=patch", "--without=build", "--without=restart", "--without=verify", "--without=rollback")
	eventually(t, "analyze is held", func() error {
		_, err := os.Stat(filepath.Join(dir, "fired"))
		return err
	})
	begin := time.Now()
	p.signal(syscall.SIGTERM)
	p.logLine("stopping: running steps may finish; a second signal cancels them")
	resume(t, dir)
	if code := p.exit(); code != exitOK {
		t.Errorf("exit code %d", code)
	}
	if took := time.Since(begin); took > grace+time.Second+slowMachine {
		t.Errorf("the end took %v", took)
	}
	if got := s.step(t, id, "analyze").Status; got != "succeeded" {
		t.Errorf("analyze is %s", got)
	}
}

// holdAt makes the next process that reaches the fault point wait there until resume.
func holdAt(t *testing.T, dir, point string) {
	t.Helper()
	trap, err := json.Marshal(map[string]any{"point": point, "hold": true, "id": 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "trap"), trap, 0o600); err != nil {
		t.Fatal(err)
	}
}

func resume(t *testing.T, dir string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "resume"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

// An unreachable database does not delay the worker's end. The message returns to the
// queue, and the next worker continues the step.
func TestSIGTERMWithoutDatabase(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	dir := t.TempDir()
	u, err := url.Parse(s.database)
	if err != nil {
		t.Fatal(err)
	}
	r := newRelay(t, "tcp", u.Host)
	const grace = 2 * time.Second
	env := append(s.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sh", "MM_ORCHESTRATOR_SHUTDOWN_GRACE="+grace.String())
	p := start(t, env, "worker", "--database-url", strings.Replace(s.database, u.Host, r.address, 1), "--result-backend", "disabled://")
	p.logLine("worker ready")
	id := s.submitTree(t, "build", dir)
	pids := waitForTree(t, dir)
	r.close()
	begin := time.Now()
	p.signal(syscall.SIGTERM)
	if code := p.exit(); code != exitOK {
		t.Errorf("exit code %d", code)
	}
	if took := time.Since(begin); took > grace+time.Second+slowMachine {
		t.Errorf("the end took %v", took)
	}
	assertNoneAlive(t, pids)
	endTree(t, dir)
	start(t, env, "worker")
	s.waitForStep(t, id, "build", "succeeded")
}

// A worker has three connections: two for statements, and one for the session lock
// that shows that it is alive.
func TestWorkerHasThreeConnections(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	conn, err := pgx.Connect(t.Context(), s.database)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	p := start(t, append(s.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sleep"), "worker")
	p.logLine("worker ready")
	ids := []string{s.submitSleep(t, 1), s.submitSleep(t, 0)}
	most := 0
	for _, id := range ids {
		eventually(t, "the run ends", func() error {
			var n int
			err := conn.QueryRow(t.Context(), `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE '%orchestrator@%'`).Scan(&n)
			if most = max(most, n); err != nil {
				return err
			}
			var status string
			err = conn.QueryRow(t.Context(), `SELECT plan_step_status::text FROM spec_workflow_task_states WHERE orchestrator_run_id = $1 AND plan_step = 'build'`, id).Scan(&status)
			if err == nil && status != "succeeded" {
				err = errors.New(status)
			}
			return err
		})
	}
	if most == 0 || most > 3 {
		t.Errorf("%d connections at a time", most)
	}
}

// When a worker is killed, the kernel kills the step's program. The next worker kills
// the step's other processes before it starts a step.
func TestSIGKILLLeavesNothing(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	dir := t.TempDir()
	env := append(s.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sh")
	p := start(t, env, "worker", "--hostname=one@box")
	p.logLine("worker ready")
	id := s.submitTree(t, "build", dir)
	pids := waitForTree(t, dir)
	p.signal(syscall.SIGKILL)
	p.exit()
	program := pids[len(pids)-1]
	eventually(t, "the program has died with the worker", func() error {
		if isAlive(program) {
			return errors.New("it is alive")
		}
		return nil
	})
	endTree(t, dir)
	next := start(t, env, "worker", "--hostname=two@box")
	next.logLine("worker ready")
	assertNoneAlive(t, pids)
	s.waitForStep(t, id, "build", "succeeded")
}

// At its time limit a step fails with the reason, all its processes are killed, and
// the run is rolled back.
func TestTimeLimitEndsAStep(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	dir := t.TempDir()
	p := start(t, append(s.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sh,true", "MM_ORCHESTRATOR_STEP_TIME_LIMIT=2s", "MM_ORCHESTRATOR_SHUTDOWN_GRACE=2s"), "worker")
	p.logLine("worker ready")
	id := s.submit(t, "--without=analyze", "--without=patch", "--without=restart", "--without=verify", "--set=build.command="+tree(dir),
		`--set=rollback.strategies=[{"type": "literal", "commands": [["true"]]}]`)
	pids := waitForTree(t, dir)
	s.waitForStep(t, id, "rollback", "succeeded")
	assertNoneAlive(t, pids)
	if build := s.step(t, id, "build"); build.Status != "failed" || !strings.Contains(build.Message, "longer than its limit of 2s") {
		t.Errorf("build is %+v", build)
	}
	if got := s.run(t, id).Run.Status; got != "rolled_back" {
		t.Errorf("the run is %s", got)
	}
}
