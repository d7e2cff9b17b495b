package compose

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errhttp"
	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/client"

	"github.com/moonladderstudios/mm-orchestrator/internal/excerpt"
)

// Labels that compose sets on containers.
const (
	labelProject = "com.docker.compose.project"
	labelService = "com.docker.compose.service"
	labelOneOff  = "com.docker.compose.oneoff"
	labelNumber  = "com.docker.compose.container-number"
	labelHash    = "com.docker.compose.config-hash"
	labelReplace = "com.docker.compose.replace"
	labelDepends = "com.docker.compose.depends_on"
	labelHook    = "com.docker.compose.hook"
)

var (
	// ErrUnreachable says that the docker engine does not answer, or not to the end, or
	// that a proxy before it says so. What was asked of it may have been done.
	ErrUnreachable = errors.New("docker engine is unreachable")
	// ErrNotFound says that the engine has no such container or image.
	ErrNotFound = errors.New("docker engine has no such object")
	// ErrNameTaken says that another container has the name.
	ErrNameTaken = errors.New("container name is taken")
)

// EngineConfig says how to reach the docker engine.
type EngineConfig struct {
	// Host is the engine's address, in the form of DOCKER_HOST. Defaults to
	// the local socket.
	Host string
	// CertPath is a folder with ca.pem, cert.pem and key.pem, as in
	// DOCKER_CERT_PATH. Empty means no TLS.
	CertPath string
	// Timeout is the limit on each request. Defaults to 10 s.
	Timeout time.Duration
}

// An Engine is a client of a docker engine.
//
//   - All methods may be called at the same time.
//   - Methods that read have the configured time limit. Those that change something
//     end with their context, because the engine needs as long as a container takes
//     to stop, or an image to be copied.
type Engine struct {
	client  *client.Client
	host    string
	timeout time.Duration
	// answered is set by the first answer.
	answered atomic.Bool
}

// NewEngine returns a client. It does not connect.
func NewEngine(config EngineConfig) (*Engine, error) {
	host := cmp.Or(config.Host, client.DefaultDockerHost)
	e := &Engine{host: host, timeout: cmp.Or(config.Timeout, 10*time.Second)}
	options := []client.Opt{client.WithHost(host), client.WithHTTPResponseHook(e.notice)}
	if config.CertPath != "" {
		options = append(options, client.WithTLSClientConfig(
			filepath.Join(config.CertPath, "ca.pem"),
			filepath.Join(config.CertPath, "cert.pem"),
			filepath.Join(config.CertPath, "key.pem")))
	}
	var err error
	if e.client, err = client.New(options...); err != nil {
		return nil, fmt.Errorf("docker engine at %s: %w", host, err)
	}
	return e, nil
}

// notice sees the head of each answer. Those of a proxy itself, and of another server
// at this address, lack the engine's version.
func (e *Engine) notice(response *http.Response) {
	if response.Header.Get("Api-Version") != "" {
		e.answered.Store(true)
	}
}

// HasAnswered says that the engine has answered this client at least once. If it does
// not answer now, that is an outage. Otherwise there may be no engine at this address
// at all.
func (e *Engine) HasAnswered() bool { return e.answered.Load() }

// Close closes the client's connections.
func (e *Engine) Close() error { return e.client.Close() }

// Host is the engine's address.
func (e *Engine) Host() string { return e.host }

// Ping returns nil if the engine answers.
func (e *Engine) Ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	_, err := e.client.Ping(ctx, client.PingOptions{})
	return e.failed("ping", err)
}

// A Container is a container of a compose project.
type Container struct {
	ID      string
	Name    string
	Service string
	// Number tells the containers of a service apart, from 1.
	Number int
	// ImageID is the id of the image that the container was created from.
	ImageID string
	// ConfigHash is compose's hash of the service's configuration.
	ConfigHash string
	// Replaces says that compose has created the container to replace another one of
	// its service.
	Replaces bool
	// DependsOn are the services that compose has started it after, in compose's own
	// form; "" for none, and if compose was told not to look (--no-deps).
	DependsOn string
	// Created is the time of its creation.
	Created time.Time
	// State is created, running, paused, restarting, removing, exited or
	// dead.
	State string
	// Health is starting, healthy, unhealthy, or "" without a health check.
	Health string
	// ExitCode is the exit code of the last run; 0 during the first run.
	ExitCode int
	// Restarts counts the restarts by the engine's restart policy since somebody
	// started the container.
	Restarts int
	// RestartPolicy is no, always, unless-stopped or on-failure; "" means no.
	RestartPolicy string
	// Error is the engine's reason why the container did not start, or "".
	Error     string
	StartedAt time.Time

	// Image is the image name that the container was created from.
	Image string
	// OOMKilled says that the last run ended because memory was exhausted.
	OOMKilled bool
	// HealthOutput is the output of the last health check, HealthExit its exit
	// code: 0 for success, also without any.
	HealthOutput string
	HealthExit   int
	// Network says where the container can be reached.
	Network Network
	// Networks are the names of its networks, sorted.
	Networks []string
	// NetworkIDs has the ids of its networks by name, "" for one in which the engine
	// has given it no place yet.
	NetworkIDs map[string]string
	// Shares are the ids of the containers whose network, processes or IPC it uses.
	Shares []string
	// VolumesFrom are the ids of the containers whose volumes it has (volumes_from).
	VolumesFrom []string
	// Volumes are the names of its volumes, also of anonymous ones, by the path in
	// the container.
	Volumes map[string]string
	// OwnVolumes are those of them that the engine has made for this container, since
	// its configuration names none for the path. Compose names the ones that it passes
	// on from the container before.
	OwnVolumes []string
}

// Containers implements [State]. It leaves out what is no container of a service to
// compose either: the one-off containers of `compose run`, those of its hooks, and
// those that somebody has made from an image that compose has built, with its labels.
func (e *Engine) Containers(ctx context.Context, project, service string) ([]Container, error) {
	containers, _, err := e.listContainers(ctx, project, service)
	return containers, err
}

// listContainers returns Containers, and the containers in which compose runs the
// pre_start hooks of services. Compose removes those, but not after a failure.
func (e *Engine) listContainers(ctx context.Context, project, service string) (containers, hooks []Container, err error) {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	filters := client.Filters{}.Add("label", labelProject+"="+project)
	if service != "" {
		filters.Add("label", labelService+"="+service)
	}
	list, err := e.client.ContainerList(ctx, client.ContainerListOptions{All: true, Filters: filters})
	if err != nil {
		return nil, nil, e.failed("list containers of project "+project, err)
	}
	for _, item := range list.Items {
		if !isOfService(item.Labels) {
			continue
		}
		inspected, err := e.client.ContainerInspect(ctx, item.ID, client.ContainerInspectOptions{})
		if errdefs.IsNotFound(err) {
			continue // The container was removed after it was listed.
		}
		if err != nil {
			return nil, nil, e.failed("inspect container "+item.ID, err)
		}
		c := containerOf(inspected.Container, item.Labels)
		if c.Network, err = e.networkOf(ctx, inspected.Container); err != nil {
			return nil, nil, e.failed("inspect container "+item.ID, err)
		}
		if item.Labels[labelHook] != "" {
			hooks = append(hooks, c)
		} else {
			containers = append(containers, c)
		}
	}
	for _, list := range [][]Container{containers, hooks} {
		slices.SortFunc(list, func(a, b Container) int {
			return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.ID, b.ID))
		})
	}
	return containers, hooks, nil
}

// isOfService says that compose has created a container with these labels for a
// service or its hooks.
func isOfService(labels map[string]string) bool {
	return (labels[labelHash] != "" || labels[labelHook] != "") && !strings.EqualFold(labels[labelOneOff], "true")
}

func containerOf(inspected container.InspectResponse, labels map[string]string) Container {
	c := Container{
		ID:         inspected.ID,
		Name:       strings.TrimPrefix(inspected.Name, "/"),
		Service:    labels[labelService],
		ImageID:    inspected.Image,
		ConfigHash: labels[labelHash],
		Replaces:   labels[labelReplace] != "",
		DependsOn:  labels[labelDepends],
		Created:    parseTime(inspected.Created),
		Restarts:   inspected.RestartCount,
	}
	c.Number, _ = strconv.Atoi(labels[labelNumber])
	if inspected.Config != nil {
		c.Image = inspected.Config.Image
	}
	if inspected.HostConfig != nil {
		c.RestartPolicy = string(inspected.HostConfig.RestartPolicy.Name)
		c.Shares, c.VolumesFrom = sharedBy(inspected.HostConfig), volumesFrom(inspected.HostConfig)
	}
	if inspected.NetworkSettings != nil {
		c.Networks = slices.Sorted(maps.Keys(inspected.NetworkSettings.Networks))
		for name, endpoint := range inspected.NetworkSettings.Networks {
			if c.NetworkIDs == nil {
				c.NetworkIDs = map[string]string{}
			}
			c.NetworkIDs[name] = ""
			if endpoint != nil {
				c.NetworkIDs[name] = endpoint.NetworkID
			}
		}
	}
	for _, mounted := range inspected.Mounts {
		if mounted.Type == mount.TypeVolume {
			if c.Volumes == nil {
				c.Volumes = map[string]string{}
			}
			c.Volumes[mounted.Destination] = mounted.Name
		}
	}
	c.OwnVolumes = ownVolumes(inspected)
	if state := inspected.State; state != nil {
		c.State, c.ExitCode, c.Error = string(state.Status), state.ExitCode, state.Error
		c.StartedAt = parseTime(state.StartedAt)
		if state.Health != nil && state.Health.Status != "none" {
			c.Health = string(state.Health.Status)
		}
		c.OOMKilled = state.OOMKilled
		if state.Health != nil && len(state.Health.Log) > 0 {
			last := state.Health.Log[len(state.Health.Log)-1]
			c.HealthOutput, c.HealthExit = last.Output, last.ExitCode
		}
	}
	return c
}

// ownVolumes returns [Container].OwnVolumes. It returns none if the container has the
// volumes of another one: these cannot be told from its own.
func ownVolumes(inspected container.InspectResponse) []string {
	host := inspected.HostConfig
	if host == nil || len(host.VolumesFrom) > 0 {
		return nil
	}
	var own []string
	for _, mounted := range inspected.Mounts {
		named := slices.ContainsFunc(host.Mounts, func(m mount.Mount) bool { return m.Source == mounted.Name }) ||
			slices.ContainsFunc(host.Binds, func(bind string) bool { return strings.HasPrefix(bind, mounted.Name+":") })
		if mounted.Type == mount.TypeVolume && fullID.MatchString(mounted.Name) && !named {
			own = append(own, mounted.Name)
		}
	}
	return own
}

// parseTime parses a time of the engine's. For what has never happened, the engine
// sends the year 1, which parses to the zero time.
func parseTime(text string) time.Time {
	t, _ := time.Parse(time.RFC3339Nano, text)
	return t.UTC()
}

// logTailLimit is the limit on the result of LogTail, in bytes.
const logTailLimit = 64 << 10

// LogTail implements [State]. It returns stdout and stderr in the order of
// arrival, at most the last 64 KiB.
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
	tail := &excerpt.Tail{Limit: logTailLimit}
	if inspected.Container.Config != nil && inspected.Container.Config.Tty {
		_, err = io.Copy(tail, logs)
	} else {
		_, err = stdcopy.StdCopy(tail, tail, logs)
	}
	if err != nil {
		return "", e.failed("read log of container "+id, err)
	}
	return tail.Words(), nil
}

// failed converts an error of the docker client, nil to nil. An engine that
// does not answer becomes ErrUnreachable.
func (e *Engine) failed(doing string, err error) error {
	if err == nil {
		return nil
	}
	if isOutage(err) {
		if reason := outageReason(err); reason != nil {
			return fmt.Errorf("cannot %s: %w at %s: %w", doing, ErrUnreachable, e.host, reason)
		}
		return fmt.Errorf("cannot %s: %w at %s", doing, ErrUnreachable, e.host)
	}
	switch {
	case errdefs.IsNotFound(err):
		return fmt.Errorf("cannot %s at docker engine %s: %w: %w", doing, e.host, ErrNotFound, err)
	case errdefs.IsConflict(err) && strings.Contains(err.Error(), "is already in use by"): // the engine has one code for all conflicts
		return fmt.Errorf("cannot %s at docker engine %s: %w: %w", doing, e.host, ErrNameTaken, err)
	case errdefs.IsPermissionDenied(err):
		return fmt.Errorf("cannot %s: %w. What stands before the engine at %s refuses the request; a docker socket proxy must allow POST, containers, images, networks and volumes", doing, err, e.host)
	}
	return fmt.Errorf("cannot %s at docker engine %s: %w", doing, e.host, err)
}

// unavailable are the statuses by which a proxy says that the engine does not answer,
// as while it starts again.
var unavailable = []int{http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout}

// isOutage says that an error of the docker client is no answer to the request.
func isOutage(err error) bool {
	if errors.Is(err, context.Canceled) {
		return false
	}
	if client.IsErrConnectionFailed(err) || errors.Is(err, context.DeadlineExceeded) || unavailableStatus(err) != 0 {
		return true
	}
	// The client only knows of failures up to the head of an answer, which may also end
	// later. Not every net.Error is one of the network: a full disk is one, too.
	var broken *net.OpError
	return errors.As(err, &broken) || isCut(err) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

func isCut(err error) bool {
	var syntax *json.SyntaxError // the client reads some answers before it decodes them
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &syntax) && syntax.Error() == "unexpected end of JSON input"
}

// unavailableStatus is the status of unavailable with which a request was answered, 0
// for none.
func unavailableStatus(err error) int {
	for _, status := range unavailable {
		if errors.Is(err, errhttp.ToNative(status)) {
			return status
		}
	}
	return 0
}

// outageReason is why the engine does not answer, nil if that is not known. The client's
// text mixes the reason with advice for users of the docker program, so only the cause
// is taken from it.
func outageReason(err error) error {
	var errno syscall.Errno
	var name *net.DNSError
	var request *url.Error
	switch status := unavailableStatus(err); {
	case errors.As(err, &errno):
		return errno
	case errors.Is(err, context.DeadlineExceeded):
		return errors.New("no answer in time")
	case errors.As(err, &name) && name.IsNotFound:
		return errors.New("no such host")
	case errors.As(err, &name):
		return errors.New(name.Err)
	case client.IsErrConnectionFailed(err) && strings.HasPrefix(err.Error(), "Cannot connect to the Docker daemon"): // it does not wrap this one either
		return errors.New("connection refused")
	case client.IsErrConnectionFailed(err) && strings.Contains(err.Error(), "permission denied"): // the client does not wrap this cause
		return syscall.EACCES
	case status != 0:
		return fmt.Errorf("status %d %s", status, http.StatusText(status))
	case isCut(err):
		return errors.New("the connection was closed before the end of the answer")
	case errors.As(err, &request):
		return request.Err // such as that of a certificate; without the request, which says nothing
	}
	return nil
}

// IsForbidden says that what stands before the engine refuses such requests, today and
// tomorrow.
func IsForbidden(err error) bool { return errdefs.IsPermissionDenied(err) }
