package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// newCountingEnv makes a testEnv with the programs a, b and c. Each prints a line
// and counts its starts in a file. b fails with the code in the file code, if
// there is one, and does not end while the file hold exists.
func newCountingEnv(t *testing.T) *testEnv {
	b := newTestEnv(t)
	b.config.Programs, b.config.RollbackCommands = []string{"a", "b", "c"}, true
	here := `cd "$(dirname "$0")"; echo "$(basename "$0") works"; echo x >> $(basename "$0").starts`
	b.program("a", here)
	b.program("b", here+`; while [ -e hold ]; do sleep 0.02; done; [ ! -e code ] || exit "$(cat code)"`)
	b.program("c", here)
	b.repository()
	return b
}

// starts is how often each of the programs was started.
func (b *testEnv) starts() string {
	var counts []string
	for _, name := range []string{"a", "b", "c"} {
		text, _ := os.ReadFile(filepath.Join(b.bin, name+".starts"))
		counts = append(counts, fmt.Sprint(len(text)/2))
	}
	return strings.Join(counts, " ")
}

// takeOver makes the next execution that of a worker which takes the step over.
func (b *testEnv) takeOver(step string) {
	b.t.Helper()
	if len(b.steps.recorded) == 0 {
		b.t.Fatal("no progress is recorded")
	}
	progress := b.steps.recorded[len(b.steps.recorded)-1]
	b.steps.decision = store.Start{
		Run: b.steps.run, Progress: &progress, PreviousWorker: "orchestrator@first",
		Claim: store.Claim{RunID: testRun, Step: store.Step(step), Attempt: 1, TaskID: "task-1", Starts: 2, StartedAt: time.Now()},
	}
}

// stopIn runs a step and stops the worker when b has begun.
func (b *testEnv) stopIn(step string) {
	b.t.Helper()
	hold := filepath.Join(b.bin, "hold")
	if err := os.WriteFile(hold, nil, 0o644); err != nil {
		b.t.Fatal(err)
	}
	b.config.KillGrace = 100 * time.Millisecond
	ctx, stop := context.WithCancelCause(b.t.Context())
	go func() {
		awaitFile(b.t, filepath.Join(b.bin, "b.starts"))
		stop(worker.ErrShutdown)
	}()
	if _, _, err := b.executeIn(ctx, step); !errors.Is(err, worker.ErrShutdown) || b.steps.released != 1 {
		b.t.Fatalf("%v, released %d", err, b.steps.released)
	}
	if err := os.Remove(hold); err != nil {
		b.t.Fatal(err)
	}
}

const threeCommands = `[{"name": "patch", "parameters": {"commands": [["a"], ["b", "2"], ["c"]]}},
	{"name": "rollback", "parameters": {"strategies": [{"type": "one", "commands": [["a"]]}, {"type": "two", "commands": [["b", "2"], ["c"]]}]}}]`

func TestCommandsThatHaveEndedAreNotRunAgain(t *testing.T) {
	t.Parallel()
	const note = "[Worker orchestrator@first has left this step unfinished; this is start 2 of it. Its first command had ended, and is not run again."
	for step, logs := range map[string][2]string{
		"patch": {
			"a\na works\nb 2\nb works\n" + note + "]\nb 2\nb works\nc\nc works",
			note + " What was logged is lost.]\na\n[ended before with code 0]\nb 2\nb works\nc\nc works",
		},
		"rollback": {
			"Executing rollback strategy: one\na\na works\nExecuting rollback strategy: two\nb 2\nb works\n" +
				"rollback step failed while executing orchestrator command.\nCommand b 2 was ended: worker is shutting down\n" + note + "]\n" +
				"Executing rollback strategy: two\nb 2\nb works\nc\nc works",
			note + " What was logged is lost.]\nExecuting rollback strategy: one\na\n[ended before with code 0]\n" +
				"Executing rollback strategy: two\nb 2\nb works\nc\nc works",
		},
	} {
		for i, want := range logs {
			t.Run(fmt.Sprintf("%s with%s its log", step, []string{"", "out"}[i]), func(t *testing.T) {
				t.Parallel()
				b := newCountingEnv(t)
				b.plan(threeCommands)
				b.stopIn(step)
				b.takeOver(step)
				if i == 1 {
					if err := os.Remove(filepath.Join(b.base, testRun, step+".log")); err != nil {
						t.Fatal(err)
					}
				}
				b.succeed(step)
				same(t, "starts of a, b, c", b.starts(), "1 2 1")
				same(t, "log", b.artifact(step+".log"), want)
				var ends []string
				for _, p := range b.steps.recorded {
					ends = append(ends, fmt.Sprintf("%d:%d", p.Commands, p.ExitCode))
				}
				same(t, "recorded ends", strings.Join(ends, " "), "1:0 2:0 3:0")
			})
		}
	}
}

func TestARecordedFailureFailsTheStep(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"build", "patch", "rollback"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			b := newCountingEnv(t)
			if err := os.WriteFile(filepath.Join(b.bin, "code"), []byte("3"), 0o644); err != nil {
				t.Fatal(err)
			}
			b.plan(strings.Replace(threeCommands, "[{", `[{"name": "build", "parameters": {"command": ["b"]}}, {`, 1))
			first, _ := b.fail(step)
			if last := b.steps.recorded[len(b.steps.recorded)-1]; last.ExitCode != 3 {
				t.Errorf("recorded: %+v", last)
			}
			before := b.starts()
			b.takeOver(step)
			second, outcome := b.fail(step)
			same(t, "starts of a, b, c", b.starts(), before)
			same(t, "failure", second.Error(), first.Error())
			if !strings.Contains(second.Error(), "failed with code 3: b works") {
				t.Errorf("failure %q", second.Error())
			}
			if len(outcome.Artifacts) != 1 {
				t.Errorf("artifacts %v", outcome.Artifacts)
			}
		})
	}
}

func TestAnotherPlanIsRunFromItsBeginning(t *testing.T) {
	t.Parallel()
	b := newCountingEnv(t)
	b.plan(threeCommands)
	b.succeed("patch")
	b.takeOver("patch")
	b.plan(strings.Replace(threeCommands, `["a"]`, `["a", "other"]`, 1))
	b.steps.decision = store.Start{Run: b.steps.run, Progress: &b.steps.recorded[2], Claim: b.steps.decision.(store.Start).Claim}
	b.succeed("patch")
	same(t, "starts of a, b, c", b.starts(), "2 2 2")
}

// A step waits a while for its first record. Later ones are written when the
// database is available again.
func TestAStepDoesNotWaitForAnUnavailableDatabase(t *testing.T) {
	t.Parallel()
	b := newCountingEnv(t)
	b.plan(threeCommands)
	hold := filepath.Join(b.bin, "hold")
	if err := os.WriteFile(hold, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	var unavailable atomic.Bool
	var waited atomic.Int32
	unavailable.Store(true)
	b.steps.record = func(ctx context.Context) error {
		if _, bounded := ctx.Deadline(); bounded {
			waited.Add(1)
		}
		if unavailable.Load() {
			return fmt.Errorf("unreachable: %w", store.ErrUnavailable)
		}
		return nil
	}
	go func() {
		awaitFile(t, filepath.Join(b.bin, "b.starts"))
		unavailable.Store(false)
		recorded := func() bool {
			b.steps.mu.Lock()
			defer b.steps.mu.Unlock()
			return len(b.steps.recorded) == 1 && b.steps.recorded[0].Commands == 1
		}
		for deadline := time.Now().Add(time.Minute); !recorded() && time.Now().Before(deadline); {
			time.Sleep(5 * time.Millisecond)
		}
		if !recorded() {
			t.Error("the record is not written later")
		}
		unavailable.Store(true)
		_ = os.Remove(hold)
	}()
	b.succeed("patch")
	same(t, "starts of a, b, c", b.starts(), "1 1 1")
	// It waits for a's record, and for b's as the database had been available. c's
	// record is left to the retries of b's.
	if n := waited.Load(); n != 2 {
		t.Errorf("the step waited for %d records", n)
	}
}

func TestAStepThatWasTakenOverEndsAtOnce(t *testing.T) {
	t.Parallel()
	b := newCountingEnv(t)
	b.plan(threeCommands)
	lost := fmt.Errorf("another worker has it: %w", store.ErrClaimLost)
	b.steps.record = func(context.Context) error { return lost }
	b.steps.finishErrs = []error{lost}
	if _, _, err := b.execute("patch"); !errors.Is(err, ErrStop) {
		t.Errorf("%v, want ErrStop", err)
	}
	same(t, "starts of a, b, c", b.starts(), "1 0 0")
}

// A killed command may have done its work or not, so its end is not recorded.
func TestTheEndOfAKilledCommandIsNotRecorded(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.program("docker", `sleep 60 & wait`)
	b.plan(`[{"name": "build", "parameters": {"timeoutSeconds": 0.2}}]`)
	b.fail("build")
	b.program("docker", `kill -9 $$`)
	b.plan(`[{"name": "build"}]`)
	b.fail("build")
	if len(b.steps.recorded) > 0 {
		t.Errorf("recorded: %+v", b.steps.recorded)
	}
}
