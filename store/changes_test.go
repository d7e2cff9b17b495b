package store_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

func changes(t *testing.T, s *store.Store, filter store.ChangeFilter) []store.Change {
	t.Helper()
	list, err := s.ListChanges(t.Context(), filter)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// endedRun is a run whose patch we ran, recorded and failed, and that was rolled
// back so long ago.
func endedRun(t *testing.T, d *storetest.Database, s *store.Store, ago string) string {
	t.Helper()
	run := d.Create(t, storetest.Seed{})
	claim := begin(t, s, run, store.StepPatch, "p"+run).Claim
	recordChange(t, s, claim, `{"run":"`+run+`"}`)
	finish(t, s, claim, bad(store.StepPatch))
	finish(t, s, begin(t, s, run, store.StepRollback, "r"+run).Claim, good(store.StepRollback))
	d.Rows(t, `UPDATE mm_orchestrator.changes SET created_at = created_at - $2::interval, updated_at = updated_at - $2::interval WHERE run_id = $1 RETURNING run_id`, run, ago)
	d.Rows(t, `UPDATE orchestrator_runs SET started_at = started_at - $2::interval, completed_at = completed_at - $2::interval WHERE id = $1 RETURNING id`, run, ago)
	return run
}

func TestChangesOfRunsThatAreOver(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	week := store.ChangeFilter{Queue: "q", Over: true, Age: 7 * 24 * time.Hour, NotReduced: true}
	old := endedRun(t, d, s, "8 days")
	young := endedRun(t, d, s, "6 days")
	deleted := endedRun(t, d, s, "9 days")
	d.Rows(t, `DELETE FROM orchestrator_runs WHERE id = $1 RETURNING id`, deleted)
	retried := endedRun(t, d, s, "10 days")
	d.Retry(t, retried, store.StepPatch, "again")
	running := endedRun(t, d, s, "11 days")
	d.Retry(t, running, store.StepPatch, "again")
	d.Rows(t, `UPDATE mm_orchestrator.changes SET updated_at = created_at WHERE run_id = $1 RETURNING run_id`, running)
	claim := begin(t, s, running, store.StepPatch, "again").Claim
	d.Rows(t, `UPDATE mm_orchestrator.changes SET updated_at = created_at WHERE run_id = $1 RETURNING run_id`, running)
	elsewhere := endedRun(t, d, s, "12 days")
	d.Rows(t, `UPDATE mm_orchestrator.changes SET queue = 'other' WHERE run_id = $1 RETURNING run_id`, elsewhere)
	ids := func(filter store.ChangeFilter) (ids []string) {
		for _, c := range changes(t, s, filter) {
			ids = append(ids, c.RunID)
		}
		return ids
	}
	equal(t, "over for a week", ids(week), []string{deleted, old})
	equal(t, "all", ids(store.ChangeFilter{}), []string{elsewhere, running, retried, deleted, old, young})
	equal(t, "one", ids(store.ChangeFilter{RunID: young}), []string{young})
	equal(t, "two", ids(store.ChangeFilter{Limit: 2}), []string{elsewhere, running})
	// A plan that ends before verify: the run stays running, and gives its
	// workspace up.
	outcome := good(store.StepPatch)
	outcome.NothingFollows = true
	finish(t, s, claim, outcome)
	d.Rows(t, `UPDATE orchestrator_runs SET updated_at = now() - interval '8 days' WHERE id = $1 RETURNING id`, running)
	equal(t, "over for a week", ids(week), []string{running, deleted, old})

	found := changes(t, s, store.ChangeFilter{RunID: old})[0]
	if string(found.Record) != `{"run":"`+old+`"}` || !found.Over || found.Reduced || found.RunStatus != store.RunRolledBack || found.TargetService != "api" ||
		found.Queue != "q" || found.Workspace != "q:/"+old || time.Since(found.LastAt) < 7*24*time.Hour {
		t.Errorf("%+v", found)
	}
	if found := changes(t, s, store.ChangeFilter{RunID: deleted})[0]; found.RunStatus != "" || !found.Over {
		t.Errorf("%+v", found)
	}
	if _, err := s.ListChanges(t.Context(), store.ChangeFilter{RunID: "x"}); !errors.Is(err, store.ErrInvalid) {
		t.Error(err)
	}
}

func TestRemoveChange(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	run := endedRun(t, d, s, "8 days")
	filter := store.ChangeFilter{RunID: run, Over: true, Age: time.Hour}
	if err := s.RemoveChange(t.Context(), filter, func(_ context.Context, c store.Change) (json.RawMessage, error) {
		return nil, fmt.Errorf("no engine for %s", c.Record)
	}); err == nil || err.Error() != `no engine for {"run":"`+run+`"}` {
		t.Errorf("%v", err)
	}
	equal(t, "changes after an error", len(changes(t, s, filter)), 1)
	// What is left is not offered again.
	if err := s.RemoveChange(t.Context(), filter, func(context.Context, store.Change) (json.RawMessage, error) {
		return json.RawMessage(`{"left":1}`), nil
	}); err != nil {
		t.Fatal(err)
	}
	reduced := changes(t, s, filter)
	if len(reduced) != 1 || !reduced[0].Reduced || string(reduced[0].Record) != `{"left":1}` {
		t.Errorf("%+v", reduced)
	}
	filter.NotReduced = true
	never := func(context.Context, store.Change) (json.RawMessage, error) {
		t.Error("remove was called")
		return nil, nil
	}
	if err := s.RemoveChange(t.Context(), filter, never); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("reduced: %v", err)
	}
	filter.NotReduced = false
	if err := s.RemoveChange(t.Context(), filter, func(context.Context, store.Change) (json.RawMessage, error) { return nil, nil }); err != nil {
		t.Fatal(err)
	}
	equal(t, "changes", len(changes(t, s, store.ChangeFilter{})), 0)
	if err := s.RemoveChange(t.Context(), filter, never); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("removed: %v", err)
	}
	young := endedRun(t, d, s, "1 minute")
	if err := s.RemoveChange(t.Context(), store.ChangeFilter{RunID: young, Over: true, Age: time.Hour}, never); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("young: %v", err)
	}
	if err := s.RemoveChange(t.Context(), store.ChangeFilter{}, never); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("no run: %v", err)
	}
}

// TestRemoveChangeIsAlone: neither a second removal nor a step of the run comes
// between.
func TestRemoveChangeIsAlone(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s, other := d.Open(t), d.Open(t, as("other", 0))
	run := endedRun(t, d, s, "8 days")
	d.Retry(t, run, store.StepPatch, "again")
	filter := store.ChangeFilter{RunID: run}
	var begun chan store.Decision
	if err := s.RemoveChange(t.Context(), filter, func(ctx context.Context, _ store.Change) (json.RawMessage, error) {
		if err := other.RemoveChange(ctx, filter, func(context.Context, store.Change) (json.RawMessage, error) { return nil, nil }); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("a second removal: %v", err)
		}
		begun = make(chan store.Decision)
		go func() { begun <- decide(t, other, run, store.StepPatch, "again") }()
		eventually(t, func() error {
			if len(d.Rows(t, `SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`)) == 0 {
				return errors.New("the step does not wait for the lock")
			}
			return nil
		})
		return nil, nil
	}); err != nil {
		t.Fatal(err)
	}
	start, ok := (<-begun).(store.Start)
	if !ok || start.Change.Record != nil {
		t.Errorf("the step begins with %+v", start)
	}
	equal(t, "changes", len(changes(t, s, filter)), 1)
}

// TestRemoveChangeThatTakesTooLong: the record stays.
func TestRemoveChangeThatTakesTooLong(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := endedRun(t, d, d.Open(t), "8 days")
	s := d.Open(t, as("slow", 0), func(c *store.Config) { c.TryTimeout = 200 * time.Millisecond })
	err := s.RemoveChange(t.Context(), store.ChangeFilter{RunID: run}, func(ctx context.Context, _ store.Change) (json.RawMessage, error) {
		<-ctx.Done()
		return nil, context.Cause(ctx)
	})
	if err == nil || err.Error() != "removing the change of run "+run+" took longer than 200ms" {
		t.Errorf("%v", err)
	}
	equal(t, "changes", len(changes(t, s, store.ChangeFilter{})), 1)
}
