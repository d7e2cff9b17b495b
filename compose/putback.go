package compose

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// A ServiceState is what is needed to put the containers of a service back
// without compose, which would read the project's files: a run may have changed
// them.
type ServiceState struct {
	Project    string          `json:"project"`
	Service    string          `json:"service"`
	Containers []KeptContainer `json:"containers"`
}

// A KeptContainer is a container as it was.
type KeptContainer struct {
	Inspection Inspection `json:"inspection"`
	Container  Container  `json:"container"`
}

// ran says that the container was running, or about to be restarted.
func (k KeptContainer) ran() bool { return isUp(k.Container) }

func isUp(c Container) bool { return c.State == "running" || c.State == "restarting" }

// ServiceState records the containers of a service, running or not.
func (e *Engine) ServiceState(ctx context.Context, project, service string) (ServiceState, error) {
	found, err := e.Containers(ctx, project, service)
	if err != nil {
		return ServiceState{}, err
	}
	state := ServiceState{Project: project, Service: service}
	for _, c := range found {
		inspection, now, err := e.InspectContainer(ctx, c.ID)
		if isNotFound(err) {
			continue
		}
		if err != nil {
			return ServiceState{}, err
		}
		state.Containers = append(state.Containers, KeptContainer{inspection, now})
	}
	return state, nil
}

// PutBack makes the containers of a service what they were: same image, same
// configuration, same names, and running if they were. It needs no network, no
// build and no file of the project. It can be repeated after an interruption at
// any point. It tells say what it does.
//
// A container that is as before is only started. Otherwise a new one is created
// first: an image or a configuration that cannot be had is noticed while the
// present container still runs.
func (e *Engine) PutBack(ctx context.Context, state ServiceState, say func(string)) error {
	if err := e.tagImages(ctx, state, say); err != nil {
		return err
	}
	now, err := e.Containers(ctx, state.Project, state.Service)
	if err != nil {
		return err
	}
	var kept []string
	for _, old := range state.Containers {
		i := slices.IndexFunc(now, func(c Container) bool { return !slices.Contains(kept, c.ID) && isAsBefore(c, old.Container) })
		if i >= 0 {
			kept = append(kept, now[i].ID)
			continue
		}
		say("creating container " + old.Container.Name + " as it was")
		name := temporaryName(old.Container)
		id, err := e.CreateContainer(ctx, name, old.Inspection)
		if isNameTaken(err) { // by a container that is not as before
			if err = e.RemoveContainer(ctx, name); err == nil {
				id, err = e.CreateContainer(ctx, name, old.Inspection)
			}
		}
		if err != nil {
			return err
		}
		kept = append(kept, id)
	}
	for _, c := range now {
		if slices.Contains(kept, c.ID) {
			continue
		}
		say("removing container " + c.Name)
		if isUp(c) {
			if err := e.StopContainer(ctx, c.ID); err != nil && !isNotFound(err) {
				return err
			}
		}
		if err := e.RemoveContainer(ctx, c.ID); err != nil {
			return err
		}
	}
	for i, old := range state.Containers {
		if err := e.settle(ctx, kept[i], old, say); err != nil {
			return err
		}
	}
	return nil
}

// isAsBefore says that a container has the image and the configuration of the one
// before.
func isAsBefore(now, before Container) bool {
	return now.ID == before.ID || now.ImageID == before.ImageID && now.ConfigHash == before.ConfigHash && now.Number == before.Number
}

// tagImages gives the images of before the names by which compose finds them.
func (e *Engine) tagImages(ctx context.Context, state ServiceState, say func(string)) error {
	for _, old := range state.Containers {
		name, id := old.Container.Image, old.Container.ImageID
		if name == "" || strings.Contains(name, "@") || strings.HasPrefix(name, "sha256:") {
			continue // it has no name, or one that always means the same image
		}
		image, err := e.InspectImage(ctx, name)
		switch {
		case err == nil && image.ID == id:
			continue
		case err != nil && !isNotFound(err):
			return err
		}
		say("naming image " + id + " " + name)
		if err := e.TagImage(ctx, id, name); err != nil {
			return err
		}
	}
	return nil
}

// settle gives a container its name and starts it.
func (e *Engine) settle(ctx context.Context, id string, before KeptContainer, say func(string)) error {
	_, now, err := e.InspectContainer(ctx, id)
	if err != nil {
		return err
	}
	if name := before.Container.Name; now.Name != name {
		if err := e.RenameContainer(ctx, id, name); err != nil {
			return err
		}
	}
	if isUp(now) || !before.ran() {
		return nil
	}
	say("starting container " + before.Container.Name)
	return e.StartContainer(ctx, id)
}

// temporaryName is the name that compose gives to a container until the one that it
// replaces is removed.
func temporaryName(replaced Container) string { return shortID(replaced.ID) + "_" + replaced.Name }

var replacement = regexp.MustCompile(`^([0-9a-f]{12})_(.+)$`)

// mendInterrupted brings the containers of a service into a state from which
// compose can replace them, after a compose that was killed while it did. Compose
// creates the new container under a temporary name, removes the old one and then
// renames the new one; it does not continue after that.
func (e *Engine) mendInterrupted(ctx context.Context, state ServiceState) error {
	now, err := e.Containers(ctx, state.Project, state.Service)
	if err != nil {
		return err
	}
	for _, c := range now {
		parts := replacement.FindStringSubmatch(c.Name)
		if parts == nil {
			continue
		}
		old, name := parts[1], parts[2]
		switch {
		case slices.ContainsFunc(now, func(other Container) bool { return strings.HasPrefix(other.ID, old) }):
			err = e.RemoveContainer(ctx, c.ID) // it was never started
		case !slices.ContainsFunc(now, func(other Container) bool { return other.Name == name }):
			err = e.RenameContainer(ctx, c.ID, name)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// startAny starts the containers of a service that do not run.
func (e *Engine) startAny(ctx context.Context, project, service string) error {
	now, err := e.Containers(ctx, project, service)
	if err != nil {
		return err
	}
	var failures []error
	for _, c := range now {
		if !isUp(c) {
			failures = append(failures, e.StartContainer(ctx, c.ID))
		}
	}
	return errors.Join(failures...)
}

// String names the service.
func (s ServiceState) String() string {
	return fmt.Sprintf("service %s of project %s", s.Service, s.Project)
}
