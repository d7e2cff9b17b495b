package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// errStepTimeLimit is the cause with which a step's context ends at its limit.
type errStepTimeLimit struct{ limit time.Duration }

func (e errStepTimeLimit) Error() string {
	return fmt.Sprintf("the step took longer than its limit of %s", e.limit)
}

// start runs a step whose claim this worker has, and records its end.
func (o *Orchestrator) start(ctx context.Context, log *slog.Logger, request Request, begun store.Start, isLimit func(error) bool) (Result, error) {
	log = log.With("attempt", begun.Claim.Attempt)
	log.Info("step started", "service", begun.Run.TargetService, "starts", begun.Claim.Starts)
	o.config.Metrics.StepStarted(string(begun.Claim.Step))
	if begun.RunStarted {
		o.config.Metrics.RunStatus(string(store.RunRunning))
	}

	work, cancel := ctx, context.CancelFunc(func() {})
	if limit := o.config.StepTimeLimit; limit > 0 {
		work, cancel = context.WithTimeoutCause(ctx, limit, errStepTimeLimit{limit})
	}
	faultpoint.Hit(faultpoint.StepBegun, begun.Claim.RunID, string(begun.Claim.Step))
	work, claimLost, unwatchClaim := o.endWhenTakenOver(work, begun.Claim)
	defer unwatchClaim()
	journal := o.openJournal(log, begun, claimLost)
	work, unwatchIsolation := o.endWhenIsolated(work, log, request, begun)
	work, unwatchRevocation := o.endWhenRevoked(work, begun.Claim)
	if afterKill(begun.Claim) {
		// Programs that are left of this step, or of an earlier one of the run, may
		// still write to the workspace.
		processes.EndOtherWorkersPrograms(log, begun.Claim.RunID)
	}
	stall.FromContext(ctx).Progress("working")
	outcome := o.work(work, log, begun, journal)
	unwatchRevocation()
	journal.close()
	unwatchIsolation()
	unwatchClaim()
	revokedOutcome(work, &outcome)
	faultpoint.Hit(faultpoint.StepWorked, begun.Claim.RunID, string(begun.Claim.Step))
	cancel()
	if cause := context.Cause(ctx); cause != nil && outcome.Status == store.StepFailed && (isLimit == nil || !isLimit(cause)) {
		// The worker stops: another one continues the step.
		o.release(ctx, log, begun.Claim)
		return Result{}, cause
	}
	if isolated := (errIsolated{}); errors.As(context.Cause(work), &isolated) && outcome.Status == store.StepFailed {
		log.Error("worker was isolated, commands of the step were killed, handing the message back", "error", isolated)
		if err := o.releaseUntilDone(ctx, log, begun.Claim); err != nil {
			return Result{}, err
		}
		return Result{}, &HandBackError{Reason: isolated.Error()}
	}
	finished, err := o.finish(ctx, log, request, begun.Claim, &outcome, isLimit)
	if err != nil {
		return Result{}, err
	}

	took := max(0, outcome.FinishedAt.Sub(begun.Claim.StartedAt))
	succeeded := outcome.Status == store.StepSucceeded
	o.config.Metrics.StepFinished(string(begun.Claim.Step), succeeded, took)
	switch {
	case finished.RunEnded:
		o.config.Metrics.RunFinished(string(finished.Status), finished.Duration)
	case !succeeded:
		o.config.Metrics.RunStatus(string(finished.Status))
	}
	attributes := []any{"took", took.Round(time.Millisecond), "run_status", string(finished.Status)}
	if succeeded {
		log.Info("step succeeded", append(attributes, "message", outcome.Message)...)
	} else {
		log.Error("step failed", append(attributes, "error", outcome.Message)...)
	}
	if finished.ParkedReady {
		o.publishReady(ctx, log)
	}
	return answer(outcome)
}

// afterKill says that a program of the run may have been killed before this start
// of the step, or may still run.
func afterKill(claim store.Claim) bool {
	return claim.Starts > 1 || claim.Attempt > 1 || claim.Step == store.StepRollback
}

// finish records the outcome, or another one that says why it cannot be
// recorded. While the database is unavailable, or lacks a table that an operator
// can create again, finish waits: a step that is not recorded would be run again.
// A time limit does not end the wait, because the rollback that follows it
// depends on the record.
func (o *Orchestrator) finish(ctx context.Context, log *slog.Logger, request Request, claim store.Claim, outcome *store.Outcome, isLimit func(error) bool) (store.Finished, error) {
	pause, logged, replaced := 100*time.Millisecond, false, false
	ended := ctx.Done()
	for {
		outcome.NothingFollows = request.NoNext
		if outcome.Status == store.StepFailed {
			outcome.NothingFollows = request.NoErrback
		}
		stall.FromContext(ctx).Progress("recording its end")
		attempt, cancel := context.WithTimeout(context.WithoutCancel(ctx), o.config.FinishTimeout)
		finished, err := o.config.Steps.FinishStep(attempt, claim, *outcome)
		cancel()
		switch {
		case err == nil:
			faultpoint.Hit(faultpoint.FinishAfter, claim.RunID, string(claim.Step))
			return finished, nil
		case errors.Is(err, store.ErrClaimLost):
			log.Warn("step was taken over or retried, its end is not recorded", "status", string(outcome.Status), "error", err)
			o.publishReady(ctx, log) // the retry waits for this end
			return store.Finished{}, ErrStop
		case errors.Is(err, store.ErrInvalid) && !replaced:
			// The tables can never store it, and running the step again would not
			// change that.
			log.Error("end of step cannot be recorded as it is", "status", string(outcome.Status), "error", err)
			failure := unexpected(fmt.Errorf("the end of the step (%s: %s) cannot be recorded: %w", outcome.Status, cut(outcome.Message), err))
			*outcome = store.Outcome{
				Status: store.StepFailed, Message: o.clean(failure.Error()), FinishedAt: outcome.FinishedAt,
				ErrorType: failure.Type, ErrorModule: failure.Module, Traceback: o.clean(failure.traceback()),
			}
			replaced = true
			continue
		case !errors.Is(err, store.ErrUnavailable) && !errors.Is(err, store.ErrSchema) && !errors.Is(err, context.DeadlineExceeded):
			o.release(ctx, log, claim)
			log.Error("end of step cannot be recorded, handing the message back", "error", err)
			return store.Finished{}, &HandBackError{After: o.config.HandBackDelay, Reason: err.Error()}
		}
		if !logged {
			log.Error("end of step cannot be recorded yet, waiting for the database", "error", err)
			logged = true
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
			pause = min(2*pause, o.config.HandBackDelay)
		case <-ended:
			timer.Stop()
			if isLimit != nil && isLimit(context.Cause(ctx)) {
				ended = nil
				continue
			}
			o.release(ctx, log, claim)
			return store.Finished{}, context.Cause(ctx)
		}
	}
}

// release gives up the claim on a step that this worker will not finish.
func (o *Orchestrator) release(ctx context.Context, log *slog.Logger, claim store.Claim) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), o.config.FinishTimeout)
	defer cancel()
	faultpoint.Hit(faultpoint.ReleaseBefore, claim.RunID, string(claim.Step))
	if err := o.config.Steps.ReleaseClaim(ctx, claim); err != nil {
		log.Warn("claim on step cannot be released", "error", err)
	}
	faultpoint.Hit(faultpoint.ReleaseAfter, claim.RunID, string(claim.Step))
}

// releaseUntilDone releases the claim of a step whose worker was isolated, and
// retries until the database is available or ctx ends. A claim that is never
// released would make the step wait until this worker ends. Until then the
// message stays unacknowledged, if its connection has survived. If another
// worker has taken the step over, the release changes nothing.
func (o *Orchestrator) releaseUntilDone(ctx context.Context, log *slog.Logger, claim store.Claim) error {
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, o.config.HandBackDelay) {
		stall.FromContext(ctx).Progress("releasing its claim")
		attempt, cancel := context.WithTimeout(context.WithoutCancel(ctx), o.config.FinishTimeout)
		err := o.config.Steps.ReleaseClaim(attempt, claim)
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
