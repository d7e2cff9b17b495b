package postgres

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/internal/database"
	"github.com/moonladderstudios/mm-orchestrator/results"
)

// Kinds of errors, for errors.Is. All others are those of the caller's context.
var (
	// ErrUnavailable: the server cannot be reached, is starting, stopping or
	// read-only, lacks a connection, memory or disk space, or ended the statement
	// for a limit or an operator. A later try may succeed.
	ErrUnavailable = database.ErrUnavailable
	// ErrSchema: the table, the sequence or a column is missing.
	ErrSchema = database.ErrSchema
	// ErrInvalid: a field of the configuration, or an outcome that the table can
	// never store. Errors of Store with this kind are marked by
	// [results.Permanent].
	ErrInvalid = database.ErrInvalid
	// ErrRefused: the server refused the role, the password or a privilege.
	ErrRefused = database.ErrRefused
)

// Backend is the result backend in one database. Many goroutines may call its
// methods at once.
type Backend struct {
	config Config
	db     *database.DB
	owned  bool // Close closes the pool
	// prepares says that the pool's sessions keep prepared statements, unless a pooler
	// stops that.
	prepares bool

	mu    sync.Mutex
	known *knownTable // nil until read
}

var (
	_ results.Backend = (*Backend)(nil)
	_ results.Cleaner = (*Backend)(nil)
)

// Open connects to the database at a URL with the defaults of [Config].
func Open(ctx context.Context, url string) (*Backend, error) {
	return OpenConfig(ctx, Config{URL: url})
}

// OpenConfig connects once and prepares the tables. If the server cannot be
// reached, it returns ErrUnavailable or ErrRefused at once, without retries. The
// caller must call Close.
func OpenConfig(ctx context.Context, config Config) (*Backend, error) {
	config = config.WithDefaults()
	if err := config.Validate(); err != nil {
		return nil, err
	}
	if config.URL == "" {
		return nil, database.Failure(ErrInvalid, "results: URL is empty: give the database as db+postgresql://user:password@host:port/database")
	}
	where, err := address.ParseDatabase(config.URL)
	if err != nil {
		return nil, database.Failure(ErrInvalid, "cannot read the address of the result database %s: %s", address.MaskDatabase(config.URL), err)
	}
	connection, err := database.NewConnection(where, database.Options{
		ApplicationName: config.ApplicationName, Connections: config.Connections, ConnectTimeout: config.ConnectTimeout,
	})
	if err != nil {
		return nil, err
	}
	for _, ignored := range connection.Ignored {
		config.Logger.Warn("option of the database address has no effect", "database", connection.Place, "option", ignored.Option, "reason", ignored.Why)
	}
	pool, err := pgxpool.NewWithConfig(ctx, connection.Pool)
	if err != nil {
		return nil, database.HideAddress(where, database.Translate("open the database "+connection.Place, err))
	}
	b := newBackend(pool, connection.Place, config)
	b.db.Connection = connection
	err = database.HideAddress(where, database.Translate("reach the database "+b.Place(), pool.Ping(ctx)))
	if err == nil && !config.KeepTables {
		err = b.prepare(ctx)
	}
	if err != nil {
		pool.Close()
		return nil, err
	}
	b.owned = true
	return b, nil
}

// New returns the backend in the database of a pool, for a program that has one. It
// does not access the database: call [Backend.EnsureTables] unless the tables
// exist. Close leaves the pool open. Behind a pooler that knows no prepared statements
// the pool needs another DefaultQueryExecMode, such as pgx.QueryExecModeExec.
func New(pool *pgxpool.Pool, config Config) (*Backend, error) {
	config = config.WithDefaults()
	if err := config.Validate(); err != nil {
		return nil, err
	}
	connect := pool.Config().ConnConfig
	return newBackend(pool, database.Place(connect.Host, connect.Port, connect.Database), config), nil
}

func newBackend(pool *pgxpool.Pool, place string, config Config) *Backend {
	return &Backend{
		config:   config,
		db:       &database.DB{Pool: pool, Place: place, TryTimeout: config.TryTimeout, RetryFor: config.RetryFor, Logger: config.Logger},
		prepares: pool.Config().ConnConfig.DefaultQueryExecMode == pgx.QueryExecModeCacheStatement,
	}
}

// prepare creates or completes the tables. A role without the rights may use
// tables that are complete enough to be written to.
func (b *Backend) prepare(ctx context.Context) error {
	plan, err := b.PlanTables(ctx)
	if err != nil || len(plan.Steps) == 0 {
		return err
	}
	report, err := b.EnsureTables(ctx)
	if errors.Is(err, ErrRefused) {
		if _, unknown := b.knownTable(ctx, false); unknown == nil {
			logOwnerSteps(b.config.Logger, b.Place(), plan)
			return nil
		}
	}
	logOwnerSteps(b.config.Logger, b.Place(), Report{Steps: report.byOwner()})
	return err
}

func logOwnerSteps(log *slog.Logger, place string, report Report) {
	for _, step := range report.Steps {
		log.Warn("the owner of the result tables must run a statement", "database", place, "step", step.What, "sql", step.SQL)
	}
}

// Close closes the connections that Open has opened.
func (b *Backend) Close() {
	if b.owned {
		b.db.Pool.Close()
	}
}

// Place is host, port and name of the database, without user and password.
func (b *Backend) Place() string { return b.db.Place }

// columnsKnownFor is how long the table's columns are cached. A Celery 5.7 that
// starts meanwhile adds columns that we should fill.
const columnsKnownFor = time.Minute

// knownTable returns the columns of the task table and its statements, from the
// cache unless reread is set.
func (b *Backend) knownTable(ctx context.Context, reread bool) (*knownTable, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.known != nil && !reread && time.Since(b.known.readAt) < columnsKnownFor {
		return b.known, nil
	}
	columns, err := readColumns(ctx, b.db.Pool, b.table())
	if err != nil {
		return nil, err
	}
	if len(columns) == 0 {
		return nil, database.Failure(ErrSchema, "result table %s does not exist in %s", b.config.Table, b.Place())
	}
	known := &knownTable{columns: columns, readAt: time.Now()}
	for _, column := range optionalColumns {
		if columns[column.name] && !(column.extended && b.config.OmitRequest) {
			known.written = append(known.written, column)
		}
	}
	known.statements(b.table(), qualified(b.config.Schema, "task_id_sequence"))
	b.known = known
	return known, nil
}

func (b *Backend) forgetTable() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.known = nil
}

// table is the quoted name of the task table.
func (b *Backend) table() string { return qualified(b.config.Schema, b.config.Table) }

// qualified quotes a name with its schema, if it has one.
func qualified(schema, name string) string {
	if schema == "" {
		return pgx.Identifier{name}.Sanitize()
	}
	return pgx.Identifier{schema, name}.Sanitize()
}
