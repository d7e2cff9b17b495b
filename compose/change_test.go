package compose_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/moby/client"

	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/sample"
)

// testProject is a compose project on the real engine, of services that are
// created and never started: their image has no program.
type testProject struct {
	t       *testing.T
	name    string
	dir     string
	program string
	engine  *compose.Engine
	docker  *client.Client
}

func newTestProject(t *testing.T, file string) *testProject {
	t.Helper()
	p := &testProject{
		t: t, name: "mmcompose" + strings.ToLower(rand.Text()[:8]), dir: t.TempDir(), program: devenv.Compose(t),
		engine: engine(t, os.Getenv("DOCKER_HOST")),
	}
	var err error
	if p.docker, err = client.New(client.FromEnv); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.docker.Close() })
	if err := sample.ImportBase(t.Context(), p.image(), "mm-orchestrator.test="+p.name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.compose("down", "--volumes", "--timeout", "0")
		p.docker.ImageRemove(context.Background(), p.image(), client.ImageRemoveOptions{Force: true})
	})
	var random [2]byte
	rand.Read(random[:]) // no two networks of the engine may overlap
	file = strings.NewReplacer("IMAGE", p.image(), "SUBNET", fmt.Sprintf("10.%d.%d", 192+random[0]%32, random[1])).Replace(file)
	if err := os.WriteFile(filepath.Join(p.dir, "compose.yaml"), []byte(file), 0o644); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *testProject) image() string { return "mm-orchestrator-test:" + p.name }

func (p *testProject) compose(args ...string) {
	p.t.Helper()
	// Not the test's context: Cleanup uses this too.
	cmd := exec.Command(p.program, append([]string{"--project-name", p.name}, args...)...)
	cmd.Dir = p.dir
	if out, err := cmd.CombinedOutput(); err != nil {
		p.t.Errorf("compose %v: %v\n%s", args, err, out)
	}
}

func (p *testProject) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

// everything is a service with all that an inspection has to bring back.
const everything = `services:
  web:
    image: IMAGE
    command: ["x", "y"]
    environment: {B: "2", A: "1"}
    labels: {own: label}
    networks:
      front: {aliases: [www, shop], ipv4_address: SUBNET.9}
      back: {aliases: [inner]}
    volumes: ["data:/data", "/anonymous", "./bind:/bind:ro", {type: tmpfs, target: /tmp}]
    ports: ["127.0.0.1:18080:80"]
    restart: on-failure
    cap_add: [NET_ADMIN]
    stop_grace_period: 3s
    ulimits: {nofile: 100}
    healthcheck: {test: [CMD, "no"], interval: 9s}
    extra_hosts: ["other:1.2.3.4"]
    tmpfs: [/run]
  two: {image: IMAGE, command: ["x"], scale: 2}
networks:
  front: {ipam: {config: [{subnet: SUBNET.0/24}]}}
  back: {}
volumes: {data: {}}
`

func TestProjectsAreRead(t *testing.T) {
	t.Parallel()
	p := newTestProject(t, everything)
	p.compose("up", "--no-start", "--quiet-pull")
	project, err := p.engine.Project(t.Context(), p.name)
	p.must(err)
	if got := strings.Join(project.Services(), " "); got != "two web" {
		t.Errorf("services %s", got)
	}
	if two := project.Of("two"); len(two) != 2 || two[0].Number != 1 || two[1].Number != 2 {
		t.Errorf("two: %+v", two)
	}
	web := project.Of("web")
	if len(web) != 1 || web[0].State != "created" || !strings.HasPrefix(web[0].ImageID, "sha256:") || web[0].Image != p.image() ||
		len(web[0].ConfigHash) != 64 || web[0].Created.IsZero() || web[0].Replaces || len(web[0].Networks) != 2 {
		t.Errorf("web: %+v", web)
	}
	if volumes := web[0].Volumes; volumes["/data"] != p.name+"_data" || len(volumes["/anonymous"]) != 64 || len(volumes) != 2 {
		t.Errorf("volumes of web: %v", volumes)
	}
	if len(project.Networks) != 3 || project.Networks[0].Name != p.name+"_back" || len(project.Volumes) != 1 || project.Volumes[0].Name != p.name+"_data" {
		t.Errorf("networks %v, volumes %v", project.Networks, project.Volumes)
	}
}

// TestContainersAreCreatedAgain removes a container and creates it again from what
// was recorded of it: nothing of its configuration may differ, and compose must see
// nothing to do.
func TestContainersAreCreatedAgain(t *testing.T) {
	t.Parallel()
	p := newTestProject(t, everything)
	p.compose("up", "--no-start")
	project, err := p.engine.Project(t.Context(), p.name)
	p.must(err)
	web := project.Of("web")[0]
	before, _, err := p.engine.InspectContainer(t.Context(), web.ID)
	p.must(err)
	text, err := before.MarshalJSON()
	p.must(err)
	var recorded compose.Inspection
	p.must(recorded.UnmarshalJSON(text))

	if _, err := p.engine.CreateContainer(t.Context(), web.Name, recorded); !errors.Is(err, compose.ErrNameTaken) {
		t.Errorf("a second container of one name: %v", err)
	}
	// The temporary name is that of compose.
	id, err := p.engine.CreateContainer(t.Context(), web.ID[:12]+"_"+web.Name, recorded)
	p.must(err)
	if err := p.engine.RenameContainer(t.Context(), id, web.Name); !errors.Is(err, compose.ErrNameTaken) {
		t.Errorf("a name that another container has: %v", err)
	}
	p.must(p.engine.RemoveContainer(t.Context(), web.ID))
	p.must(p.engine.RemoveContainer(t.Context(), web.ID))
	p.must(p.engine.RenameContainer(t.Context(), id, web.Name))
	again, now, err := p.engine.InspectContainer(t.Context(), id)
	p.must(err)
	if differing := before.Differences(again); len(differing) > 0 {
		t.Errorf("differing: %v\n%s", differing, text)
	}
	if now.Volumes["/anonymous"] != web.Volumes["/anonymous"] || now.ImageID != web.ImageID || now.Name != web.Name {
		t.Errorf("%+v, was %+v", now, web)
	}
	p.compose("up", "--no-start")
	project, err = p.engine.Project(t.Context(), p.name)
	p.must(err)
	if web := project.Of("web"); len(web) != 1 || web[0].ID != id {
		t.Errorf("compose created another container: %+v", web)
	}

	two, _, err := p.engine.InspectContainer(t.Context(), project.Of("two")[0].ID)
	p.must(err)
	differing := strings.Join(before.Differences(two), " ")
	for _, part := range []string{"Config.Cmd", "Config.Env", "HostConfig.PortBindings", "Mounts./data", "Networks." + p.name + "_front", "Config.Healthcheck"} {
		if !slices.Contains(strings.Fields(differing), part) {
			t.Errorf("%s is not among the differences: %s", part, differing)
		}
	}
	if _, _, err := p.engine.InspectContainer(t.Context(), "mm-no-such-container"); !errors.Is(err, compose.ErrNotFound) {
		t.Errorf("%v", err)
	}
}

// TestContainersWithTheNameOfTheMachine: the engine writes that name into the container's
// configuration, and refuses a configuration with any name.
func TestContainersWithTheNameOfTheMachine(t *testing.T) {
	t.Parallel()
	for name, settings := range map[string]string{
		"name":                           "uts: host",
		"name and network":               "uts: host, network_mode: host",
		"name and network, domain":       "uts: host, network_mode: host, domainname: example.test",
		"network":                        "network_mode: host",
		"network, own name":              "network_mode: host, hostname: own, domainname: example.test",
		"network of a container, domain": "network_mode: 'service:other', domainname: example.test",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTestProject(t, "services:\n  web: {image: IMAGE, command: [x], "+settings+"}\n  other: {image: IMAGE, command: [x]}\n")
			p.compose("up", "--no-start")
			project, err := p.engine.Project(t.Context(), p.name)
			p.must(err)
			before, web, err := p.engine.InspectContainer(t.Context(), project.Of("web")[0].ID)
			p.must(err)
			id, err := p.engine.CreateContainer(t.Context(), web.ID[:12]+"_"+web.Name, before)
			p.must(err)
			p.must(p.engine.RemoveContainer(t.Context(), web.ID))
			p.must(p.engine.RenameContainer(t.Context(), id, web.Name))
			again, _, err := p.engine.InspectContainer(t.Context(), id)
			p.must(err)
			if differing := before.Differences(again); len(differing) > 0 {
				t.Errorf("differing: %v", differing)
			}
		})
	}
}

func TestPins(t *testing.T) {
	t.Parallel()
	p := newTestProject(t, everything)
	image, err := p.engine.InspectImage(t.Context(), p.image())
	p.must(err)
	name := "mm-orchestrator-pin-" + p.name
	if _, err := p.engine.FindPin(t.Context(), name); !errors.Is(err, compose.ErrNotFound) {
		t.Errorf("%v", err)
	}
	pin := compose.Pin{Name: name, Owner: p.name, ImageID: image.ID, Project: "p", Service: "web"}
	t.Cleanup(func() { p.engine.RemovePin(context.Background(), name) })
	p.must(p.engine.CreatePin(t.Context(), pin))
	first, err := p.engine.FindPin(t.Context(), name)
	p.must(err)
	p.must(p.engine.CreatePin(t.Context(), pin)) // an act that is repeated after a crash
	again, err := p.engine.FindPin(t.Context(), name)
	p.must(err)
	if first.Created != again.Created || again.Inspection != nil || again.ImageID != image.ID || again.Service != "web" || again.Project != "p" {
		t.Errorf("%+v, then %+v", first, again)
	}
	pin.Owner = "another"
	if err := p.engine.CreatePin(t.Context(), pin); !errors.Is(err, compose.ErrNameTaken) {
		t.Errorf("the pin of another owner: %v", err)
	}
	pin.Owner = p.name

	p.compose("up", "--no-start")
	project, err := p.engine.Project(t.Context(), p.name)
	p.must(err)
	inspection, web, err := p.engine.InspectContainer(t.Context(), project.Of("web")[0].ID)
	p.must(err)
	pin.Inspection = &inspection
	p.must(p.engine.CreatePin(t.Context(), pin)) // replaces the one without it
	found, err := p.engine.FindPin(t.Context(), name)
	p.must(err)
	if found.Inspection == nil || len(found.Inspection.Differences(inspection)) > 0 {
		t.Errorf("%+v", found.Inspection)
	}
	pins, err := p.engine.ListPins(t.Context(), p.name)
	p.must(err)
	if len(pins) != 1 || pins[0].Name != name || pins[0].ImageID != image.ID {
		t.Errorf("%+v", pins)
	}
	all, err := p.engine.ListPins(t.Context(), "")
	p.must(err)
	if !slices.ContainsFunc(all, func(pin compose.Pin) bool { return pin.Name == name }) {
		t.Errorf("not listed: %+v", all)
	}
	// Compose must not take the pin for a container of the project.
	project, err = p.engine.Project(t.Context(), p.name)
	p.must(err)
	if n := len(project.Containers); n != 3 {
		t.Errorf("the project has %d containers", n)
	}
	p.must(p.engine.RemovePin(t.Context(), name))
	p.must(p.engine.RemovePin(t.Context(), name))
	if _, err := p.engine.FindPin(t.Context(), web.ID); !errors.Is(err, compose.ErrNotFound) {
		t.Errorf("a container that is no pin: %v", err)
	}
}

func TestImagesAreNamedSavedAndLoaded(t *testing.T) {
	t.Parallel()
	p := newTestProject(t, "services: {}\n")
	image, err := p.engine.InspectImage(t.Context(), p.image())
	p.must(err)
	second := p.image() + "-second"
	p.must(p.engine.TagImage(t.Context(), image.ID, second))
	if named, err := p.engine.InspectImage(t.Context(), second); err != nil || named.ID != image.ID || len(named.Names) != 2 {
		t.Errorf("%+v, %v", named, err)
	}
	p.must(p.engine.UntagImage(t.Context(), second))
	p.must(p.engine.UntagImage(t.Context(), second))
	var saved bytes.Buffer
	p.must(p.engine.SaveImage(t.Context(), image.ID, &saved))
	p.must(p.engine.UntagImage(t.Context(), p.image()))
	if _, err := p.engine.InspectImage(t.Context(), image.ID); !errors.Is(err, compose.ErrNotFound) {
		t.Fatalf("the image is still there: %v", err)
	}
	if err := p.engine.LoadImage(t.Context(), strings.NewReader("no archive")); err == nil {
		t.Error("a broken archive was loaded")
	}
	p.must(p.engine.LoadImage(t.Context(), &saved))
	loaded, err := p.engine.InspectImage(t.Context(), image.ID)
	if err != nil || len(loaded.Names) != 0 {
		t.Errorf("%+v, %v", loaded, err)
	}
	p.must(p.engine.TagImage(t.Context(), image.ID, p.image()))
	if err := p.engine.SaveImage(t.Context(), "mm-no-such-image", &saved); !errors.Is(err, compose.ErrNotFound) {
		t.Errorf("%v", err)
	}
}
