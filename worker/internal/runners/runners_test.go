package runners_test

import (
	"runtime"
	"testing"
	"testing/synctest"

	"github.com/moonladderstudios/mm-orchestrator/worker/internal/runners"
)

// It is not parallel: it counts goroutines.
func TestGoroutinesAreUsedAgainAndEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // fails if a goroutine is left
		stopped := make(chan struct{})
		const most = 3
		done := 0
		p := runners.New(most, stopped, func(int) bool { done++; return true })
		before := runtime.NumGoroutine()
		for work := range 4 {
			p.Run(work)
			synctest.Wait()
		}
		if n := runtime.NumGoroutine() - before; n != 1 || done != 4 {
			t.Errorf("work that comes one at a time was done %d times by %d goroutines, want 4 and 1", done, n)
		}

		release, running := make(chan struct{}), make(chan int, 10)
		fresh := runners.New(most, stopped, func(work int) bool {
			running <- work
			<-release
			return true
		})
		for work := range most + 4 {
			fresh.Run(work)
		}
		synctest.Wait()
		if len(running) != most+4 {
			t.Errorf("%d of %d run: none may wait for another", len(running), most+4)
		}
		close(release)
		close(stopped)
	})
}

func TestAGoroutineThatMayNotBeUsedAgainEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		// Never stopped: a goroutine that waits would be left.
		p := runners.New(3, make(chan struct{}), func(int) bool { return false })
		for work := range 3 {
			p.Run(work)
			synctest.Wait()
		}
	})
}

func TestNoMoreWaitThanThePoolAllows(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := runners.New(0, make(chan struct{}), func(int) bool { return true })
		for work := range 3 {
			p.Run(work)
			synctest.Wait()
		}
	})
}
