package chaos

import (
	"slices"
	"testing"
)

// Every trial runs once, and those that stop servers run in the lane with its own.
func TestLanesShareTheTrials(t *testing.T) {
	t.Parallel()
	for _, kinds := range [][]Kind{Kinds, {Restart}, {KillAtPoint}, {Stop, Restart, Restart}} {
		c := &campaign{config: &Config{Kinds: kinds, Trials: 100, Lanes: 4, Only: -1}}
		shared, own := c.count()
		var taken []int
		for _, lane := range []struct {
			own bool
			n   int
		}{{true, own}, {false, shared}} {
			if lane.n == 0 {
				continue
			}
			for {
				n, ok := c.nextTrial(lane.own)
				if !ok {
					break
				}
				if got := c.kind(n).needsOwnServers(); got != lane.own {
					t.Errorf("trial %d (%s) was taken by a lane with own servers: %t", n, c.kind(n), lane.own)
				}
				taken = append(taken, n)
			}
		}
		slices.Sort(taken)
		if len(taken) != 100 || len(slices.Compact(taken)) != 100 {
			t.Errorf("%v: %d trials were taken, want 100, each once", kinds, len(taken))
		}
	}
}
