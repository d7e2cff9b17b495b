package store

import (
	"encoding/json"
	"fmt"
	"time"
)

// stateRow is what decide needs to know of a row of spec_workflow_task_states.
type stateRow struct {
	Attempt        int
	PlanStepStatus string
	CeleryTaskID   string
	Message        string
	Payload        json.RawMessage
	FinishedAt     time.Time
	// Artifacts are those that the column artifact_refs names, in its order.
	Artifacts []Artifact
}

// ended says whether the attempt has succeeded or failed. A skipped attempt has
// not ended: it never ran.
func (r *stateRow) ended() bool {
	return r != nil && (r.PlanStepStatus == string(StepSucceeded) || r.PlanStepStatus == string(StepFailed))
}

// outcome rebuilds the outcome of an attempt that a Python worker ran, which
// made no claim. The tables do not keep the class of its exception. RuntimeError
// stands in for it, as it shows the message as it is.
func (r *stateRow) outcome(artifactRoot string) Outcome {
	o := Outcome{
		Status:       StepStatus(r.PlanStepStatus),
		Message:      r.Message,
		Artifacts:    r.Artifacts,
		Payload:      r.Payload,
		ArtifactRoot: artifactRoot,
		FinishedAt:   r.FinishedAt,
	}
	if o.Status == StepFailed {
		o.ErrorType, o.ErrorModule = "RuntimeError", "builtins"
	}
	return o
}

// claimRow is a row of mm_orchestrator.claims, and the state of its holder.
type claimRow struct {
	Step    Step
	Attempt int
	TaskID  string
	Worker  string
	Token   int64
	Starts  int
	// HandedBack counts the starts after which the worker released the claim
	// although the step had not ended, as a worker does that stops.
	HandedBack int
	StartedAt  time.Time
	// Outcome is nil until the attempt has ended.
	Outcome *Outcome
	// Progress is nil until the first command has ended.
	Progress *Progress
	// SameSubmission says that the claim and the request belong to one
	// submission of the run: they have the same root task.
	SameSubmission bool
	Holder         holderState
}

// holderState says whether the worker that holds a claim is alive. A worker is
// alive while its session has the advisory lock of its key (see workerLock).
type holderState int

const (
	// holderNone: no worker holds the claim. Or the row names this Store, which
	// does not run the step: the answer that gave it the claim was lost.
	holderNone holderState = iota
	// holderSelf: this Store holds the claim, and the step runs here.
	holderSelf
	// holderAlive: another worker holds the claim and has its lock.
	holderAlive
	// holderSuspected: another worker holds the claim, and its lock is free. It
	// has died, or it has lost its session and is about to connect again.
	holderSuspected
	// holderDead: BeginStep has found the holder suspected at every look for
	// Config.TakeoverGrace.
	holderDead
)

// beginState is all that decide looks at, read under the run's row lock.
type beginState struct {
	Run Run
	// State is the row of the step's highest attempt, nil if the step has none.
	State *stateRow
	// StepClaims are the run's claims on the requested step, of every attempt.
	StepClaims []claimRow
	// OtherClaims are the run's claims on other steps, of every attempt and
	// submission, without those that have an outcome or no holder.
	OtherClaims []claimRow
	// Revocation is the request to end the run, nil for none.
	Revocation *Revocation
	// Pause is the open pause of the message's queue, nil for none.
	Pause *Pause
	// HasBegun says that the present submission of the run has begun.
	HasBegun bool
	// RollbackRequest is the request for this rollback, nil for none. decide does not
	// look at it: RequestRollback makes the rollback due by the state of the run.
	RollbackRequest *RollbackRequest
	// HoldsWorkspace says that the run holds a workspace.
	HoldsWorkspace bool
	// Change is what is recorded about the change of the run.
	Change ChangeState
	// Approval is what is known about the approval of the run.
	Approval approvalRow
	// JustRedelivered says that the broker delivered the message again a moment
	// ago (deathLag). The database may not have noticed yet that the previous
	// worker has died, so that holderAlive is not to be trusted.
	JustRedelivered bool
}

// attempt is the number of the attempt that a start would write: the highest
// (docs/moonmind.md#r5).
func (s beginState) attempt() int {
	if s.State == nil {
		return 1
	}
	return s.State.Attempt
}

// verdict is the answer of decide. Exactly one of done, busy, recheck, stop, refused,
// paused and start is set.
type verdict struct {
	// done: the step has ended with this outcome. Answer Done.
	done *Outcome
	// busy: this claim is in the way. Park the message.
	busy *claimRow
	// recheck: this claim is in the way, but its holder may be dead. Read the
	// state again in a moment.
	recheck *claimRow
	// stop: the message must have no effect, for this reason. Answer Stop.
	stop string
	// refused: the run has no approval that covers the step, for this reason. Put the
	// run back to where it waits for one, and answer Stop.
	refused string
	// paused: the step has to wait for the end of this pause. Park the message.
	paused *Pause
	// start: start the step, if the run can have its workspace.
	start bool
	// approval, with refused, paused or start, is what judgeApproval says.
	approval approvalVerdict

	// starts, with start: how often the attempt will have been started, this
	// start included. handedBack: after how many of them the worker released it.
	starts     int
	handedBack int
	// previousWorker, with start: the worker that ran the attempt last, or "".
	previousWorker string
	// deadClaims, with stop, refused, paused or start: the tokens of claims to take from
	// holders that are dead. A worker that was wrongly taken for dead can then record
	// nothing, finds its claim lost and ends its commands, and other steps of the
	// run no longer wait for it.
	deadClaims []int64
}

// decide says what becomes of a delivered message. It is pure.
//
// Two signs together show that a claim may be taken over: the holder's lock is
// free, and the broker has delivered the message of the claim's step to another
// worker. Only a worker that has lost both has ended its commands (package
// tasks/orchestrator, isolation.go).
//
// The first of these rules that applies decides:
//
//  1. The task id of the message has an outcome already: done, with the same
//     outcome, whatever has happened to the run since. The messages that follow
//     it are published again under their old ids, and meet this rule too.
//  2. The newest attempt of the step has ended: done, with its outcome. If a
//     Python worker ran the attempt, there is no claim, and the state row is the
//     record; a failure then counts only for the same task id. Exception: a
//     rollback that is due (rule 5b) runs, although an earlier one has ended.
//  3. A rollback came before the run has failed, while another step of its own
//     submission has a holder: busy. That run may be about to fail, since the
//     engine can send the rollback at a time limit, before the step has ended.
//  4. The requested step, this attempt or an earlier one, has a holder: busy.
//     This rule stands before rule 5, since the message must be kept while the
//     step runs: its redelivery is the sign that the worker has died.
//  5. The message must have no effect: stop. That is so for
//     a. every step of a run that waits for approval (docs/moonmind.md#a1), also of
//     one that has paused before verify;
//     b. a rollback that is not due. It is due while the run is failed and not
//     completed; otherwise the run was retried since, or needs no rollback;
//     c. every other step of a run that has ended or failed.
//  6. Another step of the run has a holder: busy. An example is a retry that the
//     API accepts while the rollback still runs. See below for the holders that
//     count.
//  7. The run needs an approval that covers the step, and has none: refused
//     (judgeApproval). The rule stands after those that wait for other workers: it
//     changes the run's row, which must not happen while a step of it runs. A run that
//     has to pause before verify starts that step: the pause records what the worker
//     sees (CheckApproval). If another chain of the run has begun to change something
//     under an approval, the answer is stop instead: that chain goes on, and the change
//     must not be left in a workspace that is free.
//  8. The queue is paused, and the step has to wait for that: paused. pausedBy says
//     which steps do. The rule is the last one: a message that has no effect, shows
//     that a worker has died, or has no approval is not kept for the end of the pause.
//  9. Otherwise: start.
//
// Which holders count: for rules 3 and 4, those that may be alive. A suspected
// one gives recheck in place of busy, and so does one that is alive if the
// message of its step was redelivered a moment ago; a dead one does not count,
// and loses its claim. For rule 6 every holder counts, also a suspected and a
// dead one: the request is for another step, so that only one of the two signs
// is there. The second comes when the message of the holder's step is delivered
// again (rules 4 and 5); if that message was lost, FreeClaims frees the claim.
// The rollback is an exception: for claims of its own submission rule 6 counts
// as rule 3 does, since the rollback was sent after the message of the failed
// step was answered, so that this message does not come again.
func decide(s beginState, request BeginRequest) verdict {
	// Rule 1.
	for i := range s.StepClaims {
		if c := &s.StepClaims[i]; c.TaskID == request.TaskID && c.Outcome != nil {
			return verdict{done: c.Outcome}
		}
	}
	// Rule 2.
	rollbackDue := request.Step == StepRollback && s.Run.Status == RunFailed && s.Run.CompletedAt == nil
	if s.State.ended() {
		sameTask := s.State.CeleryTaskID == request.TaskID
		if c := s.claimOf(s.State.Attempt); c != nil && c.Outcome != nil {
			if !rollbackDue {
				return verdict{done: c.Outcome}
			}
		} else if sameTask || (s.State.PlanStepStatus == string(StepSucceeded) && !rollbackDue) {
			o := s.State.outcome(s.Run.ArtifactRoot)
			return verdict{done: &o}
		}
	}
	// Rule 3.
	if request.Step == StepRollback && (s.Run.Status == RunPending || s.Run.Status == RunRunning) {
		if v := judgeOtherClaims(request.Step, ofSameSubmission(s.OtherClaims)); !v.start {
			return v
		}
	}
	// Rule 4.
	v := s.judgeStepClaims()
	if !v.start {
		return v
	}
	// Rule 5.
	if reason := s.stopReason(request.Step, rollbackDue); reason != "" {
		return verdict{stop: reason, deadClaims: v.deadClaims}
	}
	// Rule 6.
	others := judgeOtherClaims(request.Step, s.OtherClaims)
	if !others.start {
		return others
	}
	v.deadClaims = append(v.deadClaims, others.deadClaims...)
	// Rule 7.
	approval := judgeApproval(s.Run, s.Approval, approvalRequest{step: request.Step, attempt: s.attempt(), submission: request.submission()})
	if approval.refuse != "" && s.carriedOut() {
		return verdict{stop: "step " + string(request.Step) + " is not one of the chain that run " + s.Run.ID + " is carried out by, and " + approval.refuse, deadClaims: v.deadClaims}
	}
	if approval.refuse != "" {
		return verdict{refused: approval.refuse, approval: approval, deadClaims: v.deadClaims}
	}
	v.approval = approval
	// Rule 8.
	if pause := s.pausedBy(request.Step); pause != nil {
		return verdict{paused: pause, approval: approval, deadClaims: v.deadClaims}
	}
	// Rule 9.
	return v
}

// stopReason is why the message must have no effect by rule 5, in words for an
// operator, or "".
func (s beginState) stopReason(step Step, rollbackDue bool) string {
	switch status := s.Run.Status; {
	case status == RunAwaitingApproval:
		return fmt.Sprintf("run %s waits for approval: approve it, which sends its steps again", s.Run.ID)
	case step == StepRollback && rollbackDue:
		return ""
	case step == StepRollback && (status == RunFailed || status == RunRolledBack):
		return fmt.Sprintf("run %s has ended: %s; there is nothing left to roll back", s.Run.ID, status)
	case step == StepRollback:
		return fmt.Sprintf("run %s is %s: this rollback belongs to a failure that is no longer the run's state", s.Run.ID, status)
	case status == RunSucceeded, status == RunFailed, status == RunRolledBack:
		return fmt.Sprintf("run %s has ended: %s; retry it to run its steps again", s.Run.ID, status)
	}
	return ""
}

// judgeStepClaims applies rule 4: busy, recheck, or start if no holder of the
// requested step may be alive.
func (s beginState) judgeStepClaims() verdict {
	v := verdict{start: true, starts: 1}
	for i := range s.StepClaims {
		c := &s.StepClaims[i]
		if c.Outcome != nil {
			continue
		}
		switch {
		case c.Holder == holderSelf, c.Holder == holderAlive && !s.JustRedelivered:
			return verdict{busy: c}
		case c.Holder == holderAlive, c.Holder == holderSuspected:
			return verdict{recheck: c}
		case c.Holder == holderDead:
			v.deadClaims = append(v.deadClaims, c.Token)
		}
		if c.Attempt == s.attempt() {
			v.starts, v.handedBack, v.previousWorker = c.Starts+1, c.HandedBack, c.Worker
		}
	}
	return v
}

// judgeOtherClaims applies rules 3 and 6 to claims on other steps: busy,
// recheck, or start if none is in the way of step.
func judgeOtherClaims(step Step, claims []claimRow) verdict {
	v := verdict{start: true}
	var recheck *claimRow
	for i := range claims {
		c := &claims[i]
		answered := step == StepRollback && c.SameSubmission
		switch {
		case answered && c.Holder == holderSuspected:
			recheck = c
		case answered && c.Holder == holderDead:
			v.deadClaims = append(v.deadClaims, c.Token)
		default:
			return verdict{busy: c}
		}
	}
	if recheck != nil {
		return verdict{recheck: recheck}
	}
	return v
}

func ofSameSubmission(claims []claimRow) []claimRow {
	var same []claimRow
	for _, c := range claims {
		if c.SameSubmission {
			same = append(same, c)
		}
	}
	return same
}

// carriedOut says that a chain of the run has begun to change something under an
// approval, and has not ended.
func (s beginState) carriedOut() bool {
	return s.Run.Status == RunRunning && s.HoldsWorkspace && s.Approval.Record.ActedFor != "" && s.Approval.Record.PausedAt == nil
}

func (s beginState) claimOf(attempt int) *claimRow {
	for i := range s.StepClaims {
		if s.StepClaims[i].Attempt == attempt {
			return &s.StepClaims[i]
		}
	}
	return nil
}
