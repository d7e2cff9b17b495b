package store_test

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

func roleOf(t *testing.T, address string) string {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	return u.User.Username()
}

func execute(t *testing.T, d *storetest.Database, statement string) {
	t.Helper()
	if _, err := d.Pool.Exec(t.Context(), statement); err != nil {
		t.Fatalf("%s: %v", statement, err)
	}
}

// When one of the rights is revoked, the error names it, and the error's statement
// grants it again. That no other right is needed, all tests of this package show:
// their role has only these.
func TestEachMissingPrivilege(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	role := roleOf(t, d.URL)
	results := &store.ResultsConfig{}
	if err := s.CheckPrivileges(t.Context(), results); err != nil {
		t.Fatal(err)
	}
	// mend is "" for what the error says.
	type taken struct{ statement, told, mend string }
	var list []taken
	for _, p := range store.WorkerPrivileges(results) {
		from, schema := role, p.Schema
		switch schema {
		case "":
			schema = "public"
		case "pg_catalog":
			from = "PUBLIC, " + role
		}
		right, on := p.Name, schema+"."+p.Object
		told := right + " on " + on
		if right == "USAGE" {
			on, told = "SEQUENCE "+on, right+" on sequence "+on
		}
		for _, column := range p.Columns {
			list = append(list, taken{fmt.Sprintf("REVOKE %s (%s) ON %s FROM %s", right, column, on, from), told, fmt.Sprintf("GRANT %s (%s) ON %s TO %s", right, column, on, from)})
		}
		if p.Columns == nil {
			list = append(list, taken{fmt.Sprintf("REVOKE %s ON %s FROM %s", right, on, from), told, ""})
		}
	}
	for _, schema := range []string{"public", "mm_orchestrator"} {
		list = append(list, taken{"REVOKE USAGE ON SCHEMA " + schema + " FROM PUBLIC, " + role, "USAGE on schema " + schema, ""})
	}
	for _, function := range []string{"pg_advisory_lock(bigint)", "pg_try_advisory_xact_lock_shared(bigint)", "gen_random_uuid()"} {
		list = append(list, taken{"REVOKE EXECUTE ON FUNCTION " + function + " FROM PUBLIC", "EXECUTE on function pg_catalog." + function, ""})
	}
	for _, tt := range list {
		execute(t, d, tt.statement)
		var missing *store.MissingPrivileges
		err := s.CheckPrivileges(t.Context(), results)
		if !errors.As(err, &missing) || !errors.Is(err, store.ErrRefused) || !slices.Equal(missing.Missing, []string{tt.told}) {
			t.Fatalf("after %s: %v, want %q", tt.statement, err, tt.told)
		}
		execute(t, d, cmp.Or(tt.mend, missing.Grant))
		if err := s.CheckPrivileges(t.Context(), results); err != nil {
			t.Fatalf("after %s: %v", cmp.Or(tt.mend, missing.Grant), err)
		}
	}
}

// For a role without any right, one error names all.
func TestAllMissingPrivilegesAtOnce(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	address := d.Role(t, "Bare; role") // quoted where SQL needs it
	s := d.Open(t, asRole(address))
	results := &store.ResultsConfig{}
	err := s.CheckPrivileges(t.Context(), results)
	var missing *store.MissingPrivileges
	if !errors.As(err, &missing) || strings.Contains(err.Error(), "\n") {
		t.Fatal(err)
	}
	execute(t, d, missing.Grant)
	if err := s.CheckPrivileges(t.Context(), results); err != nil {
		t.Error(err)
	}
	run := d.Create(t, storetest.Seed{})
	pass(t, s, run, "t", toVerify...)
}

// WorkerPrivileges and SpecPrivileges together cover every table of schema mm_orchestrator.
func TestPrivilegesAreOfAllOwnTables(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	rows, err := d.Pool.Query(t.Context(), `SELECT relname::text FROM pg_class WHERE relnamespace = 'mm_orchestrator'::regnamespace AND relkind IN ('r', 'p') ORDER BY 1`)
	if err != nil {
		t.Fatal(err)
	}
	tables, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	var listed []string
	for _, p := range append(store.WorkerPrivileges(nil), store.SpecPrivileges(nil)...) {
		if p.Schema == "mm_orchestrator" {
			listed = append(listed, p.Object)
		}
	}
	slices.Sort(listed)
	if listed = slices.Compact(listed); !slices.Equal(tables, listed) {
		t.Errorf("tables %q, privileges of %q", tables, listed)
	}
}

// A worker could start at a read-only database, and every step would fail.
func TestAReadOnlyDatabase(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	execute(t, d, "ALTER ROLE "+roleOf(t, d.URL)+" SET default_transaction_read_only = on")
	err := d.Open(t).CheckPrivileges(t.Context(), nil)
	if !errors.Is(err, store.ErrRefused) || !strings.Contains(err.Error(), "default_transaction_read_only") {
		t.Error(err)
	}
}

func TestAMissingColumn(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	execute(t, d, "ALTER TABLE orchestrator_runs DROP COLUMN artifact_root")
	err := d.Open(t).CheckPrivileges(t.Context(), nil)
	if !errors.Is(err, store.ErrSchema) || !strings.Contains(err.Error(), "orchestrator_runs.artifact_root") {
		t.Error(err)
	}
}

// CheckSchema reports missing tables, not CheckPrivileges.
func TestPrivilegesIgnoreMissingTables(t *testing.T) {
	t.Parallel()
	if err := storetest.Empty(t).Open(t).CheckPrivileges(t.Context(), nil); err != nil {
		t.Error(err)
	}
}

func asRole(address string) func(*store.Config) {
	return func(c *store.Config) { c.URL = secret.New(address) }
}
