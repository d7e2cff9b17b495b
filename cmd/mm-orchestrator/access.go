package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
)

// What a worker needs of its databases only once steps run: connections for
// all of them at once, and rights to every table that a step's end writes.
// Without a look at the start it would say that it is ready, and hand every
// step back.

// connectionsPerStore is the size of a worker's pool: a connection for each
// step that may end at the same time, and one for probes.
func (c *configuration) connectionsPerStore() int { return c.Concurrency + 1 }

// cureAccess completes an error of one of these checks.
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

// checkConnections waits, as long as wait says, for connections that others
// use. say is told once.
func checkConnections(ctx context.Context, tables, results *store.Store, wait time.Duration, say func(what string, err error)) error {
	deadline := time.Now().Add(wait)
	pause := 250 * time.Millisecond
	for said := false; ; pause = min(2*pause, 3*time.Second) {
		err := store.CheckConnections(ctx, tables, results)
		if err == nil || !errors.Is(err, store.ErrUnavailable) || time.Until(deadline) < pause {
			return cureAccess(err)
		}
		if !said {
			say(fmt.Sprintf("waiting up to %s for connections to the database", wait), err)
			said = true
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}
