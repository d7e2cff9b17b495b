package store_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// remade is a database whose schema the test makes anew: its workers have the
// owner's role, as a new schema knows no grants.
func remade(t *testing.T) *storetest.Database {
	t.Helper()
	d := storetest.New(t)
	d.URL = d.OwnerURL
	return d
}

func dropOwnSchema(t *testing.T, d *storetest.Database) {
	t.Helper()
	if _, err := d.Pool.Exec(t.Context(), `DROP SCHEMA mm_orchestrator CASCADE`); err != nil {
		t.Fatal(err)
	}
}

func TestCheckOwnSchema(t *testing.T) {
	t.Parallel()
	d := remade(t)
	s := d.Open(t)
	check := func(want string) {
		t.Helper()
		err := s.CheckOwnSchema(t.Context())
		if want == "" && err != nil || want != "" && (!errors.Is(err, store.ErrSchema) || !strings.Contains(err.Error(), want)) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	check("")
	d.Rows(t, `INSERT INTO mm_orchestrator.schema_versions (version, name) VALUES (99, 'newer') RETURNING version`)
	check("") // a newer program has migrated; this one goes on
	d.Rows(t, `DELETE FROM mm_orchestrator.schema_versions WHERE version > 3 RETURNING version`)
	check("is of version 3, this program needs")
	if _, err := d.Pool.Exec(t.Context(), `DROP TABLE mm_orchestrator.claims`); err != nil {
		t.Fatal(err)
	}
	check("has no table claims")
	dropOwnSchema(t, d)
	check("has no schema mm_orchestrator: run `mm-orchestrator migrate`")
	migrate(t, s, store.MigrateOptions{})
	check("")
}

// The schema is dropped and created again while a step runs. The step goes on under its
// claim and is recorded once, and its run holds the workspace.
func TestAClaimSurvivesItsSchema(t *testing.T) {
	t.Parallel()
	progress := store.Progress{Commands: 1, Digest: "d", EndedAt: time.Now()}
	for _, first := range []string{"finish", "check", "progress"} {
		t.Run(first, func(t *testing.T) {
			t.Parallel()
			d := remade(t)
			s, other := d.Open(t), d.Open(t, as("other", 0))
			run, waiting := d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{})
			claim := starts(t, s, shared("w", run, store.StepAnalyze, "1"))
			dropOwnSchema(t, d)
			if _, err := s.FinishStep(t.Context(), claim, good(store.StepAnalyze)); !errors.Is(err, store.ErrSchema) || !strings.Contains(err.Error(), "run `mm-orchestrator migrate`") {
				t.Errorf("finish without the schema: %v", err)
			}
			if _, err := s.CheckClaim(t.Context(), claim); !errors.Is(err, store.ErrSchema) {
				t.Errorf("claim without the schema: %v", err)
			}
			migrate(t, s, store.MigrateOptions{})
			switch first {
			case "check":
				if _, err := s.CheckClaim(t.Context(), claim); err != nil {
					t.Error(err)
				}
			case "progress":
				if err := s.RecordProgress(t.Context(), claim, progress); err != nil {
					t.Error(err)
				}
			}
			if first != "finish" {
				waits(t, other, shared("w", waiting, store.StepAnalyze, "2"), store.ParkedWorkspace)
				waits(t, other, shared("w", run, store.StepAnalyze, "1"), store.ParkedBusy)
			}
			finish(t, s, claim, good(store.StepAnalyze))
			if rows := d.Rows(t, `SELECT outcome->>'status' AS status, starts FROM mm_orchestrator.claims`); len(rows) != 1 || rows[0]["status"] != "succeeded" || rows[0]["starts"] != 1.0 {
				t.Errorf("claims %v", rows)
			}
			if _, done := ask(t, other, shared("w", run, store.StepAnalyze, "1")).(store.Done); !done {
				t.Error("the step's message is not answered with its end")
			}
		})
	}
}

// A claim that another worker has taken meanwhile is not restored.
func TestAClaimIsNotRestoredAgainstOthers(t *testing.T) {
	t.Parallel()
	for name, meanwhile := range map[string]func(t *testing.T, d *storetest.Database, run string){
		"another worker has begun it": func(t *testing.T, d *storetest.Database, run string) {
			starts(t, d.Open(t, as("other", 0)), shared("w", run, store.StepAnalyze, "1"))
		},
		"the API has retried it": func(t *testing.T, d *storetest.Database, run string) {
			d.Rows(t, `INSERT INTO spec_workflow_task_states (id, orchestrator_run_id, plan_step, attempt, task_name, status, plan_step_status)
				VALUES (gen_random_uuid(), $1, 'analyze', 2, 'analyze', 'queued', 'pending') RETURNING id`, run)
		},
		"somebody has ended it": func(t *testing.T, d *storetest.Database, run string) {
			d.Rows(t, `UPDATE spec_workflow_task_states SET plan_step_status = 'failed' WHERE orchestrator_run_id = $1 AND plan_step = 'analyze' RETURNING id`, run)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := remade(t)
			s := d.Open(t)
			run := d.Create(t, storetest.Seed{})
			claim := starts(t, s, shared("w", run, store.StepAnalyze, "1"))
			dropOwnSchema(t, d)
			migrate(t, s, store.MigrateOptions{})
			meanwhile(t, d, run)
			if _, err := s.CheckClaim(t.Context(), claim); !errors.Is(err, store.ErrClaimLost) {
				t.Errorf("check: %v", err)
			}
			if _, err := s.FinishStep(t.Context(), claim, good(store.StepAnalyze)); !errors.Is(err, store.ErrClaimLost) {
				t.Errorf("finish: %v", err)
			}
		})
	}
}
