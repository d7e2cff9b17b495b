package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// An attempt is one start of a step under a claim that this worker holds. It ends
// with a record of the step's end, or with the claim given up.
type attempt struct {
	*Orchestrator
	request Request
	begun   store.Start
	// isLimit is that of Execute.
	isLimit func(error) bool
	log     *slog.Logger
}

// run works on the step and records its end.
func (a *attempt) run(ctx context.Context) (Result, error) {
	claim := a.begun.Claim
	a.logStart()
	faultpoint.Hit(faultpoint.StepBegun, claim.RunID, string(claim.Step))
	watch := a.startWatch(ctx)
	defer watch.stop()
	journal := a.openJournal(a.log, a.begun, watch.endWork)
	if afterKill(claim) {
		// Programs that are left of this step, or of an earlier one of the run, may
		// still write to the workspace.
		processes.EndOtherWorkersPrograms(a.log, claim.RunID)
	}
	stall.FromContext(ctx).Progress("working")
	outcome, refused := a.work(watch.work, a.log, a.begun, journal)
	journal.close()
	cause := watch.stop()
	faultpoint.Hit(faultpoint.StepWorked, claim.RunID, string(claim.Step))
	if refused != nil {
		a.logRefused(ctx, refused)
		return Result{}, ErrStop
	}
	// A step that has succeeded in spite of a cause is recorded.
	if outcome.Status == store.StepFailed {
		switch cause.reason {
		case workerStops:
			a.release(ctx, releasedRecords(outcome, "the worker stops")...)
			return Result{}, cause.err
		case isolated:
			a.log.Error("worker was isolated, commands of the step were killed, handing the message back", "error", cause)
			return Result{}, a.handBack(ctx, cause, releasedRecords(outcome, cause.Error())...)
		case givenBack:
			a.log.Info("step is given back", "reason", cause)
			return Result{}, a.handBack(ctx, cause, releasedRecords(outcome, cause.Error())...)
		case timeLimit:
			outcome.Audit = append(outcome.Audit, messageLimitRecords(cause)...)
		case revoked:
			outcome = revokedOutcome(outcome, endCause{cause.reason, errors.New(a.clean(cause.Error()))})
		}
	}
	finished, err := a.finish(ctx, &outcome)
	if err != nil {
		return Result{}, err
	}
	a.logEnd(ctx, outcome, finished)
	if finished.RunEnded {
		a.writeTrail(ctx, a.log, a.begun.Run.ID)
	}
	return answer(outcome)
}

func (a *attempt) logStart() {
	a.log.Info("step started", "service", a.begun.Run.TargetService, "starts", a.begun.Claim.Starts)
	a.config.Metrics.StepStarted(string(a.begun.Claim.Step))
	if a.begun.RunStarted {
		a.config.Metrics.RunStatus(string(store.RunRunning))
	}
}

// logEnd also publishes the messages that waited for this end.
func (a *attempt) logEnd(ctx context.Context, outcome store.Outcome, finished store.Finished) {
	took := max(0, outcome.FinishedAt.Sub(a.begun.Claim.StartedAt))
	succeeded := outcome.Status == store.StepSucceeded
	a.config.Metrics.StepFinished(string(a.begun.Claim.Step), succeeded, took)
	switch {
	case finished.RunEnded:
		a.config.Metrics.RunFinished(string(finished.Status), finished.Duration)
	case !succeeded:
		a.config.Metrics.RunStatus(string(finished.Status))
	}
	attributes := []any{"took", took.Round(time.Millisecond), "run_status", string(finished.Status),
		"audit_length", finished.AuditHead.Length, "audit_head", finished.AuditHead.Hash}
	if succeeded {
		a.log.Info("step succeeded", append(attributes, "message", outcome.Message)...)
	} else {
		a.log.Error("step failed", append(attributes, "error", outcome.Message)...)
	}
	if finished.ParkedReady {
		a.publishReady(ctx, a.log)
	}
}

// logRefused also publishes the messages that may go on, now that the run waits.
func (a *attempt) logRefused(ctx context.Context, refused *store.NotApproved) {
	if refused.Paused {
		a.log.Info("run pauses before verify, until it is approved", "reason", refused.Message)
	} else {
		a.log.Warn("step not run, the run's approval does not cover it", "reason", refused.Message)
	}
	if refused.ParkedReady {
		a.publishReady(ctx, a.log)
	}
}

// afterKill says that a program of the run may have been killed before this start
// of the step, or may still run.
func afterKill(claim store.Claim) bool {
	return claim.Starts > 1 || claim.Attempt > 1 || claim.Step == store.StepRollback
}

// finish records the outcome, or another one that says why it cannot be
// recorded. Unless the error is final, finish waits, whatever the database lacks: a
// step that is not recorded would be run again.
func (a *attempt) finish(ctx context.Context, outcome *store.Outcome) (finished store.Finished, err error) {
	until, cancel := a.untilWorkerStops(ctx)
	defer cancel()
	logged := false
	ended := retryWrite(until, a.config.HandBackDelay, func() bool {
		finished, err = a.record(ctx, outcome)
		if err == nil || isFinal(err) {
			return true
		}
		if !logged {
			a.log.Error("end of step cannot be recorded yet, waiting for the database", "error", err)
			logged = true
		}
		return false
	})
	switch {
	case !ended:
		a.release(ctx, releasedRecords(*outcome, "the end of the step could not be recorded before the worker stopped")...)
		return store.Finished{}, context.Cause(until)
	case err == nil:
		faultpoint.Hit(faultpoint.FinishAfter, a.begun.Claim.RunID, string(a.begun.Claim.Step))
		return finished, nil
	case errors.Is(err, store.ErrClaimLost):
		a.log.Warn("step was taken over or retried, its end is not recorded", "status", string(outcome.Status), "error", err)
		a.publishReady(ctx, a.log) // the retry waits for this end
		return store.Finished{}, ErrStop
	}
	a.release(ctx, releasedRecords(*outcome, "the end of the step cannot be recorded: "+err.Error())...)
	a.log.Error("end of step cannot be recorded, handing the message back", "error", err)
	return store.Finished{}, &HandBackError{After: a.config.HandBackDelay, Reason: err.Error()}
}

// record tries once to record the outcome. If the tables can never store it, it
// records a failure in its place: running the step again would not change that.
func (a *attempt) record(ctx context.Context, outcome *store.Outcome) (store.Finished, error) {
	stall.FromContext(ctx).Progress("recording its end")
	finished, err := a.finishStep(ctx, outcome)
	if !errors.Is(err, store.ErrInvalid) {
		return finished, err
	}
	a.log.Error("end of step cannot be recorded as it is", "status", string(outcome.Status), "error", err)
	failure := unexpected(fmt.Errorf("the end of the step (%s: %s) cannot be recorded: %w", outcome.Status, cut(outcome.Message), err))
	*outcome = store.Outcome{
		Status: store.StepFailed, Message: a.clean(failure.Error()), FinishedAt: outcome.FinishedAt,
		ErrorType: failure.Type, ErrorModule: failure.Module, Traceback: a.clean(failure.traceback()), Audit: outcome.Audit,
	}
	return a.finishStep(ctx, outcome)
}

func (a *attempt) finishStep(ctx context.Context, outcome *store.Outcome) (store.Finished, error) {
	outcome.NothingFollows = a.request.NoNext
	if outcome.Status == store.StepFailed {
		outcome.NothingFollows = a.request.NoErrback
	}
	ctx, cancel := a.writeContext(ctx)
	defer cancel()
	return a.config.Steps.FinishStep(ctx, a.begun.Claim, *outcome)
}

// handBack releases the claim of a step that was isolated or given back, and retries
// until the database is available or the worker stops. A claim that is never
// released would make the step wait until this worker ends. Until then the
// message stays unacknowledged, if its connection has survived. If another
// worker has taken the step over, the release changes nothing.
func (a *attempt) handBack(ctx context.Context, cause endCause, records ...audit.Record) error {
	until, cancel := a.untilWorkerStops(ctx)
	defer cancel()
	var err error
	if !retryWrite(until, a.config.HandBackDelay, func() bool {
		stall.FromContext(ctx).Progress("releasing its claim")
		err = a.releaseClaim(ctx, records...)
		return err == nil
	}) {
		a.log.Warn("claim on step cannot be released", "error", err)
		return context.Cause(until)
	}
	return &HandBackError{Reason: cause.Error()}
}

// release tries once to give up the claim on a step that this worker will not
// finish.
func (a *attempt) release(ctx context.Context, records ...audit.Record) {
	if err := a.releaseClaim(ctx, records...); err != nil {
		a.log.Warn("claim on step cannot be released", "error", err)
	}
}

func (a *attempt) releaseClaim(ctx context.Context, records ...audit.Record) error {
	ctx, cancel := a.writeContext(ctx)
	defer cancel()
	claim := a.begun.Claim
	faultpoint.Hit(faultpoint.ReleaseBefore, claim.RunID, string(claim.Step))
	err := a.config.Steps.ReleaseClaim(ctx, claim, records...)
	faultpoint.Hit(faultpoint.ReleaseAfter, claim.RunID, string(claim.Step))
	return err
}

// writeContext is that of one write to the database. It outlives ctx: the end of
// the step is recorded also when the worker stops.
func (a *attempt) writeContext(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), a.config.FinishTimeout)
}

// untilWorkerStops ends with ctx, but not at a time limit: the rollback that
// follows it depends on the record.
func (a *attempt) untilWorkerStops(ctx context.Context) (context.Context, context.CancelFunc) {
	until, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	detach := context.AfterFunc(ctx, func() {
		if cause := context.Cause(ctx); !a.isLimit(cause) {
			cancel(cause)
		}
	})
	return until, func() { detach(); cancel(nil) }
}
