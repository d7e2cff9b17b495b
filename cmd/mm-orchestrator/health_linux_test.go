package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator/preflight"
)

// A full disk makes the worker unhealthy at once, until there is space again.
func TestHealthFollowsTheDisk(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	dir, reserve, fill := smallDisk(t)
	p := start(t, append(s.env(), "ARTIFACTS_ROOT="+dir, fmt.Sprintf("MM_ORCHESTRATOR_DISK_RESERVE=%d", reserve)), "worker").probedWorker()
	p.waitHealthy()
	empty := fill()
	p.waitUnhealthy("file system of artifact root " + dir)
	empty()
	p.waitHealthy()
	p.loggedOnce("MM_ORCHESTRATOR_DISK_RESERVE")
	// There is no time limit to speak of: it counts at once.
	if reason := p.logLine(unhealthyLine)["error"]; strings.HasPrefix(fmt.Sprint(reason), "for ") {
		t.Errorf("the log says %q", reason)
	}
}

// smallDisk is a file system of 64 MiB where we may mount one, else the one of
// temporary files; fill takes so much of it that less than the reserve, in
// MiB, is left.
func smallDisk(t *testing.T) (dir string, reserve int, fill func() (empty func())) {
	t.Helper()
	dir = t.TempDir()
	size := int64(56 << 20)
	reserve = 16
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"); err == nil {
		t.Cleanup(func() {
			if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
	} else {
		// Leaves a margin for what other processes write meanwhile.
		free, err := preflight.FreeSpace(dir)
		if err != nil {
			t.Fatal(err)
		}
		if size = 2 << 30; free < 4<<30 {
			t.Fatalf("%s has %s left, this test needs 4 GiB, or the right to mount a file system", dir, mebibytes(free))
		}
		reserve = int(free>>20) - 1<<10
	}
	file := filepath.Join(dir, "ballast")
	return dir, reserve, func() func() {
		f, err := os.Create(file)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := syscall.Fallocate(int(f.Fd()), 0, 0, size); err != nil {
			t.Fatal(err)
		}
		return func() {
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
		}
	}
}
