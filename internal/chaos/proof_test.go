package chaos

import (
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/chaos/defects"
)

// Every defect needs a trial that finds it, and every trial of the proof a defect.
func TestEveryDefectHasItsTrials(t *testing.T) {
	t.Parallel()
	list, err := defects.All()
	if err != nil {
		t.Fatal(err)
	}
	trials := map[string]int{}
	for _, d := range proofs {
		if trials[d.defect] > 0 {
			t.Errorf("proof.go lists the defect %s twice", d.defect)
		}
		trials[d.defect] = len(d.trials)
	}
	for _, d := range list {
		if trials[d.Name] == 0 {
			t.Errorf("no trial in proof.go is meant to find %s.patch", d.Name)
		}
		delete(trials, d.Name)
	}
	for name := range trials {
		t.Errorf("proof.go has trials for %s, and there is no %s.patch in internal/chaos/defects", name, name)
	}
}
