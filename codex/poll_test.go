package codex

import (
	"testing"
	"time"
)

func TestPausesBecomeLonger(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		n      int
		chance float64
		want   time.Duration
	}{
		{0, 0, 2500 * time.Millisecond}, {0, 1, 5 * time.Second}, {1, 1, 10 * time.Second}, {4, 1, 80 * time.Second},
		{5, 1, 2 * time.Minute}, {29, 0, time.Minute}, {1000, 0.5, 90 * time.Second},
	} {
		if got := pollPause(c.n, 5*time.Second, 2*time.Minute, c.chance); got != c.want {
			t.Errorf("pause %d with chance %v is %s, want %s", c.n, c.chance, got, c.want)
		}
	}
}
