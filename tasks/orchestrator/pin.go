package orchestrator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/excerpt"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

const (
	// queryLimit bounds the output of a compose command that only reads, in bytes.
	queryLimit = 16 << 20
	// queryTimeout bounds such a command.
	queryTimeout = 20 * time.Second
	// engineWait is how long a step waits for an engine that has answered in this
	// run before and does not now.
	engineWait = 2 * time.Minute
	// enginePause is the pause between two attempts to reach it.
	enginePause = 500 * time.Millisecond
	// sameEngineWait is how long compose or such an engine may fail to show the project.
	sameEngineWait = 10 * time.Second
)

// A deployment is how a plan deploys the service: its compose commands for build
// and restart.
type deployment struct {
	// target is that of the restart, otherwise of the build. Services has the
	// services of both, nil for the whole project.
	compose.Target
	workspace string
	// dependencies says that one of them also acts on the services that those depend on.
	dependencies bool
}

// deployment reads the plan's build and restart. It returns false if neither of
// them is a compose command.
func (s *stepRun) deployment() (deployment, bool) {
	var all []deployment
	for step, missing := range map[store.Step][]string{
		store.StepRestart: compose.UpCommand(s.profile.ComposeProject, s.profile.ComposeService),
		store.StepBuild:   compose.BuildCommand(s.profile.ComposeProject, s.profile.ComposeService),
	} {
		params, failure := s.plan.find(step)
		if failure != nil {
			continue
		}
		command := missing
		if value := params["command"]; !falsy(value) {
			if command, failure = parseCommand(value); failure != nil {
				continue
			}
		}
		line, isCompose := compose.ParseTarget(command)
		if !isCompose {
			continue
		}
		text, failure := params.text("workspace", ".")
		if failure != nil {
			continue
		}
		all = append(all, deployment{line, resolveIn(artifacts.Resolve(s.config.Workspace), text), compose.ActsOnDependencies(command)})
		if step == store.StepRestart { // it comes first, whatever the order of the map
			all[0], all[len(all)-1] = all[len(all)-1], all[0]
		}
	}
	if len(all) == 0 {
		return deployment{}, false
	}
	d := all[0]
	for _, other := range all[1:] {
		d.dependencies = d.dependencies || other.dependencies
		if len(d.Services) == 0 || len(other.Services) == 0 {
			d.Services = nil
			continue
		}
		d.Services = slices.Concat(d.Services, other.Services)
	}
	slices.Sort(d.Services)
	d.Services = slices.Compact(d.Services)
	return d, true
}

// query runs a compose command that only reads, and returns what it prints.
func (s *stepRun) query(ctx context.Context, workspace string, command []string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	output, errors := excerpt.Head{Limit: queryLimit}, excerpt.Head{Limit: queryLimit}
	code, failure := s.runner.forOwn().run(ctx, workspace, command, &output, &errors, nil)
	switch {
	case failure != nil:
		return "", failure
	case code != 0:
		return "", exitFailure(command, code, artifacts.Trim(string(errors.Kept)))
	case output.Full:
		return "", fmt.Errorf("%s prints more than %d bytes", formatCommand(command), queryLimit)
	}
	return string(output.Kept), nil
}

// untilEngineAnswers calls try until the engine answers, at most for engineWait.
func (s *stepRun) untilEngineAnswers(ctx context.Context, try func() error) error {
	limit := s.config.Now().Add(engineWait)
	logged := false
	for {
		err := try()
		if !errors.Is(err, compose.ErrUnreachable) || !s.config.Now().Before(limit) {
			return err
		}
		if !logged {
			s.log.Warn("docker engine does not answer any more, waiting for it", "error", err)
			logged = true
		}
		if !pauseFor(ctx, enginePause) {
			return context.Cause(ctx)
		}
	}
}

// engineHasAnswered says that the worker's engine has answered in this run, or this
// process. Then an engine that does not answer is an outage, and not one that the worker
// cannot reach at all, as with a docker context that only the compose program knows.
func (s *stepRun) engineHasAnswered() bool {
	if image := s.record.Image; image != nil && image.EngineSeen {
		return true
	}
	return s.config.Engine != nil && s.config.Engine.HasAnswered()
}

// untilKnownEngineAnswers is untilEngineAnswers for an engine that has answered before.
// Any other is asked once.
func (s *stepRun) untilKnownEngineAnswers(ctx context.Context, try func() error) error {
	err := try()
	if !errors.Is(err, compose.ErrUnreachable) || !s.engineHasAnswered() {
		return err
	}
	return s.untilEngineAnswers(ctx, try)
}

// pinImage records the project before the run changes it, and pins the images that
// a rollback needs. After it returns without a failure, either the run can be taken
// back, or the record says that the engine was not seen.
//
// It is called before each command that may change an image or a container. A record
// that is complete is kept; its pins are checked and, if somebody has removed one,
// made again.
func (s *stepRun) pinImage(ctx context.Context) *Failure {
	known := s.record.Image
	switch {
	case known == nil && (s.ranElsewhere || s.journal.skipped > 0):
		return nil // what is there now is not what was before the run
	case known == nil || known.Restored:
	case !known.EngineSeen:
		return nil
	case known.Ready:
		return s.makePins(ctx)
	}
	image, failure := s.observeProject(ctx)
	if failure != nil {
		return failure
	}
	if known != nil {
		image.Again, image.Volumes = known.Restored || known.Again, known.Volumes
	}
	if image.EngineSeen {
		image.Answered = s.answered(ctx)
	}
	s.record.Image, s.record.Undone = image, false
	if image.EngineSeen {
		s.audit(audit.Record{Kind: audit.ContainerChanging, Text: "keep " + image.Describe() + " of project " + image.Project + " until the run is over"})
	}
	if failure := s.saveRecord(ctx); failure != nil || !image.EngineSeen {
		return failure
	}
	if failure := s.makePins(ctx); failure != nil {
		return failure
	}
	image.Ready = true
	s.auditPins(image)
	return s.saveRecord(ctx)
}

// observeProject returns the record of the project as it is now.
func (s *stepRun) observeProject(ctx context.Context) (*change.Image, *Failure) {
	image := &change.Image{At: s.config.Now().UTC()}
	plan, isCompose := s.deployment()
	if s.config.Engine == nil || !isCompose {
		return image, nil
	}
	unseen := func(err error) (*change.Image, *Failure) {
		if cause := context.Cause(ctx); cause != nil {
			return nil, commandError("The step was ended before it could pin the image: " + cause.Error())
		}
		s.log.Warn("the containers of the project are not known, so a rollback runs the plan's commands, and verification relies on HTTP alone", "error", err)
		return &change.Image{At: image.At}, nil
	}

	config, err := compose.ReadConfig(plan.Target, func(command []string) (string, error) { return s.query(ctx, plan.workspace, command) })
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	isRead := err == nil
	if errors.Is(err, compose.ErrUnreadable) && plan.Project != "" {
		config, err = compose.Config{Name: plan.Project}, nil
	}
	if err != nil {
		return unseen(err)
	}
	project, err := s.seeProject(ctx, plan, config.Name, isRead)
	switch {
	case err == nil:
	case errors.As(err, new(otherEngineError)), compose.IsForbidden(err), !isRead, !s.engineHasAnswered() && !errors.Is(err, compose.ErrUnreachable), context.Cause(ctx) != nil:
		return unseen(err)
	default:
		return nil, commandError("The containers of project " + config.Name + " cannot be seen, so the run could not be taken back. This step has changed nothing yet. Retry the run when docker answers: " + err.Error())
	}
	image.EngineSeen, image.Project, image.Services = true, config.Name, plan.Services
	image.Compose, image.Workspace = plan.Prefix, plan.workspace
	image.Before = change.ProjectOf(project).Mended(image.IsTarget)
	err = s.untilKnownEngineAnswers(ctx, func() error {
		image.Names, image.Pins = nil, nil
		return s.planPins(ctx, image, config, plan.dependencies)
	})
	if err != nil {
		return nil, commandError("The image of before cannot be pinned, so the run could not be taken back: " + err.Error())
	}
	return image, nil
}

// seeProject returns the project as the engine has it, if compose uses that engine. An
// outage is waited out: a run that began without seeing its containers could not bring
// them back. It is one if the engine has answered before, or if compose cannot reach its
// engine either. isRead says that compose can read the project's files; otherwise it
// fails for that, and nothing is repeated.
func (s *stepRun) seeProject(ctx context.Context, plan deployment, name string, isRead bool) (compose.Project, error) {
	var project compose.Project
	look := func() (err error) {
		if project, err = s.config.Engine.Project(ctx, name); err == nil {
			err = s.isSameEngine(ctx, plan, project)
		}
		return err
	}
	wait := s.untilKnownEngineAnswers
	if isRead {
		wait = func(ctx context.Context, look func() error) error {
			return s.untilEngineAnswers(ctx, func() error { return s.unlessComposeIsAnswered(ctx, plan, look) })
		}
	}
	limit := s.config.Now().Add(sameEngineWait)
	for {
		err := wait(ctx, look)
		switch {
		case err == nil, errors.Is(err, compose.ErrUnreachable), errors.As(err, new(otherEngineError)), compose.IsForbidden(err):
			return project, err
		case !isRead, !s.engineHasAnswered(), !s.config.Now().Before(limit), !pauseFor(ctx, enginePause):
			return project, err
		}
		s.log.Warn("the project cannot be seen, trying again", "error", err)
	}
}

// unlessComposeIsAnswered calls look. If an engine that has never answered this worker is
// unreachable, it finds out whether compose is answered: then that is another engine.
func (s *stepRun) unlessComposeIsAnswered(ctx context.Context, plan deployment, look func() error) error {
	err := look()
	if !errors.Is(err, compose.ErrUnreachable) || s.engineHasAnswered() {
		return err
	}
	if _, failure := s.query(ctx, plan.workspace, plan.ContainersCommand()); failure != nil {
		return err
	}
	if err = look(); errors.Is(err, compose.ErrUnreachable) { // an outage may just have ended
		return otherEngineError("compose uses a docker engine that answers, and this worker's does not: " + err.Error())
	}
	return err
}

// An otherEngineError says why the engine that this worker reads is not the one that
// compose uses, or cannot be compared with it.
type otherEngineError string

func (e otherEngineError) Error() string { return string(e) }

// isSameEngine checks that compose uses the engine that this worker reads. A docker
// context, or options of the plan's command, may lead compose to another one.
func (s *stepRun) isSameEngine(ctx context.Context, plan deployment, project compose.Project) error {
	text, err := s.query(ctx, plan.workspace, plan.ContainersCommand())
	if err != nil {
		return err
	}
	ids, isList := compose.ParseIDs(text)
	if !isList {
		return otherEngineError(formatCommand(plan.ContainersCommand()) + " prints no list of containers")
	}
	const cure = "Set %s to the engine of the plan's docker context"
	ours := map[string]bool{}
	for _, container := range project.Containers {
		ours[container.ID] = true
	}
	for _, id := range ids {
		if ours[id] {
			continue
		}
		switch _, _, err := s.config.Engine.InspectContainer(ctx, id); {
		case errors.Is(err, compose.ErrNotFound):
			return otherEngineError(fmt.Sprintf("compose uses another docker engine than this worker: it has container %.12s, which the worker's engine does not know. "+cure,
				id, s.config.SettingName("DOCKER_HOST")))
		case err != nil:
			return err
		}
	}
	if len(ids) == 0 && len(project.Containers) > 0 {
		return otherEngineError(fmt.Sprintf("compose uses another docker engine than this worker: it has no container of project %s, the worker's engine has %d. "+cure,
			project.Name, len(project.Containers), s.config.SettingName("DOCKER_HOST")))
	}
	return nil
}

// planPins adds the image names and the pins to a record. dependencies says that the
// plan's commands may replace the services, too, on which the target depends.
func (s *stepRun) planPins(ctx context.Context, image *change.Image, config compose.Config, dependencies bool) error {
	names := config.Built(image.IsTarget)
	for _, container := range image.Before.Containers {
		if !image.IsTarget(container.Service) {
			continue
		}
		names = append(names, container.Image)
		if err := s.addPin(ctx, image, config, container.ImageID, container.Service, container.ID); err != nil {
			return err
		}
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		if !change.CanBeNamed(name) {
			continue
		}
		found, err := s.config.Engine.InspectImage(ctx, name)
		if err != nil && !errors.Is(err, compose.ErrNotFound) {
			return err
		}
		image.Names = append(image.Names, change.ImageName{Name: name, ID: found.ID})
		if found.ID == "" || slices.ContainsFunc(image.Pins, func(pin change.Pin) bool { return pin.ImageID == found.ID }) {
			continue
		}
		if err := s.addPin(ctx, image, config, found.ID, "", ""); err != nil {
			return err
		}
	}
	isOrphan := s.findOrphans(ctx, image, config)
	for _, container := range image.Before.Containers {
		isDependency := dependencies && config.Images[container.Service] != nil
		if image.IsTarget(container.Service) || !isDependency && !isOrphan(container.Service) {
			continue
		}
		found, err := s.config.Engine.InspectImage(ctx, container.ImageID)
		if errors.Is(err, compose.ErrNotFound) {
			continue // no run may fail for what it must not replace
		}
		if err != nil {
			return err
		}
		// Without an archive: its image is not the run's to save.
		image.Pins = append(image.Pins, s.newPin(image, config, container.ImageID, found, container.Service, container.ID))
	}
	return nil
}

// findOrphans returns which services have containers and are not in the compose file:
// compose removes these with COMPOSE_REMOVE_ORPHANS, which the environment or .env may
// set. If compose cannot list its services, none are known.
func (s *stepRun) findOrphans(ctx context.Context, image *change.Image, config compose.Config) func(service string) bool {
	var services []string
	isOrphan := func(service string) bool { return config.Images[service] == nil && !slices.Contains(services, service) }
	if !slices.ContainsFunc(image.Before.Services(), isOrphan) {
		return isOrphan
	}
	text, err := s.query(ctx, image.Workspace, compose.Target{Prefix: image.Compose}.AllServicesCommand())
	if err != nil {
		s.log.Warn("compose does not list its services: a container of a service that it does not know any more cannot be brought back if the run removes it", "error", err)
		return func(string) bool { return false }
	}
	services = compose.ParseServices(text)
	return isOrphan
}

// addPin adds one pin to a record.
func (s *stepRun) addPin(ctx context.Context, image *change.Image, config compose.Config, id, service, container string) error {
	found, err := s.config.Engine.InspectImage(ctx, id)
	if errors.Is(err, compose.ErrNotFound) {
		return fmt.Errorf("the engine has no image %s any more, from which container %.12s of service %s was created. Give it an image again with `docker commit`, or replace the container by hand", id, container, service)
	}
	if err != nil {
		return err
	}
	pin := s.newPin(image, config, id, found, service, container)
	if s.config.PinDirectory != "" {
		pin.Archive = filepath.Join(s.config.PinDirectory, s.runID, strings.TrimPrefix(id, "sha256:")+".tar")
	}
	image.Pins = append(image.Pins, pin)
	return nil
}

// newPin returns the pin of an image that comes next in a record.
func (s *stepRun) newPin(image *change.Image, config compose.Config, id string, found compose.Image, service, container string) change.Pin {
	pin := change.Pin{Name: "mm-orchestrator-pin-" + s.runID, ImageID: id, RepoDigests: found.RepoDigests, Service: service, Container: container, Files: config.Copied[service]}
	if n := len(image.Pins); n > 0 {
		pin.Name += fmt.Sprintf("-%d", n+1)
	}
	return pin
}

// makePins makes the pins of the record that are missing, and checks that each is
// usable.
func (s *stepRun) makePins(ctx context.Context) *Failure {
	for _, pin := range s.record.Image.Pins {
		err := s.untilEngineAnswers(ctx, func() error { return s.makePin(ctx, pin) })
		if err != nil {
			return commandError("The image of before cannot be pinned, so the run could not be taken back: " + err.Error())
		}
	}
	return nil
}

func (s *stepRun) makePin(ctx context.Context, pin change.Pin) error {
	engine := s.config.Engine
	if _, err := engine.InspectImage(ctx, pin.ImageID); errors.Is(err, compose.ErrNotFound) {
		if err := s.loadArchive(ctx, pin); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	found, err := engine.FindPin(ctx, pin.Name)
	switch {
	case err != nil && !errors.Is(err, compose.ErrNotFound):
		return err
	case err == nil && found.ImageID == pin.ImageID && (pin.Container == "" || found.Inspection != nil && found.Inspection.ID() == pin.Container):
	default:
		made := compose.Pin{Name: pin.Name, Owner: s.runID, ImageID: pin.ImageID, Project: s.record.Image.Project, Service: pin.Service}
		if pin.Container != "" {
			inspection, err := s.recordedContainer(ctx, pin)
			if err != nil {
				return err
			}
			made.Inspection = inspection
		}
		if err := engine.CreatePin(ctx, made); err != nil {
			return err
		}
		if found, err = engine.FindPin(ctx, pin.Name); err != nil {
			return err
		}
	}
	if pin.Archive == "" {
		return nil
	}
	if found.Inspection != nil {
		if err := writeContainer(containerFile(pin), *found.Inspection); err != nil {
			return err
		}
	}
	return s.saveArchive(ctx, pin)
}

// recordedContainer returns the configuration of a container of before: from its
// pin, from the file beside the archive, or from the container itself. It returns
// nil if none of them is left.
func (s *stepRun) recordedContainer(ctx context.Context, pin change.Pin) (*compose.Inspection, error) {
	found, err := compose.Pin{}, compose.ErrNotFound
	if pin.Name != "" {
		found, err = s.config.Engine.FindPin(ctx, pin.Name)
	}
	if err == nil && found.Inspection != nil && found.Inspection.ID() == pin.Container {
		return found.Inspection, nil
	}
	if err != nil && !errors.Is(err, compose.ErrNotFound) {
		return nil, err
	}
	if pin.Archive != "" {
		if text, err := os.ReadFile(containerFile(pin)); err == nil {
			inspection := new(compose.Inspection)
			if err := json.Unmarshal(text, inspection); err != nil {
				return nil, fmt.Errorf("file %s cannot be read: %w", containerFile(pin), err)
			}
			return inspection, nil
		}
	}
	inspection, _, err := s.config.Engine.InspectContainer(ctx, pin.Container)
	if errors.Is(err, compose.ErrNotFound) {
		return nil, nil
	}
	if err == nil && len(pin.Files) > 0 {
		inspection, err = s.config.Engine.ReadFiles(ctx, inspection, pin.Files)
	}
	return &inspection, err
}
