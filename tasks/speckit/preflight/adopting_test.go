//go:build linux

package preflight

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// A worker is the parent of orphans. The end of another step's program there leaves the
// one that a check runs alone.
func TestTheEndOfAStepLeavesTheProgramAlone(t *testing.T) {
	const inside = "PREFLIGHT_TEST_INSIDE"
	if os.Getenv(inside) == "" {
		t.Parallel()
		own, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		// A process of its own: there the children of other tests do not interfere.
		cmd := exec.Command(own, "-test.run", "^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), inside+"=1", "TMPDIR="+t.TempDir())
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	stop, err := processes.Adopt(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	f := newFixture(t)
	f.config.Codex = f.credential("Codex key", "env:CODEX_KEY", "CODEX_KEY="+key)
	begun, end := filepath.Join(t.TempDir(), "begun"), filepath.Join(t.TempDir(), "end")
	f.config.Program = program(t, "touch "+begun+"; until [ -e "+end+" ]; do sleep 0.01; done; echo codex-cli 0.99.0")
	checker, found := f.checker(), make(chan Finding, 1)
	go func() {
		report, err := checker.Check(t.Context(), Request{Repository: "octo/widgets", Codex: true})
		if err != nil {
			t.Error(err)
		}
		found <- report.Codex
	}()
	for !exists(begun) {
		select {
		case finding := <-found:
			t.Fatalf("ended early: %+v", finding)
		case <-time.After(time.Millisecond):
		}
	}
	if err := (processes.Runner{}).Run(t.Context(), processes.Owner{Run: "run", Step: "build"}, exec.Command("true"), nil); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(end, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if finding := <-found; finding.Status != Valid {
		t.Errorf("found %+v", finding)
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
