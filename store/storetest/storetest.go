// Package storetest gives tests a real database with MoonMind's tables, and does in
// it what MoonMind's API does: create, approve and retry a run.
//
// It writes the API's rows with SQL of its own, not through package store, so that
// tests compare two independent sources.
package storetest

import (
	"context"
	_ "embed"
	"encoding/json"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// Database is a database of one test.
type Database struct {
	// URL is for a worker. In a database from New its role has the rights of
	// [store.WorkerPrivileges] and [store.SpecPrivileges] and no others, so that a statement which needs more
	// fails its test.
	URL string
	// OwnerURL is for the owner, who may create tables.
	OwnerURL string
	// Pool is for a test's own statements. It connects as the owner.
	Pool *pgxpool.Pool
}

// Empty creates an empty database. It is dropped when the test ends.
func Empty(t testing.TB) *Database {
	t.Helper()
	return at(t, devenv.Database(t))
}

func at(t testing.TB, address string) *Database {
	t.Helper()
	d := &Database{URL: address, OwnerURL: address}
	config, err := pgxpool.ParseConfig(address)
	if err != nil {
		t.Fatal(err)
	}
	config.MaxConns = 2
	if d.Pool, err = pgxpool.NewWithConfig(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Pool.Close)
	return d
}

// New creates a database with MoonMind's tables, ours and Celery's.
func New(t testing.TB) *Database {
	t.Helper()
	return Empty(t).fill(t)
}

// At is New in the database with this address: of a server that the test restarts.
func At(t testing.TB, address string) *Database {
	t.Helper()
	return at(t, address).fill(t)
}

func (d *Database) fill(t testing.TB) *Database {
	t.Helper()
	options := store.MigrateOptions{SharedTables: true, ResultTables: &store.ResultsConfig{}}
	if _, err := d.Open(t).Migrate(t.Context(), options); err != nil {
		t.Fatal(err)
	}
	d.URL = d.Role(t, "worker", Grants(slices.Concat(store.WorkerPrivileges(options.ResultTables), store.SpecPrivileges(nil))...)...)
	return d
}

// Role creates a role that can log in and has these grants ("SELECT ON holds"), and
// returns the database's URL for it. Its name ends with name. It is dropped when
// the test ends.
func (d *Database) Role(t testing.TB, name string, grants ...string) string {
	t.Helper()
	u, err := url.Parse(d.OwnerURL)
	if err != nil {
		t.Fatal(err)
	}
	plain := strings.Trim(u.Path, "/") + "_" + name
	u.User = url.UserPassword(plain, "open")
	role := pgx.Identifier{plain}.Sanitize()
	d.exec(t, `CREATE ROLE `+role+` LOGIN PASSWORD 'open'`)
	t.Cleanup(func() {
		for _, statement := range []string{`DROP OWNED BY ` + role, `DROP ROLE ` + role} {
			if _, err := d.Pool.Exec(context.Background(), statement); err != nil {
				t.Error(err)
			}
		}
	})
	for _, grant := range grants {
		d.exec(t, `GRANT `+grant+` TO `+role)
	}
	return u.String()
}

// Grants returns the grants for Role that give exactly these privileges, and USAGE of
// their schemas.
func Grants(privileges ...store.Privilege) []string {
	grants := []string{"USAGE ON SCHEMA public, mm_orchestrator"}
	for _, p := range privileges {
		name := pgx.Identifier{p.Object}
		if p.Schema != "" {
			name = pgx.Identifier{p.Schema, p.Object}
		}
		grant := p.Name
		if p.Columns != nil {
			grant += " (" + strings.Join(p.Columns, ", ") + ")"
		}
		if p.Name == "USAGE" {
			grant += " ON SEQUENCE "
		} else {
			grant += " ON "
		}
		grants = append(grants, grant+name.Sanitize())
	}
	return grants
}

// Open opens a store with d.URL, as a worker does. Its log goes to the test. It is
// closed when the test ends.
func (d *Database) Open(t testing.TB, change ...func(*store.Config)) *store.Store {
	t.Helper()
	config := store.Config{
		URL:    secret.New(d.URL),
		Worker: "orchestrator@test",
		Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	for _, c := range change {
		c(&config)
	}
	s, err := store.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// Results returns the result backend in the database of a store.
func Results(t testing.TB, s *store.Store, encoding protocol.Encoding) *store.Results {
	t.Helper()
	r, err := store.NewResults(s, store.ResultsConfig{Encoding: encoding})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

//go:embed action_plan_api.json
var actionPlan []byte

// Plan returns the steps of the plan that MoonMind's API makes for its service
// "api". change, if not nil, is called with the parameters of each step and may
// change them.
func Plan(t testing.TB, change func(step store.Step, parameters map[string]any)) json.RawMessage {
	t.Helper()
	var row struct {
		Steps []struct {
			Name       string         `json:"name"`
			Parameters map[string]any `json:"parameters"`
		} `json:"steps"`
	}
	if err := json.Unmarshal(actionPlan, &row); err != nil {
		t.Fatal(err)
	}
	if change != nil {
		for _, step := range row.Steps {
			change(store.Step(step.Name), step.Parameters)
		}
	}
	text, err := json.Marshal(row.Steps)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// Seed is a request to create a run. The zero value is the API's run for
// service "api", without an approval gate.
type Seed struct {
	// ID of the run. Defaults to a random one.
	ID string
	// Instruction has a default.
	Instruction string
	// TargetService defaults to "api".
	TargetService string
	// Priority defaults to "normal".
	Priority string
	// Plan is the array of steps. Defaults to Plan(t, nil).
	Plan json.RawMessage
	// ArtifactRoot defaults to a path that does not exist here, as with an API on
	// another machine.
	ArtifactRoot string
	// Gate creates an approval gate with requirement pre-run for the service, so
	// that the run waits for approval.
	Gate bool
	// NoStates leaves the six state rows out.
	NoStates bool
}

// Create creates a run as POST /orchestrator/runs does, up to its commit, and
// returns its id (docs/moonmind.md#who-does-what; store/testdata has its rows
// in orchestrator_run_rows.json and task_state_rows.json).
func (d *Database) Create(t testing.TB, seed Seed) string {
	t.Helper()
	if seed.Instruction == "" {
		seed.Instruction = "Pin httpx to 0.28.1 so that the API image builds again"
	}
	if seed.TargetService == "" {
		seed.TargetService = "api"
	}
	if seed.Priority == "" {
		seed.Priority = "normal"
	}
	if seed.Plan == nil {
		seed.Plan = Plan(t, nil)
	}
	status := "pending"
	snapshot := `{"approval": {"required": false, "requirement": "none", "status": "awaiting", "grantedAt": "2026-01-14T09:29:59.871204+00:00"}}`
	if seed.Gate {
		status = "awaiting_approval"
		snapshot = `{"approval": {"required": true, "requirement": "pre-run", "status": "awaiting"}}`
	}
	ctx := t.Context()
	var id string
	err := pgx.BeginFunc(ctx, d.Pool, func(tx pgx.Tx) error {
		var gate *string
		if seed.Gate {
			err := tx.QueryRow(ctx, `
				INSERT INTO approval_gates (id, service_name, requirement, approver_roles, valid_for_minutes)
				VALUES (gen_random_uuid(), $1, 'pre-run', '{sre}', 60)
				ON CONFLICT (service_name) DO UPDATE SET requirement = 'pre-run', approver_roles = '{sre}'
				RETURNING id::text`, seed.TargetService).Scan(&gate)
			if err != nil {
				return err
			}
		}
		err := tx.QueryRow(ctx, `
			WITH plan AS (
			    INSERT INTO orchestrator_action_plans (id, steps, service_context)
			    VALUES (gen_random_uuid(), $5::text::jsonb, jsonb_build_object('service', $3::text))
			    RETURNING id
			)
			INSERT INTO orchestrator_runs
			       (id, instruction, target_service, priority, status, metrics_snapshot, artifact_root, action_plan_id, approval_gate_id)
			SELECT run, $2, $3, $4::text::orchestratorrunpriority, $6::text::orchestratorrunstatus, $7::text::jsonb,
			       COALESCE(NULLIF($8, ''), '/app/var/artifacts/spec_workflows/' || run), plan.id, $9
			FROM plan, COALESCE(NULLIF($1, '')::uuid, gen_random_uuid()) AS run
			RETURNING id::text`,
			seed.ID, seed.Instruction, seed.TargetService, seed.Priority, string(seed.Plan), status, snapshot, seed.ArtifactRoot, gate).Scan(&id)
		if err != nil || seed.NoStates {
			return err
		}
		_, err = tx.Exec(ctx, `
			INSERT INTO spec_workflow_task_states
			       (id, orchestrator_run_id, task_name, status, attempt, plan_step, plan_step_status, artifact_refs)
			SELECT gen_random_uuid(), $1, step, 'queued', 1, step::orchestratorplanstep, 'pending', '[]'
			FROM unnest($2::text[]) AS step`, id, store.Steps())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// Approve does what POST …/approvals does, up to its commit
// (docs/moonmind.md#approval).
func (d *Database) Approve(t testing.TB, run string) {
	t.Helper()
	d.exec(t, `
		UPDATE orchestrator_runs
		SET status = 'pending', approval_token = 'OJXrXNBco1aQW3TEaXw7FRM215/hRt8RoJgsvGfOH1A=', started_at = NULL, completed_at = NULL,
		    metrics_snapshot = metrics_snapshot || jsonb_build_object('approval', jsonb_build_object('required', true,
		        'requirement', COALESCE((SELECT g.requirement::text FROM approval_gates AS g WHERE g.id = approval_gate_id), 'pre-run'), 'status', 'granted', 'approver', jsonb_build_object('id', 'ops-417', 'role', 'sre'),
		        'grantedAt', to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"'),
		        'expiresAt', to_char((clock_timestamp() + interval '1 hour') AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"'))),
		    updated_at = now()
		WHERE id = $1`, run)
}

// Retry does what POST …/retry does, up to its commit: the rows of the steps
// from the given one on go to the next attempt in place
// (docs/moonmind.md#attempts). started_at and completed_at of the run stay,
// which is docs/moonmind.md#r3.
func (d *Database) Retry(t testing.TB, run string, from store.Step, reason string) {
	t.Helper()
	ctx := t.Context()
	err := pgx.BeginFunc(ctx, d.Pool, func(tx pgx.Tx) error {
		// SQLAlchemy updates row by row, in order of the primary key.
		_, err := tx.Exec(ctx, `
			SELECT 1 FROM spec_workflow_task_states
			WHERE orchestrator_run_id = $1 AND plan_step >= $2::text::orchestratorplanstep
			ORDER BY id FOR UPDATE`, run, string(from))
		if err != nil {
			return err
		}
		_, err = tx.Exec(ctx, `
			UPDATE spec_workflow_task_states
			SET attempt = attempt + 1, plan_step_status = 'pending', celery_state = 'PENDING', message = NULLIF($3, ''),
			    started_at = NULL, finished_at = NULL
			WHERE orchestrator_run_id = $1 AND plan_step >= $2::text::orchestratorplanstep`, run, string(from), reason)
		if err != nil {
			return err
		}
		_, err = tx.Exec(ctx, `UPDATE orchestrator_runs SET status = 'pending', updated_at = now() WHERE id = $1`, run)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func (d *Database) exec(t testing.TB, sql string, args ...any) {
	t.Helper()
	if _, err := d.Pool.Exec(t.Context(), sql, args...); err != nil {
		t.Fatal(err)
	}
}

// Row is a table row as PostgreSQL prints it in JSON.
type Row = map[string]any

// Run returns the row of a run.
func (d *Database) Run(t testing.TB, run string) Row {
	t.Helper()
	rows := d.Rows(t, `SELECT * FROM orchestrator_runs WHERE id = $1`, run)
	if len(rows) != 1 {
		t.Fatalf("run %s: %d rows", run, len(rows))
	}
	return rows[0]
}

// States returns all state rows of a run by step and attempt.
func (d *Database) States(t testing.TB, run string) []Row {
	t.Helper()
	return d.Rows(t, `SELECT * FROM spec_workflow_task_states WHERE orchestrator_run_id = $1 ORDER BY plan_step, attempt`, run)
}

// State returns the row of a step's newest attempt.
func (d *Database) State(t testing.TB, run string, step store.Step) Row {
	t.Helper()
	rows := d.Rows(t, `SELECT * FROM spec_workflow_task_states WHERE orchestrator_run_id = $1 AND plan_step::text = $2
		ORDER BY attempt DESC LIMIT 1`, run, string(step))
	if len(rows) != 1 {
		t.Fatalf("run %s has no state of step %s", run, step)
	}
	return rows[0]
}

// Artifacts returns the artifact rows of a run by time and path.
func (d *Database) Artifacts(t testing.TB, run string) []Row {
	t.Helper()
	return d.Rows(t, `SELECT * FROM orchestrator_run_artifacts WHERE run_id = $1 ORDER BY created_at, path`, run)
}

// Rows runs a query, or a statement with RETURNING, and returns its rows. Times
// are UTC.
func (d *Database) Rows(t testing.TB, sql string, args ...any) []Row {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	var texts []string
	err := pgx.BeginFunc(ctx, d.Pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SET LOCAL TimeZone TO 'UTC'`); err != nil {
			return err
		}
		found, err := tx.Query(ctx, `WITH found AS (`+sql+`) SELECT row_to_json(found)::text FROM found`, args...)
		if err != nil {
			return err
		}
		texts, err = pgx.CollectRows(found, pgx.RowTo[string])
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	rows := make([]Row, len(texts))
	for i, text := range texts {
		if err := json.Unmarshal([]byte(text), &rows[i]); err != nil {
			t.Fatal(err)
		}
	}
	return rows
}

// Clock is a clock that shows Time until a test sets it. Set it only while no other
// goroutine uses it.
type Clock struct{ Time time.Time }

// Now returns the time that was set.
func (c *Clock) Now() time.Time { return c.Time }
