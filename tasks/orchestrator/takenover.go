package orchestrator

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// takenOverTime is how often a running step looks whether it is still this
// worker's.
const takenOverTime = 500 * time.Millisecond

// endWhenTakenOver ends the context of a step, and kills its programs, as soon
// as the database says that another worker has the step: this one was away
// without noticing, as a process is that was stopped. It is the second line
// behind endWhenCutOff. Whoever else finds the claim lost calls lost.
func (o *Orchestrator) endWhenTakenOver(ctx context.Context, claim store.Claim) (work context.Context, lost context.CancelCauseFunc, stop func()) {
	work, cancel := context.WithCancelCause(ctx)
	killed := make(chan struct{})
	work = processes.KillWhen(work, killed)
	var once sync.Once
	lost = func(cause error) {
		once.Do(func() {
			close(killed)
			cancel(cause)
		})
	}
	// Also while commands are given the grace of another end.
	watch, endWatch := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() {
		defer close(done)
		ticker := time.NewTicker(takenOverTime)
		defer ticker.Stop()
		for {
			// A database that is away says nothing.
			if has, err := o.config.Steps.HasClaim(watch, claim); err == nil && !has {
				lost(fmt.Errorf("%w: step %s of run %s, which this worker was about", store.ErrClaimLost, claim.Step, claim.RunID))
				return
			}
			select {
			case <-watch.Done():
				return
			case <-ticker.C:
			}
		}
	}()
	return work, lost, func() {
		endWatch()
		<-done
		cancel(nil)
	}
}
