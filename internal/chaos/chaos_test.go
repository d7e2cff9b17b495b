package chaos

import (
	"bytes"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A short campaign with a fixed seed, for every change. The long ones are
// `make chaos`.
func TestShortCampaign(t *testing.T) {
	t.Parallel()
	var progress bytes.Buffer
	report, err := Run(t.Context(), Config{Module: "../..", Folder: t.TempDir(), Seed: 5, Trials: len(Kinds), Only: -1, Lanes: 6, For: 40 * time.Second, Output: &progress})
	if err != nil {
		t.Fatal(err)
	}
	report.Print(&progress)
	t.Log(progress.String())
	if n := report.Problems(); n > 0 {
		t.Errorf("%d broken promises; a trial is repeated by the command below it", n)
	}
}

// A trial that fails must come out the same when it is repeated by itself.
func TestTrialsComeFromSeedAndNumber(t *testing.T) {
	t.Parallel()
	for n := range 200 {
		one, other := newTrial(7, n, Kinds), newTrial(7, n, Kinds)
		if one.String() != other.String() || one.Shape != other.Shape {
			t.Errorf("trial %d is %s and then %s", n, one, other)
		}
	}
}

// A campaign of as many kills as there are places comes by all of them, which
// must be at least 30 points, and each step of a plan many times.
func TestCampaignKillsEverywhere(t *testing.T) {
	t.Parallel()
	points, perStep := map[faultpoint.Point]bool{}, map[string]int{}
	for n := range len(places) {
		trial := newTrial(11, n, []Kind{KillAtPoint})
		last := trial.Stages[len(trial.Stages)-1]
		points[last.Point] = true
		perStep[last.Step]++
	}
	if len(points) < 30 {
		t.Errorf("%d points, want 30 at least", len(points))
	}
	for _, step := range steps {
		if perStep[step] < 20 {
			t.Errorf("step %s is killed %d times, want 20 at least", step, perStep[step])
		}
	}
	seen := map[string]bool{}
	for _, p := range places {
		seen[string(p.point)+p.step] = true
	}
	if len(seen) < 180 {
		t.Errorf("%d pairs of point and step, want 180 at least", len(seen))
	}
}

func TestExcusesNeedAnOpenCommand(t *testing.T) {
	t.Parallel()
	h := hit{pid: 7, stage: stage{Do: kill}}
	h.at = h.at.AddDate(2000, 0, 0)
	for name, c := range map[string]struct {
		points []faultpoint.Point
		want   int
	}{
		"killed in the command":         {[]faultpoint.Point{faultpoint.StepBegun, faultpoint.CommandBefore}, 1},
		"killed after it was recorded":  {[]faultpoint.Point{faultpoint.CommandBefore, faultpoint.CommandAfter, faultpoint.CommandRecorded}, 0},
		"killed after the step's end":   {[]faultpoint.Point{faultpoint.CommandBefore, faultpoint.CommandAfter, faultpoint.FinishCommitted}, 0},
		"killed before the command":     {[]faultpoint.Point{faultpoint.StepBegun}, 0},
		"killed before it was recorded": {[]faultpoint.Point{faultpoint.CommandBefore, faultpoint.CommandAfter, faultpoint.FinishWritten}, 1},
	} {
		o := &outcome{hits: []hit{h}, run: run{ID: "r"}}
		for _, p := range c.points {
			o.moments = append(o.moments, moment{PID: 7, Point: p, Subject: []string{"r", "build"}})
		}
		if got := o.excuses("build"); got != c.want {
			t.Errorf("%s: %d excuses, want %d", name, got, c.want)
		}
	}
}
