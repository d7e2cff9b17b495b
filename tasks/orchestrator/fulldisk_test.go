package orchestrator

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// smallRunDir makes the run's directory a file system of 64 KiB.
func (b *testEnv) smallRunDir() (dir string) {
	b.t.Helper()
	dir = filepath.Join(b.base, testRun)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		b.t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		b.t.Fatalf("mount a file system at %s: %v. This test needs the right to mount one", dir, err)
	}
	b.t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			b.t.Error(err)
		}
	})
	return dir
}

// What fills the disk with the artifacts, such as the log of a build, must not be what
// keeps a rollback from its end.
func TestRollbackOnAFullDisk(t *testing.T) {
	t.Parallel()
	b := newDirty(t)
	before := b.status()
	dir := b.smallRunDir()
	b.plan(deployPlan(t, "echo two >> api_service/requirements.txt", "exit 1"))
	b.succeed("patch")
	b.fail("build")
	if err := os.WriteFile(filepath.Join(dir, "filled"), make([]byte, 100_000), 0o644); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	_, outcome := b.succeed("rollback")
	same(t, "status", b.status(), before)
	same(t, "artifacts", paths(outcome), "")
	logged := b.logged.String()
	for _, want := range []string{"tree: as before the run (1 file restored, 0 set aside)", "no space left on device. Free space there"} {
		if !strings.Contains(logged, want) {
			t.Errorf("logged %s\nwant %s", logged, want)
		}
	}
	failure, _ := b.fail("patch")
	if text := failure.Error(); !strings.Contains(text, "no space left on device. Free space there") {
		t.Errorf("a step on a full disk fails with %s", text)
	}
}

func TestTheDiskFillsUpDuringARollback(t *testing.T) {
	t.Parallel()
	b := newDirty(t)
	b.config.RollbackCommands = true
	dir := b.smallRunDir()
	// One stream, and more than the log's last page has room for: what of it is missing
	// in the log does not depend on the order in which two streams arrive.
	fill := "git checkout -q -f HEAD && head -c 100000 /dev/zero > '" + dir + "/filled' 2> /dev/null; yes the last line | head -c 9000"
	b.plan(`[{"name": "rollback", "parameters": {"strategies": [{"type": "x", "commands": [["do", "` + fill + `"]]}]}}]`)
	_, outcome := b.succeed("rollback")
	same(t, "artifacts", paths(outcome), "")
	same(t, "file", b.text("policy.txt"), "policy\n")
	logged := b.logged.String()
	for _, want := range []string{"its log could not be written", "no space left on device", "the last line"} {
		if !strings.Contains(logged, want) {
			t.Errorf("logged %s\nwant %s", logged, want)
		}
	}
}
