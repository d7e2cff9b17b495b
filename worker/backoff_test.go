package worker

import (
	"testing"
	"time"
)

func TestBackoffDoublesUpToItsCap(t *testing.T) {
	for failures, want := range map[int]time.Duration{
		1: 50 * time.Millisecond, 2: 100 * time.Millisecond, 5: 800 * time.Millisecond, 8: 6400 * time.Millisecond,
		9: backoffMax, 1 << 20: backoffMax,
	} {
		if got := backoff(failures); got != want {
			t.Errorf("after %d failures: %v, want %v", failures, got, want)
		}
	}
	for range 1000 {
		if d := jitter(time.Second); d < time.Second/2 || d > time.Second {
			t.Fatalf("jitter gave %v", d)
		}
	}
}

func TestWorkerRedialsAtLeastEverySecond(t *testing.T) {
	for failures := 1; failures <= 1000; failures++ {
		if d := redialPause(failures); d <= 0 || d > time.Second {
			t.Fatalf("after %d failures the pause is %v, want at most 1 s", failures, d)
		}
	}
}
