package metrics

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// DefaultAddress is where metrics and health probes are answered.
const DefaultAddress = "127.0.0.1:9808"

const (
	headerTimeout = 5 * time.Second
	answerTimeout = 15 * time.Second
	// probeTimeout bounds a probe's work, below answerTimeout so that a slow
	// one still gets its reason across.
	probeTimeout = 10 * time.Second
	idleTimeout  = time.Minute
	// scrapes at a time; more get 503.
	maxScrapes = 4
)

// A Probe says why something is not well, in words for an operator and
// without secrets, or nil. It must return soon after ctx is done.
type Probe func(ctx context.Context) error

// ListenerConfig describes the HTTP listener for metrics and probes.
type ListenerConfig struct {
	// Address is host:port. Defaults to DefaultAddress.
	Address string
	// Remote allows an Address that other machines may reach. Without it
	// such an address is refused: what is served names hosts and queues, and
	// asks for no password.
	Remote bool
	// Metrics are served at /metrics. Required.
	Metrics prometheus.Gatherer
	// Health is asked by /healthz. Required.
	Health Probe
	// Ready is asked by /readyz. Defaults to Health.
	Ready Probe
	// Logger hears of broken connections. Defaults to slog.Default().
	Logger *slog.Logger
}

// WithDefaults returns a copy in which each field that was left out has its
// default.
func (c ListenerConfig) WithDefaults() ListenerConfig {
	if c.Address == "" {
		c.Address = DefaultAddress
	}
	if c.Ready == nil {
		c.Ready = c.Health
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return c
}

// Validate names the field that is wrong.
func (c ListenerConfig) Validate() error {
	if c.Metrics == nil || c.Health == nil {
		return errors.New("the listener needs metrics to gather and a health probe")
	}
	if err := CheckAddress(c.Address); err != nil {
		return err
	}
	if !c.Remote && !Loopback(c.Address) {
		return fmt.Errorf("listen address %q can be reached from other machines", c.Address)
	}
	return nil
}

// CheckAddress says what is wrong with an address to listen on, or nil.
func CheckAddress(address string) error {
	_, port, err := net.SplitHostPort(address)
	if err == nil {
		_, err = net.LookupPort("tcp", port)
	}
	if err != nil {
		return fmt.Errorf("listen address %q is not of the form host:port", address)
	}
	return nil
}

// Loopback says whether only this machine can reach a listener at address.
func Loopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}

// Listener serves /metrics, /healthz and /readyz.
type Listener struct {
	cfg    ListenerConfig
	socket net.Listener
	server *http.Server
}

// Listen takes the address at once, so that a port in use is told at start.
// Serve must follow, or Close.
func Listen(ctx context.Context, cfg ListenerConfig) (*Listener, error) {
	cfg = cfg.WithDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	var lc net.ListenConfig
	socket, err := lc.Listen(ctx, "tcp", cfg.Address)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("address %s for metrics and health is in use by another process: %w", cfg.Address, syscall.EADDRINUSE)
	case errors.Is(err, syscall.EACCES):
		return nil, fmt.Errorf("address %s for metrics and health may not be used by this user: %w", cfg.Address, syscall.EACCES)
	case err != nil:
		return nil, fmt.Errorf("cannot listen on %s for metrics and health: %w", cfg.Address, err)
	}
	l := &Listener{cfg: cfg, socket: socket}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(cfg.Metrics, promhttp.HandlerOpts{
		MaxRequestsInFlight: maxScrapes,
		Timeout:             probeTimeout,
	}))
	mux.HandleFunc("GET /healthz", answer(cfg.Health))
	mux.HandleFunc("GET /readyz", answer(cfg.Ready))
	l.server = &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       headerTimeout,
		WriteTimeout:      answerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    8 << 10,
		ErrorLog:          slog.NewLogLogger(cfg.Logger.Handler(), slog.LevelDebug),
	}
	return l, nil
}

// Addr is the address that is listened on, with the real port where port 0
// was asked for.
func (l *Listener) Addr() string { return l.socket.Addr().String() }

// Serve answers until ctx is done, lets answers that have begun end for a
// second, and returns. The error is nil after ctx is done.
func (l *Listener) Serve(ctx context.Context) error {
	done := make(chan error, 1)
	go func() { done <- l.server.Serve(l.socket) }()
	select {
	case err := <-done:
		return fmt.Errorf("listener for metrics and health at %s ended: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if l.server.Shutdown(grace) != nil {
		_ = l.server.Close()
	}
	<-done
	return nil
}

// Close frees the address of a listener that is not served.
func (l *Listener) Close() error { return l.socket.Close() }

// answer gives 200 and "ok", or 503 and the reason.
func answer(probe Probe) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), probeTimeout)
		defer cancel()
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		if err := probe(ctx); err != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprintln(w, err)
			return
		}
		fmt.Fprintln(w, "ok")
	}
}
