package database

import (
	"net"
	"os/user"
	"strconv"
	"syscall"
)

// tcpUserTimeout is TCP_USER_TIMEOUT, which package syscall does not name.
const tcpUserTimeout = 0x12

// userTimeout sets how long, in milliseconds, sent data may stay unanswered.
func userTimeout(milliseconds int) func(network, address string, raw syscall.RawConn) error {
	return func(network, _ string, raw syscall.RawConn) error {
		if network == "unix" {
			return nil
		}
		var failed error
		err := raw.Control(func(fd uintptr) {
			failed = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout, milliseconds)
		})
		if err != nil {
			return err
		}
		return failed
	}
}

// peerName returns the name of the user that runs the process at the other end of
// a Unix socket, or the user's number if there is no name.
var peerName = func(conn *net.UnixConn) (string, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return "", err
	}
	var credentials *syscall.Ucred
	var failed error
	err = raw.Control(func(fd uintptr) {
		credentials, failed = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	})
	if err != nil {
		return "", err
	}
	if failed != nil {
		return "", failed
	}
	id := strconv.FormatUint(uint64(credentials.Uid), 10)
	if found, err := user.LookupId(id); err == nil {
		return found.Username, nil
	}
	return id, nil
}
