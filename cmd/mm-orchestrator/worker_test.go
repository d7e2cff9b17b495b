package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

func TestStartLineIsCompleteAndHasNoSecret(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	p := start(t, append(s.env(), "POSTGRES_PASSWORD=s3cret", "SOME_TOKEN=s3cret"), "worker", "--queue=box.run", "--hostname=w1@box")
	line := p.logLine("worker ready")
	for key, want := range map[string]any{
		"version": "v0.0.0-test", "node": "w1@box", "queue": "box.run", "concurrency": 1.0, "prefetch": 1.0, "results": "pickle",
		"workspace": s.workspace, "compose_project": "moonmind", "artifact_root": s.workspace + "/var/artifacts/spec_workflows",
		"docker": "local", "statsd": "off",
	} {
		if line[key] != want {
			t.Errorf("%s is %v, want %v", key, line[key], want)
		}
	}
	for key, part := range map[string]string{"broker": "127.0.0.1:", "database": "127.0.0.1:", "listen": "127.0.0.1:"} {
		if text, _ := line[key].(string); !strings.Contains(text, part) {
			t.Errorf("%s is %v", key, line[key])
		}
	}
	p.signal(syscall.SIGTERM)
	p.exit()
	for _, password := range []string{"s3cret", "mm:mm@"} {
		if strings.Contains(p.stderr.String(), password) {
			t.Errorf("the log has %q", password)
		}
	}
}

func TestSignalEndsAnIdleWorker(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			p := start(t, s.env(), "worker", "--queue", "idle."+sig.String())
			p.logLine("worker ready")
			begin := time.Now()
			p.signal(sig)
			if code := p.exit(); code != exitOK {
				t.Errorf("exit code %d", code)
			}
			if took := time.Since(begin); took > 5*time.Second+slowMachine {
				t.Errorf("the end took %v", took)
			}
		})
	}
}

func TestSignalEndsAWaitingWorker(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	for _, args := range [][]string{{"--broker-url=amqp://127.0.0.1:1"}, {"--database-url=postgres://127.0.0.1:1/x"}} {
		p := start(t, append(s.env(), "MM_ORCHESTRATOR_WAIT=1h"), append([]string{"worker"}, args...)...)
		eventually(t, "the worker waits", func() error {
			if text := p.stderr.String(); !strings.Contains(text, "broker does not answer yet") && !strings.Contains(text, "start is delayed") {
				return errors.New("no line about it")
			}
			return nil
		})
		p.signal(syscall.SIGTERM)
		if code := p.exit(); code != exitOK {
			t.Errorf("%s: exit code %d", args, code)
		}
	}
}

// A step that runs at SIGTERM finishes and is recorded; the exit code is 0.
func TestSignalLetsARunningStepFinish(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	p := start(t, append(s.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sleep"), "worker")
	p.logLine("worker ready")
	id := s.submitSleep(t, 3)
	s.waitForStep(t, id, "build", "in_progress")
	p.signal(syscall.SIGTERM)
	if code := p.exit(); code != exitOK {
		t.Errorf("exit code %d", code)
	}
	if got := s.step(t, id, "build").Status; got != "succeeded" {
		t.Errorf("build is %s", got)
	}
}

// A second signal, or the end of the grace, kills the step's processes and returns its
// message to the queue. The next worker runs the step.
func TestRunningStepIsReturnedToTheQueue(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		env  string
		then func(p *process)
	}{
		{"second signal", "MM_ORCHESTRATOR_SHUTDOWN_GRACE=1h", func(p *process) {
			p.logLine("stopping: running steps may finish; a second signal cancels them")
			p.signal(syscall.SIGTERM)
		}},
		{"grace is over", "MM_ORCHESTRATOR_SHUTDOWN_GRACE=100ms", func(*process) {}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newTestEnv(t)
			env := append(s.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sleep", tt.env)
			p := start(t, env, "worker")
			p.logLine("worker ready")
			id := s.submitSleep(t, 600)
			s.waitForStep(t, id, "build", "in_progress")
			begin := time.Now()
			p.signal(syscall.SIGINT)
			tt.then(p)
			if code := p.exit(); code != exitOK {
				t.Errorf("exit code %d", code)
			}
			if took := time.Since(begin); took > 15*time.Second {
				t.Errorf("the end took %v", took)
			}
			next := start(t, env, "worker")
			next.logLine("worker ready")
			eventually(t, "the step is started again", func() error {
				if starts := s.step(t, id, "build").Starts; starts < 2 {
					return fmt.Errorf("it was started %d times", starts)
				}
				return nil
			})
		})
	}
}

// A run is counted in StatsD, in the order of its events, and in Prometheus.
func TestRunMetrics(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	statsd, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = statsd.Close() })
	_, port, _ := net.SplitHostPort(statsd.LocalAddr().String())
	p := start(t, append(s.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sleep", "STATSD_HOST=127.0.0.1", "STATSD_PORT="+port, "ORCHESTRATOR_METRICS_PREFIX=box."), "worker")
	listen, _ := p.logLine("worker ready")["listen"].(string)
	id := s.submitSleep(t, 0)
	s.waitForStep(t, id, "build", "succeeded")

	var names []string
	_ = statsd.SetReadDeadline(time.Now().Add(testTimeout))
	for range 4 {
		datagram := make([]byte, 1500)
		n, err := statsd.Read(datagram)
		if err != nil {
			t.Fatalf("after %q: %v", names, err)
		}
		name, value, _ := strings.Cut(string(datagram[:n]), ":")
		if strings.HasSuffix(name, ".duration") {
			value = value[strings.Index(value, "|"):]
		}
		names = append(names, name+":"+value)
	}
	slices.Sort(names)
	want := []string{"box.runs.status.running:1|c", "box.steps.build.duration:|ms", "box.steps.build.started:1|c", "box.steps.build.succeeded:1|c"}
	if !slices.Equal(names, want) {
		t.Errorf("datagrams %q, want %q", names, want)
	}
	_, body := ask(t, "http://"+listen+"/metrics")
	for _, line := range []string{
		`mm_orchestrator_steps_started_total{step="build"} 1`,
		`mm_orchestrator_step_duration_seconds_count{status="succeeded",step="build"} 1`,
		`mm_orchestrator_run_status_total{status="running"} 1`,
	} {
		if !strings.Contains(body, line) {
			t.Errorf("/metrics lacks %s", line)
		}
	}
}

// submitSleep publishes a run whose only step takes some seconds.
func (s testEnv) submitSleep(t *testing.T, seconds int) string {
	t.Helper()
	return s.submit(t, "--without=analyze", "--without=patch", "--without=restart", "--without=verify", "--without=rollback",
		fmt.Sprintf(`--set=build.command=["sleep","%d"]`, seconds))
}

func (s testEnv) step(t *testing.T, run, name string) stepLine {
	t.Helper()
	for _, step := range s.run(t, run).Steps {
		if step.Step == name {
			return step
		}
	}
	t.Fatalf("run %s has no step %s", run, name)
	return stepLine{}
}

func (s testEnv) waitForStep(t *testing.T, run, name, status string) {
	t.Helper()
	eventually(t, "step "+name+" is "+status, func() error {
		if got := s.step(t, run, name).Status; got != status {
			return fmt.Errorf("it is %s", got)
		}
		return nil
	})
}

// Without a consumer the health endpoints report the worker as unhealthy, with the
// reason, until it consumes again.
func TestHealthFollowsTheConsumer(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	p := start(t, append(s.env(), "MM_ORCHESTRATOR_HEALTH_LIMIT=100ms"), "worker")
	listen, _ := p.logLine("worker ready")["listen"].(string)
	env := append(s.env(), "MM_ORCHESTRATOR_LISTEN="+listen)

	for _, args := range [][]string{{"health"}, {"health", "--ready"}} {
		if h := start(t, env, args...); h.exit() != exitOK || h.stdout.String() != "ok\n" {
			t.Errorf("%s: exit %d: %s%s", args, h.code, h.stdout.String(), h.stderr.String())
		}
	}

	// A queue with other arguments keeps the worker from declaring its own.
	conn, err := amqp.Dial(s.broker)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the queue is replaced by one of another shape", func() error {
		if _, err := ch.QueueDelete("orchestrator.run", false, false, false); err != nil {
			return err
		}
		_, err := ch.QueueDeclare("orchestrator.run", true, false, false, false, amqp.Table{"x-max-length": int32(7)})
		if err != nil {
			// The worker was quicker; a refusal has closed the channel.
			if ch, err = conn.Channel(); err != nil {
				t.Fatal(err)
			}
			return errors.New("the worker declared it first")
		}
		return nil
	})
	eventually(t, "the worker is unhealthy and says why", func() error {
		status, body := ask(t, "http://"+listen+"/healthz")
		if status != http.StatusServiceUnavailable || !strings.Contains(body, "x-max-length") {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
	if h := start(t, env, "health"); h.exit() != exitFailure || !strings.Contains(h.stderr.String(), "x-max-length") {
		t.Errorf("health: exit %d: %s", h.code, h.stderr.String())
	}
	if status, body := ask(t, "http://"+listen+"/metrics"); status != http.StatusOK || !strings.Contains(body, `mm_orchestrator_build_info{version="v0.0.0-test"} 1`) {
		t.Errorf("metrics: %d\n%s", status, body)
	}

	if _, err := ch.QueueDelete("orchestrator.run", false, false, false); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the worker is healthy again", func() error {
		if status, body := ask(t, "http://"+listen+"/healthz"); status != http.StatusOK {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
}

// Without its database a worker stays healthy for the health limit, because it
// continues when the database is back, but it is not ready.
func TestReadinessFollowsTheDatabase(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	u, err := url.Parse(s.database)
	if err != nil {
		t.Fatal(err)
	}
	r := newRelay(t, "tcp", u.Host)
	p := start(t, s.env(), "worker", "--database-url", strings.Replace(s.database, u.Host, r.address, 1))
	listen, _ := p.logLine("worker ready")["listen"].(string)
	if status, body := ask(t, "http://"+listen+"/readyz"); status != http.StatusOK {
		t.Errorf("/readyz: %d %s", status, body)
	}
	r.close()
	if status, body := ask(t, "http://"+listen+"/readyz"); status != http.StatusServiceUnavailable || !strings.Contains(body, r.address) {
		t.Errorf("/readyz without a database: %d %s", status, body)
	}
	if status, body := ask(t, "http://"+listen+"/healthz"); status != http.StatusOK {
		t.Errorf("/healthz without a database: %d %s", status, body)
	}
	relayAt(t, "tcp", r.address, u.Host)
	eventually(t, "ready again", func() error {
		if status, body := ask(t, "http://"+listen+"/readyz"); status != http.StatusOK {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
}

func TestHealthWithoutWorker(t *testing.T) {
	t.Parallel()
	other := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(other.Close)
	address := strings.TrimPrefix(other.URL, "http://")
	for _, tt := range []struct {
		env  environment
		code int
		want string
	}{
		{environment{"MM_ORCHESTRATOR_LISTEN=127.0.0.1:1"}, exitFailure, "no worker answers at 127.0.0.1:1: connection refused, nothing listens there"},
		{environment{"MM_ORCHESTRATOR_LISTEN="}, exitConfig, "MM_ORCHESTRATOR_LISTEN is empty"},
		{environment{"MM_ORCHESTRATOR_LISTEN=" + address}, exitFailure, "another program than a worker answers at " + address + ": status 404. Set MM_ORCHESTRATOR_LISTEN"},
	} {
		got := invoke(t, tt.env, "health")
		if got.code != tt.code || !strings.Contains(got.stderr, tt.want) {
			t.Errorf("exit %d: %s", got.code, got.stderr)
		}
	}
}

func TestProbeAddress(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"127.0.0.1:9808": "127.0.0.1:9808", ":9808": "127.0.0.1:9808", "0.0.0.0:9808": "127.0.0.1:9808", "[::]:9808": "[::1]:9808", "box:1": "box:1",
	} {
		if got := probeAddress(in); got != want {
			t.Errorf("probeAddress(%q) = %q, want %q", in, got, want)
		}
	}
}

func ask(t *testing.T, address string) (status int, body string) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
	res, err := client.Get(address)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(text)
}

// Two workers run on one machine, although only one can listen on the default port.
func TestSecondWorkerListensOnAFreePort(t *testing.T) {
	t.Parallel()
	// It does not matter who uses the port, this test or another program.
	if taken, err := net.Listen("tcp", "127.0.0.1:9808"); err == nil {
		defer taken.Close()
	}
	s := newTestEnv(t)
	p := start(t, append(s.env(), "MM_ORCHESTRATOR_LISTEN=127.0.0.1:9808"), "worker")
	at, _ := p.logLine("worker ready")["listen"].(string)
	if at == "" || at == "127.0.0.1:9808" {
		t.Errorf("it listens at %q", at)
	}
	if line := p.logLine("default address for metrics and health checks is in use, listening on a free port: set MM_ORCHESTRATOR_LISTEN to give each worker its own address"); line["listen"] != at {
		t.Errorf("logged %v, listens at %s", line["listen"], at)
	}
	if status, body := ask(t, "http://"+at+"/healthz"); status != http.StatusOK {
		t.Errorf("%d %s", status, body)
	}
	p.signal(syscall.SIGTERM)
	if code := p.exit(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
