package orchestrator

import (
	"context"
	"log/slog"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
)

// The pauses of retryWrite double up to the longest, and nothing follows the end
// of its context.
func TestRetryWrite(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		begun := time.Now()
		var calls []time.Duration
		write := func(succeedsAt int) func() bool {
			return func() bool {
				calls = append(calls, time.Since(begun))
				return len(calls) == succeedsAt
			}
		}
		ms := time.Millisecond
		if !retryWrite(ctx, 350*ms, write(5)) {
			t.Error("gave up")
		}
		if want := []time.Duration{0, 100 * ms, 300 * ms, 650 * ms, 1000 * ms}; !slices.Equal(calls, want) {
			t.Errorf("calls at %s, want %s", calls, want)
		}
		calls = nil
		if retryWrite(ctx, 40*time.Second, write(0)) {
			t.Error("succeeded")
		}
		if last := calls[len(calls)-1]; time.Since(begun) != time.Minute || last > time.Minute {
			t.Errorf("ended after %s, the last call was at %s", time.Since(begun), last)
		}
		calls = nil
		if !retryWrite(ctx, time.Second, write(1)) || retryWrite(ctx, time.Second, write(0)) {
			t.Error("an ended context must not prevent the first call, nor allow a second one")
		}
	})
}

// The database becomes unavailable again while the journal catches up. The pauses
// between the attempts grow then as well.
func TestAJournalThatIsBehindPausesBetweenItsAttempts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var tries atomic.Int32
		recording, second := make(chan struct{}), make(chan struct{})
		steps := &fakeSteps{record: func(context.Context) error {
			switch n := tries.Add(1); {
			case n == 2:
				close(recording)
				<-second
				return nil
			case n > 1000:
				t.Error("no pause between the attempts")
				return nil
			}
			return store.ErrUnavailable
		}}
		o := &Orchestrator{config: Config{Steps: steps}}
		j := o.openJournal(slog.New(slog.DiscardHandler), store.Start{}, nil)
		j.put(store.Progress{Commands: 1})
		<-recording
		j.put(store.Progress{Commands: 2}) // the next command ends while the first is recorded
		close(second)
		time.Sleep(time.Minute)
		j.close()
		// 0.1 + 0.2 + 0.4 + … up to 5 s, then every 5 s
		if n := tries.Load(); n < 10 || n > 25 {
			t.Errorf("%d attempts in a minute", n)
		}
	})
}
