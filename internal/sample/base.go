package sample

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/moby/moby/client"
)

// ImportBase creates an image with one small file that a project's images are
// built FROM. label is set on it, as "key=value".
//
// Images built FROM scratch would need no base. But the classic builder searches
// all such images of the engine for layers to reuse, and fails if one is removed
// meanwhile ("unable to find image"). With a base of its own, a project finds
// only its own images.
func ImportBase(ctx context.Context, name, label string) error {
	var layer bytes.Buffer
	archive := tar.NewWriter(&layer)
	text := name + "\n"
	header := &tar.Header{Name: "base", Mode: 0o644, Size: int64(len(text))}
	if err := archive.WriteHeader(header); err != nil {
		return err
	}
	if _, err := archive.Write([]byte(text)); err != nil {
		return err
	}
	if err := archive.Close(); err != nil {
		return err
	}
	docker, err := client.New(client.FromEnv)
	if err != nil {
		return err
	}
	defer docker.Close()
	repository, tag, _ := strings.Cut(name, ":")
	answer, err := docker.ImageImport(ctx, client.ImageImportSource{Source: &layer, SourceName: "-"}, repository,
		client.ImageImportOptions{Tag: tag, Changes: []string{"LABEL " + label}})
	if err != nil {
		return fmt.Errorf("creating the base image %s: %w", name, err)
	}
	defer answer.Close()
	if _, err := io.Copy(io.Discard, answer); err != nil {
		return fmt.Errorf("creating the base image %s: %w", name, err)
	}
	return nil
}
