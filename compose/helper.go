package compose

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
)

// A helper is a container that replaces the container of a process that asks for
// it: that process ends in the middle of the replacement and cannot finish it.
//
//   - It is made from the image of the process's own container, as it runs now,
//     and keeps that image from being pruned.
//   - All of its state is in the folder HelperFolder of its own file system:
//     its task, what it has done, and what it is told. So it continues after a kill
//     of the helper, or of the engine, where it was.
//   - Two containers have the same task. The second one, the standby, starts the
//     first one again if it is killed, and the first does the same for the standby:
//     an engine does not restart a container that `docker kill` has ended.
//   - Whoever takes the work over confirms that it has, see [Engine.Confirm]. If
//     nobody does in time, the helper puts the old container back.
const (
	// HelperFolder is the folder of the helper's state.
	HelperFolder = "/mm-orchestrator-helper"
	// HelperCommand is the subcommand of mm-orchestrator that a helper runs.
	HelperCommand = "restart-service"
	// HelperPrefix begins the name of every helper.
	HelperPrefix = "mm-orchestrator-helper-"

	labelHelper = "mm-orchestrator.helper"
	labelStep   = "mm-orchestrator.step"
	// labelPrefix begins all labels of compose.
	labelPrefix = "com.docker.compose."

	taskFile      = "task.json"
	eventsFile    = "events"
	confirmedFile = "confirmed"

	standbySuffix = "-standby"
)

// A HelperTask is what a helper has to do.
type HelperTask struct {
	// Name is the name of the helper's container. It begins with HelperPrefix.
	Name string `json:"name"`
	// RunID and Step say for what.
	RunID string `json:"run_id"`
	Step  string `json:"step"`
	// Command is the command line to run in Workspace, with the variables Environ.
	// Its program is an absolute path. Without a command, the helper only puts
	// Before back.
	Command   []string `json:"command,omitempty"`
	Workspace string   `json:"workspace"`
	Environ   []string `json:"environ"`
	// Host and CertPath are those of the engine, see [EngineConfig].
	Host     string `json:"host,omitempty"`
	CertPath string `json:"cert_path,omitempty"`
	// Before is the service that must run in the end, as it is before the command.
	Before ServiceState `json:"before"`
	// Window is how long the helper waits, after its command has ended, for
	// somebody to confirm that the work goes on, and how long it then watches the
	// new container.
	Window time.Duration `json:"window"`
}

// A HelperEvent is something that a helper has done. The events are kept as one
// JSON object per line.
type HelperEvent struct {
	At   time.Time       `json:"at"`
	Kind HelperEventKind `json:"kind"`
	// Text is the output, or the reason.
	Text string `json:"text,omitempty"`
	// Stderr says that an output is from standard error.
	Stderr bool `json:"stderr,omitempty"`
	// Code is the exit code of the command.
	Code int `json:"code,omitempty"`
}

// HelperEventKind says what has happened.
type HelperEventKind string

// The events of a helper.
const (
	// HelperCommandBegun comes before the command runs; it comes again if the
	// helper was killed while the command ran.
	HelperCommandBegun HelperEventKind = "command begun"
	// HelperOutput has a piece of the command's output.
	HelperOutput HelperEventKind = "output"
	// HelperCommandEnded has the command's exit code.
	HelperCommandEnded HelperEventKind = "command ended"
	// HelperConfirmed says that the helper knows that its work was taken over.
	HelperConfirmed HelperEventKind = "confirmed"
	// HelperStartedAgain says why the new container is started again, once: an engine
	// that was killed leaves it exited.
	HelperStartedAgain HelperEventKind = "started again"
	// HelperPuttingBack comes before the first act of putting the service back.
	// From then on no confirmation counts.
	HelperPuttingBack HelperEventKind = "putting back"
	// HelperNote says what the helper does.
	HelperNote HelperEventKind = "note"
	// HelperPutBack says that the service is what it was before.
	HelperPutBack HelperEventKind = "put back"
	// HelperNotPutBack says that it cannot be had, and why.
	HelperNotPutBack HelperEventKind = "not put back"
	// HelperDone is the last event.
	HelperDone HelperEventKind = "done"
)

// A HelperState is the sum of a helper's events.
type HelperState struct {
	// Events are all of them, in their order.
	Events []HelperEvent
	// Begun says that the command was started at least once, Ended that it has
	// ended, with the exit code Code, at EndedAt.
	Begun, Ended bool
	Code         int
	EndedAt      time.Time
	// Confirmed, StartedAgain, PuttingBack, PutBack, NotPutBack and Done are true after
	// the event of that name.
	Confirmed, StartedAgain, PuttingBack, PutBack, NotPutBack, Done bool
	ConfirmedAt                                                     time.Time
	// Why is the reason for putting back; or, with NotPutBack, why not.
	Why string
}

func (s *HelperState) add(e HelperEvent) {
	s.Events = append(s.Events, e)
	switch e.Kind {
	case HelperCommandBegun:
		s.Begun = true
	case HelperCommandEnded:
		s.Ended, s.Code, s.EndedAt = true, e.Code, e.At
	case HelperConfirmed:
		s.Confirmed, s.ConfirmedAt = true, e.At
	case HelperStartedAgain:
		s.StartedAgain = true
	case HelperPuttingBack:
		s.PuttingBack, s.Why = true, e.Text
	case HelperPutBack:
		s.PutBack = true
	case HelperNotPutBack:
		s.NotPutBack, s.Why = true, e.Text
	case HelperDone:
		s.Done = true
	}
}

// parseEvents reads events. It leaves out a last line without its end: a helper
// that was killed has left it, or writes it now.
func parseEvents(text []byte) HelperState {
	var state HelperState
	for line := range bytes.Lines(text) {
		var e HelperEvent
		if bytes.HasSuffix(line, []byte{'\n'}) && json.Unmarshal(line, &e) == nil {
			state.add(e)
		}
	}
	return state
}

// ErrNoHelper says that the container of a helper does not exist.
var ErrNoHelper = errors.New("the helper container does not exist")

// StartHelper starts a helper for a task in a container with the image, the mounts
// and the user of own. program is the path of mm-orchestrator in that image. It can be
// repeated: a helper with the same name is started if it has never run, or was
// killed, and otherwise left alone.
func (e *Engine) StartHelper(ctx context.Context, own OwnContainer, program string, task HelperTask) error {
	name := task.Name
	state, err := e.helperContainer(ctx, name)
	if err != nil {
		return err
	}
	if state == nil {
		options := helperOptions(own.inspection, own.ImageID, program, task)
		if err := e.createNamed(ctx, options); err != nil {
			return err
		}
		if state, err = e.helperContainer(ctx, name); err != nil {
			return err
		}
		if state == nil {
			return fmt.Errorf("helper container %s: %w after its creation", name, ErrNoHelper)
		}
	}
	if state.State == "created" {
		text, err := json.Marshal(task)
		if err != nil {
			return fmt.Errorf("task of helper %s: %w", name, err)
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

// ResumeHelper starts a helper again that was killed before it was done. The error
// is [ErrNoHelper] if it does not exist, or was created and never started: then
// only StartHelper starts it.
func (e *Engine) ResumeHelper(ctx context.Context, name string) error {
	state, err := e.helperContainer(ctx, name)
	switch {
	case err != nil:
		return err
	case state == nil || state.State == "created":
		return fmt.Errorf("helper container %s: %w", name, ErrNoHelper)
	case isStarted(state):
		return nil
	}
	return e.StartContainer(ctx, name)
}

// isStarted says that a helper runs, will be restarted by the engine, or has done
// its work.
func isStarted(c *Container) bool {
	return isUp(*c) || c.State == "exited" && c.ExitCode == 0
}

// createNamed creates a container. It is no error if there is one of that name.
func (e *Engine) createNamed(ctx context.Context, options client.ContainerCreateOptions) error {
	_, err := e.client.ContainerCreate(ctx, options)
	if err = e.failed("create container "+options.Name, err); isNameTaken(err) {
		return nil
	}
	return err
}

// helperContainer returns the state of a helper's container, nil for none.
func (e *Engine) helperContainer(ctx context.Context, name string) (*Container, error) {
	inspection, found, err := e.InspectContainer(ctx, name)
	switch {
	case isNotFound(err):
		return nil, nil
	case err != nil:
		return nil, err
	case inspection.config.Labels[labelHelper] == "":
		return nil, fmt.Errorf("container %s is not a helper of mm-orchestrator: rename it, or remove it", name)
	}
	return &found, nil
}

// helperOptions returns the configuration of a task's helper.
func helperOptions(own Inspection, image, program string, task HelperTask) client.ContainerCreateOptions {
	config, host := own.config, own.hostConfig
	config.Hostname, config.Domainname = "", ""
	config.Env = nil // the task has the environment
	config.Entrypoint, config.Cmd = []string{program}, []string{HelperCommand, HelperFolder}
	config.WorkingDir = "/"
	config.Image = image
	config.Healthcheck = &container.HealthConfig{Test: []string{"NONE"}}
	config.StopSignal, config.StopTimeout = "SIGTERM", nil
	config.ExposedPorts, config.Volumes, config.OnBuild, config.Shell = nil, nil, nil, nil
	config.Tty, config.OpenStdin, config.StdinOnce, config.AttachStdin, config.AttachStdout, config.AttachStderr = false, false, false, false, false, false
	config.Labels = map[string]string{
		labelHelper: task.RunID, labelStep: task.Step, labelPinProject: task.Before.Project, labelPinService: task.Before.Service,
	}
	for name := range own.config.Labels {
		// An image that compose has built passes its labels on. With them, compose
		// and this program would take the helper for a container of the service.
		if strings.HasPrefix(name, labelPrefix) {
			config.Labels[name] = ""
		}
	}

	host.RestartPolicy = container.RestartPolicy{Name: container.RestartPolicyOnFailure}
	host.AutoRemove, host.ContainerIDFile = false, ""
	host.PortBindings, host.PublishAllPorts = nil, false
	host.ReadonlyRootfs = false // for the state
	host.LogConfig = container.LogConfig{Type: "json-file", Config: map[string]string{"max-size": "1m"}}
	host.ConsoleSize = [2]uint{}
	host.Links, host.Cgroup = nil, ""
	host.UTSMode = ""
	if host.PidMode.IsContainer() {
		host.PidMode = ""
	}
	host.IpcMode = ""
	options := client.ContainerCreateOptions{Name: task.Name, Config: &config, HostConfig: &host}
	if task.Host == "" || strings.HasPrefix(task.Host, "unix:") {
		// Nothing but the socket is needed. A network could be gone when the engine
		// starts the helper again.
		host.NetworkMode, host.ExtraHosts = "none", nil
		host.DNS, host.DNSOptions, host.DNSSearch = nil, nil, nil
	} else {
		// The address and the names stay the service's.
		if name := string(host.NetworkMode); host.NetworkMode.IsUserDefined() {
			options.NetworkingConfig = &network.NetworkingConfig{EndpointsConfig: map[string]*network.EndpointSettings{name: {}}}
		}
	}
	return options
}

// putHelperFiles writes files into the helper's folder, also while it does not
// run.
func (e *Engine) putHelperFiles(ctx context.Context, name string, files map[string][]byte) error {
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	// Writable for the image's user, whoever that is.
	headers := []*tar.Header{{Typeflag: tar.TypeDir, Name: path.Base(HelperFolder) + "/", Mode: 0o777}}
	for _, file := range slices.Sorted(maps.Keys(files)) {
		headers = append(headers, &tar.Header{Typeflag: tar.TypeReg, Name: path.Join(path.Base(HelperFolder), file), Mode: 0o644, Size: int64(len(files[file]))})
	}
	for _, header := range headers {
		// A buffer does not fail.
		_ = w.WriteHeader(header)
		_, _ = w.Write(files[path.Base(header.Name)])
	}
	_ = w.Close()
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	_, err := e.client.CopyToContainer(ctx, name, client.CopyToContainerOptions{DestinationPath: "/", Content: &archive})
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("helper container %s: %w", name, ErrNoHelper)
	}
	if err != nil {
		return e.failed("copy files to container "+name, err)
	}
	return nil
}

// helperEventsLimit bounds how much is read of a helper's events, in bytes.
const helperEventsLimit = 32 << 20

// ReadHelper returns what a helper has done so far. The error is [ErrNoHelper] if
// its container does not exist.
func (e *Engine) ReadHelper(ctx context.Context, name string) (HelperState, error) {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	answer, err := e.client.CopyFromContainer(ctx, name, client.CopyFromContainerOptions{SourcePath: path.Join(HelperFolder, eventsFile)})
	if errdefs.IsNotFound(err) {
		if state, err := e.helperContainer(ctx, name); err != nil || state != nil {
			return HelperState{}, err // no events yet
		}
		return HelperState{}, fmt.Errorf("helper container %s: %w", name, ErrNoHelper)
	}
	if err != nil {
		return HelperState{}, e.failed("read the state of helper "+name, err)
	}
	defer answer.Content.Close()
	files := tar.NewReader(answer.Content)
	if _, err := files.Next(); err != nil {
		return HelperState{}, e.failed("read the state of helper "+name, err)
	}
	text, err := io.ReadAll(io.LimitReader(files, helperEventsLimit))
	if err != nil {
		return HelperState{}, e.failed("read the state of helper "+name, err)
	}
	return parseEvents(text), nil
}

// Confirm tells a helper that its caller goes on with the work. It counts only when
// the helper's state says so.
func (e *Engine) Confirm(ctx context.Context, name, by string) error {
	return e.putHelperFiles(ctx, name, map[string][]byte{confirmedFile: []byte(by + "\n")})
}

// A Helper is a container of a helper or of its standby.
type Helper struct {
	// ID and Name are the container's.
	ID, Name string
	// RunID and Step say for what it was started.
	RunID, Step string
	CreatedAt   time.Time
}

// ListHelpers lists the helpers of a run, or of all runs for "".
func (e *Engine) ListHelpers(ctx context.Context, runID string) ([]Helper, error) {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	label := labelHelper
	if runID != "" {
		label += "=" + runID
	}
	list, err := e.client.ContainerList(ctx, client.ContainerListOptions{All: true, Filters: client.Filters{}.Add("label", label)})
	if err != nil {
		return nil, e.failed("list helper containers", err)
	}
	var helpers []Helper
	for _, item := range list.Items {
		h := Helper{ID: item.ID, RunID: item.Labels[labelHelper], Step: item.Labels[labelStep], CreatedAt: time.Unix(item.Created, 0)}
		if len(item.Names) > 0 {
			h.Name = strings.TrimPrefix(item.Names[0], "/")
		}
		helpers = append(helpers, h)
	}
	// A helper before its standby, which otherwise starts it again.
	slices.SortFunc(helpers, func(a, b Helper) int { return strings.Compare(a.Name, b.Name) })
	return helpers, nil
}

// RemoveHelpers ends and removes the helpers of a run, with their standbys. Nothing
// puts the service back any more. It can be repeated.
func (e *Engine) RemoveHelpers(ctx context.Context, runID string) error {
	if runID == "" {
		return errors.New("helpers of no run cannot be removed")
	}
	for { // the helper may be creating its standby
		helpers, err := e.ListHelpers(ctx, runID)
		if err != nil || len(helpers) == 0 {
			return err
		}
		for _, h := range helpers {
			if err := e.removeContainer(ctx, h.ID, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true}); err != nil {
				return err
			}
		}
		if err := pause(ctx, helperInterval); err != nil {
			return err
		}
	}
}
