package worker

import (
	"context"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// A ResultBackend keeps the results of tasks where Python's AsyncResult finds
// them.
type ResultBackend interface {
	// Store writes all results in one transaction and says for each, in the
	// same order, whether it was written: a stored SUCCESS stays, whatever
	// comes later (docs/celery.md#publish-store-acknowledge).
	//
	// An error means that nothing was written. It is retried by the engine
	// unless it is permanent (see [Permanent]).
	Store(ctx context.Context, results ...protocol.Result) (written []bool, err error)
}
