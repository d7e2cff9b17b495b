package compose

import (
	"net/netip"
	"testing"
)

func TestPublishedPorts(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		published, connected string
		want                 bool
	}{
		{"0.0.0.0:80", "127.0.0.1:80", true},
		{"0.0.0.0:80", "192.0.2.7:80", true},
		{"[::]:80", "[::1]:80", true},
		{"0.0.0.0:80", "127.0.0.1:81", false},
		{"127.0.0.1:80", "127.0.0.1:80", true},
		{"127.0.0.1:80", "[::1]:80", true}, // localhost, whichever address it has
		{"127.0.0.1:80", "192.0.2.7:80", false},
		{"192.0.2.7:80", "192.0.2.7:80", true},
		{"192.0.2.7:80", "127.0.0.1:80", false},
	} {
		n := Network{Published: []netip.AddrPort{netip.MustParseAddrPort(test.published)}}
		at := netip.MustParseAddrPort(test.connected)
		if got := n.Publishes(at.Addr(), at.Port()); got != test.want {
			t.Errorf("%s published, %s connected: %t, want %t", test.published, test.connected, got, test.want)
		}
	}
	if !(Network{Published: []netip.AddrPort{netip.AddrPortFrom(netip.Addr{}, 80)}}).Publishes(netip.MustParseAddr("127.0.0.1"), 80) {
		t.Error("an engine that names no address publishes at all of them")
	}
}
