//go:build !linux

package database

import (
	"net"
	"syscall"
)

// userTimeout does nothing: where a system has no such option, libpq ignores
// tcp_user_timeout too.
func userTimeout(int) func(network, address string, raw syscall.RawConn) error { return nil }

// peerName is nil: this system cannot tell the peer of a socket.
var peerName func(*net.UnixConn) (string, error)
