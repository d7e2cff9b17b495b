package worker

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
)

const (
	// resolveTimeout is long enough for a resolver to try a second name server.
	resolveTimeout = 10 * time.Second
	// dialTimeout is short, so that the worker notices soon when the network
	// works again: one long attempt sends its third SYN after 3 s, its fourth
	// after 7 s and its fifth after 15 s; short attempts send one about every
	// second.
	dialTimeout = 1500 * time.Millisecond
	// handshakeTimeout is equal to RabbitMQ's own limit for the handshake.
	handshakeTimeout = 10 * time.Second
	// callTimeout bounds a synchronous method of the broker. Without an answer
	// within it, the session counts as lost.
	callTimeout = 30 * time.Second
)

// session is one connection to a broker with all that depends on it: the
// channel that consumes, the channel that publishes, and the validity of every
// delivery tag. It is never repaired: when any part fails, the whole session is
// lost, and the worker makes a new one.
type session struct {
	broker string // host:port/vhost, for logs and errors
	conn   *amqp.Connection
	log    *slog.Logger

	// consumeChannel carries consumers and acknowledgements. consumeMu
	// serialises its synchronous methods, which amqp091-go does not do.
	consumeChannel *amqp.Channel
	consumeMu      sync.Mutex
	consumers      sync.WaitGroup // goroutines that receive

	publisher publisher
	// declared has the queues that the worker has declared on this connection;
	// guarded by declareMu.
	declareMu sync.Mutex
	declared  map[string]bool
	// subscriptions has the consumed queues by name; guarded by
	// subscriptionsMu.
	subscriptionsMu sync.Mutex
	subscriptions   map[string]*subscription
	probes          probes

	blocked atomic.Bool // the broker has sent connection.blocked

	lost     chan struct{}
	lostOnce sync.Once
	lostErr  error // set before lost is closed
	// gone is set when the registry has ended the deliveries; guarded by
	// registry.mu.
	gone     bool
	registry *registry

	raw net.Conn
}

// connect tries each broker once, in order. Its error joins those of all.
func (w *Worker) connect(ctx context.Context) (*session, error) {
	var failures []error
	brokers, err := w.cfg.brokers()
	if err != nil {
		return nil, err
	}
	for _, broker := range brokers {
		s, err := w.dial(ctx, broker)
		if err == nil {
			return s, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		failures = append(failures, err)
	}
	return nil, errors.Join(failures...)
}

func (w *Worker) dial(ctx context.Context, broker address.Broker) (*session, error) {
	raw, err := w.dialRaw(ctx, broker)
	if err != nil {
		return nil, err
	}
	// amqp091-go takes no context: closing the connection when ctx ends makes
	// the handshake fail.
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
	defer stop()

	conn, err := amqp.Open(newWireConn(raw), amqp.Config{
		SASL:      []amqp.Authentication{&amqp.PlainAuth{Username: broker.User, Password: broker.Password.Reveal()}},
		Vhost:     broker.VHost,
		Heartbeat: w.cfg.Heartbeat,
		FrameSize: 131072,
		Locale:    "en_US",
		Properties: amqp.Table{
			"product":         "mm-orchestrator worker",
			"platform":        "golang",
			"connection_name": w.cfg.Node,
		},
	})
	if err != nil {
		_ = raw.Close()
		return nil, handshakeError(err, broker)
	}
	s := &session{
		broker:   broker.Place(),
		conn:     conn,
		raw:      raw,
		log:      w.cfg.Logger,
		registry: w.registry,
		declared: map[string]bool{},
		probes:   probes{turn: make(chan struct{}, 1)},
		lost:     make(chan struct{}),
	}
	s.publisher.init(s)
	answered := s.guard("channel.open")
	s.consumeChannel, err = conn.Channel()
	answered()
	if err != nil {
		s.close()
		return nil, fmt.Errorf("broker %s: opening a channel: %w: %w", broker.Place(), ErrUnreachable, err)
	}
	s.watch()
	return s, nil
}

func (w *Worker) dialRaw(ctx context.Context, broker address.Broker) (net.Conn, error) {
	place := broker.Address()
	conn, err := dialHost(ctx, broker.Host, broker.Port)
	if broker.Hidden {
		place = broker.Place()
		if err != nil && ctx.Err() == nil {
			// The error's own text contains host and port, which may be a part of
			// the password.
			err = errHidden
		}
	}
	if err != nil {
		return nil, &ConnectError{Kind: ErrUnreachable, What: "cannot connect to " + place, Err: err, Cure: "Check that RabbitMQ runs and that the address is right"}
	}
	// amqp091-go clears it when the connection is open.
	_ = conn.SetDeadline(time.Now().Add(handshakeTimeout))
	if !broker.TLS {
		return conn, nil
	}
	config := w.cfg.TLS.Clone()
	if config == nil {
		// Read for each connection, so that renewed certificates are used.
		if config, err = broker.TLSConfig(); err != nil {
			_ = conn.Close()
			return nil, err
		}
	}
	if config == nil {
		config = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	if config.ServerName == "" {
		config.ServerName = broker.Host
	}
	secure := tls.Client(conn, config)
	if err := secure.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		if broker.Hidden && ctx.Err() == nil {
			err = errHidden
		}
		return nil, &ConnectError{Kind: ErrUnreachable, What: "TLS with " + place + " failed", Err: err, Cure: "Check the certificates, and that this port speaks TLS"}
	}
	return secure, nil
}

// errHidden replaces an error that names a host which may be a part of the
// password.
var errHidden = errors.New("the reason is not shown, because the address has an @ after its host; write %40 for an @, %2F for a / in a password")

// dialHost resolves a host and tries its addresses in order. Its error is one
// line, and names an address only where the caller's text does not.
func dialHost(ctx context.Context, host string, port int) (net.Conn, error) {
	lookup, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	addresses, err := net.DefaultResolver.LookupHost(lookup, host)
	if err != nil {
		return nil, dialFailures{{err: err}}
	}
	dialer := net.Dialer{Timeout: dialTimeout, KeepAlive: 15 * time.Second}
	var failures dialFailures
	for _, address := range addresses {
		conn, err := dialer.DialContext(ctx, "tcp", net.JoinHostPort(address, strconv.Itoa(port)))
		if err == nil {
			return conn, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		failure := dialFailure{err: err}
		if address != host {
			failure.address = address
		}
		failures = append(failures, failure)
	}
	return nil, failures
}

// dialFailures are the failed attempts to reach one host.
type dialFailures []dialFailure

// dialFailure is a failed attempt. address is "" where it is the host itself,
// or unknown.
type dialFailure struct {
	address string
	err     error
}

func (f dialFailures) Error() string {
	texts := make([]string, len(f))
	for i, failure := range f {
		texts[i] = failure.text()
		if failure.address != "" {
			texts[i] += " by " + failure.address
		}
	}
	return strings.Join(texts, "; ")
}

func (f dialFailures) Unwrap() []error {
	causes := make([]error, len(f))
	for i, failure := range f {
		causes[i] = failure.err
	}
	return causes
}

// text leaves out what package net puts in front: "dial tcp" and the address.
func (f dialFailure) text() string {
	var name *net.DNSError
	var number syscall.Errno
	var network net.Error
	switch {
	case errors.As(f.err, &name) && name.IsNotFound:
		return "no such host"
	case errors.As(f.err, &number):
		return number.Error()
	case errors.As(f.err, &network) && network.Timeout():
		return "no answer in time"
	}
	return f.err.Error()
}

func handshakeError(err error, broker address.Broker) error {
	var closed *amqp.Error
	if !errors.As(err, &closed) {
		return &ConnectError{Kind: ErrUnreachable, What: broker.Place() + " does not speak AMQP", Err: err, Cure: "Check host and port"}
	}
	switch {
	case closed == amqp.ErrVhost, closed.Code == amqp.NotAllowed, closed.Code == amqp.NotFound:
		vhost, reason := broker.VHost, closed.Reason
		if broker.Hidden {
			vhost, reason = "***", "not shown, because the address has an @ after its host"
		}
		return &ConnectError{Kind: ErrVhost, What: fmt.Sprintf("virtual host %q of %s for user %q (RabbitMQ: %d %s)", vhost, broker.Place(), broker.User, closed.Code, reason),
			Cure: "Create it, or give the user its permissions"}
	case closed.Code == amqp.AccessRefused:
		return &ConnectError{Kind: ErrCredentials, What: fmt.Sprintf("user %q at %s (RabbitMQ: %s)", broker.User, broker.Place(), brokerText(closed)),
			Cure: "Check user and password in the broker URL"}
	}
	if !closed.Server {
		return &ConnectError{Kind: ErrUnreachable, What: broker.Place() + " does not answer as RabbitMQ does", Err: errors.New(closed.Reason), Cure: "Check host and port"}
	}
	return &ConnectError{Kind: ErrUnreachable, What: fmt.Sprintf("%s closed the connection at its start (RabbitMQ: %s)", broker.Place(), brokerText(closed)),
		Cure: "See RabbitMQ's log for the reason"}
}

// watch starts a goroutine that ends the session when the connection or
// consumeChannel is closed or a consumer is cancelled. The goroutine ends with
// the connection.
func (s *session) watch() {
	connClosed := s.conn.NotifyClose(make(chan *amqp.Error, 1))
	channelClosed := s.consumeChannel.NotifyClose(make(chan *amqp.Error, 1))
	// When the broker cancels a consumer, connection and channel stay open:
	// without this the worker would receive nothing any more and not notice
	// (docs/celery.md#consuming).
	cancelled := s.consumeChannel.NotifyCancel(make(chan string, 1))
	blocked := s.conn.NotifyBlocked(make(chan amqp.Blocking, 1))
	go func() {
		for {
			select {
			case err, ok := <-connClosed:
				s.fail(closeReason("connection", err, ok))
				return
			case err, ok := <-channelClosed:
				s.fail(closeReason("channel", err, ok))
				channelClosed, cancelled = nil, nil
			case tag, ok := <-cancelled:
				if !ok {
					cancelled = nil
					continue
				}
				s.fail(fmt.Errorf("broker cancelled consumer %s: its queue was deleted or moved", tag))
			case b, ok := <-blocked:
				if !ok {
					blocked = nil
					continue
				}
				s.blocked.Store(b.Active)
				if b.Active {
					s.log.Warn("broker accepts no messages", "broker", s.broker, "reason", b.Reason)
				} else {
					s.log.Info("broker accepts messages again", "broker", s.broker)
				}
			}
		}
	}()
}

func closeReason(what string, err *amqp.Error, ok bool) error {
	if !ok || err == nil {
		return &closedError{what: what}
	}
	return &closedError{what: what, code: err.Code, reason: err.Reason}
}

// closedError says that a connection or a channel was closed. Code is 0 if there is no
// reason.
type closedError struct {
	what   string
	code   int
	reason string
}

func (e *closedError) Error() string {
	if e.code == 0 {
		return e.what + " closed"
	}
	return fmt.Sprintf("broker closed the %s: %d %s", e.what, e.code, e.reason)
}

// fail marks the session as lost, with the first error as the reason, and wakes
// everything that waits for an answer of it.
func (s *session) fail(err error) {
	s.lostOnce.Do(func() {
		s.lostErr = err
		close(s.lost)
		s.registry.lose(s)
	})
}

// failAfter ends the session when ctx ends, until end is called.
func (s *session) failAfter(ctx context.Context) (end func()) {
	stop := context.AfterFunc(ctx, func() {
		s.fail(context.Cause(ctx))
		_ = s.raw.Close()
	})
	return func() { stop() }
}

func (s *session) isLost() bool {
	select {
	case <-s.lost:
		return true
	default:
		return false
	}
}

// call runs a synchronous method of consumeChannel.
func (s *session) call(what string, method func() error) error {
	s.consumeMu.Lock()
	defer s.consumeMu.Unlock()
	defer s.guard(what)()
	return method()
}

// guard ends the session unless done is called within callTimeout. amqp091-go
// itself waits for an answer as long as heartbeats arrive.
func (s *session) guard(what string) (done func()) {
	timer := time.AfterFunc(callTimeout, func() {
		s.fail(fmt.Errorf("broker did not answer %s within %v", what, callTimeout))
		_ = s.raw.Close()
	})
	return func() { timer.Stop() }
}

// close closes the connection, with the AMQP handshake if it is still open, and
// waits for the goroutines that receive.
func (s *session) close() {
	s.fail(errors.New("closed by the worker"))
	if !s.conn.IsClosed() {
		_ = s.conn.CloseDeadline(time.Now().Add(2 * time.Second))
	}
	_ = s.raw.Close()
	s.consumers.Wait()
}

// link holds the current session, and lets goroutines wait for the next one.
type link struct {
	mu           sync.Mutex
	session      *session      // nil while disconnected
	changed      chan struct{} // closed at the next change
	hasConsumers bool          // every queue has its consumer on the session
	since        time.Time     // when hasConsumers changed last
	err          error         // why there are no consumers: the last failure
}

func (l *link) set(s *session, hasConsumers bool, err error, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.hasConsumers != hasConsumers || l.since.IsZero() {
		l.since = now
	}
	l.session, l.hasConsumers, l.err = s, hasConsumers, err
	if l.changed != nil {
		close(l.changed)
	}
	l.changed = make(chan struct{})
}

// connected sets a session that has no consumers yet. It keeps the last error,
// so that Ready reports the reason during an attempt too, and not only between
// two attempts.
func (l *link) connected(s *session, now time.Time) {
	l.mu.Lock()
	err := l.err
	l.mu.Unlock()
	l.set(s, false, err, now)
}

// get waits for a session that is not lost. It returns the cause of ctx when
// that ends first.
func (l *link) get(ctx context.Context) (*session, error) {
	for {
		l.mu.Lock()
		if l.changed == nil {
			l.changed = make(chan struct{})
		}
		s, changed := l.session, l.changed
		l.mu.Unlock()
		if s != nil && !s.isLost() {
			return s, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}
