package store

import (
	"errors"

	"github.com/moonladderstudios/mm-orchestrator/internal/database"
)

// Kinds of errors, for errors.Is. Every error of this package is an [*Error] with
// one of these or with none, a type of its own that unwraps to one of these, or
// wraps the error of the caller's context.
var (
	// ErrNotFound: there is no such row.
	ErrNotFound = database.ErrNotFound
	// ErrUnavailable: the database cannot be reached, is starting, stopping or
	// read-only, lacks a connection, memory or disk space, or ended the statement
	// for a limit, an operator or another transaction. A later try may succeed; most
	// methods have already retried for Config.RetryFor.
	ErrUnavailable = database.ErrUnavailable
	// ErrClaimLost: another worker has the claim, or the step was retried under a
	// new attempt. Nothing was changed.
	ErrClaimLost = errors.New("claim lost")
	// ErrLocked: another session has locked a row, and this call does not wait
	// for it. Nothing was changed.
	ErrLocked = errors.New("row locked")
	// ErrNotLost: a worker of this program ends the run. Nothing was changed.
	ErrNotLost = errors.New("run not lost")
	// ErrSchema: a table, column or type is missing or not as expected.
	ErrSchema = database.ErrSchema
	// ErrInvalid: a value is malformed, or the tables cannot store it.
	ErrInvalid = database.ErrInvalid
	// ErrRefused: the database refused the role, the password or a privilege.
	ErrRefused = database.ErrRefused
)

// Error is an error of this package. Its Kind is one of the sentinels above, or
// nil for any other error of the database. It does not wrap the driver's error,
// so that no caller depends on the driver.
type Error = database.Error

func failure(kind error, format string, args ...any) *Error {
	return database.Failure(kind, format, args...)
}

// translate turns an error of the driver into one of this package. doing completes
// the sentence "cannot …". Our own errors pass, and those of a context stay
// recognisable.
func translate(doing string, err error) error {
	var own *Error
	var difference *SchemaDifference
	var used *SchemaInUseError
	switch {
	case errors.As(err, &own), errors.As(err, &difference), errors.As(err, &used):
		return err
	case errors.Is(err, errNoSession):
		return failure(ErrUnavailable, "cannot %s: %v", doing, err)
	}
	return withCure(database.Translate(doing, err))
}

// withCure adds what to do to an error about a missing table or column.
func withCure(err error) error {
	var own *Error
	if errors.As(err, &own) && own.Kind == ErrSchema {
		return own.With("; run `mm-orchestrator migrate`")
	}
	return err
}

func oneLine(text string) string { return database.OneLine(text) }

// lockNotAvailable is the SQLSTATE of NOWAIT and of lock_timeout.
const lockNotAvailable = database.LockNotAvailable
