package main

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

// administer runs statements in the stand's database as its owner.
func (s stand) administer(t *testing.T, statements ...string) {
	t.Helper()
	conn, err := pgx.Connect(context.Background(), s.database)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	for _, statement := range statements {
		if _, err := conn.Exec(context.Background(), statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
}

// leastPrivileged gives the stand to a role that may read and write rows and
// nothing else, and returns the stand as its owner has it.
func (s *stand) leastPrivileged(t *testing.T) (role string, owner stand) {
	t.Helper()
	owner = *s
	u, err := url.Parse(s.database)
	if err != nil {
		t.Fatal(err)
	}
	role = strings.TrimPrefix(u.Path, "/") + "_steps"
	script, err := os.ReadFile("testdata/least-privilege.sql")
	if err != nil {
		t.Fatal(err)
	}
	owner.administer(t, strings.ReplaceAll(string(script), "ROLE", role))
	t.Cleanup(func() { owner.administer(t, "DROP OWNED BY "+role, "DROP ROLE "+role) })
	s.database = withURL(t, s.database, func(u *url.URL) { u.User = url.UserPassword(role, "steps") })
	return role, owner
}

// A role that may only read and write rows suffices: doctor says so, and a
// worker runs a step and stores its result.
func TestARoleThatMayOnlyReadAndWriteRows(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	s.git(t)
	_, owner := s.leastPrivileged(t)
	found := diagnose(t, append(s.env(), "MM_ORCHESTRATOR_COMPOSE="+dockerOnPath(t)), exitOK)
	for _, name := range []string{"database", "connections", "privileges", "tables", "results"} {
		if f := found[name]; f.Status != statusOK {
			t.Errorf("%+v", f)
		}
	}
	p := start(t, append(s.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sleep"), "worker")
	p.logLine("worker ready")
	owner.waitForStep(t, owner.submitSleep(t, 0), "build", "succeeded")
}

// Both say in the same words what a worker would miss only when steps run, and
// a worker that would miss it is not ready.
func TestWhatAWorkerWouldMissLaterIsToldAtItsStart(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, statement, check, found, cure string
		code                                int
	}{
		{
			"connections of the role", "ALTER ROLE %role CONNECTION LIMIT 2", "connections",
			"role %role may have 2; a worker needs 3 at a time", "ALTER ROLE %role CONNECTION LIMIT 3", exitConfig,
		},
		{
			"one connection", "ALTER ROLE %role CONNECTION LIMIT 1", "connections",
			"role %role may have 1; a worker needs 3 at a time", "ALTER ROLE %role CONNECTION LIMIT 3", exitConfig,
		},
		{
			"a right", "REVOKE UPDATE ON orchestrator_runs FROM %role", "privileges",
			"role %role lacks UPDATE on public.orchestrator_runs", "GRANT UPDATE ON public.orchestrator_runs TO %role", exitRefused,
		},
		{
			"a right to results", "REVOKE ALL ON SEQUENCE task_id_sequence FROM %role", "privileges",
			"role %role lacks USAGE on sequence public.task_id_sequence", "GRANT USAGE ON SEQUENCE public.task_id_sequence TO %role", exitRefused,
		},
		{
			"the schema", "REVOKE USAGE ON SCHEMA mm_orchestrator FROM %role", "privileges",
			"role %role lacks USAGE on schema mm_orchestrator", "GRANT USAGE ON SCHEMA mm_orchestrator TO %role", exitRefused,
		},
		{
			"writing", "ALTER ROLE %role SET default_transaction_read_only = on", "privileges",
			"transactions of role %role are read-only", "", exitRefused,
		},
		{
			"a column", "ALTER TABLE orchestrator_runs DROP COLUMN artifact_root", "tables",
			"orchestrator_runs.artifact_root", "", exitConfig,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newStand(t)
			role, owner := s.leastPrivileged(t)
			names := strings.NewReplacer("%role", role)
			owner.administer(t, names.Replace(tt.statement))
			found, cure := names.Replace(tt.found), names.Replace(tt.cure)
			if f := diagnose(t, s.env(), exitFailure)[tt.check]; f.Status != statusFail || !strings.Contains(f.Found, found) || !strings.Contains(f.Cure, cure) {
				t.Errorf("doctor: %+v", f)
			}
			p := start(t, s.env(), "worker")
			if code := p.exit(); code != tt.code {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
			text := strings.TrimSpace(p.stderr.String())
			if !strings.Contains(text, found) || !strings.Contains(text, cure) || strings.Contains(text, "worker ready") || strings.Contains(text, "\n") {
				t.Errorf("worker:\n%s", text)
			}
		})
	}
}

// What the worker would make at its start, and may not, is no good news.
func TestDoctorKnowsWhoMayNotMigrate(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	_, owner := s.leastPrivileged(t)
	if p := start(t, owner.env(), "migrate", "--remove"); p.exit() != exitOK {
		t.Fatalf("migrate --remove: exit %d", p.code)
	}
	f := diagnose(t, s.env(), exitFailure)["tables"]
	if f.Status != statusFail || !strings.Contains(f.Found, "permission denied") || !strings.Contains(f.Cure, "mm-orchestrator migrate") {
		t.Errorf("%+v", f)
	}
	if f := diagnose(t, owner.env(), exitFailure)["tables"]; f.Status != statusOK {
		t.Errorf("of the owner: %+v", f)
	}
	if p := start(t, owner.env(), "runs"); p.exit() != exitConfig {
		t.Errorf("doctor has made the schema: exit %d", p.code)
	}
}

// A worker that has lost the session by which it lives, and gets no other, can
// begin no step, though the database answers.
func TestHealthFollowsTheSessionOfTheLock(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	role, owner := s.leastPrivileged(t)
	p := start(t, s.impatient(), "worker").probed()
	p.turnsGreen()
	eventually(t, "the worker is registered", func() error {
		if n := s.number(t, `SELECT count(*) FROM mm_orchestrator.workers`); n != 1 {
			return fmt.Errorf("%d are", n)
		}
		return nil
	})
	// One: how many it has for statements just now is a matter of chance.
	owner.administer(t, "ALTER ROLE "+role+" CONNECTION LIMIT 1",
		"SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())")
	p.turnsRed("too many connections")
	owner.administer(t, "ALTER ROLE "+role+" CONNECTION LIMIT -1")
	p.turnsGreen()
}

// The role that docs/operations.md tells to make suffices.
func TestTheDocumentedRoleSuffices(t *testing.T) {
	t.Parallel()
	manual, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, script, _ := strings.Cut(string(manual), "```sql\n")
	script, _, found := strings.Cut(script, "```")
	if !found {
		t.Fatal("docs/operations.md has no SQL")
	}
	s := newStand(t)
	u, err := url.Parse(s.database)
	if err != nil {
		t.Fatal(err)
	}
	role := strings.TrimPrefix(u.Path, "/") + "_documented"
	s.administer(t, strings.ReplaceAll(script, "steps", role))
	t.Cleanup(func() { s.administer(t, "DROP OWNED BY "+role, "DROP ROLE "+role) })
	asRole := s
	asRole.database = withURL(t, s.database, func(u *url.URL) { u.User = url.UserPassword(role, "change me") })
	told := diagnose(t, asRole.env(), exitFailure) // it has no git work tree
	for _, name := range []string{"database", "connections", "privileges", "tables", "results"} {
		if f := told[name]; f.Status != statusOK {
			t.Errorf("%+v", f)
		}
	}
	p := start(t, append(asRole.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sleep"), "worker")
	p.logLine("worker ready")
	s.waitForStep(t, s.submitSleep(t, 0), "build", "succeeded")
}
