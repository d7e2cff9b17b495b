package orchestrator

import (
	"cmp"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/policy"
)

func TestVerifyChecksContainers(t *testing.T) {
	t.Parallel()
	well := compose.Container{ID: "1", Name: "p-api-1", Service: "api", State: "running", Health: "healthy"}
	with := func(change func(*compose.Container)) compose.Container {
		c := well
		change(&c)
		return c
	}
	plain := with(func(c *compose.Container) { c.Health = "" })
	started := with(func(c *compose.Container) { c.Health = ""; c.StartedAt = time.Now().Add(time.Hour) }) // as the engine's clock has it
	starting := with(func(c *compose.Container) { c.Health = "starting" })
	failing := with(func(c *compose.Container) { c.Health = "starting"; c.HealthExit, c.HealthOutput = 1, "no answer\n" })
	unhealthy := with(func(c *compose.Container) { c.Health = "unhealthy"; c.Restarts = 2 })
	restarting := with(func(c *compose.Container) { c.State = "restarting"; c.ExitCode = 1; c.Restarts = 3 })
	exited := with(func(c *compose.Container) { c.State = "exited"; c.ExitCode = 3 })
	created := with(func(c *compose.Container) { c.State = "created"; c.Error = "no such device" })
	const http200, none = "Attempt 1: status=200", "No healthcheck configured; skipping HTTP verification."
	for _, test := range []struct {
		name string
		// states are what the engine reports, one after the other; the last repeats.
		states []compose.Container
		err    error
		nohttp bool
		enough bool // says runningIsEnough
		// timeout is the plan's, in seconds. 0 means a long one where success is
		// wanted, and a short one otherwise.
		timeout int
		log     string // without its first line
		text    string // of the failure, "" for success
		warned  bool
	}{
		{name: "well", states: []compose.Container{well}},
		{name: "well without a health check of its own", states: []compose.Container{plain}},
		{name: "starting, then well", states: []compose.Container{starting, starting, well}},
		{name: "starting, then unhealthy", states: []compose.Container{starting, unhealthy},
			log:  "\nContainer p-api-1 is unhealthy, restarted 2 times\nContainer p-api-1 is unhealthy, restarted 2 times. Last lines of its log:\nlast words ***",
			text: "Container p-api-1 is unhealthy, restarted 2 times. Last lines of its log:\nlast words ***"},
		{name: "unhealthy, then well", states: []compose.Container{unhealthy, well},
			log: "\nContainer p-api-1 is unhealthy, restarted 2 times\nContainers of service api are healthy"},
		{name: "starting at the deadline", states: []compose.Container{starting},
			log:  "\nContainer p-api-1 is starting, since docker has not finished its first health check. Last lines of its log:\nlast words ***",
			text: "Service api is not proven to be healthy: Container p-api-1 is starting, since docker has not finished its first health check. Last lines of its log:\nlast words ***"},
		{name: "no health check, starting at the deadline", nohttp: true, states: []compose.Container{failing},
			log:  "\nContainer p-api-1 is starting. Its health check ended with code 1 and printed:\nno answer\nLast lines of its log:\nlast words ***",
			text: "Container p-api-1 is starting. Its health check ended with code 1 and printed:\nno answer\nLast lines of its log:\nlast words ***"},
		{name: "unhealthy to the end", states: []compose.Container{unhealthy},
			log:  "\nContainer p-api-1 is unhealthy, restarted 2 times\nContainer p-api-1 is unhealthy, restarted 2 times. Last lines of its log:\nlast words ***",
			text: "Container p-api-1 is unhealthy, restarted 2 times. Last lines of its log:\nlast words ***"},
		{name: "restarting", states: []compose.Container{restarting},
			log:  "\nContainer p-api-1 is restarting (exit code 1), restarted 3 times\nContainer p-api-1 is restarting (exit code 1), restarted 3 times. Last lines of its log:\nlast words ***",
			text: "Container p-api-1 is restarting (exit code 1), restarted 3 times. Last lines of its log:\nlast words ***"},
		{name: "never started", states: []compose.Container{created},
			log:  "\nContainer p-api-1 is created: no such device\nContainer p-api-1 is created: no such device. Last lines of its log:\nlast words ***",
			text: "Container p-api-1 is created: no such device. Last lines of its log:\nlast words ***"},
		{name: "engine unreachable", err: fmt.Errorf("cannot list: %w", compose.ErrUnreachable), warned: true},
		{name: "no such container, and no compose command"},
		{name: "no health check at all", nohttp: true, states: []compose.Container{plain},
			text: "Service api is not proven to be healthy: service api runs, but neither the plan nor the container has a health check. Give it one, or say that running is enough: " +
				`in the plan by "runningIsEnough": true among the parameters of verify, or by MM_ORCHESTRATOR_RUNNING_IS_ENOUGH. If it has to do its work and end, "oneShot": true says so`},
		{name: "running is enough", nohttp: true, enough: true, states: []compose.Container{plain}},
		{name: "no health check, docker says healthy", nohttp: true, states: []compose.Container{well}},
		{name: "no health check, no engine", nohttp: true, err: compose.ErrUnreachable, warned: true,
			text: "Service api is not proven to be healthy: the plan has no health check, and the worker has no docker engine to see the containers of service api"},
		{name: "no health check, no such container", nohttp: true,
			text: "Service api is not proven to be healthy: the plan has no health check, and docker has no container of service api in project moonmind"},
		{name: "ends while it settles", nohttp: true, enough: true, states: []compose.Container{started, exited},
			log:  "\nContainer p-api-1 is exited (exit code 3)\nContainer p-api-1 is exited (exit code 3). Last lines of its log:\nlast words ***",
			text: "Container p-api-1 is exited (exit code 3). Last lines of its log:\nlast words ***"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			b := newTestEnv(t, "A_TOKEN=hushhush")
			service := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
			defer service.Close()
			if test.text != "" {
				b.config.StateTimeout = 2 * time.Second
			}
			b.config.Engine = &fakeEngine{log: "last words hushhush\n", containers: func(call int, _ string) ([]compose.Container, error) {
				if test.err != nil || len(test.states) == 0 {
					return nil, test.err
				}
				return []compose.Container{test.states[min(call, len(test.states))-1]}, nil
			}}
			timeout := cmp.Or(test.timeout, 2)
			if test.timeout == 0 && test.text == "" {
				timeout = 30
			}
			first, parameters := http200, fmt.Sprintf(`{"healthcheck": {"url": %q, "timeoutSeconds": %d, "intervalSeconds": 0.2}}`, service.URL, timeout)
			if test.nohttp {
				first, parameters = none, fmt.Sprintf(`{"service": "api", "runningIsEnough": %t}`, test.enough)
			}
			b.plan(`[{"name": "verify", "parameters": ` + parameters + `}]`)
			if test.text == "" {
				b.succeed("verify")
			} else {
				failure, outcome := b.fail("verify")
				same(t, "text", failure.Error(), test.text)
				same(t, "artifacts", paths(outcome), "verify_log:verify.log")
				if outcome.Payload != nil {
					t.Errorf("payload %s", outcome.Payload)
				}
			}
			same(t, "log", withoutNotes(b.artifact("verify.log")), first+test.log)
			if warned := strings.Contains(b.logged.String(), "verification relies on HTTP alone"); warned != test.warned {
				t.Errorf("warned %t, want %t", warned, test.warned)
			}
		})
	}
}

// withoutNotes returns a log without the lines in brackets, which the Python
// worker does not write.
func withoutNotes(log string) string {
	lines := strings.Split(log, "\n")
	return strings.Join(slices.DeleteFunc(lines, func(line string) bool { return strings.HasPrefix(line, "[") }), "\n")
}

func TestAContainerThatKeepsRestartingIsNotStable(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.config.StateTimeout, b.config.QuietPeriod = 2*time.Second, time.Hour
	b.config.Engine = &fakeEngine{containers: func(call int, _ string) ([]compose.Container, error) {
		return []compose.Container{{ID: "1", Name: "p-api-1", State: "running", Restarts: call}}, nil
	}}
	b.plan(`[{"name": "verify", "parameters": {"runningIsEnough": true}}]`)
	failure, _ := b.fail("verify")
	if !strings.HasPrefix(failure.Error(), "Containers of service api did not stay up for 1h0m0s\nContainer p-api-1 is running, restarted ") {
		t.Error(failure)
	}
}

func TestVerifyEndsWithItsDeadline(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	service := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	defer service.Close()
	b.plan(fmt.Sprintf(`[{"name": "verify", "parameters": {"healthcheck": {"url": %q, "timeoutSeconds": 1, "intervalSeconds": 5.0}}}]`, service.URL))
	begun := time.Now()
	failure, _ := b.fail("verify")
	if took := time.Since(begun); took > 2*time.Second+busy || took < 800*time.Millisecond {
		t.Errorf("took %s", took)
	}
	same(t, "text", failure.Error(), "Health check for "+service.URL+" timed out after 1s")
	same(t, "log", withoutNotes(b.artifact("verify.log")), "Attempt 1: timed out\nHealth check timed out before reaching expected status")

	b.plan(`[{"name": "verify", "parameters": {"healthcheck": {"timeoutSeconds": 0}}}]`)
	failure, _ = b.fail("verify")
	same(t, "text", failure.Error(), "Health check for None timed out after 0s")
	same(t, "log", withoutNotes(b.artifact("verify.log")), "Attempt 1: Request URL is missing an 'http://' or 'https://' protocol.\nHealth check timed out before reaching expected status")
}

func TestPausesGrowAndEndWithTheDeadline(t *testing.T) {
	t.Parallel()
	now := time.Unix(0, 0)
	clock := func() time.Time { return now }
	pause := backoff{next: time.Millisecond, most: 4 * time.Millisecond}
	for _, want := range []time.Duration{2, 4, 4} {
		if !pause.wait(t.Context(), clock, now.Add(time.Hour)) || pause.next != want*time.Millisecond {
			t.Errorf("next pause %s, want %dms", pause.next, want)
		}
	}
	pause = backoff{next: time.Hour, most: time.Hour}
	if !pause.wait(t.Context(), clock, now.Add(2*time.Millisecond)) {
		t.Error("no pause")
	}
}

func TestTheHealthURLCanBeReplaced(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/healthz" || r.Method != http.MethodHead {
			http.NotFound(w, r)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	}))
	defer service.Close()
	b.config.HealthURLs = map[string]string{"api": service.URL + "/healthz"}
	b.plan(`[{"name": "verify", "parameters": {"healthcheck": {"url": "http://api:5000/health", "method": "head", "expectedStatus": "204"}}}]`)
	b.succeed("verify")
	same(t, "log", withoutNotes(b.artifact("verify.log")), "Health check URL of the plan replaced by configuration: http://api:5000/health -> "+service.URL+"/healthz\nAttempt 1: status=204")
	if !strings.Contains(b.logged.String(), "health check URL of the plan replaced by configuration") {
		t.Error("the replacement is not logged")
	}
}

// An answer that ends in the middle of its body is told from none at all, in the words of httpx.
func TestAnswersThatEndInTheirBody(t *testing.T) {
	t.Parallel()
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, out, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		head := map[string]string{"/length": "Content-Length: 20\r\n\r\nok", "/chunks": "Transfer-Encoding: chunked\r\n\r\n5\r\nok"}[r.URL.Path]
		_, _ = out.WriteString("HTTP/1.1 200 OK\r\n" + head)
		_ = out.Flush()
	}))
	defer service.Close()
	for path, want := range map[string]string{
		"/length": "peer closed connection without sending complete message body (received 2 bytes, expected 20)",
		"/chunks": "peer closed connection without sending complete message body (incomplete chunked read)",
		"/head":   "Server disconnected without sending a response.",
	} {
		if status, err := ProbeHealth(t.Context(), nil, service.URL+path, 5*time.Second); err == nil || err.Error() != want {
			t.Errorf("%s: status %d, %v; want %s", path, status, err, want)
		}
	}
}

// As httpx does: a user and password in the URL are sent as basic authentication,
// percent-decoded. The password is in no row and no log.
func TestHealthChecksSendTheLoginOfTheirURL(t *testing.T) {
	t.Parallel()
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, sent := r.BasicAuth(); !sent || user != "u@x" || password != "geheim/99" {
			w.WriteHeader(http.StatusUnauthorized)
		}
	}))
	defer service.Close()
	for _, test := range []struct{ login, want string }{
		{"u%40x:geheim%2F99", ""},
		{"u%40x:geheim", "Health check for http://u%40x:***@" + service.Listener.Addr().String() + "/ timed out after 1s"},
	} {
		b := newTestEnv(t)
		address := "http://" + test.login + "@" + service.Listener.Addr().String() + "/"
		b.config.HealthURLs = map[string]string{"api": address}
		b.plan(`[{"name": "verify", "parameters": {"healthcheck": {"url": "http://u:geheim@api:5000/health", "timeoutSeconds": 1, "intervalSeconds": 1}}}]`)
		if test.want == "" {
			b.succeed("verify")
		} else {
			failure, _ := b.fail("verify")
			same(t, "text", failure.Error(), test.want)
		}
		if text := b.artifact("verify.log") + b.logged.String(); strings.Contains(text, "geheim") {
			t.Errorf("the password is shown:\n%s", text)
		}
	}
}

// A key may stand in the query of a configured URL, by whatever name. Nobody but the
// operator knows it, so that no text has it; of the plan's URL everybody knows the query.
func TestTheQueryOfAConfiguredHealthURLIsNotShown(t *testing.T) {
	t.Parallel()
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.FormValue("token")+r.FormValue("code") != "SuperSecret99" {
			w.WriteHeader(http.StatusUnauthorized)
		}
	}))
	defer service.Close()
	for _, name := range []string{"token", "code"} {
		for _, byPolicy := range []bool{false, true} {
			for _, expected := range []string{"200", "418"} {
				b := newTestEnv(t)
				base := service.URL + "/healthz?" + name + "="
				if byPolicy {
					b.withPolicy("services: {api: {verify: {healthURL: \"" + base + "SuperSecret99\"}}}\n")
				} else {
					b.config.HealthURLs = map[string]string{"api": base + "SuperSecret99"}
				}
				b.plan(`[{"name": "verify", "parameters": {"healthcheck": {"url": "http://api:5000/health?x=y", "timeoutSeconds": 1, "intervalSeconds": 1, "expectedStatus": ` + expected + `}}}]`)
				if expected == "200" {
					b.succeed("verify")
				} else {
					failure, _ := b.fail("verify")
					same(t, "text", failure.Error(), "Health check for "+base+"*** timed out after 1s")
				}
				log := b.artifact("verify.log")
				if want := "http://api:5000/health?x=y -> " + base + "***\n"; !strings.Contains(log, want) {
					t.Errorf("no %q in:\n%s", want, log)
				}
				if text := log + b.logged.String(); strings.Contains(text, "SuperSecret99") {
					t.Errorf("the key is shown:\n%s", text)
				}
			}
		}
	}
}

func TestBadHealthChecksAreRecorded(t *testing.T) {
	t.Parallel()
	for parameter, text := range map[string]string{
		`[1]`:                        "Plan parameter healthcheck must be a mapping",
		`{"timeoutSeconds": "x"}`:    `Plan parameter timeoutSeconds must be a number, not "x"`,
		`{"timeoutSeconds": 1e99}`:   "Plan parameter timeoutSeconds is too large",
		`{"expectedStatus": null}`:   "Plan parameter expectedStatus must be a number",
		`{"intervalSeconds": -1}`:    "sleep length must be non-negative and below 2147483648 seconds",
		`{"intervalSeconds": "nan"}`: `Plan parameter intervalSeconds must be a number, not "nan"`,
		`{"url": ["x"]}`:             "Plan parameter url must be a text",
	} {
		b := newTestEnv(t)
		b.plan(`[{"name": "verify", "parameters": {"healthcheck": ` + parameter + `}}]`)
		failure, _ := b.fail("verify")
		same(t, "text", failure.Error(), text)
	}
}

func TestTheTargetIsWhatThePlanNames(t *testing.T) {
	t.Parallel()
	for steps, want := range map[string]string{
		`[]`: "moonmind api",
		`[{"name": "verify", "parameters": {"service": "web"}}]`:                                                                 "moonmind web",
		`[{"name": "build", "parameters": {"composeProject": "p", "service": "web"}}]`:                                           "p web",
		`[{"name": "restart", "parameters": {"command": ["docker", "compose", "--project-name", "q", "up", "-d", "w"]}}]`:        "q w",
		`[{"name": "restart", "parameters": {"command": "x"}}, {"name": "build", "parameters": {"command": ["git", "status"]}}]`: "moonmind api",
	} {
		p, failure := parsePlan([]byte(steps))
		if failure != nil {
			t.Fatal(failure)
		}
		project, service := p.target(*policy.Default().Services["api"])
		same(t, steps, project+" "+service, want)
	}
}
