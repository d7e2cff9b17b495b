//go:build linux && !arm

package artifacts_test

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"unsafe"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
)

// However long a log is, little of it waits to be written to disk.
func TestALongLogIsWrittenWhileItGrows(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	const length, most = 64 << 20, 24 << 20
	if waiting := onlyInCache(t, folder, length); waiting < length/2 {
		t.Skipf("the file system or the machine writes by itself: of %d bytes %d wait", length, waiting)
	}
	dir, err := artifacts.Open(filepath.Join(folder, "run"), artifacts.NewRedactor(nil))
	if err != nil {
		t.Fatal(err)
	}
	log, err := dir.Log("build.log")
	if err != nil {
		t.Fatal(err)
	}
	defer log.Discard()
	output := log.Output()
	line := append(make([]byte, 32<<10-1), '\n')
	for i := range line[:len(line)-1] {
		line[i] = 'x'
	}
	for range length / len(line) {
		_, _ = output.Stdout.Write(line)
	}
	output.Close()
	if waiting := dirty(t, filepath.Join(folder, "run", "build.log")); waiting > most {
		t.Errorf("of %d bytes %d wait to be written", length, waiting)
	}
}

// onlyInCache writes a file of zeros without a sync and returns how much of it waits to be
// written to disk.
func onlyInCache(t *testing.T, folder string, length int) int {
	name := filepath.Join(folder, "zeros")
	if err := os.WriteFile(name, make([]byte, length), 0o600); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(name)
	return dirty(t, name)
}

// dirty returns how many bytes of a file the system has in its cache and has not begun to
// write to disk, by cachestat(2).
func dirty(t *testing.T, name string) int {
	const cachestat = 451
	file, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var all [2]uint64 // from the beginning to the end
	var stat struct{ Cache, Dirty, Writeback, Evicted, RecentlyEvicted uint64 }
	_, _, errno := syscall.Syscall6(cachestat, file.Fd(), uintptr(unsafe.Pointer(&all)), uintptr(unsafe.Pointer(&stat)), 0, 0, 0)
	if errno != 0 {
		t.Skip("cachestat needs Linux 6.5:", errno)
	}
	return int(stat.Dirty) * os.Getpagesize()
}
