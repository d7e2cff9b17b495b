package orchestrator

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testRun is another one in each process: a step that is taken over ends the
// programs of its run that other processes of this machine have started.
var testRun = fmt.Sprintf("5b0e6a52-3c1d-4f0e-9b7a-%012x", mathrand.Uint64N(1<<48))

// fakeSteps is a database with one run and no memory but the last outcome.
type fakeSteps struct {
	revoked  *store.Revocation
	mu       sync.Mutex
	run      store.Run
	decision store.Decision // nil: Start
	beginErr error
	// finishErrs are returned one after the other before a finish succeeds.
	finishErrs []error
	finished   []store.Outcome
	released   int
	// recorded is the progress that was, unless record, if there is one, says
	// why not.
	recorded []store.Progress
	record   func(context.Context) error
	// releaseErrs are returned one after the other before a release succeeds.
	releaseErrs []error
	// silent: the database has not answered since the step began.
	silent bool
	// robbed says that another worker has the step; nil: none has.
	robbed func() bool
	// unpark is what every finish says.
	unpark bool
	// parked are given out by the next TakeParked; dropped and kept are ids of
	// those that were settled.
	parked        []store.ParkedMessage
	dropped, kept []int64
	// workspaces are what ListWorkspaces returns, consumers what
	// CountOtherConsumers does; lost are the runs that were failed.
	workspaces []store.WorkspaceState
	consumers  int
	lost       []string
	// departure is what LeaveQueue says.
	departure store.Departure
}

func (f *fakeSteps) BeginStep(_ context.Context, r store.BeginRequest) (store.Decision, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.beginErr != nil {
		return nil, f.beginErr
	}
	if f.decision != nil {
		return f.decision, nil
	}
	return store.Start{
		Run:        f.run,
		OwnedAt:    time.Now(),
		RunStarted: r.Step == store.StepAnalyze,
		Claim:      store.Claim{RunID: r.RunID, Step: r.Step, Attempt: 1, TaskID: r.TaskID, Starts: 1, StartedAt: time.Now()},
	}, nil
}

func (f *fakeSteps) FinishStep(_ context.Context, claim store.Claim, outcome store.Outcome) (store.Finished, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.finishErrs) > 0 {
		err := f.finishErrs[0]
		f.finishErrs = f.finishErrs[1:]
		return store.Finished{}, err
	}
	f.finished = append(f.finished, outcome)
	switch {
	case outcome.Status == store.StepFailed:
		return store.Finished{Status: store.RunFailed}, nil
	case claim.Step == store.StepVerify:
		return store.Finished{Status: store.RunSucceeded, RunEnded: true, Duration: time.Second}, nil
	}
	return store.Finished{Status: store.RunRunning, ParkedReady: f.unpark}, nil
}

func (f *fakeSteps) RecordProgress(ctx context.Context, _ store.Claim, progress store.Progress) error {
	if f.record != nil {
		if err := f.record(ctx); err != nil {
			return err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.recorded = append(f.recorded, progress)
	return nil
}

func (f *fakeSteps) ReleaseClaim(context.Context, store.Claim) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.releaseErrs) > 0 {
		err := f.releaseErrs[0]
		f.releaseErrs = f.releaseErrs[1:]
		return err
	}
	f.released++
	return nil
}

func (f *fakeSteps) LockConfirmedAt() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.silent {
		return time.Time{}
	}
	return time.Now()
}

func (f *fakeSteps) HasClaim(context.Context, store.Claim) (bool, error) {
	return f.robbed == nil || !f.robbed(), nil
}

func (f *fakeSteps) FindRevocation(context.Context, string) (store.Revocation, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.revoked == nil {
		return store.Revocation{}, store.ErrNotFound
	}
	return *f.revoked, nil
}

func (f *fakeSteps) RegisterWorker(context.Context, string) error { return nil }

func (f *fakeSteps) LeaveQueue(context.Context, string) (store.Departure, error) {
	return f.departure, nil
}

func (f *fakeSteps) ClearHolds(context.Context, string) error { return nil }

func (f *fakeSteps) NewestParked(context.Context, string) (int64, error) { return 9, nil }

func (f *fakeSteps) TakeAllParked(ctx context.Context, queue string, _ int64) ([]store.ParkedMessage, error) {
	return f.TakeParked(ctx, queue)
}

func (f *fakeSteps) TakeParked(context.Context, string) ([]store.ParkedMessage, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	taken := f.parked
	f.parked = nil
	return taken, nil
}

func (f *fakeSteps) DropParked(_ context.Context, id int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.dropped = append(f.dropped, id)
	return nil
}

func (f *fakeSteps) KeepParked(_ context.Context, id int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.kept = append(f.kept, id)
	return nil
}

func (f *fakeSteps) CountOtherConsumers(context.Context, string, int, time.Duration) (int, error) {
	return f.consumers, nil
}

func (f *fakeSteps) ListWorkspaces(context.Context, string, []string) ([]store.WorkspaceState, error) {
	return f.workspaces, nil
}

func (f *fakeSteps) PassWorkspace(context.Context, string, string) error { return nil }

func (f *fakeSteps) PassPending(context.Context, store.Suspect) error { return nil }

func (f *fakeSteps) FreeClaims(context.Context, store.Suspect) error { return nil }

func (f *fakeSteps) FailLost(_ context.Context, suspect store.Suspect, _ store.RollbackMessage) (*store.LostRun, error) {
	f.lost = append(f.lost, suspect.RunID)
	return nil, nil
}

// fakeEngine says what its function says.
type fakeEngine struct {
	containers func(call int, service string) ([]compose.Container, error)
	log        string
	mu         sync.Mutex
	calls      int
}

func (f *fakeEngine) Containers(_ context.Context, _, service string) ([]compose.Container, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls++
	return f.containers(f.calls, service)
}

func (f *fakeEngine) LogTail(context.Context, string, int) (string, error) { return f.log, nil }

// bench is a workspace with a repository, programs of the test's own, and an
// Orchestrator on top.
type bench struct {
	t         testing.TB
	workspace string
	base      string // of artifacts
	bin       string
	steps     *fakeSteps
	config    Config
	logged    *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newBench(t testing.TB, environ ...string) *bench {
	t.Helper()
	top := artifacts.Resolve(t.TempDir())
	b := &bench{
		t: t, workspace: filepath.Join(top, "workspace"), base: filepath.Join(top, "artifacts"), bin: filepath.Join(top, "bin"),
		steps:  &fakeSteps{run: store.Run{ID: testRun, TargetService: "api"}},
		logged: &lockedBuffer{},
	}
	for _, dir := range []string{b.workspace, b.bin} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b.config = Config{
		Steps: b.steps, Workspace: b.workspace,
		Artifacts: artifacts.PlaceConfig{Base: b.base},
		Logger:    slog.New(slog.NewTextHandler(b.logged, nil)),
		Environ: append([]string{
			"PATH=" + b.bin + string(os.PathListSeparator) + os.Getenv("PATH"), "HOME=" + top,
			"GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1",
			"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.test", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.test",
		}, environ...),
		Queue: "q", KillGrace: 2 * time.Second, HandBackDelay: time.Second, SettleTime: 50 * time.Millisecond,
	}
	return b
}

// program installs a shell script under a name.
func (b *bench) program(name, script string) {
	b.t.Helper()
	// No process is forked meanwhile: it would hold the file open for writing,
	// and the kernel starts no such program ("text file busy").
	syscall.ForkLock.RLock()
	err := os.WriteFile(filepath.Join(b.bin, name), []byte("#!/bin/sh\n"+script+"\n"), 0o755)
	syscall.ForkLock.RUnlock()
	if err != nil {
		b.t.Fatal(err)
	}
}

// file writes a file of the workspace.
func (b *bench) file(name, text string) {
	b.t.Helper()
	path := filepath.Join(b.workspace, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		b.t.Fatal(err)
	}
}

// git runs git in the workspace.
func (b *bench) git(args ...string) {
	b.t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir, cmd.Env = b.workspace, b.config.Environ
	if out, err := cmd.CombinedOutput(); err != nil {
		b.t.Fatalf("git %v: %v\n%s", args, err, out)
	}
}

// repository makes the workspace one, with a first commit of what is there.
func (b *bench) repository() {
	b.t.Helper()
	b.file("README", "x\n")
	b.git("init", "-q", "-b", "main")
	b.git("add", ".")
	b.git("commit", "-q", "-m", "x")
}

// plan sets the run's plan.
func (b *bench) plan(steps string) { b.steps.run.Steps = json.RawMessage(steps) }

// execute runs a step and returns what was recorded.
func (b *bench) execute(step string) (Result, store.Outcome, error) {
	b.t.Helper()
	return b.executeIn(b.t.Context(), step)
}

func (b *bench) executeIn(ctx context.Context, step string) (Result, store.Outcome, error) {
	b.t.Helper()
	o, err := New(b.config)
	if err != nil {
		b.t.Fatal(err)
	}
	before := len(b.steps.finished)
	result, err := o.Execute(ctx, Request{RunID: testRun, Step: step, TaskID: "task-1", RootTaskID: "task-0"}, nil)
	if len(b.steps.finished) == before {
		return result, store.Outcome{}, err
	}
	return result, b.steps.finished[len(b.steps.finished)-1], err
}

// succeed runs a step that must succeed.
func (b *bench) succeed(step string) (Result, store.Outcome) {
	b.t.Helper()
	result, outcome, err := b.execute(step)
	if err != nil {
		b.t.Fatalf("%s failed: %v", step, err)
	}
	if outcome.Status != store.StepSucceeded {
		b.t.Fatalf("%s: recorded %+v", step, outcome)
	}
	b.checkFiles(outcome)
	return result, outcome
}

// fail runs a step that must fail and be recorded.
func (b *bench) fail(step string) (*Failure, store.Outcome) {
	b.t.Helper()
	_, outcome, err := b.execute(step)
	var failure *Failure
	if !errors.As(err, &failure) {
		b.t.Fatalf("%s: %v, want a failure", step, err)
	}
	if outcome.Status != store.StepFailed || outcome.Message != failure.Error() {
		b.t.Fatalf("%s: recorded %+v, returned %q", step, outcome, failure.Error())
	}
	b.checkFiles(outcome)
	return failure, outcome
}

// checkFiles says that what is registered is what is on disk.
func (b *bench) checkFiles(outcome store.Outcome) {
	b.t.Helper()
	for _, file := range outcome.Artifacts {
		if sum, size := digest(b.t, filepath.Join(outcome.ArtifactRoot, file.Path)); sum != file.Checksum || size != file.SizeBytes {
			b.t.Errorf("%s: registered %+v, on disk %s of %d bytes", file.Path, file, sum, size)
		}
	}
}

func (b *bench) artifact(name string) string {
	b.t.Helper()
	data, err := os.ReadFile(filepath.Join(b.base, testRun, name))
	if err != nil {
		b.t.Fatal(err)
	}
	return string(data)
}

func paths(outcome store.Outcome) string {
	var names []string
	for _, file := range outcome.Artifacts {
		names = append(names, file.Type+":"+file.Path)
	}
	return strings.Join(names, " ")
}

func same(t testing.TB, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s is\n%s\nwant\n%s", what, got, want)
	}
}
