package devenv

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// OwnEngine is a private docker engine, in namespaces of its own, which the caller
// may stop and kill; the shared engine must not be touched. It keeps its data until
// Close. Its methods must not be called concurrently.
//
// Its containers have no way out, and publish no port on this machine.
type OwnEngine struct {
	// Host is its address, in the form of DOCKER_HOST.
	Host string

	// programs is a folder with dockerd and containerd, "" for those installed.
	programs string
	dir      string
	server   *child
}

// ownEngineScript runs the engine until the file stop appears. As the first process
// of its pid namespace it takes all containers along when it ends.
const ownEngineScript = `ip link set lo up && mount -t tmpfs tmpfs /run || exit 1
while [ ! -e "$1/stop" ]; do
	rm -f "$1/docker.pid"
	dockerd --data-root "$1/data" --exec-root /run/docker-own --pidfile "$1/docker.pid" --host "unix://$1/docker.sock"
done`

// StartOwnEngine starts an engine with the installed dockerd and returns once it
// answers, usually after 2 s. It must be called as root. The caller must call Close.
func StartOwnEngine(ctx context.Context) (*OwnEngine, error) { return startOwnEngine(ctx, "") }

// StartNewestEngine is StartOwnEngine with the newest engine, which only `make
// test-change` provides.
func StartNewestEngine(ctx context.Context) (*OwnEngine, error) {
	programs, err := required(EnvNewestEngine, "the newest docker engine")
	if err != nil {
		return nil, err
	}
	return startOwnEngine(ctx, programs)
}

func startOwnEngine(ctx context.Context, programs string) (*OwnEngine, error) {
	if os.Getuid() != 0 {
		return nil, errors.New("private docker engine: only root can start one: run this test with sudo")
	}
	for _, program := range []string{"dockerd", "unshare", "nsenter", "ip"} {
		if _, err := exec.LookPath(program); err != nil {
			return nil, fmt.Errorf("private docker engine: %w; install docker, util-linux and iproute2", err)
		}
	}
	dir, err := scratchFolder()
	if err != nil {
		return nil, fmt.Errorf("private docker engine: %w", err)
	}
	e := &OwnEngine{Host: "unix://" + filepath.Join(dir, "docker.sock"), programs: programs, dir: dir}
	if err := e.Start(ctx); err != nil {
		return nil, errors.Join(err, e.Close())
	}
	return e, nil
}

// Start starts the engine, also after Stop or PowerOff.
func (e *OwnEngine) Start(ctx context.Context) error {
	_ = os.Remove(filepath.Join(e.dir, "stop"))
	cmd := exec.Command("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", ownEngineScript, "sh", e.dir)
	if e.programs != "" {
		cmd.Env = append(os.Environ(), "PATH="+e.programs+string(os.PathListSeparator)+os.Getenv("PATH"))
	}
	server, err := childOf(cmd, syscall.SIGKILL)
	if err != nil {
		return fmt.Errorf("private docker engine: %w", err)
	}
	e.server = server
	return e.answers(ctx)
}

// answers waits until the engine answers.
func (e *OwnEngine) answers(ctx context.Context) error {
	err := until(ctx, time.Minute, e.server.exited, func(ctx context.Context) error {
		_, err := output(ctx, "docker", "--host", e.Host, "version", "--format", "{{.Server.Version}}")
		return err
	})
	if err != nil {
		return fmt.Errorf("private docker engine does not answer: %w; its log ends:\n%s", err, lastLines(e.server.output()))
	}
	return nil
}

// signal sends a signal to dockerd alone.
func (e *OwnEngine) signal(signal syscall.Signal) error {
	pid := e.server.cmd.Process.Pid
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return err
	}
	inside, err := os.ReadFile(filepath.Join(e.dir, "docker.pid"))
	if err != nil {
		return err
	}
	out, err := exec.Command("nsenter", "--target", strings.TrimSpace(string(children)), "--pid", "--mount", "--",
		"kill", "-"+strconv.Itoa(int(signal)), strings.TrimSpace(string(inside))).CombinedOutput()
	if err != nil {
		return fmt.Errorf("private docker engine: kill: %w: %s", err, out)
	}
	return nil
}

// Crash kills dockerd, whose containers live on, starts it again, and returns once
// it answers.
func (e *OwnEngine) Crash(ctx context.Context) error {
	if err := e.signal(syscall.SIGKILL); err != nil {
		return err
	}
	return e.answers(ctx)
}

// Stop stops the engine with its containers, as a shutdown of the machine does.
func (e *OwnEngine) Stop() error {
	if err := os.WriteFile(filepath.Join(e.dir, "stop"), nil, 0o644); err != nil {
		return err
	}
	if err := e.signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-e.server.exited:
		return nil
	case <-time.After(2 * endServer):
		return errors.Join(errors.New("private docker engine does not stop"), e.PowerOff())
	}
}

// PowerOff ends the engine and all its containers at once, as a power failure does.
func (e *OwnEngine) PowerOff() error { return e.server.end(syscall.SIGKILL) }

// Close ends the engine and removes its data.
func (e *OwnEngine) Close() error {
	var err error
	if e.server != nil {
		err = e.PowerOff()
	}
	return errors.Join(err, os.RemoveAll(e.dir))
}
