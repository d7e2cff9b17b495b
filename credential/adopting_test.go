//go:build linux

package credential_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// A worker is the parent of orphans. The end of a step's program there leaves the program
// that reads a credential alone.
func TestTheEndOfAStepLeavesTheProgramAlone(t *testing.T) {
	const inside = "CREDENTIAL_TEST_INSIDE"
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
	begun, end := filepath.Join(t.TempDir(), "begun"), filepath.Join(t.TempDir(), "end")
	c := newCredential(t, "command:"+script(t, "touch "+begun+"; until [ -e "+end+" ]; do sleep 0.01; done; echo "+token))
	ended := make(chan error, 1)
	go func() {
		value, err := c.Read(t.Context())
		if err == nil && value.Reveal() != token {
			t.Errorf("read %q", value.Reveal())
		}
		ended <- err
	}()
	for !exists(begun) {
		select {
		case err := <-ended:
			t.Fatalf("ended early: %v", err)
		case <-time.After(time.Millisecond):
		}
	}
	if err := (processes.Runner{}).Run(t.Context(), processes.Owner{Run: "run", Step: "build"}, exec.Command("true"), nil); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(end, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
