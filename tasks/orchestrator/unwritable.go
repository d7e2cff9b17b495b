package orchestrator

import (
	"io/fs"
	"os"
	"path/filepath"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
)

// A rollback must not depend on the run's directory: if that cannot be written, its
// artifacts go to a directory of their own, and from there to the worker's log. The
// step registers none of them.

// openElsewhere opens such a directory: where temporary files are, or in memory if the
// disk with these is full, too. why is what is wrong with the run's.
func (s *stepRun) openElsewhere(why error) *Failure {
	for _, parent := range []string{os.TempDir(), "/dev/shm"} {
		dir, err := os.MkdirTemp(parent, "mm-orchestrator-rollback-")
		if err != nil {
			continue
		}
		if s.dir, err = artifacts.Open(dir, s.config.Redactor); err != nil {
			_ = os.RemoveAll(dir)
			continue
		}
		s.elsewhere = dir
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
}
