package chaos

import (
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

func TestOutagesAreFollowedToTheirEnd(t *testing.T) {
	t.Parallel()
	const lost, back = faultpoint.ConnectionLost, faultpoint.ConnectionRestored
	at := func(seconds float64) time.Time { return time.Unix(1000, int64(seconds*1e9)) }
	type turn struct {
		point   faultpoint.Point
		seconds float64
	}
	for name, c := range map[string]struct {
		cause   fault
		certain bool
		turns   []turn
		noticed bool
		took    time.Duration
		over    bool
	}{
		"nothing yet":                    {reset, true, nil, false, 0, false},
		"not to be noticed":              {slow, false, nil, false, 0, true},
		"lost and not back":              {reset, true, []turn{{lost, 1}}, true, 0, false},
		"lost and back":                  {reset, true, []turn{{lost, 1}, {back, 3.5}}, true, 1500 * time.Millisecond, true},
		"noticed at the end":             {stall, true, []turn{{lost, 2.1}, {back, 2.5}}, true, 500 * time.Millisecond, true},
		"back before its end":            {slow, false, []turn{{lost, 1}, {back, 1.5}}, true, 0, true},
		"slow, lost and not back":        {slow, false, []turn{{lost, 1}}, true, 0, false},
		"noticed by heartbeats":          {hole, true, []turn{{lost, 5}, {back, 5.25}}, true, 250 * time.Millisecond, true},
		"noticed by heartbeats meantime": {hole, true, []turn{{lost, 1}, {back, 2.25}}, true, 250 * time.Millisecond, true},
		"lost before":                    {reset, true, []turn{{lost, -1}, {back, -0.5}}, false, 0, false},
		"a first session":                {reset, false, []turn{{back, 2.5}}, false, 0, true},
	} {
		x := outage{peer: toBroker, cause: string(c.cause), pid: 7, at: at(0), over: at(2), certain: c.certain}
		moments := []moment{{At: at(2.05).UnixNano(), PID: 8, Point: back}}
		for _, turn := range c.turns {
			moments = append(moments, moment{At: at(turn.seconds).UnixNano(), PID: 7, Point: turn.point})
		}
		r, over := x.follow(moments)
		if r.noticed != c.noticed || r.took != c.took || over != c.over {
			t.Errorf("%s: noticed %t, took %s, over %t; want %t, %s, %t", name, r.noticed, r.took, over, c.noticed, c.took, c.over)
		}
	}
}
