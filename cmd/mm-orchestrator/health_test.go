package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// relay is a proxy in front of a server that simulates faults. cut closes all
// connections and refuses new ones. While deaf is set it accepts connections and
// data, and never answers.
type relay struct {
	address string // of the relay
	close   func() // ends it: who connects is refused
	deaf    atomic.Bool

	mu    sync.Mutex
	pings int // the most requests of /_ping on one connection
	down  bool
	conns map[net.Conn]struct{}
}

// newRelay listens on the same kind of socket as the server does.
func newRelay(t *testing.T, network, server string) *relay {
	t.Helper()
	at := "127.0.0.1:0"
	if network == "unix" {
		dir, err := os.MkdirTemp("", "relay") // t.TempDir is too long for a socket
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		at = filepath.Join(dir, "socket")
	}
	return relayAt(t, network, at, server)
}

// relayAt listens at the address at, until the test ends.
func relayAt(t *testing.T, network, at, server string) *relay {
	t.Helper()
	listener, err := net.Listen(network, at)
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{address: listener.Addr().String(), conns: map[net.Conn]struct{}{}}
	var group sync.WaitGroup
	group.Go(func() {
		for {
			in, err := listener.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial(network, server)
			if err != nil || !r.keep(in, out) {
				_ = in.Close()
				continue
			}
			group.Go(func() { r.pass(out, in) })
			group.Go(func() { r.pass(in, out) })
		}
	})
	r.close = sync.OnceFunc(func() {
		_ = listener.Close()
		r.cut()
		group.Wait()
	})
	t.Cleanup(r.close)
	return r
}

// keep registers a pair of connections. After cut it returns false and closes out.
func (r *relay) keep(in, out net.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.down {
		_ = out.Close()
		return false
	}
	r.conns[in], r.conns[out] = struct{}{}, struct{}{}
	return true
}

func (r *relay) pass(to, from net.Conn) {
	defer func() { _, _ = to.Close(), from.Close() }()
	buffer := make([]byte, 32<<10)
	pings := 0
	for {
		n, err := from.Read(buffer)
		if err != nil {
			return
		}
		if r.deaf.Load() {
			continue
		}
		pings += bytes.Count(buffer[:n], []byte("/_ping HTTP"))
		r.mu.Lock()
		r.pings = max(r.pings, pings)
		r.mu.Unlock()
		if _, err := to.Write(buffer[:n]); err != nil {
			return
		}
	}
}

func (r *relay) cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.down = true
	for conn := range r.conns {
		_ = conn.Close()
	}
	clear(r.conns)
}

func (r *relay) restore() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.down = false
}

// probedWorker is a worker with the URL of its health checks.
type probedWorker struct {
	*process
	url string
}

func (p *process) probedWorker() probedWorker {
	p.t.Helper()
	listen, _ := p.logLine("worker ready")["listen"].(string)
	return probedWorker{p, "http://" + listen}
}

// waitUnhealthy waits until /healthz answers 503 with the reason.
func (p probedWorker) waitUnhealthy(reason string) {
	p.t.Helper()
	eventually(p.t, "/healthz is unhealthy", func() error {
		status, body := ask(p.t, p.url+"/healthz")
		if status != http.StatusServiceUnavailable || !strings.Contains(body, reason) {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
}

func (p probedWorker) waitHealthy() {
	p.t.Helper()
	eventually(p.t, "/healthz is healthy", func() error {
		if status, body := ask(p.t, p.url+"/healthz"); status != http.StatusOK {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
}

const (
	unhealthyLine = "worker is unhealthy"
	healthyLine   = "worker is healthy again"
)

// loggedOnce checks that the log has one line for the change to unhealthy, with the
// reason, and one for the change back.
func (p probedWorker) loggedOnce(reason string) {
	p.t.Helper()
	logged, _ := p.logLine(unhealthyLine)["error"].(string)
	if !strings.Contains(logged, reason) {
		p.t.Errorf("the log says %q, which lacks %q", logged, reason)
	}
	p.loggedChanges()
}

// loggedChanges checks that the log has one line for the change to unhealthy and
// one for the change back.
func (p probedWorker) loggedChanges() {
	p.t.Helper()
	p.logLine(healthyLine)
	for _, line := range []string{unhealthyLine, healthyLine} {
		if n := strings.Count(p.stderr.String(), line); n != 1 {
			p.t.Errorf("the log says %d times: %s", n, line)
		}
	}
}

// limit is the health limit of the tests' workers: none may be unhealthy earlier.
const limit = time.Second

func (s testEnv) withShortLimits() environment {
	return append(s.env(), "MM_ORCHESTRATOR_HEALTH_LIMIT="+limit.String())
}

// A worker whose workspace has vanished would fail every run: it is unhealthy until
// the workspace is back.
func TestHealthFollowsTheWorkspace(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	s.workspace = filepath.Join(t.TempDir(), "workspace")
	if err := os.Mkdir(s.workspace, 0o700); err != nil {
		t.Fatal(err)
	}
	p := start(t, s.env(), "worker").probedWorker()
	p.waitHealthy()
	if err := os.Rename(s.workspace, s.workspace+".away"); err != nil {
		t.Fatal(err)
	}
	p.waitUnhealthy("workspace " + s.workspace + " does not exist")
	if err := os.Rename(s.workspace+".away", s.workspace); err != nil {
		t.Fatal(err)
	}
	p.waitHealthy()
	p.loggedOnce("set WORKSPACE_ROOT to its directory")
}

// A dependency that refuses connections or never answers makes the worker unhealthy
// after the limit, not before, until it is available again.
func TestHealthFollowsDatabaseAndDocker(t *testing.T) {
	t.Parallel()
	docker := "/var/run/docker.sock"
	if host := os.Getenv("DOCKER_HOST"); strings.HasPrefix(host, "unix://") {
		docker = strings.TrimPrefix(host, "unix://")
	}
	for _, tt := range []struct {
		name           string
		inject         func(r *relay)
		databaseReason string
		engineReason   string
	}{
		{"refused", (*relay).cut, "reach the database", "docker"},
		{"deaf", func(r *relay) { r.deaf.Store(true) }, "reach the database", "docker"},
	} {
		restore := func(r *relay) {
			r.cut() // data that the relay dropped is not sent again
			r.deaf.Store(false)
			r.restore()
		}
		t.Run("database "+tt.name, func(t *testing.T) {
			t.Parallel()
			s := newTestEnv(t)
			u, err := url.Parse(s.database)
			if err != nil {
				t.Fatal(err)
			}
			r := newRelay(t, "tcp", u.Host)
			p := start(t, s.withShortLimits(), "worker", "--result-backend=disabled://",
				"--database-url", strings.Replace(s.database, u.Host, r.address, 1)).probedWorker()
			p.waitHealthy()
			begin := time.Now()
			tt.inject(r)
			p.waitUnhealthy(tt.databaseReason)
			if took := time.Since(begin); took < limit-checkInterval/2 {
				t.Errorf("unhealthy after %v", took)
			}
			// What waits for the database does not hang: an operator must not restart the
			// worker for it.
			eventually(t, "the database is away for longer than a hang takes to be told", func() error {
				_, body := ask(t, p.url+"/healthz")
				if strings.Contains(body, "has made no progress") {
					t.Fatalf("it is taken for a hang: %s", body)
				}
				if time.Since(begin) < 12*time.Second {
					return errors.New("not yet")
				}
				return nil
			})
			restore(r)
			p.waitHealthy()
			p.loggedOnce(tt.databaseReason)
		})
		t.Run("docker "+tt.name, func(t *testing.T) {
			t.Parallel()
			s := newTestEnv(t)
			r := newRelay(t, "unix", docker)
			p := start(t, append(s.withShortLimits(), "DOCKER_HOST=unix://"+r.address), "worker").probedWorker()
			// A worker without docker is healthy until a check of docker has succeeded.
			// The client may begin with a ping of its own. The third one on a connection
			// is a later check, which begins when the result of the first is known.
			eventually(t, "a check of docker has succeeded", func() error {
				r.mu.Lock()
				defer r.mu.Unlock()
				if r.pings < 3 {
					return fmt.Errorf("%d pings", r.pings)
				}
				return nil
			})
			p.waitHealthy()
			tt.inject(r)
			p.waitUnhealthy(tt.engineReason)
			restore(r)
			p.waitHealthy()
			p.loggedOnce(tt.engineReason)
		})
	}
}

// The queue is deleted and the worker loses the permission to consume: it is
// unhealthy until it has the permission again.
func TestHealthFollowsThePermissionToConsume(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	p := start(t, s.withShortLimits(), "worker").probedWorker()
	p.waitHealthy()
	conn, err := amqp.Dial(s.broker)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	s.setReadPermission(t, "^$")
	if _, err := ch.QueueDelete("orchestrator.run", false, false, false); err != nil {
		t.Fatal(err)
	}
	const reason = "ACCESS_REFUSED"
	p.waitUnhealthy(reason)
	s.setReadPermission(t, ".*")
	p.waitHealthy()
	p.loggedChanges()
	// The worker may have become unhealthy before its first attempt to consume again
	// was refused: that is a line of its own.
	if !strings.Contains(p.stderr.String(), reason) {
		t.Errorf("the log does not say %s", reason)
	}
}

// A database that takes no writes, as an old primary after a fail-over, answers, and no
// step can begin or be recorded: the worker is neither ready nor healthy, and says why.
func TestHealthFollowsAReadOnlyDatabase(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	p := start(t, s.withShortLimits(), "worker").probedWorker()
	p.waitHealthy()
	conn, err := pgx.Connect(t.Context(), s.database) // may write until it ends
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	name := pgx.Identifier{conn.Config().Database}.Sanitize()
	execute := func(statement string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), statement); err != nil {
			t.Fatal(err)
		}
	}
	execute(`ALTER DATABASE ` + name + ` SET default_transaction_read_only = on`)
	execute(`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()`)
	const reason = "transactions are read-only (default_transaction_read_only is on)"
	p.waitUnhealthy("cannot write to the database " + conn.Config().Host)
	p.waitUnhealthy("cannot acquire this worker's lock")
	p.waitUnhealthy(reason)
	if status, body := ask(t, p.url+"/readyz"); status != http.StatusServiceUnavailable || !strings.Contains(body, reason) {
		t.Errorf("/readyz: %d %s", status, body)
	}
	execute(`ALTER DATABASE ` + name + ` RESET default_transaction_read_only`)
	p.waitHealthy()
	p.loggedOnce(reason)
}

// setReadPermission sets what the broker's user may read.
func (s testEnv) setReadPermission(t *testing.T, read string) {
	t.Helper()
	s.setPermissions(t, ".*", ".*", read)
}

// setPermissions sets the permissions of the broker's user.
func (s testEnv) setPermissions(t *testing.T, configure, write, read string) {
	t.Helper()
	u, err := url.Parse(s.broker)
	if err != nil {
		t.Fatal(err)
	}
	vhost := url.PathEscape(strings.TrimPrefix(u.Path, "/"))
	address := os.Getenv(devenv.EnvBrokerAPI) + "/api/permissions/" + vhost + "/" + url.PathEscape(u.User.Username())
	body := fmt.Sprintf(`{"configure": %q, "write": %q, "read": %q}`, configure, write, read)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, address, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	res, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if text, _ := io.ReadAll(res.Body); res.StatusCode >= 300 {
		t.Fatalf("permissions: %s %s", res.Status, text)
	}
}

// A step that takes longer than the limit, a run that waits for the workspace, and a
// database outage shorter than the limit do not make the worker unhealthy.
func TestHealthyDuringLongStepAndShortOutage(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	u, err := url.Parse(s.database)
	if err != nil {
		t.Fatal(err)
	}
	r := newRelay(t, "tcp", u.Host)
	const limit = 5 * time.Second
	p := start(t, append(s.env(), "MM_ORCHESTRATOR_HEALTH_LIMIT="+limit.String(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sleep"), "worker",
		"--result-backend=disabled://", "--database-url", strings.Replace(s.database, u.Host, r.address, 1)).probedWorker()
	r.cut()
	time.Sleep(limit / 4)
	r.restore()
	eventually(t, "the database is back", func() error {
		if status, body := ask(t, p.url+"/readyz"); status != http.StatusOK {
			return errors.New(body)
		}
		return nil
	})
	long := s.submitSleep(t, 7)
	s.waitForStep(t, long, "build", "in_progress")
	s.submitSleep(t, 0)
	eventually(t, "the long step ends", func() error {
		if status, body := ask(t, p.url+"/healthz"); status != http.StatusOK {
			t.Errorf("/healthz: %d %s", status, body)
		}
		if !strings.Contains(p.stderr.String(), "step succeeded") {
			return errors.New("it runs")
		}
		return nil
	})
	if strings.Contains(p.stderr.String(), unhealthyLine) {
		t.Error("the worker was unhealthy")
	}
}

// A worker that hangs still answers probes. It is unhealthy, and the reason names what
// hangs: the loop of a consumer, or a step that runs no command.
func TestHungWorkerIsUnhealthy(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ point, reason string }{
		{"consumer.took", "consumer of queue orchestrator.run has made no progress for"},
		{"artifacts.opened", "while working"},
	} {
		t.Run(tt.point, func(t *testing.T) {
			t.Parallel()
			s := newTestEnv(t)
			path, err := builtForChaos()
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			holdAt(t, dir, tt.point)
			env := append(s.withShortLimits(), "MM_CHAOS_DIR="+dir, "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sleep")
			p := startProgram(t, path, env, "worker").probedWorker()
			p.waitHealthy()
			id := s.submitSleep(t, 0)
			p.waitUnhealthy(tt.reason)
			resume(t, dir)
			p.waitHealthy()
			s.waitForStep(t, id, "build", "succeeded")
			p.loggedOnce("has made no progress for")
		})
	}
}

// So it is with a task of the Spec workflow, such as one whose file system hangs.
func TestHungSpecTaskIsUnhealthy(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	s.writeTasks(t, "014-refresh-docs", "- [ ] T002 Write it\n")
	path, err := builtForChaos()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	holdAt(t, dir, "step.worked")
	env := s.specEnv("MM_ORCHESTRATOR_HEALTH_LIMIT="+limit.String(), "MM_CHAOS_DIR="+dir)
	p := startProgram(t, path, env, "worker").probedWorker()
	p.waitHealthy()
	submit := start(t, env, "spec", "submit", "014-refresh-docs")
	if code := submit.exit(); code != exitOK {
		t.Fatalf("spec submit: %d %s", code, submit.stderr.String())
	}
	p.waitUnhealthy("task discover_next_phase of run ")
	p.waitUnhealthy("has made no progress for")
	resume(t, dir)
	p.waitHealthy()
	p.loggedOnce("has made no progress for")
}

// A probe costs almost no processor time, however many checks there are.
func TestProbeCost(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	p := start(t, s.env(), "worker").probedWorker()
	const probes = 200
	const most = 5 * time.Millisecond
	for _, path := range []string{"/healthz", "/readyz"} {
		before := p.processorTime()
		for range probes {
			if status, body := ask(t, p.url+path); status != http.StatusOK {
				t.Fatalf("%s: %d %s", path, status, body)
			}
		}
		cost := (p.processorTime() - before) / probes
		t.Logf("%s costs %v of processor time", path, cost)
		if cost > most {
			t.Errorf("%s costs %v of processor time, more than %v", path, cost, most)
		}
	}
}

// processorTime is the processor time of all threads of the process.
func (p *process) processorTime() time.Duration {
	p.t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", p.cmd.Process.Pid))
	if err != nil || len(files) == 0 {
		p.t.Fatalf("no processor times: %v", err)
	}
	var sum time.Duration
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // the thread has ended
		}
		first, _, _ := strings.Cut(string(text), " ")
		n, err := strconv.ParseInt(first, 10, 64)
		if err != nil {
			p.t.Fatal(err)
		}
		sum += time.Duration(n)
	}
	return sum
}
