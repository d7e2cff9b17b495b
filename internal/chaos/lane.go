package chaos

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// queue and exchange have MoonMind's names.
const (
	queue    = "orchestrator.run"
	exchange = "moonmind.jobs"
)

// The files through which workers and harness communicate. Package faultpoint has
// the same names, under the build tag chaos.
const (
	traceFile  = "trace"
	trapFile   = "trap"
	firedFile  = "fired"
	resumeFile = "resume"
)

// harnessName is the application_name of the harness's database sessions.
const harnessName = "chaos-harness"

// A lane runs one trial after the other. It has a virtual host, a database, a
// workspace and workers of its own.
type lane struct {
	config    *Config
	name      string
	folder    string // all files of the lane
	workspace string
	artifacts string
	traps     string // the folder of the trap files
	ledger    string

	broker, database string
	own              *ownServers // nil if the servers are shared
	servers          string      // their names and versions
	remove           []func(context.Context) error
	pool             *pgxpool.Pool
	conn             *amqp.Connection
	channel          *amqp.Channel

	// workers are two. The second does not run in trials without a standby. A rush
	// adds more.
	workers []*workerProcess
	// queue is that of the workers.
	queue string

	// trial is the one that runs.
	trial Trial
	// real is nil before the first trial of kind Real.
	real *realProject
	// spec is nil before the first trial of the Spec workflow.
	spec     *specLane
	service  *service
	trace    traceReader
	trapsSet int64
}

// newLane makes a lane and starts no worker. own gives it servers of its own.
func newLane(ctx context.Context, config *Config, name string, own bool) (l *lane, err error) {
	l = &lane{config: config, name: name, folder: filepath.Join(config.Folder, name), queue: queue}
	defer func() {
		if err != nil {
			l.close(context.WithoutCancel(ctx))
		}
	}()
	l.workspace, l.artifacts = filepath.Join(l.folder, "workspace"), filepath.Join(l.folder, "artifacts")
	l.traps, l.ledger = filepath.Join(l.folder, "traps"), filepath.Join(l.folder, "ledger")
	for _, folder := range []string{l.artifacts, l.traps} {
		if err := os.MkdirAll(folder, 0o755); err != nil {
			return l, err
		}
	}
	l.trace.path = filepath.Join(l.traps, traceFile)
	if err := makeWorkspace(ctx, l.workspace); err != nil {
		return l, err
	}
	servers := l.useSharedServers
	if own {
		servers = l.startOwnServers
	}
	if err := servers(ctx); err != nil {
		return l, err
	}
	settings, err := pgxpool.ParseConfig(l.database)
	if err != nil {
		return l, err
	}
	settings.MaxConns = 2
	settings.ConnConfig.RuntimeParams["application_name"] = harnessName
	if l.pool, err = pgxpool.NewWithConfig(ctx, settings); err != nil {
		return l, err
	}
	if l.service, err = newService(); err != nil {
		return l, err
	}
	for i := range 2 {
		w, err := l.newWorker(fmt.Sprintf("%s-%c", name, 'a'+i))
		if err != nil {
			return l, err
		}
		l.workers = append(l.workers, w)
	}
	if err := l.workers[0].run(ctx, "migrate", "--shared-tables"); err != nil {
		return l, err
	}
	if err := l.connect(); err != nil {
		return l, err
	}
	var version string
	if err := l.pool.QueryRow(ctx, `SELECT current_setting('server_version')`).Scan(&version); err != nil {
		return l, err
	}
	version, _, _ = strings.Cut(version, " ")
	l.servers = fmt.Sprintf("RabbitMQ %v, PostgreSQL %s", l.conn.Properties["version"], version)
	return l, nil
}

// useSharedServers gives the lane a virtual host and a database of the shared
// servers, which close removes.
func (l *lane) useSharedServers(ctx context.Context) error {
	for address, make := range map[*string]func(context.Context) (string, func(context.Context) error, error){
		&l.broker: devenv.NewVhost, &l.database: devenv.NewDatabase,
	} {
		made, remove, err := make(ctx)
		if err != nil {
			return err
		}
		*address = made
		l.remove = append(l.remove, remove)
	}
	return nil
}

// makeWorkspace makes a git repository with one commit.
func makeWorkspace(ctx context.Context, folder string) error {
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"init", "--quiet", "--initial-branch=main"},
		{"-c", "user.name=chaos", "-c", "user.email=chaos@localhost", "commit", "--quiet", "--allow-empty", "--message", "start"},
	} {
		command := exec.CommandContext(ctx, "git", args...)
		command.Dir = folder
		command.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null")
		if text, err := command.CombinedOutput(); err != nil {
			return fmt.Errorf("git %v: %w: %s", args, err, text)
		}
	}
	return nil
}

// connect opens the harness's connection to the broker and declares the queue as
// producers do.
func (l *lane) connect() error {
	var err error
	if l.conn, err = amqp.Dial(l.broker); err != nil {
		return err
	}
	if l.channel, err = l.conn.Channel(); err != nil {
		return err
	}
	if err := l.declare(l.queue); err != nil {
		return err
	}
	return l.channel.Confirm(false)
}

func (l *lane) declare(queue string) error {
	if err := l.channel.ExchangeDeclare(exchange, "direct", true, false, false, false, nil); err != nil {
		return err
	}
	if _, err := l.channel.QueueDeclare(queue, true, false, false, false, nil); err != nil {
		return err
	}
	return l.channel.QueueBind(queue, queue, exchange, false, nil)
}

// close ends everything of the lane and keeps its files.
func (l *lane) close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), waitTimeout)
	defer cancel()
	for _, w := range l.workers {
		w.close()
	}
	if l.service != nil {
		l.service.close()
	}
	if l.pool != nil {
		l.pool.Close()
	}
	if l.conn != nil {
		l.conn.Close()
	}
	var failures []error
	if l.own != nil {
		failures = append(failures, l.own.close())
	}
	for _, remove := range l.remove {
		failures = append(failures, remove(ctx))
	}
	return errors.Join(failures...)
}

// runTrialWorkers makes sure that exactly the trial's workers run.
func (l *lane) runTrialWorkers(ctx context.Context, standby bool) error {
	if standby {
		return l.runWorkers(ctx, 2)
	}
	return l.runWorkers(ctx, 1)
}

func (l *lane) runWorkers(ctx context.Context, wanted int) error {
	for i, w := range l.workers {
		change := w.start
		if i >= wanted {
			change = w.stop
		}
		if err := change(); err != nil {
			return err
		}
	}
	return until(ctx, "the workers to consume", func() (bool, error) {
		consumed := true
		for _, queue := range l.queues() {
			state, err := l.channel.QueueDeclarePassive(queue, true, false, false, false, nil)
			if err != nil {
				return false, err
			}
			consumed = consumed && state.Consumers == wanted
		}
		for _, w := range l.workers[:wanted] {
			if !w.alive() {
				return false, fmt.Errorf("worker %s ended: %s", w.name, tail(w.logPath(), 2000))
			}
		}
		return consumed, nil
	})
}

func tail(path string, bytes int) string {
	text, _ := os.ReadFile(path)
	return string(text[max(0, len(text)-bytes):])
}

// waiting returns the number of ready messages in the queues.
func (l *lane) waiting() (n int, err error) {
	for _, queue := range l.queues() {
		state, err := l.channel.QueueDeclarePassive(queue, true, false, false, false, nil)
		if err != nil {
			return n, err
		}
		n += state.Messages
	}
	return n, nil
}

// publish sends a message to the queue and waits for the confirm.
func (l *lane) publish(ctx context.Context, m amqp.Publishing) error {
	return l.publishTo(ctx, l.queue, m)
}

func (l *lane) publishTo(ctx context.Context, queue string, m amqp.Publishing) error {
	confirm, err := l.channel.PublishWithDeferredConfirmWithContext(ctx, "", queue, true, false, m)
	if err != nil {
		return err
	}
	acked, err := confirm.WaitContext(ctx)
	if err == nil && !acked {
		err = errors.New("the broker refused a message")
	}
	return err
}

// trap is package faultpoint's Trap.
type trap struct {
	Point      faultpoint.Point `json:"point"`
	Any        [][]string       `json:"any,omitempty"`
	None       []string         `json:"none,omitempty"`
	Occurrence int              `json:"occurrence,omitempty"`
	Hold       bool             `json:"hold,omitempty"`
	ID         int64            `json:"id"`
}

func (l *lane) set(t trap) error {
	l.trapsSet++
	t.ID = l.trapsSet
	text, err := json.Marshal(t)
	if err != nil {
		return err
	}
	l.clearTraps()
	temporary := filepath.Join(l.traps, "new")
	if err := os.WriteFile(temporary, text, 0o644); err != nil {
		return err
	}
	return os.Rename(temporary, filepath.Join(l.traps, trapFile))
}

// armed says that a trap is set and was not reached.
func (l *lane) armed() bool {
	_, err := os.Stat(filepath.Join(l.traps, trapFile))
	return err == nil
}

func (l *lane) fired() bool {
	_, err := os.Stat(filepath.Join(l.traps, firedFile))
	return err == nil
}

// resume lets a paused process continue, and returns when it does.
func (l *lane) resume(ctx context.Context) error {
	path := filepath.Join(l.traps, resumeFile)
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		return err
	}
	return until(ctx, "the paused worker to continue", func() (bool, error) {
		_, err := os.Stat(path)
		return errors.Is(err, fs.ErrNotExist), nil
	})
}

func (l *lane) clearTraps() {
	for _, name := range []string{trapFile, firedFile, resumeFile} {
		_ = os.Remove(filepath.Join(l.traps, name))
	}
}

// until polls. The pause is short, because the waiting times are measured.
func until(ctx context.Context, what string, done func() (bool, error)) error {
	return untilWithin(ctx, waitTimeout, what, done)
}

// untilOfRun is until for what the current trial's run does.
func (l *lane) untilOfRun(ctx context.Context, what string, done func() (bool, error)) error {
	if l.trial.Kind == Real {
		return untilWithin(ctx, realTimeout, what, func() (bool, error) {
			if err := l.approvePaused(ctx); err != nil {
				return false, err
			}
			return done()
		})
	}
	if l.trial.Kind.isSpec() {
		return untilWithin(ctx, specTimeout, what, done)
	}
	return until(ctx, what, done)
}

func untilWithin(ctx context.Context, limit time.Duration, what string, done func() (bool, error)) error {
	deadline := time.Now().Add(limit)
	for {
		ok, err := done()
		if err != nil {
			return fmt.Errorf("waiting for %s: %w", what, err)
		}
		if ok {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("waited %s for %s without success", limit, what)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// service is the service that runs repair: verify requests its health.
type service struct {
	server   *http.Server
	listener net.Listener
	done     chan struct{}
}

func newService() (*service, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &service{listener: listener, done: make(chan struct{})}
	mux := http.NewServeMux()
	mux.HandleFunc("/healthy", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) })
	mux.HandleFunc("/unhealthy", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) })
	s.server = &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go func() {
		defer close(s.done)
		_ = s.server.Serve(listener)
	}()
	return s, nil
}

func (s *service) url(path string) string { return "http://" + s.listener.Addr().String() + path }

func (s *service) close() {
	_ = s.server.Close()
	<-s.done
}
