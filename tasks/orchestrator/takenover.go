package orchestrator

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// claimInterval is the time between two queries whether the step is still this
// worker's.
const claimInterval = 500 * time.Millisecond

// endWhenTakenOver ends the context of a step, and kills its programs, as soon as
// the database says that another worker has taken the step over. It covers what
// endWhenIsolated cannot: a process that was suspended notices no outage. Others
// that find the claim lost call lost, with the same effect. stop must be called
// when the step has ended.
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
	// The watch does not end with ctx: commands that ctx ends have a grace, and a
	// takeover in that time must still kill them.
	watch, endWatch := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() {
		defer close(done)
		ticker := time.NewTicker(claimInterval)
		defer ticker.Stop()
		for {
			// An error says nothing about the claim: the database may be unavailable.
			if has, err := o.config.Steps.HasClaim(watch, claim); err == nil && !has {
				lost(fmt.Errorf("%w: step %s of run %s, on which this worker was working", store.ErrClaimLost, claim.Step, claim.RunID))
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
