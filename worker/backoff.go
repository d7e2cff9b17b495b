package worker

import (
	"context"
	"math/rand/v2"
	"time"
)

const (
	backoffMin = 50 * time.Millisecond
	backoffMax = 10 * time.Second
	// redialPauseMax is the longest pause between attempts to connect. It is short
	// because a worker has to consume within 2 s after its broker accepts
	// connections again, however long the outage was, and because an attempt
	// costs the broker next to nothing.
	redialPauseMax = time.Second
)

// retryPauseMax is the longest pause between attempts to publish or store an
// outcome. It is short because the task occupies a slot meanwhile.
const retryPauseMax = 2 * time.Second

// backoff returns the pause after the given number of failures, at least 1. It
// starts at backoffMin and doubles up to backoffMax.
func backoff(failures int) time.Duration {
	d := backoffMin
	for range failures - 1 {
		if d *= 2; d >= backoffMax {
			return backoffMax
		}
	}
	return d
}

// redialPause returns the pause after the given number of failed connection
// attempts, at least 1.
func redialPause(failures int) time.Duration {
	return jitter(min(backoff(failures), redialPauseMax))
}

// jitter subtracts a random part, up to half, so that many workers do not retry
// at the same moment.
func jitter(d time.Duration) time.Duration {
	return d - time.Duration(rand.Int64N(int64(d)/2+1))
}

// sleep waits for d. It returns false when ctx ends first.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
