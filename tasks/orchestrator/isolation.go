package orchestrator

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// A worker is isolated while it can reach neither broker nor database. To others
// it looks dead: if another worker consumes the queue, that one takes the step
// over. By then the commands of the first must have ended. So a worker relies on
// confirmations that the step is its own, not on errors that it may notice too
// late:
//
//   - Another worker can take a step over only when the broker has delivered the
//     message to it and, at the same time, the database has seen the first
//     worker's lock free for store.Config.TakeoverGrace, 2 s.
//   - An answer of the database confirms that this worker still had its lock
//     ([store.Store.LockConfirmedAt]). An answer of the broker confirms that the
//     message was still unacknowledged ([worker.Task.StillUnacked]). A confirmation
//     is as old as the query.
//   - So nobody else begins the step within 2 s of the last confirmation of
//     either kind. A worker without one for IsolatedAfter, 1.25 s, kills the step's
//     commands. The difference is for a machine that is slow to kill them.
//
// The time line, from the last answer that the worker got from either of the two:
//
//	0.00 s  both are unreachable, with or without a connection reset
//	0.75 s  no answer from the database: the worker queries the broker
//	1.25 s  no answer from the broker: the commands get SIGKILL
//	2.00 s  the earliest moment at which another worker can begin
//
// While only one of the two is unavailable, the other one answers and the step
// continues, however long that lasts. It also continues if both are unavailable
// for less than 1.25 s. After a longer outage the step starts again when both are
// available.
//
// A worker that is alone on its queue continues through any outage: the broker can
// deliver its message to nobody else, and the claim is still its own afterwards.
// So it asks the broker, when the step begins and every 2 s, for the number of
// other consumers ([worker.Task.OtherConsumers]), and relies on the last answer.
// Before the first answer it assumes that there are some.
//
// Risk left open: a second worker that starts during the outage, or in the 2 s
// before it, gets the message, finds the lock free and takes the step over while
// its commands run. In the same pid namespace it ends them first
// ([processes.EndOtherWorkersPrograms]). In another one both workers run the
// step's commands until the first can ask the database whether it still has the
// claim (takenover.go).

// countInterval is the time between two queries for the number of other
// consumers.
const countInterval = 2 * time.Second

// retryPause is the wait after a failed query.
const retryPause = 500 * time.Millisecond

// errIsolated is the cause with which the context of a step ends when its worker
// has no confirmation any more that the step is its own.
type errIsolated struct{ after time.Duration }

func (e errIsolated) Error() string {
	return fmt.Sprintf("neither the database nor the broker has answered for %s, so that another worker may take the step over", e.after.Round(10*time.Millisecond))
}

// endWhenIsolated ends the context of a step, and kills its programs, when neither
// the database nor the broker confirms any more that the step is this worker's,
// and another worker may take it over. Of the request it uses StillUnacked and
// OtherConsumers. stop must be called when the step has ended.
func (o *Orchestrator) endWhenIsolated(ctx context.Context, log *slog.Logger, request Request, begun store.Start) (work context.Context, stop func()) {
	work, cancel := context.WithCancelCause(ctx)
	killed := make(chan struct{})
	work = processes.KillWhen(work, killed)
	// The watch does not end with ctx: commands that ctx ends have a grace, and a
	// worker that is isolated in that time must still kill them.
	watch, endWatch := context.WithCancel(context.WithoutCancel(ctx))
	w := &isolationWatch{
		claim: begun.Claim, limit: o.config.IsolatedAfter, lockConfirmedAt: o.config.Steps.LockConfirmedAt, log: log,
		stillUnacked: request.StillUnacked, otherConsumers: request.OtherConsumers,
		// The commit of the claim was a confirmation too.
		brokerConfirmedAt: begun.OwnedAt,
		unacked:           make(chan error, 1), counted: make(chan consumerCount, 1),
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if silent, isolated := w.run(watch); isolated {
			faultpoint.Hit(faultpoint.Isolated, w.claim.RunID, string(w.claim.Step))
			close(killed)
			cancel(errIsolated{silent})
		}
	}()
	return work, func() {
		endWatch()
		<-done
		w.queries.Wait()
		cancel(nil)
	}
}

// isolationWatch watches one step. The goroutine of run uses all its fields; queries run
// in goroutines of their own and only send to the channels.
type isolationWatch struct {
	claim           store.Claim
	limit           time.Duration
	lockConfirmedAt func() time.Time
	stillUnacked    func(context.Context) error
	otherConsumers  func(context.Context) (int, error)
	log             *slog.Logger

	brokerConfirmedAt time.Time          // last answer of the broker that the message is unacked
	askedAt           time.Time          // of the running query of stillUnacked; zero for none
	unacked           chan error         // results of stillUnacked
	counting          bool               // a query of otherConsumers runs
	nextCount         time.Time          // earliest time of the next one
	counted           chan consumerCount // results of otherConsumers
	known             bool               // there was a result
	alone             bool               // according to the last result
	warned            bool               // logged that the step continues in this outage
	queries           sync.WaitGroup
}

type consumerCount struct {
	others int
	err    error
}

// run returns when the worker is isolated and another one may have the step, with
// the time since the last confirmation, or when ctx ends.
func (w *isolationWatch) run(ctx context.Context) (silent time.Duration, isolated bool) {
	w.countOthers(ctx)
	ticker := time.NewTicker(max(w.limit/12, time.Millisecond))
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return 0, false
		case err := <-w.unacked:
			if err == nil {
				w.brokerConfirmedAt = w.askedAt
			}
			w.askedAt = time.Time{}
		case found := <-w.counted:
			w.counting = false
			if found.err != nil {
				w.nextCount = time.Now().Add(retryPause)
			} else {
				w.alone = found.others == 0
				if !w.known {
					w.known = true
					faultpoint.Hit(faultpoint.OtherConsumersKnown, w.claim.RunID, string(w.claim.Step))
				}
			}
		case <-ticker.C:
			w.countOthers(ctx)
			if silent := w.silence(ctx); w.isIsolated(silent) {
				return silent, true
			}
		}
	}
}

// countOthers starts a query for the number of other consumers, if one is due.
func (w *isolationWatch) countOthers(ctx context.Context) {
	if w.otherConsumers == nil || w.counting || time.Now().Before(w.nextCount) {
		return
	}
	w.counting, w.nextCount = true, time.Now().Add(countInterval)
	w.queries.Go(func() {
		others, err := w.otherConsumers(ctx)
		w.counted <- consumerCount{others, err}
	})
}

// silence returns the time since the last confirmation. If the database's is
// late, it also queries the broker.
func (w *isolationWatch) silence(ctx context.Context) time.Duration {
	silent := time.Since(w.lockConfirmedAt())
	if silent < w.limit*3/5 {
		return silent
	}
	if w.stillUnacked != nil && w.askedAt.IsZero() {
		w.askedAt = time.Now()
		w.queries.Go(func() { w.unacked <- w.stillUnacked(ctx) })
	}
	return min(silent, time.Since(w.brokerConfirmedAt))
}

func (w *isolationWatch) isIsolated(silent time.Duration) bool {
	switch {
	case silent < w.limit:
		w.warned = false
		return false
	case !w.alone:
		return true
	case !w.warned:
		w.warned = true
		w.log.Warn("neither the database nor the broker answers: the step continues, because nobody else consumes its queue")
	}
	return false
}
