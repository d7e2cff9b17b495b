package store

import (
	"context"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/internal/database"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
)

// Config says which database, and who we are there.
type Config struct {
	// URL is the address of the database, as SQLAlchemy reads it and as a Celery
	// result backend has it: postgresql://user:password@host:port/database, also
	// with db+ before it or the name of a Python driver in it. What stands in a
	// password counts literally unless it ends it. Every option of libpq 18 may
	// stand in its query, and is honoured, or has no effect and is logged, or is
	// refused with what to do; other names are parameters of the server
	// (search_path, statement_timeout). Behind PgBouncer in transaction mode
	// statements are not prepared, once one has failed for it, or from the start with
	// default_query_exec_mode=exec; a worker needs a direct or session-pooled
	// connection all the same, as its claims live by an advisory lock.
	URL secret.String
	// Worker is the worker's node name. It stands in claims, and is the
	// application_name. Defaults to "mm-orchestrator".
	Worker string
	// Connections is the most connections that the store opens for statements,
	// besides the session of the worker's lock. Defaults to 2.
	Connections int
	// ConnectTimeout bounds one attempt to connect, unless the address says
	// otherwise by connect_timeout. Defaults to 10 s.
	ConnectTimeout time.Duration
	// TryTimeout bounds one try of a call. A server that does not answer in this
	// time counts as unavailable. Defaults to 20 s.
	TryTimeout time.Duration
	// RetryFor is how long one call retries when the connection breaks or the
	// server is unavailable. Defaults to 30 s.
	RetryFor time.Duration
	// TakeoverGrace is how long the lock of a claim's holder must be free before
	// another worker takes the claim over. A live worker whose session was cut
	// has that long to connect again, or to end its commands. Defaults to 2 s,
	// which other timeouts rely on (reconnectTimeout,
	// orchestrator.Config.IsolatedAfter). It cannot be switched off.
	TakeoverGrace time.Duration
	// Now is the clock. Defaults to time.Now.
	Now func() time.Time
	// Redact removes secrets from the texts of audit records. Defaults to none.
	Redact func(string) string
	// Logger is for what happens between calls, such as the loss of the worker's
	// session. By default nothing is logged.
	Logger *slog.Logger
}

// WithDefaults returns a copy with every unset field at its default.
func (c Config) WithDefaults() Config {
	if c.Worker == "" {
		c.Worker = "mm-orchestrator"
	}
	if c.Connections == 0 {
		c.Connections = 2
	}
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = 10 * time.Second
	}
	if c.TryTimeout == 0 {
		c.TryTimeout = 20 * time.Second
	}
	if c.RetryFor == 0 {
		c.RetryFor = 30 * time.Second
	}
	if c.TakeoverGrace == 0 {
		c.TakeoverGrace = 2 * time.Second
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// Validate names the first field that cannot be used.
func (c Config) Validate() error {
	switch {
	case c.URL.IsZero():
		return failure(ErrInvalid, "store: URL is empty: give the database as postgresql://user:password@host:port/database")
	case c.Connections < 1:
		return failure(ErrInvalid, "store: Connections is %d, must be at least 1", c.Connections)
	case c.ConnectTimeout < 0 || c.TryTimeout < 0 || c.RetryFor < 0 || c.TakeoverGrace < 0:
		return failure(ErrInvalid, "store: ConnectTimeout %s, TryTimeout %s, RetryFor %s and TakeoverGrace %s must not be negative",
			c.ConnectTimeout, c.TryTimeout, c.RetryFor, c.TakeoverGrace)
	}
	return nil
}

// Store is access to a database. All methods may be called from any goroutine.
// While the server restarts or fails over, calls retry for Config.RetryFor and
// then return ErrUnavailable.
type Store struct {
	config     Config
	place      string
	pool       *pgxpool.Pool
	db         *database.DB
	workerLock *workerLock

	mu sync.Mutex
	// ownClaims are the claims, by token, that a call of BeginStep asks for, or
	// that this Store has and that were neither finished nor released. The value
	// is nil until BeginStep has returned the claim.
	ownClaims map[int64]*issuedClaim
	// pendingReleases are the tokens, with their runs, of claims that no caller
	// has any more and whose rows may still name this worker: see releaseLater.
	pendingReleases map[int64]string
	// releasing is closed when releasePending has returned, and nil while it does
	// not run. cancelReleasing ends it.
	releasing       chan struct{}
	cancelReleasing context.CancelFunc
	closed          bool // written by Close
	// taken are the ids of the parked messages that TakeParked has returned and
	// that were neither dropped nor kept.
	taken map[int64]bool
	// left says that the worker has left its queue; written by LeaveQueue.
	left bool

	// taking is a semaphore: one call of TakeParked at a time.
	taking chan struct{}
}

// Open checks the configuration and connects to the database once. If that
// fails, it returns ErrUnavailable or ErrRefused at once, without retries: at a
// start the operator is watching.
func Open(ctx context.Context, config Config) (*Store, error) {
	config = config.WithDefaults()
	if err := config.Validate(); err != nil {
		return nil, err
	}
	where, err := address.ParseDatabase(config.URL.Reveal())
	if err != nil {
		return nil, failure(ErrInvalid, "cannot read the database address %s: %s", address.MaskDatabase(config.URL.Reveal()), err)
	}
	c, err := database.NewConnection(where, database.Options{
		ApplicationName: applicationName(config.Worker), Connections: config.Connections, ConnectTimeout: config.ConnectTimeout,
	})
	if err != nil {
		return nil, err
	}
	for _, ignored := range c.Ignored {
		config.Logger.Warn("option of the database address has no effect", "database", c.Place, "option", ignored.Option, "reason", ignored.Why)
	}
	s := &Store{
		config:          config,
		place:           c.Place,
		ownClaims:       map[int64]*issuedClaim{},
		pendingReleases: map[int64]string{},
		taken:           map[int64]bool{},
		taking:          make(chan struct{}, 1),
	}
	s.pool, err = pgxpool.NewWithConfig(ctx, c.Pool)
	if err != nil {
		return nil, database.HideAddress(where, translate("open the database "+s.place, err))
	}
	s.db = &database.DB{Pool: s.pool, Place: s.place, TryTimeout: config.TryTimeout, RetryFor: config.RetryFor, Translate: translate, Connection: c, Logger: config.Logger}
	s.workerLock = newWorkerLock(c, config, s.atWork, s.pool.Reset)
	if err := s.pool.Ping(ctx); err != nil {
		s.pool.Close()
		return nil, database.HideAddress(where, translate("reach the database "+s.place, err))
	}
	return s, nil
}

// Close closes all connections and with them frees the worker's lock. It may be
// called twice.
func (s *Store) Close() {
	s.stopReleasing()
	s.workerLock.close()
	s.pool.Close()
}

// Place is host, port and name of the database, without user and password.
func (s *Store) Place() string { return s.place }

// Ping asks the database for an answer, without retries: it is for health
// checks. It returns ErrUnavailable for a database that takes no writes.
func (s *Store) Ping(ctx context.Context) error {
	err := s.pool.AcquireFunc(ctx, func(conn *pgxpool.Conn) error { return database.CheckWrites(ctx, conn.Conn()) })
	if database.IsReadOnly(err) {
		s.pool.Reset() // as database.DB.Retry does
		return translate("write to the database "+s.place, err)
	}
	return translate("reach the database "+s.place, err)
}

// ServerVersion is the server's own text, such as "15.8 (Debian 15.8-1)".
func (s *Store) ServerVersion(ctx context.Context) (string, error) {
	var version string
	err := s.retry(ctx, "read the server version", func(ctx context.Context) error {
		return s.pool.QueryRow(ctx, `SELECT current_setting('server_version')`).Scan(&version)
	})
	return version, err
}

// applicationName is the name in pg_stat_activity. PostgreSQL keeps 63 bytes of
// it, and sends a notice about more.
func applicationName(worker string) string {
	name := worker
	if !strings.HasPrefix(name, "mm-orchestrator") {
		name = "mm-orchestrator " + worker
	}
	return strings.ToValidUTF8(name[:min(len(name), 63)], "")
}

// retry repeats a call until it succeeds, fails for good, or Config.RetryFor is
// over. The call must be safe to repeat when the answer to a commit was lost.
func (s *Store) retry(ctx context.Context, doing string, call func(context.Context) error) error {
	return s.db.Retry(ctx, doing, call)
}

// inTx runs one transaction (READ COMMITTED), repeated by retry.
func (s *Store) inTx(ctx context.Context, doing string, do func(pgx.Tx) error) error {
	return s.db.InTx(ctx, doing, do)
}

// transaction runs one transaction (READ COMMITTED) that locks rows.
func (s *Store) transaction(ctx context.Context, do func(pgx.Tx) error) error {
	return s.db.Transaction(ctx, do)
}

func (s *Store) register(token int64) {
	s.mu.Lock()
	s.ownClaims[token] = nil
	s.mu.Unlock()
	s.workerLock.pingNow()
}

func (s *Store) atWork() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.ownClaims) > 0
}

// LockConfirmedAt returns the last moment at which an answer of the database
// showed that this worker had its lock. For Config.TakeoverGrace after it no
// other worker can have taken over a claim of this one. While this Store has a
// claim, the moment is renewed every 500 ms, unless the database does not
// answer. It is zero before the first BeginStep.
func (s *Store) LockConfirmedAt() time.Time { return s.workerLock.confirmedAt() }

func (s *Store) unregister(token int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.ownClaims, token)
}

func (s *Store) isRegistered(token int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, registered := s.ownClaims[token]
	return registered
}

// issue notes what restoreClaim needs of a registered claim, once BeginStep
// returns it.
func (s *Store) issue(token int64, claim issuedClaim) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ownClaims[token] = &claim
}

// issuedClaim returns nil for a claim that this Store does not have.
func (s *Store) issuedClaim(token int64) *issuedClaim {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ownClaims[token]
}

// now is the clock as PostgreSQL can hold it: UTC, microseconds.
func (s *Store) now() time.Time { return s.config.Now().UTC().Truncate(time.Microsecond) }

func itoa(n int) string { return strconv.Itoa(n) }

// holderState says what is known of a claim's holder. free is the answer of
// pg_try_advisory_xact_lock_shared for another worker's key, nil for this worker's own.
func (s *Store) holderState(holder *int64, free *bool, token int64) holderState {
	switch {
	case holder == nil:
		return holderNone
	case free != nil && *free:
		return holderSuspected
	case free != nil:
		return holderAlive
	case s.isRegistered(token):
		return holderSelf
	}
	return holderNone // an earlier try of this worker, whose answer was lost
}
