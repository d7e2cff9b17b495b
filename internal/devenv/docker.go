package devenv

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// engineVersion returns the version of the engine at DOCKER_HOST or the default
// socket.
func engineVersion(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return output(ctx, "docker", "version", "--format", "{{.Server.Version}}")
}

// engine finds a docker engine, or starts one if it can.
func (b *startup) engine(ctx context.Context) (err error) {
	defer func() {
		b.engineErr = err
		close(b.engineReady)
	}()
	if err := b.debian.wait(ctx, "docker.io"); err != nil {
		return err
	}
	version, findErr := engineVersion(ctx)
	if findErr == nil {
		// If another run has started this engine, it must not end while this
		// run uses it.
		if started, _ := readEngine(); started != nil && started.Group.alive() {
			if err := b.guard.watchEngine(); err != nil {
				return err
			}
		}
		b.progress.found("docker "+version, "")
		return nil
	}
	_, noServer := exec.LookPath("dockerd")
	switch {
	case os.Getenv("DOCKER_HOST") != "":
		return fmt.Errorf("the docker engine at DOCKER_HOST=%s does not answer: %w", os.Getenv("DOCKER_HOST"), findErr)
	case strings.Contains(findErr.Error(), "permission denied"):
		return fmt.Errorf("a docker engine runs, but this user may not use it: %w; run: sudo usermod -aG docker $USER, and log in again", findErr)
	case noServer != nil:
		return fmt.Errorf("no docker engine answers and dockerd is not installed: %w; install docker, on Debian as root: apt-get install docker.io", findErr)
	case os.Getuid() != 0:
		return fmt.Errorf("no docker engine answers: %w; start it: sudo systemctl start docker, and be a member of group docker", findErr)
	}
	return b.startEngine(ctx)
}

// startedEngine is the record of a dockerd that devenv has started. It listens
// on the default socket, so all runs on the machine share it: each run has a
// shared lock, and the last one ends the engine.
type startedEngine struct {
	Group group `json:"group"`
	Keep  bool  `json:"keep"` // until services-down
}

func (b *startup) startEngine(ctx context.Context) error {
	unlock, err := b.cache.lock(ctx, "engine-start")
	if err != nil {
		return err
	}
	defer unlock()
	if version, err := engineVersion(ctx); err == nil { // another run was faster
		b.progress.found("docker "+version, "started by another run")
		return b.guard.watchEngine()
	}
	w := b.progress.start("starting", "dockerd")
	defer w.failed()
	log, err := os.Create(b.cache.path("services", "dockerd.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command("dockerd")
	cmd.Stdout, cmd.Stderr = log, log
	err = startGated(cmd, func(pid int) error {
		if err := writeEngine(startedEngine{Group: group{ID: pid, Started: startTime(pid)}}); err != nil {
			return err
		}
		return b.guard.watchEngine()
	})
	if err != nil {
		return fmt.Errorf("start dockerd: %w", err)
	}
	s := &service{cmd: cmd, log: log.Name(), exited: make(chan struct{})}
	go func() { cmd.Wait(); close(s.exited) }()
	var version string
	err = until(ctx, time.Minute, s.exited, func(ctx context.Context) (err error) {
		version, err = engineVersion(ctx)
		return err
	})
	if err != nil {
		return s.explain(fmt.Errorf("dockerd does not answer after its start: %w", err))
	}
	w.done("docker " + version)
	return nil
}

func engineFile(name string) (string, error) {
	c, err := openCache()
	if err != nil {
		return "", err
	}
	return c.path("services", name), nil
}

// readEngine returns nil when devenv has started no engine.
func readEngine() (*startedEngine, error) {
	path, err := engineFile("engine.json")
	if err != nil {
		return nil, err
	}
	content, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var e startedEngine
	if err := json.Unmarshal(content, &e); err != nil {
		return nil, fmt.Errorf("record of the started dockerd: %w; remove %s", err, path)
	}
	return &e, nil
}

func writeEngine(e startedEngine) error {
	path, err := engineFile("engine.json")
	if err != nil {
		return err
	}
	content, err := json.Marshal(e)
	if err != nil {
		return err
	}
	return os.WriteFile(path, content, 0o600)
}

func keepEngine(keep bool) error {
	e, err := readEngine()
	if err != nil || e == nil {
		return err
	}
	e.Keep = keep
	return writeEngine(*e)
}

// engineLock is the lock file. The guard keeps it open while its run uses the
// engine.
var engineLock *os.File

func openEngineLock() (*os.File, error) {
	path, err := engineFile("engine.lock")
	if err != nil {
		return nil, err
	}
	return os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
}

func joinEngine() error {
	lock, err := openEngineLock()
	if err != nil {
		return err
	}
	engineLock = lock
	return syscall.Flock(int(lock.Fd()), syscall.LOCK_SH)
}

// leaveEngine ends the engine that devenv has started, unless another run uses
// it or services-up keeps it.
func leaveEngine() error {
	if engineLock == nil {
		lock, err := openEngineLock()
		if err != nil {
			return err
		}
		engineLock = lock
	}
	defer func() {
		engineLock.Close()
		engineLock = nil
	}()
	if syscall.Flock(int(engineLock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
		return nil // in use by another run, which ends it
	}
	e, err := readEngine()
	if err != nil || e == nil || e.Keep {
		return err
	}
	if e.Group.alive() {
		endGroup(e.Group.ID)
	}
	path, err := engineFile("engine.json")
	if err != nil {
		return err
	}
	return os.Remove(path)
}

// waitEngine waits until an engine answers or cannot be had.
func (b *startup) waitEngine(ctx context.Context) error {
	select {
	case <-b.engineReady:
		return b.engineErr
	case <-ctx.Done():
		return ctx.Err()
	}
}

// container starts a container whose ports are published on 127.0.0.1 and
// returns their host ports, in the order given. The guard removes it.
func (b *startup) container(ctx context.Context, role, image string, variables map[string]string, ports ...int) (name string, published []int, err error) {
	// The scratch folder's random suffix makes the name unique.
	name = "mm-devenv-" + role + "-" + strings.TrimPrefix(filepath.Base(b.dir), "mm-devenv-")
	if err := b.guard.watchContainer(name); err != nil {
		return "", nil, err
	}
	args := []string{"run", "--detach", "--name", name, "--label", "mm-orchestrator.devenv=" + role}
	for variable, value := range variables {
		args = append(args, "--env", variable+"="+value)
	}
	for _, port := range ports {
		args = append(args, "--publish", fmt.Sprintf("127.0.0.1::%d", port))
	}
	if _, err := output(ctx, "docker", append(args, image)...); err != nil {
		return "", nil, err
	}
	for _, port := range ports {
		address, err := output(ctx, "docker", "port", name, fmt.Sprintf("%d/tcp", port))
		if err != nil {
			return "", nil, err
		}
		var host int
		if _, err := fmt.Sscanf(address[strings.LastIndexByte(address, ':')+1:], "%d", &host); err != nil {
			return "", nil, fmt.Errorf("docker port %s: %q: %w", name, address, err)
		}
		published = append(published, host)
	}
	return name, published, nil
}

// containerExited returns a channel that is closed once the container has ended.
func containerExited(ctx context.Context, name string) <-chan struct{} {
	exited := make(chan struct{})
	go func() {
		if _, err := output(ctx, "docker", "wait", name); err == nil {
			close(exited)
		}
	}()
	return exited
}

// explainContainer adds the container's last log lines to err.
func explainContainer(name string, err error) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	log, logErr := exec.CommandContext(ctx, "docker", "logs", "--tail", "12", name).CombinedOutput()
	if logErr != nil {
		return err
	}
	return fmt.Errorf("%w; the log of container %s ends:\n%s", err, name, lastLines(string(log)))
}
