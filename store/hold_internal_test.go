package store

import (
	"strings"
	"testing"
	"time"
)

func TestAdmit(t *testing.T) {
	t.Parallel()
	now := time.Now()
	at := func(run string, rank int, minutes int) turn {
		return turn{RunID: run, Rank: rank, QueuedAt: now.Add(time.Duration(minutes) * time.Minute)}
	}
	next := func(run string, rank int, minutes int) *turn {
		t := at(run, rank, minutes)
		return &t
	}
	for _, c := range []struct {
		name string
		hold holdRow
		own  turn
		want string
	}{
		{"nobody has it", holdRow{}, at("b", rankNormal, 0), "take"},
		{"ours", holdRow{RunID: "b"}, at("b", rankNormal, 0), "start"},
		{"ours, and a better one waits", holdRow{RunID: "b", Next: next("a", rankHigh, -5)}, at("b", rankNormal, 0), "start"},
		{"ours, the rollback, and others wait", holdRow{RunID: "b", Next: next("a", rankRollback, -5)}, at("b", rankRollback, 0), "start"},
		{"another's", holdRow{RunID: "a"}, at("b", rankHigh, 0), "wait"},
		{"another's, even for a rollback", holdRow{RunID: "a"}, at("b", rankRollback, 0), "wait"},
		{"free, an older one waits", holdRow{Next: next("c", rankNormal, -1)}, at("b", rankNormal, 0), "grant c"},
		{"free, a younger one waits", holdRow{Next: next("c", rankNormal, 1)}, at("b", rankNormal, 0), "take"},
		{"free, a younger one of high priority waits", holdRow{Next: next("c", rankHigh, 1)}, at("b", rankNormal, 0), "grant c"},
		{"free, an older one waits, we are high", holdRow{Next: next("c", rankNormal, -1)}, at("b", rankHigh, 0), "take"},
		{"free, we roll back", holdRow{Next: next("c", rankHigh, -1)}, at("b", rankRollback, 0), "take"},
		{"free, queued at the same moment", holdRow{Next: next("a", rankNormal, 0)}, at("b", rankNormal, 0), "grant a"},
	} {
		a := admit(c.hold, c.own)
		got := ""
		switch {
		case a.wait:
			got = "wait"
		case a.grant != nil:
			got = "grant " + a.grant.RunID
		case a.take:
			got = "take"
		case a.start:
			got = "start"
		}
		if got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

func TestPlanSteps(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		plan string
		done []Step
		last Step
		next Step
	}{
		{`[{"name": "analyze"}, {"name": "verify"}, {"name": "rollback"}]`, nil, StepVerify, StepAnalyze},
		{`[{"name": "analyze"}, {"name": "verify"}, {"name": "rollback"}]`, []Step{StepAnalyze}, StepVerify, StepVerify},
		{`[{"name": "analyze"}, {"name": "build"}]`, []Step{StepAnalyze, StepBuild}, StepBuild, ""},
		{`["analyze", {"name": "deploy"}, 7]`, nil, StepAnalyze, StepAnalyze},
		{`[{"name": "rollback"}]`, nil, "", ""},
		{`{}`, nil, "", ""},
		{``, nil, "", ""},
	} {
		done := map[Step]bool{}
		for _, step := range c.done {
			done[step] = true
		}
		if last, next := lastStep([]byte(c.plan)), nextStep([]byte(c.plan), done); last != c.last || next != c.next {
			t.Errorf("%s after %v: last %q, next %q, want %q, %q", c.plan, c.done, last, next, c.last, c.next)
		}
	}
}

func TestLostStep(t *testing.T) {
	t.Parallel()
	run := Run{ID: "r", Status: RunRunning, Steps: []byte(`["analyze", "patch", "build"]`)}
	for _, c := range []struct {
		name string
		seen lostState
		step Step
		text string
	}{
		{"between two steps", lostState{run: run, done: map[Step]bool{StepAnalyze: true}}, StepPatch, "step patch did not begin"},
		{"in a step", lostState{run: run, done: map[Step]bool{StepAnalyze: true}, open: &claimRow{Worker: "w"}, openStep: StepPatch}, StepPatch, "in progress on worker w"},
		{"a step that ended otherwise", lostState{run: run, done: map[Step]bool{StepAnalyze: true, StepPatch: true}, open: &claimRow{Worker: "w"}, openStep: StepPatch}, StepBuild, "step build did not begin"},
		{"at its end", lostState{run: run, done: map[Step]bool{StepAnalyze: true, StepPatch: true, StepBuild: true}}, "", ""},
	} {
		step, text := c.seen.lostStep()
		if step != c.step || step != "" && !strings.Contains(text, c.text) {
			t.Errorf("%s: %q, %s", c.name, step, text)
		}
	}
}
