package amqp

import (
	"context"
	"errors"
	"net"
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// silent calls do with a connection to a broker that answers nothing, on the clock of
// testing/synctest.
func silent(t *testing.T, do func(t *testing.T, ctx context.Context, c *connection)) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		defer ours.Close()
		defer theirs.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 24*time.Hour)
		defer cancel()
		do(t, ctx, &connection{raw: ours, callTimeout: callTimeout, lost: make(chan struct{})})
	})
}

// A connection counts as lost when the broker leaves a call unanswered for callTimeout.
// It does not while the broker is blocked, and not because of a query, for which the
// broker may take any time. Either ends with its context.
func TestOnlyACallThatMustBeAnsweredLosesTheConnection(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct{ patient, blocked, lost bool }{
		"a call": {lost: true}, "a query": {patient: true}, "a call of a blocked broker": {blocked: true}, "a query of a blocked broker": {patient: true, blocked: true},
	} {
		t.Run(name, func(t *testing.T) {
			silent(t, func(t *testing.T, ctx context.Context, c *connection) {
				if tt.blocked {
					c.SetBlocked(true)
				}
				answer := make(chan struct{})
				defer close(answer)
				began := time.Now()
				_, err := ask(ctx, c, callOptions{what: "a call", patient: tt.patient}, func() (int, error) { <-answer; return 0, nil })
				switch took := time.Since(began); {
				case tt.lost && (!c.isLost() || took != callTimeout):
					t.Errorf("%v after %v, want the connection to be lost after %v", err, took, callTimeout)
				case !tt.lost && (c.isLost() || !errors.Is(err, context.DeadlineExceeded) || took != 24*time.Hour):
					t.Errorf("%v after %v, lost %v; want the end of the context", err, took, c.isLost())
				}
			})
		})
	}
}

// A message that the broker neither confirms nor returns loses the connection after
// confirmTimeout, in which time while the broker is blocked does not count.
func TestAnUnconfirmedMessageLosesTheConnectionUnlessTheBrokerIsBlocked(t *testing.T) {
	t.Parallel()
	silent(t, func(t *testing.T, _ context.Context, c *connection) {
		p := &publisher{connection: c}
		const before, blocked = confirmTimeout / 2, time.Hour
		time.AfterFunc(before, func() { c.SetBlocked(true) })
		time.AfterFunc(before+blocked, func() { c.SetBlocked(false) })
		began := time.Now()
		err := p.await(&amqp.DeferredConfirmation{})
		if took := time.Since(began); err == nil || !c.isLost() || took < blocked+confirmTimeout || took > blocked+confirmTimeout+time.Second {
			t.Errorf("%v after %v, lost %v; want the loss after %v", err, took, c.isLost(), blocked+confirmTimeout)
		}
		if got := c.Blocked(); got != blocked {
			t.Errorf("the broker was blocked for %v, want %v", got, blocked)
		}
	})
}
