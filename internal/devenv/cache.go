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

// cache is the user's folder of things that are slow to make. It is shared by
// all clones; a lock per entry keeps two runs from making the same thing.
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

// lock waits until no other run holds the named lock. The kernel frees it when
// its holder dies, so a killed run blocks nobody.
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
			return nil, fmt.Errorf("another run holds %s for too long: %w", file.Name(), err)
		}
		return nil, err
	}
	return func() { file.Close() }, nil
}

// replace puts the finished file or folder made at temporary in the place of
// target, so that nobody sees half of it.
func replace(temporary, target string) error {
	err := os.Rename(temporary, target)
	if err == nil {
		return nil
	}
	// A folder cannot be renamed over one that is not empty.
	old := temporary + ".old"
	if err := os.Rename(target, old); err != nil {
		return fmt.Errorf("replace %s: %w", target, err)
	}
	if err := os.Rename(temporary, target); err != nil {
		return fmt.Errorf("replace %s: %w", target, err)
	}
	return os.RemoveAll(old)
}
