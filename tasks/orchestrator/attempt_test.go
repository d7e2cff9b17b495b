package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// recordedMetrics records its calls.
type recordedMetrics struct {
	mu    sync.Mutex
	calls []string
}

func (m *recordedMetrics) record(what ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.calls = append(m.calls, strings.TrimSpace(fmt.Sprintln(what...)))
}
func (m *recordedMetrics) StepStarted(step string) { m.record("started", step) }
func (m *recordedMetrics) StepFinished(step string, ok bool, _ time.Duration) {
	m.record("finished", step, ok)
}
func (m *recordedMetrics) RunStatus(status string)                    { m.record("status", status) }
func (m *recordedMetrics) RunFinished(status string, _ time.Duration) { m.record("run", status) }
func (m *recordedMetrics) Paused(bool)                                {}

func TestMetricsFollowTheRun(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	metrics := &recordedMetrics{}
	b.config.Metrics = metrics
	b.config.Engine = &fakeEngine{containers: func(int, string) ([]compose.Container, error) {
		return []compose.Container{{ID: "1", State: "running", Health: "healthy"}}, nil
	}}
	b.plan(`[{"name": "analyze"}, {"name": "verify"}]`)
	b.succeed("analyze")
	b.succeed("verify")
	b.fail("build")
	want := []string{
		"started analyze", "status running", "finished analyze true",
		"started verify", "finished verify true", "run succeeded",
		"started build", "finished build false", "status failed",
	}
	if !slices.Equal(metrics.calls, want) {
		t.Errorf("%q, want %q", metrics.calls, want)
	}
}

func TestAFinishedStepWaitsForTheDatabase(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.plan(`[{"name": "analyze"}]`)
	b.steps.finishErrs = []error{store.ErrUnavailable, errors.New("one that the store does not know"), store.ErrUnavailable}
	b.succeed("analyze")
	if n := strings.Count(b.logged.String(), "waiting for the database"); n != 1 {
		t.Errorf("logged %d times, want once", n)
	}
}

func TestAStepThatCannotBeFinishedIsNotAnswered(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.plan(`[{"name": "analyze"}]`)
	b.steps.finishErrs = []error{store.ErrClaimLost, store.ErrRefused, store.ErrNotFound}
	if _, _, err := b.execute("analyze"); !errors.Is(err, ErrStop) {
		t.Errorf("claim lost: %v", err)
	}
	for released, why := range []string{"refused", "the run was deleted"} {
		var back *HandBackError
		if _, _, err := b.execute("analyze"); !errors.As(err, &back) || b.steps.released != released+1 {
			t.Errorf("%s: %v, released %d", why, err, b.steps.released)
		}
	}
	if len(b.steps.finished) > 0 {
		t.Errorf("recorded %+v", b.steps.finished)
	}
}

func TestAnEndThatCannotBeRecordedIsAFailure(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.plan(`[{"name": "analyze"}]`)
	b.steps.finishErrs = []error{fmt.Errorf("path too long: %w", store.ErrInvalid)}
	failure, outcome := b.fail("analyze")
	same(t, "text", failure.Error(), "the end of the step (succeeded: Analysis complete) cannot be recorded: path too long: invalid value")
	if len(outcome.Artifacts) > 0 || outcome.ErrorType != "RuntimeError" {
		t.Errorf("%+v", outcome)
	}
}

// awaitFile waits until a program of the test has written a file.
func awaitFile(t testing.TB, path string) string {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if data, err := os.ReadFile(path); err == nil && strings.HasSuffix(string(data), "\n") {
			return strings.TrimSpace(string(data))
		}
	}
	t.Fatalf("%s was not written", path)
	return ""
}

// awaitEnd waits until a process has ended or is a zombie.
func awaitEnd(t *testing.T, pid int) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
	}
	_ = syscall.Kill(pid, syscall.SIGKILL)
	t.Errorf("process %d is still alive", pid)
}

// stubborn is a program that ignores SIGTERM and has a child.
const stubborn = `trap "" TERM
(trap "" TERM; while :; do sleep 1; done) &
echo "working"
echo $! > "$(dirname "$0")/child"
wait`

func TestATimeLimitEndsACommandWithItsChildren(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.program("docker", stubborn)
	b.config.StepTimeLimit, b.config.KillGrace = 3*time.Second, 100*time.Millisecond
	b.plan(`[{"name": "build"}]`)
	failure, outcome := b.fail("build")
	// The shell may report the death of its child before it is killed itself.
	text := strings.Replace(failure.Error(), "\nKilled", "", 1)
	same(t, "text", text, "Command docker compose --project-name moonmind build api was ended: the step took longer than its limit of 3s: working (see build.log)")
	same(t, "artifacts", paths(outcome), "build_log:build.log")
	child, err := strconv.Atoi(awaitFile(t, filepath.Join(b.bin, "child")))
	if err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, child)
}

func TestAStoppingWorkerHandsTheStepBack(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.program("docker", stubborn)
	b.config.KillGrace = 100 * time.Millisecond
	b.plan(`[{"name": "build"}]`)
	ctx, stop := context.WithCancelCause(t.Context())
	go func() {
		awaitFile(t, filepath.Join(b.bin, "child"))
		stop(worker.ErrShutdown)
	}()
	_, _, err := b.executeIn(ctx, "build")
	if !errors.Is(err, worker.ErrShutdown) || len(b.steps.finished) > 0 || b.steps.released != 1 {
		t.Errorf("%v, recorded %d, released %d", err, len(b.steps.finished), b.steps.released)
	}
	if got := brief(b.steps.trail); len(got) == 0 || got[len(got)-1] != "step-released" || b.steps.trail[len(got)-1].Text != "the worker stops" {
		t.Errorf("trail %q", got)
	}
	child, err := strconv.Atoi(awaitFile(t, filepath.Join(b.bin, "child")))
	if err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, child)
}

func TestATaskTimeLimitIsRecorded(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.program("docker", `echo up > "$(dirname "$0")/child"; sleep 60`)
	// Also if the database is unavailable at that moment.
	b.steps.finishErrs = []error{store.ErrUnavailable, store.ErrUnavailable}
	b.plan(`[{"name": "build"}]`)
	o, err := New(b.config)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancelCause(t.Context())
	go func() {
		awaitFile(t, filepath.Join(b.bin, "child"))
		stop(worker.ErrSoftTimeLimit)
	}()
	task := &worker.Task{Message: &protocol.Message{ID: "t", RootID: "r"}}
	_, err = o.executePlanStep(worker.ContextWithTask(ctx, task), stepArgs{RunID: testRun, Step: "build"})
	var failure *worker.Error
	if !errors.As(err, &failure) || failure.Type != "CommandExecutionError" || len(b.steps.finished) != 1 {
		t.Errorf("%v, recorded %d", err, len(b.steps.finished))
	}
}

func TestOutputIsInTheArtifactWhileTheCommandRuns(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.program("docker", `echo "step 1 of 2" >&2
while [ ! -e "$(dirname "$0")/go" ]; do sleep 0.02; done
echo "step 2 of 2" >&2`)
	b.plan(`[{"name": "build"}]`)
	seen := make(chan string, 1)
	go func() {
		path := filepath.Join(b.base, testRun, "build.log")
		deadline := time.Now().Add(time.Minute)
		text := ""
		for !strings.Contains(text, "step 1 of 2") && time.Now().Before(deadline) {
			data, _ := os.ReadFile(path)
			text = string(data)
			time.Sleep(5 * time.Millisecond)
		}
		seen <- text
		_ = os.WriteFile(filepath.Join(b.bin, "go"), nil, 0o644)
	}()
	b.succeed("build")
	same(t, "log while it runs", <-seen, "$ docker compose --project-name moonmind build api\nstep 1 of 2")
	same(t, "log", b.artifact("build.log"), "$ docker compose --project-name moonmind build api\nstep 1 of 2\nstep 2 of 2")
}

func TestMemoryStaysFlatForALongLog(t *testing.T) {
	// Not parallel: it measures the whole process.
	b := newTestEnv(t, "A_TOKEN=abcdef")
	half := 128 << 20
	if raceEnabled {
		half = 8 << 20 // memory is not checked then
	}
	b.program("docker", fmt.Sprintf(`head -c %[1]d /dev/zero | tr '\0' 'x' | fold -w 120 >&2
head -c %[1]d /dev/zero | tr '\0' 'y' | fold -w 120
exit 1`, half))
	b.plan(`[{"name": "build"}]`)
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil {
		t.Fatalf("cannot reset the peak of memory: %v", err)
	}
	_, outcome := b.fail("build")
	if size := outcome.Artifacts[0].SizeBytes; size < 2*int64(half) {
		t.Errorf("the log has %d bytes", size)
	}
	if len(outcome.Message) > 8<<10 {
		t.Errorf("the message has %d bytes", len(outcome.Message))
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	peak, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("peak %d MiB", peak/1024)
	if limit := 64 * 1024; peak > limit && !raceEnabled {
		t.Errorf("the process needed %d KiB, allowed are %d", peak, limit)
	}
}
