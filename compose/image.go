package compose

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/moby/moby/client"
)

// An Image is an image in the engine.
type Image struct {
	ID string
	// Names are its tags, RepoDigests the digests under which registries have it.
	Names       []string
	RepoDigests []string
	// Size is in bytes.
	Size int64
	// volumes are the paths for which a container of the image gets a volume.
	volumes []string
	// runnable says that the image says what a container runs.
	runnable bool
}

func isNotFound(err error) bool { return errors.Is(err, ErrNotFound) }

func isNameTaken(err error) bool { return errors.Is(err, ErrNameTaken) }

// InspectImage finds an image by its name or id. It returns [ErrNotFound] if the
// engine has none.
func (e *Engine) InspectImage(ctx context.Context, nameOrID string) (Image, error) {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	found, err := e.client.ImageInspect(ctx, nameOrID)
	if err != nil {
		return Image{}, e.failed("inspect image "+nameOrID, err)
	}
	image := Image{ID: found.ID, Names: found.RepoTags, RepoDigests: found.RepoDigests, Size: found.Size}
	if found.Config != nil {
		for path := range found.Config.Volumes {
			image.volumes = append(image.volumes, path)
		}
		slices.Sort(image.volumes)
		image.runnable = len(found.Config.Cmd)+len(found.Config.Entrypoint) > 0
	}
	return image, nil
}

// TagImage makes a name stand for an image. The image that had the name keeps its
// id and its other names.
func (e *Engine) TagImage(ctx context.Context, id, name string) error {
	_, err := e.client.ImageTag(ctx, client.ImageTagOptions{Source: id, Target: name})
	return e.failed("tag image "+id+" as "+name, err)
}

// UntagImage takes a name away. An image that has no other name, and that no
// container uses, is removed with it. It is no error if no image has the name.
func (e *Engine) UntagImage(ctx context.Context, name string) error {
	_, err := e.client.ImageRemove(ctx, name, client.ImageRemoveOptions{})
	if err = e.failed("remove image name "+name, err); isNotFound(err) {
		return nil
	}
	return err
}

// SaveImage writes an image as a tar archive, which LoadImage reads.
func (e *Engine) SaveImage(ctx context.Context, id string, to io.Writer) error {
	archive, err := e.client.ImageSave(ctx, []string{id})
	if err != nil {
		return e.failed("save image "+id, err)
	}
	defer archive.Close()
	if _, err := io.Copy(to, archive); err != nil {
		return e.failed("save image "+id, err)
	}
	return nil
}

// LoadImage reads an image that SaveImage has written. It comes back under its id,
// without names.
func (e *Engine) LoadImage(ctx context.Context, from io.Reader) error {
	answer, err := e.client.ImageLoad(ctx, from, client.ImageLoadWithQuiet(true))
	if err != nil {
		return e.failed("load an image", err)
	}
	defer answer.Close()
	// The engine answers 200 before it has read the archive, and then one object
	// after the other.
	messages := json.NewDecoder(answer)
	for {
		var message struct {
			Error string `json:"error"`
		}
		switch err := messages.Decode(&message); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return e.failed("load an image", err)
		case message.Error != "":
			return fmt.Errorf("cannot load an image at docker engine %s: %s", e.host, strings.TrimSpace(message.Error))
		}
	}
}
