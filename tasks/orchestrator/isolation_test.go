package orchestrator

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// confirmingSteps is a database whose last confirmation of the lock the test sets.
type confirmingSteps struct {
	fakeSteps
	confirmedAt func() time.Time
}

func (p *confirmingSteps) LockConfirmedAt() time.Time { return p.confirmedAt() }

var errUnreachable = errors.New("unreachable")

// The commands of a step are killed when both servers have not answered for
// 1.25 s, and only then; and not if nobody else could take the step over.
func TestIsolation(t *testing.T) {
	t.Parallel()
	always, never := []time.Duration{0, time.Hour}, []time.Duration{0, 0}
	type times [][]time.Duration // from, to; since the beginning
	for _, c := range []struct {
		name string
		// database and broker say when each answers.
		database, broker times
		// latency is how old the database's last answer is at least, and how long
		// an answer of the broker takes.
		latency time.Duration
		// others is the number of other consumers by the time from which it holds,
		// -1 for an error of the broker; lostAt is when another consumer gets the
		// message, 0 for never.
		others map[time.Duration]int
		lostAt time.Duration
		// want is when the commands are killed, 0 for never.
		want time.Duration
	}{
		{name: "both answer", database: times{always}, broker: times{always}},
		{name: "both answer late", database: times{always}, broker: times{always}, latency: 700 * time.Millisecond},
		{name: "the database is unavailable", database: times{never}, broker: times{always}},
		{name: "the database is unavailable, the broker slow", database: times{never}, broker: times{always}, latency: 400 * time.Millisecond},
		{name: "the broker is unavailable", database: times{always}, broker: times{never}},
		{name: "both are unavailable from the beginning", database: times{never}, broker: times{never}, want: 1250 * time.Millisecond},
		{name: "both are unavailable", database: times{{0, time.Minute}}, broker: times{{0, time.Minute}}, want: time.Minute + 1250*time.Millisecond},
		{name: "the database is back in time", database: times{{0, time.Minute}, {61 * time.Second, time.Hour}}, broker: times{{0, time.Minute}}},
		{name: "the broker is back in time", database: times{{0, time.Minute}}, broker: times{{0, time.Minute}, {61 * time.Second, time.Hour}}},
		{name: "one after the other", database: times{{0, time.Minute}, {3 * time.Minute, time.Hour}}, broker: times{{0, 2 * time.Minute}},
			want: 2*time.Minute + 1250*time.Millisecond},
		{name: "alone, and both are unavailable", database: times{{0, time.Minute}}, broker: times{{0, time.Minute}}, others: map[time.Duration]int{0: 0}},
		{name: "alone, and both are available again", others: map[time.Duration]int{0: 0},
			database: times{{0, time.Minute}, {3 * time.Minute, time.Hour}}, broker: times{{0, time.Minute}, {2 * time.Minute, time.Hour}}},
		{name: "not alone, and both are unavailable", database: times{{0, time.Minute}}, broker: times{{0, time.Minute}}, others: map[time.Duration]int{0: 1},
			want: time.Minute + 1250*time.Millisecond},
		{name: "another consumer starts before both are unavailable", database: times{{0, time.Minute}}, broker: times{{0, time.Minute}},
			others: map[time.Duration]int{0: 0, 57 * time.Second: 1}, want: time.Minute + 1250*time.Millisecond},
		{name: "the other consumers end before both are unavailable", database: times{{0, time.Minute}}, broker: times{{0, time.Minute}},
			others: map[time.Duration]int{0: 2, 30 * time.Second: 1, 57 * time.Second: 0}},
		{name: "another consumer starts while both are unavailable and gets the message", others: map[time.Duration]int{0: 0, 90 * time.Second: 1},
			database: times{{0, time.Minute}}, broker: times{{0, time.Minute}, {2 * time.Minute, time.Hour}}, lostAt: 90 * time.Second,
			want: 2*time.Minute + 50*time.Millisecond},
		{name: "other consumers were not counted yet", database: times{never}, broker: times{never}, others: map[time.Duration]int{time.Second: 0},
			want: 1250 * time.Millisecond},
		{name: "other consumers are counted late", database: times{{0, time.Minute}}, broker: times{{0, time.Minute}}, others: map[time.Duration]int{0: -1, 57 * time.Second: 0}},
		{name: "other consumers are never counted", database: times{{0, time.Minute}}, broker: times{{0, time.Minute}}, others: map[time.Duration]int{0: -1},
			want: time.Minute + 1250*time.Millisecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				begun := time.Now()
				lastAnswer := func(spans times) (time.Time, bool) {
					now, last := time.Since(begun), time.Duration(0)
					for _, span := range spans {
						if now >= span[0] {
							last = min(now, span[1])
						}
					}
					return begun.Add(last), last == now
				}
				steps := &confirmingSteps{confirmedAt: func() time.Time {
					last, _ := lastAnswer(c.database)
					return last.Add(-c.latency)
				}}
				// An unavailable broker does not answer until it is available again.
				broker := func(ctx context.Context) error {
					for {
						if _, available := lastAnswer(c.broker); available {
							time.Sleep(c.latency)
							return nil
						}
						select {
						case <-ctx.Done():
							return ctx.Err()
						case <-time.After(50 * time.Millisecond):
						}
					}
				}
				stillUnacked := func(ctx context.Context) error {
					if c.lostAt != 0 && time.Since(begun) > c.lostAt {
						return errUnreachable
					}
					return broker(ctx)
				}
				otherConsumers := func(ctx context.Context) (int, error) {
					if err := broker(ctx); err != nil {
						return 0, err
					}
					now, since := time.Since(begun), time.Duration(-1)
					for from := range c.others {
						if from <= now {
							since = max(since, from)
						}
					}
					if since < 0 || c.others[since] < 0 {
						return 0, errUnreachable
					}
					return c.others[since], nil
				}
				a := &attempt{
					Orchestrator: bare(Config{Steps: steps}), log: slog.New(slog.DiscardHandler),
					request: Request{StillUnacked: stillUnacked, OtherConsumers: otherConsumers}, begun: store.Start{OwnedAt: begun},
				}
				watch := a.startWatch(t.Context())
				select {
				case <-watch.work.Done():
				case <-time.After(10 * time.Minute):
				}
				took := time.Since(begun)
				cause := watch.stop()
				if (cause.reason == isolated) != (c.want != 0) {
					t.Fatalf("ended: %v after %s, want %s", cause, took, c.want)
				}
				// The broker's last confirmation is as old as the last query.
				if c.want != 0 && (took > c.want+110*time.Millisecond || took < c.want-250*time.Millisecond) {
					t.Errorf("killed after %s, want %s", took, c.want)
				}
			})
		})
	}
}

// An isolated worker has time to kill its commands before another worker may
// begin the step.
func TestIsolatedAfterIsBelowTheTakeoverGrace(t *testing.T) {
	t.Parallel()
	grace, after := store.Config{}.WithDefaults().TakeoverGrace, Config{}.WithDefaults().IsolatedAfter
	if grace-after < 500*time.Millisecond {
		t.Errorf("commands are killed after %s, others begin after %s", after, grace)
	}
}

// When a worker is isolated, the command is killed without a grace, no end is
// recorded, and the claim is released when the database is available again.
// A time limit of the message that passes meanwhile changes nothing of that.
func TestAStepOfAnIsolatedWorkerIsHandedBack(t *testing.T) {
	t.Parallel()
	for name, limit := range map[string]bool{"": false, "after a time limit": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testIsolatedHandBack(t, limit)
		})
	}
}

func testIsolatedHandBack(t *testing.T, limit bool) {
	b := newTestEnv(t)
	b.repository()
	b.config.KillGrace, b.config.IsolatedAfter = time.Hour, 200*time.Millisecond
	b.program("docker", `trap '' TERM; touch began; sleep 600`)
	b.plan(`[{"name": "build"}]`)
	b.steps.silent = true
	b.steps.releaseErrs = []error{errUnreachable, errUnreachable}
	o, err := New(b.config)
	if err != nil {
		t.Fatal(err)
	}
	ctx, end := context.WithCancelCause(t.Context())
	defer end(nil)
	if limit {
		b.steps.onRelease = func() { end(worker.ErrSoftTimeLimit) }
	}
	var asked atomic.Int32
	stillUnacked := func(context.Context) error {
		asked.Add(1)
		// The message is still unacked until the command runs.
		if _, err := os.Stat(filepath.Join(b.workspace, "began")); err != nil {
			return nil
		}
		return errUnreachable
	}
	_, err = o.Execute(ctx, Request{RunID: testRun, Step: "build", TaskID: "task-1", StillUnacked: stillUnacked}, isTimeLimit)
	var back *HandBackError
	if !errors.As(err, &back) {
		t.Fatalf("%v, want the message handed back", err)
	}
	if len(b.steps.finished) != 0 || b.steps.released != 1 || asked.Load() == 0 {
		t.Errorf("recorded %v, released %d times, asked %d times", b.steps.finished, b.steps.released, asked.Load())
	}
}
