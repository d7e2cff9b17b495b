package orchestrator

import (
	"context"
	"errors"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
)

// revokedTime is how often a running step looks whether its run was revoked.
const revokedTime = 500 * time.Millisecond

// errRevoked is the cause with which the context of a revoked step ends.
type errRevoked struct{ wish store.Revocation }

func (e errRevoked) Error() string { return e.wish.Text() }

// endWhenRevoked ends the context of a step when an operator revokes its run,
// or has revoked it before; a rollback is what a revoked run needs. A database
// that is away leaves the step alone.
func (o *Orchestrator) endWhenRevoked(ctx context.Context, claim store.Claim) (work context.Context, stop func()) {
	if claim.Step == store.StepRollback {
		return ctx, func() {}
	}
	work, cancel := context.WithCancelCause(ctx)
	look := func() bool {
		wish, err := o.config.Steps.FindRevocation(work, claim.RunID)
		if err == nil {
			cancel(errRevoked{wish})
		}
		return err == nil
	}
	if look() {
		return work, func() { cancel(nil) }
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		ticker := time.NewTicker(revokedTime)
		defer ticker.Stop()
		for {
			select {
			case <-work.Done():
				return
			case <-ticker.C:
				if look() {
					return
				}
			}
		}
	}()
	return work, func() {
		cancel(nil)
		<-done
	}
}

// revokedOutcome puts the operator's word before what it has done to the step.
// A step that was quicker has succeeded; the next one fails.
func revokedOutcome(work context.Context, outcome *store.Outcome) {
	var revoked errRevoked
	if !errors.As(context.Cause(work), &revoked) || outcome.Status != store.StepFailed {
		return
	}
	text := revoked.Error()
	if outcome.Message != "" && outcome.Message != text {
		text += ". " + outcome.Message
	}
	failure := Failure{Type: "TaskRevokedError", Module: "celery.exceptions", Arg: cut(text)}
	outcome.Message, outcome.ErrorType, outcome.ErrorModule, outcome.Traceback = failure.Arg, failure.Type, failure.Module, failure.traceback()
}
