package orchestrator

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/planted"
	"github.com/moonladderstudios/mm-orchestrator/internal/pulse"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// A worker that is cut off from the broker and from the database at once
// cannot be told from a dead one, and its step is taken over. Its commands
// must have ended by then. So it goes by what it can prove, not by what it
// notices:
//
//   - A step can be taken over only after the broker has given its message to
//     somebody else, and the database has seen the holder's lock free for
//     store.Config.TakeoverGrace, 2 s. Both must be so at once.
//   - The database's answers prove that the lock was held
//     ([store.Store.Proven]), the broker's that the message was
//     ([worker.Task.Held]). A proof is as old as its question.
//   - So nobody begins the step within 2 s of the last proof of either sort. A
//     worker without one for CutOffAfter, 1.25 s, kills the step's commands;
//     the rest is for a machine that is slow to do it.
//
// As seen from the last answer of the last of the two that fell silent:
//
//	0.00 s  both are cut off, whether by a reset or without a word
//	0.75 s  no answer of the database: the broker is asked
//	1.25 s  no answer of the broker: the commands get SIGKILL
//	2.00 s  the earliest moment at which another worker can begin
//
// While only the database is away, the broker answers; while only the broker
// is, the database does: the step goes on for as long as that lasts. So it
// does when both are away for less than 1.25 s. If they are away for longer,
// the step begins anew when they are back, even where no other worker is: a
// worker cannot know what others can see.

// errCutOff is the cause with which the context of a step ends whose worker
// cannot prove any more that the step is its own.
type errCutOff struct{ after time.Duration }

func (e errCutOff) Error() string {
	return fmt.Sprintf("neither the database nor the broker has answered for %s, so that another worker may take the step over", e.after.Round(10*time.Millisecond))
}

// endWhenCutOff ends the context of a step, and kills its programs, when
// neither the database nor the broker proves any more that the step is this
// worker's. asOf is when its claim was certain, see [store.Start]. held asks the
// broker; it may be nil, for a step without a message.
func (o *Orchestrator) endWhenCutOff(ctx context.Context, asOf time.Time, held func(context.Context) error) (work context.Context, stop func()) {
	work, cancel := context.WithCancelCause(ctx)
	killed := make(chan struct{})
	work = processes.KillWhen(work, killed)
	// Commands that are being ended for another reason may take their grace,
	// so that the watch goes on until they have ended.
	watch, endWatch := context.WithCancel(context.WithoutCancel(ctx))
	limit := o.config.CutOffAfter
	// That the claim was committed proves as much.
	byBroker := asOf
	asked, answers := time.Time{}, make(chan error, 1) // asked is zero when no answer is due
	var asking sync.WaitGroup
	isCutOff := func() bool {
		silent := time.Since(o.config.Steps.Proven())
		if silent < limit*3/5 {
			return false
		}
		if held != nil && asked.IsZero() {
			asked = time.Now()
			asking.Go(func() { answers <- held(watch) })
		}
		silent = min(silent, time.Since(byBroker))
		if silent < limit || planted.Bug(planted.CutOffIgnored) {
			return false
		}
		close(killed)
		cancel(errCutOff{silent})
		return true
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		ticker := time.NewTicker(max(limit/12, time.Millisecond))
		defer ticker.Stop()
		for {
			select {
			case <-watch.Done():
				return
			case err := <-answers:
				if err == nil {
					byBroker = asked
				}
				asked = time.Time{}
			case <-ticker.C:
				if isCutOff() {
					return
				}
			}
		}
	}()
	return work, func() {
		endWatch()
		<-done
		asking.Wait()
		cancel(nil)
	}
}

// giveBack gives the claim of a step back whose worker was cut off, when the
// database is there again; until then the message stays in hand, should it
// come. Without that the step would wait for as long as this worker lives. If
// it was taken over, nothing is changed.
func (o *Orchestrator) giveBack(ctx context.Context, log *slog.Logger, claim store.Claim) error {
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, o.config.HandBackDelay) {
		pulse.Of(ctx).Move("giving it back")
		try, cancel := context.WithTimeout(context.WithoutCancel(ctx), o.config.FinishTimeout)
		err := o.config.Steps.ReleaseClaim(try, claim)
		cancel()
		if err == nil {
			return nil
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			log.Warn("claim on step cannot be released", "error", err)
			return context.Cause(ctx)
		}
	}
}
