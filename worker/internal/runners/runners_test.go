package runners_test

import (
	"testing"
	"testing/synctest"

	"github.com/moonladderstudios/mm-orchestrator/worker/internal/runners"
)

func TestGoroutinesAreUsedAgainAndEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) { // fails if a goroutine is left
		stopped := make(chan struct{})
		const most = 3
		p := runners.New[int](most, stopped)
		started := map[int]bool{} // by the first work of a goroutine
		one := func(work int) {
			// Only the function of the first work of a goroutine is called by it.
			p.Run(work, func(int) bool { started[work] = true; return true })
			synctest.Wait()
		}
		for work := range 4 {
			one(work)
		}
		if len(started) != 1 {
			t.Errorf("work that comes one at a time was done by %d goroutines, want 1", len(started))
		}

		release, running := make(chan struct{}), make(chan int, 10)
		block := func(work int) bool {
			running <- work
			<-release
			return true
		}
		fresh := runners.New[int](most, stopped)
		for work := range most + 4 {
			fresh.Run(work, block)
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
		p := runners.New[int](3, make(chan struct{})) // never stopped: a goroutine that waits would be left
		for work := range 3 {
			p.Run(work, func(int) bool { return false })
			synctest.Wait()
		}
	})
}

func TestNoMoreWaitThanThePoolAllows(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := runners.New[int](0, make(chan struct{}))
		for work := range 3 {
			p.Run(work, func(int) bool { return true })
			synctest.Wait()
		}
	})
}
