package timeout_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/moonladderstudios/mm-orchestrator/internal/timeout"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Every timeout ends when it should, in whatever order they were set, and so do the
// contexts below.
func TestTimeoutsEndInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var group timeout.Group
		var all sync.WaitGroup
		began := time.Now()
		for _, limit := range []time.Duration{3 * time.Second, time.Second, 2 * time.Second, time.Second, time.Hour, time.Millisecond} {
			ctx, cancel := group.Context(t.Context(), limit)
			if deadline, ok := ctx.Deadline(); !ok || deadline.Sub(began) != limit || ctx.Err() != nil {
				t.Errorf("%v: deadline %v, error %v", limit, deadline.Sub(began), ctx.Err())
			}
			below, cancelBelow := context.WithCancel(ctx)
			over, stop := group.After(limit)
			for what, done := range map[string]<-chan struct{}{"context": ctx.Done(), "context below": below.Done(), "channel": over} {
				all.Go(func() {
					<-done
					if took := time.Since(began); took != limit {
						t.Errorf("%s ended after %v, want %v", what, took, limit)
					}
				})
			}
			all.Go(func() {
				<-below.Done()
				if !errors.Is(ctx.Err(), context.DeadlineExceeded) || context.Cause(ctx) != context.DeadlineExceeded || context.Cause(below) != context.DeadlineExceeded {
					t.Errorf("%v: error %v, cause %v, below %v", limit, ctx.Err(), context.Cause(ctx), context.Cause(below))
				}
				cancel()
				cancelBelow()
				stop()
			})
		}
		all.Wait()
	})
}

// What was stopped or cancelled before does not end later.
func TestTimeoutsThatAreStopped(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var group timeout.Group
		ctx, cancel := group.Context(t.Context(), time.Second)
		over, stop := group.After(time.Second)
		kept, cancelKept := group.Context(t.Context(), 2*time.Second)
		defer cancelKept()
		cancel()
		stop()
		stop()
		if ctx.Err() != context.Canceled || context.Cause(ctx) != context.Canceled {
			t.Errorf("error %v, cause %v", ctx.Err(), context.Cause(ctx))
		}
		<-kept.Done()
		select {
		case <-over:
			t.Error("it has ended")
		default:
		}
		if ctx.Err() != context.Canceled || kept.Err() != context.DeadlineExceeded {
			t.Errorf("errors %v and %v", ctx.Err(), kept.Err())
		}
	})
}

// The end of the parent is that of the context, with its error and its cause.
func TestTimeoutsBelowOthers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var group timeout.Group
		shutdown := errors.New("shutdown")
		parent, cancelParent := context.WithCancelCause(t.Context())
		ctx, cancel := group.Context(parent, time.Hour)
		defer cancel()
		cancelParent(shutdown)
		if ctx.Err() != context.Canceled || context.Cause(ctx) != shutdown {
			t.Errorf("cancelled: error %v, cause %v", ctx.Err(), context.Cause(ctx))
		}
		short, cancelShort := group.Context(t.Context(), time.Second)
		defer cancelShort()
		for _, limit := range []time.Duration{time.Second, time.Hour} {
			below, cancelBelow := group.Context(short, limit)
			defer cancelBelow()
			if deadline, _ := below.Deadline(); time.Until(deadline) != time.Second {
				t.Errorf("deadline in %v", time.Until(deadline))
			}
			defer func() {
				if below.Err() != context.DeadlineExceeded || context.Cause(below) != context.DeadlineExceeded {
					t.Errorf("error %v, cause %v", below.Err(), context.Cause(below))
				}
			}()
		}
		<-short.Done()
		past, cancelPast := group.Context(t.Context(), 0)
		defer cancelPast()
		if past.Err() != context.DeadlineExceeded {
			t.Errorf("no time: error %v", past.Err())
		}
		synctest.Wait()
	})
}

// Many goroutines use a group at once.
func TestTimeoutsOfManyGoroutines(t *testing.T) {
	t.Parallel()
	var group timeout.Group
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for i := range 300 {
				ctx, cancel := group.Context(t.Context(), time.Duration(i%3+1)*100*time.Microsecond)
				if i%2 == 0 {
					<-ctx.Done()
					if ctx.Err() != context.DeadlineExceeded {
						t.Error(ctx.Err())
					}
				}
				cancel()
			}
		})
	}
	all.Wait()
}

func BenchmarkContext(b *testing.B) {
	for name, with := range map[string]func(context.Context, time.Duration) (context.Context, context.CancelFunc){
		"group": new(timeout.Group).Context, "runtime": context.WithTimeout,
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				_, cancel := with(b.Context(), time.Minute)
				cancel()
			}
		})
	}
}
