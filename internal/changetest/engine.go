package changetest

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"
)

// Label is set on every image of a project of this package. Its value is the
// project's name.
const Label = "mm-orchestrator.changetest"

// baseLabel is the same for the images that those are built FROM.
const baseLabel = Label + "-base"

// An Engine is the docker engine of DOCKER_HOST, or the local one.
type Engine struct{ client *client.Client }

// OpenEngine returns a client. It does not connect.
func OpenEngine() (*Engine, error) {
	c, err := client.New(client.FromEnv)
	if err != nil {
		return nil, err
	}
	return &Engine{client: c}, nil
}

// Close closes the client's connections.
func (e *Engine) Close() error { return e.client.Close() }

// bookkeeping are labels in which compose keeps how a container came to be.
var bookkeeping = []string{"com.docker.compose.replace"}

// take adds images, containers, networks and volumes of the project.
func (e *Engine) take(ctx context.Context, subject Subject, state State) error {
	ofProject := client.Filters{}.Add("label", "com.docker.compose.project="+subject.Project)
	for _, repository := range subject.Repositories {
		images, err := e.client.ImageList(ctx, client.ImageListOptions{Filters: client.Filters{}.Add("reference", repository)})
		if err != nil {
			return err
		}
		for _, image := range images.Items {
			for _, tag := range image.RepoTags {
				if strings.HasPrefix(tag, repository+":") {
					state["image "+tag] = image.ID
				}
			}
		}
	}
	containers, err := e.client.ContainerList(ctx, client.ContainerListOptions{All: true, Filters: ofProject})
	if err != nil {
		return err
	}
	for _, item := range containers.Items {
		err := e.takeContainer(ctx, item.ID, state)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return err
		}
	}
	networks, err := e.client.NetworkList(ctx, client.NetworkListOptions{Filters: ofProject})
	if err != nil {
		return err
	}
	for _, network := range networks.Items {
		state["network "+network.Name] = network.ID
	}
	volumes, err := e.client.VolumeList(ctx, client.VolumeListOptions{Filters: ofProject})
	if err != nil {
		return err
	}
	for _, volume := range volumes.Items {
		state["volume "+volume.Name] = volume.CreatedAt
	}
	return nil
}

func (e *Engine) takeContainer(ctx context.Context, id string, state State) error {
	inspected, err := e.client.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
	if err != nil {
		return err
	}
	c := inspected.Container
	add := func(what string, value any) {
		text, is := value.(string)
		if !is {
			encoded, err := json.Marshal(value)
			if err != nil {
				encoded = fmt.Append(nil, err)
			}
			text = string(encoded)
		}
		state["container "+strings.TrimPrefix(c.Name, "/")+" "+what] = text
	}
	add("id", c.ID)
	add("image", c.Image)
	if c.State != nil {
		add("started", c.State.StartedAt)
		add("status", string(c.State.Status))
		if c.State.Health != nil {
			add("health", string(c.State.Health.Status))
		}
		if !c.State.Running {
			add("exit code", c.State.ExitCode)
		}
	}
	if c.Config != nil {
		add("image name", c.Config.Image)
		add("command", append(slices.Clone([]string(c.Config.Entrypoint)), c.Config.Cmd...))
		add("environment", c.Config.Env)
		for name, value := range c.Config.Labels {
			if !slices.Contains(bookkeeping, name) {
				add("label "+name, value)
			}
		}
	}
	if c.HostConfig != nil {
		add("restart policy", c.HostConfig.RestartPolicy)
		add("ports", c.HostConfig.PortBindings)
	}
	for _, mount := range c.Mounts {
		add("mount "+mount.Destination, fmt.Sprintf("%s %s %s rw=%t", mount.Type, mount.Name, mount.Source, mount.RW))
	}
	if c.NetworkSettings != nil {
		for name, network := range c.NetworkSettings.Networks {
			var aliases []string
			for _, alias := range network.Aliases {
				if alias != "" && !strings.HasPrefix(c.ID, alias) {
					aliases = append(aliases, alias)
				}
			}
			slices.Sort(aliases)
			add("network "+name, strings.Join(slices.Compact(aliases), " "))
		}
	}
	return nil
}

// identity says that a name is about which container it is, and not about how it
// is. A container that was made again has another one.
func identity(name, container string) bool {
	return name == "container "+container+" id" || name == "container "+container+" started"
}

// ImportBase creates an image with one program, /service, that a project's images
// are built FROM. Images built FROM scratch would share layers with other tests.
func (e *Engine) ImportBase(ctx context.Context, name, label string, program []byte) error {
	var layer bytes.Buffer
	archive := tar.NewWriter(&layer)
	err := errors.Join(
		archive.WriteHeader(&tar.Header{Name: "service", Mode: 0o755, Size: int64(len(program))}), write(archive, program),
		archive.WriteHeader(&tar.Header{Name: "base", Mode: 0o644, Size: int64(len(name))}), write(archive, []byte(name)),
		archive.Close())
	if err != nil {
		return err
	}
	repository, tag, _ := strings.Cut(name, ":")
	answer, err := e.client.ImageImport(ctx, client.ImageImportSource{Source: &layer, SourceName: "-"}, repository,
		client.ImageImportOptions{Tag: tag, Changes: []string{"LABEL " + label}})
	if err != nil {
		return fmt.Errorf("creating the base image %s: %w", name, err)
	}
	defer answer.Close()
	_, err = io.Copy(io.Discard, answer)
	return err
}

func write(w io.Writer, text []byte) error {
	_, err := w.Write(text)
	return err
}

// Tag gives an image a further name.
func (e *Engine) Tag(ctx context.Context, source, name string) error {
	_, err := e.client.ImageTag(ctx, client.ImageTagOptions{Source: source, Target: name})
	return err
}

// RemovePins removes the containers that the worker keeps for runs of a project.
func (e *Engine) RemovePins(ctx context.Context, project string) error {
	return e.removeContainers(ctx, "mm-orchestrator.project="+project)
}

func (e *Engine) removeContainers(ctx context.Context, label string) error {
	containers, err := e.client.ContainerList(ctx, client.ContainerListOptions{All: true, Filters: client.Filters{}.Add("label", label)})
	failures := []error{err}
	for _, container := range containers.Items {
		_, err := e.client.ContainerRemove(ctx, container.ID, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
		if err != nil && !errdefs.IsNotFound(err) {
			failures = append(failures, err)
		}
	}
	return errors.Join(failures...)
}

// RemoveProject removes the containers, networks, volumes and images of a project,
// and the containers that the worker keeps for its runs.
func (e *Engine) RemoveProject(ctx context.Context, project string) error {
	failures := []error{e.removeContainers(ctx, "com.docker.compose.project="+project), e.RemovePins(ctx, project)}
	ofProject := client.Filters{}.Add("label", "com.docker.compose.project="+project)
	networks, err := e.client.NetworkList(ctx, client.NetworkListOptions{Filters: ofProject})
	failures = append(failures, err)
	for _, network := range networks.Items {
		_, err := e.client.NetworkRemove(ctx, network.ID, client.NetworkRemoveOptions{})
		failures = append(failures, err)
	}
	volumes, err := e.client.VolumeList(ctx, client.VolumeListOptions{Filters: ofProject})
	failures = append(failures, err)
	for _, volume := range volumes.Items {
		_, err := e.client.VolumeRemove(ctx, volume.Name, client.VolumeRemoveOptions{Force: true})
		failures = append(failures, err)
	}
	return errors.Join(append(failures, e.removeImages(ctx, project))...)
}

func (e *Engine) removeImage(ctx context.Context, name string) {
	// An image that is missing was removed by a case.
	_, _ = e.client.ImageRemove(ctx, name, client.ImageRemoveOptions{Force: true, PruneChildren: true})
}

// removeImages removes the images that have the project's label. An image can be
// removed only after those that were built from it, so it repeats until no more go.
func (e *Engine) removeImages(ctx context.Context, project string) error {
	for {
		images, err := e.client.ImageList(ctx, client.ImageListOptions{All: true, Filters: client.Filters{}.Add("label", Label+"="+project)})
		if err != nil || len(images.Items) == 0 {
			return err
		}
		removed := false
		var refusal error
		for _, image := range images.Items {
			_, err := e.client.ImageRemove(ctx, image.ID, client.ImageRemoveOptions{Force: true, PruneChildren: true})
			switch {
			case err == nil || errdefs.IsNotFound(err):
				removed = true
			default:
				refusal = err
			}
		}
		if !removed {
			return refusal
		}
	}
}
