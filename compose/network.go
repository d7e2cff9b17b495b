package compose

import (
	"context"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
)

// A Network says at which addresses a container can be reached.
type Network struct {
	// Host says that the container shares the network of the engine's machine.
	Host bool
	// Addresses are those in the engine's networks. Every port at them leads to
	// the container.
	Addresses []netip.Addr
	// Published are the ports of the engine's machine that lead to the container.
	Published []netip.AddrPort
}

// Has says that every port at the address leads to the container.
func (n Network) Has(address netip.Addr) bool { return slices.Contains(n.Addresses, address) }

// Publishes says that this port of the engine's machine leads to the container.
// address is the one that was connected to.
func (n Network) Publishes(address netip.Addr, port uint16) bool {
	return slices.ContainsFunc(n.Published, func(p netip.AddrPort) bool {
		return p.Port() == port && (!p.Addr().IsValid() || p.Addr().IsUnspecified() || p.Addr() == address || p.Addr().IsLoopback() && address.IsLoopback())
	})
}

// networkOf returns where an inspected container can be reached. A container may
// share the network of another one; then it is that container's.
func (e *Engine) networkOf(ctx context.Context, inspected container.InspectResponse) (Network, error) {
	for range 4 { // a chain of containers is rare, a cycle impossible
		if inspected.HostConfig == nil || !inspected.HostConfig.NetworkMode.IsContainer() {
			break
		}
		owner, err := e.client.ContainerInspect(ctx, inspected.HostConfig.NetworkMode.ConnectedContainer(), client.ContainerInspectOptions{})
		if errdefs.IsNotFound(err) {
			return Network{}, nil
		}
		if err != nil {
			return Network{}, err
		}
		inspected = owner.Container
	}
	n := Network{Host: inspected.HostConfig != nil && inspected.HostConfig.NetworkMode.IsHost()}
	settings := inspected.NetworkSettings
	if settings == nil {
		return n, nil
	}
	n.Addresses = addressesOf(settings.Networks)
	for port, bindings := range settings.Ports {
		if port.Proto() != network.TCP {
			continue
		}
		for _, binding := range bindings {
			if number, err := strconv.ParseUint(binding.HostPort, 10, 16); err == nil {
				n.Published = append(n.Published, netip.AddrPortFrom(binding.HostIP.Unmap(), uint16(number)))
			}
		}
	}
	return n, nil
}

func addressesOf(networks map[string]*network.EndpointSettings) (all []netip.Addr) {
	for _, endpoint := range networks {
		if endpoint == nil {
			continue
		}
		for _, address := range []netip.Addr{endpoint.IPAddress, endpoint.GlobalIPv6Address} {
			if address.IsValid() && !address.IsUnspecified() {
				all = append(all, address.Unmap())
			}
		}
	}
	return all
}

// A Neighbour is a running container of the engine, of any project or none.
type Neighbour struct {
	ID, Name string
	Network  Network
}

// A Neighbourhood is what can be reached through an engine.
type Neighbourhood struct {
	Containers []Neighbour
	// Gateways are the addresses at which containers reach the engine's machine.
	Gateways []netip.Addr
	// Local says that the engine is asked through a socket of this machine, and not
	// through a network.
	Local bool
}

// Neighbourhood implements [State].
func (e *Engine) Neighbourhood(ctx context.Context) (Neighbourhood, error) {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	n := Neighbourhood{Local: !strings.HasPrefix(e.host, "tcp:") && !strings.HasPrefix(e.host, "http")}
	list, err := e.client.ContainerList(ctx, client.ContainerListOptions{})
	if err != nil {
		return n, e.failed("list containers", err)
	}
	for _, item := range list.Items {
		c := Neighbour{ID: item.ID, Network: Network{Host: item.HostConfig.NetworkMode == "host"}}
		if len(item.Names) > 0 {
			c.Name = strings.TrimPrefix(item.Names[0], "/")
		}
		if item.NetworkSettings != nil {
			c.Network.Addresses = addressesOf(item.NetworkSettings.Networks)
		}
		for _, port := range item.Ports {
			if port.PublicPort != 0 && port.Type == "tcp" {
				c.Network.Published = append(c.Network.Published, netip.AddrPortFrom(port.IP.Unmap(), port.PublicPort))
			}
		}
		n.Containers = append(n.Containers, c)
	}
	networks, err := e.client.NetworkList(ctx, client.NetworkListOptions{})
	if err != nil {
		return n, e.failed("list networks", err)
	}
	for _, item := range networks.Items {
		for _, config := range item.IPAM.Config {
			if config.Gateway.IsValid() {
				n.Gateways = append(n.Gateways, config.Gateway.Unmap())
			}
		}
	}
	return n, nil
}
