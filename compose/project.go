package compose

import (
	"cmp"
	"context"
	"slices"
	"strings"

	"github.com/moby/moby/client"
)

// A Project is what the engine has of a compose project at one moment.
type Project struct {
	Name string
	// Containers are those of its services, see [Engine.Containers], sorted by name.
	Containers []Container
	// Hooks are containers that compose has created for pre_start hooks, sorted by name.
	Hooks []Container
	// Networks and Volumes are those that compose has created for it, sorted by name.
	Networks []ProjectNetwork
	Volumes  []ProjectVolume
}

// A ProjectNetwork is a network of a project.
type ProjectNetwork struct {
	Name     string
	ID       string
	Settings NetworkSettings
}

// A ProjectVolume is a named volume of a project. The engine's time of creation is
// left out: older engines tell the time of the last change in it.
type ProjectVolume struct{ Name string }

// Of returns the containers of a service.
func (p Project) Of(service string) []Container {
	var found []Container
	for _, container := range p.Containers {
		if container.Service == service {
			found = append(found, container)
		}
	}
	return found
}

// Services lists the services that have a container, sorted.
func (p Project) Services() []string {
	var services []string
	for _, container := range p.Containers {
		services = append(services, container.Service)
	}
	slices.Sort(services)
	return slices.Compact(services)
}

// Project returns what the engine has of a project.
func (e *Engine) Project(ctx context.Context, name string) (Project, error) {
	containers, hooks, err := e.listContainers(ctx, name, "")
	if err != nil {
		return Project{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	project := Project{Name: name, Containers: containers, Hooks: hooks}
	filters := client.Filters{}.Add("label", labelProject+"="+name)
	networks, err := e.client.NetworkList(ctx, client.NetworkListOptions{Filters: filters})
	if err != nil {
		return Project{}, e.failed("list networks of project "+name, err)
	}
	for _, network := range networks.Items {
		project.Networks = append(project.Networks, ProjectNetwork{Name: network.Name, ID: network.ID, Settings: settingsOf(network.Network)})
	}
	volumes, err := e.client.VolumeList(ctx, client.VolumeListOptions{Filters: filters})
	if err != nil {
		return Project{}, e.failed("list volumes of project "+name, err)
	}
	for _, volume := range volumes.Items {
		project.Volumes = append(project.Volumes, ProjectVolume{Name: volume.Name})
	}
	slices.SortFunc(project.Networks, func(a, b ProjectNetwork) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.ID, b.ID))
	})
	slices.SortFunc(project.Volumes, func(a, b ProjectVolume) int { return strings.Compare(a.Name, b.Name) })
	return project, nil
}

// RemoveVolume removes a volume that no container uses, with its data. It is no error
// if there is none.
func (e *Engine) RemoveVolume(ctx context.Context, name string) error {
	_, err := e.client.VolumeRemove(ctx, name, client.VolumeRemoveOptions{})
	if err = e.failed("remove volume "+name, err); isNotFound(err) {
		return nil
	}
	return err
}

// RemoveNetwork removes a network that no container uses. It is no error if there
// is none.
func (e *Engine) RemoveNetwork(ctx context.Context, id string) error {
	_, err := e.client.NetworkRemove(ctx, id, client.NetworkRemoveOptions{})
	if err = e.failed("remove network "+id, err); isNotFound(err) {
		return nil
	}
	return err
}
