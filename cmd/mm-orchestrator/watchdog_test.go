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
		checks: []healthCheck{
			{name: "the database", limit: 30 * time.Millisecond, check: func(context.Context) error {
				if broken.Load() {
					return errors.New("database is unreachable")
				}
				return nil
			}},
			{name: "the engine", optional: true, check: func(context.Context) error {
				if engineBroken.Load() {
					return errors.New("engine is unreachable")
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
	// An optional check that never succeeded does not count.
	time.Sleep(20 * time.Millisecond)
	is("")
	broken.Store(true)
	begin := time.Now()
	is("database is unreachable")
	if took := time.Since(begin); took < 20*time.Millisecond {
		t.Errorf("unhealthy after %v, before the limit", took)
	}
	eventually(t, "the log has the reason", func() error {
		if !strings.Contains(log.String(), "database is unreachable") {
			return errors.New(log.String())
		}
		return nil
	})
	broken.Store(false)
	is("")
	engineBroken.Store(false)
	eventually(t, "the engine check succeeded", func() error {
		w.mu.Lock()
		defer w.mu.Unlock()
		if !w.states[1].succeeded {
			return errors.New("not yet")
		}
		return nil
	})
	engineBroken.Store(true)
	is("engine is unreachable")
	engineBroken.Store(false)
	is("")
	eventually(t, "the log has one line for each change", func() error {
		if n := strings.Count(log.String(), "\n"); n != 4 {
			return errors.New(log.String())
		}
		return nil
	})
}

// A check that never returns counts as a failure, and is not started again.
func TestHangingCheck(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	var looks atomic.Int32
	w := &watchdog{
		interval: time.Millisecond, log: slog.New(slog.DiscardHandler),
		checks: []healthCheck{{name: "the hanging check", check: func(context.Context) error {
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
		if err := w.health(); err == nil || !strings.Contains(err.Error(), "the hanging check does not answer") {
			return fmt.Errorf("health is %v", err)
		}
		return nil
	})
	if n := looks.Load(); n != 1 {
		t.Errorf("%d calls at once", n)
	}
	close(release)
	eventually(t, "healthy again", w.health)
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
