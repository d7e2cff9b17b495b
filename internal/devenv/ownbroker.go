package devenv

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// PrivateBroker is a RabbitMQ of a test's own, which it may configure and
// stop: the one that all tests share must stay as it is. It has one vhost, "/".
type PrivateBroker struct {
	// URL is amqp://user:password@127.0.0.1:port, the same after a restart.
	URL string

	t     testing.TB
	port  int
	start func() error
	stop  func() error
}

// OwnBroker starts a RabbitMQ with these settings of its application "rabbit"
// (consumer_timeout, for instance) and returns when it answers, usually after
// 6 s. It is of the same version as the one that all tests share: from its image
// if that is a container, else the installed programs, else the image of the
// shipped compose file. It ends with the test.
func OwnBroker(t testing.TB, settings map[string]int) *PrivateBroker {
	t.Helper()
	var arguments []string
	for name, value := range settings {
		arguments = append(arguments, fmt.Sprintf("-rabbit %s %d", name, value))
	}
	sort.Strings(arguments)
	b := &PrivateBroker{t: t}
	var err error
	if script := findRabbitMQ(); script != "" && os.Getenv(EnvBrokerImage) == "" {
		err = b.prepareProcess(script, strings.Join(arguments, " "))
	} else {
		err = b.prepareContainer(strings.Join(arguments, " "))
	}
	if err != nil {
		t.Fatalf("RabbitMQ of this test: %v", err)
	}
	b.Start()
	t.Cleanup(b.Stop)
	return b
}

// Start starts the broker again and returns within 20 ms of its taking
// connections, which it does when all its queues are there.
func (b *PrivateBroker) Start() {
	b.t.Helper()
	if err := b.start(); err != nil {
		b.t.Fatalf("RabbitMQ of this test does not start: %v", err)
	}
}

// Stop ends the broker as its operator does: it closes its connections and
// keeps durable queues and persistent messages. It returns when it has ended.
func (b *PrivateBroker) Stop() {
	b.t.Helper()
	if err := b.stop(); err != nil {
		b.t.Errorf("RabbitMQ of this test does not stop: %v", err)
	}
}

// listens waits until the broker takes connections.
func (b *PrivateBroker) listens(gone <-chan struct{}) error {
	ctx, cancel := context.WithTimeout(context.Background(), brokerLimit)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := greets(ctx, b.port)
		if err == nil {
			return nil
		}
		select {
		case <-gone:
			return fmt.Errorf("the process has ended: %w", err)
		case <-ctx.Done():
			return fmt.Errorf("not ready after %s: %w", brokerLimit, err)
		case <-tick.C:
		}
	}
}

// greets says whether a broker answers an AMQP client. Docker's proxy of a
// published port takes connections before there is one.
func greets(ctx context.Context, port int) error {
	dialer := net.Dialer{Timeout: 2 * time.Second}
	conn, err := dialer.DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := conn.Write([]byte("AMQP\x00\x00\x09\x01")); err != nil {
		return err
	}
	_, err = conn.Read(make([]byte, 1))
	return err
}

func (b *PrivateBroker) prepareProcess(script, arguments string) error {
	dir, err := scratchFolder()
	if err != nil {
		return err
	}
	b.t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			b.t.Error(err)
		}
	})
	// No plugins: they take longest to start, and a free port each.
	n, err := newNode(script, filepath.Join(dir, "rabbitmq"), "[].\n", arguments)
	if err != nil {
		return err
	}
	// Then the script becomes the broker instead of its parent, so that the
	// signal at our death reaches it.
	n.environment = append(n.environment, "RUNNING_UNDER_SYSTEMD=true")
	b.URL, b.port = n.url().String(), n.amqp

	mapper, err := childOf(n.mapper())
	if err != nil {
		return err
	}
	b.t.Cleanup(func() { _ = mapper.end(syscall.SIGKILL) })
	if err := until(context.Background(), 10*time.Second, mapper.gone, func(ctx context.Context) error { return dial(ctx, n.epmd) }); err != nil {
		return fmt.Errorf("epmd: %w\n%s", err, mapper.said())
	}
	var server *child
	b.start = func() (err error) {
		if server, err = childOf(n.server()); err != nil {
			return err
		}
		if err := b.listens(server.gone); err != nil {
			_ = server.end(syscall.SIGKILL)
			return fmt.Errorf("%w; its log ends:\n%s", err, lastLines(server.said()))
		}
		return nil
	}
	b.stop = func() error { return server.end(syscall.SIGTERM) }
	return nil
}

func (b *PrivateBroker) prepareContainer(arguments string) error {
	image := cmp.Or(os.Getenv(EnvBrokerImage), os.Getenv("RABBITMQ_IMAGE"), rabbitMQImage.official)
	ports, err := freePorts(1)
	if err != nil {
		return err
	}
	password := randomHex()
	b.port = ports[0]
	b.URL = (&url.URL{Scheme: "amqp", User: url.UserPassword("mm", password), Host: fmt.Sprintf("127.0.0.1:%d", b.port)}).String()
	name := "mm-devenv-own-" + randomHex()
	docker := func(args ...string) error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		_, err := output(ctx, "docker", args...)
		return err
	}
	// The host's name is the node's, and with it the folder of the data.
	if err := docker("create", "--name", name, "--hostname", "own", "--publish", fmt.Sprintf("127.0.0.1:%d:5672", b.port),
		"--env", "RABBITMQ_DEFAULT_USER=mm", "--env", "RABBITMQ_DEFAULT_PASS="+password,
		"--env", "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="+arguments, image); err != nil {
		return fmt.Errorf("RabbitMQ is not installed and cannot be had as a container: %w", err)
	}
	b.t.Cleanup(func() {
		if err := docker("rm", "--force", "--volumes", name); err != nil {
			b.t.Error(err)
		}
	})
	b.start = func() error {
		if err := docker("start", name); err != nil {
			return err
		}
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		err := b.listens(containerGone(ctx, name))
		if err != nil {
			return explainContainer(name, err)
		}
		return nil
	}
	b.stop = func() error { return docker("stop", "--time", "30", name) }
	return nil
}

// child is a server in a process group of its own, which on Linux also gets
// SIGTERM when this process dies.
type child struct {
	cmd  *exec.Cmd
	gone chan struct{}

	mu  sync.Mutex // guards log
	log tail
}

func childOf(cmd *exec.Cmd) (*child, error) {
	ownGroup(cmd)
	dieWithUs(cmd)
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
	_ = syscall.Kill(c.cmd.Process.Pid, signal)
	select {
	case <-c.gone:
		_ = syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL) // what it has left
		return nil
	case <-time.After(30 * time.Second):
		_ = syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL)
		<-c.gone
		return fmt.Errorf("had to be killed 30 s after %v; its log ends:\n%s", signal, lastLines(c.said()))
	}
}
