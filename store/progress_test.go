package store_test

import (
	"errors"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// come is a progress of so many commands.
func come(commands, code int) store.Progress {
	return store.Progress{
		Commands: commands, Digest: "ab", ExitCode: code, LogSize: 17,
		EndedAt: time.Date(2026, 11, 20, 10, 0, commands, 123456000, time.UTC),
	}
}

func record(t *testing.T, s *store.Store, claim store.Claim, progress store.Progress) {
	t.Helper()
	if err := s.RecordProgress(t.Context(), claim, progress); err != nil {
		t.Fatal(err)
	}
}

func TestTheNextWorkerGetsTheProgress(t *testing.T) {
	t.Parallel()
	for name, leave := range map[string]func(*testing.T, *store.Store, store.Claim){
		"of one that died": func(_ *testing.T, s *store.Store, _ store.Claim) { s.Close() },
		"of one that stopped": func(t *testing.T, s *store.Store, claim store.Claim) {
			if err := s.ReleaseClaim(t.Context(), claim); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := storetest.New(t)
			run := d.Create(t, storetest.Seed{})
			first := d.Open(t, as("first", 0))
			start := begin(t, first, run, store.StepPatch, "t")
			if start.Progress != nil || start.PreviousWorker != "" {
				t.Errorf("a first start: %+v", start)
			}
			record(t, first, start.Claim, come(1, 0))
			record(t, first, start.Claim, come(2, 3))
			leave(t, first, start.Claim)

			second := d.Open(t, as("second", 0))
			for taken := false; !taken; {
				// Busy until the server has noticed.
				start, taken = decide(t, second, run, store.StepPatch, "t").(store.Start)
			}
			equal(t, "progress", start.Progress, come(2, 3))
			if start.PreviousWorker != "first" || start.Claim.Starts != 2 {
				t.Errorf("%+v", start)
			}
			// It is still there for a third one.
			if err := second.ReleaseClaim(t.Context(), start.Claim); err != nil {
				t.Fatal(err)
			}
			start = begin(t, second, run, store.StepPatch, "t")
			equal(t, "progress at the third start", start.Progress, come(2, 3))
		})
	}
}

func TestProgressIsFenced(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	slow := d.Open(t, as("slow", 0))
	claim := begin(t, slow, run, store.StepPatch, "t").Claim
	record(t, slow, claim, come(1, 0))
	// Its lock is lost for longer than the grace.
	d.Rows(t, `UPDATE mm_orchestrator.claims SET holder = 7 WHERE run_id = $1 RETURNING step`, run)
	successor := d.Open(t, as("successor", 0))
	taken := begin(t, successor, run, store.StepPatch, "t").Claim
	refused := func(what string, claim store.Claim) {
		t.Helper()
		if err := slow.RecordProgress(t.Context(), claim, come(9, 0)); !errors.Is(err, store.ErrClaimLost) {
			t.Errorf("%s: %v, want ErrClaimLost", what, err)
		}
		if _, err := slow.CheckClaim(t.Context(), claim); !errors.Is(err, store.ErrClaimLost) {
			t.Errorf("%s: check: %v, want ErrClaimLost", what, err)
		}
	}
	refused("taken over", claim)
	record(t, successor, taken, come(2, 0))
	if _, err := successor.CheckClaim(t.Context(), taken); err != nil {
		t.Errorf("the successor's claim: %v", err)
	}
	finish(t, successor, taken, good(store.StepPatch))
	refused("ended", taken)
	equal(t, "progress", d.Rows(t, `SELECT progress ->> 'commands' AS commands FROM mm_orchestrator.claims`), []storetest.Row{{"commands": "2"}})
}

// TestANewAttemptHasNoProgress: what is retried runs from its beginning.
func TestANewAttemptHasNoProgress(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	s := d.Open(t)
	fail := func(task string) {
		t.Helper()
		start := begin(t, s, run, store.StepAnalyze, task)
		if start.Progress != nil || start.PreviousWorker != "" {
			t.Errorf("%s: %+v", task, start)
		}
		record(t, s, start.Claim, come(1, 1))
		finish(t, s, start.Claim, bad(store.StepAnalyze))
	}
	rollBack := func(task string) {
		t.Helper()
		start := begin(t, s, run, store.StepRollback, task)
		if start.Progress != nil || start.PreviousWorker != "" || start.Claim.Attempt != 1 {
			t.Errorf("%s: %+v", task, start)
		}
		record(t, s, start.Claim, come(3, 0))
		finish(t, s, start.Claim, good(store.StepRollback))
	}
	fail("one")
	rollBack("rollback of one")
	d.Retry(t, run, store.StepAnalyze, "again")
	d.Rows(t, `UPDATE spec_workflow_task_states SET attempt = 1 WHERE orchestrator_run_id = $1 AND plan_step = 'rollback' RETURNING id`, run)
	fail("two")
	// The same attempt as before, which has ended: it begins again.
	rollBack("rollback of two")
}

// TestProgressIsDurable: not even a role that takes commits lightly makes a
// crash of the server run a command again.
func TestProgressIsDurable(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	if _, err := d.Pool.Exec(t.Context(), `DO $$ BEGIN
		EXECUTE format('ALTER DATABASE %I SET synchronous_commit = off', current_database()); END $$`); err != nil {
		t.Fatal(err)
	}
	run := d.Create(t, storetest.Seed{})
	s := d.Open(t)
	claim := begin(t, s, run, store.StepPatch, "t").Claim
	if _, err := d.Pool.Exec(t.Context(), `
		CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
			NEW.worker := current_setting('synchronous_commit'); RETURN NEW; END $$;
		CREATE TRIGGER note BEFORE UPDATE ON mm_orchestrator.claims FOR EACH ROW EXECUTE FUNCTION note()`); err != nil {
		t.Fatal(err)
	}
	record(t, s, claim, come(1, 0))
	equal(t, "setting", d.Rows(t, `SELECT worker FROM mm_orchestrator.claims`), []storetest.Row{{"worker": "on"}})
}
