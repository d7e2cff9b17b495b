package postgres

import (
	"context"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/internal/database"
)

// querier is a pool, a connection or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// readColumns returns the names of a table's columns, none if it does not exist.
// table must be quoted.
func readColumns(ctx context.Context, q querier, table string) (map[string]bool, error) {
	rows, err := q.Query(ctx, `
		SELECT attname::text FROM pg_catalog.pg_attribute
		WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped`, table)
	if err != nil {
		return nil, err
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, err
	}
	columns := make(map[string]bool, len(names))
	for _, name := range names {
		columns[name] = true
	}
	return columns, nil
}

// Step is one step of preparing tables.
type Step struct {
	// What is the step in words: "create table celery_taskmeta".
	What string
	// SQL is what the step runs.
	SQL string
	// ByOwner says that our role lacks the right, so that the owner of the table
	// has to run SQL. [Report.Run] skips such a step.
	ByOwner bool
	// Done says that Run has run the step.
	Done bool
}

// Report is what preparing the tables does or did, in order. Without steps there is nothing
// to do.
type Report struct{ Steps []Step }

// Lines is the report in words, one line for each step.
func (r Report) Lines() []string {
	lines := make([]string, len(r.Steps))
	for i, step := range r.Steps {
		switch {
		case step.ByOwner:
			lines[i] = "the owner must " + step.What + ": " + step.SQL
		case step.Done:
			lines[i] = step.What + ": done"
		default:
			lines[i] = step.What
		}
	}
	return lines
}

// Run runs the steps in a transaction. A step that only the owner can run is
// skipped.
func (r *Report) Run(ctx context.Context, tx pgx.Tx) error {
	for i := range r.Steps {
		step := &r.Steps[i]
		if step.ByOwner {
			continue
		}
		// The simple protocol, as a file has many statements.
		if _, err := tx.Conn().PgConn().Exec(ctx, step.SQL).ReadAll(); err != nil {
			return database.Translate(step.What, err)
		}
		step.Done = true
	}
	return nil
}

// Rehearse runs the steps and rolls them back, to find out whether the role has the
// rights.
func (r Report) Rehearse(ctx context.Context, tx pgx.Tx) error {
	inner, err := tx.Begin(ctx)
	if err != nil {
		return err
	}
	defer inner.Rollback(ctx)
	steps := Report{Steps: append([]Step(nil), r.Steps...)}
	return steps.Run(ctx, inner)
}

func (r Report) byOwner() []Step {
	return slices.DeleteFunc(slices.Clone(r.Steps), func(s Step) bool { return !s.ByOwner })
}

// tableLock is the key of the advisory lock that keeps two processes from creating
// the tables at the same time. It must never change: older versions use it too.
const tableLock = 0x6d6d5f6d69677261

// LockTables waits until no other process prepares tables in this database. After
// that it bounds the wait for any lock: all sessions that come after a waiting ALTER
// TABLE wait as well, readers too. When the bound is reached, the whole transaction
// should be retried. It is for programs that call [PlanTables] themselves.
func LockTables(ctx context.Context, tx pgx.Tx) error {
	if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock($1)`, int64(tableLock)); err != nil {
		return err
	}
	_, err := tx.Exec(ctx, `SELECT set_config('lock_timeout', '3s', true)`)
	return err
}

// EnsureTables creates missing tables as Celery 5.7 does when it first uses the
// backend. To tables made by older versions it adds the columns children and stamps,
// which Celery 5.7 needs. If the role is not the owner, the report has the
// statements for the owner, and outcomes are stored without these columns.
//
// It is idempotent, and safe to call from several processes at once.
func (b *Backend) EnsureTables(ctx context.Context) (Report, error) {
	var report Report
	err := b.db.InTx(ctx, "prepare the result table "+b.config.Table, func(tx pgx.Tx) (err error) {
		if err := LockTables(ctx, tx); err != nil {
			return err
		}
		report = Report{}
		report.Steps, err = PlanTables(ctx, tx, b.config)
		if err != nil {
			return err
		}
		return report.Run(ctx, tx)
	})
	b.forgetTable()
	if err != nil {
		return Report{}, err
	}
	return report, nil
}

// PlanTables returns what EnsureTables would do, and changes nothing.
func (b *Backend) PlanTables(ctx context.Context) (Report, error) {
	var report Report
	err := b.db.InTx(ctx, "look at the result table "+b.config.Table, func(tx pgx.Tx) (err error) {
		report.Steps, err = PlanTables(ctx, tx, b.config)
		return err
	})
	return report, err
}

// RehearseTables does what EnsureTables would and rolls it back, to find out
// whether this role has the rights.
func (b *Backend) RehearseTables(ctx context.Context) error {
	return b.db.InTx(ctx, "prepare the result table "+b.config.Table, func(tx pgx.Tx) error {
		if err := LockTables(ctx, tx); err != nil {
			return err
		}
		steps, err := PlanTables(ctx, tx, b.config)
		if err != nil {
			return err
		}
		return Report{Steps: steps}.Rehearse(ctx, tx)
	})
}

// resultTable describes one of Celery's two tables.
type resultTable struct {
	name, sequence string
	create         string
	// added are the columns that Celery 5.7 added.
	added []string
	index string
}

// PlanTables returns the steps that create or complete Celery's tables
// (docs/celery.md#result-table). It is for programs that prepare other tables in the
// same transaction; all others call [Backend.EnsureTables].
func PlanTables(ctx context.Context, tx pgx.Tx, config Config) ([]Step, error) {
	config = config.WithDefaults()
	schemas := map[string]bool{}
	var steps []Step
	for _, schema := range []string{config.Schema, config.SetSchema} {
		if schema == "" || schemas[schema] {
			continue
		}
		schemas[schema] = true
		var exists bool
		if err := tx.QueryRow(ctx, `SELECT to_regnamespace($1) IS NOT NULL`, pgx.Identifier{schema}.Sanitize()).Scan(&exists); err != nil {
			return nil, err
		}
		if !exists {
			steps = append(steps, Step{What: "create schema " + schema, SQL: "CREATE SCHEMA " + pgx.Identifier{schema}.Sanitize()})
		}
	}
	for _, table := range []resultTable{
		{
			name: qualified(config.Schema, config.Table), sequence: qualified(config.Schema, "task_id_sequence"),
			create: `(
    id         integer  NOT NULL,
    task_id    varchar(155),
    status     varchar(50),
    result     bytea,
    date_done  timestamp,
    traceback  text,
    children   bytea,
    name       varchar(155),
    args       bytea,
    kwargs     bytea,
    worker     varchar(155),
    retries    integer,
    queue      varchar(155),
    stamps     bytea,
    PRIMARY KEY (id),
    UNIQUE (task_id)
)`,
			added: []string{"children", "stamps"},
			index: indexName("ix_" + config.Table + "_date_done"),
		},
		{
			name: qualified(config.SetSchema, config.SetTable), sequence: qualified(config.SetSchema, "taskset_id_sequence"),
			create: `(
    id          integer  NOT NULL,
    taskset_id  varchar(155),
    result      bytea,
    date_done   timestamp,
    PRIMARY KEY (id),
    UNIQUE (taskset_id)
)`,
			index: indexName("ix_" + config.SetTable + "_date_done"),
		},
	} {
		more, err := planTable(ctx, tx, table)
		if err != nil {
			return nil, err
		}
		steps = append(steps, more...)
	}
	more, err := planStarts(ctx, tx, config)
	return append(steps, more...), err
}

func planTable(ctx context.Context, tx pgx.Tx, table resultTable) ([]Step, error) {
	var sequence, owned bool
	err := tx.QueryRow(ctx, `
		SELECT to_regclass($1) IS NOT NULL,
		       COALESCE((SELECT pg_has_role(relowner, 'USAGE') FROM pg_catalog.pg_class WHERE oid = to_regclass($2)), false)`,
		table.sequence, table.name).Scan(&sequence, &owned)
	if err != nil {
		return nil, err
	}
	columns, err := readColumns(ctx, tx, table.name)
	if err != nil {
		return nil, err
	}
	var steps []Step
	if !sequence {
		steps = append(steps, Step{What: "create sequence " + table.sequence, SQL: "CREATE SEQUENCE " + table.sequence})
	}
	if len(columns) == 0 {
		return append(steps,
			Step{What: "create table " + table.name, SQL: "CREATE TABLE " + table.name + " " + table.create},
			Step{What: "create index on " + table.name + " (date_done)",
				SQL: "CREATE INDEX " + table.index + " ON " + table.name + " (date_done)"}), nil
	}
	var missing []string
	for _, name := range table.added {
		if !columns[name] {
			missing = append(missing, "ADD COLUMN IF NOT EXISTS "+name+" bytea")
		}
	}
	if len(missing) > 0 {
		steps = append(steps, Step{
			What:    "add the columns that Celery 5.7 needs to " + table.name,
			SQL:     "ALTER TABLE " + table.name + " " + strings.Join(missing, ", "),
			ByOwner: !owned,
		})
	}
	return steps, nil
}

// indexName quotes a name, cut to the length that PostgreSQL allows.
func indexName(name string) string { return pgx.Identifier{name[:min(len(name), 63)]}.Sanitize() }
