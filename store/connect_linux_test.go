package store

import (
	"net"
	"syscall"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// tcpUserTimeout is TCP_USER_TIMEOUT, which package syscall does not name.
const tcpUserTimeout = 0x12

// keepalives* and tcp_user_timeout are options of the sockets, of the pool's
// connections and of the worker's session alike.
func TestOptionsOfSockets(t *testing.T) {
	t.Parallel()
	base := devenv.Database(t)
	for _, tt := range []struct {
		options string
		want    map[int]int
	}{
		{"sslmode=disable", map[int]int{syscall.SO_KEEPALIVE: 1, syscall.TCP_KEEPIDLE: 15, syscall.TCP_KEEPINTVL: 15, tcpUserTimeout: 0}},
		{"sslmode=disable&keepalives=0", map[int]int{syscall.SO_KEEPALIVE: 0}},
		{"sslmode=disable&keepalives_idle=31&keepalives_interval=11&keepalives_count=5&tcp_user_timeout=3000",
			map[int]int{syscall.SO_KEEPALIVE: 1, syscall.TCP_KEEPIDLE: 31, syscall.TCP_KEEPINTVL: 11, syscall.TCP_KEEPCNT: 5, tcpUserTimeout: 3000}},
	} {
		s, _, err := openURL(t, with(base, tt.options))
		if err != nil {
			t.Fatal(err)
		}
		pooled, err := s.pool.Acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		session, err := s.workerLock.dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for name, conn := range map[string]net.Conn{"pool": pooled.Conn().PgConn().Conn(), "session": session.PgConn().Conn()} {
			for option, want := range tt.want {
				if got := socketOption(t, conn, option); got != want {
					t.Errorf("%s, %s: option %d is %d, want %d", tt.options, name, option, got, want)
				}
			}
		}
		pooled.Release()
		_ = session.Close(t.Context())
	}
}

func socketOption(t *testing.T, conn net.Conn, option int) (value int) {
	t.Helper()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	level := syscall.IPPROTO_TCP
	if option == syscall.SO_KEEPALIVE {
		level = syscall.SOL_SOCKET
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { value, failed = syscall.GetsockoptInt(int(fd), level, option) }); err != nil || failed != nil {
		t.Fatal(err, failed)
	}
	return value
}
