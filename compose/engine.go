package compose

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/client"
)

// Labels by which compose marks its containers.
const (
	labelProject = "com.docker.compose.project"
	labelService = "com.docker.compose.service"
	labelOneOff  = "com.docker.compose.oneoff"
)

// ErrUnreachable says that no docker engine answered.
var ErrUnreachable = errors.New("docker engine is unreachable")

// EngineConfig says where the docker engine is.
type EngineConfig struct {
	// Host is DOCKER_HOST. Defaults to the local socket.
	Host string
	// CertPath is DOCKER_CERT_PATH: a folder with ca.pem, cert.pem and
	// key.pem. Empty means no TLS.
	CertPath string
	// Timeout bounds each request. Defaults to 10 s.
	Timeout time.Duration
}

// An Engine is a docker engine, read only.
type Engine struct {
	client  *client.Client
	host    string
	timeout time.Duration
}

// NewEngine makes a client. It does not connect.
func NewEngine(config EngineConfig) (*Engine, error) {
	host := cmp.Or(config.Host, client.DefaultDockerHost)
	options := []client.Opt{client.WithHost(host)}
	if config.CertPath != "" {
		options = append(options, client.WithTLSClientConfig(
			filepath.Join(config.CertPath, "ca.pem"),
			filepath.Join(config.CertPath, "cert.pem"),
			filepath.Join(config.CertPath, "key.pem")))
	}
	c, err := client.New(options...)
	if err != nil {
		return nil, fmt.Errorf("docker engine at %s: %w", host, err)
	}
	return &Engine{client: c, host: host, timeout: cmp.Or(config.Timeout, 10*time.Second)}, nil
}

// Close gives connections back.
func (e *Engine) Close() error { return e.client.Close() }

// Ping says whether the engine answers.
func (e *Engine) Ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	_, err := e.client.Ping(ctx, client.PingOptions{})
	return e.failed("ping", err)
}

// A Container of a compose project.
type Container struct {
	ID, Name, Service string
	// ImageID is the id of the image it was made from.
	ImageID string
	// State is created, running, paused, restarting, removing, exited or
	// dead.
	State string
	// Health is starting, healthy, unhealthy, or "" without a health check.
	Health string
	// ExitCode of the last end; 0 while it runs for the first time.
	ExitCode int
	// Restarts counts how often the engine's restart policy started it again.
	Restarts int
	// Error is the engine's word on why it did not start, or "".
	Error     string
	StartedAt time.Time
}

// Containers implements [State]. One-off containers of `compose run` are left
// out.
func (e *Engine) Containers(ctx context.Context, project, service string) ([]Container, error) {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	filters := client.Filters{}.Add("label", labelProject+"="+project)
	if service != "" {
		filters.Add("label", labelService+"="+service)
	}
	list, err := e.client.ContainerList(ctx, client.ContainerListOptions{All: true, Filters: filters})
	if err != nil {
		return nil, e.failed("list containers of project "+project, err)
	}
	containers := make([]Container, 0, len(list.Items))
	for _, item := range list.Items {
		if strings.EqualFold(item.Labels[labelOneOff], "true") {
			continue
		}
		inspected, err := e.client.ContainerInspect(ctx, item.ID, client.ContainerInspectOptions{})
		if errdefs.IsNotFound(err) {
			continue // It has gone since the list was made.
		}
		if err != nil {
			return nil, e.failed("inspect container "+item.ID, err)
		}
		c := Container{
			ID:       inspected.Container.ID,
			Name:     strings.TrimPrefix(inspected.Container.Name, "/"),
			Service:  item.Labels[labelService],
			ImageID:  inspected.Container.Image,
			Restarts: inspected.Container.RestartCount,
		}
		if state := inspected.Container.State; state != nil {
			c.State, c.ExitCode, c.Error = string(state.Status), state.ExitCode, state.Error
			// An engine that has never started the container says year 1,
			// which parses to the zero time.
			c.StartedAt, _ = time.Parse(time.RFC3339Nano, state.StartedAt)
			if state.Health != nil && state.Health.Status != "none" {
				c.Health = string(state.Health.Status)
			}
		}
		containers = append(containers, c)
	}
	slices.SortFunc(containers, func(a, b Container) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.ID, b.ID))
	})
	return containers, nil
}

// logTailLimit bounds the memory for lines of a container's log, in bytes.
const logTailLimit = 64 << 10

// LogTail implements [State]: stdout and stderr as they came, at most 64 KiB.
func (e *Engine) LogTail(ctx context.Context, id string, lines int) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	inspected, err := e.client.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
	if err != nil {
		return "", e.failed("inspect container "+id, err)
	}
	logs, err := e.client.ContainerLogs(ctx, id, client.ContainerLogsOptions{ShowStdout: true, ShowStderr: true, Tail: strconv.Itoa(lines)})
	if err != nil {
		return "", e.failed("read log of container "+id, err)
	}
	defer logs.Close()
	tail := &lastBytes{limit: logTailLimit}
	if inspected.Container.Config != nil && inspected.Container.Config.Tty {
		_, err = io.Copy(tail, logs)
	} else {
		_, err = stdcopy.StdCopy(tail, tail, logs)
	}
	if err != nil {
		return "", e.failed("read log of container "+id, err)
	}
	return string(tail.kept), nil
}

// lastBytes keeps the end of what is written to it.
type lastBytes struct {
	kept  []byte
	limit int
}

func (b *lastBytes) Write(p []byte) (int, error) {
	b.kept = append(b.kept, p...)
	if over := len(b.kept) - b.limit; over > 0 {
		b.kept = append(b.kept[:0], b.kept[over:]...)
	}
	return len(p), nil
}

// failed makes an error of the client ours.
func (e *Engine) failed(doing string, err error) error {
	if err == nil {
		return nil
	}
	if client.IsErrConnectionFailed(err) || errors.Is(err, context.DeadlineExceeded) {
		// The client's own text tells the reason only together with advice for
		// users of the docker program.
		var reason syscall.Errno
		if errors.As(err, &reason) {
			return fmt.Errorf("cannot %s: %w at %s: %w", doing, ErrUnreachable, e.host, reason)
		}
		if strings.Contains(err.Error(), "permission denied") { // its text is all there is
			return fmt.Errorf("cannot %s: %w at %s: %w", doing, ErrUnreachable, e.host, syscall.EACCES)
		}
		return fmt.Errorf("cannot %s: %w at %s", doing, ErrUnreachable, e.host)
	}
	return fmt.Errorf("cannot %s at docker engine %s: %w", doing, e.host, err)
}
