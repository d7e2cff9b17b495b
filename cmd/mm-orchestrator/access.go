package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
)

// Checks of what a worker needs from its databases only while steps run:
// connections for all steps at once, and privileges on every table that the
// end of a step writes. Without these checks a worker would report itself
// ready and then return every message to the queue.

// connectionsPerStore is the size of a connection pool: one connection for each
// step that may end at the same time, and one for health probes.
func (c *configuration) connectionsPerStore() int { return c.Concurrency + 1 }

// cureAccess adds the cure to an error of one of these checks.
func cureAccess(err error) error {
	var few *store.TooFewConnections
	var missing *store.MissingPrivileges
	switch {
	case errors.As(err, &few):
		return &curedError{err, few.Cure}
	case errors.As(err, &missing):
		return &curedError{err, "As the owner of the tables, run: " + missing.Grant}
	}
	return err
}

// checkConnections checks that a worker can open all its connections at the
// same time. It retries for up to wait while other clients use them, and calls
// report once, before the first pause.
func checkConnections(ctx context.Context, tables, results *store.Store, wait time.Duration, report func(what string, err error)) error {
	deadline := time.Now().Add(wait)
	pause := 250 * time.Millisecond
	for reported := false; ; pause = min(2*pause, 3*time.Second) {
		err := store.CheckConnections(ctx, tables, results)
		if err == nil || !errors.Is(err, store.ErrUnavailable) || time.Until(deadline) < pause {
			return cureAccess(err)
		}
		if !reported {
			report(fmt.Sprintf("waiting up to %s for free database connections", shortDuration(wait)), err)
			reported = true
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}
