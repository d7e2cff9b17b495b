package devenv

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// cache is a folder in the user's cache for things that take long to build. All
// clones share it. A lock per entry prevents two runs from building the same
// thing at once.
type cache struct{ dir string }

func openCache() (*cache, error) {
	base, err := os.UserCacheDir()
	if err != nil {
		return nil, fmt.Errorf("no cache folder: %w; set HOME or XDG_CACHE_HOME", err)
	}
	c := &cache{dir: filepath.Join(base, "mm-orchestrator")}
	for _, name := range []string{"bin", "python", "locks", "services"} {
		if err := os.MkdirAll(filepath.Join(c.dir, name), 0o755); err != nil {
			return nil, fmt.Errorf("cache folder: %w", err)
		}
	}
	return c, nil
}

func (c *cache) path(parts ...string) string {
	return filepath.Join(append([]string{c.dir}, parts...)...)
}

// lock waits until no other run has the named lock. The kernel frees a lock
// when its process ends, so a killed run blocks no other.
func (c *cache) lock(ctx context.Context, name string) (unlock func(), err error) {
	file, err := os.OpenFile(c.path("locks", name), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("cache lock: %w", err)
	}
	err = until(ctx, 15*time.Minute, nil, func(context.Context) error {
		return syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	})
	if err != nil {
		file.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("another run has had the lock %s for too long: %w", file.Name(), err)
		}
		return nil, err
	}
	return func() { file.Close() }, nil
}

// replace renames the finished file or folder temporary to target, so that no
// other run sees an incomplete one.
func replace(temporary, target string) error {
	err := os.Rename(temporary, target)
	if err == nil {
		return nil
	}
	// rename(2) cannot replace a folder that is not empty.
	old := temporary + ".old"
	if err := os.Rename(target, old); err != nil {
		return fmt.Errorf("replace %s: %w", target, err)
	}
	if err := os.Rename(temporary, target); err != nil {
		return fmt.Errorf("replace %s: %w", target, err)
	}
	return os.RemoveAll(old)
}
