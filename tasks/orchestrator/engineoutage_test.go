package orchestrator

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moby/moby/client"

	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/compose"
)

// An engineProxy stands before the engine of the test, as a docker socket proxy does.
type engineProxy struct {
	mu sync.Mutex
	// spoil says what becomes of a request, by its own answer: nil to leave it alone.
	spoil func(*http.Request) spoiling
	// spoiled counts the requests that were.
	spoiled int
}

// A spoiling answers a request in place of the proxy. next has the engine answer.
type spoiling func(w http.ResponseWriter, r *http.Request, next http.Handler)

// unavailable is what a proxy answers while the engine starts again.
func unavailable(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
	w.WriteHeader(http.StatusServiceUnavailable)
	fmt.Fprint(w, "<html><body><h1>503 Service Unavailable</h1>\n</body></html>\n")
}

// cutOff ends a connection in the middle of an answer.
func cutOff(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", "1000")
	fmt.Fprint(w, `[{"Id": "`)
	// A connection that ends before the answer begins is made again by the client.
	if err := http.NewResponseController(w).Flush(); err != nil {
		panic(err)
	}
	panic(http.ErrAbortHandler)
}

// refused is the engine's answer while something is in the way.
func refused(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
	w.Header().Set("Api-Version", "1.41")
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusConflict)
	fmt.Fprint(w, `{"message": "conflict with something that goes on"}`)
}

// lostAnswer lets the engine do what it was asked, and loses the answer.
func lostAnswer(w http.ResponseWriter, r *http.Request, next http.Handler) {
	next.ServeHTTP(httptest.NewRecorder(), r)
	w.WriteHeader(http.StatusGatewayTimeout)
}

func (p *engineProxy) set(spoil func(*http.Request) spoiling) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.spoil, p.spoiled = spoil, 0
}

func (p *engineProxy) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.spoiled
}

// throughProxy lets the worker, but not compose, reach its engine through a proxy.
func (c *composeEnv) throughProxy() *engineProxy {
	c.t.Helper()
	p := new(engineProxy)
	scheme, address, _ := strings.Cut(c.engine.Host(), "://")
	if scheme != "unix" && scheme != "tcp" {
		c.t.Fatalf("the engine at %s cannot be reached through a proxy", c.engine.Host())
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, scheme, address)
	}}
	next := &httputil.ReverseProxy{Transport: transport, Rewrite: func(r *httputil.ProxyRequest) {
		r.Out.URL.Scheme, r.Out.URL.Host = "http", client.DummyHost
	}}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		var spoil spoiling
		if p.spoil != nil {
			if spoil = p.spoil(r); spoil != nil {
				p.spoiled++
			}
		}
		p.mu.Unlock()
		if spoil != nil {
			spoil(w, r, next)
			return
		}
		next.ServeHTTP(w, r)
	}))
	engine, err := compose.NewEngine(compose.EngineConfig{Host: strings.Replace(server.URL, "http:", "tcp:", 1)})
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		engine.Close()
		server.Close()
		transport.CloseIdleConnections()
	})
	c.config.Engine = engine
	return p
}

// oneService is a layout whose target compose can replace.
var oneService = layout{files: map[string]string{"compose.yaml": "services:\n  web: {build: ./web, volumes: [/anonymous]}" + otherService}}

// A short fault at a run's first look at its containers costs nothing: the run can be
// taken back as any other.
func TestAMomentaryFaultOfTheEngineDegradesNoRun(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]spoiling{
		"a connection that is cut":  cutOff,
		"a proxy without a server":  unavailable,
		"compose without an engine": nil,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newLayoutEnv(t, oneService, composePrograms(t)["newest"])
			before := c.state()
			proxy := c.throughProxy()
			looks := 0
			proxy.set(func(r *http.Request) spoiling {
				filters := r.URL.Query().Get("filters")
				if spoil == nil || !strings.HasSuffix(r.URL.Path, "/containers/json") || !strings.Contains(filters, c.project) || strings.Contains(filters, ".service=") {
					return nil
				}
				// The first is that of the look before the run, which asks again, and the
				// third the first one of the step.
				if looks++; looks == 1 || looks == 3 {
					return spoil
				}
				return nil
			})
			if spoil == nil {
				c.testEnv.program("compose", `case "$*" in *"ps --all --quiet"*) [ -e "$0.failed" ] || { touch "$0.failed"; echo "Cannot connect to the Docker daemon" >&2; exit 1; } ;; esac
exec `+c.composeEnv.program+` "$@"`)
				c.config.Compose = compose.Program{Standalone: c.bin + "/compose"}
			}
			undo := c.change()
			c.succeed("build")
			if spoil != nil && proxy.count() != 2 {
				t.Fatalf("%d requests were spoiled", proxy.count())
			}
			if spoil == nil {
				if _, err := os.Stat(c.bin + "/compose.failed"); err != nil {
					t.Fatal(err)
				}
			}
			c.succeed("restart")
			undo()
			record, err := change.Decode(c.steps.change.Record)
			if err != nil {
				t.Fatal(err)
			}
			if reason := (&stepRun{record: record}).imageByCommands(); reason != "" {
				t.Fatalf("the plan's commands roll back, because %s", reason)
			}
			if _, failure := c.restoreImage(t.Context()); failure != nil {
				t.Fatal(failure)
			}
			c.isAsBefore(before, c.state())
		})
	}
}

// A rollback goes on when the engine answers again, whatever it was doing, and although
// the engine has gone on with acts whose answers were lost.
func TestARollbackOutlastsAnOutageBehindAProxy(t *testing.T) {
	t.Parallel()
	c := newLayoutEnv(t, oneService, composePrograms(t)["newest"])
	before := c.state()
	undo := c.change()
	c.succeed("build")
	c.succeed("restart")
	undo()
	// All is done through the engine, and so through the proxy.
	record, err := change.Decode(c.steps.change.Record)
	if err != nil {
		t.Fatal(err)
	}
	record.Image.Compose = nil
	if c.steps.change.Record, err = record.Encode(); err != nil {
		t.Fatal(err)
	}
	proxy := c.throughProxy()
	outage, refusals := 0, 0
	asked := map[string]int{}
	proxy.set(func(r *http.Request) spoiling {
		act := r.Method + " " + r.URL.Path
		switch {
		case outage > 0:
			outage--
			return unavailable
		case r.Method == http.MethodGet, r.Method == http.MethodHead:
			return nil
		case refusals == 1: // what has been lost is not done yet
			refusals++
			return refused
		}
		switch asked[act]++; {
		case asked[act] <= 3:
			return unavailable
		case asked[act] == 4:
			outage, refusals = 3, max(refusals, 1)
			return lostAnswer
		}
		return nil
	})
	if _, failure := c.restoreImage(t.Context()); failure != nil {
		t.Fatalf("%v\n%s", failure, c.artifact("rollback.log"))
	}
	if len(asked) < 4 || refusals != 2 {
		t.Errorf("acts: %v, refusals: %d", asked, refusals)
	}
	proxy.set(nil)
	c.isAsBefore(before, c.state())
}

// knownEngine has answered before.
type knownEngine struct{ *fakeEngine }

func (knownEngine) HasAnswered() bool { return true }

// A run does not begin in an outage that lasts: its containers could not be brought
// back. It is one if the engine has answered this worker before, and also if it answers
// compose as little, as when the worker has started in the outage.
func TestARunDoesNotBeginInAnOutage(t *testing.T) {
	t.Parallel()
	const down = "\ncase \"$*\" in *' ps --all '*) exit 1;; esac"
	for name, test := range map[string]struct {
		known  bool
		docker string
		// looks is how often the engine is asked until it answers, 0 if it never does.
		looks int
		// built says that the run begins although the engine does not answer.
		built bool
	}{
		"known engine":                 {known: true},
		"compose is not answered":      {docker: down},
		"it ends":                      {docker: down, looks: 3},
		"compose uses another":         {built: true},
		"it ends for compose at first": {looks: 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newTestEnv(t)
			b.program("docker", composeStandIn+test.docker+"\ncase \"$*\" in *' build '*) touch built;; esac")
			var waited atomic.Int64
			b.config.Now = func() time.Time { return time.Now().Add(time.Duration(waited.Load())) }
			fake := &fakeEngine{}
			fake.containers = func(call int, _ string) ([]compose.Container, error) {
				if test.looks > 0 && call >= test.looks {
					if test.docker != "" {
						b.program("docker", composeStandIn+"\ncase \"$*\" in *' build '*) touch built;; esac")
					}
					return nil, nil
				}
				if test.looks == 0 {
					waited.Add(int64(engineWait))
				}
				return nil, compose.ErrUnreachable
			}
			b.config.Engine = fake
			if test.known {
				b.config.Engine = knownEngine{fake}
			}
			b.plan(`[{"name": "build"}]`)
			begins := test.built || test.looks > 0
			if begins {
				b.succeed("build")
			} else {
				failure, _ := b.fail("build")
				if want := "The containers of project moonmind cannot be seen, so the run could not be taken back. This step has changed nothing yet. Retry the run when docker answers: docker engine is unreachable"; !strings.HasPrefix(failure.Error(), want) {
					t.Errorf("%s, want %s", failure, want)
				}
			}
			if _, err := os.Stat(b.workspace + "/built"); err == nil != begins {
				t.Errorf("the build was run: %t", err == nil)
			}
			record, err := change.Decode(b.steps.change.Record)
			if err != nil || (record.Image != nil) != begins || begins && record.Image.EngineSeen != (test.looks > 0) {
				t.Errorf("%s, %v", b.steps.change.Record, err)
			}
		})
	}
}

// outageHelpers cannot find the worker's container for a while.
type outageHelpers struct {
	*fakeHelpers
	failures atomic.Int32
	failed   func()
}

func (f *outageHelpers) Own(ctx context.Context, candidates []string) (*compose.OwnContainer, error) {
	if f.failures.Add(-1) >= 0 {
		f.failed()
		return nil, fmt.Errorf("cannot inspect container: %w", compose.ErrUnreachable)
	}
	return f.fakeHelpers.Own(ctx, candidates)
}

// A worker that cannot look for its own container does not replace it by mistake.
func TestAnOutageHidesTheOwnServiceFromNoWorker(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		failures int32
		waits    time.Duration // for each failure
		never    bool          // the engine has never answered
		helped   bool
		want     string
	}{
		"a short one":         {failures: 1, helped: true},
		"a long one":          {failures: 100, waits: engineWait, want: "Command " + ownCommand + " was not run: it cannot be found out whether it stops this worker"},
		"there is no engine":  {failures: 100, never: true, want: "failed with code 9: the worker has run compose"},
		"there is none, once": {failures: 1, never: true, want: "failed with code 9: the worker has run compose"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, f := newOwnEnv(t)
			b.program("docker", `case "$*" in *config*) echo '{"name": "moonmind", "services": {"orchestrator": {}}}';; *' ls --quiet'|*' ps '*) ;; *) echo "the worker has run $*"; exit 9;; esac`)
			var waited atomic.Int64
			b.config.Now = func() time.Time { return time.Now().Add(time.Duration(waited.Load())) }
			helpers := &outageHelpers{fakeHelpers: f, failed: func() { waited.Add(int64(test.waits)) }}
			helpers.failures.Store(test.failures)
			b.config.Helpers = helpers
			engine := &fakeEngine{containers: func(int, string) ([]compose.Container, error) { return nil, nil }}
			b.config.Engine = knownEngine{engine}
			if test.never {
				engine.containers = func(int, string) ([]compose.Container, error) { return nil, compose.ErrUnreachable }
				b.config.Engine = engine
			}
			stopping := make(chan struct{})
			b.config.Stopping = stopping
			close(stopping)
			if test.helped {
				if _, _, err := b.execute("restart"); err == nil || len(f.tasks) != 1 {
					t.Errorf("%v, helpers %+v", err, f.tasks)
				}
				return
			}
			if failure, _ := b.fail("restart"); !strings.Contains(failure.Error(), test.want) || len(f.tasks) != 0 {
				t.Errorf("%s, want %s; helpers %+v", failure, test.want, f.tasks)
			}
		})
	}
}
