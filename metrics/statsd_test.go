package metrics_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/moonladderstudios/mm-orchestrator/metrics"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server is a StatsD server: a UDP socket.
type server struct {
	t    *testing.T
	conn *net.UDPConn
}

func listen(t *testing.T, at netip.AddrPort) *server {
	t.Helper()
	conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return &server{t: t, conn: conn}
}

func (s *server) addr() netip.AddrPort { return s.conn.LocalAddr().(*net.UDPAddr).AddrPort() }

// receive returns the next n datagrams.
func (s *server) receive(n int) []string {
	s.t.Helper()
	_ = s.conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	var got []string
	buf := make([]byte, 1500)
	for range n {
		size, err := s.conn.Read(buf)
		if err != nil {
			s.t.Fatalf("after %d of %d datagrams %q: %v", len(got), n, got, err)
		}
		got = append(got, string(buf[:size]))
	}
	return got
}

// start runs s until the test ends or stop is called; stop waits for Run to
// return.
func start(t *testing.T, s *metrics.StatsD) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	stop = sync.OnceFunc(func() { cancel(); <-done })
	t.Cleanup(stop)
	return stop
}

func newStatsD(t *testing.T, cfg metrics.StatsDConfig) *metrics.StatsD {
	t.Helper()
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	s, err := metrics.NewStatsD(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// The end of the sequence is what a real MoonMind worker sent at the end of a
// successful run (docs/moonmind.md#statsd).
func TestDatagramsAreThoseOfMoonMind(t *testing.T) {
	t.Parallel()
	srv := listen(t, netip.MustParseAddrPort("127.0.0.1:0"))
	s := newStatsD(t, metrics.StatsDConfig{Host: "127.0.0.1", Port: int(srv.addr().Port())})
	start(t, s)

	s.RunStatus("running")
	s.StepStarted("verify")
	s.StepFinished("verify", true, 66771*time.Microsecond)
	s.RunFinished("succeeded", 11809863*time.Microsecond)
	s.StepFinished("build", false, 1500*time.Nanosecond)
	s.RunStatus("failed")
	s.RunFinished("rolled_back", time.Hour)
	s.RunStatus("od d/x:1|c\ny")

	want := []string{
		"moonmind.orchestrator.runs.status.running:1|c",
		"moonmind.orchestrator.steps.verify.started:1|c",
		"moonmind.orchestrator.steps.verify.succeeded:1|c",
		"moonmind.orchestrator.steps.verify.duration:66.7710|ms",
		"moonmind.orchestrator.runs.status.succeeded:1|c",
		"moonmind.orchestrator.runs.duration.succeeded:11809.8630|ms",
		"moonmind.orchestrator.steps.build.failed:1|c",
		"moonmind.orchestrator.steps.build.duration:0.0015|ms",
		"moonmind.orchestrator.runs.status.failed:1|c",
		"moonmind.orchestrator.runs.status.rolled_back:1|c",
		"moonmind.orchestrator.runs.duration.rolled_back:3600000.0000|ms",
		"moonmind.orchestrator.runs.status.od_d-x_1_c_y:1|c",
	}
	if got := srv.receive(len(want)); !reflect.DeepEqual(got, want) {
		t.Errorf("datagrams:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestPrefixLosesTrailingDots(t *testing.T) {
	t.Parallel()
	srv := listen(t, netip.MustParseAddrPort("127.0.0.1:0"))
	s := newStatsD(t, metrics.StatsDConfig{Host: "127.0.0.1", Port: int(srv.addr().Port()), Prefix: "shop.mm.."})
	start(t, s)
	s.StepStarted("patch")
	if got := srv.receive(1)[0]; got != "shop.mm.steps.patch.started:1|c" {
		t.Errorf("got %q", got)
	}
}

func TestRunSendsTheQueueAtTheEnd(t *testing.T) {
	t.Parallel()
	srv := listen(t, netip.MustParseAddrPort("127.0.0.1:0"))
	s := newStatsD(t, metrics.StatsDConfig{Host: "127.0.0.1", Port: int(srv.addr().Port())})
	for range 5 {
		s.StepStarted("build")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s.Run(ctx)
	srv.receive(5)
	if s.Dropped() != 0 {
		t.Errorf("dropped %d", s.Dropped())
	}
}

func TestWithoutAHostNothingIsSent(t *testing.T) {
	t.Parallel()
	for _, s := range []*metrics.StatsD{nil, newStatsD(t, metrics.StatsDConfig{})} {
		stop := start(t, s)
		for range 5000 {
			s.StepStarted("build")
		}
		stop()
		if s.Dropped() != 0 {
			t.Errorf("Dropped() = %d, want 0 without a host", s.Dropped())
		}
	}
}

// A resolver that hangs must block neither the methods that count nor the end
// of Run.
func TestAHangingResolverBlocksNobody(t *testing.T) {
	t.Parallel()
	asked := make(chan struct{}, 1)
	s := newStatsD(t, metrics.StatsDConfig{Host: "statsd.invalid", Resolve: func(ctx context.Context, _ string) (netip.Addr, error) {
		select {
		case asked <- struct{}{}:
		default:
		}
		<-ctx.Done()
		return netip.Addr{}, ctx.Err()
	}})
	stop := start(t, s)
	s.StepStarted("analyze")
	<-asked
	begin := time.Now()
	for range 100_000 {
		s.StepStarted("analyze")
	}
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("counting took %v while the resolver hung", took)
	}
	begin = time.Now()
	stop()
	if took := time.Since(begin); took > 4*time.Second {
		t.Errorf("Run returned only after %v", took)
	}
	if s.Dropped() < 90_000 {
		t.Errorf("dropped %d, want all that did not fit", s.Dropped())
	}
}

// clock is a clock that the test sets.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time { c.mu.Lock(); defer c.mu.Unlock(); return c.now }
func (c *clock) Add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// After an error there is no attempt for 5 s, after further errors for 10, 20,
// 40 and then always 60 s. One log line reports the outage and one its end.
func TestErrorsPauseLongerAndLongerAndAreLoggedOnce(t *testing.T) {
	t.Parallel()
	srv := listen(t, netip.MustParseAddrPort("127.0.0.1:0"))
	var (
		clk   = &clock{now: time.Unix(1_700_000_000, 0)}
		asked = make(chan error)
		log   strings.Builder
	)
	s := newStatsD(t, metrics.StatsDConfig{
		Host: "statsd", Port: int(srv.addr().Port()), Now: clk.Now,
		Logger: slog.New(slog.NewTextHandler(io.MultiWriter(&log, t.Output()), nil)),
		Resolve: func(context.Context, string) (netip.Addr, error) {
			if err := <-asked; err != nil {
				return netip.Addr{}, err
			}
			return netip.MustParseAddr("127.0.0.1"), nil
		},
	})
	stop := start(t, s)
	dropped := uint64(0)
	for _, pause := range []time.Duration{5, 10, 20, 40, 60, 60} {
		s.StepStarted("analyze")
		asked <- errors.New("no such host")
		// Datagrams within the pause are dropped without a look-up.
		clk.Add(pause*time.Second - time.Nanosecond)
		s.StepStarted("analyze")
		dropped += 2
		waitFor(t, func() bool { return s.Dropped() == dropped })
		clk.Add(time.Nanosecond)
	}
	s.StepStarted("patch")
	asked <- nil
	if got := srv.receive(1)[0]; got != "moonmind.orchestrator.steps.patch.started:1|c" {
		t.Errorf("got %q", got)
	}
	stop()
	if got := strings.Count(log.String(), "cannot be reached"); got != 1 {
		t.Errorf("the outage was logged %d times:\n%s", got, log.String())
	}
	if got := strings.Count(log.String(), "reachable again"); got != 1 {
		t.Errorf("the end of the outage was logged %d times:\n%s", got, log.String())
	}
}

// A server that is recreated at another address is found again. When a server
// restarts at the same address, only datagrams sent meanwhile are lost.
func TestTheHostIsResolvedAgain(t *testing.T) {
	t.Parallel()
	first := listen(t, netip.MustParseAddrPort("127.0.0.1:0"))
	second := listen(t, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.2"), first.addr().Port()))
	clk := &clock{now: time.Unix(1_700_000_000, 0)}
	answers := make(chan netip.Addr, 2)
	answers <- netip.MustParseAddr("127.0.0.1")
	answers <- netip.MustParseAddr("127.0.0.2")
	s := newStatsD(t, metrics.StatsDConfig{
		Host: "statsd", Port: int(first.addr().Port()), Now: clk.Now,
		Resolve: func(context.Context, string) (netip.Addr, error) {
			select {
			case addr := <-answers:
				return addr, nil
			default:
				return netip.Addr{}, errors.New("resolver is unavailable")
			}
		},
	})
	start(t, s)
	s.StepStarted("one")
	first.receive(1)
	clk.Add(2 * time.Minute)
	s.StepStarted("two")
	second.receive(1)
	// While the resolver is unavailable, the last address is used.
	clk.Add(2 * time.Minute)
	s.StepStarted("three")
	second.receive(1)
}

func TestConfigThatCannotWorkIsRefused(t *testing.T) {
	t.Parallel()
	for _, cfg := range []metrics.StatsDConfig{{Port: 70000}, {Port: -1}, {Prefix: "a:b"}, {Prefix: "a b"}} {
		if _, err := metrics.NewStatsD(cfg); err == nil {
			t.Errorf("%+v was accepted", cfg)
		}
	}
}

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatal("the condition was not met within 10 s")
		}
		time.Sleep(time.Millisecond)
	}
}
