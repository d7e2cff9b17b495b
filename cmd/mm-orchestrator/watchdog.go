package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// vital is something without which a worker cannot do its job.
type vital struct {
	// name is what it is called when it does not answer, as in "the broker's
	// consumer".
	name string
	// limit is how long it may be away before the worker counts as unwell.
	limit time.Duration
	// optional things count only once they have been there.
	optional bool
	// look says what is wrong. One that does not return is what the watchdog
	// is for.
	look func(ctx context.Context) error
}

// lookTime is how often everything is looked at.
const lookTime = 2 * time.Second

// lookLimit is how long one look may take before it counts as failed: as long
// as the thing may be away, within reason.
func (v vital) lookLimit() time.Duration { return min(max(v.limit, time.Second), 10*time.Second) }

// lookGrace is how much later a look is given up that ignores its end.
const lookGrace = time.Second

// watchdog looks at all vitals in the background, so that a probe costs
// nothing, however many ask. It logs when the worker becomes unwell, and why,
// and when it is well again.
type watchdog struct {
	vitals []vital
	log    *slog.Logger
	// interval defaults to lookTime.
	interval time.Duration

	mu     sync.Mutex
	states []vitalState // written by watch
	told   string       // the reason that was logged last; written by watch
}

type vitalState struct {
	seen  bool      // it was well at least once
	since time.Time // of the first failure in a row; zero if it is well
	err   error
}

// run watches until ctx ends. Looks that hang are left behind.
func (w *watchdog) run(ctx context.Context) {
	w.mu.Lock()
	w.states = make([]vitalState, len(w.vitals))
	w.mu.Unlock()
	if w.interval == 0 {
		w.interval = lookTime
	}
	var group sync.WaitGroup
	for i := range w.vitals {
		group.Go(func() { w.watch(ctx, i) })
	}
	group.Wait()
}

// watch looks at one vital. A look that does not return counts as a failure
// and is not begun a second time.
func (w *watchdog) watch(ctx context.Context, i int) {
	ticker := time.NewTicker(w.interval)
	defer ticker.Stop()
	limit := w.vitals[i].lookLimit()
	for {
		began, result := time.Now(), make(chan error, 1)
		go func() {
			look, cancel := context.WithTimeout(ctx, limit)
			defer cancel()
			result <- w.vitals[i].look(look)
		}()
		late := time.NewTimer(limit + lookGrace)
		for waiting := true; waiting; {
			select {
			case err := <-result:
				waiting = false
				if ctx.Err() == nil {
					w.note(i, began, err)
				}
			case <-late.C:
				w.note(i, began, fmt.Errorf("%s does not answer", w.vitals[i].name))
			case <-ctx.Done():
				late.Stop()
				return
			case <-ticker.C:
				_ = w.health()
			}
		}
		late.Stop()
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// note keeps what a look that began at a time has found.
func (w *watchdog) note(i int, began time.Time, err error) {
	w.mu.Lock()
	state := &w.states[i]
	switch {
	case err == nil:
		*state = vitalState{seen: true}
	case state.since.IsZero():
		state.since, state.err = began, err
	default:
		state.err = err
	}
	w.mu.Unlock()
	_ = w.health()
}

// health is nil, or the reasons why the worker cannot do its job. Whoever is
// the first to see a change, a probe or a look, makes it logged: what a body
// has said is in the log as well. The wording of a reason, which may hold a
// time, is no change.
func (w *watchdog) health() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	err := w.reasons()
	switch {
	case err == nil && w.told != "":
		w.told = ""
		w.log.Info("worker is well again")
	case err != nil && w.told == "":
		w.told = err.Error()
		w.log.Error("worker cannot do its job, /healthz is red", "error", err)
	}
	return err
}

// reasons puts together what is wrong for too long. The caller holds mu.
func (w *watchdog) reasons() error {
	var reasons []string
	for i, state := range w.states {
		v := w.vitals[i]
		if state.since.IsZero() || v.optional && !state.seen {
			continue
		}
		if away := time.Since(state.since); away >= v.limit {
			reasons = append(reasons, fmt.Sprintf("for %s: %v", away.Round(time.Second), state.err))
		}
	}
	if len(reasons) == 0 {
		return nil
	}
	return errors.New(strings.Join(reasons, "; "))
}

// diskSpace says whether there is too little room where artifacts lie. reserve
// names the setting that demands it.
func diskSpace(dir string, least uint64, reserve string) error {
	free, err := freeSpace(dir)
	if err != nil {
		return fmt.Errorf("artifact root %s cannot be looked at: %w", dir, err)
	}
	if free < least {
		return fmt.Errorf("disk of artifact root %s has %s left, less than the %s of %s", dir, mebibytes(free), mebibytes(least), reserve)
	}
	return nil
}

// freeSpace is what this user may still write to the file system of dir, or
// of its nearest parent that exists. Where no more files may be made it is 0.
func freeSpace(dir string) (uint64, error) {
	for {
		var stat syscall.Statfs_t
		err := syscall.Statfs(dir, &stat)
		switch {
		case err == nil && stat.Files > 0 && stat.Ffree == 0:
			return 0, nil
		case err == nil:
			return uint64(stat.Bavail) * uint64(stat.Bsize), nil
		case !errors.Is(err, os.ErrNotExist) || dir == filepath.Dir(dir):
			return 0, err
		}
		dir = filepath.Dir(dir)
	}
}

func mebibytes(n uint64) string { return fmt.Sprintf("%d MiB", n>>20) }
