package chaos

import (
	"bytes"
	"testing"
)

// A few runs for Python workers and ours; `make chaos KINDS=mixed` has a hundred.
func TestMixedFleet(t *testing.T) {
	t.Parallel()
	var progress bytes.Buffer
	report, err := Run(t.Context(), Config{Module: "../..", Folder: t.TempDir(), Seed: 2, Only: -1, Kinds: []Kind{Mixed}, Runs: 5, Output: &progress})
	if err != nil {
		t.Fatal(err)
	}
	report.Print(&progress)
	t.Log(progress.String())
	if n := report.Problems(); n > 0 {
		t.Errorf("%d problems", n)
	}
}
