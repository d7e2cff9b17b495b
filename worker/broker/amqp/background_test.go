package amqp

import (
	"testing"
	"testing/synctest"
)

func TestBackgroundGoroutinesAreUsedAgainAndEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) { // fails if a goroutine is left
		ended := make(chan struct{})
		b := newBackground(ended)
		for range 3 {
			b.run(func() {})
			synctest.Wait()
			if len(b.idle) != 1 {
				t.Fatalf("after one function at a time %d goroutines wait, want 1", len(b.idle))
			}
		}
		const together = idleMax + 3
		release := make(chan struct{})
		running := make(chan struct{}, together)
		for range together {
			b.run(func() {
				running <- struct{}{}
				<-release
			})
		}
		synctest.Wait()
		if begun := len(running); begun != together {
			t.Errorf("%d of %d functions run: a function must not wait for another", begun, together)
		}
		close(release)
		synctest.Wait()
		if len(b.idle) != idleMax {
			t.Errorf("%d goroutines wait, want %d", len(b.idle), idleMax)
		}
		close(ended)
	})
}
