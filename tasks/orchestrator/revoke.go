package orchestrator

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
)

// revocationInterval is the time between two queries whether the run of a step
// was revoked.
const revocationInterval = 500 * time.Millisecond

// errRevoked is the cause with which the context of a revoked step ends.
type errRevoked struct{ revocation store.Revocation }

func (e errRevoked) Error() string { return e.revocation.Text() }

// endWhenRevoked ends the context of a step when an operator revokes its run, or
// has revoked it before. It does not end a rollback: that is what a revoked run
// needs. It ignores errors of the database, so that an outage ends no step. stop
// must be called when the step has ended.
func (o *Orchestrator) endWhenRevoked(ctx context.Context, claim store.Claim) (work context.Context, stop func()) {
	if claim.Step == store.StepRollback {
		return ctx, func() {}
	}
	work, cancel := context.WithCancelCause(ctx)
	check := func() bool {
		revocation, err := o.config.Steps.FindRevocation(work, claim.RunID)
		if err == nil {
			cancel(errRevoked{revocation})
		}
		return err == nil
	}
	if check() {
		return work, func() { cancel(nil) }
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		ticker := time.NewTicker(revocationInterval)
		defer ticker.Stop()
		for {
			select {
			case <-work.Done():
				return
			case <-ticker.C:
				if check() {
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

// revokedOutcome puts the operator's reason before the message of a step that
// failed because its run was revoked. A step that succeeded in spite of that
// keeps its outcome: the next step fails instead.
func revokedOutcome(work context.Context, outcome *store.Outcome) {
	var revoked errRevoked
	if !errors.As(context.Cause(work), &revoked) || outcome.Status != store.StepFailed {
		return
	}
	text := revoked.Error()
	// The error of a command that was ended repeats the reason.
	if message := strings.Replace(outcome.Message, ": "+text, "", 1); message != "" && message != text {
		text += ". " + message
	}
	failure := Failure{Type: "TaskRevokedError", Module: "celery.exceptions", Arg: cut(text)}
	outcome.Message, outcome.ErrorType, outcome.ErrorModule, outcome.Traceback = failure.Arg, failure.Type, failure.Module, failure.traceback()
}
