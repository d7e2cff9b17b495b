package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestWatchdog(t *testing.T) {
	t.Parallel()
	var broken, engineBroken atomic.Bool
	engineBroken.Store(true)
	log := &lockedBuffer{}
	w := &watchdog{
		interval: time.Millisecond, log: slog.New(slog.NewTextHandler(log, nil)),
		vitals: []vital{
			{name: "the database", limit: 30 * time.Millisecond, look: func(context.Context) error {
				if broken.Load() {
					return errors.New("database is away")
				}
				return nil
			}},
			{name: "the engine", optional: true, look: func(context.Context) error {
				if engineBroken.Load() {
					return errors.New("engine is away")
				}
				return nil
			}},
		},
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); w.run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	is := func(want string) {
		t.Helper()
		eventually(t, "health is "+want, func() error {
			err := w.health()
			if want == "" && err == nil || want != "" && err != nil && strings.Contains(err.Error(), want) {
				return nil
			}
			return errors.New("not yet")
		})
	}
	// An engine that was never there is not missed.
	time.Sleep(20 * time.Millisecond)
	is("")
	broken.Store(true)
	begin := time.Now()
	is("database is away")
	if took := time.Since(begin); took < 20*time.Millisecond {
		t.Errorf("unwell after %v, before the limit", took)
	}
	eventually(t, "the log tells", func() error {
		if !strings.Contains(log.String(), "database is away") {
			return errors.New(log.String())
		}
		return nil
	})
	broken.Store(false)
	is("")
	engineBroken.Store(false)
	eventually(t, "the engine was seen", func() error {
		w.mu.Lock()
		defer w.mu.Unlock()
		if !w.states[1].seen {
			return errors.New("not yet")
		}
		return nil
	})
	engineBroken.Store(true)
	is("engine is away")
	engineBroken.Store(false)
	is("")
	eventually(t, "the log has one line for each change", func() error {
		if n := strings.Count(log.String(), "\n"); n != 4 {
			return errors.New(log.String())
		}
		return nil
	})
}

// A look that never returns is a failure, and is not begun again.
func TestALookThatHangs(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	var looks atomic.Int32
	w := &watchdog{
		interval: time.Millisecond, log: slog.New(slog.DiscardHandler),
		vitals: []vital{{name: "the deaf thing", look: func(context.Context) error {
			looks.Add(1)
			<-release
			return nil
		}}},
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); w.run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	eventually(t, "health says so", func() error {
		if err := w.health(); err == nil || !strings.Contains(err.Error(), "the deaf thing does not answer") {
			return fmt.Errorf("health is %v", err)
		}
		return nil
	})
	if n := looks.Load(); n != 1 {
		t.Errorf("%d looks at once", n)
	}
	close(release)
	eventually(t, "well again", w.health)
}

func TestDiskSpace(t *testing.T) {
	t.Parallel()
	dir := t.TempDir() + "/not/there/yet"
	if err := diskSpace(dir, 1, ""); err != nil {
		t.Error(err)
	}
	if err := diskSpace(dir, 1<<62, "MM_ORCHESTRATOR_DISK_RESERVE"); err == nil || !strings.Contains(err.Error(), "MM_ORCHESTRATOR_DISK_RESERVE") {
		t.Error(err)
	}
}
