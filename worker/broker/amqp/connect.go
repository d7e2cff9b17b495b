package amqp

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/internal/timeout"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
	"github.com/moonladderstudios/mm-orchestrator/worker/internal/wire"
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
	// within it, the connection counts as lost.
	callTimeout = 30 * time.Second
)

// connection is one connection to a broker. It is never repaired: when any part of
// it fails, all of it is lost, and its user makes another one.
//
// Every call of amqp091-go that waits goes through [ask].
type connection struct {
	place string // host:port/vhost
	conn  *amqp.Connection
	wire  *wire.Conn // what conn writes to
	raw   net.Conn
	log   *slog.Logger
	// callTimeout is how long a call may stay unanswered: the constant of this name.
	callTimeout time.Duration
	timeouts    timeout.Group

	// unblocked is nil unless the broker has sent connection.blocked. It is closed
	// when the broker accepts messages again. blockedFor is the sum of the times
	// between both, and blockedSince the begin of the current one.
	blockedMu    sync.Mutex
	unblocked    chan struct{}
	blockedFor   time.Duration
	blockedSince time.Time

	lost     chan struct{}
	lostOnce sync.Once
	lostErr  error // set before lost is closed
}

// dialAny tries each broker once, in order. Its error joins those of all.
func (b *Broker) dialAny(ctx context.Context, purpose string) (*connection, error) {
	var failures []error
	addresses, err := address.ParseBrokers(b.cfg.Addresses)
	if err != nil {
		return nil, err
	}
	for _, at := range addresses {
		c, err := b.dial(ctx, at, purpose)
		if err == nil {
			return c, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		failures = append(failures, err)
	}
	return nil, errors.Join(failures...)
}

func (b *Broker) dial(ctx context.Context, at address.Broker, purpose string) (*connection, error) {
	raw, err := b.dialRaw(ctx, at)
	if err != nil {
		return nil, err
	}
	// amqp091-go takes no context: closing the connection when ctx ends makes
	// the handshake fail.
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
	defer stop()

	rewriting := wire.New(raw)
	conn, err := amqp.Open(rewriting, amqp.Config{
		SASL:      []amqp.Authentication{&amqp.PlainAuth{Username: at.User, Password: at.Password.Reveal()}},
		Vhost:     at.VHost,
		Heartbeat: b.cfg.Heartbeat,
		FrameSize: wire.FrameSize,
		Locale:    "en_US",
		Properties: amqp.Table{
			"product":         "mm-orchestrator worker",
			"platform":        "golang",
			"connection_name": b.cfg.Name + purpose,
		},
	})
	if err != nil {
		_ = raw.Close()
		return nil, handshakeError(err, at)
	}
	// As long as amqp091-go itself would wait: it sends every half interval.
	rewriting.Opened(conn.Config.FrameSize, 3*conn.Config.Heartbeat/2)
	return &connection{
		place:       at.Place(),
		conn:        conn,
		wire:        rewriting,
		raw:         raw,
		log:         b.cfg.Logger,
		callTimeout: callTimeout,
		lost:        make(chan struct{}),
	}, nil
}

// dialRaw connects, with TLS if the address says so.
func (b *Broker) dialRaw(ctx context.Context, at address.Broker) (net.Conn, error) {
	if !at.TLS {
		return b.dialTCP(ctx, at)
	}
	names := at.ServerNames()
	if b.cfg.TLS != nil && b.cfg.TLS.ServerName != "" {
		names = []string{b.cfg.TLS.ServerName}
	}
	var failed error
	for _, name := range names {
		conn, err := b.dialTCP(ctx, at)
		if err != nil {
			return nil, err
		}
		config := b.cfg.TLS.Clone()
		if config == nil {
			// Read for each connection, so that renewed certificates are used.
			if config, err = at.TLSConfig(); err != nil {
				_ = conn.Close()
				return nil, err
			}
		}
		if config == nil {
			config = &tls.Config{MinVersion: tls.VersionTLS12}
		}
		config.ServerName = name
		secure := tls.Client(conn, config)
		if err = secure.HandshakeContext(ctx); err == nil {
			return secure, nil
		}
		_ = conn.Close()
		// A certificate is verified by one name, and a connection ends with a failed
		// handshake. If no name fits, the error is about the first, which is as written.
		var wrongName x509.HostnameError
		isName := errors.As(err, &wrongName)
		if failed == nil || !isName {
			failed = err
		}
		if !isName {
			break
		}
	}
	place := at.Address()
	if at.Hidden {
		place = at.Place()
		if ctx.Err() == nil {
			failed = errHidden
		}
	}
	return nil, &broker.ConnectError{Kind: broker.ErrUnreachable, What: "TLS with " + place + " failed", Err: failed, Cure: "Check the certificates, and that this port speaks TLS"}
}

func (b *Broker) dialTCP(ctx context.Context, at address.Broker) (net.Conn, error) {
	place := at.Address()
	conn, err := dialHost(ctx, at.Host, at.Port)
	if at.Hidden {
		place = at.Place()
		if err != nil && ctx.Err() == nil {
			// The error's own text contains host and port, which may be a part of
			// the password.
			err = errHidden
		}
	}
	if err != nil {
		return nil, &broker.ConnectError{Kind: broker.ErrUnreachable, What: "cannot connect to " + place, Err: err, Cure: "Check that RabbitMQ runs and that the address is right"}
	}
	// It is cleared when the connection is open.
	_ = conn.SetDeadline(time.Now().Add(handshakeTimeout))
	return conn, nil
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

func handshakeError(err error, at address.Broker) error {
	var closed *amqp.Error
	if !errors.As(err, &closed) {
		return &broker.ConnectError{Kind: broker.ErrUnreachable, What: at.Place() + " does not speak AMQP", Err: err, Cure: "Check host and port"}
	}
	switch {
	case closed == amqp.ErrVhost, closed.Code == amqp.NotAllowed, closed.Code == amqp.NotFound:
		vhost, reason := at.VHost, closed.Reason
		if at.Hidden {
			vhost, reason = "***", "not shown, because the address has an @ after its host"
		}
		return &broker.ConnectError{Kind: broker.ErrVhost, What: fmt.Sprintf("virtual host %q of %s for user %q (RabbitMQ: %d %s)", vhost, at.Place(), at.User, closed.Code, reason),
			Cure: "Create it, or give the user its permissions"}
	case closed.Code == amqp.AccessRefused:
		return &broker.ConnectError{Kind: broker.ErrCredentials, What: fmt.Sprintf("user %q at %s (RabbitMQ: %s)", at.User, at.Place(), brokerText(closed)),
			Cure: "Check user and password in the broker URL"}
	}
	if !closed.Server {
		return &broker.ConnectError{Kind: broker.ErrUnreachable, What: at.Place() + " does not answer as RabbitMQ does", Err: errors.New(closed.Reason), Cure: "Check host and port"}
	}
	return &broker.ConnectError{Kind: broker.ErrUnreachable, What: fmt.Sprintf("%s closed the connection at its start (RabbitMQ: %s)", at.Place(), brokerText(closed)),
		Cure: "See RabbitMQ's log for the reason"}
}

// watch starts a goroutine that ends the connection when the broker closes it, closes
// consuming or cancels one of its consumers; consuming may be nil. The goroutine
// ends with the connection.
func (c *connection) watch(consuming *amqp.Channel) {
	connClosed := c.conn.NotifyClose(make(chan *amqp.Error, 1))
	blocked := c.conn.NotifyBlocked(make(chan amqp.Blocking, 1))
	var channelClosed chan *amqp.Error
	var cancelled chan string
	if consuming != nil {
		channelClosed = consuming.NotifyClose(make(chan *amqp.Error, 1))
		// When the broker cancels a consumer, connection and channel stay open:
		// without this the worker would receive nothing any more and not notice
		// (docs/celery.md#consuming).
		cancelled = consuming.NotifyCancel(make(chan string, 1))
	}
	go func() {
		for {
			select {
			case err, ok := <-connClosed:
				c.fail(closeReason("connection", err, ok))
				return
			case err, ok := <-channelClosed:
				c.fail(closeReason("channel", err, ok))
				channelClosed, cancelled = nil, nil
			case tag, ok := <-cancelled:
				if !ok {
					cancelled = nil
					continue
				}
				c.fail(fmt.Errorf("broker cancelled consumer %s: its queue was deleted or moved", tag))
			case b, ok := <-blocked:
				if !ok {
					blocked = nil
					continue
				}
				c.SetBlocked(b.Active)
				if b.Active {
					c.log.Warn("broker accepts no messages", "broker", c.place, "reason", b.Reason)
				} else {
					c.log.Info("broker accepts messages again", "broker", c.place)
				}
			}
		}
	}()
}

// SetBlocked records that the broker has sent connection.blocked or
// connection.unblocked. Tests of package worker call it.
func (c *connection) SetBlocked(blocked bool) {
	c.blockedMu.Lock()
	defer c.blockedMu.Unlock()
	switch {
	case blocked && c.unblocked == nil:
		c.unblocked = make(chan struct{})
		c.blockedSince = time.Now()
	case !blocked && c.unblocked != nil:
		close(c.unblocked)
		c.unblocked = nil
		c.blockedFor += time.Since(c.blockedSince)
	}
}

// Blocked is for how long, in total, the broker has accepted no messages.
func (c *connection) Blocked() time.Duration {
	c.blockedMu.Lock()
	defer c.blockedMu.Unlock()
	if c.unblocked != nil {
		return c.blockedFor + time.Since(c.blockedSince)
	}
	return c.blockedFor
}

// waitUnblocked returns nil, or a channel that is closed when the broker accepts
// messages again.
func (c *connection) waitUnblocked() <-chan struct{} {
	c.blockedMu.Lock()
	defer c.blockedMu.Unlock()
	return c.unblocked
}

// patience measures how long the broker leaves something unanswered while it is not
// blocked.
type patience struct {
	c       *connection
	limit   time.Duration
	began   time.Time
	blocked time.Duration // before it began
}

func (c *connection) patience(limit time.Duration) patience {
	return patience{c: c, limit: limit, began: time.Now(), blocked: c.Blocked()}
}

// left is for how long the broker may still not answer; 0 or less if it should have.
// While the broker is blocked it is at least a second.
func (p patience) left() time.Duration {
	left := p.limit - time.Since(p.began) + p.c.Blocked() - p.blocked
	if p.c.isBlocked() {
		left = max(left, time.Second)
	}
	return left
}

func (c *connection) isBlocked() bool { return c.waitUnblocked() != nil }

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

func (e *closedError) Kind() string { return fmt.Sprint(e.what, e.code) }

// foreignError is an error with one of amqp091-go's in it, for users of this package.
type foreignError struct {
	text string
	code int
}

func (e *foreignError) Error() string { return e.text }
func (e *foreignError) Kind() string  { return fmt.Sprint(e.code) }

func ours(err error) error {
	var foreign *amqp.Error
	if errors.As(err, &foreign) {
		return &foreignError{text: err.Error(), code: foreign.Code}
	}
	return err
}

// connectionError wraps a failure of the connection as ErrUnreachable: a retry on
// another connection may succeed.
func (c *connection) connectionError(what string, err error) error {
	return fmt.Errorf("%w: %s: %s: %w", broker.ErrUnreachable, c.place, what, ours(err))
}

// fail marks the connection as lost, with the first error as the reason, and wakes
// everything that waits for an answer of it.
func (c *connection) fail(err error) {
	c.lostOnce.Do(func() {
		c.lostErr = ours(err)
		close(c.lost)
	})
}

func (c *connection) Place() string         { return c.place }
func (c *connection) Lost() <-chan struct{} { return c.lost }

// Err is the reason for which the connection was lost, or nil while it is not.
func (c *connection) Err() error {
	if !c.isLost() {
		return nil
	}
	return c.lostErr
}

func (c *connection) isLost() bool {
	select {
	case <-c.lost:
		return true
	default:
		return false
	}
}

// callOptions describe a call of the broker.
type callOptions struct {
	what string
	// turn, if set, serialises the calls that use it.
	turn chan struct{}
	// patient means that the broker may take any time. Otherwise the connection
	// counts as lost when there is no answer within callTimeout, during which the
	// broker was not blocked. amqp091-go itself waits for an answer as long as
	// heartbeats arrive.
	patient bool
}

// call is ask for a method that only returns an error.
func (c *connection) call(ctx context.Context, o callOptions, method func() error) error {
	_, err := ask(ctx, c, o, func() (struct{}, error) { return struct{}{}, method() })
	return err
}

// ask runs a synchronous method of amqp091-go, which takes no context. It returns
// when the method does, when ctx ends or when the connection is lost. In the latter
// two cases the method continues in the background, and keeps the turn, until the
// broker answers or the connection is closed: it must not write what the caller
// reads.
func ask[T any](ctx context.Context, c *connection, o callOptions, method func() (T, error)) (T, error) {
	var none T
	if o.turn != nil {
		select {
		case o.turn <- struct{}{}:
		case <-c.lost:
			return none, c.lostErr
		case <-ctx.Done():
			return none, context.Cause(ctx)
		}
	}
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		var r result
		r.value, r.err = method()
		if o.turn != nil {
			<-o.turn
		}
		done <- r
	}()
	patience := c.patience(c.callTimeout)
	over, stop := c.timeouts.After(c.callTimeout)
	defer func() { stop() }()
	for {
		select {
		case r := <-done:
			return r.value, r.err
		case <-c.lost:
			return none, c.lostErr
		case <-ctx.Done():
			return none, context.Cause(ctx)
		case <-over:
			left := patience.left()
			if o.patient {
				left = c.callTimeout
			}
			if left > 0 {
				over, stop = c.timeouts.After(left)
				continue
			}
			err := fmt.Errorf("broker did not answer %s within %v", o.what, c.callTimeout)
			c.fail(err)
			_ = c.raw.Close()
			return none, err
		}
	}
}

// Close closes the connection, with the AMQP handshake if it is still open.
func (c *connection) Close() {
	c.fail(errors.New("closed by the worker"))
	if !c.conn.IsClosed() {
		c.wire.EndBy(time.Now().Add(2 * time.Second))
		_ = c.conn.Close()
	}
	_ = c.raw.Close()
}
