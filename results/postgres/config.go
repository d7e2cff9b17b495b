package postgres

import (
	"log/slog"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/database"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Config says where and how outcomes are stored. The names of tables and schemas
// are those of Celery's settings database_table_names and
// database_table_schemas.
type Config struct {
	// URL is Celery's result_backend, as SQLAlchemy reads it:
	// db+postgresql://user:password@host:port/database, also with the name of a
	// Python driver in it, or without db+. Every option of libpq may stand in its
	// query, and default_query_exec_mode=exec for a pooler that knows no prepared
	// statements. Required by [OpenConfig]; [New] does not use it.
	URL string

	// Encoding is that of the column result. Defaults to pickle, which every
	// version of Celery reads; Celery 5.7 logs a warning with a traceback for each
	// pickle that it reads. Choose JSON when every reader is Celery 5.7 or later or
	// is written in Go: older versions fail with UnpicklingError on JSON
	// (docs/celery.md#result-encoding).
	Encoding protocol.Encoding
	// OmitRequest leaves out what Celery stores only with the setting result_extended:
	// the columns name, args, kwargs, worker, retries, queue and stamps are not written.
	// Without it they are, where the table has them, and everybody who may read results
	// can read the arguments of tasks.
	OmitRequest bool
	// Table is the table of task results. Defaults to "celery_taskmeta".
	Table string
	// Schema is that of Table. Defaults to the first of the role's search_path.
	Schema string
	// SetTable is the table of group results, which is created but not written.
	// Defaults to "celery_tasksetmeta".
	SetTable string
	// SetSchema is that of SetTable. Defaults to the first of the role's search_path.
	SetSchema string
	// StartsTable is a table of this package's own, in Schema, that counts the starts of
	// tasks with worker.MaxStarts; Celery's tables stay as they are. Open creates it,
	// unless KeepTables is set: celery_task_starts is a good name. Defaults to none:
	// starts are not counted.
	StartsTable string
	// KeepTables makes Open leave the tables as they are. Otherwise it creates
	// missing ones, and adds the columns that Celery 5.7 needs, as Celery 5.7 does.
	KeepTables bool

	// ApplicationName is the name of the sessions in pg_stat_activity. Defaults to
	// "celery results". One in URL takes precedence.
	ApplicationName string
	// Connections is the most connections that are open at the same time. Defaults
	// to 4.
	Connections int
	// ConnectTimeout bounds one attempt to connect, unless URL says otherwise by
	// connect_timeout. Defaults to 10 s.
	ConnectTimeout time.Duration
	// TryTimeout bounds one try of a call. A server that does not answer in this
	// time counts as unavailable. Defaults to 20 s.
	TryTimeout time.Duration
	// RetryFor is how long one call retries when the connection breaks or the
	// server is unavailable. Defaults to 30 s; negative means no retries.
	RetryFor time.Duration
	// PollInterval is the longest pause between two looks of [Backend.Wait] at the
	// database, and Celery's own. The first looks follow at once. Defaults to
	// 500 ms.
	PollInterval time.Duration
	// Logger is told which options of URL have no effect, which SQL the owner of the
	// tables has to run, and that a pooler allows no prepared statements. Nil discards
	// this.
	Logger *slog.Logger
}

// WithDefaults returns a copy with every unset field at its default.
func (c Config) WithDefaults() Config {
	if c.Encoding == "" {
		c.Encoding = protocol.EncodingPickle
	}
	setText(&c.Table, "celery_taskmeta")
	setText(&c.SetTable, "celery_tasksetmeta")
	setText(&c.ApplicationName, "celery results")
	if c.Connections == 0 {
		c.Connections = 4
	}
	setDuration(&c.ConnectTimeout, 10*time.Second)
	setDuration(&c.TryTimeout, 20*time.Second)
	setDuration(&c.RetryFor, 30*time.Second)
	setDuration(&c.PollInterval, 500*time.Millisecond)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

func setText(field *string, value string) {
	if *field == "" {
		*field = value
	}
}

func setDuration(field *time.Duration, value time.Duration) {
	if *field == 0 {
		*field = value
	}
}

// Validate names the first field that cannot be used, other than URL.
func (c Config) Validate() error {
	if c.Encoding != protocol.EncodingPickle && c.Encoding != protocol.EncodingJSON {
		return database.Failure(ErrInvalid, "result encoding %q: it is %q or %q", c.Encoding, protocol.EncodingPickle, protocol.EncodingJSON)
	}
	for _, name := range []string{c.Table, c.Schema, c.SetTable, c.SetSchema, c.StartsTable} {
		if len(name) > 63 || strings.ContainsRune(name, 0) {
			return database.Failure(ErrInvalid, "result table or schema %q: PostgreSQL names have at most 63 bytes and no NUL", database.Cut(name, 80))
		}
	}
	switch {
	case c.Connections < 1:
		return database.Failure(ErrInvalid, "Connections is %d, must be at least 1", c.Connections)
	case c.ConnectTimeout < 0 || c.TryTimeout < 0 || c.PollInterval < 0:
		return database.Failure(ErrInvalid, "ConnectTimeout %s, TryTimeout %s and PollInterval %s must not be negative", c.ConnectTimeout, c.TryTimeout, c.PollInterval)
	}
	return nil
}
