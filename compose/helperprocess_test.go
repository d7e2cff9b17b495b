package compose

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// fakeService is a service with one container, "old" at first.
type fakeService struct {
	mu         sync.Mutex
	containers []Container
	refusals   int // how often PutBack fails before it succeeds
	putBacks   int
	mended     int
	silent     int   // how often the engine does not answer
	unseen     error // of composed
	startable  bool  // startAny starts what is exited
	starts     int
}

var oldContainer = Container{ID: "old", Name: "p-worker-1", State: "running", ImageID: "sha256:old", StartedAt: time.Unix(1, 0)}

func (f *fakeService) set(containers ...Container) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.containers = containers
}

func (f *fakeService) Containers(context.Context, string, string) ([]Container, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.containers, f.unseen
}

func (f *fakeService) PutBack(_ context.Context, _ ServiceState, say func(string)) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.putBacks++
	if f.refusals > 0 {
		f.refusals--
		return errors.New("the engine refuses")
	}
	say("creating container p-worker-1 as it was")
	f.containers = []Container{oldContainer}
	return nil
}

func (f *fakeService) mendInterrupted(context.Context, ServiceState) error {
	f.mended++
	return nil
}

func (f *fakeService) LogTail(context.Context, string, int) (string, error) { return "the reason", nil }

func (f *fakeService) Ping(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.silent > 0 {
		f.silent--
		return ErrUnreachable
	}
	return nil
}

func (f *fakeService) startAny(context.Context, string, string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.starts++
	for i, c := range f.containers {
		if f.startable && c.State == "exited" {
			f.containers[i].State, f.containers[i].StartedAt = "running", time.Now()
		}
	}
	return nil
}

// helperEnv is the folder of a helper whose command is a shell script.
type helperEnv struct {
	t       *testing.T
	folder  string
	service *fakeService
}

func newHelperEnv(t *testing.T, script string) *helperEnv {
	t.Helper()
	task := HelperTask{
		Name: "helper", RunID: "r", Step: "restart", Workspace: t.TempDir(), Environ: []string{"A=b"}, Window: 400 * time.Millisecond,
		Before: ServiceState{Project: "p", Service: "worker", Containers: []KeptContainer{{Container: oldContainer}}},
	}
	if script != "" {
		task.Command = []string{"/bin/sh", "-c", script}
	}
	text, err := json.Marshal(task)
	if err != nil {
		t.Fatal(err)
	}
	e := &helperEnv{t: t, folder: t.TempDir(), service: &fakeService{containers: []Container{oldContainer}}}
	e.write(taskFile, string(text))
	return e
}

func (e *helperEnv) write(name, text string) {
	e.t.Helper()
	if err := os.WriteFile(filepath.Join(e.folder, name), []byte(text), 0o644); err != nil {
		e.t.Fatal(err)
	}
}

// process runs one process of the helper.
func (e *helperEnv) process(ctx context.Context) (HelperState, error) {
	e.t.Helper()
	h, end, err := openHelper(e.folder, io.Discard)
	if err != nil {
		e.t.Fatal(err)
	}
	defer end()
	h.service, h.interval, h.hopelessAfter = e.service, time.Millisecond, 20*time.Millisecond
	err = h.run(ctx)
	return h.state, err
}

func (e *helperEnv) kinds() string {
	e.t.Helper()
	text, err := os.ReadFile(filepath.Join(e.folder, eventsFile))
	if err != nil {
		e.t.Fatal(err)
	}
	var kinds []string
	for _, event := range parseEvents(text).Events {
		if event.Kind != HelperNote {
			kinds = append(kinds, string(event.Kind))
		}
	}
	return strings.Join(kinds, ", ")
}

func TestHelperDecides(t *testing.T) {
	t.Parallel()
	fresh := Container{ID: "new", Name: "p-worker-1", State: "running", ImageID: "sha256:new", StartedAt: time.Now().Add(-time.Hour)}
	exited := Container{ID: "new", Name: "p-worker-1", State: "exited", ExitCode: 3}
	looping := Container{ID: "new", Name: "p-worker-1", State: "restarting", Restarts: 5, ExitCode: 1}
	restarted := oldContainer
	restarted.StartedAt = time.Unix(2, 0)
	const replaced = "command begun, output, command ended, "
	for name, test := range map[string]struct {
		script    string
		after     []Container // the service once the command has ended
		confirmed bool
		events    string
		why       string
	}{
		"a new container whose worker goes on":        {"echo a", []Container{fresh}, true, replaced + "confirmed, done", ""},
		"a new container without a worker":            {"echo a", []Container{fresh}, false, replaced + "putting back, put back, done", "no worker has taken the step over within 400ms"},
		"a new container that exits":                  {"echo a", []Container{exited}, false, replaced + "putting back, put back, done", "container p-worker-1 is exited (exit code 3)"},
		"a new container that restarts for ever":      {"echo a", []Container{looping}, false, replaced + "putting back, put back, done", "container p-worker-1 does not stay up: the engine has restarted it 5 times, its last exit code is 1"},
		"no container":                                {"echo a", nil, false, replaced + "putting back, put back, done", "the service has no container"},
		"a worker that goes on, and then exits":       {"echo a", []Container{exited}, true, replaced + "confirmed, started again, putting back, put back, done", "container p-worker-1 is exited (exit code 3)"},
		"nothing to do":                               {"echo a", []Container{oldContainer}, false, replaced + "done", ""},
		"the same container, restarted":               {"echo a", []Container{restarted}, true, replaced + "confirmed, done", ""},
		"a command that fails before it did anything": {"echo no >&2; exit 3", []Container{oldContainer}, false, replaced + "done", ""},
		"a command that fails after it did something": {"echo no; exit 3", []Container{fresh}, true, replaced + "confirmed, putting back, put back, done", "the command has failed with code 3"},
		"only to put back":                            {"", nil, false, "putting back, put back, done", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newHelperEnv(t, test.script)
			e.service.set(test.after...)
			if test.confirmed {
				e.write(confirmedFile, "orchestrator@new\n")
			}
			state, err := e.process(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if got := e.kinds(); got != test.events || !strings.HasPrefix(state.Why, test.why) {
				t.Errorf("events %s; why %q, want %s; %q", got, state.Why, test.events, test.why)
			}
			if again, err := e.process(t.Context()); err != nil || !again.Done {
				t.Errorf("another process: %v, %+v", err, again)
			}
		})
	}
}

// TestHelperContinues kills a helper at each of its events, and in its command. The
// next process must bring the task to the same end.
func TestHelperContinues(t *testing.T) {
	t.Parallel()
	const script = `echo begun >> runs; sleep 0.05; echo output`
	for kills := 1; ; kills++ {
		e := newHelperEnv(t, script)
		e.service.set() // the command has removed the old container and failed to create the new one
		e.service.refusals = 2
		killed := false
		for !killed {
			ctx, kill := context.WithCancel(t.Context())
			h, end, err := openHelper(e.folder, &killAt{n: kills, kill: func() { killed = true; kill() }})
			if err != nil {
				t.Fatal(err)
			}
			h.service, h.interval, h.hopelessAfter = e.service, time.Millisecond, 5*time.Millisecond
			err = h.run(ctx)
			end()
			kill()
			if !killed && err == nil { // it had fewer events than that
				if kills < 5 {
					t.Fatalf("only %d events: %s", kills, e.kinds())
				}
				return
			}
		}
		// A killed process may leave half a line.
		f, err := os.OpenFile(filepath.Join(e.folder, eventsFile), os.O_APPEND|os.O_WRONLY, 0)
		if err == nil {
			_, err = f.WriteString(`{"kind":"put ba`)
		}
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		state, err := e.process(t.Context())
		if err != nil || !state.Done || !state.PutBack {
			t.Fatalf("killed at event %d: %v, events %s", kills, err, e.kinds())
		}
		if begun := strings.Count(e.kinds(), string(HelperCommandBegun)); begun-1 != e.service.mended {
			t.Errorf("killed at event %d: the command was begun %d times, and what it left was mended %d times", kills, begun, e.service.mended)
		}
	}
}

// killAt calls kill at the nth write, which is the nth event with a line of its
// own.
type killAt struct {
	n    int
	kill func()
}

func (k *killAt) Write(p []byte) (int, error) {
	if k.n--; k.n == 0 {
		k.kill()
	}
	return len(p), nil
}

func TestHelperRepeatsACommandThatLostTheEngine(t *testing.T) {
	t.Parallel()
	e := newHelperEnv(t, "exit 1")
	e.service.silent = 2
	state, err := e.process(t.Context())
	if want := "command begun, command begun, command begun, command ended, done"; err != nil || e.kinds() != want || e.service.mended != 2 || state.Code != 1 {
		t.Errorf("%v, events %s, mended %d times, want %s", err, e.kinds(), e.service.mended, want)
	}
}

func TestHelperWaitsForTheEngine(t *testing.T) {
	t.Parallel()
	e := newHelperEnv(t, "true")
	e.service.unseen = ErrUnreachable
	ctx, cancel := context.WithTimeout(t.Context(), time.Second) // longer than the window
	defer cancel()
	if _, err := e.process(ctx); !errors.Is(err, context.DeadlineExceeded) || e.service.putBacks > 0 {
		t.Errorf("%v, put back %d times while nothing was known", err, e.service.putBacks)
	}
}

// The engine is killed after the new worker has confirmed, and does not start its
// container again. The helper does, once, and also if it was killed itself meanwhile.
func TestHelperStartsAConfirmedContainerAgain(t *testing.T) {
	t.Parallel()
	e := newHelperEnv(t, "true")
	e.service.set(Container{ID: "new", Name: "p-worker-1", State: "exited", ExitCode: 137})
	e.service.startable = true
	e.write(confirmedFile, "orchestrator@new\n")
	state, err := e.process(t.Context())
	if want := "command begun, command ended, confirmed, started again, done"; err != nil || e.kinds() != want || e.service.starts != 1 || state.PutBack {
		t.Errorf("%v, events %s, started %d times, want %s", err, e.kinds(), e.service.starts, want)
	}
}

// What a helper prints is read by people, and stays in the engine's log.
func TestAHelperPrintsNoSecrets(t *testing.T) {
	t.Parallel()
	e := newHelperEnv(t, "")
	var printed strings.Builder
	h, end, err := openHelper(e.folder, &printed)
	if err != nil {
		t.Fatal(err)
	}
	defer end()
	h.service = e.service
	h.redact = func(text string) string { return strings.ReplaceAll(text, "reason", "***") }
	e.service.set(Container{ID: "new", Name: "p-worker-1", Service: "worker", State: "exited"})
	h.noteLogs(t.Context())
	if got, want := printed.String(), "note: the log of container p-worker-1 ends:\nthe ***\n"; got != want {
		t.Errorf("printed %q, want %q", got, want)
	}
}
