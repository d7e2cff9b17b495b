package chaos

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// A worker is killed once wherever it looks at an approval, where its run pauses, and
// where the run goes on.
func TestKillsAroundAnApproval(t *testing.T) {
	t.Parallel()
	var progress bytes.Buffer
	folder := t.TempDir()
	report, err := Run(t.Context(), Config{Module: "../..", Folder: folder, Seed: 3, Trials: len(gatedKills), Only: -1, Lanes: 3, Kinds: []Kind{Approval}, Output: &progress})
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
