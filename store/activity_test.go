package store_test

import (
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// ListRuns and FindRunDetail show which worker runs a step, and which run waits for
// which, at which place.
func TestWhatRunsDo(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	one, reader := d.Open(t, as("one", 0)), d.Open(t)
	holder, ended := d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{})
	late, urgent, idle := d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{Priority: "high"}), d.Create(t, storetest.Seed{})
	look := func() map[string]store.Activity {
		t.Helper()
		runs, err := reader.ListRuns(t.Context(), store.RunFilter{})
		if err != nil || len(runs) != 5 {
			t.Fatalf("%d runs, %v", len(runs), err)
		}
		does := map[string]store.Activity{}
		for _, run := range runs {
			does[run.ID] = run.Activity
			detail, err := reader.FindRunDetail(t.Context(), run.ID)
			if err != nil {
				t.Fatal(err)
			}
			equal(t, "detail of run "+run.ID, detail.Activity, run.Activity)
		}
		return does
	}
	recent := func(at time.Time) {
		t.Helper()
		if ago := time.Since(at); ago < -time.Minute || ago > time.Minute || at.Location() != time.UTC {
			t.Errorf("since %v", at)
		}
	}

	claim := starts(t, one, shared("w", holder, store.StepAnalyze, "1a"))
	for _, run := range []string{ended, late, urgent} {
		waits(t, one, shared("w", run, store.StepAnalyze, run), store.ParkedWorkspace)
	}
	d.Rows(t, `UPDATE orchestrator_runs SET status = 'failed', started_at = now(), completed_at = now() WHERE id = '`+ended+`' RETURNING id`)
	does := look()
	if w := does[holder].Working; w == nil || w.Step != store.StepAnalyze || w.Attempt != 1 || w.Worker != "one" || !w.Alive || w.Starts != 1 {
		t.Fatalf("the holder does %+v", w)
	}
	recent(does[holder].Working.Since)
	for run, place := range map[string]int{urgent: 1, late: 2} {
		w := does[run].Waiting
		if w == nil || does[run].Working != nil || w.Step != store.StepAnalyze || w.Holder != holder || w.Workspace != "w" || w.Place != place {
			t.Fatalf("the run that waits does %+v, want place %d", w, place)
		}
		recent(w.Since)
	}
	for name, run := range map[string]string{"ended": ended, "idle": idle} {
		equal(t, name, does[run], store.Activity{})
	}

	// Between two steps it does nothing, and neither does one whose turn has come.
	finish(t, one, claim, good(store.StepAnalyze))
	equal(t, "the holder between two steps", look()[holder], store.Activity{})
	// Its worker dies.
	starts(t, one, shared("w", holder, store.StepPatch, "1b"))
	one.Close()
	// The server may take a moment to end its session.
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		detail, err := reader.FindRunDetail(t.Context(), holder)
		if err != nil {
			t.Fatal(err)
		}
		if w := detail.Working; w != nil && !w.Alive {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the dead worker's step: %+v", detail.Working)
		}
	}
	if w := look()[holder].Working; w == nil || w.Alive {
		t.Errorf("the dead worker's step: %+v", w)
	}
}
