package metrics_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/moonladderstudios/mm-orchestrator/metrics"
)

func serve(t *testing.T, cfg metrics.ListenerConfig) (base string) {
	t.Helper()
	cfg.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	l, err := metrics.Listen(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- l.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return "http://" + l.Addr()
}

func get(t *testing.T, url string) (status int, body string) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
	res, err := client.Get(url)
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

func TestProbesSayWhatIsWrong(t *testing.T) {
	t.Parallel()
	var unhealthy atomic.Bool
	base := serve(t, metrics.ListenerConfig{
		Address: "127.0.0.1:0", Metrics: metrics.NewRegistry("1.2.3"),
		Health: func(context.Context) error { return nil },
		Ready: func(context.Context) error {
			if unhealthy.Load() {
				return errors.New("not consuming: queue was deleted")
			}
			return nil
		},
	})
	for _, path := range []string{"/healthz", "/readyz"} {
		if status, body := get(t, base+path); status != 200 || body != "ok\n" {
			t.Errorf("%s: %d %q", path, status, body)
		}
	}
	unhealthy.Store(true)
	if status, body := get(t, base+"/readyz"); status != 503 || body != "not consuming: queue was deleted\n" {
		t.Errorf("/readyz: %d %q", status, body)
	}
	unhealthy.Store(false)
	if status, _ := get(t, base+"/readyz"); status != 200 {
		t.Errorf("/readyz stays at %d", status)
	}
	if status, _ := get(t, base+"/debug/pprof/"); status != 404 {
		t.Errorf("an unknown path gives %d", status)
	}
}

func TestMetricsCountRunsAndSteps(t *testing.T) {
	t.Parallel()
	reg := metrics.NewRegistry("1.2.3")
	rec, err := metrics.NewRecorder(nil, reg)
	if err != nil {
		t.Fatal(err)
	}
	// Nobody sends what these two are given.
	senders := []*metrics.StatsD{nil}
	for range 2 {
		s, err := metrics.NewStatsD(metrics.StatsDConfig{Host: "127.0.0.1"})
		if err != nil {
			t.Fatal(err)
		}
		for range 1124 { // 100 more than may wait
			s.StepStarted("build")
		}
		senders = append(senders, s)
	}
	if err := metrics.RegisterDropped(reg, senders...); err != nil {
		t.Fatal(err)
	}
	base := serve(t, metrics.ListenerConfig{Address: "127.0.0.1:0", Metrics: reg, Health: func(context.Context) error { return nil }})
	rec.RunStatus("running")
	rec.StepStarted("build")
	rec.StepFinished("build", false, 90*time.Second)
	rec.StepStarted(`"hostile",x="y`)
	rec.RunFinished("rolled_back", 2*time.Minute)

	status, body := get(t, base+"/metrics")
	if status != 200 {
		t.Fatalf("%d %s", status, body)
	}
	for _, line := range []string{
		`mm_orchestrator_build_info{version="1.2.3"} 1`,
		`mm_orchestrator_run_status_total{status="running"} 1`,
		`mm_orchestrator_run_status_total{status="rolled_back"} 1`,
		`mm_orchestrator_steps_started_total{step="build"} 1`,
		`mm_orchestrator_steps_started_total{step="other"} 1`,
		`mm_orchestrator_step_duration_seconds_bucket{status="failed",step="build",le="60"} 0`,
		`mm_orchestrator_step_duration_seconds_bucket{status="failed",step="build",le="120"} 1`,
		`mm_orchestrator_run_duration_seconds_sum{status="rolled_back"} 120`,
		`mm_orchestrator_statsd_dropped_total 200`,
		`process_start_time_seconds `,
		`go_goroutines `,
	} {
		if !strings.Contains(body, "\n"+line) {
			t.Errorf("/metrics lacks %q", line)
		}
	}
}

func TestRecorderWithoutStatsDAndRegistry(t *testing.T) {
	t.Parallel()
	rec, err := metrics.NewRecorder(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []*metrics.Recorder{nil, rec} {
		r.StepStarted("build")
		r.StepFinished("build", true, time.Second)
		r.RunStatus("running")
		r.RunFinished("succeeded", time.Second)
	}
}

func TestAddressInUseIsReported(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, err = metrics.Listen(t.Context(), metrics.ListenerConfig{
		Address: taken.Addr().String(), Metrics: prometheus.NewRegistry(), Health: func(context.Context) error { return nil },
	})
	if !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("got %v", err)
	}
}

func TestOnlyLoopbackUnlessAllowed(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		address  string
		loopback bool
	}{
		{"127.0.0.1:9808", true},
		{"127.9.9.9:1", true},
		{"[::1]:9808", true},
		{"[::ffff:127.0.0.1]:9808", true},
		{"localhost:9808", true},
		{":9808", false},
		{"0.0.0.0:9808", false},
		{"[::]:9808", false},
		{"10.0.0.1:9808", false},
		{"worker.internal:9808", false},
		{"9808", false},
	} {
		if got := metrics.Loopback(tt.address); got != tt.loopback {
			t.Errorf("Loopback(%q) = %v", tt.address, got)
		}
	}
	cfg := metrics.ListenerConfig{Address: "0.0.0.0:0", Metrics: prometheus.NewRegistry(), Health: func(context.Context) error { return nil }}
	if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), "0.0.0.0:0") {
		t.Errorf("got %v", err)
	}
	cfg.Remote = true
	if err := cfg.Validate(); err != nil {
		t.Error(err)
	}
}

func TestCloseFreesTheAddress(t *testing.T) {
	t.Parallel()
	cfg := metrics.ListenerConfig{Address: "127.0.0.1:0", Metrics: prometheus.NewRegistry(), Health: func(context.Context) error { return nil }}
	l, err := metrics.Listen(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Address = l.Addr()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := metrics.Listen(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	_ = again.Close()
}
