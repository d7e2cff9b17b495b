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

// Targets are the containers of the services that a run is about to replace.
type Targets struct {
	// Containers are their names.
	Containers []string
	// Gone has, by service, the ids of their images that the engine no longer has:
	// somebody has removed them by force.
	Gone map[string][]string
	// Sharers are the other services of which a running container uses the network,
	// processes or IPC of one of the targets, sorted. Once that is replaced, they have no
	// network, and cannot be started again.
	Sharers []string
}

// FindTargets lists the containers of services. It asks once more for them if it gets no
// answer: before a run, one connection that is cut must not refuse it.
func (e *Engine) FindTargets(ctx context.Context, project string, services []string) (Targets, error) {
	list, err := e.Containers(ctx, project, "")
	if errors.Is(err, ErrUnreachable) && pause(ctx, 200*time.Millisecond) == nil {
		list, err = e.Containers(ctx, project, "")
	}
	if err != nil {
		return Targets{}, err
	}
	found := Targets{Gone: map[string][]string{}}
	var ids []string
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	for _, c := range list {
		if !slices.Contains(services, c.Service) {
			continue
		}
		found.Containers, ids = append(found.Containers, c.Name), append(ids, c.ID)
		switch _, err := e.client.ImageInspect(ctx, c.ImageID); {
		case errdefs.IsNotFound(err):
			found.Gone[c.Service] = append(found.Gone[c.Service], c.ImageID)
		case err != nil:
			return Targets{}, e.failed("inspect image "+c.ImageID, err)
		}
	}
	for _, c := range list {
		uses := slices.ContainsFunc(c.Shares, func(id string) bool { return slices.Contains(ids, id) })
		if uses && (isUp(c) || c.State == "paused") && !slices.Contains(services, c.Service) {
			found.Sharers = append(found.Sharers, c.Service)
		}
	}
	slices.Sort(found.Sharers)
	found.Sharers = slices.Compact(found.Sharers)
	return found, nil
}
