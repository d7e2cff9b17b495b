package orchestrator

import (
	"fmt"
	"log/slog"
	"time"
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
// claim (watch.go).

// isolation judges whether the worker of a step is isolated. Only the goroutine of
// the step's watch uses it.
type isolation struct {
	limit           time.Duration    // Config.IsolatedAfter
	lockConfirmedAt func() time.Time // last answer of the database
	// brokerConfirmedAt is the last answer of the broker that the message is
	// unacked.
	brokerConfirmedAt time.Time
	// othersKnown says that the broker has told the number of other consumers, alone
	// that its last answer was 0.
	othersKnown, alone bool
	// warned says that it is logged that the step continues in this outage.
	warned bool
}

// interval is the time between two judgements.
func (i *isolation) interval() time.Duration { return max(i.limit/12, time.Millisecond) }

// countOthers takes the number of other consumers and says whether it is the first.
func (i *isolation) countOthers(others int) (first bool) {
	first, i.othersKnown, i.alone = !i.othersKnown, true, others == 0
	return first
}

// databaseIsLate says that the confirmation of the broker may be needed soon.
func (i *isolation) databaseIsLate() bool { return time.Since(i.lockConfirmedAt()) >= i.limit*3/5 }

// cause returns the cause with which the step's work must end, and whether it must.
func (i *isolation) cause(log *slog.Logger) (endCause, bool) {
	silent := min(time.Since(i.lockConfirmedAt()), time.Since(i.brokerConfirmedAt))
	switch {
	case silent < i.limit:
		i.warned = false
	case !i.alone:
		return endCause{isolated, fmt.Errorf("neither the database nor the broker has answered for %s, so that another worker may take the step over", silent.Round(10*time.Millisecond))}, true
	case !i.warned:
		i.warned = true
		log.Warn("neither the database nor the broker answers: the step continues, because nobody else consumes its queue")
	}
	return endCause{}, false
}
