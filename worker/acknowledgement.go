package worker

import "fmt"

// AckEarly acknowledges the message of the task before its handler runs: Celery's
// acks_late=False, and at most once. Without it a message is acknowledged when its outcome
// is recorded, so that a task runs again if its worker dies.
//
//   - The task of a worker that dies is lost: its result stays as it was.
//   - What would requeue the message cannot: a [Reject] with Requeue, and a shutdown that
//     waits no longer, make the task FAILURE, with the class Reject or WorkerLostError.
//   - An outcome that cannot be recorded within Config.RecordTimeout is lost.
//   - If the connection is lost at the moment of the acknowledgement, another worker may
//     run the task once more.
func AckEarly() TaskOption { return func(r *registration) { r.ackEarly = true } }

// RejectFailures rejects the message of a task that has failed, when the failure is
// recorded, instead of acknowledging it: Celery's acks_on_failure=False. The queue's
// dead-letter exchange receives it, if there is one.
func RejectFailures() TaskOption { return func(r *registration) { r.rejectFailures = true } }

// RequeueTimeouts requeues the message of a task at its hard time limit: Celery's
// acks_on_timeout=False. The task runs again. Celery stores FAILURE and calls the error
// callbacks each time; this worker does neither. It does both when [MaxStarts] is reached,
// which also counts these starts. Without MaxStarts there is no end to it.
func RequeueTimeouts() TaskOption { return func(r *registration) { r.requeueTimeouts = true } }

// acknowledge acknowledges the deliveries of an attempt that goes on. Deliveries that
// join later are acknowledged at once.
func (a *attempt) acknowledge() {
	tellAll(a.chooseEarly())
}

// chooseEarly moves the deliveries of an attempt to settling.
func (a *attempt) chooseEarly() (settling []*delivery) {
	a.registry.mu.Lock()
	defer a.registry.mu.Unlock()
	a.acknowledged = true
	for _, d := range a.deliveries {
		if d.state == stateRunning || d.state == stateDelayed {
			d.choose(settlementAck)
			settling = append(settling, d)
		}
	}
	return settling
}

// finalOutcome replaces an outcome that asks for a requeue when the message is
// acknowledged already.
func finalOutcome(o outcome) outcome {
	switch {
	case o.kind == outcomeInterrupted:
		lost := failureOutcome(&Error{Type: "WorkerLostError", Module: "billiard.exceptions",
			Args: []any{"Worker stopped while the task ran, and its message was acknowledged early."}, Err: ErrShutdown})
		lost.duration = o.duration
		return lost
	case o.kind == outcomeReject && o.reject.Requeue:
		o.reject = Reject{Reason: o.reject.Reason}
	}
	return o
}

// settlementOfFailure is how the message of a failed task is settled.
func (r registration) settlementOfFailure() settlement {
	if r.rejectFailures {
		return settlementReject
	}
	return settlementAck
}

// reportLost logs that an outcome could not be recorded and its message is gone.
func (w *Worker) reportLost(a *attempt, err error) {
	w.taskLog(a.message).Error("outcome is lost: it could not be recorded, and the message was acknowledged early",
		"outcome", a.outcome.kind, "error", fmt.Sprint(err))
}
