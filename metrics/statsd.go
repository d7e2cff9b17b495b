package metrics

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

const (
	// queueLength is the number of datagrams that may wait to be sent. A step
	// sends four, so a full queue means that the server does not answer. It
	// needs at most 100 kB.
	queueLength = 1024
	// resolveEvery is how long a resolved address is used: a StatsD container
	// that was recreated has a new address.
	resolveEvery = time.Minute
	// resolveTimeout is the limit on a DNS look-up.
	resolveTimeout = 5 * time.Second
	// flushTimeout is the limit on sending the queue once Run's ctx is done.
	flushTimeout = time.Second

	firstPause = 5 * time.Second
	maxPause   = time.Minute
)

// StatsDConfig configures a [StatsD].
type StatsDConfig struct {
	// Host is a name or an IPv4 address. Empty turns StatsD off.
	Host string
	// Port defaults to 8125.
	Port int
	// Prefix is written before each name, followed by a dot; trailing dots of
	// Prefix are removed. Defaults to "moonmind.orchestrator".
	Prefix string
	// Logger logs once per outage that the server cannot be reached. Defaults
	// to slog.Default().
	Logger *slog.Logger
	// Resolve looks up a host name. Defaults to an IPv4 look-up by the system's
	// resolver.
	Resolve func(ctx context.Context, host string) (netip.Addr, error)
	// Now defaults to time.Now.
	Now func() time.Time
}

// WithDefaults returns a copy in which empty fields are set to their defaults.
func (c StatsDConfig) WithDefaults() StatsDConfig {
	if c.Port == 0 {
		c.Port = 8125
	}
	c.Prefix = strings.TrimRight(c.Prefix, ".")
	if c.Prefix == "" {
		c.Prefix = "moonmind.orchestrator"
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if c.Resolve == nil {
		c.Resolve = resolveIPv4
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c
}

// Validate returns an error that names what is wrong.
func (c StatsDConfig) Validate() error {
	if c.Port < 1 || c.Port > 65535 {
		return fmt.Errorf("StatsD port %d is not between 1 and 65535", c.Port)
	}
	if strings.ContainsAny(c.Prefix, ":|@# \t\r\n") {
		return fmt.Errorf("StatsD prefix %q must not hold spaces or any of : | @ #", c.Prefix)
	}
	return nil
}

// StatsD sends counters and timers over IPv4 UDP, one per datagram.
//
//   - The methods that count may be called from any goroutine, before, during
//     and after Run, and on a nil *StatsD. They neither block nor fail.
//   - Datagrams are sent in the order of the calls.
//   - Goroutines and sockets exist only during Run.
//   - When the queue is full or the server cannot be reached, datagrams are
//     dropped and counted (Dropped).
type StatsD struct {
	cfg     StatsDConfig
	queue   chan string
	dropped atomic.Uint64

	// The fields below belong to the goroutine of Run.

	conn       *net.UDPConn
	to         netip.AddrPort
	resolvedAt time.Time
	// quietUntil is the time of the next attempt after an error.
	quietUntil time.Time
	pause      time.Duration
}

// NewStatsD returns a StatsD, or an error of Validate. It does not use the
// network.
func NewStatsD(cfg StatsDConfig) (*StatsD, error) {
	cfg = cfg.WithDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	return &StatsD{cfg: cfg, queue: make(chan string, queueLength)}, nil
}

// StepStarted counts the start of a step.
func (s *StatsD) StepStarted(step string) {
	s.count("steps." + part(step) + ".started")
}

// StepFinished counts the end of a step and sends its duration.
func (s *StatsD) StepFinished(step string, succeeded bool, took time.Duration) {
	outcome := "failed"
	if succeeded {
		outcome = "succeeded"
	}
	s.count("steps." + part(step) + "." + outcome)
	s.time("steps."+part(step)+".duration", took)
}

// RunStatus counts a run that has entered a status but not ended: running when
// its first step starts, failed when a rollback will follow.
func (s *StatsD) RunStatus(status string) {
	s.count("runs.status." + part(status))
}

// RunFinished counts the end of a run and sends its duration.
func (s *StatsD) RunFinished(status string, took time.Duration) {
	s.count("runs.status." + part(status))
	s.time("runs.duration."+part(status), took)
}

// Dropped returns the number of datagrams that were not sent.
func (s *StatsD) Dropped() uint64 {
	if s == nil {
		return 0
	}
	return s.dropped.Load()
}

func (s *StatsD) count(name string) { s.enqueue(name, "1|c") }

func (s *StatsD) time(name string, took time.Duration) {
	ms := float64(took) / float64(time.Millisecond)
	s.enqueue(name, strconv.FormatFloat(ms, 'f', 4, 64)+"|ms")
}

func (s *StatsD) enqueue(name, value string) {
	if s == nil || s.cfg.Host == "" {
		return
	}
	select {
	case s.queue <- s.cfg.Prefix + "." + name + ":" + value:
	default:
		s.dropped.Add(1)
	}
}

// partReplacer escapes the variable parts of a metric name. MoonMind replaces
// spaces and slashes; here the characters that would end the name are replaced
// too.
var partReplacer = strings.NewReplacer(" ", "_", "/", "-", ":", "_", "|", "_", "@", "_", "#", "_", "\n", "_", "\r", "_", "\t", "_")

func part(text string) string { return partReplacer.Replace(text) }

// Run sends datagrams until ctx is done, then sends the rest of the queue for
// at most a second, and returns. Only one Run may be active at a time.
func (s *StatsD) Run(ctx context.Context) {
	if s == nil || s.cfg.Host == "" {
		<-ctx.Done()
		return
	}
	defer s.close()
	for {
		select {
		case line := <-s.queue:
			s.send(ctx, line)
		case <-ctx.Done():
			s.flush(ctx)
			return
		}
	}
}

func (s *StatsD) flush(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTimeout)
	defer cancel()
	for ctx.Err() == nil {
		select {
		case line := <-s.queue:
			s.send(ctx, line)
		default:
			return
		}
	}
}

func (s *StatsD) send(ctx context.Context, line string) {
	now := s.cfg.Now()
	if now.Before(s.quietUntil) {
		s.dropped.Add(1)
		return
	}
	err := s.connect(ctx, now)
	if err == nil {
		_, err = s.conn.WriteToUDPAddrPort([]byte(line), s.to)
	}
	if err == nil {
		if s.pause > 0 {
			s.cfg.Logger.Info("StatsD is reachable again", "address", s.address())
		}
		s.pause = 0
		return
	}
	s.dropped.Add(1)
	s.close()
	if ctx.Err() != nil {
		return
	}
	if s.pause == 0 {
		s.cfg.Logger.Warn("StatsD cannot be reached; its metrics are dropped until it can", "address", s.address(), "error", err)
	}
	s.pause = nextPause(s.pause)
	s.quietUntil = now.Add(s.pause)
}

// nextPause returns the pause after one more consecutive error: 5 s, doubled
// each time, at most 60 s (docs/moonmind.md#c17).
func nextPause(last time.Duration) time.Duration {
	if last == 0 {
		return firstPause
	}
	return min(2*last, maxPause)
}

// connect opens the socket, and resolves the host unless it was resolved within
// resolveEvery. The socket is not connected to the server: a connected socket
// would report the server's restart as an error of the next datagram.
func (s *StatsD) connect(ctx context.Context, now time.Time) error {
	if s.conn == nil {
		conn, err := net.ListenUDP("udp4", nil)
		if err != nil {
			return err
		}
		s.conn, s.to = conn, netip.AddrPort{}
	}
	if s.to.IsValid() && now.Sub(s.resolvedAt) < resolveEvery {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	addr, err := s.cfg.Resolve(ctx, s.cfg.Host)
	if err != nil {
		if !s.to.IsValid() {
			return err
		}
		// Use the last address: it is probably still right.
		s.resolvedAt = now
		return nil
	}
	s.to, s.resolvedAt = netip.AddrPortFrom(addr, uint16(s.cfg.Port)), now
	return nil
}

func (s *StatsD) close() {
	if s.conn != nil {
		_ = s.conn.Close()
	}
	s.conn, s.to = nil, netip.AddrPort{}
}

func (s *StatsD) address() string {
	return net.JoinHostPort(s.cfg.Host, strconv.Itoa(s.cfg.Port))
}

func resolveIPv4(ctx context.Context, host string) (netip.Addr, error) {
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip4", host)
	if err != nil {
		return netip.Addr{}, err
	}
	if len(addrs) == 0 {
		return netip.Addr{}, fmt.Errorf("host %s has no IPv4 address", host)
	}
	return addrs[0].Unmap(), nil
}
