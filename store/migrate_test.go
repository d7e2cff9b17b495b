package store_test

import (
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

func migrate(t *testing.T, s *store.Store, options store.MigrateOptions) []string {
	t.Helper()
	report, err := s.Migrate(t.Context(), options)
	if err != nil {
		t.Fatal(err)
	}
	return report.Lines()
}

var everything = store.MigrateOptions{SharedTables: true, ResultTables: &store.ResultsConfig{}}

func TestMigrateAnEmptyDatabase(t *testing.T) {
	t.Parallel()
	d := storetest.Empty(t)
	s := d.Open(t)
	if err := s.CheckSchema(t.Context()); !errors.Is(err, store.ErrSchema) || !strings.Contains(err.Error(), "migrate --shared-tables") {
		t.Errorf("%v", err)
	}
	dry := everything
	dry.DryRun = true
	plan := migrate(t, s, dry)
	if n := len(d.Rows(t, `SELECT 1 FROM pg_namespace WHERE nspname LIKE 'mm_orch%' UNION ALL SELECT 1 FROM pg_class WHERE relname ~ '^(orch|celery|spec|task)'`)); n != 0 {
		t.Errorf("a dry run made %d things", n)
	}
	done := migrate(t, s, everything)
	for i := range plan {
		if done[i] != plan[i]+": done" {
			t.Errorf("planned %q, did %q", plan[i], done[i])
		}
	}
	if len(plan) != 9+versions(t) || len(done) != 9+versions(t) {
		t.Errorf("planned %q, did %q", plan, done)
	}
	if again := migrate(t, s, everything); len(again) != 0 {
		t.Errorf("again: %q", again)
	}
	if err := s.CheckSchema(t.Context()); err != nil {
		t.Error(err)
	}
}

// versions is how many migrations of the schema mm_orchestrator there are.
func versions(t *testing.T) int {
	t.Helper()
	files, err := filepath.Glob("migrations/*.up.sql")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	return len(files)
}

// TestOwnSchemaUpDownUp leaves nothing behind and comes back.
func TestOwnSchemaUpDownUp(t *testing.T) {
	t.Parallel()
	d := storetest.Empty(t)
	s := d.Open(t)
	own := func() []storetest.Row {
		return d.Rows(t, `SELECT c.relname, c.relkind, pg_get_constraintdef(k.oid) AS definition
			FROM pg_class AS c LEFT JOIN pg_constraint AS k ON k.conrelid = c.oid AND k.contype <> 'n'
			WHERE c.relnamespace = to_regnamespace('mm_orchestrator') ORDER BY 1, 3`)
	}
	migrate(t, s, store.MigrateOptions{})
	first := own()
	if len(first) < 8 {
		t.Errorf("schema mm_orchestrator holds %v", first)
	}
	if report, err := s.RemoveOwnSchema(t.Context(), true); err != nil || len(report.Steps) != 1+versions(t) || len(own()) != len(first) {
		t.Errorf("dry: %v, %v", report, err)
	}
	if _, err := s.RemoveOwnSchema(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if rows := d.Rows(t, `SELECT nspname FROM pg_namespace WHERE nspname LIKE 'mm%'`); len(rows) != 0 {
		t.Errorf("left behind: %v", rows)
	}
	if report, err := s.RemoveOwnSchema(t.Context(), false); err != nil || len(report.Steps) != 0 {
		t.Errorf("again: %v, %v", report, err)
	}
	migrate(t, s, store.MigrateOptions{})
	equal(t, "schema", own(), first)

	if _, err := d.Pool.Exec(t.Context(), `INSERT INTO mm_orchestrator.schema_versions (version, name) VALUES (99, 'of the future')`); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Migrate(t.Context(), store.MigrateOptions{}); !errors.Is(err, store.ErrSchema) || !strings.Contains(err.Error(), "99") {
		t.Errorf("a newer schema: %v", err)
	}
}

func TestMigrationFilesBelongTogether(t *testing.T) {
	t.Parallel()
	entries, err := os.ReadDir("migrations")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	for _, name := range names {
		up := strings.Replace(name, ".down.sql", ".up.sql", 1)
		down := strings.Replace(name, ".up.sql", ".down.sql", 1)
		if name != "shared.sql" && (!slices.Contains(names, up) || !slices.Contains(names, down) || up == down) {
			t.Errorf("%s is not one of a pair NNNN_name.up.sql and .down.sql", name)
		}
	}
}

// TestClaimChecks: what the table refuses.
func TestClaimChecks(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	for values, constraint := range map[string]string{
		`'deploy', 1, 'w', 1, 1, NULL, NULL`:   "claims_step_known",
		`'build', 0, 'w', 1, 1, NULL, NULL`:    "claims_attempt_positive",
		`'build', 1, 'w', 1, 0, NULL, NULL`:    "claims_starts_positive",
		`'build', 1, 'w', NULL, 1, NULL, '{}'`: "claims_finished_with_outcome",
		`'build', 1, 'w', 1, 1, now(), '{}'`:   "claims_finished_has_no_holder",
	} {
		_, err := d.Pool.Exec(t.Context(), `INSERT INTO mm_orchestrator.claims
			(run_id, task_id, token, started_at, step, attempt, worker, holder, starts, finished_at, outcome)
			VALUES (gen_random_uuid(), 't', 1, now(), `+values+`)`)
		if err == nil || !strings.Contains(err.Error(), constraint) {
			t.Errorf("%s: %v, want %s", values, err, constraint)
		}
	}
}

func TestTwoMigrationsAtOnce(t *testing.T) {
	t.Parallel()
	d := storetest.Empty(t)
	var group sync.WaitGroup
	var mu sync.Mutex
	steps := 0
	for range 4 {
		s := d.Open(t)
		group.Go(func() {
			report, err := s.Migrate(t.Context(), everything)
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			steps += len(report.Steps)
		})
	}
	group.Wait()
	if steps != 9+versions(t) {
		t.Errorf("%d steps in all, want those of one migration", steps)
	}
}

// TestSharedTablesThatExist: equal ones are left alone, different ones are
// told difference by difference, and nothing is changed.
func TestSharedTablesThatExist(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		change string
		want   []string
	}{
		{`SELECT 1`, nil},
		{`CREATE INDEX mine ON orchestrator_runs (queued_at)`, nil},
		{`ALTER TABLE orchestrator_runs ALTER COLUMN priority DROP DEFAULT`,
			[]string{"table orchestrator_runs: column priority is orchestratorrunpriority NOT NULL, expected orchestratorrunpriority NOT NULL DEFAULT 'normal'::orchestratorrunpriority"}},
		{`ALTER TABLE orchestrator_runs ALTER COLUMN target_service TYPE varchar(100), ALTER COLUMN instruction DROP NOT NULL, ADD COLUMN owner text`,
			[]string{
				"table orchestrator_runs: column instruction is text, expected text NOT NULL",
				"table orchestrator_runs: column owner is not expected: text",
				"table orchestrator_runs: column target_service is character varying(100) NOT NULL, expected character varying(255) NOT NULL",
			}},
		{`ALTER TABLE orchestrator_runs DROP CONSTRAINT ck_orchestrator_runs_timestamps`,
			[]string{"table orchestrator_runs: constraint ck_orchestrator_runs_timestamps is missing, expected CHECK (((completed_at IS NULL) OR ((started_at IS NOT NULL) AND (completed_at >= started_at))))"}},
		{`ALTER TYPE orchestratorrunstatus ADD VALUE 'paused'`,
			[]string{"type orchestratorrunstatus is ENUM ('pending', 'running', 'awaiting_approval', 'succeeded', 'failed', 'rolled_back', 'paused'), expected ENUM ('pending', 'running', 'awaiting_approval', 'succeeded', 'failed', 'rolled_back')"}},
		{`DROP INDEX ix_spec_workflow_task_states_failed`,
			[]string{"table spec_workflow_task_states: index ix_spec_workflow_task_states_failed is missing, expected CREATE INDEX ix_spec_workflow_task_states_failed ON spec_workflow_task_states USING btree (workflow_run_id) WHERE (status = 'failed'::specworkflowtaskstatus)"}},
		{`DROP TRIGGER trg_spec_workflow_runs_updated_at ON spec_workflow_runs`,
			[]string{"table spec_workflow_runs: trigger trg_spec_workflow_runs_updated_at is missing, expected CREATE TRIGGER trg_spec_workflow_runs_updated_at BEFORE UPDATE ON spec_workflow_runs FOR EACH ROW EXECUTE FUNCTION spec_workflow_set_updated_at()"}},
		{`DROP TABLE workflow_artifacts`, []string{"table workflow_artifacts is missing, expected a table", "type workflowartifacttype is missing, expected ENUM ('codex_logs', 'codex_patch', 'gh_push_log', 'gh_pr_response', 'apply_output', 'pr_payload', 'retry_context')"}},
	} {
		t.Run(c.change, func(t *testing.T) {
			t.Parallel()
			d := storetest.Empty(t)
			s := d.Open(t)
			migrate(t, s, store.MigrateOptions{SharedTables: true})
			if _, err := s.RemoveOwnSchema(t.Context(), false); err != nil {
				t.Fatal(err)
			}
			if _, err := d.Pool.Exec(t.Context(), c.change); err != nil {
				t.Fatal(err)
			}
			_, err := s.Migrate(t.Context(), everything)
			var difference *store.SchemaDifference
			if errors.As(err, &difference) {
				equal(t, "differences", difference.Lines, c.want)
			}
			if (difference != nil) != (c.want != nil) || (err != nil) != (c.want != nil) {
				t.Fatalf("%v, want %q", err, c.want)
			}
			made := len(d.Rows(t, `SELECT 1 FROM pg_namespace WHERE nspname LIKE 'mm%'`))
			if (made == 0) != (c.want != nil) {
				t.Errorf("%d schemas made", made)
			}
		})
	}
}

// TestSharedTablesAreMoonMinds compares the tables that we make with a
// second description of them: the columns, by name and type.
func TestSharedTablesAreMoonMinds(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	rows := d.Rows(t, `SELECT (SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r') AS tables,
		(SELECT count(*) FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = a.attrelid
		 WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND a.attnum > 0) AS columns,
		(SELECT count(*) FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND contype <> 'n') AS constraints,
		(SELECT count(*) FROM pg_trigger AS t JOIN pg_class AS c ON c.oid = t.tgrelid
		 WHERE c.relnamespace = 'public'::regnamespace AND NOT t.tgisinternal) AS triggers,
		(SELECT count(*) FROM pg_type WHERE typnamespace = 'public'::regnamespace AND typtype = 'e') AS enums`)
	equal(t, "objects", rows, []storetest.Row{{"tables": 13, "columns": 135, "constraints": 43, "triggers": 4, "enums": 18}})

	type column struct {
		Name, Type, Nullable string
		Length               *int
	}
	type tables struct {
		Columns []column
		Indexes []string
	}
	type schema struct {
		Tasks tables `json:"celery_taskmeta"`
		Sets  tables `json:"celery_tasksetmeta"`
	}
	made := load[struct{ Schemas map[string]schema }](t, "celery_tables.json").Schemas["celery 5.7.0, result_extended=True"]
	want := map[string]tables{"celery_taskmeta": made.Tasks, "celery_tasksetmeta": made.Sets}
	for table := range want {
		var columns []column
		for _, row := range d.Rows(t, `SELECT column_name, data_type, is_nullable, character_maximum_length AS length
			FROM information_schema.columns WHERE table_name = $1 ORDER BY ordinal_position`, table) {
			c := column{Name: row["column_name"].(string), Type: row["data_type"].(string), Nullable: row["is_nullable"].(string)}
			if length, ok := row["length"].(float64); ok {
				n := int(length)
				c.Length = &n
			}
			columns = append(columns, c)
		}
		equal(t, table, columns, want[table].Columns)
		var indexes []string
		for _, row := range d.Rows(t, `SELECT indexdef FROM pg_indexes WHERE tablename = $1 ORDER BY indexname`, table) {
			indexes = append(indexes, row["indexdef"].(string))
		}
		slices.Sort(indexes)
		wanted := slices.Sorted(slices.Values(want[table].Indexes))
		equal(t, table, indexes, wanted)
	}
}

// TestRoleThatOwnsNothing: what it may not do is left to the owner, in words
// and SQL; the rest works.
func TestRoleThatOwnsNothing(t *testing.T) {
	t.Parallel()
	d := storetest.Empty(t)
	role := "mm_test_role_" + strings.TrimPrefix(d.Pool.Config().ConnConfig.Database, "mm_test_")
	for _, statement := range []string{
		`CREATE TABLE celery_taskmeta (id integer PRIMARY KEY, task_id varchar(155) UNIQUE, status varchar(50), result bytea, date_done timestamp, traceback text)`,
		`CREATE TABLE celery_tasksetmeta (id integer PRIMARY KEY, taskset_id varchar(155) UNIQUE, result bytea, date_done timestamp)`,
		`CREATE SEQUENCE task_id_sequence`, `CREATE SEQUENCE taskset_id_sequence`,
		`CREATE ROLE ` + role + ` LOGIN PASSWORD 'open'`,
		`GRANT SELECT, INSERT, UPDATE ON celery_taskmeta TO ` + role, `GRANT USAGE ON SEQUENCE task_id_sequence TO ` + role,
	} {
		if _, err := d.Pool.Exec(t.Context(), statement); err != nil {
			t.Fatal(err)
		}
	}
	u, err := url.Parse(d.URL)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(role, "open")
	asRole := *d
	asRole.URL = u.String()
	s := asRole.Open(t)
	t.Cleanup(func() {
		s.Close()
		for _, statement := range []string{`DROP OWNED BY ` + role, `DROP ROLE ` + role} {
			if _, err := d.Pool.Exec(t.Context(), statement); err != nil {
				t.Log(err)
			}
		}
	})
	results := storetest.Results(t, s, "")
	report, err := results.EnsureTables(t.Context())
	want := `the owner must add the columns that Celery 5.7 needs to "celery_taskmeta": ALTER TABLE "celery_taskmeta" ADD COLUMN IF NOT EXISTS children bytea, ADD COLUMN IF NOT EXISTS stamps bytea`
	if err != nil || !slices.Equal(report.Lines(), []string{want}) {
		t.Errorf("%q, %v", report.Lines(), err)
	}
	save(t, results, success("a", "1"))
	if _, err := s.Migrate(t.Context(), store.MigrateOptions{}); !errors.Is(err, store.ErrRefused) {
		t.Errorf("%v, want ErrRefused", err)
	}
}
