package results

import (
	"context"
	"time"
)

// StartCounter is a [Backend] that also counts durably how often a task was started
// without an end, so that a worker can end a task that kills its worker again and again:
// see worker.MaxStarts. A backend need not be one: Celery's have no place for it.
type StartCounter interface {
	Backend
	// CountsStarts returns why the backend cannot count, or nil.
	CountsStarts() error
	// CountStart records that an attempt begins, and returns how often it has begun, this
	// time included, since it was last forgotten. An error means that it may or may not be
	// recorded: the worker then calls it again with the same Start, which is one start.
	CountStart(ctx context.Context, s Start) (starts int, err error)
	// ForgetStarts removes what is recorded of an attempt that has ended in an orderly way.
	// It is no error if there is nothing.
	ForgetStarts(ctx context.Context, s Start) error
}

// Start says which attempt of a task begins, and where.
type Start struct {
	TaskID string
	// Attempt tells the attempts of a task apart: retries, and tasks that replace it.
	Attempt string
	// Worker is the node name. ForgetStarts does not use it.
	Worker string
	// At is when it begins. It also tells two starts of an attempt apart: calls of CountStart
	// with the same Worker and At are for the same start. If it is zero, each call is for
	// another one. ForgetStarts does not use it.
	At time.Time
}
