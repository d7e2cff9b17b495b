// Package disklimit ends work whose directory takes too much room on the disk. A server
// or a program that is not trusted can write without end: a limit in time alone lets it
// fill the disk first.
package disklimit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"
)

// An Error says that a directory takes too much room.
type Error struct {
	Dir   string
	Limit int64
}

func (e *Error) Error() string {
	return fmt.Sprintf("%s takes more than %s of the disk", e.Dir, Text(e.Limit))
}

// Text writes a number of bytes.
func Text(n int64) string {
	for _, unit := range []struct {
		size int64
		name string
	}{{1 << 30, "GiB"}, {1 << 20, "MiB"}, {1 << 10, "KiB"}} {
		if n >= unit.size {
			return fmt.Sprintf("%.4g %s", float64(n)/float64(unit.size), unit.name)
		}
	}
	return fmt.Sprintf("%d bytes", n)
}

// entry is what each entry of a directory counts at least, in bytes: files without
// content use up what a file system has of them.
const entry = 4096

// Check returns an *Error if a directory takes more than limit bytes. What cannot be read
// counts as nothing: it may be removed at the same time. A directory that does not exist
// is empty.
func Check(dir string, limit int64) error {
	var total int64
	seen := map[file]bool{}
	over := errors.New("over")
	err := filepath.WalkDir(dir, func(_ string, found fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		info, err := found.Info()
		if err != nil {
			return nil
		}
		size, id, links := usage(info)
		if links > 1 && !found.IsDir() {
			if seen[id] {
				return nil
			}
			seen[id] = true
		}
		if total += max(size, entry); total > limit {
			return over
		}
		return nil
	})
	if err == nil && total+deleted(dir) > limit {
		err = over
	}
	if errors.Is(err, over) {
		return &Error{dir, limit}
	}
	return nil
}

// pause is the shortest time between two looks. Between them a fast disk takes some
// hundred megabytes.
const pause = 200 * time.Millisecond

// Watch returns a context that ends when a directory takes more than limit bytes, with
// an *Error as its cause. The directory need not exist yet. stop must be called; it
// returns when nobody looks any more.
func Watch(ctx context.Context, dir string, limit int64) (_ context.Context, stop func()) {
	watched, cancel := context.WithCancelCause(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		timer := time.NewTimer(pause)
		defer timer.Stop()
		for {
			select {
			case <-watched.Done():
				return
			case <-timer.C:
			}
			begin := time.Now()
			if err := Check(dir, limit); err != nil {
				cancel(err)
				return
			}
			// Of a large directory, looking must not become the main work.
			timer.Reset(max(pause, 4*time.Since(begin)))
		}
	}()
	return watched, func() {
		cancel(nil)
		<-ended
	}
}
