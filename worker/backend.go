package worker

import (
	"context"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// A ResultBackend stores the results of tasks where Python's AsyncResult reads
// them. Many goroutines call it at once.
type ResultBackend interface {
	// Store writes all results in one transaction. It reports for each, in the
	// same order, whether it was written: a stored SUCCESS is never overwritten
	// (docs/celery.md#publish-store-acknowledge).
	//
	// An error means that no result was written. The worker retries, unless
	// the error is marked by [Permanent].
	Store(ctx context.Context, results ...protocol.Result) (written []bool, err error)
}
