package store_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

func pauseQueue(t testing.TB, s *store.Store, mode store.PauseMode, reason string) store.Pause {
	t.Helper()
	pause, _, err := s.PauseQueue(t.Context(), store.Pause{Queue: "q", Mode: mode, Reason: reason, By: "ops@box"})
	if err != nil {
		t.Fatal(err)
	}
	return pause
}

func resumeQueue(t testing.TB, s *store.Store) *store.Pause {
	t.Helper()
	pause, err := s.ResumeQueue(t.Context(), "q", "lead@box")
	if err != nil {
		t.Fatal(err)
	}
	return pause
}

// While a queue is paused no new run begins, on any worker, and a run that has begun
// goes on to its end. The end of the pause makes the others ready in the order of
// their turns.
func TestPauseLetsRunsFinish(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	one, two := d.Open(t, as("one", 0)), d.Open(t, as("two", 0))
	begun := d.Create(t, storetest.Seed{})
	finish(t, one, starts(t, one, shared("w", begun, store.StepAnalyze, "b-analyze")), good(store.StepAnalyze))
	pauseQueue(t, one, store.PauseFinish, "upgrade of the database")

	normal, other, high := d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{Priority: "high"})
	parked := waits(t, two, shared("w2", normal, store.StepAnalyze, "normal"), store.ParkedPaused)
	for _, word := range []string{"queue q is paused since 2", "by ops@box", "upgrade of the database"} {
		if !strings.Contains(parked.Reason, word) {
			t.Errorf("reason %q lacks %q", parked.Reason, word)
		}
	}
	waits(t, one, shared("w3", high, store.StepAnalyze, "high"), store.ParkedPaused)
	waits(t, one, shared("w", other, store.StepAnalyze, "other"), store.ParkedPaused)
	equal(t, "status", d.Run(t, normal)["status"], "pending")
	if ids := taken(t, one, "q"); ids != "" {
		t.Errorf("published during the pause: %s", ids)
	}
	starts(t, two, func() store.BeginRequest {
		r := shared("w4", d.Create(t, storetest.Seed{}), store.StepAnalyze, "elsewhere")
		r.Queue = "another queue"
		return r
	}())

	for _, step := range toVerify[1:] {
		finish(t, two, starts(t, two, shared("w", begun, step, "b-"+string(step))), good(step))
	}
	equal(t, "status", d.Run(t, begun)["status"], "succeeded")
	if ids := taken(t, one, "q"); ids != "" {
		t.Errorf("published during the pause: %s", ids)
	}
	ended := resumeQueue(t, two)
	if ended == nil || ended.ResumedBy != "lead@box" || ended.By != "ops@box" || ended.ResumedAt == nil {
		t.Errorf("ended %+v", ended)
	}
	equal(t, "published", taken(t, one, "q"), "high normal other")
	starts(t, one, shared("w2", normal, store.StepAnalyze, "normal"))
	if again := resumeQueue(t, two); again != nil {
		t.Errorf("resumed twice: %+v", again)
	}
}

// Under the mode park, a run that has begun waits before its next step and keeps its
// workspace; a step that had begun is taken over, and a rollback never waits.
func TestPauseParksRunsBetweenSteps(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	run, next := d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{Priority: "high"})
	claim := starts(t, s, shared("w", run, store.StepAnalyze, "analyze"))
	stopped := d.Create(t, storetest.Seed{})
	if err := s.ReleaseClaim(t.Context(), starts(t, s, shared("w2", stopped, store.StepAnalyze, "stopped"))); err != nil {
		t.Fatal(err)
	}
	pauseQueue(t, s, store.PausePark, "x")
	finish(t, s, claim, good(store.StepAnalyze))
	waits(t, s, shared("w", run, store.StepPatch, "patch"), store.ParkedPaused)
	waits(t, s, shared("w", run, store.StepPatch, "patch"), store.ParkedPaused) // delivered again
	waits(t, s, shared("w", next, store.StepAnalyze, "next"), store.ParkedPaused)
	equal(t, "audit", d.Rows(t, `SELECT run_id, record::json ->> 'step' AS step, record::json ->> 'by' AS by FROM mm_orchestrator.audit WHERE record::json ->> 'kind' = 'paused'`),
		[]storetest.Row{{"run_id": run, "step": "patch", "by": "ops@box"}})
	again := starts(t, s, shared("w2", stopped, store.StepAnalyze, "stopped"))
	equal(t, "starts", again.Starts, 2)

	detail, err := s.FindRunDetail(t.Context(), run)
	if err != nil {
		t.Fatal(err)
	}
	if p := detail.Activity.Paused; p == nil || p.Step != store.StepPatch || p.Queue != "q" || p.Keeps != "w" || detail.Activity.Waiting != nil {
		t.Errorf("activity %+v", detail.Activity)
	}
	detail, err = s.FindRunDetail(t.Context(), next)
	if err != nil {
		t.Fatal(err)
	}
	if p := detail.Activity.Paused; p == nil || p.Keeps != "" || detail.Activity.Waiting == nil || detail.Activity.Waiting.Holder != run {
		t.Errorf("activity %+v", detail.Activity)
	}
	// A sweep does not take the run for lost.
	states, err := s.ListWorkspaces(t.Context(), "q", nil)
	if err != nil || len(states) != 2 || states[0].RunID != run || !states[0].Parked || states[0].Blocked {
		t.Errorf("workspaces %+v, %v", states, err)
	}
	lost, err := s.FailLost(t.Context(), store.Suspect{Workspace: "w", Queue: "q", RunID: run, Version: states[0].Version}, nil)
	if err != nil || lost != nil {
		t.Errorf("a paused run was lost: %+v, %v", lost, err)
	}

	failed := finish(t, s, again, bad(store.StepAnalyze))
	equal(t, "status", failed.Status, store.RunFailed)
	starts(t, s, shared("w2", stopped, store.StepRollback, "rollback"))
	if ids := taken(t, s, "q"); ids != "" {
		t.Errorf("published during the pause: %s", ids)
	}
	resumeQueue(t, s)
	equal(t, "published", taken(t, s, "q"), "patch")
	starts(t, s, shared("w", run, store.StepPatch, "patch"))
	records := goodTrail(t, s, run, audit.RunStarted, audit.StepStarted, audit.StepEnded, audit.Paused, audit.Resumed, audit.StepStarted)
	if r := records[4]; r.By != "lead@box" || r.Step != "patch" || !strings.HasPrefix(r.Text, "the pause of queue q has ended, which began at 2") {
		t.Errorf("resumed: %+v", r)
	}
	// A run that the pause has not stopped has no such record.
	goodTrail(t, s, stopped, audit.RunStarted, audit.StepStarted, audit.StepStarted, audit.StepEnded, audit.StepStarted)
}

// What must not wait for the end of a pause, and what does.
func TestWhoWaitsForThePause(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	failed := d.Create(t, storetest.Seed{})
	finish(t, s, starts(t, s, shared("failed", failed, store.StepAnalyze, "f")), bad(store.StepAnalyze))
	early := d.Create(t, storetest.Seed{})
	pass(t, s, early, "early", store.StepAnalyze)
	finish(t, s, begin(t, s, early, store.StepPatch, "early-patch").Claim, bad(store.StepPatch))
	done := d.Create(t, storetest.Seed{})
	claim := starts(t, s, shared("done", done, store.StepAnalyze, "d"))
	finish(t, s, claim, good(store.StepAnalyze))
	revoked := d.Create(t, storetest.Seed{})
	finish(t, s, starts(t, s, shared("revoked", revoked, store.StepAnalyze, "r")), good(store.StepAnalyze))
	approved := d.Create(t, storetest.Seed{})
	finish(t, s, starts(t, s, shared("approved", approved, store.StepAnalyze, "a")), good(store.StepAnalyze))
	d.Approve(t, approved) // as after the pause before verify: pending, started_at NULL
	granted := d.Create(t, storetest.Seed{})
	d.Rows(t, `INSERT INTO mm_orchestrator.holds (workspace, queue, run_id) VALUES ('granted', 'q', $1) RETURNING queue`, granted)
	pauseQueue(t, s, store.PauseFinish, "x")

	// A message that was handled is answered, and a rollback runs.
	if _, is := ask(t, s, shared("done", done, store.StepAnalyze, "d")).(store.Done); !is {
		t.Error("a step that has ended is not answered")
	}
	rollback := starts(t, s, shared("failed", failed, store.StepRollback, "f-rollback"))
	finish(t, s, rollback, good(store.StepRollback))
	// Retried after its end: a new run. Retried before its end, or approved between
	// two steps: it has begun.
	d.Retry(t, failed, store.StepAnalyze, "")
	waits(t, s, shared("failed", failed, store.StepAnalyze, "f-again"), store.ParkedPaused)
	d.Retry(t, early, store.StepPatch, "")
	starts(t, s, alone(early, store.StepPatch, "early-again"))
	starts(t, s, shared("approved", approved, store.StepPatch, "a-patch"))
	// A run that has not begun keeps no workspace, which a rollback might need.
	waits(t, s, shared("granted", granted, store.StepAnalyze, "g"), store.ParkedPaused)
	if rows := d.Rows(t, `SELECT run_id FROM mm_orchestrator.holds WHERE workspace = 'granted'`); rows[0]["run_id"] != nil {
		t.Errorf("holds %v", rows)
	}
	// A run that was revoked between two steps fails at its next step.
	pauseQueue(t, s, store.PausePark, "x")
	waits(t, s, shared("revoked", revoked, store.StepPatch, "r-patch"), store.ParkedPaused)
	if _, err := s.RevokeRun(t.Context(), store.Revocation{RunID: revoked, Reason: "no"}); err != nil {
		t.Fatal(err)
	}
	equal(t, "published", taken(t, s, "q"), "r-patch")
	if start := ask(t, s, shared("revoked", revoked, store.StepPatch, "r-patch")).(store.Start); start.Revocation == nil {
		t.Error("the step does not know that its run was revoked")
	}
	// The messages of a run that has ended or was deleted have no effect.
	deleted := d.Create(t, storetest.Seed{})
	waits(t, s, shared("deleted", deleted, store.StepAnalyze, "gone"), store.ParkedPaused)
	d.Rows(t, `DELETE FROM orchestrator_runs WHERE id = $1 RETURNING id`, deleted)
	equal(t, "published", taken(t, s, "q"), "gone")
}

// A second pause keeps who began and when. The history is kept.
func TestPauseIsChangedAndKept(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	if p, err := s.FindPause(t.Context(), "q"); p != nil || err != nil {
		t.Errorf("%+v, %v", p, err)
	}
	first := pauseQueue(t, s, store.PauseFinish, "one")
	second, already, err := s.PauseQueue(t.Context(), store.Pause{Queue: "q", Mode: store.PausePark, Reason: " two ", By: "lead@box"})
	if err != nil || !already || !second.Since.Equal(first.Since) || second.By != "ops@box" || second.Reason != "two" || second.Mode != store.PausePark || second.ChangedBy != "lead@box" || second.ChangedAt == nil {
		t.Errorf("%+v, %v, %v", second, already, err)
	}
	if p, err := s.FindPause(t.Context(), "q"); err != nil || p == nil || p.Reason != "two" {
		t.Errorf("%+v, %v", p, err)
	}
	resumeQueue(t, s)
	pauseQueue(t, s, store.PauseFinish, "three")
	list, err := s.ListPauses(t.Context(), store.PauseFilter{Queue: "q", Ended: true})
	if err != nil || len(list) != 2 || list[0].Reason != "three" || list[1].Reason != "two" || list[1].ResumedBy != "lead@box" {
		t.Errorf("%+v, %v", list, err)
	}
	open, err := s.ListPauses(t.Context(), store.PauseFilter{})
	if err != nil || len(open) != 1 || open[0].Reason != "three" {
		t.Errorf("%+v, %v", open, err)
	}
	for _, bad := range []store.Pause{{Queue: "q", Mode: store.PauseFinish, Reason: " "}, {Mode: store.PauseFinish, Reason: "x"}, {Queue: "q", Reason: "x"}} {
		if _, _, err := s.PauseQueue(t.Context(), bad); err == nil {
			t.Errorf("%+v is accepted", bad)
		}
	}
}

// Whatever workers and operators do at the same time: after the last resume, nothing
// stays parked whose turn has come, with no help from a sweep.
func TestResumeFindsAllThatWasParked(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	one, two := d.Open(t, as("one", 0)), d.Open(t, as("two", 0))
	for round := range 10 {
		var requests []store.BeginRequest
		for i := range 6 {
			name := fmt.Sprint(round, "-", i)
			requests = append(requests, shared("w"+name, d.Create(t, storetest.Seed{}), store.StepAnalyze, name))
		}
		pauseQueue(t, one, store.PauseFinish, "x")
		var group sync.WaitGroup
		parked := make([]bool, len(requests))
		for i, request := range requests {
			group.Go(func() {
				s := []*store.Store{one, two}[i%2]
				decision, err := s.BeginStep(t.Context(), request)
				if err != nil {
					t.Error(err)
				}
				_, parked[i] = decision.(store.Parked)
			})
		}
		if _, err := two.ResumeQueue(t.Context(), "q", ""); err != nil {
			t.Error(err)
		}
		// What had begun to be parked before the resume, the resume has waited for.
		seen := map[string]bool{}
		for _, m := range take(t, two, "q") {
			seen[m.TaskID] = true
			if err := two.DropParked(t.Context(), m.ID); err != nil {
				t.Error(err)
			}
		}
		group.Wait()
		if t.Failed() {
			return
		}
		for i, request := range requests {
			if parked[i] != seen[request.TaskID] {
				t.Errorf("%s: parked %t, published by the resume %t", request.TaskID, parked[i], seen[request.TaskID])
			}
		}
	}
}
