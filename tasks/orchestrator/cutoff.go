package orchestrator

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// A worker that is cut off from the broker and from the database at once
// cannot be told from a dead one, and its step is taken over, if another worker
// consumes the queue. Its commands must have ended by then. So it goes by what
// it can prove, not by what it notices:
//
//   - A step can be taken over only after the broker has given its message to
//     somebody else, and the database has seen the holder's lock free for
//     store.Config.TakeoverGrace, 2 s. Both must be so at once.
//   - The database's answers prove that the lock was held
//     ([store.Store.LockConfirmedAt]), the broker's that the message was
//     ([worker.Task.StillUnacked]). A proof is as old as its question.
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
// the step begins anew when they are back.
//
// All this is for the sake of other workers. One that is alone on its queue
// goes on working however long both are away: its message can be given to
// nobody else, and the claim is still its own when they are back. So it asks
// the broker, when the step begins and every 2 s, who else consumes the queue
// ([worker.Task.OtherConsumers]), and goes by the last answer; without one, there may
// be others. A second worker that is started during the very outage, or in the
// 2 s before it, finds neither message nor lock held and takes the step over
// while its commands run. In the same pid namespace it ends them first
// ([processes.EndOtherWorkersPrograms]), in another one the two run side by side until the
// first hears from the database that it has lost the step (takenover.go).

// lookPause is how long an answer of the broker to the question who else
// consumes the queue is good.
const lookPause = 2 * time.Second

// lookAgain is when it is asked again that could not answer.
const lookAgain = 500 * time.Millisecond

// errCutOff is the cause with which the context of a step ends whose worker
// cannot prove any more that the step is its own.
type errCutOff struct{ after time.Duration }

func (e errCutOff) Error() string {
	return fmt.Sprintf("neither the database nor the broker has answered for %s, so that another worker may take the step over", e.after.Round(10*time.Millisecond))
}

// endWhenCutOff ends the context of a step, and kills its programs, when
// neither the database nor the broker proves any more that the step is this
// worker's, and another one may take it over. Of the request it uses Held and
// Others.
func (o *Orchestrator) endWhenCutOff(ctx context.Context, log *slog.Logger, request Request, begun store.Start) (work context.Context, stop func()) {
	work, cancel := context.WithCancelCause(ctx)
	killed := make(chan struct{})
	work = processes.KillWhen(work, killed)
	// Commands that are being ended for another reason may take their grace,
	// so that the watch goes on until they have ended.
	watch, endWatch := context.WithCancel(context.WithoutCancel(ctx))
	w := &cutWatch{
		claim: begun.Claim, limit: o.config.CutOffAfter, proven: o.config.Steps.LockConfirmedAt, log: log,
		held: request.Held, others: request.OtherConsumers,
		// That the claim was committed proves as much.
		byBroker: begun.OwnedAt,
		holds:    make(chan error, 1), found: make(chan lookedFor, 1),
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if silent, cut := w.run(watch); cut {
			faultpoint.Hit(faultpoint.Isolated, w.claim.RunID, string(w.claim.Step))
			close(killed)
			cancel(errCutOff{silent})
		}
	}()
	return work, func() {
		endWatch()
		<-done
		w.asking.Wait()
		cancel(nil)
	}
}

// cutWatch watches over one step. Its goroutine has all but what is asked.
type cutWatch struct {
	claim  store.Claim
	limit  time.Duration
	proven func() time.Time
	held   func(context.Context) error
	others func(context.Context) (int, error)
	log    *slog.Logger

	byBroker time.Time      // the broker's last proof
	asked    time.Time      // zero when no answer of held is due
	holds    chan error     // held's answers
	looking  bool           // an answer of others is due
	nextLook time.Time      // not before
	found    chan lookedFor // others' answers
	known    bool           // there was one
	alone    bool           // as of the last one
	told     bool           // that the step goes on, in this outage
	asking   sync.WaitGroup
}

type lookedFor struct {
	others int
	err    error
}

// run returns when the step is cut off and may be somebody else's, with the
// time since the last proof that it is not, or when ctx ends.
func (w *cutWatch) run(ctx context.Context) (silent time.Duration, cut bool) {
	w.look(ctx)
	ticker := time.NewTicker(max(w.limit/12, time.Millisecond))
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return 0, false
		case err := <-w.holds:
			if err == nil {
				w.byBroker = w.asked
			}
			w.asked = time.Time{}
		case found := <-w.found:
			w.looking = false
			if found.err != nil {
				w.nextLook = time.Now().Add(lookAgain)
			} else {
				w.alone = found.others == 0
				if !w.known {
					w.known = true
					faultpoint.Hit(faultpoint.OtherConsumersKnown, w.claim.RunID, string(w.claim.Step))
				}
			}
		case <-ticker.C:
			w.look(ctx)
			if silent := w.silence(ctx); w.isCutOff(silent) {
				return silent, true
			}
		}
	}
}

// look asks who else consumes the queue, when it is time.
func (w *cutWatch) look(ctx context.Context) {
	if w.others == nil || w.looking || time.Now().Before(w.nextLook) {
		return
	}
	w.looking, w.nextLook = true, time.Now().Add(lookPause)
	w.asking.Go(func() {
		others, err := w.others(ctx)
		w.found <- lookedFor{others, err}
	})
}

// silence is how long there has been no proof. It asks the broker for one when
// the database is late with its own.
func (w *cutWatch) silence(ctx context.Context) time.Duration {
	silent := time.Since(w.proven())
	if silent < w.limit*3/5 {
		return silent
	}
	if w.held != nil && w.asked.IsZero() {
		w.asked = time.Now()
		w.asking.Go(func() { w.holds <- w.held(ctx) })
	}
	return min(silent, time.Since(w.byBroker))
}

func (w *cutWatch) isCutOff(silent time.Duration) bool {
	switch {
	case silent < w.limit:
		w.told = false
		return false
	case !w.alone:
		return true
	case !w.told:
		w.told = true
		w.log.Warn("neither the database nor the broker answers: the step goes on, as nobody else consumes its queue")
	}
	return false
}

// giveBack gives the claim of a step back whose worker was cut off, when the
// database is there again; until then the message stays in hand, should it
// come. Without that the step would wait for as long as this worker lives. If
// it was taken over, nothing is changed.
func (o *Orchestrator) giveBack(ctx context.Context, log *slog.Logger, claim store.Claim) error {
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, o.config.HandBackDelay) {
		stall.FromContext(ctx).Progress("giving it back")
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
