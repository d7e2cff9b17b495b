package orchestrator

import (
	"context"
	"errors"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// firstRetryPause is the pause before the second call of retryWrite.
const firstRetryPause = 100 * time.Millisecond

// retryWrite calls write until it returns true, for a record that must not be
// lost. The pauses between the calls double from firstRetryPause to longest. It
// returns false if ctx has ended after a call that returned false; ctx does not
// interrupt write, which bounds itself.
func retryWrite(ctx context.Context, longest time.Duration, write func() (done bool)) bool {
	for pause := min(firstRetryPause, longest); !write(); pause = min(2*pause, longest) {
		if !pauseFor(ctx, pause) {
			return false
		}
	}
	return true
}

// pauseFor waits for d, or until ctx ends. It says whether ctx goes on.
func pauseFor(ctx context.Context, d time.Duration) bool {
	defer stall.FromContext(ctx).Wait()()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}

// mayRecover says that the same write may succeed later: the database is
// unavailable or slow, or lacks a table that an operator can create again.
func mayRecover(err error) bool {
	return errors.Is(err, store.ErrUnavailable) || errors.Is(err, store.ErrSchema) || errors.Is(err, context.DeadlineExceeded)
}

// isFinal says that the end of a step can never be recorded: the run is gone or the
// step is not this worker's any more, or the tables or the database refuse it. For
// any other error, also one that the store does not know, the same write may succeed
// once an operator has removed its cause.
func isFinal(err error) bool {
	return errors.Is(err, store.ErrClaimLost) || errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrInvalid) || errors.Is(err, store.ErrRefused)
}
