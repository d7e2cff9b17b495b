package orchestrator

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// everyLayout says that `make test-change` runs the tests.
var everyLayout = os.Getenv("MM_TEST_CHANGE") == "all"

// A layout is a compose project in which a run replaces the container of one
// service.
type layout struct {
	name string
	// files are those of the project. A folder that is a service's build context
	// gets a Dockerfile and the program. PROJECT stands for the project's name.
	files map[string]string
	links map[string]string // symbolic links and their targets
	// options are compose's global options, before the subcommand. Without a name
	// of the project, --project-name is added.
	options []string
	environ []string
	// target is the service, web by default; command are the words of the plan's
	// restart command from `up` on.
	target  string
	command []string
	// change is what the run changes, by default the program's behaviour.
	change map[string]string
	// prepare runs after the project was started.
	prepare func(c *layoutEnv)
	// absent says that the target had no container before the run.
	absent bool
	// often says that the layout is also part of `go test`.
	often bool
}

const otherService = "\n  other: {build: ./other, stop_grace_period: 1s}\n"

var layouts = []layout{
	{name: "depends_on", often: true, files: map[string]string{
		"compose.yaml": "services:\n  web: {build: ./web, depends_on: [other]}" + otherService}},
	{name: "depends_on healthy", files: map[string]string{
		"compose.yaml": "services:\n  web: {build: ./web, depends_on: {other: {condition: service_healthy}}}\n" +
			"  other: {build: ./other, healthcheck: {test: [CMD, /server, check], interval: 300ms}}\n"}},
	{name: "depends_on with restart", files: map[string]string{
		"compose.yaml": "services:\n  front: {build: ./other, depends_on: {web: {condition: service_started, restart: true}}}\n  web: {build: ./web}\n"}},
	{name: "one-shot dependency", files: map[string]string{
		"other/behaviour": "done",
		"compose.yaml":    "services:\n  web: {build: ./web, depends_on: {other: {condition: service_completed_successfully}}}" + otherService}},
	{name: "shared image", often: true, files: map[string]string{
		"compose.yaml": "services:\n  web: {build: ./web, image: 'PROJECT-app'}\n  other: {image: 'PROJECT-app', depends_on: [web]}\n"}},
	{name: "profile", files: map[string]string{
		"compose.yaml": "services:\n  web: {build: ./web, profiles: [extra]}" + otherService},
		options: []string{"--profile", "extra"}},
	{name: "profile that is not enabled", files: map[string]string{
		"compose.yaml": "services:\n  web: {build: ./web, profiles: [extra]}" + otherService},
		prepare: func(c *layoutEnv) { c.compose(c.t.Context(), "up", "-d", "--build", "web") }},
	{name: "extends", files: map[string]string{
		"common/base.yaml": "services:\n  base: {build: ../web, environment: {A: '1'}, labels: {own: label}}\n",
		"compose.yaml":     "services:\n  web: {extends: {file: common/base.yaml, service: base}, environment: {B: '2'}}" + otherService}},
	{name: "include", files: map[string]string{
		"more/compose.yaml": "services:\n  web: {build: ../web, environment: {A: '1'}}\n",
		"compose.yaml":      "include: [more/compose.yaml]\nservices:" + otherService}},
	{name: "several files", files: map[string]string{
		"a.yaml": "services:\n  web: {build: ./web}" + otherService,
		"b.yaml": "services:\n  web: {environment: {FROM: b}}\n"},
		options: []string{"-f", "a.yaml", "--file=b.yaml"}},
	{name: "override", files: map[string]string{
		"compose.yaml":          "services:\n  web: {build: ./web}" + otherService,
		"compose.override.yaml": "services:\n  web: {environment: {FROM: override}, stop_grace_period: 2s}\n"}},
	{name: ".env", files: map[string]string{
		".env":         "LEVEL=info\nTAG=one\n",
		"compose.yaml": "services:\n  web: {build: ./web, image: 'PROJECT-web:${TAG}', environment: {LEVEL: '${LEVEL}'}}" + otherService},
		change: map[string]string{".env": "LEVEL=debug\nTAG=two\n", "web/behaviour": "ok 2"}},
	{name: "env file option", files: map[string]string{
		"settings":     "LEVEL=info\n",
		"compose.yaml": "services:\n  web: {build: ./web, environment: {LEVEL: '${LEVEL}'}}" + otherService},
		options: []string{"--env-file", "settings"}, change: map[string]string{"settings": "LEVEL=debug\n"}},
	{name: "env_file", files: map[string]string{
		"web.env":      "LEVEL=info\nSECRET=x\n",
		"compose.yaml": "services:\n  web: {build: ./web, env_file: [web.env]}" + otherService},
		change: map[string]string{"web.env": "LEVEL=debug\n"}},
	{name: "bind mounts", files: map[string]string{
		"data/file": "x", "real/file": "y",
		"compose.yaml": "services:\n  web: {build: ./web, volumes: ['./data:/data:ro', './linked:/linked', '$PWD/data:/pwd']}" + otherService},
		links: map[string]string{"linked": "real"}},
	{name: "one-shot target", files: map[string]string{
		"web/behaviour": "done",
		"compose.yaml":  "services:\n  web: {build: ./web}" + otherService},
		change: map[string]string{"web/behaviour": "exit"}},
	{name: "project of the same name elsewhere", files: map[string]string{
		"compose.yaml": "services:\n  web: {build: ./web}" + otherService},
		prepare: func(c *layoutEnv) {
			c.file("elsewhere/compose.yaml", "services:\n  third: {build: ../other}\n")
			c.composeIn(filepath.Join(c.workspace, "elsewhere"), "up", "-d", "--build")
		}},
	{name: "anonymous volumes", often: true, files: map[string]string{
		"web/Dockerfile": "VOLUME /image\n",
		"compose.yaml":   "services:\n  web: {build: ./web, volumes: [/short, {type: volume, target: /long}, 'named:/named']}" + otherService + "volumes: {named: {}}\n"}},
	{name: "networks", files: map[string]string{
		"compose.yaml": "services:\n  web:\n    build: ./web\n    networks: {front: {aliases: [www], ipv4_address: SUBNET.9}, back: {aliases: [inner], priority: 9}}\n" +
			"  other: {build: ./other, networks: [back]}\nnetworks: {front: {ipam: {config: [{subnet: SUBNET.0/24}]}}, back: {}}\n"}},
	{name: "secrets and configs", files: map[string]string{
		"secret": "s", "config": "c",
		"compose.yaml": "services:\n  web: {build: ./web, secrets: [s], configs: [{source: c, target: /c}]}" + otherService + "secrets: {s: {file: secret}}\nconfigs: {c: {file: config}}\n"}},
	{name: "scale", often: true, files: map[string]string{
		"compose.yaml": "services:\n  web: {build: ./web, scale: 2}" + otherService}},
	{name: "image key", files: map[string]string{
		"compose.yaml": "services:\n  web: {build: ./web, image: 'PROJECT/web:1.2'}" + otherService}},
	{name: "container_name", files: map[string]string{
		"compose.yaml": "services:\n  web: {build: ./web, container_name: PROJECT-own-name}" + otherService}},
	{name: "healthcheck", files: map[string]string{
		"compose.yaml": "services:\n  web: {build: ./web, healthcheck: {test: [CMD, /server, check], interval: 500ms, retries: 2}, restart: unless-stopped, ports: ['127.0.0.1:${WEB_PORT}:8080']}" + otherService}},
	{name: "shared network of a service", files: map[string]string{
		"compose.yaml": "services:\n  web: {build: ./web, network_mode: 'service:other', environment: {PORT: '8081'}}" + otherService}},
	{name: "many settings", files: map[string]string{
		"compose.yaml": `services:
  web:
    build: ./web
    hostname: own
    user: "0:0"
    working_dir: /tmp
    init: true
    read_only: true
    tmpfs: [/run]
    cap_drop: [ALL]
    cap_add: [NET_BIND_SERVICE]
    extra_hosts: ["a.test:1.2.3.4"]
    dns: [127.0.0.1]
    sysctls: {net.core.somaxconn: 99}
    ulimits: {nofile: 200}
    mem_limit: 64m
    logging: {driver: json-file, options: {max-size: 1m}}
    labels: {own.label: value}
    stop_signal: SIGINT
    shm_size: 16m
    security_opt: [no-new-privileges]
` + otherService}},
	{name: "name in the file", options: []string{"--progress", "plain"}, environ: []string{"COMPOSE_PROJECT_NAME=PROJECT"}, files: map[string]string{
		"compose.yaml": "name: not-this-one\nservices:\n  web: {build: ./web}" + otherService},
		command: []string{"up", "--detach", "web", "--no-deps", "--timeout", "3"}},
	{name: "stopped before", files: map[string]string{
		"compose.yaml": "services:\n  web: {build: ./web}" + otherService},
		prepare: func(c *layoutEnv) { c.compose(c.t.Context(), "stop", "web") }},
	{name: "paused before", files: map[string]string{
		"compose.yaml": "services:\n  web: {build: ./web}" + otherService},
		prepare: func(c *layoutEnv) { c.compose(c.t.Context(), "pause", "web") }},
	{name: "never created before", absent: true, files: map[string]string{
		"compose.yaml": "services:\n  web: {build: ./web}" + otherService},
		prepare: func(c *layoutEnv) { c.compose(c.t.Context(), "rm", "-sf", "web") }},
	{name: "whole project", target: "web other", command: []string{"up", "-d"}, files: map[string]string{
		"compose.yaml": "services:\n  web: {build: ./web}" + otherService},
		change: map[string]string{"web/behaviour": "ok 2", "other/behaviour": "ok 2"}},
	{name: "network added", files: map[string]string{
		"compose.yaml": "services:\n  web: {build: ./web}" + otherService},
		change: map[string]string{"compose.yaml": "services:\n  web: {build: ./web, networks: [default, new]}" + otherService + "networks: {new: {}}\n"}},
}

// layoutEnv is a started project of a layout.
type layoutEnv struct {
	*composeEnv
	layout layout
	prefix []string
	// requested says that an operator asks for the rollback.
	requested bool
}

func newLayoutEnv(t *testing.T, l layout, program string) *layoutEnv {
	t.Helper()
	server, err := buildServer()
	if err != nil {
		t.Fatal(err)
	}
	c := &layoutEnv{composeEnv: newComposeEnv(t, program), layout: l}
	subnet := fmt.Sprintf("10.%d.%d", 192+c.port%32, c.port/32%256)
	replace := strings.NewReplacer("PROJECT", c.project, "SUBNET", subnet, "$PWD", c.workspace).Replace
	c.config.Environ = append(c.config.Environ, "DOCKER_BUILDKIT=0")
	for _, variable := range l.environ {
		name, value, _ := strings.Cut(variable, "=")
		c.config.Environ = append(c.config.Environ, name+"="+replace(value))
	}
	files := map[string]string{"web/behaviour": "ok 1", "other/behaviour": "ok 1", "web/Dockerfile": "", "other/Dockerfile": ""}
	maps.Copy(files, l.files)
	for name, text := range files {
		if filepath.Base(name) == "Dockerfile" {
			text = "FROM " + c.base() + "\nCOPY server behaviour /\nCMD [\"/server\"]\nLABEL mm-orchestrator.test=" + c.project + "\n" + text
		}
		c.file(name, replace(text))
	}
	for _, service := range []string{"web", "other"} {
		own := append(slices.Clip(server), c.project+"/"+service...)
		if err := os.WriteFile(filepath.Join(c.workspace, service, "server"), own, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range l.links {
		if err := os.Symlink(target, filepath.Join(c.workspace, name)); err != nil {
			t.Fatal(err)
		}
	}
	c.prefix = append([]string{"docker", "compose"}, l.options...)
	if len(l.environ) == 0 {
		c.prefix = append(c.prefix, "--project-name", c.project)
	}
	c.compose(t.Context(), "up", "-d", "--build")
	if l.prepare != nil {
		l.prepare(c)
	}
	services := strings.Fields(l.target)
	if l.target == "" {
		services = []string{"web"}
	}
	c.layout.target = strings.Join(services, " ")
	up := l.command
	if up == nil {
		up = append([]string{"up", "-d", "--no-deps"}, services...)
	}
	c.setPlan(append([]string{"build"}, services...), up)
	return c
}

// setPlan makes a plan with these compose commands.
func (c *layoutEnv) setPlan(build, up []string) {
	c.t.Helper()
	text, err := json.Marshal([]any{
		map[string]any{"name": "build", "parameters": map[string]any{"command": slices.Concat(c.prefix, build)}},
		map[string]any{"name": "restart", "parameters": map[string]any{"command": slices.Concat(c.prefix, up), "restartTimeoutSeconds": 5}},
		map[string]any{"name": "rollback", "parameters": map[string]any{}},
	})
	if err != nil {
		c.t.Fatal(err)
	}
	c.plan(string(text))
}

// compose runs compose with the layout's options.
func (c *layoutEnv) compose(ctx context.Context, args ...string) {
	c.t.Helper()
	cmd := exec.CommandContext(ctx, c.program, slices.Concat(c.prefix[2:], args)...)
	cmd.Dir, cmd.Env = c.workspace, c.config.Environ
	if out, err := cmd.CombinedOutput(); err != nil {
		c.t.Fatalf("compose %v: %v\n%s", args, err, out)
	}
}

// composeIn runs compose in another folder.
func (c *layoutEnv) composeIn(dir string, args ...string) {
	c.t.Helper()
	cmd := exec.CommandContext(c.t.Context(), c.program, append([]string{"--project-name", c.project}, args...)...)
	cmd.Dir, cmd.Env = dir, c.config.Environ
	if out, err := cmd.CombinedOutput(); err != nil {
		c.t.Fatalf("compose %v: %v\n%s", args, err, out)
	}
}

// change does to the workspace what the layout's run does, and returns what takes it
// back.
func (c *layoutEnv) change() (undo func()) {
	c.t.Helper()
	files := c.layout.change
	if files == nil {
		files = map[string]string{"web/behaviour": "ok 2"}
	}
	before := map[string]string{}
	for name, text := range files {
		old, err := os.ReadFile(filepath.Join(c.workspace, name))
		if err != nil {
			c.t.Fatal(err)
		}
		before[name] = string(old)
		c.file(name, strings.ReplaceAll(text, "PROJECT", c.project))
	}
	return func() {
		for name, text := range before {
			c.file(name, text)
		}
	}
}

// projectState is what must be the same before and after.
type projectState struct {
	compose.Project
	images      map[string]string // ids by name
	inspections map[string]compose.Inspection
}

func (c *layoutEnv) state() projectState {
	c.t.Helper()
	project, err := c.engine.Project(c.t.Context(), c.project)
	if err != nil {
		c.t.Fatal(err)
	}
	s := projectState{project, map[string]string{}, map[string]compose.Inspection{}}
	for _, container := range project.Containers {
		inspection, _, err := c.engine.InspectContainer(c.t.Context(), container.ID)
		if err != nil {
			c.t.Fatal(err)
		}
		s.inspections[container.ID] = inspection
		if image, err := c.engine.InspectImage(c.t.Context(), container.Image); err == nil {
			s.images[container.Image] = image.ID
		}
	}
	return s
}

func (c *layoutEnv) isTarget(service string) bool {
	return slices.Contains(strings.Fields(c.layout.target), service)
}

// othersAre checks that the containers of other services are the same, and that none
// is new.
func (c *layoutEnv) othersAre(before, after projectState) {
	c.t.Helper()
	list := func(s projectState) (lines []string) {
		for _, container := range s.Containers {
			if !c.isTarget(container.Service) {
				lines = append(lines, fmt.Sprintf("%s %.12s %s since %s, restarted %d, health %s", container.Name, container.ID, container.State, container.StartedAt, container.Restarts, container.Health))
			}
		}
		return lines
	}
	same(c.t, "state of other services", strings.Join(list(after), "\n"), strings.Join(list(before), "\n"))
}

// isAsBefore checks that the target is as before too.
func (c *layoutEnv) isAsBefore(before, after projectState) {
	c.t.Helper()
	c.othersAre(before, after)
	list := func(s projectState) (lines []string) {
		for _, container := range s.Containers {
			state := container.State
			if state == "exited" {
				state = "created" // a container that has ended is not started for the sake of its state
			}
			lines = append(lines, fmt.Sprintf("%s: image %s %s, configuration %s, %s, volumes %v", container.Name, container.Image, container.ImageID, container.ConfigHash, state, container.Volumes))
		}
		for _, network := range s.Networks {
			lines = append(lines, "network "+network.Name+" "+network.ID)
		}
		for _, volume := range s.Volumes {
			lines = append(lines, "volume "+volume.Name)
		}
		for _, name := range slices.Sorted(maps.Keys(s.images)) {
			lines = append(lines, name+" is "+s.images[name])
		}
		return lines
	}
	same(c.t, "project", strings.Join(list(after), "\n"), strings.Join(list(before), "\n"))
	for i, container := range after.Containers {
		if i < len(before.Containers) && before.Containers[i].Name == container.Name {
			if differing := before.inspections[before.Containers[i].ID].Differences(after.inspections[container.ID]); len(differing) > 0 {
				c.t.Errorf("configuration of %s differs: %v", container.Name, differing)
			}
		}
	}
}

// restoreImage does the part of a rollback that is about images and containers.
func (c *layoutEnv) restoreImage(ctx context.Context) (imageOutcome, *Failure) {
	c.t.Helper()
	o, err := New(c.config)
	if err != nil {
		c.t.Fatal(err)
	}
	begun := store.Start{Run: c.steps.run, Claim: store.Claim{RunID: c.steps.run.ID, Step: store.StepRollback, Attempt: 1, Starts: 1, StartedAt: time.Now()}}
	s := &stepRun{Orchestrator: o, log: o.log, runID: begun.Run.ID, step: store.StepRollback, runner: o.runner, journal: o.openJournal(o.log, begun, func(endCause) {})}
	s.requested = c.requested
	defer s.journal.close()
	if failure := s.open(c.steps.run); failure != nil {
		c.t.Fatal(failure)
	}
	defer s.dir.Close()
	if failure := s.loadRecord(c.steps.change); failure != nil {
		c.t.Fatal(failure)
	}
	log, failure := s.startLog("rollback.log", c.workspace, nil)
	if failure != nil {
		c.t.Fatal(failure)
	}
	defer func() {
		if _, err := log.Finish(); err != nil {
			c.t.Error(err)
		}
	}()
	return s.restoreImage(ctx, log)
}

// withoutCompose makes the rollback go through the engine alone.
func (c *layoutEnv) withoutCompose() {
	c.t.Helper()
	record, err := change.Decode(c.steps.change.Record)
	if err != nil {
		c.t.Fatal(err)
	}
	record.Image.Compose = nil
	if c.steps.change.Record, err = record.Encode(); err != nil {
		c.t.Fatal(err)
	}
}

func TestLayouts(t *testing.T) {
	t.Parallel()
	for _, l := range layouts {
		if !everyLayout && !l.often {
			continue
		}
		for version, program := range composePrograms(t) {
			t.Run(l.name+", compose "+version, func(t *testing.T) {
				t.Parallel()
				testLayout(t, l, program, true)
			})
		}
		if everyLayout {
			t.Run(l.name+", back without compose", func(t *testing.T) {
				t.Parallel()
				testLayout(t, l, devenv.Compose(t), false)
			})
		}
	}
}

// composePrograms are the compose programs to test with: the newest, and in `make
// test-change` also the oldest.
func composePrograms(t *testing.T) map[string]string {
	t.Helper()
	programs := map[string]string{"newest": devenv.Compose(t)}
	if everyLayout {
		programs["oldest"] = devenv.OldestCompose(t)
	}
	return programs
}

// testLayout replaces the target and takes that back, with compose or through the
// engine alone.
func testLayout(t *testing.T, l layout, program string, backByCompose bool) {
	c := newLayoutEnv(t, l, program)
	before := c.state()
	undo := c.change()
	c.succeed("build")
	c.succeed("restart")
	after := c.state()
	if l.change["compose.yaml"] == "" {
		c.othersAre(before, after)
	}
	for _, service := range strings.Fields(c.layout.target) {
		old, young := before.Of(service), after.Of(service)
		if len(young) == 0 || !l.absent && len(young) != len(old) {
			t.Fatalf("%s has %d containers, had %d", service, len(young), len(old))
		}
		for _, container := range young {
			if _, found := change.ProjectOf(before.Project).ByID(container.ID); found {
				t.Errorf("container %s was not replaced", container.Name)
			}
		}
	}
	undo()
	if !backByCompose {
		c.withoutCompose()
	}
	outcome, failure := c.restoreImage(t.Context())
	log := c.artifact("rollback.log")
	if failure != nil {
		t.Fatalf("%v\n%s", failure, log)
	}
	c.isAsBefore(before, c.state())
	if !l.absent && (!strings.HasPrefix(outcome.Images, "sha256:") || outcome.Configuration == "none") {
		t.Errorf("%+v", outcome)
	}
	if backByCompose && strings.Contains(log, " again: ") {
		t.Logf("compose was not enough: %s", log)
	}
	if t.Failed() {
		t.Logf("rollback.log: %s\nrestart.log: %s", log, c.artifact("restart.log"))
	}
}
