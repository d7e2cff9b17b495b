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

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

const (
	// reachPause and reachTime bound the time without the lock once the server
	// is there again: together they are well below Config.TakeoverGrace. Each
	// try sends a SYN at once, where one long try would send its third one
	// after 3 s and its fourth after 7.
	reachPause = 200 * time.Millisecond
	reachTime  = time.Second

	// proofPause is the time between two questions to the server whether it is
	// still there, while this worker runs a step; idlePause while it does not.
	proofPause = 500 * time.Millisecond
	idlePause  = 10 * time.Second
	// proofTime is how long an answer may take. A path that was cut without a
	// word is given up then. It is long, since giving up a session that is
	// only slow gives the lock away.
	proofTime = 5 * time.Second
)

// errConnectionGone is what workerLock reports of a session that ended.
var errConnectionGone = errors.New("the worker's session is not connected")

// workerLock is how a worker proves that it is alive: a session of its own
// that holds the advisory lock of the worker's key. The server frees the lock
// the moment the session ends, so a killed process is known to be dead at
// once, and a live one is never taken for dead because of a clock.
//
// After a lost session it connects again and takes the lock again, within
// moments of the server being back; others wait Config.TakeoverGrace before
// they believe that a lock is gone for good.
//
// While a step runs, the session is asked every 500 ms whether it is alive:
// waiting alone would not notice a path that was cut without a word. When it
// was last proven is what the worker goes by who has to know whether others
// may count it dead.
//
// It opens nothing before the first begin: commands that only read do not
// need it.
type workerLock struct {
	connect *pgx.ConnConfig
	// balance puts the hosts of a copy of connect into another order.
	balance func(*pgx.ConnConfig)
	log     *slog.Logger
	// key of this Store, drawn at random: a worker that starts again is
	// another holder, so the claims of its former life are free.
	key int64
	// atWork says whether this worker runs a step.
	atWork func() bool

	mu      sync.Mutex
	started bool          // written by ensure
	closed  bool          // written by close
	held    chan struct{} // closed while the lock is held; replaced by the loop
	session int           // counts the sessions that held it; written by the loop
	lastErr error         // of the loop's last try, nil while held
	proven  time.Time     // the last moment at which the lock was held for certain; written by the loop
	look    func()        // ends the loop's wait; replaced by the loop
	cancel  context.CancelFunc
	done    chan struct{} // closed by the loop when it has ended
}

func newWorkerLock(c *connection, config Config, atWork func() bool) *workerLock {
	connect := c.pool.ConnConfig.Copy()
	dial := connect.DialFunc
	connect.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, reachTime)
		defer cancel()
		return dial(ctx, network, address)
	}
	return &workerLock{
		connect: connect,
		balance: c.balance,
		log:     config.Logger,
		key:     rand.Int64N(1<<62) + 1,
		atWork:  atWork,
		held:    make(chan struct{}),
		look:    func() {},
	}
}

// ensure returns when the lock is held, with a number that is another one
// after each lost session, or with the reason why it is not held.
func (a *workerLock) ensure(ctx context.Context) (session int, err error) {
	a.mu.Lock()
	if a.closed {
		a.mu.Unlock()
		return 0, failure(nil, "the store is closed")
	}
	if !a.started {
		a.started = true
		loop, cancel := context.WithCancel(context.Background())
		a.cancel, a.done = cancel, make(chan struct{})
		go a.loop(loop)
	}
	held := a.held
	a.mu.Unlock()
	wait, cancel := context.WithTimeout(ctx, a.connect.ConnectTimeout)
	defer cancel()
	select {
	case <-held:
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.session, nil
	case <-wait.Done():
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.lastErr != nil {
			return 0, a.lastErr
		}
		return 0, errConnectionGone
	}
}

func (a *workerLock) close() {
	a.mu.Lock()
	a.closed = true
	cancel, done := a.cancel, a.done
	a.mu.Unlock()
	if cancel != nil {
		cancel()
		<-done
	}
}

func (a *workerLock) loop(ctx context.Context) {
	defer close(a.done)
	lost := false
	for n := 0; ctx.Err() == nil; n++ {
		conn, asked, err := a.take(ctx)
		if err != nil {
			a.mu.Lock()
			a.lastErr = err
			a.mu.Unlock()
			// Shorter than the backoff of calls: each second without the lock
			// is one in which others count us dead.
			select {
			case <-ctx.Done():
			case <-time.After(min(backoff(n), reachPause)):
			}
			continue
		}
		n = 0
		a.mu.Lock()
		a.lastErr = nil
		a.proven = asked
		a.session++
		close(a.held)
		a.mu.Unlock()
		faultpoint.Hit(faultpoint.SessionEstablished)
		if lost {
			a.log.Info("database session of the worker is back")
		}
		err = a.keep(ctx, conn)
		faultpoint.Hit(faultpoint.SessionLost)
		a.mu.Lock()
		a.held = make(chan struct{})
		a.lastErr = err
		a.mu.Unlock()
		farewell, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		_ = conn.Close(farewell) // it is broken, or we are going: both fine
		cancel()
		if ctx.Err() == nil {
			lost = true
			a.log.Warn("database session of the worker was lost, connecting again", "error", translate("keep the session", err))
		}
	}
}

// keep returns when the session has ended, and notes meanwhile when it was
// alive.
func (a *workerLock) keep(ctx context.Context, conn *pgx.Conn) error {
	for {
		wait, look := context.WithCancel(ctx)
		a.mu.Lock()
		a.look = look
		a.mu.Unlock()
		pause := idlePause
		if a.atWork() { // after look is set: a step that begins now ends the wait
			pause = proofPause
		}
		wait, cancel := context.WithTimeout(wait, pause)
		// Nobody notifies us: this ends when the session does, or the pause.
		_, err := conn.WaitForNotification(wait)
		paused := wait.Err() != nil
		cancel()
		look()
		switch {
		case ctx.Err() != nil, err != nil && (!paused || conn.IsClosed()):
			return err
		}
		asked := time.Now()
		limit, cancel := context.WithTimeout(ctx, proofTime)
		err = conn.Ping(limit)
		cancel()
		if err != nil {
			return err
		}
		a.mu.Lock()
		a.proven = asked
		a.mu.Unlock()
	}
}

// prove asks for a proof now, and every 500 ms while a step runs.
func (a *workerLock) prove() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.look()
}

func (a *workerLock) confirmedAt() time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.proven
}

// dial opens a session.
func (a *workerLock) dial(ctx context.Context) (*pgx.Conn, error) {
	connect := a.connect.Copy()
	a.balance(connect)
	return pgx.ConnectConfig(ctx, connect)
}

// take opens the session and takes the lock. An old session of ours that the
// server has not yet given up makes it wait, as does somebody who is looking.
// At the time that it returns the lock was not yet lost.
func (a *workerLock) take(ctx context.Context) (*pgx.Conn, time.Time, error) {
	limit, cancel := context.WithTimeout(ctx, a.connect.ConnectTimeout)
	defer cancel()
	conn, err := a.dial(limit)
	if err != nil {
		return nil, time.Time{}, err
	}
	// The session idles for hours and must neither be ended for that nor
	// outlive a host that lost its power: keepalives find that out in seconds,
	// and the user timeout when an answer of the server is on its way, during
	// which there are no keepalives.
	const settings = `SELECT set_config(name, value, false)
		FROM (VALUES ('idle_session_timeout', '0'), ('statement_timeout', '0'), ('lock_timeout', '0'),
		             ('tcp_keepalives_idle', '5'), ('tcp_keepalives_interval', '2'), ('tcp_keepalives_count', '3'),
		             ('tcp_user_timeout', '10000')) AS wanted (name, value)
		WHERE EXISTS (SELECT FROM pg_catalog.pg_settings AS s WHERE s.name = wanted.name)`
	if _, err = conn.Exec(limit, settings, pgx.QueryExecModeExec); err == nil {
		_, err = conn.Exec(limit, `SELECT pg_advisory_lock($1)`, pgx.QueryExecModeExec, a.key)
	}
	asked := time.Now()
	if err == nil {
		// Whatever the lock had to wait for: this answer is of now.
		err = conn.Ping(limit)
	}
	if err != nil {
		_ = conn.Close(context.WithoutCancel(limit))
		return nil, time.Time{}, err
	}
	return conn, asked, nil
}
