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
)

// provenSteps is a database that proves the claim, or falls silent.
type provenSteps struct {
	fakeSteps
	proven func() time.Time
}

func (p *provenSteps) LockConfirmedAt() time.Time { return p.proven() }

var errAway = errors.New("away")

// TestCutOff: the commands of a step are killed when both servers have been
// silent for 1.25 s, and only then; and not where nobody else could take the
// step over.
func TestCutOff(t *testing.T) {
	t.Parallel()
	always, never := []time.Duration{0, time.Hour}, []time.Duration{0, 0}
	type times [][]time.Duration // from, to; since the beginning
	for _, c := range []struct {
		name string
		// database and broker are when each answers.
		database, broker times
		// latency is how old the database's last answer is at best, and how
		// long the broker takes.
		latency time.Duration
		// others are, from time to time, how many others consume the queue, as
		// the broker tells while it is there; lostAt is from when on the
		// message is somebody else's, 0 for never.
		others map[time.Duration]int
		lostAt time.Duration
		// want is when the commands are killed, 0 for never.
		want time.Duration
	}{
		{name: "both answer", database: times{always}, broker: times{always}},
		{name: "both answer late", database: times{always}, broker: times{always}, latency: 700 * time.Millisecond},
		{name: "the database is away", database: times{never}, broker: times{always}},
		{name: "the database is away, the broker slow", database: times{never}, broker: times{always}, latency: 400 * time.Millisecond},
		{name: "the broker is away", database: times{always}, broker: times{never}},
		{name: "both are away from the beginning", database: times{never}, broker: times{never}, want: 1250 * time.Millisecond},
		{name: "both are away", database: times{{0, time.Minute}}, broker: times{{0, time.Minute}}, want: time.Minute + 1250*time.Millisecond},
		{name: "the database comes back in time", database: times{{0, time.Minute}, {61 * time.Second, time.Hour}}, broker: times{{0, time.Minute}}},
		{name: "the broker comes back in time", database: times{{0, time.Minute}}, broker: times{{0, time.Minute}, {61 * time.Second, time.Hour}}},
		{name: "one after the other", database: times{{0, time.Minute}, {3 * time.Minute, time.Hour}}, broker: times{{0, 2 * time.Minute}},
			want: 2*time.Minute + 1250*time.Millisecond},
		{name: "alone, and both are away", database: times{{0, time.Minute}}, broker: times{{0, time.Minute}}, others: map[time.Duration]int{0: 0}},
		{name: "alone, and both come back", others: map[time.Duration]int{0: 0},
			database: times{{0, time.Minute}, {3 * time.Minute, time.Hour}}, broker: times{{0, time.Minute}, {2 * time.Minute, time.Hour}}},
		{name: "not alone, and both are away", database: times{{0, time.Minute}}, broker: times{{0, time.Minute}}, others: map[time.Duration]int{0: 1},
			want: time.Minute + 1250*time.Millisecond},
		{name: "another one comes before both are away", database: times{{0, time.Minute}}, broker: times{{0, time.Minute}},
			others: map[time.Duration]int{0: 0, 57 * time.Second: 1}, want: time.Minute + 1250*time.Millisecond},
		{name: "the others go before both are away", database: times{{0, time.Minute}}, broker: times{{0, time.Minute}},
			others: map[time.Duration]int{0: 2, 30 * time.Second: 1, 57 * time.Second: 0}},
		{name: "another one comes while both are away and has the message", others: map[time.Duration]int{0: 0, 90 * time.Second: 1},
			database: times{{0, time.Minute}}, broker: times{{0, time.Minute}, {2 * time.Minute, time.Hour}}, lostAt: 90 * time.Second,
			want: 2*time.Minute + 50*time.Millisecond},
		{name: "nobody has told yet who else is there", database: times{never}, broker: times{never}, others: map[time.Duration]int{time.Second: 0},
			want: 1250 * time.Millisecond},
		{name: "it is known late", database: times{{0, time.Minute}}, broker: times{{0, time.Minute}}, others: map[time.Duration]int{0: -1, 57 * time.Second: 0}},
		{name: "it is never known", database: times{{0, time.Minute}}, broker: times{{0, time.Minute}}, others: map[time.Duration]int{0: -1},
			want: time.Minute + 1250*time.Millisecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				begun := time.Now()
				within := func(spans times) (time.Time, bool) {
					now, last := time.Since(begun), time.Duration(0)
					for _, span := range spans {
						if now >= span[0] {
							last = min(now, span[1])
						}
					}
					return begun.Add(last), last == now
				}
				steps := &provenSteps{proven: func() time.Time {
					last, _ := within(c.database)
					return last.Add(-c.latency)
				}}
				// A silent broker never answers, until it is there again.
				broker := func(ctx context.Context) error {
					for {
						if _, there := within(c.broker); there {
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
				held := func(ctx context.Context) error {
					if c.lostAt != 0 && time.Since(begun) > c.lostAt {
						return errAway
					}
					return broker(ctx)
				}
				others := func(ctx context.Context) (int, error) {
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
						return 0, errAway
					}
					return c.others[since], nil
				}
				o := &Orchestrator{config: Config{Steps: steps}.WithDefaults()}
				work, stop := o.endWhenCutOff(t.Context(), slog.New(slog.DiscardHandler), Request{Held: held, OtherConsumers: others}, store.Start{OwnedAt: begun})
				defer stop()
				select {
				case <-work.Done():
				case <-time.After(10 * time.Minute):
				}
				took := time.Since(begun)
				if ended := work.Err() != nil; ended != (c.want != 0) {
					t.Fatalf("ended: %v after %s (%v), want %s", ended, took, context.Cause(work), c.want)
				}
				// The broker's last proof is as old as the last question.
				if c.want != 0 && (took > c.want+110*time.Millisecond || took < c.want-250*time.Millisecond) {
					t.Errorf("killed after %s, want %s", took, c.want)
				}
			})
		})
	}
}

// TestCutOffIsBelowTheGrace: a worker that is cut off has time to kill its
// commands before a successor may begin.
func TestCutOffIsBelowTheGrace(t *testing.T) {
	t.Parallel()
	grace, after := store.Config{}.WithDefaults().TakeoverGrace, Config{}.WithDefaults().CutOffAfter
	if grace-after < 500*time.Millisecond {
		t.Errorf("commands are killed after %s, others begin after %s", after, grace)
	}
}

// TestCutOffStepGoesBack: the command is killed without a grace, nothing is
// recorded, and the step is given back when the database is there again.
func TestCutOffStepGoesBack(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.repository()
	b.config.KillGrace, b.config.CutOffAfter = time.Hour, 200*time.Millisecond
	b.program("docker", `trap '' TERM; touch began; sleep 600`)
	b.plan(`[{"name": "build"}]`)
	b.steps.silent = true
	b.steps.releaseErrs = []error{errAway, errAway}
	o, err := New(b.config)
	if err != nil {
		t.Fatal(err)
	}
	var asked atomic.Int32
	held := func(context.Context) error {
		asked.Add(1)
		// It is held until the command runs.
		if _, err := os.Stat(filepath.Join(b.workspace, "began")); err != nil {
			return nil
		}
		return errAway
	}
	_, err = o.Execute(t.Context(), Request{RunID: testRun, Step: "build", TaskID: "task-1", Held: held}, nil)
	var back *HandBackError
	if !errors.As(err, &back) {
		t.Fatalf("%v, want the message to go back", err)
	}
	if len(b.steps.finished) != 0 || b.steps.released != 1 || asked.Load() == 0 {
		t.Errorf("recorded %v, released %d times, asked %d times", b.steps.finished, b.steps.released, asked.Load())
	}
}
