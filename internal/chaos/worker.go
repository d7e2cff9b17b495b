package chaos

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// waitTimeout bounds every wait. It is several times longer than what the program
// promises (a takeover within 5 s), for two busy cores.
const waitTimeout = 45 * time.Second

// brokerHeartbeat is the heartbeat that workers negotiate with the broker.
const brokerHeartbeat = 5 * time.Second

// shutdownGrace is how long workers may take to stop. Running steps may continue
// for three quarters of it.
const shutdownGrace = 2 * time.Second

// A workerProcess is a worker whose process is killed and replaced, while its
// proxies stay.
type workerProcess struct {
	lane     *lane
	name     string
	broker   *proxy
	database *proxy
	environ  []string
	// settings are additional variables for the trial.
	settings []string

	command *exec.Cmd
	exited  chan struct{}
	log     *os.File
}

func (l *lane) newWorker(name string) (*workerProcess, error) {
	w := &workerProcess{lane: l, name: name}
	brokerURL, err := url.Parse(l.broker)
	if err != nil {
		return nil, err
	}
	databaseURL, err := url.Parse(l.database)
	if err != nil {
		return nil, err
	}
	if w.broker, err = newProxy(brokerURL.Host); err != nil {
		return nil, err
	}
	if w.database, err = newProxy(databaseURL.Host); err != nil {
		return nil, err
	}
	brokerURL.Host, databaseURL.Host = w.broker.addr(), w.database.addr()
	password, _ := databaseURL.User.Password()
	host, port, _ := strings.Cut(databaseURL.Host, ":")
	w.environ = []string{
		"PATH=" + filepath.Dir(l.config.programs.ledger) + ":" + os.Getenv("PATH"),
		"HOME=" + l.folder,
		"CELERY_BROKER_URL=" + brokerURL.String() + fmt.Sprintf("?heartbeat=%d", brokerHeartbeat/time.Second),
		"CELERY_RESULT_BACKEND=db+postgresql://" + strings.TrimPrefix(databaseURL.String(), "postgres://"),
		"POSTGRES_HOST=" + host, "POSTGRES_PORT=" + port,
		"POSTGRES_USER=" + databaseURL.User.Username(), "POSTGRES_PASSWORD=" + password,
		"POSTGRES_DB=" + strings.TrimPrefix(databaseURL.Path, "/"),
		"ORCHESTRATOR_CELERY_QUEUE=" + l.queue,
		"WORKSPACE_ROOT=" + l.workspace,
		"MM_ORCHESTRATOR_ALLOWED_PROGRAMS=" + filepath.Base(l.config.programs.ledger),
		"MM_ORCHESTRATOR_LISTEN=",
		"MM_ORCHESTRATOR_QUIET_PERIOD=100ms",
		fmt.Sprintf("MM_ORCHESTRATOR_SHUTDOWN_GRACE=%s", shutdownGrace),
		"ORCHESTRATOR_HOSTNAME=orchestrator@" + name,
		// The ledger shows a rollback only by the plan's commands.
		"MM_ORCHESTRATOR_ROLLBACK=commands",
		"DOCKER_HOST=unix://" + filepath.Join(l.folder, "no-docker.sock"),
		"GOMAXPROCS=2",
		"MM_CHAOS_DIR=" + l.traps,
	}
	return w, nil
}

// run runs another command of the program with the worker's environment.
func (w *workerProcess) run(ctx context.Context, args ...string) error {
	command := exec.CommandContext(ctx, w.lane.config.programs.worker, args...)
	command.Env, command.Dir = w.environ, w.lane.workspace
	if text, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("mm-orchestrator %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(text))
	}
	return nil
}

// start starts a process; it does not wait until it consumes.
func (w *workerProcess) start() error {
	if w.alive() {
		return nil
	}
	if w.log == nil {
		log, err := os.OpenFile(w.logPath(), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		w.log = log
	}
	command := exec.Command(w.lane.config.programs.worker, "worker")
	command.Env, command.Dir = append(slices.Clip(w.environ), w.settings...), w.lane.workspace
	command.Stdout, command.Stderr = w.log, w.log
	devenv.OwnGroup(command, syscall.SIGKILL)
	if err := command.Start(); err != nil {
		return err
	}
	exited := make(chan struct{})
	w.command, w.exited = command, exited
	go func() {
		_ = command.Wait()
		close(exited)
	}()
	return nil
}

func (w *workerProcess) logPath() string { return filepath.Join(w.lane.folder, w.name+".log") }

func (w *workerProcess) alive() bool {
	if w.command == nil {
		return false
	}
	select {
	case <-w.exited:
		return false
	default:
		return true
	}
}

func (w *workerProcess) pid() int {
	if w.command == nil {
		return 0
	}
	return w.command.Process.Pid
}

// kill sends SIGKILL to the process. Its commands must end by themselves.
func (w *workerProcess) kill() {
	if w.alive() {
		_ = w.command.Process.Kill()
		<-w.exited
	}
}

// terminate sends SIGTERM to the process.
func (w *workerProcess) terminate() error {
	if err := w.command.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// stop ends the process by SIGTERM and waits for it.
func (w *workerProcess) stop() error {
	if !w.alive() {
		return nil
	}
	if err := w.terminate(); err != nil {
		return err
	}
	select {
	case <-w.exited:
		return nil
	case <-time.After(waitTimeout):
		w.kill()
		return fmt.Errorf("worker %s (pid %d) did not end within %s of SIGTERM", w.name, w.pid(), waitTimeout)
	}
}

func (w *workerProcess) close() {
	w.kill()
	w.broker.close()
	w.database.close()
	if w.log != nil {
		w.log.Close()
	}
}
