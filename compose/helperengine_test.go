//go:build stack

package compose_test

import (
	"context"
	mathrand "math/rand/v2"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// TestHelperSurvivesTheEngine ends the engine at random moments of a replacement,
// in three ways. Afterwards the helper must go on: the old service runs if nobody
// confirms that the work goes on, and otherwise the new one or the old one. An engine
// whose program was killed ends its containers when it starts again, and does not
// always start them: then the helper puts the old one back. It needs root.
func TestHelperSurvivesTheEngine(t *testing.T) {
	ctx := t.Context()
	own, err := devenv.StartOwnEngine(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := own.Close(); err != nil {
			t.Error(err)
		}
	})
	for trial := range max(*kills, 6) {
		way := []string{"its program is killed", "the power fails", "it is stopped"}[trial%3]
		t.Run(way, func(t *testing.T) {
			confirmed := trial%2 == 0
			h := newHelped(t, own.Host, true)
			h.start()
			// Before the first event the worker starts the helper again.
			h.await("begun", func(s compose.HelperState) bool { return s.Begun })
			timer := time.NewTimer(time.Duration(mathrand.Int64N(int64(2500 * time.Millisecond))))
			<-timer.C
			switch trial % 3 {
			case 0:
				err = own.Crash(ctx)
			case 1:
				err = own.PowerOff()
			case 2:
				err = own.Stop()
			}
			h.must(err)
			if trial%3 != 0 {
				h.must(own.Start(context.Background()))
			}
			h.await("ended the command", func(s compose.HelperState) bool { return s.Ended })
			if confirmed {
				h.must(h.engine.Confirm(t.Context(), h.task.Name, "orchestrator@new"))
			}
			state := h.await("ended", func(s compose.HelperState) bool { return s.Done })
			t.Logf("confirmed %t, put back %t: %s", confirmed, state.PutBack, state.Why)
			if !state.PutBack && !confirmed {
				t.Error("without a successor, the old container was not put back")
			}
			h.runs(map[bool]string{true: "old", false: "new"}[state.PutBack])
		})
	}
}
