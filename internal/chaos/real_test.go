package chaos

import (
	"slices"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/changetest"
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
