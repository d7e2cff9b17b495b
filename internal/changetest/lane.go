package changetest

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
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// queue and exchange have MoonMind's names.
const (
	queue    = "orchestrator.run"
	exchange = "moonmind.jobs"
)

// waitTimeout bounds every wait for the worker. An engine on a busy machine can take
// a minute for what it does in a second otherwise.
const waitTimeout = 5 * time.Minute

// Programs are the paths of the programs that lanes run.
type Programs struct {
	// Worker is mm-orchestrator, Command is package command, Service that of the
	// containers, Compose a docker-compose program.
	Worker, Command, Service, Compose string
}

// Build builds the programs into a folder.
func Build(ctx context.Context, module, folder, compose string) (Programs, error) {
	p, err := BuildTools(ctx, module, folder, compose)
	p.Worker = filepath.Join(folder, "mm-orchestrator")
	return p, errors.Join(err, goBuild(ctx, module, p.Worker, "./cmd/mm-orchestrator"))
}

// BuildTools builds the programs but the worker.
func BuildTools(ctx context.Context, module, folder, compose string) (Programs, error) {
	p := Programs{Command: filepath.Join(folder, program), Service: filepath.Join(folder, "service"), Compose: compose}
	return p, errors.Join(goBuild(ctx, module, p.Command, "./internal/changetest/command/program"), goBuild(ctx, module, p.Service, "./internal/sample/service"))
}

func goBuild(ctx context.Context, module, out, of string) error {
	command := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-ldflags=-s -w", "-o", out, of)
	command.Dir = module
	command.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s: %w: %s", of, err, bytes.TrimSpace(text))
	}
	return nil
}

// A Lane runs one case after the other.
type Lane struct {
	programs Programs
	folder   string
	project  *Project
	engine   *Engine

	broker, database string
	remove           []func(context.Context) error
	pool             *pgxpool.Pool
	connection       *amqp.Connection
	channel          *amqp.Channel
	worker           *worker
	// docker is the path of the real program.
	docker string
	// isUp says that the containers are as they must be before a case.
	isUp bool
	// broken says that a run has not ended: it still has the work tree.
	broken bool
}

// Broken says that the lane can run no further case.
func (l *Lane) Broken() bool { return l.broken }

// NewLane makes a lane below folder. name is part of the compose project's name, and
// must differ from that of other lanes on the machine.
func NewLane(ctx context.Context, programs Programs, folder, name string) (l *Lane, err error) {
	l = &Lane{programs: programs, folder: folder}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close(context.WithoutCancel(ctx)))
		}
	}()
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return l, err
	}
	if l.engine, err = OpenEngine(); err != nil {
		return l, err
	}
	service, err := os.ReadFile(programs.Service)
	if err != nil {
		return l, err
	}
	if l.project, err = NewProject(ctx, l.engine, folder, name, programs.Compose, service); err != nil {
		return l, err
	}
	for address, make := range map[*string]func(context.Context) (string, func(context.Context) error, error){
		&l.broker: devenv.NewVhost, &l.database: devenv.NewDatabase,
	} {
		made, remove, err := make(ctx)
		if err != nil {
			return l, err
		}
		*address = made
		l.remove = append(l.remove, remove)
	}
	settings, err := pgxpool.ParseConfig(l.database)
	if err != nil {
		return l, err
	}
	settings.MaxConns = 2
	if l.pool, err = pgxpool.NewWithConfig(ctx, settings); err != nil {
		return l, err
	}
	if err := l.connect(); err != nil {
		return l, err
	}
	environ, err := l.environment()
	if err != nil {
		return l, err
	}
	if err := os.MkdirAll(l.project.Workspace, 0o755); err != nil {
		return l, err
	}
	l.worker = &worker{program: programs.Worker, environ: environ, folder: l.project.Workspace, logPath: filepath.Join(folder, "worker.log")}
	if err := l.worker.run(ctx, "migrate", "--shared-tables"); err != nil {
		return l, err
	}
	return l, nil
}

// connect opens the connection to the broker and declares the queue as producers do.
func (l *Lane) connect() (err error) {
	if l.connection, err = amqp.Dial(l.broker); err != nil {
		return err
	}
	if l.channel, err = l.connection.Channel(); err != nil {
		return err
	}
	if err := l.channel.ExchangeDeclare(exchange, "direct", true, false, false, false, nil); err != nil {
		return err
	}
	if _, err := l.channel.QueueDeclare(queue, true, false, false, false, nil); err != nil {
		return err
	}
	if err := l.channel.QueueBind(queue, queue, exchange, false, nil); err != nil {
		return err
	}
	return l.channel.Confirm(false)
}

func (l *Lane) trapFolder() string { return filepath.Join(l.folder, "traps") }

// environment makes the folder of the programs that stand before git and docker, and
// returns the worker's environment.
func (l *Lane) environment() ([]string, error) {
	bin := filepath.Join(l.folder, "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return nil, err
	}
	for _, name := range []string{"git", "docker"} {
		real, err := exec.LookPath(name)
		if err != nil {
			return nil, err
		}
		if name == "docker" {
			l.docker = real
		}
		// Without a trap, the real program costs nothing more.
		script := fmt.Sprintf("#!/bin/sh\n[ -e '%s' ] || exec '%s' \"$@\"\nexec '%s' intercept '%s' %s '%s' \"$@\"\n",
			filepath.Join(l.trapFolder(), "trap-0.json"), real, l.programs.Command, l.trapFolder(), name, real)
		if err := writeFile(filepath.Join(bin, name), script, 0o755); err != nil {
			return nil, err
		}
	}
	if err := os.Symlink(l.programs.Command, filepath.Join(bin, program)); err != nil {
		return nil, err
	}
	broker, err := url.Parse(l.broker)
	if err != nil {
		return nil, err
	}
	server, err := url.Parse(l.database)
	if err != nil {
		return nil, err
	}
	password, _ := server.User.Password()
	environ := append([]string{
		"PATH=" + bin + ":" + os.Getenv("PATH"),
		"HOME=" + l.folder,
		"CELERY_BROKER_URL=" + broker.String(),
		"CELERY_RESULT_BACKEND=db+postgresql://" + strings.TrimPrefix(server.String(), "postgres://"),
		"POSTGRES_HOST=" + server.Hostname(), "POSTGRES_PORT=" + server.Port(),
		"POSTGRES_USER=" + server.User.Username(), "POSTGRES_PASSWORD=" + password,
		"POSTGRES_DB=" + strings.TrimPrefix(server.Path, "/"),
		"WORKSPACE_ROOT=" + l.project.Workspace,
		"MM_ORCHESTRATOR_ALLOWED_PROGRAMS=" + program,
		"MM_ORCHESTRATOR_LISTEN=",
		"MM_ORCHESTRATOR_SHUTDOWN_GRACE=5s",
		"MM_ORCHESTRATOR_QUIET_PERIOD=1s", // the services of the cases end at once or not at all
		"ORCHESTRATOR_HOSTNAME=orchestrator@" + l.project.Name,
		"GOMAXPROCS=2",
	}, l.project.Environment()...)
	if host, ok := os.LookupEnv("DOCKER_HOST"); ok {
		environ = append(environ, "DOCKER_HOST="+host)
	}
	return environ, nil
}

// Close ends everything of the lane and keeps its files.
func (l *Lane) Close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), waitTimeout)
	defer cancel()
	var failures []error
	if l.worker != nil {
		failures = append(failures, l.worker.stop())
	}
	if l.pool != nil {
		l.pool.Close()
	}
	if l.connection != nil {
		l.connection.Close()
	}
	if l.project != nil {
		failures = append(failures, l.project.Close(ctx))
	}
	if l.engine != nil {
		l.engine.Close()
	}
	for _, remove := range l.remove {
		failures = append(failures, remove(ctx))
	}
	return errors.Join(failures...)
}

// A worker is a worker whose process is started again when it was killed, as compose
// does with a container.
type worker struct {
	program string
	environ []string
	folder  string
	logPath string
	// settings are additional variables for the case.
	settings []string

	mu      sync.Mutex
	command *exec.Cmd
	kept    chan struct{} // closed when nobody starts it any more
	stopped bool
	// ends counts the processes that have ended.
	ends int
}

// run runs another command of the program.
func (w *worker) run(ctx context.Context, args ...string) error {
	command := exec.CommandContext(ctx, w.program, args...)
	command.Env, command.Dir = w.environ, w.folder
	if text, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("mm-orchestrator %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(text))
	}
	return nil
}

// use sets additional variables. It stops a worker that has others.
func (w *worker) use(settings ...string) error {
	if slices.Equal(settings, w.settings) {
		return nil
	}
	err := w.stop()
	w.settings = settings
	return err
}

// start starts the worker, and again whenever it ends, until stop.
func (w *worker) start() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.kept != nil {
		return nil
	}
	log, err := os.OpenFile(w.logPath, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	w.kept, w.stopped = make(chan struct{}), false
	if err := w.launch(log); err != nil {
		log.Close()
		w.kept = nil
		return err
	}
	go func() {
		defer close(w.kept)
		defer log.Close()
		for {
			_ = w.command.Wait()
			w.mu.Lock()
			w.ends++
			if w.stopped || w.launch(log) != nil {
				w.mu.Unlock()
				return
			}
			w.mu.Unlock()
		}
	}()
	return nil
}

func (w *worker) launch(log *os.File) error {
	command := exec.Command(w.program, "worker")
	// Not the work tree, which is made anew for each case.
	command.Env, command.Dir = append(slices.Clip(w.environ), w.settings...), filepath.Dir(w.logPath)
	command.Stdout, command.Stderr = log, log
	devenv.OwnGroup(command, syscall.SIGKILL)
	w.command = command
	return command.Start()
}

// kill sends SIGKILL to the process. Another one starts at once.
func (w *worker) kill() {
	w.mu.Lock()
	defer w.mu.Unlock()
	_ = w.command.Process.Kill()
}

// deaths returns how many processes have ended.
func (w *worker) deaths() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ends
}

// stop ends the process by SIGTERM and waits for it.
func (w *worker) stop() error {
	w.mu.Lock()
	if w.kept == nil {
		w.mu.Unlock()
		return nil
	}
	w.stopped = true
	_ = w.command.Process.Signal(syscall.SIGTERM)
	kept, process := w.kept, w.command.Process
	w.mu.Unlock()
	select {
	case <-kept:
	case <-time.After(30 * time.Second):
		_ = process.Kill()
		<-kept
		return errors.New("the worker did not end on SIGTERM")
	}
	w.mu.Lock()
	w.kept = nil
	w.mu.Unlock()
	return nil
}

// until polls, because nothing tells of what happens in the worker or the engine.
func until(ctx context.Context, what string, done func() (bool, error)) error {
	deadline := time.Now().Add(waitTimeout)
	for {
		ok, err := done()
		if err != nil {
			return fmt.Errorf("waiting for %s: %w", what, err)
		}
		if ok {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("waited %s for %s", waitTimeout, what)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(10 * time.Millisecond):
		}
	}
}
