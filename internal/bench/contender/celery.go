package contender

import (
	_ "embed"
	"os"
	"path/filepath"
)

//go:embed celery_worker.py
var celeryWorker []byte

// WriteCelery writes the program of the Celery worker into a folder and returns
// its path.
func WriteCelery(folder string) (string, error) {
	path := filepath.Join(folder, "celery_worker.py")
	return path, os.WriteFile(path, celeryWorker, 0o644)
}
