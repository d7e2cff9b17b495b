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

// tree is a program that ignores SIGTERM and has a daemon in a session of its
// own, which ignores it as well. Both append their pids to a file. Once the
// file "over" exists, the program ends at once and well.
func tree(dir string) string {
	script := fmt.Sprintf(`cd %s
		[ -e over ] && exit 0
		trap '' TERM
		(setsid sh -c 'trap "" TERM; echo $$ >>pids; while :; do sleep 600; done' </dev/null >/dev/null 2>&1 &)
		until [ -s pids ]; do sleep 0.01; done
		echo $$ >>pids
		touch grown
		while :; do sleep 600; done`, dir)
	command, _ := json.Marshal([]string{"sh", "-c", script})
	return string(command)
}

// grown waits until the tree is complete and returns its pids.
func grown(t *testing.T, dir string) (pids []int) {
	t.Helper()
	eventually(t, "the step's processes run", func() error {
		_, err := os.Stat(filepath.Join(dir, "grown"))
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

// letTreeEnd lets the tree's next start succeed at once.
func letTreeEnd(t *testing.T, dir string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "over"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

// isAlive does not count the dead that nobody has buried.
func isAlive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.HasPrefix(string(stat[strings.LastIndexByte(string(stat), ')')+1:]), " Z")
}

func noneAlive(t *testing.T, pids []int) {
	t.Helper()
	for _, pid := range pids {
		if isAlive(pid) {
			t.Errorf("process %d of the step survives", pid)
		}
	}
}

// submitTree publishes a run in which one step runs the tree. Steps before it
// do next to nothing, those after it are not in the plan.
func (s stand) submitTree(t *testing.T, step, dir string) string {
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

func (s stand) git(t *testing.T) {
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
// claimOf is what the database says of the starts of a step.
func (s stand) claimOf(t *testing.T, id, step string) (text string) {
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

// At the end of the grace a step is ended with every process, its message goes
// back, and the next worker carries it out at once. It exits in time.
func TestSIGTERMEndsAStepInTime(t *testing.T) {
	t.Parallel()
	for _, step := range stepKinds {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			s := newStand(t)
			s.git(t)
			dir := t.TempDir()
			const grace = 2 * time.Second
			env := append(s.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sh,false", "MM_ORCHESTRATOR_SHUTDOWN_GRACE="+grace.String())
			p := start(t, env, "worker")
			p.logLine("worker ready")
			id := s.submitTree(t, step, dir)
			pids := append(grown(t, dir), childrenOf(t, p.cmd.Process.Pid)...)
			begin := time.Now()
			p.signal(syscall.SIGTERM)
			if code := p.exit(); code != exitOK {
				t.Errorf("exit code %d", code)
			}
			if took := time.Since(begin); took > grace+time.Second+busy {
				t.Errorf("the end took %v", took)
			}
			noneAlive(t, pids)
			if got := s.step(t, id, step).Status; got != "in_progress" {
				t.Errorf("the step is %s", got)
			}
			letTreeEnd(t, dir)
			next := start(t, env, "worker")
			next.logLine("worker ready")
			s.waitForStep(t, id, step, "succeeded")
			// It was given back, and not taken over from one that is dead.
			if got, want := s.claimOf(t, id, step), "2 starts, 1 handed back"; got != want {
				t.Errorf("the claim says %s, want %s", got, want)
			}
		})
	}
}

// verify has no process, and waits for a service that never answers: it ends
// in time as well, its message goes back, and the next worker verifies at once.
func TestSIGTERMEndsVerifyInTime(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, mute string }{{"refused", ""}, {"no answer", "deaf"}} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newStand(t)
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
			case <-time.After(patience):
				t.Fatal("the service is not asked")
			}
			begin := time.Now()
			p.signal(syscall.SIGTERM)
			if code := p.exit(); code != exitOK {
				t.Errorf("exit code %d", code)
			}
			if took := time.Since(begin); took > grace+time.Second+busy {
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

// analyze has no process and takes milliseconds: held at its start it finishes
// within the grace, and is recorded.
func TestSIGTERMLetsAnalyzeFinish(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	path, err := builtForChaos()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	setTrap(t, dir, "artifacts.opened")
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
	p.logLine("stopping: running steps may finish; a second signal ends them now")
	resume(t, dir)
	if code := p.exit(); code != exitOK {
		t.Errorf("exit code %d", code)
	}
	if took := time.Since(begin); took > grace+time.Second+busy {
		t.Errorf("the end took %v", took)
	}
	if got := s.step(t, id, "analyze").Status; got != "succeeded" {
		t.Errorf("analyze is %s", got)
	}
}

// setTrap holds the next process that comes by the point, until resume.
func setTrap(t *testing.T, dir, point string) {
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

// A database that is away does not hold up the end; the message is back in the
// queue, and the step goes on with the next worker.
func TestSIGTERMWithoutDatabase(t *testing.T) {
	t.Parallel()
	s := newStand(t)
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
	pids := grown(t, dir)
	r.close()
	begin := time.Now()
	p.signal(syscall.SIGTERM)
	if code := p.exit(); code != exitOK {
		t.Errorf("exit code %d", code)
	}
	if took := time.Since(begin); took > grace+time.Second+busy {
		t.Errorf("the end took %v", took)
	}
	noneAlive(t, pids)
	letTreeEnd(t, dir)
	start(t, env, "worker")
	s.waitForStep(t, id, "build", "succeeded")
}

// A worker has three connections: two for statements, one that proves that it
// lives.
func TestAWorkerHasThreeConnections(t *testing.T) {
	t.Parallel()
	s := newStand(t)
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

// A killed worker takes the program with it; what else the step had started is
// ended by the next worker before it works.
func TestSIGKILLLeavesNothing(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	dir := t.TempDir()
	env := append(s.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sh")
	p := start(t, env, "worker", "--hostname=one@box")
	p.logLine("worker ready")
	id := s.submitTree(t, "build", dir)
	pids := grown(t, dir)
	p.signal(syscall.SIGKILL)
	p.exit()
	program := pids[len(pids)-1]
	eventually(t, "the program has died with the worker", func() error {
		if isAlive(program) {
			return errors.New("it is alive")
		}
		return nil
	})
	letTreeEnd(t, dir)
	next := start(t, env, "worker", "--hostname=two@box")
	next.logLine("worker ready")
	noneAlive(t, pids)
	s.waitForStep(t, id, "build", "succeeded")
}

// Beyond its limit a step fails with the reason, ends with every process, and
// the run is rolled back.
func TestATimeLimitEndsAStep(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	dir := t.TempDir()
	p := start(t, append(s.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sh,true", "MM_ORCHESTRATOR_STEP_TIME_LIMIT=2s", "MM_ORCHESTRATOR_SHUTDOWN_GRACE=2s"), "worker")
	p.logLine("worker ready")
	id := s.submit(t, "--without=analyze", "--without=patch", "--without=restart", "--without=verify", "--set=build.command="+tree(dir),
		`--set=rollback.strategies=[{"type": "literal", "commands": [["true"]]}]`)
	pids := grown(t, dir)
	s.waitForStep(t, id, "rollback", "succeeded")
	noneAlive(t, pids)
	if build := s.step(t, id, "build"); build.Status != "failed" || !strings.Contains(build.Message, "longer than its limit of 2s") {
		t.Errorf("build is %+v", build)
	}
	if got := s.run(t, id).Run.Status; got != "rolled_back" {
		t.Errorf("the run is %s", got)
	}
}
