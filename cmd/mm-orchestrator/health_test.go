package main

import (
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

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// relay passes connections on to a server. It can be cut, as when the server
// is gone, and deaf: it takes connections and everything that is sent, and
// never answers.
type relay struct {
	address  string // of the relay
	close    func() // ends it: who connects is refused
	deaf     atomic.Bool
	answered atomic.Bool // something came back from the server

	mu    sync.Mutex
	gone  bool
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

// relayAt listens at an address of the caller's, until the test ends.
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
			group.Go(func() { r.pass(out, in, false) })
			group.Go(func() { r.pass(in, out, true) })
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

// keep is false, and closes both, while the server is gone.
func (r *relay) keep(in, out net.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.gone {
		_ = out.Close()
		return false
	}
	r.conns[in], r.conns[out] = struct{}{}, struct{}{}
	return true
}

func (r *relay) pass(to, from net.Conn, answer bool) {
	defer func() { _, _ = to.Close(), from.Close() }()
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if err != nil {
			return
		}
		if r.deaf.Load() {
			continue
		}
		if answer {
			r.answered.Store(true)
		}
		if _, err := to.Write(buffer[:n]); err != nil {
			return
		}
	}
}

func (r *relay) cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.gone = true
	for conn := range r.conns {
		_ = conn.Close()
	}
	clear(r.conns)
}

func (r *relay) mend() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.gone = false
}

// probed is a worker whose health is asked for.
type probed struct {
	*process
	url string
}

func (p *process) probed() probed {
	p.t.Helper()
	listen, _ := p.logLine("worker ready")["listen"].(string)
	return probed{p, "http://" + listen}
}

// turnsRed waits until /healthz is red and gives the reason.
func (p probed) turnsRed(reason string) {
	p.t.Helper()
	eventually(p.t, "/healthz is red", func() error {
		status, body := ask(p.t, p.url+"/healthz")
		if status != http.StatusServiceUnavailable || !strings.Contains(body, reason) {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
}

func (p probed) turnsGreen() {
	p.t.Helper()
	eventually(p.t, "/healthz is green", func() error {
		if status, body := ask(p.t, p.url+"/healthz"); status != http.StatusOK {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
}

const (
	redLine   = "worker cannot do its job, /healthz is red"
	greenLine = "worker is well again"
)

// toldOnce says that the log has one line for the change to red, with the
// reason, and one for the change back.
func (p probed) toldOnce(reason string) {
	p.t.Helper()
	red, _ := p.logLine(redLine)["error"].(string)
	if !strings.Contains(red, reason) {
		p.t.Errorf("the log says %q, which lacks %q", red, reason)
	}
	p.logLine(greenLine)
	for _, line := range []string{redLine, greenLine} {
		if n := strings.Count(p.stderr.String(), line); n != 1 {
			p.t.Errorf("the log says %d times: %s", n, line)
		}
	}
}

// limit is the setting with which the tests run, and how soon nothing may be
// red.
const limit = time.Second

func (s stand) impatient() environment {
	return append(s.env(), "MM_ORCHESTRATOR_HEALTH_LIMIT="+limit.String())
}

// What a worker needs is away beyond the limit, by refusing or by never
// answering: red after the limit and not before, green when it is back.
func TestHealthFollowsDatabaseAndDocker(t *testing.T) {
	t.Parallel()
	docker := "/var/run/docker.sock"
	if host := os.Getenv("DOCKER_HOST"); strings.HasPrefix(host, "unix://") {
		docker = strings.TrimPrefix(host, "unix://")
	}
	for _, tt := range []struct {
		name        string
		breakIt     func(r *relay)
		reasonOfDB  string
		reasonOfEng string
	}{
		{"gone", (*relay).cut, "reach the database", "docker"},
		{"deaf", func(r *relay) { r.deaf.Store(true) }, "reach the database", "docker"},
	} {
		mend := func(r *relay) {
			r.cut() // what was swallowed is not repeated
			r.deaf.Store(false)
			r.mend()
		}
		t.Run("database "+tt.name, func(t *testing.T) {
			t.Parallel()
			s := newStand(t)
			u, err := url.Parse(s.database)
			if err != nil {
				t.Fatal(err)
			}
			r := newRelay(t, "tcp", u.Host)
			p := start(t, s.impatient(), "worker", "--result-backend=disabled://",
				"--database-url", strings.Replace(s.database, u.Host, r.address, 1)).probed()
			p.turnsGreen()
			begin := time.Now()
			tt.breakIt(r)
			p.turnsRed(tt.reasonOfDB)
			if took := time.Since(begin); took < limit-lookTime/2 {
				t.Errorf("red after %v", took)
			}
			mend(r)
			p.turnsGreen()
			p.toldOnce(tt.reasonOfDB)
		})
		t.Run("docker "+tt.name, func(t *testing.T) {
			t.Parallel()
			s := newStand(t)
			r := newRelay(t, "unix", docker)
			p := start(t, append(s.impatient(), "DOCKER_HOST=unix://"+r.address), "worker").probed()
			eventually(t, "docker has answered", func() error {
				if !r.answered.Load() {
					return errors.New("not yet")
				}
				return nil
			})
			p.turnsGreen()
			tt.breakIt(r)
			p.turnsRed(tt.reasonOfEng)
			mend(r)
			p.turnsGreen()
			p.toldOnce(tt.reasonOfEng)
		})
	}
}

// The queue is deleted while the worker may not consume any more: red until it
// may again.
func TestHealthFollowsThePermissionToConsume(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	p := start(t, s.impatient(), "worker").probed()
	p.turnsGreen()
	conn, err := amqp.Dial(s.broker)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	s.permit(t, "^$")
	if _, err := ch.QueueDelete("orchestrator.run", false, false, false); err != nil {
		t.Fatal(err)
	}
	const reason = "ACCESS_REFUSED"
	p.turnsRed(reason)
	s.permit(t, ".*")
	p.turnsGreen()
	p.toldOnce(reason)
}

// permit says what the broker's user may read in this stand.
func (s stand) permit(t *testing.T, read string) {
	t.Helper()
	s.permitAll(t, ".*", ".*", read)
}

// permitAll says what the broker's user may do in this stand.
func (s stand) permitAll(t *testing.T, configure, write, read string) {
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

// Neither a step that takes longer than the limit, nor a run that waits for the
// workspace, nor a database that is back in time is a reason for red.
func TestHealthStaysGreen(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	u, err := url.Parse(s.database)
	if err != nil {
		t.Fatal(err)
	}
	r := newRelay(t, "tcp", u.Host)
	const limit = 5 * time.Second
	p := start(t, append(s.env(), "MM_ORCHESTRATOR_HEALTH_LIMIT="+limit.String(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sleep"), "worker",
		"--result-backend=disabled://", "--database-url", strings.Replace(s.database, u.Host, r.address, 1)).probed()
	r.cut()
	time.Sleep(limit / 4)
	r.mend()
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
	if strings.Contains(p.stderr.String(), redLine) {
		t.Error("it was red")
	}
}

// A worker that hangs in itself answers every question, and does nothing. It
// is red with the name of what hangs: the loop of a consumer, or a step that
// runs no command.
func TestAHungWorkerIsRed(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ point, reason string }{
		{"consumer.took", "consumer of queue orchestrator.run has made no progress for"},
		{"artifacts.opened", "while working"},
	} {
		t.Run(tt.point, func(t *testing.T) {
			t.Parallel()
			s := newStand(t)
			path, err := builtForChaos()
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			setTrap(t, dir, tt.point)
			env := append(s.impatient(), "MM_CHAOS_DIR="+dir, "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sleep")
			p := startProgram(t, path, env, "worker").probed()
			p.turnsGreen()
			id := s.submitSleep(t, 0)
			p.turnsRed(tt.reason)
			resume(t, dir)
			p.turnsGreen()
			s.waitForStep(t, id, "build", "succeeded")
			p.toldOnce("has made no progress for")
		})
	}
}

// A probe costs next to no processor time, however much there is to look at.
func TestAProbeCostsLittle(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	p := start(t, s.env(), "worker").probed()
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

// processorTime is what all threads of the process have used.
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
