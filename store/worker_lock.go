package store

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/internal/database"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

const (
	// reconnectPause and reconnectTimeout bound the time without the lock once the
	// server is available again. Together they are well below
	// Config.TakeoverGrace. Each try sends a SYN at once; one long try would send
	// its third SYN after 3 s and its fourth after 7 s.
	reconnectPause   = 200 * time.Millisecond
	reconnectTimeout = time.Second

	// activePingInterval is the time between two pings while this worker runs a
	// step, idlePingInterval while it does not.
	activePingInterval = 500 * time.Millisecond
	idlePingInterval   = 10 * time.Second
	// pingTimeout is how long the answer to a ping may take. After that the session
	// counts as lost, as it is when the network fails silently. It is long, since
	// a worker that gives up a merely slow session also gives up its lock.
	pingTimeout = 5 * time.Second
	// closeTimeout bounds the orderly end of a session.
	closeTimeout = 2 * time.Second
)

// errNoSession is the reason for a missing lock when nothing else is known.
var errNoSession = errors.New("the worker's session is not connected")

// workerLock shows other workers that this one is alive. It is a database session
// of its own that has the advisory lock of the worker's key. The server frees the
// lock when the session ends. So others notice at once that a process was killed,
// and no difference between clocks makes a live worker look dead.
//
// When the session is lost, workerLock connects again and acquires the lock again,
// within moments of the server being available. Other workers consider this one
// dead only when its lock has been free for Config.TakeoverGrace.
//
// A session that takes no writes counts as lost. A standby gives advisory locks too,
// but workers at the primary do not see them: the old primary of a fail-over would
// confirm a lock that is free at the new one.
//
// While a step runs, workerLock pings the server every 500 ms: a network that
// fails silently would otherwise go unnoticed. By the time of the last answer the
// worker knows whether others may consider it dead (Store.LockConfirmedAt).
//
// It connects at the first call of ensure. Commands that only read do not need
// it.
type workerLock struct {
	connect *pgx.ConnConfig
	// balance puts the hosts of a copy of connect into another order.
	balance func(*pgx.ConnConfig)
	log     *slog.Logger
	// key is drawn at random for each Store. A restarted worker has another key, so
	// that its claims from before the restart are free.
	key int64
	// atWork says whether this worker runs a step.
	atWork func() bool
	// moved is called when the session takes writes again after it had taken none:
	// sessions of before may be at a server that still takes none.
	moved func()

	mu        sync.Mutex
	started   bool          // written by ensure
	closed    bool          // written by close
	acquired  chan struct{} // closed while the session has the lock; replaced by the loop
	session   int           // counts the sessions that acquired the lock; written by the loop
	lastErr   error         // of the loop's last try, nil while it has the lock; written by the loop
	confirmed time.Time     // when the last ping that was answered was sent; written by the loop
	endWait   func()        // ends the loop's wait for the next ping; replaced by the loop
	cancel    context.CancelFunc
	done      chan struct{} // closed by the loop when it returns
}

func newWorkerLock(c *database.Connection, config Config, atWork func() bool, moved func()) *workerLock {
	connect := c.Pool.ConnConfig.Copy()
	dial := connect.DialFunc
	connect.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, reconnectTimeout)
		defer cancel()
		return dial(ctx, network, address)
	}
	return &workerLock{
		connect:  connect,
		balance:  c.Balance,
		log:      config.Logger,
		key:      rand.Int64N(1<<62) + 1,
		atWork:   atWork,
		moved:    moved,
		acquired: make(chan struct{}),
		endWait:  func() {},
	}
}

// ensure waits until the session has the lock, for at most the connect timeout. It
// returns the number of the session, which is another one after each reconnect,
// or the reason why there is no lock.
func (l *workerLock) ensure(ctx context.Context) (session int, err error) {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return 0, failure(nil, "the store is closed")
	}
	if !l.started {
		l.started = true
		loop, cancel := context.WithCancel(context.Background())
		l.cancel, l.done = cancel, make(chan struct{})
		go l.loop(loop)
	}
	acquired := l.acquired
	l.mu.Unlock()
	wait, cancel := context.WithTimeout(ctx, l.connect.ConnectTimeout)
	defer cancel()
	select {
	case <-acquired:
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.session, nil
	case <-wait.Done():
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.lastErr != nil {
			return 0, l.lastErr
		}
		return 0, errNoSession
	}
}

func (l *workerLock) close() {
	l.mu.Lock()
	l.closed = true
	cancel, done := l.cancel, l.done
	l.mu.Unlock()
	if cancel != nil {
		cancel()
		<-done
	}
}

func (l *workerLock) loop(ctx context.Context) {
	defer close(l.done)
	lost, readOnly := false, false
	for n := 0; ctx.Err() == nil; n++ {
		conn, pinged, err := l.acquire(ctx)
		if err != nil {
			readOnly = readOnly || database.IsReadOnly(err)
			l.mu.Lock()
			l.lastErr = err
			l.mu.Unlock()
			// Shorter than the backoff of calls: while the lock is free, others may
			// consider this worker dead.
			select {
			case <-ctx.Done():
			case <-time.After(min(database.Backoff(n), reconnectPause)):
			}
			continue
		}
		n = 0
		if readOnly {
			readOnly = false
			l.moved()
		}
		l.mu.Lock()
		l.lastErr = nil
		l.confirmed = pinged
		l.session++
		close(l.acquired)
		l.mu.Unlock()
		faultpoint.Hit(faultpoint.SessionEstablished)
		if lost {
			l.log.Info("the worker's database session is connected again")
		}
		err = l.watch(ctx, conn)
		readOnly = database.IsReadOnly(err)
		faultpoint.Hit(faultpoint.SessionLost)
		l.mu.Lock()
		l.acquired = make(chan struct{})
		l.lastErr = err
		l.mu.Unlock()
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		_ = conn.Close(closing) // it is broken or read-only, or the worker stops
		cancel()
		if ctx.Err() == nil {
			lost = true
			l.log.Warn("the worker's database session was lost; connecting again", "error", translate("keep the worker's session", err))
		}
	}
}

// watch pings the server until the session has ended, or takes no writes any more,
// and returns why. It records when each answered ping was sent.
func (l *workerLock) watch(ctx context.Context, conn *pgx.Conn) error {
	for {
		wait, endWait := context.WithCancel(ctx)
		l.mu.Lock()
		l.endWait = endWait
		l.mu.Unlock()
		pause := idlePingInterval
		if l.atWork() { // after endWait is set, so that a step that begins now ends the wait
			pause = activePingInterval
		}
		wait, cancel := context.WithTimeout(wait, pause)
		// Only to notice the end of the session: no notification is ever sent.
		_, err := conn.WaitForNotification(wait)
		paused := wait.Err() != nil
		cancel()
		endWait()
		switch {
		case ctx.Err() != nil, err != nil && (!paused || conn.IsClosed()):
			return err
		}
		pinged := time.Now()
		limit, cancel := context.WithTimeout(ctx, pingTimeout)
		err = database.CheckWrites(limit, conn)
		cancel()
		if err != nil {
			return err
		}
		l.mu.Lock()
		l.confirmed = pinged
		l.mu.Unlock()
	}
}

// pingNow ends the wait for the next ping. The next wait is short if a step runs.
func (l *workerLock) pingNow() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.endWait()
}

func (l *workerLock) confirmedAt() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.confirmed
}

// dial opens a session.
func (l *workerLock) dial(ctx context.Context) (*pgx.Conn, error) {
	connect := l.connect.Copy()
	l.balance(connect)
	return pgx.ConnectConfig(ctx, connect)
}

// acquire opens the session and locks. It waits while the server still has an
// earlier session of ours, or while another worker tests the lock. At the
// returned time the session had the lock.
func (l *workerLock) acquire(ctx context.Context) (*pgx.Conn, time.Time, error) {
	limit, cancel := context.WithTimeout(ctx, l.connect.ConnectTimeout)
	defer cancel()
	conn, err := l.dial(limit)
	if err != nil {
		return nil, time.Time{}, err
	}
	// The session is idle for hours. The server must not end it for that, but it
	// must end it soon after this host has lost its power: TCP keepalives notice
	// that in seconds, and the user timeout does while the server sends an answer,
	// when TCP sends no keepalives.
	const settings = `SELECT set_config(name, value, false)
		FROM (VALUES ('idle_session_timeout', '0'), ('statement_timeout', '0'), ('lock_timeout', '0'),
		             ('tcp_keepalives_idle', '5'), ('tcp_keepalives_interval', '2'), ('tcp_keepalives_count', '3'),
		             ('tcp_user_timeout', '10000')) AS wanted (name, value)
		WHERE EXISTS (SELECT FROM pg_catalog.pg_settings AS s WHERE s.name = wanted.name)`
	if _, err = conn.Exec(limit, settings, pgx.QueryExecModeExec); err == nil {
		_, err = conn.Exec(limit, `SELECT pg_advisory_lock($1)`, pgx.QueryExecModeExec, l.key)
	}
	pinged := time.Now()
	if err == nil {
		// The lock may have waited. This answer is from now.
		err = database.CheckWrites(limit, conn)
	}
	if err != nil {
		_ = conn.Close(context.WithoutCancel(limit))
		return nil, time.Time{}, err
	}
	return conn, pinged, nil
}
