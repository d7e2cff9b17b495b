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

// OwnServer is a RabbitMQ or PostgreSQL of the caller's own, which may be
// configured, stopped and killed: the ones that everybody shares must stay as
// they are. It keeps its data until Close. Its methods are called one at a
// time.
type OwnServer struct {
	// URL is amqp://user:password@127.0.0.1:port, whose vhost is "/", or
	// postgres://user:password@127.0.0.1:port/postgres; the same after a
	// restart.
	URL string

	name    string
	answers func(context.Context) error
	limit   time.Duration // for it to answer
	host    serverHost
	close   []func() error // last first
}

// serverHost is what a server runs in.
type serverHost interface {
	// start returns a channel that is closed when the server has ended, if that
	// is before ctx ends.
	start(context.Context) (gone <-chan struct{}, err error)
	stop() error
	kill() error
	// explain adds what the server said to an error.
	explain(error) error
}

// endServer is how long a server has to end as its operator asks it to.
const endServer = 30 * time.Second

// StartOwnBroker starts a RabbitMQ with these settings of its application
// "rabbit" (consumer_timeout, for instance) and returns when it answers,
// usually after 6 s. It is of the same version as the one that all tests share:
// from its image if that is a container, else the installed programs, else the
// image of the shipped compose file. Close it.
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

// StartOwnDatabase starts a PostgreSQL that syncs to disk what it commits, and
// returns when it answers, usually after 2 s. Where it comes from is as with
// StartOwnBroker. Close it.
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

// first starts what was prepared, or removes what there is of it.
func (s *OwnServer) first(ctx context.Context, err error) (*OwnServer, error) {
	if err == nil {
		err = s.Start(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("%s of one's own: %w", s.name, errors.Join(err, s.Close()))
	}
	return s, nil
}

// Start starts the server, again after Stop or Kill, and returns within 20 ms
// of its answering.
func (s *OwnServer) Start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.limit)
	defer cancel()
	gone, err := s.host.start(ctx)
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
		case <-gone:
			return s.host.explain(fmt.Errorf("%s has ended: %w", s.name, err))
		case <-ctx.Done():
			return s.host.explain(fmt.Errorf("%s does not answer: %w", s.name, err))
		case <-tick.C:
		}
	}
}

// Stop ends the server as its operator does: it ends its connections, and
// loses nothing that is meant to last. It returns when it has ended.
func (s *OwnServer) Stop() error { return s.host.stop() }

// Kill ends the server as a power cut would.
func (s *OwnServer) Kill() error { return s.host.kill() }

// Close ends the server and removes its data.
func (s *OwnServer) Close() error {
	var failures []error
	for _, close := range slices.Backward(s.close) {
		failures = append(failures, close())
	}
	s.close = nil
	return errors.Join(failures...)
}

// brokerGreets wants the first frame of the protocol: a port that docker has
// published takes connections before the broker does.
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
	// No plugins: they take longest to start, and a free port each.
	n, err := newNode(script, filepath.Join(dir, "rabbitmq"), "[].\n", arguments)
	if err != nil {
		return err
	}
	// Then the script becomes the broker instead of its parent, so that
	// signals reach it.
	n.environment = append(n.environment, "RUNNING_UNDER_SYSTEMD=true")
	s.brokerAt(n.amqp, n.url().User)

	mapper, err := childOf(n.mapper(), syscall.SIGTERM)
	if err != nil {
		return err
	}
	s.close = append(s.close, func() error { return mapper.end(syscall.SIGKILL) })
	if err := until(context.Background(), 10*time.Second, mapper.gone, func(ctx context.Context) error { return dial(ctx, n.epmd) }); err != nil {
		return fmt.Errorf("epmd: %w\n%s", err, mapper.said())
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
	command  func() *exec.Cmd
	farewell syscall.Signal
	server   *child
}

func (s *OwnServer) runProcess(command func() *exec.Cmd, farewell syscall.Signal) {
	h := &processHost{command: command, farewell: farewell}
	s.host = h
	s.close = append(s.close, h.kill) // its data goes anyway
}

func (h *processHost) start(context.Context) (gone <-chan struct{}, err error) {
	server, err := childOf(h.command(), h.farewell)
	if err != nil {
		return nil, err
	}
	h.server = server
	return server.gone, nil
}

func (h *processHost) stop() error { return h.end(h.farewell) }

func (h *processHost) kill() error { return h.end(syscall.SIGKILL) }

func (h *processHost) end(signal syscall.Signal) error {
	if h.server == nil {
		return nil
	}
	return h.server.end(signal)
}

func (h *processHost) explain(err error) error {
	return fmt.Errorf("%w; its log ends:\n%s", err, lastLines(h.server.said()))
}

func (s *OwnServer) brokerContainer(arguments string) error {
	image := cmp.Or(os.Getenv(EnvBrokerImage), os.Getenv("RABBITMQ_IMAGE"), rabbitMQImage.official)
	password := randomHex()
	// The host's name is the node's, and with it the folder of the data.
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

// runContainer makes the container and returns the host's port that leads to
// its own.
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
		return 0, fmt.Errorf("it is not installed or another one is asked for, and cannot be had as a container: %w", err)
	}
	return ports[0], nil
}

func (h containerHost) docker(args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_, err := output(ctx, "docker", args...)
	return err
}

func (h containerHost) start(ctx context.Context) (gone <-chan struct{}, err error) {
	if err := h.docker("start", h.name); err != nil {
		return nil, err
	}
	return containerGone(ctx, h.name), nil
}

func (h containerHost) stop() error {
	return h.docker("stop", "--time", strconv.Itoa(int(endServer/time.Second)), h.name)
}

func (h containerHost) kill() error { return h.docker("kill", h.name) }

func (h containerHost) explain(err error) error { return explainContainer(h.name, err) }

// child is a server in a process group of its own, which on Linux also gets
// its farewell signal when this process dies.
type child struct {
	cmd  *exec.Cmd
	gone chan struct{}

	mu  sync.Mutex // guards log
	log tail
}

func childOf(cmd *exec.Cmd, farewell syscall.Signal) (*child, error) {
	ownGroup(cmd)
	dieWithUs(cmd, farewell)
	c := &child{cmd: cmd, gone: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = c, c
	cmd.WaitDelay = endLimit // helpers of Erlang hold the output a moment longer
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		_ = cmd.Wait() // the exit status of a server that we end says nothing
		close(c.gone)
	}()
	return c, nil
}

// Write takes what the server says.
func (c *child) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.log.Write(b)
}

func (c *child) said() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(bytes.TrimSpace(c.log.bytes))
}

// end sends the signal, later SIGKILL, and returns when the server has ended.
func (c *child) end(signal syscall.Signal) error {
	select {
	case <-c.gone:
		return nil
	default:
	}
	pid := c.cmd.Process.Pid
	if signal == syscall.SIGKILL {
		pid = -pid // all of its processes at the same moment
	}
	_ = syscall.Kill(pid, signal)
	select {
	case <-c.gone:
		_ = syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL) // what it has left
		return nil
	case <-time.After(endServer):
		_ = syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL)
		<-c.gone
		return fmt.Errorf("had to be killed %s after %v; its log ends:\n%s", endServer, signal, lastLines(c.said()))
	}
}
