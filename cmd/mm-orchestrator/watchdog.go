package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator/preflight"
)

// healthCheck checks one thing without which a worker cannot do its work.
type healthCheck struct {
	// name is the checked thing, as the subject of "does not answer".
	name string
	// limit is how long the check may fail before the worker is unhealthy.
	limit time.Duration
	// optional: failures count only after the check has succeeded once.
	optional bool
	// check returns what is wrong. It may ignore its context and hang; the watchdog
	// counts that as a failure.
	check func(ctx context.Context) error
}

// checkInterval is how often each check runs.
const checkInterval = 2 * time.Second

// timeout is how long one call of check may take before it counts as failed: the
// limit, but at least 1 s and at most 10 s.
func (h healthCheck) timeout() time.Duration { return min(max(h.limit, time.Second), 10*time.Second) }

// hangGrace is the time after timeout at which a call that ignores its context
// counts as failed.
const hangGrace = time.Second

// watchdog runs all checks in the background, so that a probe costs almost
// nothing, however often it comes. It logs one line when the worker becomes
// unhealthy, with the reason, and one when it is healthy again.
type watchdog struct {
	checks []healthCheck
	log    *slog.Logger
	// interval defaults to checkInterval.
	interval time.Duration

	mu        sync.Mutex
	states    []checkState // by index of checks; written by run and record
	unhealthy bool         // as last logged; written by health
}

// checkState is the latest result of a check.
type checkState struct {
	succeeded bool      // at least once
	since     time.Time // start of the first of the latest failures; zero if the latest call succeeded
	err       error
}

// run runs the checks until ctx ends. It does not wait for calls that hang.
func (w *watchdog) run(ctx context.Context) {
	w.mu.Lock()
	w.states = make([]checkState, len(w.checks))
	w.mu.Unlock()
	if w.interval == 0 {
		w.interval = checkInterval
	}
	var group sync.WaitGroup
	for i := range w.checks {
		group.Go(func() { w.watch(ctx, i) })
	}
	group.Wait()
}

// watch runs one check repeatedly. While a call hangs, which counts as a failure,
// it starts no other.
func (w *watchdog) watch(ctx context.Context, i int) {
	ticker := time.NewTicker(w.interval)
	defer ticker.Stop()
	limit := w.checks[i].timeout()
	for {
		began, result := time.Now(), make(chan error, 1)
		go func() {
			checkCtx, cancel := context.WithTimeout(ctx, limit)
			defer cancel()
			result <- w.checks[i].check(checkCtx)
		}()
		hanging := time.NewTimer(limit + hangGrace)
		for waiting := true; waiting; {
			select {
			case err := <-result:
				waiting = false
				if ctx.Err() == nil {
					w.record(i, began, err)
				}
			case <-hanging.C:
				w.record(i, began, fmt.Errorf("%s does not answer", w.checks[i].name))
			case <-ctx.Done():
				hanging.Stop()
				return
			case <-ticker.C:
				_ = w.health() // logs a limit that has passed meanwhile
			}
		}
		hanging.Stop()
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// record stores the result of a call that began at a time.
func (w *watchdog) record(i int, began time.Time, err error) {
	w.mu.Lock()
	state := &w.states[i]
	switch {
	case err == nil:
		*state = checkState{succeeded: true}
	case state.since.IsZero():
		state.since, state.err = began, err
	default:
		state.err = err
	}
	w.mu.Unlock()
	_ = w.health()
}

// health returns nil, or the reasons why the worker is unhealthy. It logs when
// that changes, so that the log has the reason that a probe was given. Another
// reason for the same state is not logged: texts contain times and would differ
// at each call.
func (w *watchdog) health() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	err := w.reasons()
	switch {
	case err == nil && w.unhealthy:
		w.unhealthy = false
		w.log.Info("worker is healthy again")
	case err != nil && !w.unhealthy:
		w.unhealthy = true
		w.log.Error("worker is unhealthy", "error", err)
	}
	return err
}

// reasons joins the failures that last longer than their limit. The caller has
// locked mu.
func (w *watchdog) reasons() error {
	var reasons []string
	for i, state := range w.states {
		check := w.checks[i]
		if state.since.IsZero() || check.optional && !state.succeeded {
			continue
		}
		if lasted := time.Since(state.since); lasted >= check.limit {
			reason := state.err.Error()
			if check.limit > 0 {
				reason = fmt.Sprintf("for %s: %s", lasted.Round(time.Second), reason)
			}
			reasons = append(reasons, reason)
		}
	}
	if len(reasons) == 0 {
		return nil
	}
	return errors.New(strings.Join(reasons, "; "))
}

// diskSpace returns an error if the file system of dir has less than least bytes
// free. reserve is the name of the setting.
func diskSpace(dir string, least uint64, reserve string) error {
	free, err := preflight.FreeSpace(dir)
	if err != nil {
		return fmt.Errorf("free space of artifact root %s is unknown: %w", dir, err)
	}
	if free < least {
		return fmt.Errorf("file system of artifact root %s has %s free, less than the %s required by %s", dir, mebibytes(free), mebibytes(least), reserve)
	}
	return nil
}

func mebibytes(n uint64) string { return fmt.Sprintf("%d MiB", n>>20) }
