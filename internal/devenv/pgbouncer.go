package devenv

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// findPgBouncer returns the path of the program, or "" if it is not installed.
// Debian installs it in /usr/sbin, which is not in most users' PATH.
func findPgBouncer() string {
	if path, err := exec.LookPath("pgbouncer"); err == nil {
		return path
	}
	const debian = "/usr/sbin/pgbouncer"
	if _, err := os.Stat(debian); err == nil {
		return debian
	}
	return ""
}

// Pooler starts a private PgBouncer for a database of [Database] and returns,
// once it answers, the URL of the database through it. Mode is session,
// transaction or statement; settings are further lines of its configuration.
// PgBouncer ends with the test.
func Pooler(t testing.TB, database, mode string, settings ...string) string {
	t.Helper()
	address, err := startPooler(t, database, mode, settings)
	if err != nil {
		t.Fatalf("PgBouncer of this test: %v", err)
	}
	return address
}

func startPooler(t testing.TB, database, mode string, settings []string) (string, error) {
	program := findPgBouncer()
	if program == "" {
		return "", errors.New("it is not installed; install it, on Debian as root: apt-get install --no-install-recommends pgbouncer")
	}
	server, err := url.Parse(database)
	if err != nil {
		return "", err
	}
	password, _ := server.User.Password()
	account, err := unprivileged("postgres") // it refuses to run as root
	if err != nil {
		return "", err
	}
	dir, err := scratchFolder()
	if err != nil {
		return "", err
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	home := filepath.Join(dir, "pgbouncer")
	if err := ownFolder(home, account); err != nil {
		return "", err
	}
	for attempt := 1; ; attempt++ {
		ports, err := FreePorts(1)
		if err != nil {
			return "", err
		}
		files := map[string]string{
			"users": fmt.Sprintf("%q %q\n", server.User.Username(), password),
			"pgbouncer.ini": fmt.Sprintf(`[databases]
* = host=%s port=%s
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %d
unix_socket_dir =
auth_type = scram-sha-256
auth_file = %s
pool_mode = %s
%s
`, server.Hostname(), server.Port(), ports[0], filepath.Join(home, "users"), mode, strings.Join(settings, "\n")),
		}
		for name, content := range files {
			path := filepath.Join(home, name)
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				return "", err
			}
			if account != nil {
				if err := os.Chown(path, int(account.Uid), int(account.Gid)); err != nil {
					return "", err
				}
			}
		}
		cmd := exec.Command(program, filepath.Join(home, "pgbouncer.ini"))
		cmd.Dir, cmd.Env = home, []string{"HOME=" + home}
		runAs(cmd, account)
		pooler, err := childOf(cmd, syscall.SIGTERM)
		if err != nil {
			return "", err
		}
		through := *server
		through.Host = fmt.Sprintf("127.0.0.1:%d", ports[0])
		err = until(context.Background(), 20*time.Second, pooler.exited, func(ctx context.Context) error { return dial(ctx, ports[0]) })
		if err == nil {
			t.Cleanup(func() { _ = pooler.end(syscall.SIGTERM) })
			return through.String(), nil
		}
		_ = pooler.end(syscall.SIGKILL)
		if attempt == 3 {
			return "", fmt.Errorf("%w; its log ends:\n%s", err, lastLines(pooler.output()))
		}
	}
}
