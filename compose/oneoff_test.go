package compose_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/client"

	"github.com/moonladderstudios/mm-orchestrator/compose"
)

// A container that runs one command sees the volume read-only, its output is read before
// it is removed, and nothing of it stays.
func TestOneOff(t *testing.T) {
	t.Parallel()
	docker, err := client.New(client.FromEnv)
	if err != nil {
		t.Fatal(err)
	}
	defer docker.Close()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	name := "mm-orchestrator-test-oneoff-" + strings.ToLower(rand.Text()[:8])
	program := filepath.Join(t.TempDir(), "oneoff")
	build := exec.CommandContext(t.Context(), "go", "build", "-ldflags", "-s -w", "-o", program, "./testdata/oneoff")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	text, err := os.ReadFile(program)
	must(err)
	archive := func(file string, mode int64, text []byte) io.Reader {
		var layer bytes.Buffer
		w := tar.NewWriter(&layer)
		must(w.WriteHeader(&tar.Header{Name: file, Mode: mode, Size: int64(len(text))}))
		_, err := w.Write(text)
		must(err)
		must(w.Close())
		return &layer
	}
	// The image's own command is replaced, not added.
	imported, err := docker.ImageImport(t.Context(), client.ImageImportSource{SourceName: "-", Source: archive("oneoff", 0o755, text)}, name, client.ImageImportOptions{Changes: []string{`CMD ["9"]`}})
	must(err)
	_, err = io.Copy(io.Discard, imported)
	must(err)
	imported.Close()
	_, err = docker.VolumeCreate(t.Context(), client.VolumeCreateOptions{Name: name})
	must(err)
	t.Cleanup(func() {
		ctx := context.Background()
		if _, err := docker.VolumeRemove(ctx, name, client.VolumeRemoveOptions{}); err != nil {
			t.Error(err)
		}
		if _, err := docker.ImageRemove(ctx, name, client.ImageRemoveOptions{}); err != nil {
			t.Error(err)
		}
	})
	filled, err := docker.ContainerCreate(t.Context(), client.ContainerCreateOptions{
		Config:     &container.Config{Image: name, Entrypoint: []string{"/oneoff"}},
		HostConfig: &container.HostConfig{Mounts: []mount.Mount{{Type: mount.TypeVolume, Source: name, Target: "/login"}}},
	})
	must(err)
	_, err = docker.CopyToContainer(t.Context(), filled.ID, client.CopyToContainerOptions{DestinationPath: "/login", Content: archive("who", 0o644, []byte("octo"))})
	must(err)
	_, err = docker.ContainerRemove(t.Context(), filled.ID, client.ContainerRemoveOptions{})
	must(err)

	e := engine(t, os.Getenv("DOCKER_HOST"))
	task := func(arg string) compose.OneOff {
		return compose.OneOff{Image: name, Command: []string{"/oneoff", arg}, Environ: []string{"HOME=/home/app"}, Volume: name, Target: "/login", Purpose: name}
	}
	for arg, code := range map[string]int{"0": 0, "3": 3} {
		result, err := e.RunOneOff(t.Context(), task(arg))
		if want := (compose.OneOffResult{ExitCode: code, Stdout: "HOME=/home/app, written: false, read-only: true\n", Stderr: "Logged in as octo, <nil>\n"}); err != nil || result != want {
			t.Errorf("%s: %+v, %v", arg, result, err)
		}
	}

	// It is stopped once it has printed all that it prints.
	enough := errors.New("enough")
	stopped, stop := context.WithCancelCause(t.Context())
	defer stop(nil)
	var watching sync.WaitGroup
	watching.Go(func() { stop(whenPrinted(stopped, docker, name, "Logged in as octo", enough)) })
	result, err := e.RunOneOff(stopped, task("hang"))
	stop(nil)
	watching.Wait()
	if !errors.Is(err, enough) || !strings.HasPrefix(result.Stderr, "Logged in as octo") {
		t.Errorf("hang: %+v, %v", result, err)
	}

	for what, change := range map[string]func(*compose.OneOff){
		"image": func(o *compose.OneOff) { o.Image = name + "-none" }, "volume": func(o *compose.OneOff) { o.Volume = name + "-none" },
	} {
		wrong := task("0")
		change(&wrong)
		if _, err := e.RunOneOff(t.Context(), wrong); !errors.Is(err, compose.ErrNotFound) || !strings.Contains(err.Error(), name+"-none") {
			t.Errorf("no %s: %v", what, err)
		}
	}
	if _, err := docker.VolumeInspect(t.Context(), name+"-none", client.VolumeInspectOptions{}); err == nil {
		t.Error("a volume was made for a name that is wrong")
	}
	left, err := docker.ContainerList(t.Context(), client.ContainerListOptions{All: true, Filters: client.Filters{}.Add("label", "mm-orchestrator.one-off="+name)})
	if err != nil || len(left.Items) > 0 {
		t.Errorf("left behind: %+v, %v", left.Items, err)
	}
}

// whenPrinted returns printed once the container of a purpose has printed a text.
func whenPrinted(ctx context.Context, docker *client.Client, purpose, text string, printed error) error {
	for ctx.Err() == nil {
		list, err := docker.ContainerList(ctx, client.ContainerListOptions{Filters: client.Filters{}.Add("label", "mm-orchestrator.one-off="+purpose)})
		if err != nil {
			return err
		}
		for _, item := range list.Items {
			logs, err := docker.ContainerLogs(ctx, item.ID, client.ContainerLogsOptions{ShowStdout: true, ShowStderr: true})
			if err != nil {
				return err
			}
			all, err := io.ReadAll(logs)
			logs.Close()
			if err != nil {
				return err
			}
			if bytes.Contains(all, []byte(text)) {
				return printed
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	return ctx.Err()
}
