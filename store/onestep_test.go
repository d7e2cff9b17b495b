package store_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// retriedDuringRollback makes a run whose build has failed, begins its rollback
// with s and lets the API retry the run from patch. again asks for the retry's
// patch, rollback for the rollback's message that is delivered again.
func retriedDuringRollback(t *testing.T, d *storetest.Database, s *store.Store) (run string, claim store.Claim, again, rollback store.BeginRequest) {
	t.Helper()
	run = d.Create(t, storetest.Seed{})
	finish(t, s, starts(t, s, shared("w", run, store.StepBuild, "build")), bad(store.StepBuild))
	rollback = shared("w", run, store.StepRollback, "rollback")
	claim = starts(t, s, rollback)
	d.Retry(t, run, store.StepPatch, "now with credentials")
	again = shared("w", run, store.StepPatch, "again")
	again.RootTaskID = "again"
	return run, claim, again, rollback
}

// TestRetryWaitsForTheRollback: the API retries a failed run whose rollback
// runs. The retry begins when that has ended, and nothing of the rollback's end
// is written over it.
func TestRetryWaitsForTheRollback(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		// leaves: the API does not give the rollback a new attempt.
		leaves bool
		ends   store.Outcome
	}{
		{"with a new attempt of the rollback", false, good(store.StepRollback)},
		{"without", true, good(store.StepRollback)},
		{"without, and it fails", true, bad(store.StepRollback)},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			d := storetest.New(t)
			one, two := d.Open(t, as("one", 0)), d.Open(t, as("two", 0))
			run, claim, again, rollback := retriedDuringRollback(t, d, one)
			if c.leaves {
				d.Rows(t, `UPDATE spec_workflow_task_states SET attempt = 1, plan_step_status = 'in_progress' WHERE orchestrator_run_id = $1 AND plan_step = 'rollback' RETURNING id`, run)
			}
			for _, s := range []*store.Store{one, two} {
				if parked := waits(t, s, again, store.ParkedBusy); !strings.Contains(parked.Reason, "worker one runs step rollback of this run since") {
					t.Errorf("reason %q", parked.Reason)
				}
				if ids := taken(t, s, "q"); ids != "" {
					t.Errorf("published while the rollback runs: %s", ids)
				}
			}
			waits(t, two, rollback, store.ParkedBusy)
			detail, err := two.FindRunDetail(t.Context(), run)
			if err != nil {
				t.Fatal(err)
			}
			if b := detail.WaitingForStep; b == nil || b.Step != store.StepPatch || time.Since(b.Since) > time.Minute || b.For.Step != store.StepRollback || b.For.Worker != "one" || !b.For.Alive {
				t.Errorf("the run does %+v", detail.Activity)
			}
			retried := d.Run(t, run)
			if c.leaves {
				if f := finish(t, one, claim, c.ends); f.Status != store.RunPending || f.RunEnded || !f.ParkedReady {
					t.Errorf("finished %+v", f)
				}
				equal(t, "its state", d.State(t, run, store.StepRollback)["plan_step_status"], string(c.ends.Status))
			} else {
				states := d.States(t, run)
				if _, err := one.FinishStep(t.Context(), claim, c.ends); !errors.Is(err, store.ErrClaimLost) || !strings.Contains(err.Error(), "retried") {
					t.Errorf("%v, want ErrClaimLost", err)
				}
				equal(t, "states", d.States(t, run), states)
			}
			for _, column := range []string{"status", "started_at", "completed_at", "artifact_root"} {
				equal(t, column, d.Run(t, run)[column], retried[column])
			}
			equal(t, "the workspace's run", d.Rows(t, `SELECT run_id FROM mm_orchestrator.holds`), []storetest.Row{{"run_id": run}})
			if detail, err := two.FindRunDetail(t.Context(), run); err != nil || detail.Activity != (store.Activity{}) {
				t.Errorf("after the rollback the run does %+v, %v", detail.Activity, err)
			}
			if ids := taken(t, two, "q"); ids != "again rollback" {
				t.Errorf("published after the rollback: %q", ids)
			}
			if got := ask(t, two, rollback); c.leaves {
				if done, is := got.(store.Done); !is || done.Outcome.Status != c.ends.Status {
					t.Errorf("the rollback's message: %T %+v", got, got)
				}
			} else if _, is := got.(store.Stop); !is {
				t.Errorf("the rollback's message: %T %+v", got, got)
			}
			start := ask(t, two, again).(store.Start)
			if start.Claim.Attempt != 2 || !start.RunStarted {
				t.Errorf("%+v", start)
			}
			// The retry fails as well, and has a rollback of its own.
			finish(t, two, start.Claim, bad(store.StepPatch))
			last := shared("w", run, store.StepRollback, "last")
			last.RootTaskID = "again"
			if f := finish(t, two, starts(t, two, last), good(store.StepRollback)); f.Status != store.RunRolledBack {
				t.Errorf("finished %+v", f)
			}
		})
	}
}

// TestRetryAfterTheRollbacksWorkerDied: neither its free lock nor the retry's
// own message proves that its commands have ended; the redelivery of the
// rollback's message does.
func TestRetryAfterTheRollbacksWorkerDied(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	dying, successor := d.Open(t, as("dying", 0)), d.Open(t, as("successor", 50*time.Millisecond))
	run, claim, again, rollback := retriedDuringRollback(t, d, dying)
	waits(t, successor, again, store.ParkedBusy)
	dying.Close()
	for deadline := time.Now().Add(20 * time.Second); !strings.Contains(waits(t, successor, again, store.ParkedBusy).Reason, "is not connected"); {
		if time.Now().After(deadline) {
			t.Fatal("nobody noticed the worker's death")
		}
	}
	if ids := taken(t, successor, "q"); ids != "" {
		t.Errorf("published before the rollback's message was redelivered: %s", ids)
	}
	began := time.Now()
	stop, is := ask(t, successor, rollback).(store.Stop)
	if !is || !stop.ParkedReady || time.Since(began) < 50*time.Millisecond {
		t.Errorf("the rollback's message: %+v after %s", stop, time.Since(began))
	}
	if _, err := successor.CheckClaim(t.Context(), claim); !errors.Is(err, store.ErrClaimLost) {
		t.Errorf("the dead worker's claim: %v, want ErrClaimLost", err)
	}
	if ids := taken(t, successor, "q"); ids != "again" {
		t.Errorf("published %q", ids)
	}
	finish(t, successor, starts(t, successor, again), good(store.StepPatch))
	equal(t, "run", d.Run(t, run)["status"], "running")
}

// TestRetryAfterTheRollbackWasLost: the rollback's worker and its message are lost.
func TestRetryAfterTheRollbackWasLost(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	dying, successor := d.Open(t, as("dying", 0)), d.Open(t, as("successor", 0))
	run, _, again, _ := retriedDuringRollback(t, d, dying)
	waits(t, successor, again, store.ParkedBusy)
	blocked := func() (blocked, working bool) {
		t.Helper()
		list, err := successor.ListWorkspaces(t.Context(), "q", nil)
		if err != nil || len(list) != 1 || list[0].RunID != run || !list[0].Parked {
			t.Fatalf("%+v, %v", list, err)
		}
		return list[0].Blocked, list[0].Working
	}
	free := func(grace time.Duration) {
		t.Helper()
		if err := successor.FreeClaims(t.Context(), suspect(t, successor, run, grace)); err != nil {
			t.Fatal(err)
		}
	}
	if b, w := blocked(); !b || !w {
		t.Errorf("blocked %v, working %v", b, w)
	}
	free(0) // it lives
	dying.Close()
	for deadline := time.Now().Add(20 * time.Second); ; {
		if b, w := blocked(); b && !w {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("nobody noticed the worker's death")
		}
	}
	free(time.Hour)
	if ids := taken(t, successor, "q"); ids != "" {
		t.Errorf("published within the grace: %s", ids)
	}
	free(0)
	if b, _ := blocked(); b {
		t.Error("still blocked")
	}
	if ids := taken(t, successor, "q"); ids != "again" {
		t.Errorf("published %q", ids)
	}
	starts(t, successor, again)
}

// TestStepsOfOneRunTakeTurns: one step of a run at a time, of whichever submission.
func TestStepsOfOneRunTakeTurns(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	one, two := d.Open(t, as("one", 0)), d.Open(t, as("two", 0))
	run := d.Create(t, storetest.Seed{})
	claim := starts(t, one, shared("w", run, store.StepAnalyze, "a"))
	other := shared("w", run, store.StepPatch, "b")
	other.RootTaskID = "another chain"
	waits(t, two, other, store.ParkedBusy)
	waits(t, one, other, store.ParkedBusy)
	// A released claim blocks no step.
	if err := one.ReleaseClaim(t.Context(), claim); err != nil {
		t.Fatal(err)
	}
	if ids := taken(t, two, "q"); ids != "b" {
		t.Errorf("published %q", ids)
	}
	starts(t, two, other)
	waits(t, one, shared("w", run, store.StepAnalyze, "a"), store.ParkedBusy)
}
