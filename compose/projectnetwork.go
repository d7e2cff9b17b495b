package compose

import (
	"context"
	"maps"
	"slices"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
)

const labelVersion = "com.docker.compose.version"

// NetworkSettings are all that is needed to create a network again.
type NetworkSettings struct {
	Driver     string            `json:"driver"`
	Options    map[string]string `json:"options,omitempty"`
	Internal   bool              `json:"internal,omitempty"`
	Attachable bool              `json:"attachable,omitempty"`
	IPv6       bool              `json:"ipv6,omitempty"`
	// IPAM has also the addresses that the engine has chosen itself.
	IPAM   network.IPAM      `json:"ipam"`
	Labels map[string]string `json:"labels,omitempty"`
}

func settingsOf(n network.Network) NetworkSettings {
	return NetworkSettings{
		Driver: n.Driver, Options: n.Options, Internal: n.Internal, Attachable: n.Attachable, IPv6: n.EnableIPv6, IPAM: n.IPAM, Labels: n.Labels,
	}
}

// Differences lists what differs between the settings of two networks. Addresses
// count only if compose was told them: the engine chooses others for each network.
func (s NetworkSettings) Differences(other NetworkSettings) []string {
	a, b := s.comparable(), other.comparable()
	if hash := s.Labels[labelHash]; hash != "" && hash == other.Labels[labelHash] {
		// compose has made both from the same lines of its files.
		delete(a, "IPAM.Config")
		delete(b, "IPAM.Config")
	}
	names := slices.Collect(maps.Keys(a))
	names = slices.Compact(slices.Sorted(slices.Values(slices.AppendSeq(names, maps.Keys(b)))))
	return slices.DeleteFunc(names, func(name string) bool { return a[name] == b[name] })
}

func (s NetworkSettings) comparable() map[string]string {
	labels := maps.Clone(s.Labels)
	delete(labels, labelVersion)
	parts := map[string]string{}
	flatten(parts, "Network", struct {
		Driver                     string
		Options                    map[string]string
		Internal, Attachable, IPv6 bool
		Labels                     map[string]string
	}{s.Driver, s.Options, s.Internal, s.Attachable, s.IPv6, labels})
	flatten(parts, "IPAM", s.IPAM)
	return parts
}

// CreateNetwork creates a network with these settings.
func (e *Engine) CreateNetwork(ctx context.Context, name string, settings NetworkSettings) error {
	options := client.NetworkCreateOptions{
		Driver: settings.Driver, Options: settings.Options, Internal: settings.Internal, Attachable: settings.Attachable, IPAM: &settings.IPAM, Labels: settings.Labels,
	}
	if settings.IPv6 {
		options.EnableIPv6 = &settings.IPv6
	}
	_, err := e.client.NetworkCreate(ctx, name, options)
	return e.failed("create network "+name, err)
}

// DisconnectNetwork takes a container, running or not, out of a network. It is no
// error if it is not in it.
func (e *Engine) DisconnectNetwork(ctx context.Context, id, container string) error {
	_, err := e.client.NetworkDisconnect(ctx, id, client.NetworkDisconnectOptions{Container: container, Force: true})
	if err = e.failed("disconnect container "+container+" from network "+id, err); isNotFound(err) {
		return nil
	}
	return err
}

// NetworkUsers returns the containers of a network, running or not, of any project.
// Those that compose has not created for a service of the project have no Service.
func (e *Engine) NetworkUsers(ctx context.Context, id, project string) ([]Container, error) {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	list, err := e.client.ContainerList(ctx, client.ContainerListOptions{All: true, Filters: client.Filters{}.Add("network", id)})
	if err != nil {
		return nil, e.failed("list containers of network "+id, err)
	}
	var users []Container
	for _, item := range list.Items {
		inspected, err := e.client.ContainerInspect(ctx, item.ID, client.ContainerInspectOptions{})
		if err != nil {
			if err = e.failed("inspect container "+item.ID, err); isNotFound(err) {
				continue
			}
			return nil, err
		}
		user := containerOf(inspected.Container, item.Labels)
		if item.Labels[labelProject] != project || !isOfService(item.Labels) {
			user.Service = ""
		}
		users = append(users, user)
	}
	return users, nil
}
