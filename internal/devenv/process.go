package devenv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// output runs a short program and returns its standard output, trimmed. The
// error contains the last lines that the program printed.
func output(ctx context.Context, name string, args ...string) (string, error) {
	return captured(ctx, exec.CommandContext(ctx, name, args...))
}

// captured is output for a command that was created with ctx.
func captured(ctx context.Context, cmd *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if errors.Is(ctx.Err(), context.Canceled) {
			return "", ctx.Err() // the context has killed it
		}
		return "", fmt.Errorf("%s: %w: %s", commandLine(cmd), err, lastLines(stderr.String()+stdout.String()))
	}
	return strings.TrimSpace(stdout.String()), nil
}

// run runs a long program in a process group of its own, shows the last line of
// its output as progress, and ends the group when ctx ends.
func (b *startup) run(ctx context.Context, w *work, cmd *exec.Cmd) error {
	line := commandLine(cmd)
	var tail tail
	cmd.Stdout = io.MultiWriter(w, &tail)
	cmd.Stderr = cmd.Stdout
	cmd.WaitDelay = endLimit
	if err := startGated(cmd, b.guard.watchGroup); err != nil {
		return fmt.Errorf("%s: %w", line, err)
	}
	ended := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		select {
		case <-ctx.Done():
			syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM)
		case <-ended:
		}
	}()
	err := cmd.Wait()
	close(ended)
	<-stopped
	b.guard.forgetGroup(cmd.Process.Pid) // if the guard has died, the next start reports it
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %s", line, err, lastLines(tail.String()))
	}
	return nil
}

// service is a server that runs as a child process.
type service struct {
	cmd    *exec.Cmd
	log    string
	exited chan struct{} // closed when the process has ended
}

// serve starts a server in a process group of its own, with its output in a file
// of the scratch folder. watch is the guard's method that registers the server
// to be ended.
func (b *startup) serve(name string, cmd *exec.Cmd, watch func(pid int) error) (*service, error) {
	path := filepath.Join(b.dir, name+".log")
	log, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := startGated(cmd, watch); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	s := &service{cmd: cmd, log: path, exited: make(chan struct{})}
	go func() {
		cmd.Wait() // the exit status after a signal says nothing
		close(s.exited)
	}()
	return s, nil
}

// explain adds the last lines of the server's log to err.
func (s *service) explain(err error) error {
	log, readErr := os.ReadFile(s.log)
	if readErr != nil {
		return err
	}
	return fmt.Errorf("%w; its log ends:\n%s", err, lastLines(string(log)))
}

// portTaken reports whether the server gave up because another process took its
// port between the choice of the port and the start.
func (s *service) portTaken() bool {
	log, _ := os.ReadFile(s.log)
	text := strings.ToLower(string(log))
	return strings.Contains(text, "eaddrinuse") || strings.Contains(text, "address already in use")
}

// gate is a shell script that waits for a line on descriptor 3 and then execs
// the program. If the input ends without a line, the script exits.
const gate = `read -r _ <&3 || exit 125; exec 3<&-; exec "$0" "$@"`

// startGated starts a program in a process group of its own, but lets it run
// only after register has returned. The guard therefore knows every program
// that runs, even if this process is killed in between.
func startGated(cmd *exec.Cmd, register func(pid int) error) error {
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer write.Close()
	cmd.Args = append([]string{"sh", "-c", gate, cmd.Path}, cmd.Args[1:]...)
	cmd.Path = "/bin/sh"
	cmd.ExtraFiles = []*os.File{read}
	ownGroup(cmd)
	err = cmd.Start()
	read.Close()
	if err != nil {
		return err
	}
	err = register(cmd.Process.Pid)
	if err == nil {
		_, err = write.WriteString("\n")
	}
	if err != nil {
		write.Close() // the script exits
		cmd.Wait()
	}
	return err
}

// OwnGroup gives a child a process group of its own, so that it can be ended with all
// that it has started. On Linux the kernel sends it a signal when this process dies,
// also by SIGKILL.
func OwnGroup(cmd *exec.Cmd, whenWeDie syscall.Signal) {
	ownGroup(cmd)
	deathSignal(cmd.SysProcAttr, whenWeDie)
}

func ownGroup(cmd *exec.Cmd) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
}

// FreePorts returns n different TCP ports that are free on 127.0.0.1, for
// servers that need a fixed port or must get the same port after a restart. The
// ports are below the range from which the kernel assigns ports (from 32768 on
// Linux). The kernel therefore gives them to no other process, neither before
// the server's start nor while it is stopped.
func FreePorts(n int) ([]int, error) {
	const low, high, tries = 12000, 32000, 1000
	var ports []int
	for range tries {
		if len(ports) == n {
			return ports, nil
		}
		port := low + rand.IntN(high-low)
		listener, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port))
		if err != nil {
			continue
		}
		defer listener.Close() // only at the end, so that no port is returned twice
		ports = append(ports, port)
	}
	return nil, fmt.Errorf("found no free TCP port between %d and %d in %d tries", low, high, tries)
}

// unprivileged returns the account to run servers under: for root the first of
// these names that exists, otherwise nil, which means the current user.
func unprivileged(names ...string) (*syscall.Credential, error) {
	if os.Getuid() != 0 {
		return nil, nil
	}
	for _, name := range append(names, "nobody") {
		account, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err := strconv.ParseUint(account.Uid, 10, 32)
		if err != nil {
			continue
		}
		gid, err := strconv.ParseUint(account.Gid, 10, 32)
		if err != nil {
			continue
		}
		return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
	}
	return nil, fmt.Errorf("none of the accounts %v exists to run the server as", names)
}

// ownFolder creates a folder that belongs to account.
func ownFolder(path string, account *syscall.Credential) error {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return err
	}
	if account == nil {
		return nil
	}
	return os.Chown(path, int(account.Uid), int(account.Gid))
}

func runAs(cmd *exec.Cmd, account *syscall.Credential) {
	if account != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: account}
	}
}

// scratchFolder creates the folder of one run. Servers run under other accounts
// and must be able to reach it.
func scratchFolder() (string, error) {
	dir, err := os.MkdirTemp("", "mm-devenv-")
	if err != nil {
		return "", fmt.Errorf("scratch folder: %w", err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", err
	}
	return dir, nil
}

// moduleRoot returns the root folder of the clone that the caller works in.
func moduleRoot(ctx context.Context) (string, error) {
	file, err := output(ctx, "go", "env", "GOMOD")
	if err != nil {
		return "", err
	}
	if file == "" || file == os.DevNull {
		return "", errors.New("not inside a clone of mm-orchestrator: run this from its folder")
	}
	return filepath.Dir(file), nil
}

func commandLine(cmd *exec.Cmd) string {
	line := strings.Join(append([]string{filepath.Base(cmd.Path)}, cmd.Args[1:]...), " ")
	return shorten(line, 120)
}

// lastLines returns the end of a program's output, enough to show the cause.
func lastLines(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	if len(lines) > 12 {
		lines = lines[len(lines)-12:]
	}
	return strings.Join(lines, "\n")
}

// tail keeps the last 8 KiB written to it.
type tail struct{ bytes []byte }

func (t *tail) Write(b []byte) (int, error) {
	t.bytes = append(t.bytes, b...)
	if extra := len(t.bytes) - 8<<10; extra > 0 {
		t.bytes = append([]byte(nil), t.bytes[extra:]...)
	}
	return len(b), nil
}

func (t *tail) String() string { return string(t.bytes) }

// Run runs a command in a process group of its own and waits for its end. It
// forwards the first signal to the group; a second signal, or the end of timeout
// after the first, kills the group. Processes that the command leaves running
// are killed too.
func (e *Environment) Run(cmd *exec.Cmd, signals <-chan os.Signal, timeout time.Duration) error {
	reap, release := adoptOrphans()
	defer release()
	if err := startGated(cmd, e.guard.watchGroup); err != nil {
		return err
	}
	pid := cmd.Process.Pid
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	var late <-chan time.Time
	dead := time.NewTicker(5 * time.Second)
	defer dead.Stop()
	for {
		select {
		case err := <-ended:
			endGroup(pid)
			return err
		case <-dead.C:
			reap(pid)
		case s := <-signals:
			if late != nil {
				syscall.Kill(-pid, syscall.SIGKILL)
				continue
			}
			syscall.Kill(-pid, s.(syscall.Signal))
			late = time.After(timeout)
		case <-late:
			syscall.Kill(-pid, syscall.SIGKILL)
		}
	}
}
