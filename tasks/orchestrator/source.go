package orchestrator

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/compose"
)

// A source says who has answered a request.
type source struct {
	// text describes it for the log, "" for nothing worth a line.
	text string
	// elsewhere says that it is certainly not the target.
	elsewhere bool
}

// A sourceFinder finds out who has answered a request, by the address that the
// connection leads to.
type sourceFinder struct {
	engine compose.State
	// own are the addresses of this process's network, loopback aside.
	own func() []netip.Addr
	// candidates are Config.OwnContainers.
	candidates []string
}

func newSourceFinder(config Config) sourceFinder {
	return sourceFinder{engine: config.Engine, own: interfaceAddresses, candidates: config.OwnContainers}
}

// interfaceAddresses returns the addresses of this machine's, or container's,
// network.
func interfaceAddresses() (all []netip.Addr) {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	for _, item := range list {
		if prefix, err := netip.ParsePrefix(item.String()); err == nil {
			all = append(all, prefix.Addr().Unmap())
		}
	}
	return all
}

// find says who is behind an address, which is the one that a connection was made
// to. It says elsewhere only if it knows; a load balancer on another machine, or
// an address that the engine does not know, may well lead to the target.
func (f sourceFinder) find(ctx context.Context, target []compose.Container, at netip.AddrPort) source {
	address := at.Addr().Unmap().WithZone("")
	for _, c := range target {
		if c.Network.Has(address) {
			return source{text: "answered by container " + c.Name + " at " + at.String()}
		}
	}
	around, err := f.engine.Neighbourhood(ctx)
	if err != nil {
		return source{text: "the worker cannot tell who answered at " + at.String() + ": " + err.Error()}
	}
	for _, c := range around.Containers {
		if c.Network.Has(address) && !isOneOf(target, c.ID) {
			return source{elsewhere: true, text: fmt.Sprintf("container %s, which is not one of the service's, answers at %s", c.Name, at)}
		}
	}
	self := f.self(around)
	if self != nil && !self.Network.Host && address.IsLoopback() {
		if f.sharesNetwork(target, *self) {
			return source{text: "answered at " + at.String() + ", in the network that the service shares with the worker's container"}
		}
		return source{elsewhere: true, text: "the worker's own container answers at " + at.String() + ", since that address never leaves it"}
	}
	if self == nil && !around.Local || !f.isHost(around, self, address) {
		return source{text: "answered at " + at.String() + ", which the docker engine does not know: the worker cannot tell whether service and answer belong together"}
	}
	for _, c := range target {
		if c.Network.Publishes(address, at.Port()) {
			return source{text: fmt.Sprintf("answered by container %s, which publishes %s", c.Name, at)}
		}
	}
	for _, c := range around.Containers {
		if c.Network.Publishes(address, at.Port()) && !isOneOf(target, c.ID) {
			return source{elsewhere: true, text: fmt.Sprintf("container %s, which is not one of the service's, publishes %s", c.Name, at)}
		}
	}
	for _, c := range target {
		if c.Network.Host {
			return source{text: fmt.Sprintf("answered at %s; container %s shares the machine's network, so that the worker cannot tell it from the machine's programs", at, c.Name)}
		}
	}
	for _, c := range around.Containers {
		if c.Network.Host {
			return source{elsewhere: true, text: fmt.Sprintf("no container of the service publishes %s, where a program of the machine or container %s answers", at, c.Name)}
		}
	}
	return source{elsewhere: true, text: fmt.Sprintf("no container of the service publishes %s, where a program of the machine answers", at)}
}

// self returns the container that this process runs in, nil for none that the
// engine knows.
func (f sourceFinder) self(around compose.Neighbourhood) *compose.Neighbour {
	for i, c := range around.Containers {
		for _, candidate := range f.candidates {
			if len(candidate) >= 12 && strings.HasPrefix(c.ID, candidate) {
				return &around.Containers[i]
			}
		}
	}
	// Without a candidate, the container is known by its address.
	own := f.own()
	for i, c := range around.Containers {
		for _, address := range own {
			if c.Network.Has(address) {
				return &around.Containers[i]
			}
		}
	}
	return nil
}

// sharesNetwork says that a container of the target has the same network as this
// process's container.
func (f sourceFinder) sharesNetwork(target []compose.Container, self compose.Neighbour) bool {
	for _, c := range target {
		if c.ID == self.ID {
			return true
		}
		for _, address := range self.Network.Addresses {
			if c.Network.Has(address) {
				return true
			}
		}
	}
	return false
}

// isHost says that an address is one of the engine's machine.
func (f sourceFinder) isHost(around compose.Neighbourhood, self *compose.Neighbour, address netip.Addr) bool {
	for _, gateway := range around.Gateways {
		if gateway == address {
			return true
		}
	}
	if self != nil && !self.Network.Host {
		return false
	}
	if address.IsLoopback() {
		return true
	}
	for _, own := range f.own() {
		if own == address {
			return true
		}
	}
	return false
}

func isOneOf(target []compose.Container, id string) bool {
	for _, c := range target {
		if c.ID == id {
			return true
		}
	}
	return false
}
