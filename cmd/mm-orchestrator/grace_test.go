package main

import (
	"testing"
	"time"
)

func TestGraceIsSplitWithinTheLimit(t *testing.T) {
	t.Parallel()
	for _, whole := range []time.Duration{0, time.Millisecond, time.Second, 3 * time.Second, 50 * time.Second, time.Hour} {
		g := splitGrace(whole)
		if all := g.Finish + g.Stop; all > whole+time.Second {
			t.Errorf("%v: %+v takes %v", whole, g, all)
		}
		if g.Finish < 0 || g.Kill <= 0 || g.Kill > g.Stop/2 {
			t.Errorf("%v: %+v", whole, g)
		}
	}
	if g := splitGrace(50 * time.Second); g != (grace{40 * time.Second, 10 * time.Second, 5 * time.Second}) {
		t.Errorf("%+v", g)
	}
}
