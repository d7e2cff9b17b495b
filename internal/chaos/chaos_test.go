package chaos

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/moonladderstudios/mm-orchestrator/internal/chaos/ledger"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A short campaign with a fixed seed, for every change. The long ones are
// `make chaos`.
func TestShortCampaign(t *testing.T) {
	t.Parallel()
	var progress bytes.Buffer
	folder := t.TempDir()
	report, err := Run(t.Context(), Config{Module: "../..", Folder: folder, Seed: 5, Trials: len(Kinds), Only: -1, Lanes: 6, For: 40 * time.Second, Output: &progress})
	if err != nil {
		t.Fatal(err)
	}
	report.Print(&progress)
	t.Log(progress.String())
	if n := report.Problems(); n > 0 {
		t.Errorf("%d problems; the command below a failed trial repeats it", n)
		for _, number := range report.Failed() {
			timeline, err := os.ReadFile(filepath.Join(folder, fmt.Sprintf("failed-%d", number), "timeline.txt"))
			t.Logf("trial %d (%v):\n%s", number, err, timeline)
		}
	}
}

// A failed trial that is repeated by itself must be the same trial.
func TestTrialsComeFromSeedAndNumber(t *testing.T) {
	t.Parallel()
	for n := range 200 {
		one, other := newTrial(7, n, Kinds), newTrial(7, n, Kinds)
		if one.String() != other.String() || one.Shape != other.Shape {
			t.Errorf("trial %d is %s and then %s", n, one, other)
		}
	}
}

// A campaign of the default length kills at every place. These must be at least 30
// points, and each step of a plan many times.
func TestCampaignKillsEverywhere(t *testing.T) {
	t.Parallel()
	points, perStep, reached := map[faultpoint.Point]bool{}, map[string]int{}, map[string]int{}
	for n := range (Config{}).WithDefaults().Trials {
		trial := newTrial(11, n, Kinds)
		if trial.Kind != KillAtPoint {
			continue
		}
		last := trial.Stages[len(trial.Stages)-1]
		points[last.Point] = true
		perStep[last.Step]++
		reached[last.place()]++
	}
	for _, p := range places {
		if reached[p.stage(kill).place()] == 0 {
			t.Errorf("no worker is killed at %s", p.stage(kill).place())
		}
		reached[p.stage(kill).place()]--
	}
	for name, n := range reached {
		if n != 0 {
			t.Errorf("%d further kills at %s, before every other place had one", n, name)
		}
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

// A new fault point must be a place of some trial, in every step, or be in leftOut
// with a reason.
func TestEveryPointHasItsKillOrAReason(t *testing.T) {
	t.Parallel()
	file, err := parser.ParseFile(token.NewFileSet(), "../faultpoint/points.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	points := 0
	ast.Inspect(file, func(n ast.Node) bool {
		text, is := n.(*ast.BasicLit)
		if !is || text.Kind != token.STRING {
			return true
		}
		points++
		point := faultpoint.Point(strings.Trim(text.Value, `"`))
		for _, step := range steps {
			killed := slices.ContainsFunc(places, func(p place) bool { return p.point == point && p.step == step })
			excused := false
			for _, l := range leftOut {
				excused = excused || slices.Contains(l.points, point) && (l.steps == nil || slices.Contains(l.steps, step))
			}
			if killed == excused {
				t.Errorf("%s of %s: a place %t, left out with a reason %t", point, step, killed, excused)
			}
		}
		return true
	})
	if points < 50 {
		t.Errorf("only %d points were found", points)
	}
}

func TestExcusesNeedAnOpenCommand(t *testing.T) {
	t.Parallel()
	h := hit{pid: 7, stage: stage{Do: kill}}
	h.at = h.at.AddDate(2000, 0, 0)
	const begun, before, after, recorded, finished = faultpoint.StepBegun, faultpoint.CommandBefore, faultpoint.CommandAfter, faultpoint.CommandRecorded, faultpoint.FinishCommitted
	for name, c := range map[string]struct {
		points []faultpoint.Point
		// numbers of the commands, 0 for a moment without a command.
		numbers []int
		want    [several]int
	}{
		"killed in the command":                 {[]faultpoint.Point{begun, before}, []int{0, 1}, [several]int{1, 0, 0}},
		"killed after it was recorded":          {[]faultpoint.Point{before, after, recorded}, []int{1, 1, 1}, [several]int{0, 0, 0}},
		"killed after the step's end":           {[]faultpoint.Point{before, after, finished}, []int{1, 1, 0}, [several]int{0, 0, 0}},
		"killed before the command":             {[]faultpoint.Point{begun}, []int{0}, [several]int{0, 0, 0}},
		"killed before it was recorded":         {[]faultpoint.Point{before, after, faultpoint.FinishWritten}, []int{1, 1, 0}, [several]int{1, 0, 0}},
		"killed in the second of several":       {[]faultpoint.Point{before, after, recorded, before}, []int{1, 1, 1, 2}, [several]int{0, 1, 0}},
		"killed with the first not on record":   {[]faultpoint.Point{before, after, before}, []int{1, 1, 2}, [several]int{1, 1, 0}},
		"the second's record counts for both":   {[]faultpoint.Point{before, after, before, after, recorded}, []int{1, 1, 2, 2, 2}, [several]int{0, 0, 0}},
		"killed before the third of them began": {[]faultpoint.Point{before, recorded, before, recorded}, []int{1, 1, 2, 2}, [several]int{0, 0, 0}},
	} {
		o := &outcome{hits: []hit{h}, run: run{ID: "r"}}
		for i, p := range c.points {
			subject := []string{"r", "patch"}
			if n := c.numbers[i]; n > 0 {
				subject = append(subject, commandSubject(n))
			}
			o.moments = append(o.moments, moment{PID: 7, Point: p, Subject: subject})
		}
		for i, want := range c.want {
			if got := o.excuses("patch", i+1); got != want {
				t.Errorf("%s: %d excuses for command %d, want %d", name, got, i+1, want)
			}
		}
	}
}

// Several commands of a step are checked one by one, and for their order.
func TestSeveralCommandsAreJudged(t *testing.T) {
	t.Parallel()
	type event struct {
		number int
		event  string
	}
	ran := func(numbers ...int) (all []event) {
		for _, n := range numbers {
			all = append(all, event{n, ledger.Start}, event{n, ledger.End})
		}
		return all
	}
	all := shape{Several: true}
	for name, c := range map[string]struct {
		shape    shape
		events   []event
		killedIn int
		want     []class
	}{
		"each once":                  {all, ran(1, 2, 3), 0, nil},
		"failed at the second":       {shape{Several: true, FailAt: "patch"}, ran(1, 2), 0, nil},
		"went on after the failure":  {shape{Several: true, FailAt: "patch"}, ran(1, 2, 3), 0, []class{doubled}},
		"one that was forgotten":     {all, ran(1, 3), 0, []class{wrong, wrong}},
		"another order":              {all, ran(2, 1, 3), 0, []class{wrong, wrong}},
		"the second while the first": {all, append([]event{{1, ledger.Start}, {2, ledger.Start}}, append(ran(3), event{1, ledger.End}, event{2, ledger.End})...), 0, []class{wrong, wrong}},
		"from the beginning":         {all, ran(1, 2, 1, 2, 3), 2, []class{doubled}},
		"the one in flight again":    {all, append([]event{{1, ledger.Start}, {1, ledger.End}, {2, ledger.Start}}, ran(2, 3)...), 2, nil},
		"it had ended":               {all, ran(1, 2, 2, 3), 2, nil},
		"again without a reason":     {all, ran(1, 2, 2, 3), 0, []class{doubled}},
	} {
		o := &outcome{run: run{ID: "r", Shape: c.shape}}
		for _, e := range c.events {
			o.ledger = append(o.ledger, ledger.Record{Run: "r", Step: "patch", Command: e.number, Event: e.event})
		}
		if c.killedIn > 0 {
			h := hit{pid: 7, stage: stage{Do: kill}}
			h.at = h.at.AddDate(2000, 0, 0)
			o.hits = []hit{h}
			for n := 1; n <= c.killedIn; n++ {
				o.moments = append(o.moments, moment{PID: 7, Point: faultpoint.CommandBefore, Subject: []string{"r", "patch", commandSubject(n)}})
				if n < c.killedIn {
					o.moments = append(o.moments, moment{PID: 7, Point: faultpoint.CommandRecorded, Subject: []string{"r", "patch", commandSubject(n)}})
				}
			}
		}
		o.judgeOrderOf("patch")
		for n := 1; n <= several; n++ {
			o.judgeCommand("patch", n)
		}
		var got []class
		for _, p := range o.problems {
			got = append(got, p.class)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, o.problems, c.want)
		}
	}
}
