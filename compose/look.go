package compose

import (
	"context"

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

// ListImages lists the names of the containers of a service, and the ids of those
// images of theirs that the engine no longer has: somebody has removed them by
// force.
func (e *Engine) ListImages(ctx context.Context, project, service string) (containers, missing []string, err error) {
	list, err := e.Containers(ctx, project, service)
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
