package compose_test

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// programs are what the images of helpers and of their services need.
var programs = sync.OnceValues(func() (map[string][]byte, error) {
	dir, err := os.MkdirTemp("", "mm-helper-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	built := map[string][]byte{}
	for name, source := range map[string]string{"idle": "./testdata/idle", "mm-orchestrator": "../cmd/mm-orchestrator"} {
		path := filepath.Join(dir, name)
		cmd := exec.Command("go", "build", "-ldflags", "-s -w", "-o", path, source)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%w: %s", err, out)
		}
		if built[name], err = os.ReadFile(path); err != nil {
			return nil, err
		}
	}
	return built, nil
})

// A helped is a compose project whose service worker plays the part of a worker
// that replaces itself.
type helped struct {
	t       *testing.T
	engine  *compose.Engine
	docker  *client.Client
	host    string
	name    string
	dir     string
	program string
	before  compose.Container
	task    compose.HelperTask
}

// newHelped starts the project on an engine, "" for that of all tests, and gives
// the service's image name to another image: the next `up` replaces the container.
// The new image is sound, or its program exits at once.
func newHelped(t *testing.T, host string, sound bool) *helped {
	t.Helper()
	h := &helped{t: t, host: cmp.Or(host, os.Getenv("DOCKER_HOST")), name: "mmhelper" + strings.ToLower(rand.Text()[:8]), dir: t.TempDir(), program: devenv.Compose(t)}
	h.engine = engine(t, h.host)
	options := []client.Opt{client.FromEnv}
	if host != "" {
		options = []client.Opt{client.WithHost(host)}
	}
	var err error
	if h.docker, err = client.New(options...); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.docker.Close() })
	h.importImages(sound)
	socket := strings.TrimPrefix(cmp.Or(h.host, client.DefaultDockerHost), "unix://")
	h.must(os.WriteFile(filepath.Join(h.dir, "compose.yaml"), []byte(`services:
  worker:
    image: `+h.image("current")+`
    command: ["/idle"]
    restart: unless-stopped
    stop_grace_period: 2s
    volumes: ["`+h.dir+`:`+h.dir+`", "`+socket+`:/var/run/docker.sock"]
  other:
    image: `+h.image("old")+`
    command: ["/idle"]
    depends_on: [worker]
`), 0o644))
	h.must(h.engine.TagImage(t.Context(), h.image("old"), h.image("current")))
	t.Cleanup(h.remove)
	h.compose("up", "-d")
	h.before = h.container()
	h.must(h.engine.TagImage(t.Context(), h.image("new"), h.image("current")))

	state, err := h.engine.ServiceState(t.Context(), h.name, "worker")
	h.must(err)
	h.task = compose.HelperTask{
		Name: compose.HelperPrefix + h.name, RunID: h.name, Step: "restart", Workspace: h.dir, Environ: []string{"HOME=/", "PATH=/"},
		Command: []string{"/docker-compose", "--project-name", h.name, "up", "-d", "--no-deps", "worker"},
		Before:  state, Window: 4 * time.Second,
	}
	return h
}

func (h *helped) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *helped) image(tag string) string { return "mm-orchestrator-test-" + h.name + ":" + tag }

// importImages creates the image old, and the image new from it.
func (h *helped) importImages(sound bool) {
	h.t.Helper()
	built, err := programs()
	h.must(err)
	composeProgram, err := os.ReadFile(h.program)
	h.must(err)
	// Labels as compose gives to the images that it builds.
	answer, err := h.docker.ImageImport(h.t.Context(), client.ImageImportSource{SourceName: "-", Source: h.archive(map[string][]byte{
		"idle": built["idle"], "mm-orchestrator": built["mm-orchestrator"], "docker-compose": composeProgram, "version": []byte("old " + h.name),
	})}, strings.Split(h.image("old"), ":")[0], client.ImageImportOptions{
		Tag: "old", Changes: []string{"LABEL com.docker.compose.project=" + h.name, "LABEL com.docker.compose.service=worker"},
	})
	h.must(err)
	_, err = io.Copy(io.Discard, answer)
	h.must(err)
	answer.Close()

	changed := map[string][]byte{"version": []byte("new " + h.name)}
	if !sound {
		changed["fails"] = nil
	}
	created, err := h.docker.ContainerCreate(h.t.Context(), client.ContainerCreateOptions{Config: &container.Config{Image: h.image("old"), Cmd: []string{"/idle"}}})
	h.must(err)
	defer h.engine.RemoveContainer(context.Background(), created.ID)
	_, err = h.docker.CopyToContainer(h.t.Context(), created.ID, client.CopyToContainerOptions{DestinationPath: "/", Content: h.archive(changed)})
	h.must(err)
	_, err = h.docker.ContainerCommit(h.t.Context(), created.ID, client.ContainerCommitOptions{Reference: h.image("new")})
	h.must(err)
}

func (h *helped) archive(files map[string][]byte) io.Reader {
	h.t.Helper()
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for name, content := range files {
		h.must(w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(content))}))
		_, err := w.Write(content)
		h.must(err)
	}
	h.must(w.Close())
	return &layer
}

func (h *helped) compose(args ...string) {
	h.t.Helper()
	// Not the test's context: the end of the test uses this too.
	cmd := exec.Command(h.program, append([]string{"--project-name", h.name}, args...)...)
	cmd.Dir, cmd.Env = h.dir, append(os.Environ(), "DOCKER_HOST="+h.host)
	if out, err := cmd.CombinedOutput(); err != nil {
		h.t.Errorf("compose %v: %v\n%s", args, err, out)
	}
}

func (h *helped) remove() {
	ctx := context.Background()
	if h.t.Failed() {
		state, err := h.engine.ReadHelper(ctx, h.task.Name)
		h.t.Logf("helper: %v", err)
		for _, event := range state.Events {
			h.t.Logf("%s %s %q %d", event.At.Format("15:04:05.000"), event.Kind, event.Text, event.Code)
		}
	}
	if err := h.engine.RemoveHelpers(ctx, h.name); err != nil {
		h.t.Error(err)
	}
	h.compose("down", "--volumes", "--timeout", "1", "--remove-orphans")
	for _, tag := range []string{"current", "new", "old"} {
		if err := h.engine.UntagImage(ctx, h.image(tag)); err != nil {
			h.t.Error(err)
		}
	}
}

// container returns the only container of the service, which must have its name.
func (h *helped) container() compose.Container {
	h.t.Helper()
	state, err := h.engine.ServiceState(h.t.Context(), h.name, "worker")
	h.must(err)
	if len(state.Containers) != 1 || state.Containers[0].Container.Name != h.name+"-worker-1" {
		h.t.Fatalf("containers of the service: %+v", state.Containers)
	}
	return state.Containers[0].Container
}

func (h *helped) start() {
	h.t.Helper()
	own, err := h.engine.Own(h.t.Context(), []string{h.before.ID})
	h.must(err)
	if own == nil || own.Service != "worker" || own.Project != h.name {
		h.t.Fatalf("own container: %+v", own)
	}
	h.must(h.engine.StartHelper(h.t.Context(), *own, "/mm-orchestrator", h.task))
	h.must(h.engine.StartHelper(h.t.Context(), *own, "/mm-orchestrator", h.task)) // a worker that was killed after the first
}

// await waits until the helper's state is as wanted.
func (h *helped) await(what string, is func(compose.HelperState) bool) compose.HelperState {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), 2*time.Minute)
	defer cancel()
	for tick := time.NewTicker(50 * time.Millisecond); ; {
		state, err := h.engine.ReadHelper(ctx, h.task.Name)
		if err == nil && is(state) {
			return state
		}
		if ctx.Err() != nil {
			h.t.Fatalf("the helper has not %s: %v, %+v", what, err, state)
		}
		<-tick.C
	}
}

// isOld and isNew check which version runs in the end, and that nothing is left
// beside it.
func (h *helped) isOld() { h.runs("old") }
func (h *helped) isNew() { h.runs("new") }

func (h *helped) runs(tag string) {
	h.t.Helper()
	image, err := h.engine.InspectImage(h.t.Context(), h.image(tag))
	h.must(err)
	now := h.container()
	if now.ImageID != image.ID || now.State != "running" {
		h.t.Errorf("the service is %+v, want the %s image, running", now, tag)
	}
	if now.ConfigHash != h.before.ConfigHash {
		h.t.Errorf("the configuration has hash %s, was %s", now.ConfigHash, h.before.ConfigHash)
	}
	current, err := h.engine.InspectImage(h.t.Context(), h.image("current"))
	h.must(err)
	if current.ID != image.ID {
		h.t.Errorf("the image name of the service is another image than the %s one", tag)
	}
	// Compose must see nothing to do.
	h.compose("up", "-d", "--no-deps", "worker")
	if again := h.container(); again.ID != now.ID {
		h.t.Error("compose replaces the container once more")
	}
}

func TestHelperReplacesAContainer(t *testing.T) {
	t.Parallel()
	h := newHelped(t, "", true)
	pin := compose.Pin{Name: "mm-orchestrator-pin-" + h.name, Owner: h.name, ImageID: h.before.ImageID}
	t.Cleanup(func() { h.engine.RemovePin(context.Background(), pin.Name) })
	h.must(h.engine.CreatePin(t.Context(), pin))
	h.start()
	// Neither is a container of the service, although their image has its labels.
	if found, err := h.engine.Containers(t.Context(), h.name, "worker"); err != nil || len(found) != 1 && !strings.Contains(found[0].Name+found[1].Name, "_") {
		t.Errorf("containers of the service: %+v, %v", found, err)
	}
	h.await("ended the command", func(s compose.HelperState) bool { return s.Ended })
	h.must(h.engine.Confirm(t.Context(), h.task.Name, "orchestrator@new"))
	state := h.await("heard of the successor", func(s compose.HelperState) bool { return s.Confirmed })
	if state.Code != 0 || !strings.Contains(output(state), h.name+"-worker-1") || strings.Contains(output(state), "other") {
		t.Errorf("code %d, output %q", state.Code, output(state))
	}
	helpers, err := h.engine.ListHelpers(t.Context(), h.name)
	if err != nil || len(helpers) != 2 {
		t.Errorf("helpers %+v, %v", helpers, err)
	}
	h.await("ended its watch", func(s compose.HelperState) bool { return s.Done })
	h.isNew()
	h.must(h.engine.RemoveHelpers(t.Context(), h.name))
	if _, err := h.engine.ReadHelper(t.Context(), h.task.Name); !errors.Is(err, compose.ErrNoHelper) {
		t.Errorf("after its removal: %v", err)
	}
}

func TestHelperPutsBackAContainerThatExits(t *testing.T) {
	t.Parallel()
	h := newHelped(t, "", false)
	h.start()
	state := h.await("put the service back", func(s compose.HelperState) bool { return s.Done })
	if !state.PutBack || !strings.Contains(state.Why, "does not stay up") && !strings.Contains(state.Why, "no worker has taken") {
		t.Errorf("%+v", state)
	}
	h.isOld()
}

func TestHelperOnlyPutsBack(t *testing.T) {
	t.Parallel()
	h := newHelped(t, "", true)
	h.compose("up", "-d", "--no-deps", "worker")
	h.isNew()
	own, err := h.engine.Own(t.Context(), []string{h.container().ID})
	h.must(err)
	h.task.Step, h.task.Command = "rollback", nil
	h.must(h.engine.StartHelper(t.Context(), *own, "/mm-orchestrator", h.task))
	h.await("put the service back", func(s compose.HelperState) bool { return s.PutBack && s.Done })
	h.isOld()
}

var kills = flag.Int("kills", 4, "how many helpers are killed, each at a random moment")

// TestHelperIsKilled kills the helper, or its standby, at random moments, as a
// user does and as the kernel does. In the end the new service runs if somebody has
// confirmed that the work goes on, and otherwise the old one.
func TestHelperIsKilled(t *testing.T) {
	t.Parallel()
	slots := make(chan struct{}, 3)
	for trial := range *kills {
		t.Run(fmt.Sprint(trial), func(t *testing.T) {
			t.Parallel()
			slots <- struct{}{}
			defer func() { <-slots }()
			confirmed := trial%2 == 0
			h := newHelped(t, "", true)
			h.start()
			kill := time.NewTimer(time.Duration(mathrand.Int64N(int64(2500 * time.Millisecond))))
			defer kill.Stop()
			<-kill.C
			name := h.task.Name
			if trial%4 == 3 {
				name += "-standby"
			}
			_, err := h.docker.ContainerKill(t.Context(), name, client.ContainerKillOptions{Signal: "KILL"})
			t.Logf("killed %s: %v", name, err)
			h.await("ended the command", func(s compose.HelperState) bool {
				if !s.Begun { // killed before it did anything: the worker still runs and starts it again
					h.start()
				}
				return s.Ended
			})
			if confirmed {
				h.must(h.engine.Confirm(t.Context(), h.task.Name, "orchestrator@new"))
			}
			state := h.await("ended", func(s compose.HelperState) bool { return s.Done })
			if state.PutBack == confirmed {
				t.Errorf("put back %t: %s", state.PutBack, state.Why)
			}
			h.runs(map[bool]string{true: "new", false: "old"}[confirmed])
		})
	}
}

func output(state compose.HelperState) string {
	var text strings.Builder
	for _, event := range state.Events {
		if event.Kind == compose.HelperOutput {
			text.WriteString(event.Text)
		}
	}
	return text.String()
}
