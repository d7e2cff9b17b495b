package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// curedError adds to an error what its reader can do.
type curedError struct {
	err  error
	cure string
}

func (e *curedError) Error() string { return e.err.Error() + ". " + e.cure }
func (e *curedError) Unwrap() error { return e.err }

// databaseRole says which of the two databases an address is of, in the names
// of the variables that an operator can change.
type databaseRole struct{ what, variables string }

var (
	tablesDatabase  = databaseRole{"database", "POSTGRES_HOST, POSTGRES_PORT, POSTGRES_USER, POSTGRES_PASSWORD and POSTGRES_DB, or MM_ORCHESTRATOR_DATABASE_URL"}
	resultsDatabase = databaseRole{"result backend", "CELERY_RESULT_BACKEND"}
)

// cureDatabase completes an error of package store that came up when the
// database was opened.
func cureDatabase(role databaseRole, err error) error {
	switch {
	case errors.Is(err, store.ErrUnavailable):
		return &curedError{err, fmt.Sprintf("Is PostgreSQL running there? `mm-orchestrator config` shows the address, which comes from %s", role.variables)}
	case errors.Is(err, store.ErrRefused):
		return &curedError{err, fmt.Sprintf("Check %s", role.variables)}
	}
	return err
}

// openStore opens a database. One that cannot be reached is waited for as
// long as wait says; say is told once, when the waiting begins.
func openStore(ctx context.Context, config store.Config, role databaseRole, wait time.Duration, say func(string)) (*store.Store, error) {
	deadline := time.Now().Add(wait)
	pause := 250 * time.Millisecond
	for said := false; ; pause = min(2*pause, 3*time.Second) {
		s, err := store.Open(ctx, config)
		if err == nil || !errors.Is(err, store.ErrUnavailable) || time.Until(deadline) < pause {
			return s, cureDatabase(role, err)
		}
		if !said {
			say(fmt.Sprintf("waiting up to %s for the %s: %v", wait, role.what, err))
			said = true
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}

// resultsConfig is how Celery results are kept.
func (c *configuration) resultsConfig() store.ResultsConfig {
	encoding := protocol.EncodingPickle
	if c.ResultEncoding == "json" {
		encoding = protocol.EncodingJSON
	}
	return store.ResultsConfig{Encoding: encoding}
}

// resultsElsewhere says that results are kept in another database than the
// tables, or as another user, so that they need connections of their own.
func (c *configuration) resultsElsewhere() bool {
	return !c.Results.IsZero() && !sameDatabase(c.Results, c.Database())
}

func sameDatabase(a, b secret.String) bool {
	x, errX := url.Parse(a.Reveal())
	y, errY := url.Parse(b.Reveal())
	if errX != nil || errY != nil {
		return false
	}
	port := func(u *url.URL) string {
		if p := u.Port(); p != "" {
			return p
		}
		return "5432"
	}
	return x.Hostname() == y.Hostname() && port(x) == port(y) && x.Path == y.Path &&
		x.User.String() == y.User.String() && x.Query().Encode() == y.Query().Encode()
}
