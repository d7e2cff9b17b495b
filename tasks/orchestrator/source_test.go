package orchestrator

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/compose"
)

// around is an engine that knows only its neighbourhood.
type around struct {
	compose.State
	n   compose.Neighbourhood
	err error
}

func (a around) Neighbourhood(context.Context) (compose.Neighbourhood, error) { return a.n, a.err }

func TestWhoHasAnswered(t *testing.T) {
	t.Parallel()
	addresses := func(all ...string) (list []netip.Addr) {
		for _, text := range all {
			list = append(list, netip.MustParseAddr(text))
		}
		return list
	}
	published := func(at string) compose.Network {
		return compose.Network{Addresses: addresses("172.18.0.3"), Published: []netip.AddrPort{netip.MustParseAddrPort(at)}}
	}
	neighbour := func(id, name string, n compose.Network) compose.Neighbour {
		return compose.Neighbour{ID: id, Name: name, Network: n}
	}
	const worker = "0123456789abcdef"
	workerContainer := neighbour(worker, "worker", compose.Network{Addresses: addresses("172.18.0.9")})
	host := addresses("127.0.0.1", "::1", "192.0.2.7", "172.17.0.1", "172.18.0.1")
	for _, test := range []struct {
		name     string
		target   compose.Network
		around   []compose.Neighbour
		own      []netip.Addr // of the worker's network; the machine's by default
		hostname string
		remote   bool // the engine is asked through a network
		at       string
		want     string // a part of the text
		not      bool   // certainly not the target
	}{
		{name: "the container's address", target: published("0.0.0.0:8080"), at: "172.18.0.3:5000", want: "answered by container p-web-1 at 172.18.0.3:5000"},
		{name: "its IPv6 address", target: compose.Network{Addresses: addresses("fd00::3")}, at: "[fd00::3]:80", want: "answered by container p-web-1"},
		{name: "its port on loopback", target: published("127.0.0.1:8080"), at: "127.0.0.1:8080", want: "which publishes 127.0.0.1:8080"},
		{name: "its port on IPv6 loopback", target: published("[::]:8080"), at: "[::1]:8080", want: "which publishes [::1]:8080"},
		{name: "its port at all addresses", target: published("0.0.0.0:8080"), at: "192.0.2.7:8080", want: "which publishes 192.0.2.7:8080"},
		{name: "its port at another address", target: published("192.0.2.7:8080"), at: "127.0.0.1:8080", want: "a program of the machine answers", not: true},
		{name: "no port of its own", target: compose.Network{Addresses: addresses("172.18.0.3")}, at: "127.0.0.1:8080", want: "a program of the machine answers", not: true},
		{name: "another container's address", target: published("0.0.0.0:8080"), around: []compose.Neighbour{neighbour("o", "p-old-1", compose.Network{Addresses: addresses("172.18.0.4")})}, at: "172.18.0.4:5000", want: "container p-old-1, which is not one of the service's", not: true},
		{name: "another container's port", target: compose.Network{}, around: []compose.Neighbour{neighbour("o", "nginx", published("0.0.0.0:80"))}, at: "127.0.0.1:80", want: "container nginx, which is not one of the service's, publishes 127.0.0.1:80", not: true},
		{name: "the machine's network, shared", target: compose.Network{Host: true}, at: "127.0.0.1:8080", want: "shares the machine's network"},
		{name: "the machine's network, shared by another", target: compose.Network{}, around: []compose.Neighbour{neighbour("o", "agent", compose.Network{Host: true})}, at: "127.0.0.1:8080", want: "container agent answers", not: true},
		{name: "an address nobody knows", target: published("0.0.0.0:8080"), at: "198.51.100.1:80", want: "the worker cannot tell"},
		{name: "worker in a container, service by name", target: published("0.0.0.0:8080"), around: []compose.Neighbour{workerContainer}, own: addresses("127.0.0.1", "172.18.0.9"), hostname: worker[:12], at: "172.18.0.3:5000", want: "answered by container p-web-1"},
		{name: "worker in a container, through the gateway", target: published("0.0.0.0:8080"), around: []compose.Neighbour{workerContainer}, own: addresses("127.0.0.1", "172.18.0.9"), hostname: worker[:12], at: "172.17.0.1:8080", want: "which publishes 172.17.0.1:8080"},
		{name: "worker in a container, a program behind the gateway", target: published("0.0.0.0:8080"), around: []compose.Neighbour{workerContainer}, own: addresses("127.0.0.1", "172.18.0.9"), hostname: worker[:12], at: "172.17.0.1:8081", want: "a program of the machine answers", not: true},
		{name: "worker in a container, loopback", target: published("0.0.0.0:8080"), around: []compose.Neighbour{workerContainer}, own: addresses("127.0.0.1", "172.18.0.9"), hostname: worker[:12], at: "127.0.0.1:8080", want: "the worker's own container answers", not: true},
		{name: "worker in a container with a host name of its own, loopback", target: published("0.0.0.0:8080"), around: []compose.Neighbour{workerContainer}, own: addresses("127.0.0.1", "172.18.0.9"), hostname: "worker", at: "127.0.0.1:8080", want: "the worker's own container answers", not: true},
		{name: "worker in a container whose network the service shares", target: compose.Network{Addresses: addresses("172.18.0.9")}, around: []compose.Neighbour{workerContainer}, own: addresses("127.0.0.1", "172.18.0.9"), hostname: worker[:12], at: "127.0.0.1:8080", want: "shares with the worker's container"},
		{name: "worker in a container, Docker Desktop's name of the host", target: published("0.0.0.0:8080"), around: []compose.Neighbour{workerContainer}, own: addresses("127.0.0.1", "172.18.0.9"), hostname: worker[:12], at: "192.168.65.254:8080", want: "the worker cannot tell"},
		{name: "worker in a container with the machine's network", target: published("0.0.0.0:8080"), around: []compose.Neighbour{neighbour(worker, "worker", compose.Network{Host: true})}, hostname: worker[:12], at: "127.0.0.1:8080", want: "which publishes 127.0.0.1:8080"},
		{name: "worker in the service's container", target: compose.Network{Addresses: addresses("172.18.0.3")}, around: []compose.Neighbour{neighbour("web", "p-web-1", compose.Network{Addresses: addresses("172.18.0.3")})}, own: addresses("127.0.0.1", "172.18.0.3"), at: "127.0.0.1:8080", want: "shares with the worker's container"},
		{name: "engine of another machine, loopback", remote: true, target: published("0.0.0.0:8080"), at: "127.0.0.1:8080", want: "the worker cannot tell"},
		{name: "engine of another machine, its address", remote: true, target: published("0.0.0.0:8080"), at: "198.51.100.7:8080", want: "the worker cannot tell"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			target := []compose.Container{{ID: "web", Name: "p-web-1", Network: test.target}}
			own := host
			if test.own != nil {
				own = test.own
			}
			finder := sourceFinder{
				engine:     around{n: compose.Neighbourhood{Containers: test.around, Gateways: addresses("172.17.0.1", "172.18.0.1"), Local: !test.remote}},
				own:        func() []netip.Addr { return own },
				candidates: []string{test.hostname},
			}
			got := finder.find(t.Context(), target, netip.MustParseAddrPort(test.at))
			if got.elsewhere != test.not || !strings.Contains(got.text, test.want) {
				t.Errorf("elsewhere %t: %s\nwant %t: %s", got.elsewhere, got.text, test.not, test.want)
			}
		})
	}
	failed := sourceFinder{engine: around{err: errors.New("forbidden by a proxy")}, own: func() []netip.Addr { return nil }}
	if got := failed.find(t.Context(), nil, netip.MustParseAddrPort("127.0.0.1:80")); got.elsewhere || !strings.Contains(got.text, "forbidden by a proxy") {
		t.Errorf("%+v", got)
	}
}
