package orchestrator

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
)

// containerFile is the file with the configuration of a pin's container.
func containerFile(pin change.Pin) string {
	return filepath.Join(filepath.Dir(pin.Archive), pin.Container+".json")
}

// writeContainer writes the configuration of a container. Only this user may read
// it: the container's environment has its secrets.
func writeContainer(path string, inspection compose.Inspection) error {
	text, err := json.Marshal(inspection)
	if err != nil {
		return err
	}
	return writeFile(path, func(file io.Writer) error {
		_, err := file.Write(text)
		return err
	})
}

// writeFile writes a file that only this user may read, whole or not at all.
func writeFile(path string, write func(io.Writer) error) error {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("folder of saved images: %w", err)
	}
	file, err := os.CreateTemp(dir, ".new-")
	if err != nil {
		return fmt.Errorf("folder of saved images: %w", err)
	}
	defer os.Remove(file.Name())
	defer file.Close()
	if err := write(file); err != nil {
		return err
	}
	if err := errors.Join(file.Sync(), file.Close()); err != nil {
		return err
	}
	if err := os.Rename(file.Name(), path); err != nil {
		return err
	}
	folder, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer folder.Close()
	return folder.Sync()
}

// saveArchive saves a pin's image as a file, unless there is a complete one. Runs
// share the file of one image by hard links.
func (s *stepRun) saveArchive(ctx context.Context, pin change.Pin) error {
	if checkArchive(pin.Archive) == nil {
		return nil
	}
	others, _ := filepath.Glob(filepath.Join(s.config.PinDirectory, "*", filepath.Base(pin.Archive)))
	for _, other := range others {
		if other != pin.Archive && checkArchive(other) == nil {
			_ = os.MkdirAll(filepath.Dir(pin.Archive), 0o700)
			_ = os.Remove(pin.Archive)
			if os.Link(other, pin.Archive) == nil {
				return nil
			}
		}
	}
	over := stall.FromContext(ctx).Wait()
	defer over()
	if err := writeFile(pin.Archive, func(file io.Writer) error { return s.config.Engine.SaveImage(ctx, pin.ImageID, file) }); err != nil {
		return err
	}
	return checkArchive(pin.Archive)
}

// checkArchive reads an archive to its end and checks that it has a list of images.
func checkArchive(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	listed := false
	archive := tar.NewReader(file)
	for {
		header, err := archive.Next()
		switch {
		case errors.Is(err, io.EOF) && listed:
			return nil
		case errors.Is(err, io.EOF):
			return fmt.Errorf("%s is no archive of an image", path)
		case err != nil:
			return fmt.Errorf("%s: %w", path, err)
		}
		listed = listed || header.Name == "manifest.json" || header.Name == "index.json"
	}
}

// loadArchive brings back an image that the engine has no more.
func (s *stepRun) loadArchive(ctx context.Context, pin change.Pin) error {
	gone := fmt.Sprintf("the engine has no image %s any more", pin.ImageID)
	if pin.Archive == "" {
		return fmt.Errorf("%s: somebody has removed the pin %s, which kept it. With %s set, images are also saved as files", gone, pin.Name, s.config.SettingName("MM_ORCHESTRATOR_PIN_DIRECTORY"))
	}
	file, err := os.Open(pin.Archive)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s, and there is no file %s from which it could be loaded", gone, pin.Archive)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", gone, err)
	}
	defer file.Close()
	over := stall.FromContext(ctx).Wait()
	defer over()
	if err := s.config.Engine.LoadImage(ctx, file); err != nil {
		return err
	}
	if _, err := s.config.Engine.InspectImage(ctx, pin.ImageID); err != nil {
		return fmt.Errorf("%s, also after loading %s: %w", gone, pin.Archive, err)
	}
	return nil
}
