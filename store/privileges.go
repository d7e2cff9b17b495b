package store

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// Privilege is a right to a table, view or sequence that statements of this package
// need.
type Privilege struct {
	// Schema is the schema of the object. It is "" for MoonMind's and Celery's
	// tables, which are found by the search_path.
	Schema string
	// Object is the name of the table, view or sequence.
	Object string
	// Name is SELECT, INSERT, UPDATE, DELETE, or USAGE for a sequence.
	Name string
	// Columns are those that the right must cover; nil for all.
	Columns []string
}

// The columns of MoonMind's tables that the start and the end of a step write.
var (
	runColumnsWritten      = []string{"status", "started_at", "completed_at", "artifact_root", "metrics_snapshot", "approval_token", "approval_gate_id", "updated_at"}
	stateColumnsWritten    = []string{"status", "plan_step_status", "celery_state", "celery_task_id", "message", "payload", "artifact_refs", "started_at", "finished_at"}
	stateColumnsKey        = []string{"id", "orchestrator_run_id", "plan_step", "attempt", "task_name"}
	artifactColumnsWritten = []string{"checksum", "size_bytes"}
	artifactColumnsKey     = []string{"id", "run_id", "artifact_type", "path"}
)

// WorkerPrivileges returns the rights that a worker and `runs` need in a migrated
// database, besides CONNECT and USAGE of the schemas. results is nil if Celery
// results are stored elsewhere. A new statement that needs another right must add
// it here: the tests of this package run as a role with these rights and no
// others.
func WorkerPrivileges(results *ResultsConfig) []Privilege {
	own := func(table string, names ...string) []Privilege {
		list := make([]Privilege, len(names))
		for i, name := range names {
			list[i] = Privilege{Schema: "mm_orchestrator", Object: table, Name: name}
		}
		return list
	}
	list := slices.Concat(
		[]Privilege{
			{"", "approval_gates", "SELECT", nil},
			{"", "orchestrator_action_plans", "SELECT", nil},
			{"", "orchestrator_runs", "SELECT", nil},
			{"", "orchestrator_runs", "UPDATE", runColumnsWritten},
			{"", "spec_workflow_task_states", "SELECT", nil},
			{"", "spec_workflow_task_states", "INSERT", slices.Concat(stateColumnsKey, stateColumnsWritten)},
			{"", "spec_workflow_task_states", "UPDATE", stateColumnsWritten},
			{"", "orchestrator_run_artifacts", "SELECT", nil},
			{"", "orchestrator_run_artifacts", "INSERT", slices.Concat(artifactColumnsKey, artifactColumnsWritten)},
			{"", "orchestrator_run_artifacts", "UPDATE", artifactColumnsWritten},
		},
		own("claims", "SELECT", "INSERT", "UPDATE"),
		own("holds", "SELECT", "INSERT", "UPDATE"),
		own("parked", "SELECT", "INSERT", "UPDATE", "DELETE"),
		own("revocations", "SELECT", "INSERT", "UPDATE", "DELETE"),
		own("workers", "SELECT", "INSERT", "UPDATE", "DELETE"),
		own("changes", "SELECT", "INSERT", "UPDATE", "DELETE"),
		own("approvals", "SELECT", "INSERT", "UPDATE"),
		own("audit", "SELECT", "INSERT"),
		own("audit_heads", "SELECT", "INSERT", "UPDATE"),
		own("pauses", "SELECT", "INSERT", "UPDATE"),
		own("rollback_requests", "SELECT", "INSERT"),
	)
	return append(list, basicPrivileges(results)...)
}

// basicPrivileges are the rights that every worker needs.
func basicPrivileges(results *ResultsConfig) []Privilege {
	list := []Privilege{
		{"mm_orchestrator", "schema_versions", "SELECT", nil},
		// Every role has these by default, but they can be revoked from PUBLIC.
		{"pg_catalog", "pg_locks", "SELECT", nil}, {"pg_catalog", "pg_settings", "SELECT", nil},
	}
	if results != nil {
		list = append(list, resultPrivileges(*results)...)
	}
	return list
}

// The columns that the tasks of the Spec workflow write.
var (
	specRunColumns = []string{
		"status", "phase", "branch_name", "pr_url", "codex_task_id", "codex_queue", "codex_volume", "codex_preflight_status", "codex_preflight_message",
		"codex_logs_path", "codex_patch_path", "started_at", "finished_at",
	}
	specStateColumns    = []string{"status", "message", "payload", "artifact_refs", "started_at", "finished_at"}
	specArtifactColumns = []string{"size_bytes", "digest"}
	specAuditColumns    = []string{"codex_status", "github_status", "checked_at", "notes", "codex_checked_at", "codex_message", "github_checked_at", "github_message"}
)

// SpecPrivileges are [WorkerPrivileges] of a worker that runs only the tasks of the
// Spec workflow. A worker that runs the steps of runs as well needs both.
func SpecPrivileges(results *ResultsConfig) []Privilege {
	return append([]Privilege{
		{"", "spec_workflow_runs", "SELECT", nil},
		{"", "spec_workflow_runs", "UPDATE", specRunColumns},
		{"", "spec_workflow_task_states", "SELECT", nil},
		{"", "spec_workflow_task_states", "INSERT", slices.Concat([]string{"id", "workflow_run_id", "task_name", "attempt"}, specStateColumns)},
		{"", "spec_workflow_task_states", "UPDATE", specStateColumns},
		{"", "workflow_artifacts", "SELECT", nil},
		{"", "workflow_artifacts", "INSERT", slices.Concat([]string{"id", "workflow_run_id", "artifact_type", "path"}, specArtifactColumns)},
		{"", "workflow_artifacts", "UPDATE", specArtifactColumns},
		{"", "workflow_credential_audits", "SELECT", nil},
		{"", "workflow_credential_audits", "INSERT", slices.Concat([]string{"id", "workflow_run_id", "environment_snapshot"}, specAuditColumns)},
		{"", "workflow_credential_audits", "UPDATE", specAuditColumns},
		{"", "codex_worker_shards", "SELECT", nil},
		{"", "codex_auth_volumes", "SELECT", nil},
		{"mm_orchestrator", "spec_claims", "SELECT", nil},
		{"mm_orchestrator", "spec_claims", "INSERT", nil},
		{"mm_orchestrator", "spec_claims", "UPDATE", nil},
	}, basicPrivileges(results)...)
}

// CheckSpecPrivileges is [Store.CheckPrivileges] for [SpecPrivileges].
func (s *Store) CheckSpecPrivileges(ctx context.Context, results *ResultsConfig) error {
	return s.checkPrivileges(ctx, SpecPrivileges(results), functions)
}

// resultPrivileges are the rights needed in a database that only stores Celery
// results.
func resultPrivileges(config ResultsConfig) []Privilege {
	config = config.WithDefaults()
	return []Privilege{
		{config.Schema, config.Table, "SELECT", nil},
		{config.Schema, config.Table, "INSERT", nil},
		{config.Schema, config.Table, "UPDATE", nil},
		{config.Schema, "task_id_sequence", "USAGE", nil},
	}
}

// functions are those that a worker calls and that an administrator may have
// revoked from PUBLIC. Functions that are called while a connection is made are
// not among them, as their absence already makes the connection fail.
var functions = []string{"pg_advisory_lock(bigint)", "pg_try_advisory_xact_lock_shared(bigint)", "gen_random_uuid()"}

// MissingPrivileges is the error for rights that the role of a [Store] lacks.
type MissingPrivileges struct {
	// Place is the database, Role the current role there.
	Place, Role string
	// Missing has each missing right in words: "UPDATE on public.orchestrator_runs".
	Missing []string
	// Grant is SQL that grants the rights, for the owner of the tables to run.
	Grant string
}

func (m *MissingPrivileges) Error() string {
	return fmt.Sprintf("database %s: role %s lacks %s, which a worker needs", m.Place, m.Role, strings.Join(m.Missing, ", "))
}

// Unwrap returns ErrRefused.
func (m *MissingPrivileges) Unwrap() error { return ErrRefused }

// Permanent: a retry does not grant anything.
func (m *MissingPrivileges) Permanent() bool { return true }

// CheckPrivileges finds what would make every step fail although the worker can
// start. It returns a *MissingPrivileges if the role lacks a right to an existing
// object, ErrSchema if a table lacks a column that a worker writes, and ErrRefused
// or ErrUnavailable if the database accepts no writes. Missing tables are for
// CheckSchema to report.
//
// It reads only catalogs and settings, and needs no right to any table.
func (s *Store) CheckPrivileges(ctx context.Context, results *ResultsConfig) error {
	return s.checkPrivileges(ctx, WorkerPrivileges(results), functions)
}

// CheckPrivileges is like [Store.CheckPrivileges], for a database that only stores
// Celery results.
func (r *Results) CheckPrivileges(ctx context.Context) error {
	return r.store.checkPrivileges(ctx, resultPrivileges(r.config), nil)
}

// lack is a missing right to an object or, if kind is "column", a missing column of
// it. Names are quoted where SQL needs it.
type lack struct{ schema, object, right, kind string }

func (s *Store) checkPrivileges(ctx context.Context, wanted []Privilege, functions []string) error {
	var role string
	var readOnly, standby bool
	var lacks []lack
	err := s.retry(ctx, "look at the privileges at "+s.place, func(ctx context.Context) error {
		lacks = nil
		return pgx.BeginTxFunc(ctx, s.pool, pgx.TxOptions{}, func(tx pgx.Tx) (err error) {
			err = tx.QueryRow(ctx, `SELECT quote_ident(current_user), current_setting('transaction_read_only') = 'on', pg_is_in_recovery()`).
				Scan(&role, &readOnly, &standby)
			if err != nil {
				return err
			}
			lacks, err = readLacks(ctx, tx, wanted, functions)
			return err
		})
	})
	switch {
	case err != nil:
		return err
	case standby:
		return failure(ErrUnavailable, "database %s is a standby and takes no writes: connect to the primary, or name all servers and target_session_attrs=read-write in the URL", s.place)
	case readOnly:
		return failure(ErrRefused, "database %s: transactions of role %s are read-only: set default_transaction_read_only off for the role, the database, or in the URL's options", s.place, role)
	}
	var columns []string
	for _, l := range lacks {
		if l.kind == "column" {
			columns = append(columns, l.object+"."+l.right)
		}
	}
	if len(columns) > 0 {
		return failure(ErrSchema, "the tables in %s lack columns that a worker writes (%s): run the migrations of the MoonMind that is in use", s.place, strings.Join(columns, ", "))
	}
	if len(lacks) > 0 {
		return missingPrivileges(s.place, role, lacks)
	}
	return nil
}

// readLacks compares the wanted rights with those of the role. PostgreSQL skips a
// schema of the search_path that the role may not use, so that tables there seem
// to be missing. readLacks reports such a schema, and checks its tables too.
func readLacks(ctx context.Context, tx pgx.Tx, wanted []Privilege, functions []string) ([]lack, error) {
	n := len(wanted)
	schemas, objects, rights, columns := make([]string, n), make([]string, n), make([]string, n), make([]string, n)
	for i, p := range wanted {
		schemas[i], objects[i], rights[i], columns[i] = p.Schema, p.Object, p.Name, strings.Join(p.Columns, ",")
	}
	rows, err := tx.Query(ctx, `
		WITH wanted AS (
		    SELECT w.*, found.*
		    FROM unnest($1::text[], $2::text[], $3::text[], $4::text[]) WITH ORDINALITY AS w (asked, object, privilege, columns, place)
		    CROSS JOIN LATERAL (
		        SELECT c.oid, c.relkind, n.oid AS namespace, n.nspname
		        FROM pg_catalog.pg_class AS c
		        JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
		        WHERE c.relname = w.object AND c.relkind IN ('r', 'p', 'v', 'S')
		          AND CASE WHEN w.asked <> '' THEN n.nspname = w.asked
		                   ELSE pg_table_is_visible(c.oid) OR NOT has_schema_privilege(n.oid, 'USAGE')
		                        AND replace(n.nspname, current_user, '$user') = ANY (
		                            SELECT btrim(part, ' "') FROM unnest(string_to_array(current_setting('search_path'), ',')) AS p (part)) END
		        ORDER BY pg_table_is_visible(c.oid) DESC
		        LIMIT 1) AS found
		), columns AS (
		    SELECT w.*, a.attname, a.attnum
		    FROM wanted AS w
		    JOIN pg_catalog.pg_attribute AS a ON a.attrelid = w.oid AND a.attnum > 0 AND NOT a.attisdropped
		    WHERE w.columns = '' OR a.attname = ANY (string_to_array(w.columns, ','))
		), lacks AS (
		    SELECT 0 AS kind, namespace::bigint AS place, nspname::text AS schema, '' AS object, 'USAGE' AS lacks, 'schema' AS what
		    FROM wanted WHERE NOT has_schema_privilege(namespace, 'USAGE')
		    UNION
		    SELECT 1, w.place, w.nspname::text, w.object, column_name, 'column'
		    FROM wanted AS w, unnest(string_to_array(w.columns, ',')) AS column_name
		    WHERE NOT EXISTS (SELECT FROM columns AS c WHERE c.place = w.place AND c.attname = column_name)
		    UNION
		    SELECT 2, w.place, w.nspname::text, w.object, w.privilege, CASE WHEN w.relkind = 'S' THEN 'sequence' ELSE 'table' END
		    FROM wanted AS w
		    WHERE CASE WHEN w.relkind = 'S' THEN NOT has_sequence_privilege(w.oid, 'USAGE, UPDATE')
		               WHEN w.privilege = 'DELETE' THEN NOT has_table_privilege(w.oid, w.privilege)
		               ELSE NOT has_table_privilege(w.oid, w.privilege)
		                    AND EXISTS (SELECT FROM columns AS c WHERE c.place = w.place
		                                AND CASE WHEN c.privilege IN ('SELECT', 'INSERT', 'UPDATE') THEN NOT has_column_privilege(c.oid, c.attnum, c.privilege) END) END
		    UNION
		    SELECT 3, f.place, 'pg_catalog', f.name, 'EXECUTE', 'function'
		    FROM unnest($5::text[]) WITH ORDINALITY AS f (name, place)
		    WHERE NOT has_function_privilege('pg_catalog.' || f.name, 'EXECUTE')
		)
		SELECT quote_ident(schema), CASE WHEN what = 'function' THEN object ELSE quote_ident(object) END, lacks, what FROM lacks ORDER BY kind, place, lacks`, schemas, objects, rights, columns, functions)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (l lack, err error) {
		err = row.Scan(&l.schema, &l.object, &l.right, &l.kind)
		return l, err
	})
}

// missingPrivileges groups the rights by object, and objects by the same missing
// rights.
func missingPrivileges(place, role string, lacks []lack) *MissingPrivileges {
	m := &MissingPrivileges{Place: place, Role: role}
	type object struct{ kind, name string }
	var objects []object
	of := map[object][]string{}
	for _, l := range lacks {
		name := l.schema
		if l.kind != "schema" {
			name += "." + l.object
		}
		o := object{l.kind, name}
		if of[o] == nil {
			objects = append(objects, o)
		}
		of[o] = append(of[o], l.right)
	}
	var grants []object // kind and rights
	on := map[object][]string{}
	for _, o := range objects {
		// The rights to a table are in the order of WorkerPrivileges.
		g := object{o.kind, strings.Join(of[o], ", ")}
		if on[g] == nil {
			grants = append(grants, g)
		}
		on[g] = append(on[g], o.name)
	}
	var statements []string
	for _, g := range grants {
		keyword := ""
		if g.kind != "table" {
			keyword = strings.ToUpper(g.kind) + " "
		}
		names := strings.Join(on[g], ", ")
		m.Missing = append(m.Missing, fmt.Sprintf("%s on %s", g.name, strings.ToLower(keyword)+names))
		statements = append(statements, fmt.Sprintf("GRANT %s ON %s%s TO %s", g.name, keyword, names, role))
	}
	m.Grant = strings.Join(statements, "; ")
	return m
}
