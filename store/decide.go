package store

import (
	"encoding/json"
	"fmt"
	"time"
)

// stateRow is what a decision needs of the newest attempt's row in
// spec_workflow_task_states.
type stateRow struct {
	Attempt        int
	PlanStepStatus string
	CeleryTaskID   string
	Message        string
	Payload        json.RawMessage
	FinishedAt     time.Time
	// Artifacts are those that artifact_refs names, in that order.
	Artifacts []Artifact
}

// ended says that the attempt was run to its end. "skipped" is not an end: it
// was never run.
func (r *stateRow) ended() bool {
	return r != nil && (r.PlanStepStatus == string(StepSucceeded) || r.PlanStepStatus == string(StepFailed))
}

// outcome rebuilds what a Python worker recorded, which left no claim. The
// exception's class is not in the tables: RuntimeError shows the right text.
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

// claimRow is one row of mm_orchestrator.claims as it was read, with what is
// known of its holder.
type claimRow struct {
	Step    Step
	Attempt int
	TaskID  string
	Worker  string
	Token   int64
	Starts  int
	// HandedBack counts the starts that ended in order, without an end of the
	// step.
	HandedBack int
	StartedAt  time.Time
	// Outcome is nil while the attempt has not ended.
	Outcome *Outcome
	// Progress is nil if no command has ended.
	Progress *Progress
	// SameSubmission says that the message which started it and the one in hand
	// belong to one submission of the run: their root task is the same.
	SameSubmission bool
	Holder         holderState
}

// holderState is what is known of the worker behind a claim.
type holderState int

const (
	// holderNone: it was released, or this Store gave it out in vain.
	holderNone holderState = iota
	// holderHere: it runs in this Store.
	holderHere
	// holderLive: another worker's, whose session holds its lock.
	holderLive
	// holderGone: another worker's, whose lock is free. It may have lost its
	// session only, and be about to connect again.
	holderGone
	// holderDead: holderGone at every look for the whole grace.
	holderDead
)

// situation is everything that a decision looks at, read under the run's lock.
type situation struct {
	Run Run
	// State is the row of the highest attempt, nil if there is none.
	State *stateRow
	// Claims are all of the run's claims on this step.
	Claims []claimRow
	// OtherSteps are the run's claims on other steps, of any attempt and any
	// submission, that have not ended and that a worker has: none is holderNone.
	OtherSteps []claimRow
	// Holds says that the run holds a workspace.
	Holds bool
	// MayHaveDied: a holder of this step in state holderLive may be dead, the
	// database has not had the time to see it.
	MayHaveDied bool
}

// attempt is the one that a start would write: the highest
// (docs/moonmind.md#r5).
func (s situation) attempt() int {
	if s.State == nil {
		return 1
	}
	return s.State.Attempt
}

// verdict is what decide says: one of its fields is set.
type verdict struct {
	done *Outcome
	busy *claimRow
	// wait: the holder is gone, but not for long enough to believe it; or it
	// seems to live, but not for long enough.
	wait *claimRow
	stop string
	// free are the tokens of claims on this step whose holders are dead, to be
	// taken from them with stop or start: a holder that lives all the same
	// records nothing any more, notices and ends its commands, and other steps
	// of the run need not wait for it.
	free []int64
	// start: take the claim, if the workspace can be had; starts is the count
	// including this one, handedBack how many of them ended in order.
	start      bool
	starts     int
	handedBack int
	// before is the worker that ran the attempt last, "" for none.
	before string
}

// decide says what becomes of a delivery. It is pure. The rules, in order:
//
//  1. This task id has ended before: the same answer again, whatever has
//     happened to the run since. What follows it carries the same ids and
//     meets the same rule.
//  2. The newest attempt has ended: the same answer. Of a Python worker's
//     attempt the row itself is the record; a failure counts only for the
//     same task id. A rollback that ended for an earlier failure does not
//     count while the run waits for another one.
//  3. The run waits for approval: nothing (docs/moonmind.md#a1).
//  4. A rollback belongs to a run that is failed and not yet complete. Any
//     other run was retried since, or is good: nothing. But while another step
//     of its own submission has a live holder, the run may be about to be
//     failed, as a time limit can be told before the step has ended: busy.
//  5. Any other step of a run that has ended: nothing.
//  6. Somebody runs the step, this attempt or one before: busy. That comes
//     before "nothing" too: the message is kept for as long as its step runs,
//     since its coming again is how the death of the worker is known.
//  7. Somebody has another step of the run: busy. A retry that the API accepts
//     while the rollback runs is such a case. A holder that is gone counts as
//     well: this message says nothing about the holder's own, and only who has
//     lost both its lock and its message has ended its commands (see package
//     orchestrator, cutoff.go). The holder's message comes again and frees the
//     claim by rule 4, 5 or 6; if it was lost, FreeClaims does. The rollback of
//     the same submission need not wait for that: it was sent when the other
//     step's message had had its answer.
//  8. Start.
func decide(s situation, request BeginRequest) verdict {
	for i := range s.Claims {
		if c := &s.Claims[i]; c.TaskID == request.TaskID && c.Outcome != nil {
			return verdict{done: c.Outcome}
		}
	}
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
	own := s.own()
	stop := s.stop(request.Step, rollbackDue)
	if stop != "" && request.Step == StepRollback && s.Run.Status != RunAwaitingApproval && goesOn(s.Run) {
		if others := s.others(request.Step, func(c claimRow) bool { return c.SameSubmission }); !others.start {
			return others
		}
	}
	if !own.start {
		return own
	}
	if stop != "" {
		return verdict{stop: stop, free: own.free}
	}
	others := s.others(request.Step, func(claimRow) bool { return true })
	if !others.start {
		return others
	}
	own.free = append(own.free, others.free...)
	return own
}

// stop is why a message must have no effect, by rules 3 to 5, or "".
func (s situation) stop(step Step, rollbackDue bool) string {
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

// own is the verdict that the claims on this very step allow, whatever else
// there is: busy, wait, or start.
func (s situation) own() verdict {
	v := verdict{start: true, starts: 1}
	for i := range s.Claims {
		c := &s.Claims[i]
		if c.Outcome != nil {
			continue
		}
		switch {
		case c.Holder == holderHere, c.Holder == holderLive && !s.MayHaveDied:
			return verdict{busy: c}
		case c.Holder == holderLive, c.Holder == holderGone:
			return verdict{wait: c}
		case c.Holder == holderDead:
			v.free = append(v.free, c.Token)
		}
		if c.Attempt == s.attempt() {
			v.starts, v.handedBack, v.before = c.Starts+1, c.HandedBack, c.Worker
		}
	}
	return v
}

// others is the verdict that those claims on other steps allow which count,
// whatever else there is: busy, wait, or start.
func (s situation) others(step Step, counts func(claimRow) bool) verdict {
	v := verdict{start: true}
	var wait *claimRow
	for i := range s.OtherSteps {
		c := &s.OtherSteps[i]
		failed := step == StepRollback && c.SameSubmission
		switch {
		case !counts(*c):
		case failed && c.Holder == holderGone:
			wait = c
		case failed && c.Holder == holderDead:
			v.free = append(v.free, c.Token)
		default:
			return verdict{busy: c}
		}
	}
	if wait != nil {
		return verdict{wait: wait}
	}
	return v
}

func (s situation) claimOf(attempt int) *claimRow {
	for i := range s.Claims {
		if s.Claims[i].Attempt == attempt {
			return &s.Claims[i]
		}
	}
	return nil
}
