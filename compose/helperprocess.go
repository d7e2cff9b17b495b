package compose

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
)

const (
	// helperInterval is the time between two looks of a helper at its service, its
	// files and its standby.
	helperInterval = 250 * time.Millisecond
	// hopelessAfter is how long a container must be down, and not about to be
	// restarted by the engine, to count as ended.
	hopelessAfter = 3 * time.Second
	// hopelessRestarts is how many restarts by the engine show that a container
	// does not stay up. The engine doubles its pause with each, so this takes some
	// seconds.
	hopelessRestarts = 5
	// longestBackOff is the longest pause of the engine between two restarts.
	longestBackOff = time.Minute
	// putBackLimit is how long a helper tries to put a service back while the
	// engine answers. After it, it starts what there is.
	putBackLimit = 5 * time.Minute
)

// RunHelper is the process of a helper: it reads its task from a folder, works
// until it is done, and prints its events. It continues what an earlier process
// has begun in the folder. After an error it can be run again.
//
// What it prints stays in the engine's log of its container: it has the last lines of the
// log of a container that did not come up. redact gets the command's environment, and
// returns what removes its secrets from a text. The events in the folder are read by the
// worker, which removes secrets itself.
func RunHelper(ctx context.Context, folder string, output io.Writer, redact func(environ []string) func(string) string) error {
	h, close, err := openHelper(folder, output)
	if err != nil {
		return err
	}
	defer close()
	h.redact = redact(h.task.Environ)
	engine, err := NewEngine(EngineConfig{Host: h.task.Host, CertPath: h.task.CertPath})
	if err != nil {
		return err
	}
	defer engine.Close()
	h.service = engine
	watch, end := context.WithCancel(ctx)
	var standby sync.WaitGroup
	defer standby.Wait()
	defer end()
	// Before the command, which is what the standby protects.
	if err := engine.keepStandby(ctx, h.task); err != nil {
		h.emit(HelperEvent{Kind: HelperNote, Text: "no standby yet: " + err.Error()})
	}
	standby.Go(func() {
		for pause(watch, time.Second) == nil {
			// An error passes, or the helper has it too.
			_ = engine.keepStandby(watch, h.task)
		}
	})
	return h.run(ctx)
}

// RunStandby is the process of a standby: it starts the helper again if it was
// killed, and ends when the helper is done or removed.
func RunStandby(ctx context.Context, folder string, output io.Writer) error {
	h, close, err := openHelper(folder, output)
	if err != nil {
		return err
	}
	defer close()
	engine, err := NewEngine(EngineConfig{Host: h.task.Host, CertPath: h.task.CertPath})
	if err != nil {
		return err
	}
	defer engine.Close()
	name, down := h.task.Name, false
	for {
		state, err := engine.helperContainer(ctx, name)
		switch {
		case err != nil: // the engine does not answer now
		case state == nil || state.State == "exited" && state.ExitCode == 0:
			return nil
		case isStarted(state):
			down = false
		case !down: // the engine may be about to restart it
			down = true
		default:
			h.emit(HelperEvent{Kind: HelperNote, Text: "starting " + name + " again, which was killed"})
			_ = engine.StartContainer(ctx, name) // the next look shows whether it runs
		}
		if err := pause(ctx, helperInterval); err != nil {
			return err
		}
	}
}

// pause waits, and returns the error of a context that ends before.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// keepStandby creates or starts the standby of a task's helper.
func (e *Engine) keepStandby(ctx context.Context, task HelperTask) error {
	name := task.Name + standbySuffix
	state, err := e.helperContainer(ctx, name)
	if err != nil {
		return err
	}
	if state == nil {
		helper, _, err := e.InspectContainer(ctx, task.Name)
		if err != nil {
			return err
		}
		config, host := helper.again()
		config.Cmd = []string{HelperCommand, "--standby", HelperFolder}
		options := client.ContainerCreateOptions{Name: name, Config: &config, HostConfig: &host}
		if mode := host.NetworkMode; mode.IsUserDefined() {
			options.NetworkingConfig = &network.NetworkingConfig{EndpointsConfig: map[string]*network.EndpointSettings{string(mode): {}}}
		}
		if err := e.createNamed(ctx, options); err != nil {
			return err
		}
		if state, err = e.helperContainer(ctx, name); err != nil || state == nil {
			return err
		}
	}
	if state.State == "created" {
		text, err := json.Marshal(task)
		if err != nil {
			return err
		}
		if err := e.putHelperFiles(ctx, name, map[string][]byte{taskFile: text}); err != nil {
			return err
		}
	}
	if isStarted(state) {
		return nil
	}
	return e.StartContainer(ctx, name)
}

// keptService is what a helper needs of the engine.
type keptService interface {
	Containers(ctx context.Context, project, service string) ([]Container, error)
	PutBack(ctx context.Context, state ServiceState, say func(string)) error
	mendInterrupted(ctx context.Context, before ServiceState) error
	startAny(ctx context.Context, project, service string) error
	LogTail(ctx context.Context, id string, lines int) (string, error)
	Ping(ctx context.Context) error
}

// helperProcess is one process of a helper.
type helperProcess struct {
	folder  string
	task    HelperTask
	service keptService
	started time.Time
	// interval and hopelessAfter are the constants; tests shorten them.
	interval, hopelessAfter time.Duration

	mu     sync.Mutex // guards what follows: a command writes to both its outputs
	state  HelperState
	events *os.File
	output io.Writer
	// redact removes secrets from what is printed.
	redact func(string) string
}

func openHelper(folder string, output io.Writer) (h *helperProcess, close func(), err error) {
	text, err := os.ReadFile(filepath.Join(folder, taskFile))
	if err != nil {
		return nil, nil, fmt.Errorf("this command is for the helper containers that a worker starts: %w", err)
	}
	h = &helperProcess{folder: folder, output: output, redact: func(text string) string { return text }, started: time.Now(), interval: helperInterval, hopelessAfter: hopelessAfter}
	if err := json.Unmarshal(text, &h.task); err != nil {
		return nil, nil, fmt.Errorf("task of the helper: %w", err)
	}
	name := filepath.Join(folder, eventsFile)
	known, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("events of the helper: %w", err)
	}
	h.state = parseEvents(known)
	if h.events, err = os.OpenFile(name, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644); err != nil {
		return nil, nil, fmt.Errorf("events of the helper: %w", err)
	}
	if len(known) > 0 && !bytes.HasSuffix(known, []byte{'\n'}) {
		// The end of a line that a killed process has begun.
		if _, err := h.events.Write([]byte{'\n'}); err != nil {
			h.events.Close()
			return nil, nil, fmt.Errorf("events of the helper: %w", err)
		}
	}
	return h, func() { h.events.Close() }, nil
}

// emit records an event. An event other than output is on disk when emit returns.
func (h *helperProcess) emit(e HelperEvent) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	e.At = time.Now().UTC()
	text, err := json.Marshal(e)
	if err != nil {
		return err
	}
	if _, err := h.events.Write(append(text, '\n')); err != nil {
		return fmt.Errorf("events of the helper: %w", err)
	}
	if e.Kind != HelperOutput {
		if err := h.events.Sync(); err != nil {
			return fmt.Errorf("events of the helper: %w", err)
		}
	}
	h.state.add(e)
	switch e.Kind {
	case HelperOutput: // the step's log has it, without secrets
	case HelperCommandEnded:
		fmt.Fprintf(h.output, "%s with code %d\n", e.Kind, e.Code)
	default:
		fmt.Fprintln(h.output, h.redact(strings.TrimSuffix(string(e.Kind)+": "+e.Text, ": ")))
	}
	return nil
}

// run does what is left of the task.
func (h *helperProcess) run(ctx context.Context) error {
	if !h.state.PuttingBack {
		why := "the run is rolled back"
		if len(h.task.Command) > 0 {
			if !h.state.Ended {
				if err := h.runCommand(ctx); err != nil {
					return err
				}
			}
			var err error
			if why, err = h.await(ctx); err != nil {
				return err
			}
			if why == "" {
				return h.emit(HelperEvent{Kind: HelperDone})
			}
		}
		if err := h.emit(HelperEvent{Kind: HelperPuttingBack, Text: why}); err != nil {
			return err
		}
	}
	if !h.state.PutBack && !h.state.NotPutBack {
		if len(h.task.Command) > 0 {
			h.noteLogs(ctx)
		}
		if err := h.putBack(ctx); err != nil {
			return err
		}
	}
	return h.emit(HelperEvent{Kind: HelperDone})
}

// runCommand runs the task's command, again and again until it has ended by itself.
// If an earlier process was killed while it ran, or the engine has ended meanwhile,
// it first mends what compose does not survive.
func (h *helperProcess) runCommand(ctx context.Context) error {
	for {
		if h.state.Begun {
			if err := h.mend(ctx); err != nil {
				return err
			}
		}
		if err := h.emit(HelperEvent{Kind: HelperCommandBegun}); err != nil {
			return err
		}
		code, err := h.execute(ctx)
		if err != nil {
			return err
		}
		if code == 0 || h.service.Ping(ctx) == nil {
			return h.emit(HelperEvent{Kind: HelperCommandEnded, Code: code})
		}
		if err := h.emit(HelperEvent{Kind: HelperNote, Text: "the command has failed and the engine does not answer: it runs again when the engine does"}); err != nil {
			return err
		}
	}
}

// mend retries until the engine answers and what an interrupted command has left is
// mended.
func (h *helperProcess) mend(ctx context.Context) error {
	last := ""
	for {
		err := h.service.mendInterrupted(ctx, h.task.Before)
		if err == nil {
			return nil
		}
		if text := err.Error(); text != last && ctx.Err() == nil {
			last = text
			if err := h.emit(HelperEvent{Kind: HelperNote, Text: text}); err != nil {
				return err
			}
		}
		if err := pause(ctx, h.interval); err != nil {
			return err
		}
	}
}

// execute runs the task's command once and returns its exit code.
func (h *helperProcess) execute(ctx context.Context) (int, error) {
	argv := h.task.Command
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir, cmd.Env = h.task.Workspace, append([]string{}, h.task.Environ...)
	cmd.Stdout, cmd.Stderr = eventWriter{h, false}, eventWriter{h, true}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	err := cmd.Run()
	if cause := context.Cause(ctx); cause != nil {
		return 0, cause // the next process runs it again
	}
	if cmd.ProcessState == nil {
		return -1, h.emit(HelperEvent{Kind: HelperOutput, Text: err.Error() + "\n", Stderr: true})
	}
	return cmd.ProcessState.ExitCode(), nil
}

// eventWriter makes events of a command's output.
type eventWriter struct {
	helper *helperProcess
	stderr bool
}

func (w eventWriter) Write(p []byte) (int, error) {
	if err := w.helper.emit(HelperEvent{Kind: HelperOutput, Text: string(p), Stderr: w.stderr}); err != nil {
		return 0, err
	}
	return len(p), nil
}

// await waits until the service needs the helper no more, and returns "", or until
// it must be put back, and returns why.
func (h *helperProcess) await(ctx context.Context) (why string, err error) {
	var downSince, startedAgain time.Time
	for {
		if !h.state.Confirmed {
			if by, err := os.ReadFile(filepath.Join(h.folder, confirmedFile)); err == nil {
				if err := h.emit(HelperEvent{Kind: HelperConfirmed, Text: strings.TrimSpace(string(by))}); err != nil {
					return "", err
				}
			}
		}
		now, err := h.service.Containers(ctx, h.task.Before.Project, h.task.Before.Service)
		if err == nil { // without an answer of the engine nothing is decided
			seen := judge(h.task.Before, now)
			switch {
			case seen.down == "":
				downSince = time.Time{}
			case downSince.IsZero():
				downSince = time.Now()
			}
			seen.downLong = seen.down != "" && time.Since(downSince) >= h.hopelessAfter
			done, why := h.decide(seen, time.Now())
			switch {
			case done && h.state.Confirmed && !h.state.StartedAgain && why != "" && why == seen.down:
				if err := h.startAgain(ctx, why); err != nil {
					return "", err
				}
				downSince, startedAgain = time.Time{}, time.Now()
			case done && why == "" && time.Since(startedAgain) < h.hopelessAfter: // it may end again
			case done:
				return why, nil
			}
		}
		if err := pause(ctx, h.interval); err != nil {
			return "", err
		}
	}
}

// startAgain starts the new container, whose worker has gone on with the step: it ran,
// so that something else than its version may have ended it, such as a kill of the
// engine.
func (h *helperProcess) startAgain(ctx context.Context, why string) error {
	if err := h.emit(HelperEvent{Kind: HelperStartedAgain, Text: why}); err != nil {
		return err
	}
	if err := h.service.startAny(ctx, h.task.Before.Project, h.task.Before.Service); err != nil && ctx.Err() == nil {
		return h.emit(HelperEvent{Kind: HelperNote, Text: err.Error()})
	}
	return context.Cause(ctx)
}

// seen is what a helper sees of its service.
type seen struct {
	// untouched says that the containers of before run, and have not been
	// restarted.
	untouched bool
	// down says what is not up, "" for nothing. downLong says that it has been so
	// for a while.
	down     string
	downLong bool
	// restarts says which container does not stay up, "" for none.
	restarts string
}

// judge compares the containers of a service with those of before.
func judge(before ServiceState, now []Container) seen {
	s := seen{untouched: true}
	for _, old := range before.Containers {
		s.untouched = s.untouched && (!old.ran() || slices.ContainsFunc(now, func(c Container) bool {
			return c.ID == old.Container.ID && c.State == "running" && c.StartedAt.Equal(old.Container.StartedAt)
		}))
	}
	if len(now) == 0 {
		s.down = "the service has no container"
	}
	for _, c := range now {
		switch {
		case !isUp(c):
			s.down = fmt.Sprintf("container %s is %s (exit code %d)", c.Name, c.State, c.ExitCode)
			if c.Error != "" {
				s.down += ": " + c.Error
			}
		case c.Restarts >= hopelessRestarts && (c.State == "restarting" || time.Since(c.StartedAt) < longestBackOff):
			s.restarts = fmt.Sprintf("container %s does not stay up: the engine has restarted it %d times, its last exit code is %d", c.Name, c.Restarts, c.ExitCode)
		}
	}
	return s
}

// decide says whether the wait after the command is over, and why the service must
// be put back, if it must.
func (h *helperProcess) decide(seen seen, now time.Time) (done bool, why string) {
	limit := func(from time.Time) bool {
		// The time in which the helper did not run does not count: the successor did
		// not run then either.
		if from.Before(h.started) {
			from = h.started
		}
		return now.Sub(from) >= h.task.Window
	}
	switch {
	case seen.untouched:
		return true, ""
	case h.state.Code != 0:
		return true, fmt.Sprintf("the command has failed with code %d", h.state.Code)
	case seen.downLong:
		return true, seen.down
	case seen.restarts != "":
		return true, seen.restarts
	case !h.state.Confirmed && limit(h.state.EndedAt):
		return true, fmt.Sprintf("no worker has taken the step over within %s", h.task.Window)
	case h.state.Confirmed && limit(h.state.ConfirmedAt):
		return true, seen.down
	}
	return false, ""
}

// logLines is how much of the log of a container is kept that does not stay.
const logLines = 20

// noteLogs keeps the end of the logs of the containers that are about to be
// removed: they explain why.
func (h *helperProcess) noteLogs(ctx context.Context) {
	now, err := h.service.Containers(ctx, h.task.Before.Project, h.task.Before.Service)
	if err != nil {
		return // also without them the service is put back
	}
	for _, c := range now {
		if slices.ContainsFunc(h.task.Before.Containers, func(old KeptContainer) bool { return isAsBefore(c, old.Container) }) {
			continue
		}
		if tail, err := h.service.LogTail(ctx, c.ID, logLines); err == nil && strings.TrimSpace(tail) != "" {
			_ = h.emit(HelperEvent{Kind: HelperNote, Text: fmt.Sprintf("the log of container %s ends:\n%s", c.Name, strings.TrimSpace(tail))})
		}
	}
}

// putBack puts the service back, and repeats until that has succeeded. If the
// engine answers and refuses for long, it starts what there is: any container of
// the service is better than none.
func (h *helperProcess) putBack(ctx context.Context) error {
	say := func(text string) { _ = h.emit(HelperEvent{Kind: HelperNote, Text: text}) }
	last := ""
	refusedSince := time.Time{}
	for wait := h.interval; ; wait = min(2*wait, 10*time.Second) {
		err := h.service.PutBack(ctx, h.task.Before, say)
		switch {
		case err == nil:
			return h.emit(HelperEvent{Kind: HelperPutBack})
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, ErrUnreachable):
			refusedSince = time.Time{}
		case refusedSince.IsZero():
			refusedSince = time.Now()
		case time.Since(refusedSince) > putBackLimit:
			if started := h.service.startAny(ctx, h.task.Before.Project, h.task.Before.Service); started != nil {
				say(started.Error())
			}
			return h.emit(HelperEvent{Kind: HelperNotPutBack, Text: err.Error()})
		}
		if text := err.Error(); text != last {
			say(text)
			last = text
		}
		if err := pause(ctx, wait); err != nil {
			return err
		}
	}
}
