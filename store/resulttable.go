package store

import (
	"context"
	"strings"

	"github.com/jackc/pgx/v5"
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

// EnsureResultTable creates missing result tables as Celery 5.7 does when it first
// uses the backend. To tables made by older versions it adds the columns children
// and stamps, which Celery 5.7 needs. If our role lacks the right, the report has
// the statements for the owner, and results are stored without these columns.
//
// It is idempotent, and safe to call from several workers at once.
func (r *Results) EnsureResultTable(ctx context.Context) (Report, error) {
	var report Report
	err := r.store.inTx(ctx, "prepare the result table "+r.config.Table, func(tx pgx.Tx) (err error) {
		if err := lockMigrations(ctx, tx); err != nil {
			return err
		}
		report = Report{}
		report.Steps, err = planResultTables(ctx, tx, r.config)
		if err != nil {
			return err
		}
		return report.run(ctx, tx)
	})
	r.mu.Lock()
	r.columns = nil
	r.mu.Unlock()
	if err != nil {
		return Report{}, err
	}
	return report, nil
}

// PlanResultTable returns what EnsureResultTable would do, and changes nothing.
func (r *Results) PlanResultTable(ctx context.Context) (Report, error) {
	var report Report
	err := r.store.inTx(ctx, "look at the result table "+r.config.Table, func(tx pgx.Tx) (err error) {
		report.Steps, err = planResultTables(ctx, tx, r.config)
		return err
	})
	return report, err
}

// RehearseResultTable does what EnsureResultTable would and rolls it back, to find
// out whether this role has the rights.
func (r *Results) RehearseResultTable(ctx context.Context) error {
	return r.store.inTx(ctx, "prepare the result table "+r.config.Table, func(tx pgx.Tx) error {
		if err := lockMigrations(ctx, tx); err != nil {
			return err
		}
		steps, err := planResultTables(ctx, tx, r.config)
		if err != nil {
			return err
		}
		return Report{Steps: steps}.rehearse(ctx, tx)
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

// planResultTables returns the steps that create or complete Celery's tables
// (docs/celery.md#result-table).
func planResultTables(ctx context.Context, tx pgx.Tx, config ResultsConfig) ([]ReportStep, error) {
	schemas := map[string]bool{}
	var steps []ReportStep
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
			steps = append(steps, ReportStep{What: "create schema " + schema, SQL: "CREATE SCHEMA " + pgx.Identifier{schema}.Sanitize()})
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
		more, err := planResultTable(ctx, tx, table)
		if err != nil {
			return nil, err
		}
		steps = append(steps, more...)
	}
	return steps, nil
}

func planResultTable(ctx context.Context, tx pgx.Tx, table resultTable) ([]ReportStep, error) {
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
	var steps []ReportStep
	if !sequence {
		steps = append(steps, ReportStep{What: "create sequence " + table.sequence, SQL: "CREATE SEQUENCE " + table.sequence})
	}
	if len(columns) == 0 {
		return append(steps,
			ReportStep{What: "create table " + table.name, SQL: "CREATE TABLE " + table.name + " " + table.create},
			ReportStep{What: "create index on " + table.name + " (date_done)",
				SQL: "CREATE INDEX " + table.index + " ON " + table.name + " (date_done)"}), nil
	}
	var missing []string
	for _, name := range table.added {
		if !columns[name] {
			missing = append(missing, "ADD COLUMN IF NOT EXISTS "+name+" bytea")
		}
	}
	if len(missing) > 0 {
		steps = append(steps, ReportStep{
			What:    "add the columns that Celery 5.7 needs to " + table.name,
			SQL:     "ALTER TABLE " + table.name + " " + strings.Join(missing, ", "),
			ByOwner: !owned,
		})
	}
	return steps, nil
}

// indexName quotes a name, cut to the length that PostgreSQL allows.
func indexName(name string) string { return pgx.Identifier{name[:min(len(name), 63)]}.Sanitize() }
