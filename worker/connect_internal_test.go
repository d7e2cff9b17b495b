package worker

import (
	"errors"
	"net"
	"syscall"
	"testing"
)

// An operator reads where and why once, in one line, also when a host has
// several addresses.
func TestFailuresToDialAreOneLine(t *testing.T) {
	t.Parallel()
	refused := func(address string) error {
		return &net.OpError{Op: "dial", Net: "tcp", Addr: &net.TCPAddr{IP: net.ParseIP(address), Port: 5672}, Err: syscall.ECONNREFUSED}
	}
	for _, tt := range []struct {
		failures dialFailures
		want     string
	}{
		{dialFailures{{err: refused("127.0.0.1")}}, "connection refused"},
		{dialFailures{{"::1", refused("::1")}, {"127.0.0.1", refused("127.0.0.1")}}, "connection refused by ::1; connection refused by 127.0.0.1"},
		{dialFailures{{err: &net.DNSError{Err: "no such host", Name: "rabbitmq", Server: "127.0.0.53:53", IsNotFound: true}}}, "no such host"},
		{dialFailures{{err: &net.OpError{Op: "dial", Net: "tcp", Err: timeout{}}}}, "no answer in time"},
	} {
		if got := tt.failures.Error(); got != tt.want {
			t.Errorf("%q, want %q", got, tt.want)
		}
	}
	if err := error(dialFailures{{err: refused("127.0.0.1")}}); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Error("the cause is lost")
	}
}

type timeout struct{}

func (timeout) Error() string   { return "i/o timeout" }
func (timeout) Timeout() bool   { return true }
func (timeout) Temporary() bool { return true }
