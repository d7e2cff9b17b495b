package chaos

import (
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// A worker that is alone on its queue cannot reach either server for longer than a
// takeover needs, while its command runs: the command runs once, and the run
// succeeds.
func TestBlackout(t *testing.T) {
	t.Parallel()
	config := Config{Module: "../..", Folder: t.TempDir()}.WithDefaults()
	var err error
	if config.programs, err = buildPrograms(t.Context(), config.Module, config.Folder); err != nil {
		t.Fatal(err)
	}
	for _, f := range []fault{reset, stall} {
		t.Run(string(f), func(t *testing.T) {
			t.Parallel()
			l, err := newLane(t.Context(), &config, "blackout-"+string(f), false)
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := l.close(t.Context()); err != nil {
					t.Error(err)
				}
			}()
			o := l.runTrial(t.Context(), Trial{Kind: Blackout, Shape: shape{Milliseconds: 2500}, Stages: []stage{
				{Point: faultpoint.CommandBefore, Step: "build", Do: breakBoth, Fault: f, For: 6 * time.Second, Alone: true}}})
			for _, p := range o.problems {
				t.Error(p)
			}
			if o.missed > 0 {
				t.Error("the point was not reached")
			}
		})
	}
}
