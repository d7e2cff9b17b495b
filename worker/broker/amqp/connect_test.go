package amqp

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
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
		{dialFailures{{err: &net.OpError{Op: "dial", Net: "tcp", Err: late{}}}}, "no answer in time"},
	} {
		if got := tt.failures.Error(); got != tt.want {
			t.Errorf("%q, want %q", got, tt.want)
		}
	}
	if err := error(dialFailures{{err: refused("127.0.0.1")}}); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Error("the cause is lost")
	}
}

type late struct{}

func (late) Error() string   { return "i/o timeout" }
func (late) Timeout() bool   { return true }
func (late) Temporary() bool { return true }

// Failures with the same cause are equal for logs, though their texts have another port
// each time.
func TestEqualFailuresAreOfOneKind(t *testing.T) {
	t.Parallel()
	from := func(port int, err error) error {
		return &net.OpError{Op: "read", Net: "tcp", Source: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port}, Err: err}
	}
	refused := func(port, code int) *amqp.Error {
		return &amqp.Error{Code: code, Reason: from(port, syscall.ECONNRESET).Error()}
	}
	c := &connection{place: "broker:5672/"}
	for name, failure := range map[string]func(port, code int, err error) error{
		"closed": func(port, code int, _ error) error { return closeReason("connection", refused(port, code), true) },
		"call":   func(port, code int, _ error) error { return c.connectionError("publishing", refused(port, code)) },
		"settling": func(port, code int, _ error) error {
			return ours(fmt.Errorf("settling a delivery: %w", refused(port, code)))
		},
		"dial": func(port, _ int, err error) error {
			return &broker.ConnectError{Kind: broker.ErrUnreachable, What: "cannot connect to broker:5672", Err: dialFailures{{err: from(port, err)}}}
		},
	} {
		first := failure(40001, 501, syscall.ECONNRESET)
		if got, want := broker.Kind(failure(40002, 501, syscall.ECONNRESET)), broker.Kind(first); got != want {
			t.Errorf("%s: %q and %q for the same failure", name, got, want)
		}
		if got := broker.Kind(failure(40001, 320, syscall.ECONNREFUSED)); got == broker.Kind(first) {
			t.Errorf("%s: %q for another failure, too", name, got)
		}
		if text := first.Error(); !strings.Contains(text, "connection reset") {
			t.Errorf("%s: the text %q lacks the reason", name, text)
		}
	}
}
