package orchestrator

import (
	"bytes"
	"cmp"
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
	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/policy/programs"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testRun differs in each test process, because a step that is taken over ends the
// programs of its run that other processes of this machine have started.
var testRun = fmt.Sprintf("5b0e6a52-3c1d-4f0e-9b7a-%012x", mathrand.Uint64N(1<<48))

// fakeSteps is a database with one run. It records what it is asked to write, and
// does not act on it.
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
	// recorded has the progress in its order. record, unless nil, is called before
	// and may refuse it.
	recorded []store.Progress
	record   func(context.Context) error
	// attempt is that of the claim, 1 if it is 0.
	attempt int
	// change is what the database knows about the change of the run. recordChange,
	// unless nil, is called before a record is kept and may refuse it.
	change       store.ChangeState
	recordChange func(context.Context) error
	// releaseErrs are returned one after the other before a release succeeds;
	// onRelease, unless nil, is called before each.
	releaseErrs []error
	onRelease   func()
	// trail has the records of the audit trail.
	trail []audit.Record
	// silent says that the database has not answered since the step began.
	silent bool
	// takenOver says that another worker has the step. Nil means false.
	takenOver func() bool
	// parkedReady is what every FinishStep returns.
	parkedReady bool
	// parked is what the next TakeParked returns; dropped and kept have the ids
	// given to DropParked and KeepParked.
	parked        []store.ParkedMessage
	dropped, kept []int64
	// workspaces is what ListWorkspaces returns, consumers what
	// CountOtherConsumers does; lost has the runs given to FailLost.
	workspaces []store.WorkspaceState
	consumers  int
	lost       []string
	// departure is what LeaveQueue returns.
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
		Revocation: f.revoked,
		Run:        f.run,
		OwnedAt:    time.Now(),
		RunStarted: r.Step == store.StepAnalyze,
		RootTaskID: r.RootTaskID,
		Change:     f.change,
		Claim:      store.Claim{RunID: r.RunID, Step: r.Step, Attempt: max(1, f.attempt), TaskID: r.TaskID, Starts: 1, StartedAt: time.Now()},
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
	f.trail = append(f.trail, outcome.Audit...)
	f.finished = append(f.finished, outcome)
	switch {
	case outcome.Status == store.StepFailed:
		return store.Finished{Status: store.RunFailed}, nil
	case claim.Step == store.StepVerify:
		return store.Finished{Status: store.RunSucceeded, RunEnded: true, Duration: time.Second}, nil
	}
	return store.Finished{Status: store.RunRunning, ParkedReady: f.parkedReady}, nil
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

func (f *fakeSteps) RecordChange(ctx context.Context, _ store.Claim, record json.RawMessage, records ...audit.Record) error {
	if f.recordChange != nil {
		if err := f.recordChange(ctx); err != nil {
			return err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.change.Record = record
	f.trail = append(f.trail, records...)
	return nil
}

func (f *fakeSteps) Record(_ context.Context, _ store.Claim, records ...audit.Record) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.trail = append(f.trail, records...)
	return nil
}

func (f *fakeSteps) ReadTrail(context.Context, string, func(store.Trail) error, func(audit.Entry) error) error {
	return store.ErrNotFound
}

func (f *fakeSteps) ReleaseClaim(_ context.Context, _ store.Claim, records ...audit.Record) error {
	if f.onRelease != nil {
		f.onRelease()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.releaseErrs) > 0 {
		err := f.releaseErrs[0]
		f.releaseErrs = f.releaseErrs[1:]
		return err
	}
	f.released++
	f.trail = append(f.trail, records...)
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

func (f *fakeSteps) CheckClaim(context.Context, store.Claim) (*store.Revocation, error) {
	if f.takenOver != nil && f.takenOver() {
		return nil, store.ErrClaimLost
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.revoked, nil
}

func (f *fakeSteps) CheckApproval(context.Context, store.Claim, store.ApprovalCheck) (*store.NotApproved, error) {
	return nil, nil
}

func (f *fakeSteps) PresentAwaiting(context.Context, string, func(store.Run) string, store.Look) error {
	return nil
}

func (f *fakeSteps) EndUnapproved(context.Context, string, store.RollbackMessage) ([]store.Unapproved, error) {
	return nil, nil
}
func (f *fakeSteps) FindPause(context.Context, string) (*store.Pause, error) { return nil, nil }

func (f *fakeSteps) RegisterWorker(context.Context, string) error { return nil }

func (f *fakeSteps) LeaveQueue(context.Context, string) (store.Departure, error) {
	return f.departure, nil
}

func (f *fakeSteps) ClearHolds(context.Context, string) error { return nil }

func (f *fakeSteps) LookAtParked(context.Context, string) (store.ParkedState, error) {
	return store.ParkedState{Newest: 9}, nil
}

func (f *fakeSteps) RenewParked(_ context.Context, _ string, messages []store.StepMessage) ([]bool, error) {
	return make([]bool, len(messages)), nil
}

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

func (f *fakeSteps) KeepParked(_ context.Context, id int64, _ bool) error {
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

func (f *fakeSteps) ListChanges(context.Context, store.ChangeFilter) ([]store.Change, error) {
	return nil, nil
}

func (f *fakeSteps) RemoveOldTrails(context.Context, time.Duration, int) ([]string, error) {
	return nil, nil
}

func (f *fakeSteps) RemoveChange(context.Context, store.ChangeFilter, func(context.Context, store.Change) (json.RawMessage, error)) error {
	return store.ErrNotFound
}

func (f *fakeSteps) FailLost(_ context.Context, suspect store.Suspect, _ store.RollbackMessage) (*store.LostRun, error) {
	f.lost = append(f.lost, suspect.RunID)
	return nil, nil
}

// fakeEngine returns what its function returns. It panics in methods that it does not
// have.
type fakeEngine struct {
	Engine
	containers func(call int, service string) ([]compose.Container, error)
	log        string
	neighbours compose.Neighbourhood
	pins       map[string]compose.Pin
	mu         sync.Mutex
	calls      int
}

func (*fakeEngine) HasAnswered() bool { return false }

func (f *fakeEngine) Containers(_ context.Context, _, service string) ([]compose.Container, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls++
	return f.containers(f.calls, service)
}

func (f *fakeEngine) LogTail(context.Context, string, int) (string, error) { return f.log, nil }

func (f *fakeEngine) Neighbourhood(context.Context) (compose.Neighbourhood, error) {
	return f.neighbours, nil
}

func (f *fakeEngine) Project(ctx context.Context, name string) (compose.Project, error) {
	containers, err := f.Containers(ctx, name, "")
	return compose.Project{Name: name, Containers: containers}, err
}

// InspectContainer knows the containers of the project, and none beside them.
func (f *fakeEngine) InspectContainer(_ context.Context, id string) (compose.Inspection, compose.Container, error) {
	if f.containers == nil {
		return compose.Inspection{}, compose.Container{ID: id}, nil
	}
	containers, err := f.containers(0, "")
	for _, container := range containers {
		if container.ID == id {
			return compose.Inspection{}, container, err
		}
	}
	return compose.Inspection{}, compose.Container{}, cmp.Or(err, compose.ErrNotFound)
}

// InspectImage finds an image of every name, whose id is that name.
func (f *fakeEngine) InspectImage(_ context.Context, name string) (compose.Image, error) {
	return compose.Image{ID: name}, nil
}

func (f *fakeEngine) CreatePin(_ context.Context, pin compose.Pin) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pins == nil {
		f.pins = map[string]compose.Pin{}
	}
	f.pins[pin.Name] = pin
	return nil
}

func (f *fakeEngine) FindPin(_ context.Context, name string) (compose.Pin, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if pin, found := f.pins[name]; found {
		return pin, nil
	}
	return compose.Pin{}, compose.ErrNotFound
}

// testEnv is an Orchestrator with a workspace, programs of the test's own, and a
// fake database.
type testEnv struct {
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

func newTestEnv(t testing.TB, environ ...string) *testEnv {
	t.Helper()
	top := artifacts.Resolve(t.TempDir())
	b := &testEnv{
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
		Artifacts: artifacts.DirectoryConfig{Base: b.base},
		Logger:    slog.New(slog.NewTextHandler(b.logged, nil)),
		Environ: append([]string{
			"PATH=" + b.bin + string(os.PathListSeparator) + os.Getenv("PATH"), "HOME=" + top,
			"GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1",
			"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.test", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.test",
		}, environ...),
		Queue: "q", KillGrace: 2 * time.Second, HandBackDelay: time.Second, QuietPeriod: 50 * time.Millisecond,
		// Scripts in place of docker have subcommands of their own.
		Permissions: []programs.Permission{{Command: "docker", Options: []string{"*"}}},
	}
	return b
}

// program installs a shell script under a name. A script in place of docker that
// does not mention the looks before a run (preflight) passes them.
func (b *testEnv) program(name, script string) {
	b.t.Helper()
	if name == "docker" && !strings.Contains(script, "config") {
		script = `case " $* " in *" ls --quiet "*|*" config "*) exit 0;; esac` + "\n" + script
	}
	// No process may be forked meanwhile: it would inherit the open file, and the
	// kernel starts no program that is open for writing ("text file busy").
	syscall.ForkLock.RLock()
	err := os.WriteFile(filepath.Join(b.bin, name), []byte("#!/bin/sh\n"+script+"\n"), 0o755)
	syscall.ForkLock.RUnlock()
	if err != nil {
		b.t.Fatal(err)
	}
}

// file writes a file of the workspace.
func (b *testEnv) file(name, text string) {
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
func (b *testEnv) git(args ...string) {
	b.t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir, cmd.Env = b.workspace, b.config.Environ
	if out, err := cmd.CombinedOutput(); err != nil {
		b.t.Fatalf("git %v: %v\n%s", args, err, out)
	}
}

// repository makes the workspace a git repository and commits its files.
func (b *testEnv) repository() {
	b.t.Helper()
	b.file("README", "x\n")
	b.git("init", "-q", "-b", "main")
	b.git("add", ".")
	b.git("commit", "-q", "-m", "x")
}

// plan sets the run's plan.
func (b *testEnv) plan(steps string) { b.steps.run.Steps = json.RawMessage(steps) }

// execute runs a step and returns what was recorded.
func (b *testEnv) execute(step string) (Result, store.Outcome, error) {
	b.t.Helper()
	return b.executeIn(b.t.Context(), step)
}

func (b *testEnv) executeIn(ctx context.Context, step string) (Result, store.Outcome, error) {
	b.t.Helper()
	o, err := New(b.config)
	if err != nil {
		b.t.Fatal(err)
	}
	before := len(b.steps.finished)
	result, err := o.Execute(ctx, Request{RunID: b.steps.run.ID, Step: step, TaskID: "task-1", RootTaskID: "task-0"}, nil)
	if len(b.steps.finished) == before {
		return result, store.Outcome{}, err
	}
	return result, b.steps.finished[len(b.steps.finished)-1], err
}

// succeed runs a step that must succeed.
func (b *testEnv) succeed(step string) (Result, store.Outcome) {
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
func (b *testEnv) fail(step string) (*Failure, store.Outcome) {
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

// checkFiles checks that the registered artifacts are those on disk.
func (b *testEnv) checkFiles(outcome store.Outcome) {
	b.t.Helper()
	for _, file := range outcome.Artifacts {
		if sum, size := digest(b.t, filepath.Join(outcome.ArtifactRoot, file.Path)); sum != file.Checksum || size != file.SizeBytes {
			b.t.Errorf("%s: registered %+v, on disk %s of %d bytes", file.Path, file, sum, size)
		}
	}
}

func (b *testEnv) artifact(name string) string {
	b.t.Helper()
	data, err := os.ReadFile(filepath.Join(b.base, b.steps.run.ID, name))
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

// bare returns an Orchestrator for tests of a part that needs only its configuration.
func bare(config Config) *Orchestrator {
	config = config.WithDefaults()
	return &Orchestrator{config: config, policy: config.effectivePolicy()}
}
