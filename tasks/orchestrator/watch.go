package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

const (
	// checkInterval is the time between two queries of the database whether the
	// step may go on, countInterval that between two queries of the broker for the
	// number of other consumers.
	checkInterval = 500 * time.Millisecond
	countInterval = 2 * time.Second
	// retryPause is the longest wait after a query that has failed.
	retryPause = 500 * time.Millisecond
)

// An endReason says why the work of a step was ended before it was complete.
type endReason int

const (
	// notEnded: the work has ended by itself, or goes on.
	notEnded endReason = iota
	// timeLimit: it took longer than a limit of the step or of its message.
	timeLimit
	// revoked: an operator has revoked the run.
	revoked
	// takenOver: the database says that this worker has lost the claim.
	takenOver
	// isolated: see isolation.go.
	isolated
	// givenBack: the step itself leaves the rest to the next worker.
	givenBack
	// workerStops: another worker continues the step.
	workerStops
)

// An endCause is the cause with which the context of a step's work ends.
type endCause struct {
	reason endReason
	err    error
}

func (c endCause) Error() string { return c.err.Error() }
func (c endCause) Unwrap() error { return c.err }

// endReasonOf returns the reason for which the context of a step's work has
// ended.
func endReasonOf(work context.Context) endReason {
	var cause endCause
	errors.As(context.Cause(work), &cause)
	return cause.reason
}

// withTimeLimit ends the work of a step at a limit, if that is not 0. field is where the
// limit is set.
func withTimeLimit(ctx context.Context, limit time.Duration, field string) (context.Context, context.CancelFunc) {
	if limit <= 0 {
		return ctx, func() {}
	}
	return context.WithTimeoutCause(ctx, limit, endCause{timeLimit, &limitError{
		rule: audit.Rule{Name: field, Limit: shortDuration(limit)}, text: fmt.Sprintf("the step took longer than its limit of %s", limit),
	}})
}

// A watch ends the work of a step as soon as this worker must not go on with it:
//
//   - when another worker has the claim. The watch queries the database for that.
//     This covers what isolation cannot: a process that was suspended notices no
//     outage;
//   - when this worker is isolated, which it judges by the age of the answers that
//     database and broker give (isolation.go);
//   - when an operator revokes the run, or has revoked it before. It does not end a
//     rollback then: that is what a revoked run needs.
//
// In the first two cases another worker may begin the step, so that the programs
// are killed at once, even those that have their grace after another cause. The
// watch goes on until stop, whatever has ended the work. An error of the database
// ends nothing.
type watch struct {
	claim   store.Claim
	log     *slog.Logger
	isLimit func(error) bool
	step    context.Context // of Execute; work is below it
	work    context.Context
	end     context.CancelCauseFunc // of work
	kill    sync.Once
	killed  chan struct{} // closed by kill

	// Only the goroutine of look uses isolation.
	isolation isolation
	answers   chan func()    // for look to call
	queries   sync.WaitGroup // the goroutines that send them

	cancelLimit, stopLooking context.CancelFunc
	stopped                  chan struct{} // closed at the end of look
}

// withPolicyTime ends the work at the time that the policy lets the step take.
func (a *attempt) withPolicyTime(ctx context.Context) (context.Context, context.CancelFunc) {
	step := a.begun.Claim.Step
	service, known := a.policy.Find(a.begun.Run.TargetService, a.config.Now())
	if !known {
		return withTimeLimit(ctx, a.config.StepTimeLimit, "MM_ORCHESTRATOR_STEP_TIME_LIMIT")
	}
	limit, origin := service.Limits.For(string(step)).Time, limitOrigin(service, step, "time")
	if limit <= 0 || !origin.IsFile() {
		return withTimeLimit(ctx, limit, origin.String())
	}
	return context.WithTimeoutCause(ctx, limit, endCause{timeLimit, &limitError{
		rule: limitRule(service, step, "time", shortDuration(limit)),
		text: fmt.Sprintf("the step took longer than %s (%s)", shortDuration(limit), limitName(service, step, "time")),
	}})
}

// startWatch begins the watch of a step's work, whose context is watch.work. The
// caller must call stop when the work has ended.
func (a *attempt) startWatch(ctx context.Context) *watch {
	w := &watch{
		claim: a.begun.Claim, log: a.log, isLimit: a.isLimit, step: ctx,
		killed: make(chan struct{}), stopped: make(chan struct{}), answers: make(chan func()),
		isolation: isolation{
			limit: a.config.IsolatedAfter, lockConfirmedAt: a.config.Steps.LockConfirmedAt,
			// The commit of the claim was a confirmation too.
			brokerConfirmedAt: a.begun.OwnedAt,
		},
	}
	work, cancelLimit := a.withPolicyTime(ctx)
	work, w.end = context.WithCancelCause(work)
	w.cancelLimit, w.work = cancelLimit, processes.KillWhen(work, w.killed)
	w.revoke(a.begun.Revocation)
	// It does not end with ctx: commands that ctx ends have a grace, and in that
	// time another worker may take the step over.
	looking, stop := context.WithCancel(context.WithoutCancel(ctx))
	w.stopLooking = stop
	go w.look(looking, a.questions(w))
	return w
}

// stop ends the watch and returns why the work was ended: because the worker
// stops, else for the cause that came first.
func (w *watch) stop() endCause {
	w.stopLooking()
	<-w.stopped
	w.queries.Wait()
	cause := endCause{}
	errors.As(context.Cause(w.work), &cause)
	w.end(nil)
	w.cancelLimit()
	switch outer := context.Cause(w.step); {
	case outer != nil && !w.isLimit(outer):
		return endCause{workerStops, outer}
	case outer != nil && cause.reason == notEnded:
		return endCause{timeLimit, outer}
	}
	return cause
}

// endWork ends the work for a cause, if nothing has ended it before. Any goroutine
// may call it.
func (w *watch) endWork(cause endCause) {
	if cause.reason == takenOver || cause.reason == isolated {
		w.kill.Do(func() { close(w.killed) })
	}
	w.end(cause)
}

// revoke ends the work if there is a request to end the run.
func (w *watch) revoke(request *store.Revocation) {
	if request != nil && w.claim.Step != store.StepRollback {
		w.endWork(endCause{revoked, errors.New(request.Text())})
	}
}

// look asks the questions until ctx ends or the step's programs were killed.
func (w *watch) look(ctx context.Context, questions []*question) {
	defer close(w.stopped)
	ticker := time.NewTicker(w.isolation.interval())
	defer ticker.Stop()
	for {
		for _, q := range questions {
			w.askIfDue(ctx, q)
		}
		if cause, isIsolated := w.isolation.cause(w.log); isIsolated {
			faultpoint.Hit(faultpoint.Isolated, w.claim.RunID, string(w.claim.Step))
			w.endWork(cause)
		}
		select {
		case <-ctx.Done():
			return
		case <-w.killed:
			return
		case apply := <-w.answers:
			apply()
		case <-ticker.C:
		}
	}
}

// A question is asked again and again, each time in a goroutine of its own, so
// that a server that does not answer delays nothing else.
type question struct {
	// ask returns what the goroutine of look does with the answer.
	ask func(context.Context) (apply func(), err error)
	// every is the time between two of them, isDue, unless nil, says whether one is
	// of use now.
	every time.Duration
	isDue func() bool

	// Only the goroutine of look uses these.
	asking bool
	next   time.Time
}

func (w *watch) askIfDue(ctx context.Context, q *question) {
	now := time.Now()
	if q.asking || now.Before(q.next) || q.isDue != nil && !q.isDue() {
		return
	}
	q.asking, q.next = true, now.Add(q.every)
	w.queries.Go(func() {
		apply, err := q.ask(ctx)
		answer := func() {
			q.asking = false
			if err != nil {
				q.next = time.Now().Add(min(q.every, retryPause))
				return
			}
			apply()
		}
		select {
		case w.answers <- answer:
		case <-w.stopped:
		}
	})
}

// questions are those that the watch asks database and broker.
func (a *attempt) questions(w *watch) []*question {
	// BeginStep has answered the first of these just now.
	questions := []*question{{every: checkInterval, next: time.Now().Add(checkInterval), ask: func(ctx context.Context) (func(), error) {
		revocation, err := a.config.Steps.CheckClaim(ctx, w.claim)
		if errors.Is(err, store.ErrClaimLost) {
			w.endWork(endCause{takenOver, err})
		}
		return func() { w.revoke(revocation) }, err
	}}}
	if stillUnacked := a.request.StillUnacked; stillUnacked != nil {
		questions = append(questions, &question{every: w.isolation.interval(), isDue: w.isolation.databaseIsLate, ask: func(ctx context.Context) (func(), error) {
			asked := time.Now()
			err := stillUnacked(ctx)
			return func() { w.isolation.brokerConfirmedAt = asked }, err
		}})
	}
	if otherConsumers := a.request.OtherConsumers; otherConsumers != nil {
		questions = append(questions, &question{every: countInterval, ask: func(ctx context.Context) (func(), error) {
			others, err := otherConsumers(ctx)
			return func() {
				if w.isolation.countOthers(others) {
					faultpoint.Hit(faultpoint.OtherConsumersKnown, w.claim.RunID, string(w.claim.Step))
				}
			}, err
		}})
	}
	return questions
}
