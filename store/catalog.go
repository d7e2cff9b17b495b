package store

import (
	"context"
	"fmt"
	"slices"
	"sort"
	"strings"

	"github.com/jackc/pgx/v5"
)

// sharedTables are the tables of MoonMind that migrations/shared.sql creates.
var sharedTables = []string{
	"user", "approval_gates", "orchestrator_action_plans", "orchestrator_runs", "orchestrator_run_artifacts",
	"codex_auth_volumes", "codex_worker_shards", "spec_workflow_runs", "spec_workflow_task_states",
	"workflow_artifacts", "workflow_credential_audits",
}

// SchemaDifference says how the existing shared tables differ from those that
// MoonMind's migrations create. Nothing was changed.
type SchemaDifference struct {
	// Lines, one difference each: "table orchestrator_runs: column priority is …, expected …".
	Lines []string
}

func (d *SchemaDifference) Error() string {
	return fmt.Sprintf("the shared tables exist but differ from MoonMind's in %d points, nothing was changed:\n  %s",
		len(d.Lines), strings.Join(d.Lines, "\n  "))
}

// Unwrap returns ErrSchema.
func (d *SchemaDifference) Unwrap() error { return ErrSchema }

// Permanent: a retry does not change a table.
func (d *SchemaDifference) Permanent() bool { return true }

// planShared returns the steps that create the shared tables: all of them if none
// exists, none if all exist as expected. Otherwise it returns a SchemaDifference.
//
// To have the expected definitions in one place only, it creates the tables in a
// schema of their own, reads the catalog as this server prints it, and rolls back
// to a savepoint.
func planShared(ctx context.Context, tx pgx.Tx) ([]ReportStep, error) {
	text, err := migrationFiles.ReadFile("migrations/shared.sql")
	if err != nil {
		return nil, err
	}
	step := ReportStep{What: "create MoonMind's tables: " + strings.Join(sharedTables, ", "), SQL: string(text)}
	var schema *string
	var path string
	if err := tx.QueryRow(ctx, `SELECT current_schema()::text, current_setting('search_path')`).Scan(&schema, &path); err != nil {
		return nil, err
	}
	if schema == nil {
		return nil, failure(ErrSchema, "no schema of the search_path %q exists: create one, or name another in the URL's search_path", path)
	}
	found, err := readCatalog(ctx, tx, *schema)
	if err != nil {
		return nil, err
	}
	if len(found) == 0 {
		return []ReportStep{step}, nil
	}
	scratch := pgx.Identifier{"mm_orchestrator_expected"}.Sanitize()
	var want map[string]string
	err = func() error {
		inner, err := tx.Begin(ctx)
		if err != nil {
			return err
		}
		defer inner.Rollback(ctx)
		script := "CREATE SCHEMA " + scratch + "; SET LOCAL search_path TO " + scratch + "; " + string(text)
		if _, err := tx.Conn().PgConn().Exec(ctx, script).ReadAll(); err != nil {
			return translate("make the expected tables for comparison", err)
		}
		want, err = readCatalog(ctx, inner, "mm_orchestrator_expected")
		return err
	}()
	if err != nil {
		return nil, err
	}
	if lines := compareCatalogs(want, found); len(lines) > 0 {
		return nil, &SchemaDifference{Lines: lines}
	}
	return nil, nil
}

// readCatalog returns the shared tables of one schema, and the enum types of their
// columns: each object's name, and its definition as the server prints it. The
// schema must be first in the search_path, or else the definitions name it.
//
// It leaves out what no reader or writer notices: the order of columns, comments,
// owners, privileges, storage, the bodies of trigger functions, and NOT NULL
// constraints, which PostgreSQL 18 has besides the column's own flag.
// compareCatalogs accepts additional indexes that are not unique, as an operator
// may add them for speed.
func readCatalog(ctx context.Context, tx pgx.Tx, schema string) (map[string]string, error) {
	rows, err := tx.Query(ctx, `
		WITH tables AS (
		    SELECT c.oid, c.relname FROM pg_catalog.pg_class AS c
		    WHERE c.relnamespace = to_regnamespace($1) AND c.relkind IN ('r', 'p') AND c.relname = ANY ($2)
		)
		SELECT 'table ' || relname, 'a table' FROM tables
		UNION ALL
		SELECT 'table ' || t.relname || ': column ' || a.attname,
		       format_type(a.atttypid, a.atttypmod) || CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END
		       || COALESCE(' DEFAULT ' || pg_get_expr(d.adbin, d.adrelid), '')
		FROM tables AS t
		JOIN pg_catalog.pg_attribute AS a ON a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped
		LEFT JOIN pg_catalog.pg_attrdef AS d ON d.adrelid = t.oid AND d.adnum = a.attnum
		UNION ALL
		SELECT 'table ' || t.relname || ': constraint ' || c.conname, pg_get_constraintdef(c.oid)
		FROM tables AS t
		JOIN pg_catalog.pg_constraint AS c ON c.conrelid = t.oid AND c.contype <> 'n'
		UNION ALL
		SELECT 'table ' || t.relname || ': index ' || i.relname, replace(pg_get_indexdef(i.oid), ' ON ' || quote_ident($1) || '.', ' ON ')
		FROM tables AS t
		JOIN pg_catalog.pg_index AS x ON x.indrelid = t.oid
		JOIN pg_catalog.pg_class AS i ON i.oid = x.indexrelid
		WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_constraint AS c WHERE c.conindid = i.oid AND c.contype IN ('p', 'u', 'x'))
		UNION ALL
		SELECT 'table ' || t.relname || ': trigger ' || g.tgname, replace(pg_get_triggerdef(g.oid), ' ON ' || quote_ident($1) || '.', ' ON ')
		FROM tables AS t
		JOIN pg_catalog.pg_trigger AS g ON g.tgrelid = t.oid AND NOT g.tgisinternal
		UNION ALL
		SELECT 'type ' || y.typname, 'ENUM (' || string_agg(quote_literal(e.enumlabel), ', ' ORDER BY e.enumsortorder) || ')'
		FROM pg_catalog.pg_type AS y
		JOIN pg_catalog.pg_enum AS e ON e.enumtypid = y.oid
		WHERE y.oid IN (SELECT a.atttypid FROM tables AS t JOIN pg_catalog.pg_attribute AS a ON a.attrelid = t.oid)
		GROUP BY y.oid, y.typname`, schema, sharedTables)
	if err != nil {
		return nil, err
	}
	catalog := map[string]string{}
	var name, definition string
	_, err = pgx.ForEachRow(rows, []any{&name, &definition}, func() error {
		catalog[name] = definition
		return nil
	})
	return catalog, err
}

// compareCatalogs returns the differences, sorted. A missing table is one
// difference.
func compareCatalogs(want, found map[string]string) []string {
	var lines []string
	missing := map[string]bool{}
	for name := range want {
		if _, ok := found[name]; !ok && strings.HasPrefix(name, "table ") && !strings.Contains(name, ":") {
			missing[name] = true
		}
	}
	for name, definition := range want {
		table, _, part := strings.Cut(name, ":")
		have, ok := found[name]
		switch {
		case part && missing[table]:
		case !ok:
			lines = append(lines, fmt.Sprintf("%s is missing, expected %s", name, definition))
		case have != definition:
			lines = append(lines, fmt.Sprintf("%s is %s, expected %s", name, have, definition))
		}
	}
	for name, definition := range found {
		if _, ok := want[name]; ok || strings.Contains(definition, "CREATE INDEX ") {
			continue
		}
		lines = append(lines, fmt.Sprintf("%s is not expected: %s", name, definition))
	}
	sort.Strings(lines)
	return slices.Compact(lines)
}

// CheckSchema returns ErrSchema if a shared table is missing that a worker needs, or
// if schema mm_orchestrator is not of this program's version. It does not compare
// columns; Migrate does.
func (s *Store) CheckSchema(ctx context.Context) error {
	return s.retry(ctx, "look at the tables of "+s.place, func(ctx context.Context) error {
		return pgx.BeginTxFunc(ctx, s.pool, pgx.TxOptions{AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
			rows, err := tx.Query(ctx, `
				SELECT name FROM unnest($1::text[]) AS wanted (name)
				WHERE to_regclass(quote_ident(name)) IS NULL
				ORDER BY name`,
				[]string{"orchestrator_action_plans", "orchestrator_run_artifacts", "orchestrator_runs", "spec_workflow_task_states"})
			if err != nil {
				return err
			}
			missing, err := pgx.CollectRows(rows, pgx.RowTo[string])
			if err != nil {
				return err
			}
			if len(missing) > 0 {
				return failure(ErrSchema, "database %s has no table %s: run MoonMind's own migrations, or `mm-orchestrator migrate --shared-tables` for a database without MoonMind",
					s.place, strings.Join(missing, ", "))
			}
			version, _, err := ownVersion(ctx, tx)
			if err != nil {
				return err
			}
			switch newest := newestVersion(); {
			case version < newest:
				return failure(ErrSchema, "schema mm_orchestrator in %s is of version %d, this program needs %d: run `mm-orchestrator migrate`",
					s.place, version, newest)
			case version > newest:
				return failure(ErrSchema, "schema mm_orchestrator in %s is of version %d, this program knows %d: use the program that made it",
					s.place, version, newest)
			}
			return nil
		})
	})
}
