package chaos

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/internal/moonmind"
)

// A campaign of the default length kills at every place of the chain, and has every fault
// of a service, every failure before a retry, and every way in which a message comes twice.
func TestSpecTrialsKillEverywhere(t *testing.T) {
	t.Parallel()
	trials := func(kind Kind) (all []Trial) {
		for n := range (Config{Kinds: []Kind{kind}}).WithDefaults().Trials {
			all = append(all, newTrial(11, n, []Kind{kind}))
		}
		return all
	}
	for kind, places := range map[Kind][]specPlace{Spec: specPlaces, SpecCloud: cloudPlaces} {
		reached := map[string]bool{}
		for _, trial := range trials(kind) {
			if len(trial.Stages) > 0 {
				reached[trial.Stages[len(trial.Stages)-1].place()] = true
			}
		}
		for _, p := range places {
			if !reached[p.stage(kill).place()] {
				t.Errorf("%s: no worker is killed at %s", kind, p.stage(kill).place())
			}
		}
	}
	for _, point := range specOnly() {
		if !slices.ContainsFunc(slices.Concat(specPlaces, cloudPlaces), func(p specPlace) bool { return p.point == point }) {
			t.Errorf("%s is no place", point)
		}
	}
	seen := map[string]int{}
	for _, kind := range []Kind{SpecRetry, SpecGitHub, SpecTwice, SpecRestart} {
		for _, trial := range trials(kind) {
			seen[trial.Service]++
			seen[trial.Failure]++
			seen[trial.Variant+trial.Twice]++
			for _, s := range trial.Stages {
				seen[string(s.Do)+s.Step]++
			}
		}
	}
	var want []string
	for _, f := range serviceFaults {
		want = append(want, f.name)
	}
	for _, f := range specFailures {
		want = append(want, f.name)
	}
	for _, task := range moonmind.SpecTasks {
		for _, what := range []string{taskAtOnce, taskAtEnd, string(publishAgain), string(kill), string(restartBroker), string(restartDatabase), string(restartBoth)} {
			want = append(want, what+task)
		}
	}
	for _, what := range want {
		if seen[what] == 0 {
			t.Errorf("no trial has: %s", what)
		}
	}
}

// A few trials of the Spec workflow for every change: the others are `make chaos
// KINDS=spec`.
func TestShortSpecCampaign(t *testing.T) {
	t.Parallel()
	var progress bytes.Buffer
	folder := t.TempDir()
	kinds := []Kind{Spec, SpecCloud, SpecRetry, SpecGitHub, SpecTwice}
	report, err := Run(t.Context(), Config{Module: "../..", Folder: folder, Kinds: kinds, Seed: 5, Trials: 2 * len(kinds), Only: -1, Lanes: 4, For: 30 * time.Second, Output: &progress})
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
