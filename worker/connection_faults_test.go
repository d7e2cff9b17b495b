package worker

import (
	"errors"
	"fmt"
	"net"
	"syscall"
	"testing"
	"time"
)

// closedError is an error of a broker's package.
type closedError struct {
	code int
	text string
}

func (e closedError) Error() string { return e.text }
func (e closedError) Kind() string  { return fmt.Sprint(e.code) }

// A failure that repeats is logged once, although its text has another port each
// time. Another failure is logged.
func TestRepeatedFailuresAreLoggedOnce(t *testing.T) {
	t.Parallel()
	from := func(port int, err error) error {
		return &net.OpError{Op: "read", Net: "tcp", Source: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port}, Err: err}
	}
	lost := func(port, code int) error {
		return closedError{code, from(port, syscall.ECONNRESET).Error()}
	}
	unreachable := func(port int, err error) error {
		one := &ConnectError{Kind: ErrUnreachable, What: "cannot connect to broker:5672", Err: from(port, err)}
		return errors.Join(one, fmt.Errorf("%w: opening a channel: %w", ErrUnreachable, lost(port, 501)))
	}
	var f connectionFaults
	for i, tt := range []struct {
		what string
		err  error
		want bool
	}{
		{"lost", lost(40001, 501), true},
		{"connect", unreachable(40002, syscall.ECONNRESET), true},
		{"connect", unreachable(40003, syscall.ECONNRESET), false},
		{"connect", unreachable(40004, syscall.ECONNREFUSED), true},
		{"lost", lost(40005, 501), false},
		{"lost", lost(40006, 320), true},
	} {
		if got := f.changed(tt.what, tt.err); got != tt.want {
			t.Errorf("%d: %s: %v: logged %v, want %v", i, tt.what, tt.err, got, tt.want)
		}
	}
	f.consuming()
	f.began = time.Now().Add(-steadyAfter)
	if !f.changed("lost", lost(40007, 320)) {
		t.Error("the loss of a steady session is not logged")
	}
}

// The first attempt after a steady session comes at once. Sessions that die at once
// are followed by pauses.
func TestSessionsThatDieAtOnceAreFollowedByAPause(t *testing.T) {
	t.Parallel()
	var f connectionFaults
	for range 2 {
		if pause := f.pause(); pause != 0 {
			t.Errorf("a pause of %v after a steady session", pause)
		}
		for range 50 {
			f.consuming()
			if pause := f.pause(); pause <= 0 || pause > time.Second {
				t.Fatalf("a pause of %v after a session that died at once", pause)
			}
		}
		f.consuming()
		f.began = time.Now().Add(-steadyAfter)
	}
}
