package chaos

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// A campaign of the default length kills at every place of the chain.
func TestSpecTrialsKillEverywhere(t *testing.T) {
	t.Parallel()
	reached := map[string]bool{}
	for n := range (Config{Kinds: []Kind{Spec}}).WithDefaults().Trials {
		trial := newTrial(11, n, []Kind{Spec})
		if len(trial.Stages) > 0 {
			reached[trial.Stages[len(trial.Stages)-1].place()] = true
		}
	}
	for _, p := range specPlaces {
		if !reached[p.stage(kill).place()] {
			t.Errorf("no worker is killed at %s", p.stage(kill).place())
		}
	}
	for _, point := range specOnly() {
		if !slices.Contains(cloudPoints, point) && !slices.ContainsFunc(specPlaces, func(p specPlace) bool { return p.point == point }) {
			t.Errorf("%s is no place", point)
		}
	}
}

// A few trials of kind Spec for every change: the others are `make chaos KINDS=spec`.
func TestShortSpecCampaign(t *testing.T) {
	t.Parallel()
	var progress bytes.Buffer
	folder := t.TempDir()
	report, err := Run(t.Context(), Config{Module: "../..", Folder: folder, Kinds: []Kind{Spec}, Seed: 5, Trials: specRound, Only: -1, Lanes: 4, Output: &progress})
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

func TestCodexRunsAreExcused(t *testing.T) {
	t.Parallel()
	const begun, recorded = faultpoint.CodexStarting, faultpoint.CodexRecorded
	for name, c := range map[string]struct {
		points []faultpoint.Point
		do     action
		want   bool
	}{
		"killed while it ran":         {[]faultpoint.Point{begun}, kill, true},
		"killed after its end":        {[]faultpoint.Point{begun, recorded}, kill, false},
		"killed before it began":      {nil, kill, false},
		"stopped while it ran":        {[]faultpoint.Point{begun}, terminate, true},
		"stopped, and it had its end": {[]faultpoint.Point{begun, recorded}, terminate, false},
	} {
		o := &outcome{run: run{ID: "r"}}
		h := hit{pid: 7, stage: stage{Do: c.do}}
		h.at = h.at.AddDate(2000, 0, 0)
		for _, p := range c.points {
			o.moments = append(o.moments, moment{PID: 7, Point: p, Subject: []string{"r", submit}})
		}
		if got := o.codexOpen(h); got != c.want {
			t.Errorf("%s: %t, want %t", name, got, c.want)
		}
	}
}
