package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// postgres is a PostgreSQL server of a test's own, which it may restart: the
// one that all tests share must stay.
type postgres struct {
	t    *testing.T
	port int
	// restart ends the server as its operator does, and starts it again.
	restart func()
}

// newPostgres runs the installed server as a process, else the image of the
// shipped compose file in a container.
func newPostgres(t *testing.T) *postgres {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &postgres{t: t, port: listener.Addr().(*net.TCPAddr).Port}
	listener.Close()
	if programs := installedPostgres(); programs != "" {
		p.runProcess(programs)
	} else {
		p.runContainer()
	}
	await(t, "PostgreSQL of this test", func() (bool, error) {
		conn, err := pgx.Connect(t.Context(), p.url())
		if err != nil {
			return false, nil
		}
		return true, conn.Close(t.Context())
	})
	return p
}

func (p *postgres) url() string {
	return fmt.Sprintf("postgres://mm:trusted@127.0.0.1:%d/postgres", p.port)
}

func installedPostgres() string {
	folders, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	slices.Reverse(folders)
	for _, folder := range folders {
		if _, err := os.Stat(filepath.Join(folder, "initdb")); err == nil {
			return folder
		}
	}
	if path, err := exec.LookPath("initdb"); err == nil {
		return filepath.Dir(path)
	}
	return ""
}

func (p *postgres) runProcess(programs string) {
	t := p.t
	t.Helper()
	// Not t.TempDir(): its parents are closed to the account below.
	home, err := os.MkdirTemp("", "mm-e2e-postgres-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(home) })
	attributes := &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGQUIT}
	if os.Getuid() == 0 { // it refuses to run as root
		account, err := user.Lookup("nobody")
		if err != nil {
			t.Fatal(err)
		}
		uid, _ := strconv.Atoi(account.Uid)
		gid, _ := strconv.Atoi(account.Gid)
		if err := os.Chown(home, uid, gid); err != nil {
			t.Fatal(err)
		}
		attributes.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	command := func(program string, args ...string) *exec.Cmd {
		command := exec.Command(filepath.Join(programs, program), append([]string{"-D", filepath.Join(home, "data")}, args...)...)
		command.Dir, command.SysProcAttr = home, attributes
		command.Env = []string{"PATH=" + programs + ":/usr/bin:/bin", "HOME=" + home, "LANG=C.UTF-8"}
		return command
	}
	if text, err := command("initdb", "-U", "mm", "-A", "trust", "-E", "UTF8", "--no-locale", "-N").CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, text)
	}
	var server *exec.Cmd
	start := func() {
		server = command("postgres", "-p", strconv.Itoa(p.port), "-c", "listen_addresses=127.0.0.1",
			"-c", "unix_socket_directories=", "-c", "fsync=off", "-c", "shared_buffers=32MB")
		if err := server.Start(); err != nil {
			t.Error(err) // also called from a proxy's goroutine
		}
	}
	stop := func() {
		_ = server.Process.Signal(syscall.SIGINT) // "fast": ends sessions, loses nothing
		_ = server.Wait()
	}
	start()
	t.Cleanup(stop)
	p.restart = func() { stop(); start() }
}

func (p *postgres) runContainer() {
	t := p.t
	t.Helper()
	image := os.Getenv("POSTGRES_IMAGE")
	if image == "" {
		image = "postgres:15"
	}
	docker := func(args ...string) string {
		text, err := exec.Command("docker", args...).CombinedOutput()
		if err != nil {
			t.Fatalf("PostgreSQL is not installed and cannot be had as a container: docker %v: %v\n%s", args, err, text)
		}
		return strings.TrimSpace(string(text))
	}
	container := docker("run", "--detach", "--rm", "--publish", fmt.Sprintf("127.0.0.1:%d:5432", p.port),
		"--env", "POSTGRES_USER=mm", "--env", "POSTGRES_PASSWORD=trusted", "--env", "POSTGRES_DB=postgres", image)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := exec.CommandContext(ctx, "docker", "rm", "--force", "--volumes", container).Run(); err != nil {
			t.Error(err)
		}
	})
	p.restart = func() { docker("restart", container) }
}
