package orchestrator

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// A worker that has lost its claim without noticing ends its command as soon as it
// can ask the database, without a grace, and does not record the end of the step.
func TestAWorkerThatLostItsClaimEndsItsCommand(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.repository()
	b.config.KillGrace = time.Hour
	b.program("docker", `trap '' TERM; touch began; sleep 600`)
	b.plan(`[{"name": "build"}]`)
	b.steps.takenOver = func() bool {
		_, err := os.Stat(filepath.Join(b.workspace, "began"))
		return err == nil
	}
	b.steps.finishErrs = []error{store.ErrClaimLost}
	o, err := New(b.config)
	if err != nil {
		t.Fatal(err)
	}
	_, err = o.Execute(t.Context(), Request{RunID: testRun, Step: "build", TaskID: "task-1"}, nil)
	if !errors.Is(err, ErrStop) {
		t.Fatalf("%v, want ErrStop", err)
	}
	if len(b.steps.finished) != 0 || b.steps.released != 0 {
		t.Errorf("recorded %v, released %d times", b.steps.finished, b.steps.released)
	}
}

// A run revoked between two steps: the next one fails before it does anything.
func TestARevokedStepDoesNothing(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.program("docker", `echo ran >ran`)
	b.plan(`[{"name": "build"}]`)
	b.steps.revoked = &store.Revocation{Reason: "wrong branch"}
	failure, _ := b.fail("build")
	if failure.Arg != "Revoked by operator: wrong branch" || failure.Type != "TaskRevokedError" || !strings.HasSuffix(failure.Traceback, "TaskRevokedError: Revoked by operator: wrong branch\n") {
		t.Errorf("%+v", failure)
	}
	if log := b.artifact("build.log"); strings.Contains(log, "docker") {
		t.Errorf("log %q", log)
	}
}

// The message of a revoked step has the reason once, although the error of the command
// that was ended has it too.
func TestRevokedMessageHasTheReasonOnce(t *testing.T) {
	t.Parallel()
	const reason = "Revoked by operator ann@box: wrong branch"
	cause := endCause{revoked, errors.New(reason)}
	for _, tt := range []struct{ message, want string }{
		{"Command sleep 12 was ended: " + reason + " (see build.log)", reason + ". Command sleep 12 was ended (see build.log)"},
		{"Command false failed", reason + ". Command false failed"},
		{reason, reason},
		{"", reason},
	} {
		outcome := revokedOutcome(store.Outcome{Status: store.StepFailed, Message: tt.message}, cause)
		same(t, "message", outcome.Message, tt.want)
	}
}

// The time limit of a step is the shorter of the plan's and the configured one.
func TestAPlanLimitsAStep(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.config.StepTimeLimit = time.Hour
	b.program("docker", `exec sleep 600`)
	b.plan(`[{"name": "build", "parameters": {"timeoutSeconds": 0.3}}]`)
	failure, _ := b.fail("build")
	if !strings.Contains(failure.Arg, "longer than its limit of 300ms") {
		t.Error(failure.Arg)
	}
	b.plan(`[{"name": "build", "parameters": {"timeoutSeconds": -1}}]`)
	if failure, _ := b.fail("build"); !strings.Contains(failure.Arg, "timeoutSeconds") {
		t.Error(failure.Arg)
	}
}

// What ends a step's work: the first cause, unless the worker stops. Another worker
// may begin the step when this one is isolated or has lost its claim, so that these
// two also kill the programs whose grace an earlier cause has begun.
func TestWatchHasOneCause(t *testing.T) {
	t.Parallel()
	const (
		stops = iota
		messageLimit
		stepLimit
		revokes
		takesOver
		isolates
		givesBack
	)
	for name, test := range map[string]struct {
		events []int
		step   store.Step
		want   endReason
		kills  bool
	}{
		"nothing":                      {want: notEnded},
		"stop":                         {events: []int{stops}, want: workerStops},
		"limit of the message":         {events: []int{messageLimit}, want: timeLimit},
		"limit of the step":            {events: []int{stepLimit}, want: timeLimit},
		"revoked":                      {events: []int{revokes}, want: revoked},
		"revoked in a rollback":        {events: []int{revokes}, step: store.StepRollback, want: notEnded},
		"taken over":                   {events: []int{takesOver}, want: takenOver, kills: true},
		"isolated":                     {events: []int{isolates}, want: isolated, kills: true},
		"given back":                   {events: []int{givesBack}, want: givenBack},
		"given back, then stop":        {events: []int{givesBack, stops}, want: workerStops},
		"revoked, then isolated":       {events: []int{revokes, isolates}, want: revoked, kills: true},
		"limit, then taken over":       {events: []int{stepLimit, takesOver}, want: timeLimit, kills: true},
		"isolated, then revoked":       {events: []int{isolates, revokes}, want: isolated, kills: true},
		"isolated, then message limit": {events: []int{isolates, messageLimit}, want: isolated, kills: true},
		"revoked, then stop":           {events: []int{revokes, stops}, want: workerStops},
		"stop, then isolated":          {events: []int{stops, isolates}, want: workerStops, kills: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				steps := &fakeSteps{}
				ctx, end := context.WithCancelCause(t.Context())
				defer end(nil)
				a := &attempt{
					Orchestrator: bare(Config{Steps: steps, StepTimeLimit: time.Hour}),
					log:          slog.New(slog.DiscardHandler), isLimit: isTimeLimit,
					begun: store.Start{OwnedAt: time.Now(), Claim: store.Claim{RunID: testRun, Step: test.step}},
				}
				watch := a.startWatch(ctx)
				for _, event := range test.events {
					switch event {
					case stops:
						end(worker.ErrShutdown)
					case messageLimit:
						end(worker.ErrSoftTimeLimit)
					case stepLimit:
						time.Sleep(time.Hour)
					case revokes:
						steps.mu.Lock()
						steps.revoked = &store.Revocation{Reason: "wrong branch"}
						steps.mu.Unlock()
					case takesOver:
						watch.endWork(endCause{takenOver, store.ErrClaimLost})
					case givesBack:
						watch.endWork(endCause{givenBack, errors.New("the next worker goes on")})
					case isolates:
						steps.mu.Lock()
						steps.silent = true
						steps.mu.Unlock()
					}
					time.Sleep(2 * time.Second)
				}
				select {
				case <-watch.killed:
					if !test.kills {
						t.Error("the programs are killed")
					}
				default:
					if test.kills {
						t.Error("the programs have their grace")
					}
				}
				if cause := watch.stop(); cause.reason != test.want {
					t.Errorf("%d, want %d", cause.reason, test.want)
				}
			})
		})
	}
}

// One query of the database each half second says whether a step may go on, and a
// database that does not answer gets no second one meanwhile.
func TestWatchAsksOnceEachHalfSecond(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int32
		var silent atomic.Bool
		steps := &fakeSteps{takenOver: func() bool {
			asked.Add(1)
			if silent.Load() {
				time.Sleep(5 * time.Second)
			}
			return false
		}}
		a := &attempt{
			Orchestrator: bare(Config{Steps: steps}), log: slog.New(slog.DiscardHandler),
			begun: store.Start{OwnedAt: time.Now()},
		}
		watch := a.startWatch(t.Context())
		time.Sleep(10 * time.Second)
		if n := asked.Swap(0); n < 16 || n > 21 {
			t.Errorf("asked %d times in 10 s", n)
		}
		silent.Store(true)
		time.Sleep(10 * time.Second)
		if n := asked.Load(); n > 3 {
			t.Errorf("asked %d times in 10 s a database that answers after 5 s", n)
		}
		watch.stop()
	})
}
