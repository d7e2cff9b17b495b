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

// execAsOwner runs statements in the database as its owner.
func (s testEnv) execAsOwner(t *testing.T, statements ...string) {
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

// leastPrivileged changes s to a role that can only read and write rows, and returns
// the environment of the tables' owner.
func (s *testEnv) leastPrivileged(t *testing.T) (role string, owner testEnv) {
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
	owner.execAsOwner(t, strings.ReplaceAll(string(script), "ROLE", role))
	t.Cleanup(func() { owner.execAsOwner(t, "DROP OWNED BY "+role, "DROP ROLE "+role) })
	s.database = withURL(t, s.database, func(u *url.URL) { u.User = url.UserPassword(role, "steps") })
	return role, owner
}

// A role that can only read and write rows is sufficient: doctor reports no failure,
// and a worker runs a step and stores its result.
func TestLeastPrivilegedRole(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	s.git(t)
	_, owner := s.leastPrivileged(t)
	found := runDoctor(t, append(s.env(), "MM_ORCHESTRATOR_COMPOSE="+dockerOnPath(t)), exitOK)
	for _, name := range []string{"database", "connections", "privileges", "tables", "results"} {
		if f := found[name]; f.Status != statusOK {
			t.Errorf("%+v", f)
		}
	}
	p := start(t, append(s.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sleep"), "worker")
	p.logLine("worker ready")
	owner.waitForStep(t, owner.submitSleep(t, 0), "build", "succeeded")
}

// doctor and the start of a worker report, in the same words, missing access that
// would otherwise fail only when steps run.
func TestMissingAccessIsReportedAtStart(t *testing.T) {
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
			s := newTestEnv(t)
			role, owner := s.leastPrivileged(t)
			names := strings.NewReplacer("%role", role)
			owner.execAsOwner(t, names.Replace(tt.statement))
			found, cure := names.Replace(tt.found), names.Replace(tt.cure)
			if f := runDoctor(t, s.env(), exitFailure)[tt.check]; f.Status != statusFail || !strings.Contains(f.Found, found) || !strings.Contains(f.Cure, cure) {
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

// Where a command's role lacks a privilege, the error says in one line what to do.
func TestRefusedCommandsSayWhatToDo(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	role, owner := s.leastPrivileged(t)
	owner.execAsOwner(t, "REVOKE USAGE ON SCHEMA mm_orchestrator FROM "+role)
	for _, tt := range []struct {
		command, cure string
	}{
		{"runs", "`mm-orchestrator doctor` names the privileges that the role lacks; or run this command as the owner of the tables"},
		{"parked", "`mm-orchestrator doctor` names the privileges"},
		{"parked return", "`mm-orchestrator doctor` names the privileges"},
		{"migrate", "Run this command as the owner of the database"},
		{"migrate --remove", "Run this command as the owner of the schema"},
	} {
		p := start(t, s.env(), strings.Fields(tt.command)...)
		code, text := p.exit(), strings.TrimSpace(p.stderr.String())
		if code != exitRefused || !strings.Contains(text, "permission denied for schema mm_orchestrator") || !strings.Contains(text, ". "+tt.cure) || strings.Contains(text, "\n") {
			t.Errorf("%s: exit %d: %s", tt.command, code, text)
		}
	}
}

// doctor fails if the worker would have to create the schema and may not.
func TestDoctorWithoutRightToMigrate(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	_, owner := s.leastPrivileged(t)
	if p := start(t, owner.env(), "migrate", "--remove"); p.exit() != exitOK {
		t.Fatalf("migrate --remove: exit %d", p.code)
	}
	f := runDoctor(t, s.env(), exitFailure)["tables"]
	if f.Status != statusFail || !strings.Contains(f.Found, "permission denied") || !strings.Contains(f.Cure, "mm-orchestrator migrate") {
		t.Errorf("%+v", f)
	}
	if f := runDoctor(t, owner.env(), exitFailure)["tables"]; f.Status != statusOK {
		t.Errorf("as the owner: %+v", f)
	}
	if p := start(t, owner.env(), "runs"); p.exit() != exitConfig {
		t.Errorf("doctor has made the schema: exit %d", p.code)
	}
}

// A worker that has lost the session of its lock, and gets no new one, can start no
// step, although the database answers.
func TestHealthFollowsTheLockSession(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	role, owner := s.leastPrivileged(t)
	p := start(t, s.withShortLimits(), "worker").probedWorker()
	p.waitHealthy()
	eventually(t, "the worker is registered", func() error {
		if n := s.queryInt(t, `SELECT count(*) FROM mm_orchestrator.workers`); n != 1 {
			return fmt.Errorf("%d are", n)
		}
		return nil
	})
	// The limit is 1 and not 2, because the pool may have one or two open now.
	owner.execAsOwner(t, "ALTER ROLE "+role+" CONNECTION LIMIT 1",
		"SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())")
	p.waitUnhealthy("too many connections")
	owner.execAsOwner(t, "ALTER ROLE "+role+" CONNECTION LIMIT -1")
	p.waitHealthy()
}

// The role in docs/operations.md is sufficient.
func TestDocumentedRole(t *testing.T) {
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
	s := newTestEnv(t)
	u, err := url.Parse(s.database)
	if err != nil {
		t.Fatal(err)
	}
	role := strings.TrimPrefix(u.Path, "/") + "_documented"
	s.execAsOwner(t, strings.ReplaceAll(script, "steps", role))
	t.Cleanup(func() { s.execAsOwner(t, "DROP OWNED BY "+role, "DROP ROLE "+role) })
	asRole := s
	asRole.database = withURL(t, s.database, func(u *url.URL) { u.User = url.UserPassword(role, "change me") })
	findings := runDoctor(t, asRole.env(), exitFailure) // it has no git work tree
	for _, name := range []string{"database", "connections", "privileges", "tables", "results"} {
		if f := findings[name]; f.Status != statusOK {
			t.Errorf("%+v", f)
		}
	}
	p := start(t, append(asRole.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sleep"), "worker")
	p.logLine("worker ready")
	s.waitForStep(t, s.submitSleep(t, 0), "build", "succeeded")
}
