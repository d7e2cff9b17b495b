// Package results says what a result backend is: the place where a worker stores how
// a task ended, and where Python's AsyncResult and package client read it.
// Package results/postgres is Celery's db+postgresql:// backend.
//
// An [Outcome] is Celery's "meta" of a task (docs/celery.md#states-and-exceptions).
// A backend stores what it has a place for, and leaves the rest out. So far there is
// db+postgresql; the other columns are what Celery's backends of that name store:
//
//	                     db+postgresql     django-db     redis            rpc
//	value, exception     yes               yes           yes              yes
//	children, stamps     Celery 5.7        no            children         children
//	task, args, worker   result_extended   yes           result_extended  result_extended
//	group, parent        no                no            yes              yes
//	reply_to             no                no            no               destination
//	expiry               [Cleaner]         by Django     EXPIRE           of the queue
//
// # Guarantees of every backend
//
//   - The first SUCCESS of a task stays. Store reports for each outcome whether it
//     was written.
//   - Store writes all its outcomes or none.
//   - Many goroutines may call all methods at once.
//   - An error that no retry can mend, such as an id that is longer than the column,
//     is marked by [Permanent]. Every other error is worth a retry.
package results

import (
	"context"
	"errors"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Outcome is the state of a task with its value or exception.
type Outcome = protocol.Result

// Backend stores and returns the outcomes of tasks.
type Backend interface {
	// Store writes all outcomes in one transaction. It reports for each, in the
	// same order, whether it was written: a stored SUCCESS is never overwritten
	// (docs/celery.md#publish-store-acknowledge).
	//
	// An error means that no outcome was written.
	Store(ctx context.Context, outcomes ...Outcome) (written []bool, err error)
	// Load returns the stored outcomes in the order of the ids. A task of which
	// nothing is stored is PENDING: a backend does not know whether it was sent.
	Load(ctx context.Context, taskIDs ...string) ([]Outcome, error)
	// Wait returns the outcome of a task once its state is final: SUCCESS, FAILURE
	// or REVOKED. It returns the error of ctx when that ends first.
	Wait(ctx context.Context, taskID string) (Outcome, error)
}

// IsFinal reports whether a task in this state has ended.
func IsFinal(state string) bool {
	return state == protocol.StateSuccess || state == protocol.StateFailure || state == protocol.StateRevoked
}

// Permanent marks an error of a [Backend] as permanent: the outcome can never be
// written, and a retry is of no use. A worker logs it and continues as if the
// outcome were stored. Permanent(nil) is nil.
func Permanent(err error) error {
	if err == nil {
		return nil
	}
	return &permanentError{err}
}

// IsPermanent reports whether err was marked by [Permanent].
func IsPermanent(err error) bool {
	var permanent *permanentError
	return errors.As(err, &permanent)
}

type permanentError struct{ err error }

func (e *permanentError) Error() string { return e.err.Error() }
func (e *permanentError) Unwrap() error { return e.err }
