package compose

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
)

// Place is the engine's address as messages show it, without a password.
func (e *Engine) Place() string {
	if e.host == client.DefaultDockerHost {
		return "the local socket"
	}
	return address.MaskURL(e.host)
}

// RootDirectory is where the engine has images and containers, as the engine
// names it: a path on its machine.
func (e *Engine) RootDirectory(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	info, err := e.client.Info(ctx, client.InfoOptions{})
	if err != nil {
		return "", e.failed("ask for its directory", err)
	}
	return info.Info.DockerRootDir, nil
}

// ListSharers lists the other services of which a running container uses the network,
// processes or IPC of a container of these services, sorted. Once that is replaced,
// they have no network, and cannot be started again.
func (e *Engine) ListSharers(ctx context.Context, project string, services []string) ([]string, error) {
	list, err := e.list(ctx, project, "")
	if err != nil {
		return nil, err
	}
	var owners, sharers []string
	for _, c := range list {
		if slices.Contains(services, c.Service) {
			owners = append(owners, c.ID)
		}
	}
	for _, c := range list {
		uses := slices.ContainsFunc(c.Shares, func(id string) bool { return slices.Contains(owners, id) })
		if uses && (isUp(c) || c.State == "paused") && !slices.Contains(services, c.Service) {
			sharers = append(sharers, c.Service)
		}
	}
	slices.Sort(sharers)
	return slices.Compact(sharers), nil
}

// list lists containers before a run. It asks once more if it gets no answer: one
// connection that is cut must not refuse a run.
func (e *Engine) list(ctx context.Context, project, service string) ([]Container, error) {
	list, err := e.Containers(ctx, project, service)
	if errors.Is(err, ErrUnreachable) && pause(ctx, 200*time.Millisecond) == nil {
		list, err = e.Containers(ctx, project, service)
	}
	return list, err
}

// ListImages lists the names of the containers of a service, and the ids of those
// images of theirs that the engine no longer has: somebody has removed them by
// force.
func (e *Engine) ListImages(ctx context.Context, project, service string) (containers, missing []string, err error) {
	list, err := e.list(ctx, project, service)
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	for _, container := range list {
		containers = append(containers, container.Name)
		switch _, err := e.client.ImageInspect(ctx, container.ImageID); {
		case errdefs.IsNotFound(err):
			missing = append(missing, container.ImageID)
		case err != nil:
			return nil, nil, e.failed("inspect image "+container.ImageID, err)
		}
	}
	return containers, missing, nil
}
