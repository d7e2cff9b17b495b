package chaos

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/changetest"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// A campaign of the default length kills at every place of the steps that use the
// work tree or the engine, and in every workspace.
func TestRealTrialsKillEverywhere(t *testing.T) {
	t.Parallel()
	reached, workspaces, failing := map[string]bool{}, map[changetest.WorkspaceKind]bool{}, map[string]bool{}
	for n := range (Config{Kinds: []Kind{Real}}).WithDefaults().Trials {
		trial := newTrial(11, n, []Kind{Real})
		if trial.Stages[0].Point != "" {
			reached[trial.Stages[0].place()] = true
		}
		workspaces[trial.Workspace], failing[trial.Shape.FailAt] = true, true
	}
	for _, p := range realPlaces {
		if !reached[p.stage(kill).place()] {
			t.Errorf("no worker is killed at %s", p.stage(kill).place())
		}
	}
	for _, step := range []string{"patch", "build", "restart", "verify", "rollback"} {
		if !slices.ContainsFunc(realPlaces, func(p place) bool { return p.step == step }) {
			t.Errorf("no place in %s", step)
		}
	}
	if len(workspaces) != len(realKinds) || len(failing) != 5 {
		t.Errorf("workspaces %v, runs that fail at %v", workspaces, failing)
	}
}

// A few trials of kind Real for every change: a worker is killed in a rollback, in a
// restart and in the pause before verify, and the audit trail is compared with what was
// there then, and at the end. The others are `make chaos KINDS=real`.
func TestTrailAfterAKill(t *testing.T) {
	t.Parallel()
	devenv.Compose(t)
	const seed = 5
	for _, p := range []struct {
		point        faultpoint.Point
		step, failAt string
	}{
		{faultpoint.AuditRecorded, "rollback", "verify"},
		{faultpoint.CommandAfter, "restart", ""},
		{faultpoint.ApprovalRefused, "verify", ""},
	} {
		// Not at the same time: the compose project is named after the process.
		t.Run(string(p.point)+" of "+p.step, func(t *testing.T) {
			number := 0
			for ; ; number++ {
				trial := newTrial(seed, number, []Kind{Real})
				if first := trial.Stages[0]; first.Point == p.point && first.Step == p.step && trial.Shape.FailAt == p.failAt && len(trial.Stages) == 1 {
					break
				}
			}
			var progress bytes.Buffer
			folder := t.TempDir()
			report, err := Run(t.Context(), Config{Module: "../..", Folder: folder, Kinds: []Kind{Real}, Seed: seed, Only: number, Lanes: 1, Output: &progress})
			if err != nil {
				t.Fatal(err)
			}
			if report.Problems() > 0 {
				timeline, err := os.ReadFile(filepath.Join(folder, fmt.Sprintf("failed-%d", number), "timeline.txt"))
				t.Errorf("%s\n%s (%v)", progress.String(), timeline, err)
			}
		})
	}
}
