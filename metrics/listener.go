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

// DefaultAddress is the default address of the [Listener].
const DefaultAddress = "127.0.0.1:9808"

const (
	headerTimeout = 5 * time.Second
	answerTimeout = 15 * time.Second
	// probeTimeout is the limit on a probe. It is shorter than answerTimeout,
	// so that the listener can still send the reason of a slow probe.
	probeTimeout = 10 * time.Second
	idleTimeout  = time.Minute
	// maxScrapes is the number of concurrent scrapes; more are answered 503.
	maxScrapes = 4
)

// A Probe checks something and returns nil if it is healthy. Otherwise the
// error is the reason, in words for an operator and without secrets. A Probe
// must return soon after ctx is done.
type Probe func(ctx context.Context) error

// A Remark is what /readyz says besides ok, such as that the queue is paused; "" for
// nothing. It is subject to the rules for a [Probe].
type Remark func(ctx context.Context) string

// ListenerConfig configures a [Listener].
type ListenerConfig struct {
	// Address is host:port. Defaults to DefaultAddress.
	Address string
	// Remote allows an Address that other machines can reach. Without Remote,
	// Validate refuses such an address: the answers name hosts and queues, and
	// the listener has no authentication.
	Remote bool
	// Metrics are served at /metrics. Required.
	Metrics prometheus.Gatherer
	// Health is the probe of /healthz. Required.
	Health Probe
	// Ready is the probe of /readyz. Defaults to Health.
	Ready Probe
	// Remark is added to the answer of /readyz if Ready has succeeded. Defaults to
	// none.
	Remark Remark
	// Logger logs errors of connections. Defaults to slog.Default().
	Logger *slog.Logger
}

// WithDefaults returns a copy in which empty fields are set to their defaults.
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

// Validate returns an error that names what is wrong.
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

// CheckAddress checks that an address to listen on has the form host:port.
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

// Loopback reports whether only this machine can reach a listener at address.
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

// Listen opens the address, so that a port in use is an error at the start. The
// caller must call Serve or Close.
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
	mux.HandleFunc("GET /healthz", answer(cfg.Health, nil))
	mux.HandleFunc("GET /readyz", answer(cfg.Ready, cfg.Remark))
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

// Addr returns the address of the listener, with the actual port if the
// configuration says port 0.
func (l *Listener) Addr() string { return l.socket.Addr().String() }

// Serve answers requests until ctx is done, waits up to a second for requests
// in progress, and returns. The error is nil if Serve ended because of ctx.
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

// Close frees the address. It is for a listener whose Serve was not called.
func (l *Listener) Close() error { return l.socket.Close() }

// answer responds with 200, "ok" and the remark, or with 503 and the reason.
func answer(probe Probe, remark Remark) http.HandlerFunc {
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
		if remark == nil {
			return
		}
		if text := remark(ctx); text != "" {
			fmt.Fprintln(w, text)
		}
	}
}
