package devenv

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// OwnServer is a private RabbitMQ or PostgreSQL, which the caller may configure,
// stop and kill; the shared servers must not be touched. It keeps its data until
// Close. Its methods must not be called concurrently.
type OwnServer struct {
	// URL is amqp://user:password@127.0.0.1:port, whose vhost is "/", or
	// postgres://user:password@127.0.0.1:port/postgres; the same after a
	// restart.
	URL string

	name    string
	answers func(context.Context) error
	limit   time.Duration // limit on the time from start to the first answer
	host    serverHost
	close   []func() error // last first
}

// serverHost runs a server: as a child process or as a container.
type serverHost interface {
	// start returns a channel that is closed once the server has ended. The
	// channel is no longer watched after ctx ends.
	start(context.Context) (exited <-chan struct{}, err error)
	stop() error
	kill() error
	// explain adds the end of the server's log to an error.
	explain(error) error
}

// endServer is the limit on an orderly stop of a server.
const endServer = 30 * time.Second

// StartOwnBroker starts a RabbitMQ with these settings of its application
// "rabbit", such as consumer_timeout, and returns once it answers, usually
// after 6 s. Its version is that of the shared broker: it comes from the image
// of that broker if that is a container, otherwise from the installed programs,
// otherwise from the image of the shipped compose file. The caller must call
// Close.
func StartOwnBroker(ctx context.Context, settings map[string]int) (*OwnServer, error) {
	var arguments []string
	for name, value := range settings {
		arguments = append(arguments, fmt.Sprintf("-rabbit %s %d", name, value))
	}
	sort.Strings(arguments)
	s := &OwnServer{name: "RabbitMQ", limit: brokerLimit}
	script := findRabbitMQ()
	var err error
	if os.Getenv(EnvBrokerImage) == "" && script != "" {
		err = s.brokerProcess(script, strings.Join(arguments, " "))
	} else {
		err = s.brokerContainer(strings.Join(arguments, " "))
	}
	return s.first(ctx, err)
}

// StartOwnDatabase starts a PostgreSQL that syncs commits to disk, and returns
// once it answers, usually after 2 s. Its source is chosen as in
// StartOwnBroker. The caller must call Close.
func StartOwnDatabase(ctx context.Context) (*OwnServer, error) {
	s := &OwnServer{name: "PostgreSQL", limit: databaseLimit}
	s.answers = func(ctx context.Context) error {
		conn, err := pgx.Connect(ctx, s.URL)
		if err != nil {
			return err
		}
		return conn.Close(ctx)
	}
	programs := findPostgreSQL()
	var err error
	if os.Getenv(EnvDatabaseImage) == "" && programs != "" {
		err = s.databaseProcess(ctx, programs)
	} else {
		err = s.databaseContainer()
	}
	return s.first(ctx, err)
}

// first starts the server for the first time, and removes it on an error.
func (s *OwnServer) first(ctx context.Context, err error) (*OwnServer, error) {
	if err == nil {
		err = s.Start(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("private %s: %w", s.name, errors.Join(err, s.Close()))
	}
	return s, nil
}

// Start starts the server, also after Stop or Kill, and returns within 20 ms of
// its first answer.
func (s *OwnServer) Start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.limit)
	defer cancel()
	exited, err := s.host.start(ctx)
	if err != nil {
		return fmt.Errorf("%s does not start: %w", s.name, err)
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		try, done := context.WithTimeout(ctx, 5*time.Second)
		err := s.answers(try)
		done()
		if err == nil {
			return nil
		}
		select {
		case <-exited:
			return s.host.explain(fmt.Errorf("%s has ended: %w", s.name, err))
		case <-ctx.Done():
			return s.host.explain(fmt.Errorf("%s does not answer: %w", s.name, err))
		case <-tick.C:
		}
	}
}

// Stop stops the server in an orderly way: the server closes its connections
// and keeps all durable data. Stop waits for its end.
func (s *OwnServer) Stop() error { return s.host.stop() }

// Kill ends the server as a power failure would.
func (s *OwnServer) Kill() error { return s.host.kill() }

// PID is the process of the server, whose child processes belong to it, or 0 if it
// runs in a container.
func (s *OwnServer) PID() int {
	h, ok := s.host.(*processHost)
	if !ok || h.server == nil {
		return 0
	}
	return h.server.cmd.Process.Pid
}

// Close ends the server and removes its data.
func (s *OwnServer) Close() error {
	var failures []error
	for _, close := range slices.Backward(s.close) {
		failures = append(failures, close())
	}
	s.close = nil
	return errors.Join(failures...)
}

// brokerGreets checks that the broker sends the first frame of the protocol. An
// accepted connection proves nothing: docker accepts connections on a published
// port before the broker listens.
func brokerGreets(ctx context.Context, address string) error {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	_ = conn.SetDeadline(deadline)
	if _, err := conn.Write([]byte("AMQP\x00\x00\x09\x01")); err != nil {
		return err
	}
	_, err = io.ReadFull(conn, make([]byte, 8)) // connection.start begins
	return err
}

func (s *OwnServer) brokerAt(port int, user *url.Userinfo) {
	address := url.URL{Scheme: "amqp", User: user, Host: fmt.Sprintf("127.0.0.1:%d", port)}
	s.URL = address.String()
	s.answers = func(ctx context.Context) error { return brokerGreets(ctx, address.Host) }
}

// scratch makes a folder that Close removes.
func (s *OwnServer) scratch() (string, error) {
	dir, err := scratchFolder()
	if err == nil {
		s.close = append(s.close, func() error { return os.RemoveAll(dir) })
	}
	return dir, err
}

func (s *OwnServer) brokerProcess(script, arguments string) error {
	dir, err := s.scratch()
	if err != nil {
		return err
	}
	// No plugins: they take long to start and need a port each.
	n, err := newNode(script, filepath.Join(dir, "rabbitmq"), "[].\n", arguments)
	if err != nil {
		return err
	}
	// With this variable the script execs the broker instead of starting it as
	// a child, so that signals reach the broker.
	n.environment = append(n.environment, "RUNNING_UNDER_SYSTEMD=true")
	s.brokerAt(n.amqp, n.url().User)

	mapper, err := childOf(n.mapper(), syscall.SIGTERM)
	if err != nil {
		return err
	}
	s.close = append(s.close, func() error { return mapper.end(syscall.SIGKILL) })
	if err := until(context.Background(), 10*time.Second, mapper.exited, func(ctx context.Context) error { return dial(ctx, n.epmd) }); err != nil {
		return fmt.Errorf("epmd: %w\n%s", err, mapper.output())
	}
	s.runProcess(n.server, syscall.SIGTERM)
	return nil
}

func (s *OwnServer) databaseProcess(ctx context.Context, programs string) error {
	account, err := unprivileged("postgres") // it refuses to run as root
	if err != nil {
		return err
	}
	dir, err := s.scratch()
	if err != nil {
		return err
	}
	home := filepath.Join(dir, "postgres")
	if err := ownFolder(home, account); err != nil {
		return err
	}
	command := func(program string, args ...string) *exec.Cmd {
		cmd := exec.Command(filepath.Join(programs, program), append([]string{"-D", filepath.Join(home, "data")}, args...)...)
		cmd.Env, cmd.Dir = []string{"PATH=" + programs + ":/usr/bin:/bin", "HOME=" + home, "LANG=C.UTF-8"}, home
		runAs(cmd, account)
		return cmd
	}
	if _, err := captured(ctx, command("initdb", "-U", "mm", "-A", "trust", "-E", "UTF8", "--no-locale", "-N")); err != nil {
		return err
	}
	ports, err := FreePorts(1)
	if err != nil {
		return err
	}
	s.URL = databaseURL(ports[0], "trusted")
	s.runProcess(func() *exec.Cmd {
		return command("postgres", "-p", strconv.Itoa(ports[0]), "-c", "listen_addresses=127.0.0.1",
			"-c", "unix_socket_directories=", "-c", "shared_buffers=32MB")
	}, syscall.SIGINT) // "fast": ends sessions, where SIGTERM would wait for them
	return nil
}

// processHost runs a server as a child process.
type processHost struct {
	command    func() *exec.Cmd
	stopSignal syscall.Signal
	server     *child
}

func (s *OwnServer) runProcess(command func() *exec.Cmd, stopSignal syscall.Signal) {
	h := &processHost{command: command, stopSignal: stopSignal}
	s.host = h
	s.close = append(s.close, h.kill) // an orderly stop is not needed: Close deletes the data
}

func (h *processHost) start(context.Context) (exited <-chan struct{}, err error) {
	server, err := childOf(h.command(), h.stopSignal)
	if err != nil {
		return nil, err
	}
	h.server = server
	return server.exited, nil
}

func (h *processHost) stop() error { return h.end(h.stopSignal) }

func (h *processHost) kill() error { return h.end(syscall.SIGKILL) }

func (h *processHost) end(signal syscall.Signal) error {
	if h.server == nil {
		return nil
	}
	return h.server.end(signal)
}

func (h *processHost) explain(err error) error {
	return fmt.Errorf("%w; its log ends:\n%s", err, lastLines(h.server.output()))
}

func (s *OwnServer) brokerContainer(arguments string) error {
	image := cmp.Or(os.Getenv(EnvBrokerImage), os.Getenv("RABBITMQ_IMAGE"), rabbitMQImage.official)
	password := randomHex()
	// The host name is part of the node name, and thus of the data folder's.
	port, err := s.runContainer(image, 5672, "--hostname", "own",
		"--env", "RABBITMQ_DEFAULT_USER=mm", "--env", "RABBITMQ_DEFAULT_PASS="+password,
		"--env", "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="+arguments)
	s.brokerAt(port, url.UserPassword("mm", password))
	return err
}

func (s *OwnServer) databaseContainer() error {
	image := cmp.Or(os.Getenv(EnvDatabaseImage), os.Getenv("POSTGRES_IMAGE"), postgresImage.official)
	port, err := s.runContainer(image, 5432,
		"--env", "POSTGRES_USER=mm", "--env", "POSTGRES_PASSWORD=trusted", "--env", "POSTGRES_DB=postgres")
	s.URL = databaseURL(port, "trusted")
	return err
}

// containerHost runs a server in a container.
type containerHost struct{ name string }

// runContainer creates the container and returns the host's port that is
// published for the inner one.
func (s *OwnServer) runContainer(image string, inside int, arguments ...string) (port int, err error) {
	ports, err := FreePorts(1)
	if err != nil {
		return 0, err
	}
	h := containerHost{name: "mm-devenv-own-" + randomHex()}
	s.host = h
	s.close = append(s.close, func() error { return h.docker("rm", "--force", "--volumes", h.name) })
	arguments = append(arguments, "--name", h.name, "--label", "mm-orchestrator.devenv=own", "--publish", fmt.Sprintf("127.0.0.1:%d:%d", ports[0], inside))
	if err := h.docker(append(append([]string{"create"}, arguments...), image)...); err != nil {
		return 0, fmt.Errorf("it is not installed in the wanted version, and cannot run as a container: %w", err)
	}
	return ports[0], nil
}

func (h containerHost) docker(args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_, err := output(ctx, "docker", args...)
	return err
}

func (h containerHost) start(ctx context.Context) (exited <-chan struct{}, err error) {
	if err := h.docker("start", h.name); err != nil {
		return nil, err
	}
	return containerExited(ctx, h.name), nil
}

func (h containerHost) stop() error {
	return h.docker("stop", "--time", strconv.Itoa(int(endServer/time.Second)), h.name)
}

func (h containerHost) kill() error { return h.docker("kill", h.name) }

func (h containerHost) explain(err error) error { return explainContainer(h.name, err) }

// child is a server in a process group of its own. On Linux the kernel sends it
// its stop signal when this process dies.
type child struct {
	cmd    *exec.Cmd
	exited chan struct{}

	mu  sync.Mutex // guards log
	log tail
}

func childOf(cmd *exec.Cmd, stopSignal syscall.Signal) (*child, error) {
	OwnGroup(cmd, stopSignal)
	c := &child{cmd: cmd, exited: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = c, c
	cmd.WaitDelay = endLimit // Erlang's helper processes keep the output open a little longer
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		_ = cmd.Wait() // the exit status after a signal says nothing
		close(c.exited)
	}()
	return c, nil
}

// Write receives the server's output.
func (c *child) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.log.Write(b)
}

func (c *child) output() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(bytes.TrimSpace(c.log.bytes))
}

// end sends the signal, later SIGKILL, and returns when the server has ended.
func (c *child) end(signal syscall.Signal) error {
	select {
	case <-c.exited:
		return nil
	default:
	}
	pid := c.cmd.Process.Pid
	if signal == syscall.SIGKILL {
		pid = -pid // all of its processes at the same moment
	}
	_ = syscall.Kill(pid, signal)
	select {
	case <-c.exited:
		_ = syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL) // its child processes
		return nil
	case <-time.After(endServer):
		_ = syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL)
		<-c.exited
		return fmt.Errorf("had to be killed %s after %v; its log ends:\n%s", endServer, signal, lastLines(c.output()))
	}
}
