package store

import (
	"strings"
	"testing"
	"time"
)

// TestDecide is the table of rules that a delivery meets.
func TestDecide(t *testing.T) {
	t.Parallel()
	now := time.Now()
	ended := func(status RunStatus) Run { return Run{ID: "r", Status: status, CompletedAt: &now} }
	run := func(status RunStatus) Run { return Run{ID: "r", Status: status} }
	row := func(attempt int, status, task string) *stateRow {
		return &stateRow{Attempt: attempt, PlanStepStatus: status, CeleryTaskID: task}
	}
	finish, park := &Pause{Queue: "q", Mode: PauseFinish, Reason: "x"}, &Pause{Queue: "q", Mode: PausePark, Reason: "x"}
	good, bad := &Outcome{Status: StepSucceeded, Message: "claim"}, &Outcome{Status: StepFailed, Message: "claim"}
	claim := func(attempt int, task string, outcome *Outcome, holder holderState) claimRow {
		return claimRow{Attempt: attempt, TaskID: task, Starts: 1, Outcome: outcome, Holder: holder}
	}
	type claims = []claimRow
	// at is a claim on another step.
	at := func(step Step, holder holderState, same bool) claimRow {
		return claimRow{Step: step, Attempt: 1, TaskID: "other", Starts: 1, Holder: holder, SameSubmission: same}
	}
	for _, c := range []struct {
		name     string
		seen     beginState
		step     Step
		task     string
		want     string // start N, done, rebuilt, busy, recheck, or words of the stop
		attempts int
	}{
		{"first start", beginState{Run: run(RunPending), State: row(1, "pending", "")}, StepBuild, "t", "start 1", 1},
		{"no state row", beginState{Run: run(RunPending)}, StepBuild, "t", "start 1", 1},
		{"retried row", beginState{Run: run(RunPending), State: row(3, "pending", "t")}, StepBuild, "t", "start 1", 3},
		{"retried, the old attempt's claim has ended",
			beginState{Run: run(RunPending), State: row(2, "pending", "old"), StepClaims: claims{claim(1, "old", bad, holderNone)}}, StepBuild, "t", "start 1", 2},
		{"retried, the old message again",
			beginState{Run: run(RunPending), State: row(2, "pending", "old"), StepClaims: claims{claim(1, "old", bad, holderNone)}}, StepBuild, "old", "done", 2},
		{"ended, same task", beginState{Run: run(RunRunning), State: row(1, "succeeded", "t"), StepClaims: claims{claim(1, "t", good, holderNone)}}, StepBuild, "t", "done", 1},
		{"ended, same task, run has ended", beginState{Run: ended(RunRolledBack), State: row(1, "succeeded", "t"), StepClaims: claims{claim(1, "t", good, holderNone)}}, StepBuild, "t", "done", 1},
		{"ended, another task", beginState{Run: run(RunRunning), State: row(1, "failed", "t"), StepClaims: claims{claim(1, "t", bad, holderNone)}}, StepBuild, "u", "done", 1},
		{"Python succeeded, same task", beginState{Run: run(RunRunning), State: row(1, "succeeded", "t")}, StepBuild, "t", "rebuilt", 1},
		{"Python succeeded, another task", beginState{Run: run(RunRunning), State: row(1, "succeeded", "t")}, StepBuild, "u", "rebuilt", 1},
		{"Python failed, same task", beginState{Run: run(RunFailed), State: row(1, "failed", "t")}, StepBuild, "t", "rebuilt", 1},
		{"Python failed, another task", beginState{Run: run(RunFailed), State: row(1, "failed", "t")}, StepBuild, "u", "has ended: failed", 1},
		{"skipped is not an end", beginState{Run: ended(RunSucceeded), State: row(1, "skipped", "")}, StepRollback, "t", "is succeeded", 1},
		{"waits for approval", beginState{Run: run(RunAwaitingApproval), State: row(1, "pending", "")}, StepBuild, "t", "approval", 1},
		{"rollback waits for approval", beginState{Run: run(RunAwaitingApproval), State: row(1, "pending", "")}, StepRollback, "t", "approval", 1},
		{"rollback due", beginState{Run: run(RunFailed), State: row(1, "pending", "")}, StepRollback, "t", "start 1", 1},
		{"rollback due, an earlier one ended", beginState{Run: run(RunFailed), State: row(1, "succeeded", "old"), StepClaims: claims{claim(1, "old", good, holderNone)}}, StepRollback, "t", "start 1", 1},
		{"rollback due, an earlier one by Python", beginState{Run: run(RunFailed), State: row(1, "succeeded", "old")}, StepRollback, "t", "start 1", 1},
		{"rollback of a good run", beginState{Run: ended(RunSucceeded), State: row(1, "pending", "")}, StepRollback, "t", "is succeeded", 1},
		{"rollback of a retried run", beginState{Run: run(RunPending), State: row(2, "pending", "")}, StepRollback, "t", "is pending", 2},
		{"rollback of a run at work", beginState{Run: run(RunRunning), State: row(2, "pending", "")}, StepRollback, "t", "is running", 2},
		{"rolled back, twin", beginState{Run: ended(RunRolledBack), State: row(1, "succeeded", "a"), StepClaims: claims{claim(1, "a", good, holderNone)}}, StepRollback, "b", "done", 1},
		{"rolled back, no record", beginState{Run: ended(RunRolledBack), State: row(1, "pending", "")}, StepRollback, "b", "nothing left", 1},
		{"failed for good, rollback", beginState{Run: ended(RunFailed), State: row(1, "pending", "")}, StepRollback, "b", "nothing left", 1},
		{"step of a good run", beginState{Run: ended(RunSucceeded), State: row(1, "pending", "")}, StepBuild, "t", "has ended: succeeded", 1},
		{"step of a failed run", beginState{Run: run(RunFailed), State: row(1, "pending", "")}, StepRestart, "t", "has ended: failed", 1},
		{"claimed by a live worker", beginState{Run: run(RunRunning), State: row(1, "in_progress", "t"), StepClaims: claims{claim(1, "t", nil, holderAlive)}}, StepBuild, "t", "busy", 1},
		{"claimed by a worker that may just have died", beginState{Run: run(RunRunning), State: row(1, "in_progress", "t"), StepClaims: claims{claim(1, "t", nil, holderAlive)}, JustRedelivered: true}, StepBuild, "t", "recheck", 1},
		{"claimed here", beginState{Run: run(RunRunning), State: row(1, "in_progress", "t"), StepClaims: claims{claim(1, "t", nil, holderSelf)}, JustRedelivered: true}, StepBuild, "t", "busy", 1},
		{"an old attempt still runs", beginState{Run: run(RunPending), State: row(2, "pending", "t"), StepClaims: claims{claim(1, "t", nil, holderAlive)}}, StepBuild, "u", "busy", 2},
		{"an old attempt's worker died", beginState{Run: run(RunPending), State: row(2, "pending", "t"), StepClaims: claims{claim(1, "t", nil, holderDead)}}, StepBuild, "u", "start 1", 2},
		{"holder just suspected", beginState{Run: run(RunRunning), State: row(1, "in_progress", "t"), StepClaims: claims{claim(1, "t", nil, holderSuspected)}}, StepBuild, "t", "recheck", 1},
		{"holder dead", beginState{Run: run(RunRunning), State: row(1, "in_progress", "t"), StepClaims: claims{claim(1, "t", nil, holderDead)}}, StepBuild, "t", "start 2", 1},
		{"released", beginState{Run: run(RunRunning), State: row(1, "in_progress", "t"), StepClaims: claims{claim(1, "t", nil, holderNone)}}, StepBuild, "t", "start 2", 1},
		{"retried while the rollback runs", beginState{Run: run(RunPending), State: row(2, "pending", ""), OtherClaims: claims{at(StepRollback, holderAlive, false)}}, StepPatch, "t", "busy", 2},
		{"retried while the rollback runs here", beginState{Run: run(RunPending), State: row(2, "pending", ""), OtherClaims: claims{at(StepRollback, holderSelf, false)}}, StepPatch, "t", "busy", 2},
		{"retried, and the rollback's worker is suspected", beginState{Run: run(RunPending), State: row(2, "pending", ""), OtherClaims: claims{at(StepRollback, holderSuspected, false)}}, StepPatch, "t", "busy", 2},
		{"retried, and the rollback's worker is dead", beginState{Run: run(RunPending), State: row(2, "pending", ""), OtherClaims: claims{at(StepRollback, holderDead, false)}}, StepPatch, "t", "busy", 2},
		{"two chains of one run", beginState{Run: run(RunRunning), State: row(1, "pending", ""), OtherClaims: claims{at(StepAnalyze, holderAlive, false)}}, StepPatch, "t", "busy", 1},
		{"a next link before its step has ended", beginState{Run: run(RunRunning), State: row(1, "pending", ""), OtherClaims: claims{at(StepAnalyze, holderAlive, true)}}, StepPatch, "t", "busy", 1},
		{"an ended step while another runs", beginState{Run: run(RunRunning), State: row(1, "succeeded", "t"), StepClaims: claims{claim(1, "t", good, holderNone)}, OtherClaims: claims{at(StepBuild, holderAlive, true)}}, StepPatch, "t", "done", 1},
		{"rollback while a step of its submission runs", beginState{Run: run(RunRunning), State: row(1, "pending", ""), OtherClaims: claims{at(StepBuild, holderAlive, true)}}, StepRollback, "t", "busy", 1},
		{"rollback, the step's worker is suspected", beginState{Run: run(RunRunning), State: row(1, "pending", ""), OtherClaims: claims{at(StepBuild, holderSuspected, true)}}, StepRollback, "t", "recheck", 1},
		{"rollback, the step's worker is dead", beginState{Run: run(RunRunning), State: row(1, "pending", ""), OtherClaims: claims{at(StepBuild, holderDead, true)}}, StepRollback, "t", "is running", 1},
		{"rollback of an earlier submission", beginState{Run: run(RunRunning), State: row(1, "pending", ""), OtherClaims: claims{at(StepBuild, holderAlive, false)}}, StepRollback, "t", "is running", 1},
		{"rollback due, another submission's step runs", beginState{Run: run(RunFailed), State: row(1, "pending", ""), OtherClaims: claims{at(StepBuild, holderAlive, false)}}, StepRollback, "t", "busy", 1},
		{"rollback due, the worker of its own is dead", beginState{Run: run(RunFailed), State: row(1, "pending", ""), OtherClaims: claims{at(StepBuild, holderDead, true)}}, StepRollback, "t", "start 1", 1},
		{"rollback again while it runs, retried since", beginState{Run: run(RunPending), State: row(2, "pending", ""), StepClaims: claims{claim(1, "t", nil, holderAlive)}}, StepRollback, "t", "busy", 2},
		{"rollback again, retried since, its worker suspected", beginState{Run: run(RunPending), State: row(2, "pending", ""), StepClaims: claims{claim(1, "t", nil, holderSuspected)}}, StepRollback, "t", "recheck", 2},
		{"rollback again, retried since, its worker dead", beginState{Run: run(RunPending), State: row(2, "pending", ""), StepClaims: claims{claim(1, "t", nil, holderDead)}}, StepRollback, "t", "is pending", 2},
		{"a Python worker started it and died", beginState{Run: run(RunRunning), State: row(1, "in_progress", "t")}, StepBuild, "t", "start 1", 1},
		{"paused, a new run", beginState{Run: run(RunPending), State: row(1, "pending", ""), Pause: finish}, StepAnalyze, "t", "paused", 1},
		{"paused, a new run, park", beginState{Run: run(RunPending), State: row(1, "pending", ""), Pause: park}, StepAnalyze, "t", "paused", 1},
		{"paused, a run that has begun", beginState{Run: run(RunRunning), State: row(1, "pending", ""), Pause: finish, HasBegun: true}, StepBuild, "t", "start 1", 1},
		{"paused, a run that has begun, park", beginState{Run: run(RunRunning), State: row(1, "pending", ""), Pause: park, HasBegun: true}, StepBuild, "t", "paused", 1},
		{"paused, its worker died", beginState{Run: run(RunRunning), State: row(1, "in_progress", "t"), StepClaims: claims{claim(1, "t", nil, holderDead)}, Pause: park, HasBegun: true}, StepBuild, "t", "start 2", 1},
		{"paused, a live worker has it", beginState{Run: run(RunRunning), State: row(1, "in_progress", "t"), StepClaims: claims{claim(1, "t", nil, holderAlive)}, Pause: park, HasBegun: true}, StepBuild, "t", "busy", 1},
		{"paused, an old attempt's worker died", beginState{Run: run(RunPending), State: row(2, "pending", "t"), StepClaims: claims{claim(1, "t", nil, holderDead)}, Pause: finish}, StepBuild, "u", "paused", 2},
		{"paused, rollback due", beginState{Run: run(RunFailed), State: row(1, "pending", ""), Pause: park, HasBegun: true}, StepRollback, "t", "start 1", 1},
		{"paused, step has ended", beginState{Run: run(RunRunning), State: row(1, "succeeded", "t"), StepClaims: claims{claim(1, "t", good, holderNone)}, Pause: park, HasBegun: true}, StepBuild, "t", "done", 1},
		{"paused, run has ended", beginState{Run: ended(RunSucceeded), State: row(1, "pending", ""), Pause: park, HasBegun: true}, StepBuild, "t", "has ended", 1},
		{"paused, waits for approval", beginState{Run: run(RunAwaitingApproval), State: row(1, "pending", ""), Pause: finish}, StepBuild, "t", "approval", 1},
		{"paused, retried after its end", beginState{Run: Run{ID: "r", Status: RunPending, CompletedAt: &now}, State: row(2, "pending", ""), Pause: finish}, StepPatch, "t", "paused", 2},
		{"paused and revoked", beginState{Run: run(RunRunning), State: row(1, "pending", ""), Pause: park, HasBegun: true, Revocation: &Revocation{}}, StepBuild, "t", "start 1", 1},
	} {
		v := decide(c.seen, BeginRequest{Step: c.step, TaskID: c.task})
		got := v.stop
		switch {
		case v.done != nil && v.done.Message == "claim":
			got = "done"
		case v.done != nil:
			got = "rebuilt"
		case v.busy != nil:
			got = "busy"
		case v.recheck != nil:
			got = "recheck"
		case v.paused != nil:
			got = "paused"
		case v.start:
			got = "start " + itoa(v.starts)
		}
		if !strings.Contains(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
		// Start, stop and paused take the claims of dead holders; other verdicts take none.
		dead := 0
		for _, claim := range append(c.seen.StepClaims, c.seen.OtherClaims...) {
			if claim.Outcome == nil && claim.Holder == holderDead && (claim.Step == "" || c.step == StepRollback && claim.SameSubmission && v.start) {
				dead++
			}
		}
		if (v.start || v.stop != "" || v.paused != nil) && len(v.deadClaims) != dead {
			t.Errorf("%s: %d claims are freed, %d are dead", c.name, len(v.deadClaims), dead)
		}
		if c.seen.attempt() != c.attempts {
			t.Errorf("%s: attempt %d, want %d", c.name, c.seen.attempt(), c.attempts)
		}
	}
}

func TestConclude(t *testing.T) {
	t.Parallel()
	began := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	ended := began.Add(time.Minute)
	for _, c := range []struct {
		name     string
		rollback bool
		step     Step
		status   StepStatus
		want     runChange
	}{
		{"a step in the middle", true, StepBuild, StepSucceeded, runChange{}},
		{"a plan that ends before verify", false, StepRestart, StepSucceeded, runChange{releaseHold: true}},
		{"a failure with a rollback to come", true, StepVerify, StepFailed, runChange{status: RunFailed}},
		{"a failure without", false, StepPatch, StepFailed, runChange{status: RunFailed, completedAt: ended, runStarted: began, releaseHold: true}},
		{"verified", true, StepVerify, StepSucceeded, runChange{status: RunSucceeded, completedAt: ended, runStarted: began, skipRollback: true, releaseHold: true}},
		{"verified, no rollback in the plan", false, StepVerify, StepSucceeded, runChange{status: RunSucceeded, completedAt: ended, runStarted: began, releaseHold: true}},
		{"rolled back", true, StepRollback, StepSucceeded, runChange{status: RunRolledBack, completedAt: ended, runStarted: began, releaseHold: true}},
		{"rollback failed", true, StepRollback, StepFailed, runChange{status: RunFailed, completedAt: ended, runStarted: began, releaseHold: true}},
	} {
		got := conclude(finishState{startedAt: &began, hasRollback: c.rollback, lastStep: StepRestart}, c.step, Outcome{Status: c.status, FinishedAt: ended})
		if got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
	// A plan with build after verify.
	done := runChange{status: RunSucceeded, completedAt: ended, runStarted: began, skipRollback: true, releaseHold: true}
	for _, c := range []struct {
		step               Step
		verified, isSingle bool
		want               runChange
	}{
		{StepVerify, true, false, runChange{}},
		{StepVerify, true, true, done},
		{StepPatch, true, false, runChange{}},
		{StepBuild, true, false, done},
		{StepBuild, false, false, runChange{releaseHold: true}},
		{StepRollback, true, true, runChange{status: RunRolledBack, completedAt: ended, runStarted: began, releaseHold: true}},
	} {
		before := finishState{startedAt: &began, hasRollback: true, lastStep: StepBuild, afterVerify: true, verified: c.verified}
		if got := conclude(before, c.step, Outcome{Status: StepSucceeded, FinishedAt: ended, NothingFollows: c.isSingle}); got != c.want {
			t.Errorf("%+v: %+v", c, got)
		}
	}
	for _, status := range []RunStatus{RunPending, RunRunning, RunAwaitingApproval} {
		for _, end := range []StepStatus{StepSucceeded, StepFailed} {
			if got := conclude(finishState{status: status, startedAt: &began, hasRollback: true}, StepRollback, Outcome{Status: end, FinishedAt: ended}); got != (runChange{}) {
				t.Errorf("the rollback of a run that was retried and is %s: %s: %+v", status, end, got)
			}
		}
	}
	for _, status := range []StepStatus{StepSucceeded, StepFailed} {
		got := conclude(finishState{startedAt: &began, hasRollback: true}, StepBuild, Outcome{Status: status, FinishedAt: ended, NothingFollows: true})
		if !got.releaseHold || !got.completedAt.IsZero() {
			t.Errorf("%s, and no message follows: %+v", status, got)
		}
	}
	if got := conclude(finishState{}, StepVerify, Outcome{Status: StepSucceeded, FinishedAt: ended}); !got.runStarted.Equal(ended) {
		t.Errorf("a run without started_at: %+v", got)
	}
}

func TestSnapshotEntry(t *testing.T) {
	t.Parallel()
	for duration, want := range map[time.Duration]string{
		27404 * time.Microsecond:     `{"status": "s", "durationMs": 27.404}`,
		203981330 * time.Microsecond: `{"status": "s", "durationMs": 203981.33}`,
		2 * time.Second:              `{"status": "s", "durationMs": 2000.0}`,
		-time.Second:                 `{"status": "s", "durationMs": 0.0}`,
		100*24*time.Hour + 1500:      `{"status": "s", "durationMs": 8640000000.001}`,
		1999 * time.Nanosecond:       `{"status": "s", "durationMs": 0.001}`,
	} {
		if got := snapshotEntry("s", duration, 1); got != want {
			t.Errorf("%s: %s, want %s", duration, got, want)
		}
	}
	if got, want := snapshotEntry("s", time.Second, 3), `{"status": "s", "durationMs": 1000.0, "attempt": 3}`; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestHasRollback(t *testing.T) {
	t.Parallel()
	for plan, want := range map[string]bool{
		`[{"name": "verify"}, {"name": "rollback", "parameters": {}}]`: true,
		`["analyze", "rollback"]`:                                      true,
		`[{"name": "rollback "}, "Rollback", 7, null, {"name": 3}]`:    false,
		`[{"Name": "rollback"}]`:                                       false,
		`{"name": "rollback"}`:                                         false,
		`"rollback"`:                                                   false,
		`null`:                                                         false,
		``:                                                             false,
	} {
		if got := hasRollback([]byte(plan)); got != want {
			t.Errorf("%s: %v", plan, got)
		}
	}
}

func TestCleanJSON(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		`{"a": "x"}`:                   `{"a": "x"}`,
		`"a\u0000b\\u0000"`:            `"ab\\u0000"`,
		`"\ud83d\ude00 \ud83d \ude00"`: `"\ud83d\ude00 \ufffd \ufffd"`,
		`"\ud83d"`:                     `"\ufffd"`,
		`"\u00e9\n\""`:                 `"\u00e9\n\""`,
		`nope`:                         "",
		"":                             "",
	} {
		got, err := cleanJSON([]byte(text))
		if string(got) != want || (err != nil) != (want == "") {
			t.Errorf("%s: %s, %v", text, got, err)
		}
	}
}

// FuzzCleanJSON: whatever is valid JSON stays valid JSON without escaped NUL.
func FuzzCleanJSON(f *testing.F) {
	for _, seed := range []string{`{"a\u0000": "\ud800\\\u0000"}`, `"\\\\u0000"`, "\"\xff\"", `["\udc00\ud800"]`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		got, err := cleanJSON(text)
		if err != nil {
			return
		}
		if again, err := cleanJSON(got); err != nil || string(again) != string(got) {
			t.Errorf("%q became %q, then %q, %v", text, got, again, err)
		}
	})
}
