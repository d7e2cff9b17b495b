package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// fakeHelpers is an engine with the container of a worker, and one helper.
type fakeHelpers struct {
	own *compose.OwnContainer

	mu        sync.Mutex
	tasks     []compose.HelperTask // of StartHelper
	images    []string             // of the helpers
	started   bool
	state     compose.HelperState
	confirmed func() // called by Confirm, with mu locked
	removed   int
	resumed   int
}

func (f *fakeHelpers) Own(context.Context, []string) (*compose.OwnContainer, error) {
	return f.own, nil
}

func (f *fakeHelpers) ServiceState(_ context.Context, project, service string) (compose.ServiceState, error) {
	return compose.ServiceState{Project: project, Service: service}, nil
}

func (f *fakeHelpers) StartHelper(_ context.Context, own compose.OwnContainer, program string, task compose.HelperTask) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tasks, f.images, f.started = append(f.tasks, task), append(f.images, own.ImageID), true
	return nil
}

func (f *fakeHelpers) ResumeHelper(context.Context, string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.resumed++
	return nil
}

func (f *fakeHelpers) ReadHelper(context.Context, string) (compose.HelperState, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.started {
		return compose.HelperState{}, compose.ErrNoHelper
	}
	return f.state, nil
}

func (f *fakeHelpers) Confirm(context.Context, string, string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.confirmed()
	return nil
}

func (f *fakeHelpers) RemoveHelpers(context.Context, string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.started = false
	f.removed++
	return nil
}

const ownCommand = "docker compose --project-name moonmind up -d --no-deps orchestrator"

// newOwnEnv is a worker in a container of the service orchestrator, whose run
// restarts that service.
func newOwnEnv(t *testing.T) (*testEnv, *fakeHelpers) {
	b := newTestEnv(t)
	b.program("docker", `case "$*" in *config*) echo '{"name": "moonmind", "services": {"orchestrator": {}}}';; *' ls --quiet') ;; *) echo "the worker has run $*"; exit 9;; esac`)
	f := &fakeHelpers{own: &compose.OwnContainer{ID: strings.Repeat("a", 64), Name: "moonmind-orchestrator-1", Project: "moonmind", Service: "orchestrator", ImageID: "sha256:old"}}
	b.config.Helpers, b.config.OwnContainers, b.config.Program = f, []string{f.own.ID}, "/mm-orchestrator"
	b.steps.run.TargetService = "orchestrator"
	b.plan(fmt.Sprintf(`[{"name": "restart", "parameters": {"command": ["%s"]}}, {"name": "verify", "parameters": {}}]`, strings.ReplaceAll(ownCommand, " ", `", "`)))
	return b, f
}

// takeOver makes the next worker begin the step: it runs in another container.
func takeOver(b *testEnv, f *fakeHelpers, record change.Record) {
	b.t.Helper()
	text, err := record.Encode()
	if err != nil {
		b.t.Fatal(err)
	}
	b.steps.decision = store.Start{
		Run: b.steps.run, OwnedAt: time.Now(), PreviousWorker: "orchestrator@old", Change: store.ChangeState{Record: text},
		Claim: store.Claim{RunID: testRun, Step: store.StepRestart, Attempt: 1, TaskID: "task-1", Starts: 2, StartedAt: time.Now()},
	}
	f.own = &compose.OwnContainer{ID: strings.Repeat("b", 64), Name: "moonmind-orchestrator-1", Project: "moonmind", Service: "orchestrator", ImageID: "sha256:new"}
	f.started = true
}

func actingHelper() change.Record {
	return change.Record{Helper: &change.Helper{Name: "helper", Step: "restart", Attempt: 1, Command: 1, Container: strings.Repeat("a", 64), Image: "sha256:old"}}
}

func helperEnded(code int) compose.HelperState {
	return compose.HelperState{Begun: true, Ended: true, Code: code, Events: []compose.HelperEvent{
		{Kind: compose.HelperCommandBegun}, {Kind: compose.HelperOutput, Text: " Container moonmind-orchestrator-1  Started\n", Stderr: true}, {Kind: compose.HelperCommandEnded, Code: code},
	}}
}

func TestOwnServiceIsLeftToAHelper(t *testing.T) {
	t.Parallel()
	b, f := newOwnEnv(t)
	stopping := make(chan struct{})
	b.config.Stopping = stopping
	recorded := false
	b.steps.recordChange = func(context.Context) error {
		recorded = recorded || f.started
		return nil
	}
	f.state = compose.HelperState{Begun: true}
	close(stopping) // as soon as the helper's command stops the worker
	_, _, err := b.execute("restart")
	var back *HandBackError
	if !errors.As(err, &back) || back.After != 0 {
		t.Fatalf("%v, want the message handed back at once", err)
	}
	if recorded {
		t.Error("the helper was started before it was recorded")
	}
	if b.steps.released != 1 || len(b.steps.finished) != 0 {
		t.Errorf("released %d times, finished %v", b.steps.released, b.steps.finished)
	}
	if len(f.tasks) != 1 {
		t.Fatalf("tasks: %+v", f.tasks)
	}
	task := f.tasks[0]
	if want := b.bin + "/docker" + strings.TrimPrefix(ownCommand, "docker"); strings.Join(task.Command, " ") != want || task.Workspace != b.workspace || task.Window != 2*time.Minute ||
		task.Before.Service != "orchestrator" || !strings.HasPrefix(task.Name, compose.HelperPrefix+testRun) {
		t.Errorf("task %+v, want command %s", task, want)
	}
}

func TestOwnServiceGoesOnInTheNewWorker(t *testing.T) {
	t.Parallel()
	b, f := newOwnEnv(t)
	takeOver(b, f, actingHelper())
	f.state = helperEnded(0)
	calls := 0
	f.confirmed = func() {
		if calls++; calls == 2 { // the first is lost
			f.state.Confirmed = true
		}
	}
	b.succeed("restart")
	if len(f.tasks) != 0 || calls != 2 {
		t.Errorf("%d helpers started, confirmed %d times", len(f.tasks), calls)
	}
	same(t, "log", b.artifact("restart.log"), "[Worker orchestrator@old has left this step unfinished; this is start 2 of it. A helper container has gone on with it; its output follows.]\n"+
		"$ "+ownCommand+"\nContainer moonmind-orchestrator-1  Started")
	if progress := b.steps.recorded; len(progress) != 1 || progress[0].ExitCode != 0 {
		t.Errorf("recorded %+v", progress)
	}
}

func TestOwnServiceThatDoesNotTakeOver(t *testing.T) {
	t.Parallel()
	b, f := newOwnEnv(t)
	takeOver(b, f, actingHelper())
	f.own.ID = strings.Repeat("c", 64) // the old container, created again
	f.state = helperEnded(0)
	f.state.PuttingBack, f.state.PutBack, f.state.Done, f.state.Why = true, true, true, "no worker has taken the step over within 2m0s"
	f.state.Events = append(f.state.Events, compose.HelperEvent{Kind: compose.HelperPuttingBack, Text: f.state.Why}, compose.HelperEvent{Kind: compose.HelperNote, Text: "the log of container x ends:\nboom"})
	failure, _ := b.fail("restart")
	if want := "The new version of the worker's own service did not take over: no worker has taken the step over within 2m0s. The old container was put back"; !strings.HasPrefix(failure.Error(), want) {
		t.Errorf("%s, want %s", failure, want)
	}
	if log := b.artifact("restart.log"); !strings.Contains(log, "[Helper: the log of container x ends:\nboom]") {
		t.Errorf("log: %s", log)
	}
}

func TestOwnServiceWhoseCommandFails(t *testing.T) {
	t.Parallel()
	b, f := newOwnEnv(t)
	takeOver(b, f, actingHelper())
	f.own.ID = strings.Repeat("a", 64) // nothing was replaced
	f.state = helperEnded(1)
	f.state.Done = true
	failure, _ := b.fail("restart")
	if !strings.HasPrefix(failure.Error(), "Command "+ownCommand+" failed with code 1: Container moonmind-orchestrator-1  Started") {
		t.Error(failure)
	}
}

func TestOwnServiceWhoseHelperWasRemoved(t *testing.T) {
	t.Parallel()
	b, f := newOwnEnv(t)
	takeOver(b, f, actingHelper())
	f.started = false
	f.state = helperEnded(0)
	f.state.Done = true // the command has changed nothing more
	b.succeed("restart")
	if len(f.tasks) != 1 || f.tasks[0].Name != "helper" {
		t.Errorf("helpers started: %+v", f.tasks)
	}
}

func TestOtherServicesNeedNoHelper(t *testing.T) {
	t.Parallel()
	b, f := newOwnEnv(t)
	f.own.Service = "worker"
	failure, _ := b.fail("restart")
	if !strings.Contains(failure.Error(), "failed with code 9: the worker has run compose") || len(f.tasks) != 0 {
		t.Errorf("%s; helpers %+v", failure, f.tasks)
	}
	f.own = nil // outside of containers
	if failure, _ = b.fail("restart"); !strings.Contains(failure.Error(), "failed with code 9") || len(f.tasks) != 0 {
		t.Errorf("%s; helpers %+v", failure, f.tasks)
	}
}

func TestHelperDecision(t *testing.T) {
	t.Parallel()
	begun := compose.HelperState{Begun: true}
	ended, failed := helperEnded(0), helperEnded(1)
	with := func(s compose.HelperState, change func(*compose.HelperState)) compose.HelperState {
		change(&s)
		return s
	}
	for name, test := range map[string]struct {
		state    compose.HelperState
		replaced bool
		want     helperNext
	}{
		"nothing yet":                           {compose.HelperState{}, true, helperWait},
		"the command runs":                      {begun, true, helperWait},
		"it runs, and another worker looks":     {begun, false, helperWait},
		"it has ended, in the old container":    {ended, true, helperWait},
		"it has ended, in the new container":    {ended, false, helperConfirm},
		"the helper knows":                      {with(ended, func(s *compose.HelperState) { s.Confirmed = true }), false, helperEnd},
		"it has failed":                         {failed, false, helperWait},
		"it has failed, and nothing was done":   {with(failed, func(s *compose.HelperState) { s.Done = true }), true, helperEnd},
		"it has failed, and was put back":       {with(failed, func(s *compose.HelperState) { s.PuttingBack, s.PutBack, s.Done = true, true, true }), false, helperEnd},
		"too late":                              {with(ended, func(s *compose.HelperState) { s.PuttingBack = true }), false, helperWait},
		"too late, and the helper knew":         {with(ended, func(s *compose.HelperState) { s.Confirmed, s.PuttingBack = true, true }), false, helperWait},
		"put back":                              {with(ended, func(s *compose.HelperState) { s.PuttingBack, s.PutBack, s.Done = true, true, true }), false, helperFailed},
		"not put back":                          {with(ended, func(s *compose.HelperState) { s.PuttingBack, s.NotPutBack, s.Done = true, true, true }), false, helperFailed},
		"the watch is over":                     {with(ended, func(s *compose.HelperState) { s.Confirmed, s.Done = true, true }), false, helperEnd},
		"it has changed nothing":                {with(ended, func(s *compose.HelperState) { s.Done = true }), true, helperEnd},
		"a rollback, while it works":            {compose.HelperState{PuttingBack: true}, true, helperWait},
		"a rollback, done":                      {compose.HelperState{PuttingBack: true, PutBack: true, Done: true}, false, helperEnd},
		"a rollback that could not be done":     {compose.HelperState{PuttingBack: true, NotPutBack: true, Done: true}, false, helperFailed},
		"put back, the last line not yet there": {with(ended, func(s *compose.HelperState) { s.PuttingBack, s.PutBack = true, true }), false, helperWait},
	} {
		if got, failure := helperDecision(test.state, test.replaced); got != test.want || (failure != nil) != (test.want == helperFailed) {
			t.Errorf("%s: %d (%v), want %d", name, got, failure, test.want)
		}
	}
}

func TestHelperIsRemovedAfterASuccess(t *testing.T) {
	t.Parallel()
	b, f := newOwnEnv(t)
	takeOver(b, f, actingHelper())
	s := &stepRun{Orchestrator: &Orchestrator{config: b.config}, record: actingHelper(), runID: testRun, journal: &journal{}}
	f.state = helperEnded(0)
	f.state.PuttingBack = true
	f.started = true
	ctx, cancel := context.WithTimeout(t.Context(), 2*helperPause)
	defer cancel()
	s.log = s.config.Logger
	if failure := s.endHelpers(ctx); failure == nil || f.removed > 0 {
		t.Errorf("a helper that puts a container back was removed: %v", failure)
	}
	f.state.Done = true
	if failure := s.endHelpers(t.Context()); failure != nil || f.removed != 1 {
		t.Errorf("%v, removed %d", failure, f.removed)
	}
}

func TestRollbackOfTheOwnServiceIsLeftToAHelper(t *testing.T) {
	t.Parallel()
	own := strings.Repeat("b", 64)
	before := change.Container{ID: strings.Repeat("a", 64), Name: "moonmind-orchestrator-1", Service: "orchestrator", ImageID: "sha256:old", Image: "local", ConfigHash: "h", State: "running"}
	for name, test := range map[string]struct {
		act   change.Act
		stops bool
	}{
		"compose replaces the service":     {change.Act{Do: change.ComposeUp, Service: "orchestrator"}, true},
		"compose replaces another one":     {change.Act{Do: change.ComposeUp, Service: "api"}, false},
		"the container is replaced":        {change.Act{Do: change.ReplaceContainer, Container: change.Container{ID: own}, Before: before}, true},
		"the container is removed":         {change.Act{Do: change.RemoveContainer, Container: change.Container{ID: own}}, true},
		"another container is replaced":    {change.Act{Do: change.ReplaceContainer, Container: change.Container{ID: "c"}}, false},
		"the image gets its name back":     {change.Act{Do: change.TagImage, Name: "local", ID: "sha256:old"}, false},
		"a container of before is missing": {change.Act{Do: change.ReplaceContainer, Before: before}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, f := newOwnEnv(t)
			f.own.ID = own
			engine := &fakeEngine{pins: map[string]compose.Pin{"pin": {ImageID: "sha256:old", Inspection: new(compose.Inspection)}}}
			b.config.Engine = engine
			o, err := New(b.config)
			if err != nil {
				t.Fatal(err)
			}
			s := &stepRun{Orchestrator: o, log: o.log, runner: o.runner, runID: testRun, step: store.StepRollback,
				journal: o.openJournal(o.log, store.Start{Claim: store.Claim{RunID: testRun, Step: store.StepRollback, Attempt: 1}}, nil)}
			defer s.journal.close()
			s.record.Helper = &change.Helper{Name: "restart", Step: "restart", Attempt: 1, Image: "sha256:old"}
			s.record.Image = &change.Image{Project: "moonmind", Before: change.Project{Containers: []change.Container{before}}, Pins: []change.Pin{{Name: "pin", Container: before.ID}}}
			if s.dir, err = artifacts.Open(t.TempDir(), o.config.Redactor); err != nil {
				t.Fatal(err)
			}
			log, err := s.dir.Log("rollback.log")
			if err != nil {
				t.Fatal(err)
			}
			defer log.Discard()
			f.state = compose.HelperState{PuttingBack: true, PutBack: true, Done: true}
			r := &imageRestore{stepRun: s, log: log}
			if err := r.awaitHelper(t.Context()); err != nil || len(f.tasks) > 0 {
				t.Errorf("%v, helpers %+v", err, f.tasks)
			}
			stops, err := r.byHelper(t.Context(), test.act)
			if err != nil || stops != test.stops || len(f.tasks) > 0 != test.stops {
				t.Fatalf("%t, %v, helpers %+v", stops, err, f.tasks)
			}
			if !stops {
				return
			}
			task := f.tasks[0]
			if len(task.Command) > 0 || len(task.Before.Containers) != 1 || task.Before.Containers[0].Container.ID != before.ID || task.Before.Containers[0].Container.ConfigHash != "h" {
				t.Errorf("task %+v", task)
			}
			if !s.record.Helper.Acts("rollback", 1, 0) || f.images[0] != "sha256:old" {
				t.Errorf("record %+v, images %v", s.record.Helper, f.images)
			}
			// A worker that was killed after the record is replaced by another one.
			f.tasks, f.started = nil, false
			if err := r.awaitHelper(t.Context()); err != nil || len(f.tasks) != 1 || f.tasks[0].Before.Containers[0].Container.ID != before.ID {
				t.Errorf("%v, helpers %+v", err, f.tasks)
			}
			if _, err := r.byHelper(t.Context(), test.act); err == nil {
				t.Error("a helper that was of no use is started again and again")
			}
		})
	}
}
