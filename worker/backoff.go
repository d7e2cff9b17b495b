package worker

import (
	"context"
	"math/rand/v2"
	"time"
)

const (
	backoffFirst = 50 * time.Millisecond
	backoffMost  = 10 * time.Second
	// redialMost is the longest pause between attempts to reach the broker. An
	// attempt costs a broker next to nothing, and a worker has to consume
	// within 2 s after its broker is back, however long it was gone.
	redialMost = time.Second
)

// insistMost is the longest pause between attempts to store or publish an
// outcome: its task holds a slot meanwhile.
const insistMost = 2 * time.Second

// backoff is the pause after the given number of failures, from 1: doubled
// each time and capped.
func backoff(failures int) time.Duration {
	d := backoffFirst
	for range failures - 1 {
		if d *= 2; d >= backoffMost {
			return backoffMost
		}
	}
	return d
}

// redialPause is the pause after the given number of failures, from 1, to reach
// the broker.
func redialPause(failures int) time.Duration {
	return jitter(min(backoff(failures), redialMost))
}

// jitter takes up to half off, so that many workers do not come back at once.
func jitter(d time.Duration) time.Duration {
	return d - time.Duration(rand.Int64N(int64(d)/2+1))
}

// sleep waits, or returns false when ctx ends first.
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
