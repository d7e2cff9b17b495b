package compose

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
)

// Labels of a pin. None of compose's own is set: compose would take the pin for a
// container of the service.
const (
	// LabelPin has the owner of the pin, the id of a run.
	LabelPin        = "mm-orchestrator.pin"
	labelPinProject = "mm-orchestrator.project"
	labelPinService = "mm-orchestrator.service"
	labelPinImage   = "mm-orchestrator.image"
	labelPinConfig  = "mm-orchestrator.container"
)

// A Pin is a container that is created and never started. It protects an image
// from `docker image prune --all`, which a tag does not.
type Pin struct {
	// Name is the container's name.
	Name string
	// Owner is the id of the run that needs the image.
	Owner string
	// ImageID is the pinned image.
	ImageID string
	// Project and Service say whose image it is.
	Project, Service string
	// Inspection is the container that ran the image, nil if none did.
	Inspection *Inspection
	// Created is set by the engine.
	Created time.Time
}

// CreatePin creates a pin. If there is one of this name for the same image and the
// same owner, that one is enough.
func (e *Engine) CreatePin(ctx context.Context, pin Pin) error {
	image, err := e.InspectImage(ctx, pin.ImageID)
	if err != nil {
		return err
	}
	config := &container.Config{
		Image: pin.ImageID,
		Labels: map[string]string{
			LabelPin: pin.Owner, labelPinProject: pin.Project, labelPinService: pin.Service, labelPinImage: pin.ImageID,
			// A container has the labels of its image, and older composes label images.
			labelProject: "", labelService: "",
		},
		Healthcheck: &container.HealthConfig{Test: []string{"NONE"}},
	}
	if !image.runnable {
		config.Cmd = []string{"pin"} // the engine refuses a container without any command
	}
	if pin.Inspection != nil {
		text, err := pin.Inspection.MarshalJSON()
		if err != nil {
			return fmt.Errorf("cannot record container %s in pin %s: %w", shortID(pin.Inspection.id), pin.Name, err)
		}
		config.Labels[labelPinConfig] = string(text)
	}
	hostConfig := &container.HostConfig{NetworkMode: "none", Tmpfs: map[string]string{}}
	for _, path := range image.volumes {
		hostConfig.Tmpfs[path] = "" // otherwise the engine creates a volume for each
	}
	for {
		_, err := e.client.ContainerCreate(ctx, client.ContainerCreateOptions{Name: pin.Name, Config: config, HostConfig: hostConfig})
		err = e.failed("create the pin "+pin.Name, err)
		if !isNameTaken(err) {
			return err
		}
		found, missing := e.client.ContainerInspect(ctx, pin.Name, client.ContainerInspectOptions{})
		if missing = e.failed("inspect the pin "+pin.Name, missing); isNotFound(missing) {
			continue
		}
		if missing != nil {
			return missing
		}
		if found.Container.Config == nil || found.Container.Config.Labels[LabelPin] != pin.Owner {
			return err
		}
		if found.Container.Image == pin.ImageID && found.Container.Config.Labels[labelPinConfig] == config.Labels[labelPinConfig] {
			return nil
		}
		if err := e.RemovePin(ctx, found.Container.ID); err != nil {
			return err
		}
	}
}

// FindPin finds a pin by its name. It returns [ErrNotFound] if there is none.
func (e *Engine) FindPin(ctx context.Context, name string) (Pin, error) {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	found, err := e.client.ContainerInspect(ctx, name, client.ContainerInspectOptions{})
	if err != nil {
		return Pin{}, e.failed("inspect the pin "+name, err)
	}
	if found.Container.Config == nil || found.Container.Config.Labels[LabelPin] == "" {
		return Pin{}, fmt.Errorf("container %s is no pin: %w", name, ErrNotFound)
	}
	pin := pinOf(name, found.Container.Config.Labels, parseTime(found.Container.Created))
	pin.ImageID = cmp.Or(found.Container.Image, pin.ImageID)
	if text := found.Container.Config.Labels[labelPinConfig]; text != "" {
		pin.Inspection = new(Inspection)
		if err := pin.Inspection.UnmarshalJSON([]byte(text)); err != nil {
			return Pin{}, fmt.Errorf("label %s of pin %s cannot be read: %w", labelPinConfig, name, err)
		}
	}
	return pin, nil
}

// ListPins lists the pins of an owner, or of all owners for "", without their
// Inspection, oldest first.
func (e *Engine) ListPins(ctx context.Context, owner string) ([]Pin, error) {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	label := LabelPin
	if owner != "" {
		label += "=" + owner
	}
	list, err := e.client.ContainerList(ctx, client.ContainerListOptions{All: true, Filters: client.Filters{}.Add("label", label)})
	if err != nil {
		return nil, e.failed("list pins", err)
	}
	pins := make([]Pin, 0, len(list.Items))
	for _, item := range list.Items {
		name := item.ID
		if len(item.Names) > 0 {
			name = strings.TrimPrefix(item.Names[0], "/")
		}
		pins = append(pins, pinOf(name, item.Labels, time.Unix(item.Created, 0).UTC()))
	}
	slices.SortFunc(pins, func(a, b Pin) int { return cmp.Or(a.Created.Compare(b.Created), strings.Compare(a.Name, b.Name)) })
	return pins, nil
}

func pinOf(name string, labels map[string]string, created time.Time) Pin {
	return Pin{
		Name: name, Owner: labels[LabelPin], ImageID: labels[labelPinImage], Project: labels[labelPinProject], Service: labels[labelPinService],
		Created: created,
	}
}

// RemovePin removes a pin by its name. It is no error if there is none.
func (e *Engine) RemovePin(ctx context.Context, name string) error {
	return e.removeContainer(ctx, name, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
}
