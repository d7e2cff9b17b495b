package worker

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
)

const (
	// resolveTimeout leaves a resolver time for its second name server.
	resolveTimeout = 10 * time.Second
	// dialTimeout is short, so that a path which is there again is found soon:
	// one long attempt sends its third SYN after 3 s, its fourth after 7 and
	// its fifth after 15; short ones send one every second, almost.
	dialTimeout = 1500 * time.Millisecond
	// handshakeTimeout is RabbitMQ's own for its side.
	handshakeTimeout = 10 * time.Second
	// callTimeout bounds a synchronous method of the broker. One that stays
	// unanswered means that the connection is as good as lost.
	callTimeout = 30 * time.Second
)

// session is one connection to a broker with everything that lives and dies
// with it: the channel that consumes, the channel that publishes, and the
// validity of every delivery tag. It is never mended: when any part is lost,
// all is lost, and the worker makes a new one.
type session struct {
	broker string // host:port/vhost, for messages
	conn   *amqp.Connection
	log    *slog.Logger

	// consuming carries consumers and acknowledgements. consumeMu serialises
	// its synchronous methods, which amqp091-go does not do.
	consuming *amqp.Channel
	consumeMu sync.Mutex
	consumers sync.WaitGroup // goroutines that receive

	publisher publisher
	// declared are the queues that were declared on this connection; guarded
	// by declareMu.
	declareMu sync.Mutex
	declared  map[string]bool
	// subscriptions are those of the queues that are consumed on it; guarded
	// by subscriptionsMu.
	subscriptionsMu sync.Mutex
	subscriptions   map[string]*subscription
	askers          askers

	blocked atomic.Bool // the broker takes no messages: connection.blocked

	lost     chan struct{}
	lostOnce sync.Once
	lostErr  error // set before lost is closed

	raw net.Conn
}

// connect tries each broker once and returns the errors of all.
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
	// amqp091-go takes no context: when ctx ends, the handshake fails.
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
		declared: map[string]bool{},
		askers:   askers{turn: make(chan struct{}, 1)},
		lost:     make(chan struct{}),
	}
	s.publisher.init(s)
	answered := s.guard("channel.open")
	s.consuming, err = conn.Channel()
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
			// Its own text tells host and port, which may be a part of the
			// password.
			err = errHidden
		}
	}
	if err != nil {
		return nil, &ConnectError{Kind: ErrUnreachable, What: "cannot connect to " + place, Err: err, Cure: "Check that RabbitMQ runs and that the address is right"}
	}
	// Cleared by amqp091-go once the connection is open.
	_ = conn.SetDeadline(time.Now().Add(handshakeTimeout))
	if !broker.TLS {
		return conn, nil
	}
	config := w.cfg.TLS.Clone()
	if config == nil {
		// Read each time, so that files may be replaced.
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

// errHidden stands for what is wrong with a host that must not be named.
var errHidden = errors.New("it has an @ behind its host, so that it is not shown; write %40 for an @, %2F for a / in a password")

// dialHost tries each address of a host in turn.
func dialHost(ctx context.Context, host string, port int) (net.Conn, error) {
	lookup, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	addresses, err := net.DefaultResolver.LookupHost(lookup, host)
	if err != nil {
		return nil, err
	}
	dialer := net.Dialer{Timeout: dialTimeout, KeepAlive: 15 * time.Second}
	var failures []error
	for _, address := range addresses {
		conn, err := dialer.DialContext(ctx, "tcp", net.JoinHostPort(address, strconv.Itoa(port)))
		if err == nil {
			return conn, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		failures = append(failures, err)
	}
	return nil, errors.Join(failures...)
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
			vhost, reason = "***", "it is not shown, as an @ stands behind the host"
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

// watch ends the session when its connection or its consuming channel goes.
// Its goroutines end with them.
func (s *session) watch() {
	connClosed := s.conn.NotifyClose(make(chan *amqp.Error, 1))
	channelClosed := s.consuming.NotifyClose(make(chan *amqp.Error, 1))
	// A cancelled consumer leaves connection and channel open: without this
	// a worker would go silent (docs/celery.md#consuming).
	cancelled := s.consuming.NotifyCancel(make(chan string, 1))
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
					s.log.Warn("broker takes no messages", "broker", s.broker, "reason", b.Reason)
				} else {
					s.log.Info("broker takes messages again", "broker", s.broker)
				}
			}
		}
	}()
}

func closeReason(what string, err *amqp.Error, ok bool) error {
	if !ok || err == nil {
		return fmt.Errorf("%s closed", what)
	}
	return fmt.Errorf("broker closed the %s: %d %s", what, err.Code, err.Reason)
}

// fail marks the session as lost, once. Everything that waits for it goes on.
func (s *session) fail(err error) {
	s.lostOnce.Do(func() {
		s.lostErr = err
		close(s.lost)
	})
}

func (s *session) isLost() bool {
	select {
	case <-s.lost:
		return true
	default:
		return false
	}
}

// call runs a synchronous method of the consuming channel.
func (s *session) call(what string, method func() error) error {
	s.consumeMu.Lock()
	defer s.consumeMu.Unlock()
	defer s.guard(what)()
	return method()
}

// guard ends the session unless done is called within callTimeout: amqp091-go
// itself waits for an answer as long as heartbeats let it.
func (s *session) guard(what string) (done func()) {
	timer := time.AfterFunc(callTimeout, func() {
		s.fail(fmt.Errorf("broker did not answer %s within %v", what, callTimeout))
		_ = s.raw.Close()
	})
	return func() { timer.Stop() }
}

// close ends the connection, politely if the broker still listens, and waits
// for the goroutines that receive.
func (s *session) close() {
	s.fail(errors.New("closed by the worker"))
	if !s.conn.IsClosed() {
		_ = s.conn.CloseDeadline(time.Now().Add(2 * time.Second))
	}
	_ = s.raw.Close()
	s.consumers.Wait()
}

// link is the session of the moment, for those who wait for one.
type link struct {
	mu      sync.Mutex
	session *session      // nil while disconnected
	changed chan struct{} // closed at the next change
	err     error         // why the worker does not consume, as last known
	// consuming says that the session has all its consumers.
	consuming bool
	since     time.Time // when that changed last
}

func (l *link) set(s *session, consuming bool, err error, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.consuming != consuming || l.since.IsZero() {
		l.since = now
	}
	l.session, l.consuming, l.err = s, consuming, err
	if l.changed != nil {
		close(l.changed)
	}
	l.changed = make(chan struct{})
}

// connected makes a session known that has no consumers yet. The reason why the
// worker does not consume stays what it was: whoever asks during an attempt
// must not hear less than between two.
func (l *link) connected(s *session, now time.Time) {
	l.mu.Lock()
	err := l.err
	l.mu.Unlock()
	l.set(s, false, err, now)
}

// get waits for a session that is not lost.
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
