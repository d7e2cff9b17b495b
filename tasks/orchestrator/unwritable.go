package orchestrator

import (
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
)

// A rollback must not depend on the run's directory: if that cannot be written, its
// artifacts go to a directory of their own, and from there to the worker's log. The
// step registers none of them.

const elsewherePrefix = "mm-orchestrator-rollback-"

// elsewhere are the folders of such directories.
func elsewhere() []string { return []string{os.TempDir(), "/dev/shm"} }

// lockFolder locks a folder as long as the file is open and its process lives. It fails
// if somebody else has locked it.
func lockFolder(dir string) (*os.File, error) {
	file, err := os.OpenFile(dir, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = file.Close()
		return nil, err
	}
	return file, nil
}

// removeElsewhere removes directories that workers have left which were killed in a
// rollback.
func removeElsewhere() {
	for _, parent := range elsewhere() {
		left, _ := filepath.Glob(filepath.Join(parent, elsewherePrefix+"*")) // the pattern is a good one
		for _, dir := range left {
			info, err := os.Lstat(dir)
			if err != nil || time.Since(info.ModTime()) < time.Minute {
				continue // it may not be locked yet
			}
			if lock, err := lockFolder(dir); err == nil {
				_ = os.RemoveAll(dir)
				_ = lock.Close()
			}
		}
	}
}

// openElsewhere opens such a directory: where temporary files are, or in memory if the
// disk with these is full, too. why is what is wrong with the run's.
func (s *stepRun) openElsewhere(why error) *Failure {
	for _, parent := range elsewhere() {
		dir, err := os.MkdirTemp(parent, elsewherePrefix)
		if err != nil {
			continue
		}
		lock, err := lockFolder(dir)
		if err == nil {
			s.dir, err = artifacts.Open(dir, s.config.Redactor)
		}
		if err != nil {
			_ = os.RemoveAll(dir)
			_ = lock.Close() // nil for none
			continue
		}
		s.elsewhere, s.elsewhereLock = dir, lock
		s.log.Error("rollback goes on without the run's directory: its log follows in this log", "error", why)
		return nil
	}
	return artifactError(why)
}

// logElsewhere logs the artifacts of such a directory, and removes it.
func (s *stepRun) logElsewhere() {
	_ = filepath.WalkDir(s.elsewhere, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return nil
		}
		if text, err := os.ReadFile(path); err == nil {
			s.log.Warn("artifact that is not in the run's directory", "name", entry.Name(), "text", cut(string(text)))
		}
		return nil
	})
	_ = os.RemoveAll(s.elsewhere)
	_ = s.elsewhereLock.Close()
}
