package compose

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"strings"

	"github.com/moby/moby/client"
)

// A copiedFile is a file that compose has copied into a container before it started it:
// a secret of the environment, or a config with its content in the compose file. The
// engine's inspection does not tell of them.
type copiedFile struct {
	Path    string `json:"path"`
	Mode    int64  `json:"mode"`
	UID     int    `json:"uid"`
	GID     int    `json:"gid"`
	Content []byte `json:"content"`
}

// copiedLimit is the limit on the content of a copied file, in bytes. Compose takes
// it from the compose file or a variable; a larger one was not copied by compose.
const copiedLimit = 1 << 20

// ReadFiles returns the inspection with these files of its container. It leaves out what
// is no file there.
func (e *Engine) ReadFiles(ctx context.Context, of Inspection, paths []string) (Inspection, error) {
	of.files = nil
	for _, path := range paths {
		file, err := e.readFile(ctx, of.id, path)
		switch {
		case isNotFound(err), errors.Is(err, errNoFile):
		case err != nil:
			return of, err
		default:
			of.files = append(of.files, file)
		}
	}
	return of, nil
}

// MissingFiles lists the files of an inspection that a container does not have.
func (e *Engine) MissingFiles(ctx context.Context, id string, of Inspection) (missing []string, err error) {
	for _, wanted := range of.files {
		_, err := e.readFile(ctx, id, wanted.Path)
		switch {
		case isNotFound(err), errors.Is(err, errNoFile):
			missing = append(missing, wanted.Path)
		case err != nil:
			return nil, err
		}
	}
	return missing, nil
}

var errNoFile = errors.New("not a file that compose has copied")

func (e *Engine) readFile(ctx context.Context, id, path string) (copiedFile, error) {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	answer, err := e.client.CopyFromContainer(ctx, id, client.CopyFromContainerOptions{SourcePath: path})
	if err != nil {
		return copiedFile{}, e.failed("copy "+path+" from container "+id, err)
	}
	defer answer.Content.Close()
	archive := tar.NewReader(answer.Content)
	header, err := archive.Next()
	if err != nil {
		return copiedFile{}, e.failed("copy "+path+" from container "+id, err)
	}
	if header.Typeflag != tar.TypeReg || header.Size > copiedLimit {
		return copiedFile{}, errNoFile
	}
	file := copiedFile{Path: path, Mode: header.Mode, UID: header.Uid, GID: header.Gid}
	if file.Content, err = io.ReadAll(archive); err != nil {
		return copiedFile{}, e.failed("copy "+path+" from container "+id, err)
	}
	return file, nil
}

func (e *Engine) writeFile(ctx context.Context, id string, file copiedFile) error {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	var text bytes.Buffer
	archive := tar.NewWriter(&text)
	err := archive.WriteHeader(&tar.Header{
		Typeflag: tar.TypeReg, Name: strings.TrimPrefix(file.Path, "/"), Size: int64(len(file.Content)), Mode: file.Mode, Uid: file.UID, Gid: file.GID,
	})
	if err == nil {
		_, err = archive.Write(file.Content)
	}
	if closed := archive.Close(); err == nil {
		err = closed
	}
	if err == nil {
		_, err = e.client.CopyToContainer(ctx, id, client.CopyToContainerOptions{DestinationPath: "/", Content: &text})
	}
	return err
}

// A fileReference is how a service names a secret or a config of the compose file.
type fileReference struct {
	Source string `json:"source"`
	Target string `json:"target"`
}

// A fileObject is a secret or a config of the compose file.
type fileObject struct {
	Environment string `json:"environment"`
	Content     string `json:"content"`
}

// copiedPaths lists where compose copies secrets and configs in a container, sorted.
// Those of files it mounts.
func copiedPaths(secrets, configs []fileReference, secretObjects, configObjects map[string]fileObject) (paths []string) {
	add := func(references []fileReference, objects map[string]fileObject, folder string) {
		for _, reference := range references {
			target := reference.Target
			switch {
			case objects[reference.Source] == fileObject{}:
				continue
			case target == "":
				target = folder + reference.Source
			case !strings.HasPrefix(target, "/"):
				target = folder + target
			}
			paths = append(paths, target)
		}
	}
	add(secrets, secretObjects, "/run/secrets/")
	add(configs, configObjects, "/")
	slices.Sort(paths)
	return paths
}
