package orchestrator

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/client"

	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/sample"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// buildServer compiles the service of all compose tests once.
var buildServer = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "mm-server-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "server")
	cmd := exec.Command("go", "build", "-ldflags", "-s -w", "-o", path, "./testdata/compose/server")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	return os.ReadFile(path)
})

// composeEnv is a running compose project of the test's own. Its work tree has the
// files of testdata/compose/<test>/change.
type composeEnv struct {
	*testEnv
	program, project string
	port             int
	engine           *compose.Engine
}

// newComposeEnv returns an environment without files, and arranges that the
// project's containers and images are removed.
func newComposeEnv(t *testing.T, program string) *composeEnv {
	t.Helper()
	c := &composeEnv{program: program, project: "mmtest" + strings.ToLower(rand.Text()[:8])}
	ports, err := devenv.FreePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	c.port = ports[0]
	c.testEnv = newTestEnv(t, "WEB_PORT="+strconv.Itoa(c.port), "TEST_PROJECT="+c.project, "DOCKER_HOST="+os.Getenv("DOCKER_HOST"))
	if c.engine, err = compose.NewEngine(compose.EngineConfig{Host: os.Getenv("DOCKER_HOST")}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.engine.Close() })
	c.config.Compose, c.config.Engine = compose.Program{Standalone: c.program}, c.engine
	c.config.QuietPeriod = time.Second
	// The engine has pins of this run, which must not be those of another test.
	c.steps.run.ID = fmt.Sprintf("5b0e6a52-3c1d-4f0e-9b7a-%012x", mathrand.Uint64N(1<<48))
	t.Cleanup(func() {
		c.compose(context.Background(), "down", "--volumes", "--remove-orphans", "--timeout", "1")
		c.releasePins()
		c.removeImages()
	})
	if err := sample.ImportBase(t.Context(), c.base(), "mm-orchestrator.test="+c.project); err != nil {
		t.Fatal(err)
	}
	return c
}

func newComposeBench(t *testing.T) *composeEnv {
	t.Helper()
	return newComposeBenchOf(t, t.Name())
}

// newComposeBenchOf has the project and the change of a test.
func newComposeBenchOf(t *testing.T, test string) *composeEnv {
	t.Helper()
	server, err := buildServer()
	if err != nil {
		t.Fatal(err)
	}
	c := newComposeEnv(t, devenv.Compose(t))
	source := filepath.Join("testdata", "compose", test)
	c.copyTree(source)
	if err := os.RemoveAll(filepath.Join(c.workspace, "change")); err != nil {
		t.Fatal(err)
	}
	for _, service := range []string{"web", "other"} {
		// The name appended to the program gives each service of each test its own
		// image layers: one test removes its images while another still builds.
		own := append(slices.Clip(server), c.project+"/"+service...)
		if err := os.WriteFile(filepath.Join(c.workspace, service, "server"), own, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	c.file(".gitignore", "server\n")
	c.repository()
	c.compose(t.Context(), "up", "-d", "--build")
	c.copyTree(filepath.Join(source, "change"))

	docker := []string{"docker", "compose", "--project-name", c.project}
	build, up := append(docker[:4:4], "build", "web"), append(docker[:4:4], "up", "-d", "--no-deps", "web")
	plan, err := json.Marshal([]any{
		map[string]any{"name": "analyze", "parameters": map[string]any{"instruction": "repair web"}},
		map[string]any{"name": "patch", "parameters": map[string]any{
			"commands": [][]string{{"git", "status", "--short"}}, "allowlist": []string{"web/*", "docker-compose.yaml"}}},
		map[string]any{"name": "build", "parameters": map[string]any{"command": build, "service": "web"}},
		map[string]any{"name": "restart", "parameters": map[string]any{"command": up, "service": "web", "restartTimeoutSeconds": 60}},
		map[string]any{"name": "verify", "parameters": map[string]any{"service": "web", "healthcheck": map[string]any{
			"url": fmt.Sprintf("http://127.0.0.1:%d/health", c.port), "timeoutSeconds": 6, "intervalSeconds": 1.0}}},
		map[string]any{"name": "rollback", "parameters": map[string]any{"strategies": []any{
			map[string]any{"type": "git-revert", "commands": [][]string{{"git", "reset", "--hard", "HEAD"}}},
			map[string]any{"type": "rebuild", "commands": [][]string{build, up}}}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	c.plan(string(plan))
	return c
}

// base is the image that replaces scratch, see sample.ImportBase.
func (c *composeEnv) base() string { return "mm-orchestrator-test:" + c.project }

func (c *composeEnv) copyTree(source string) {
	c.t.Helper()
	if err := filepath.WalkDir(source, func(path string, entry os.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(source, path)
		if err == nil {
			c.file(name, strings.Replace(string(data), "FROM scratch\n", "FROM "+c.base()+"\n", 1))
		}
		return err
	}); err != nil {
		c.t.Fatal(err)
	}
}

// compose runs the compose program in the workspace.
func (c *composeEnv) compose(ctx context.Context, args ...string) {
	c.t.Helper()
	cmd := exec.CommandContext(ctx, c.program, append([]string{"--project-name", c.project}, args...)...)
	cmd.Dir, cmd.Env = c.workspace, c.config.Environ
	if out, err := cmd.CombinedOutput(); err != nil {
		c.t.Errorf("compose %v: %v\n%s", args, err, out)
	}
}

// releasePins removes what the test's run has pinned.
func (c *composeEnv) releasePins() {
	c.t.Helper()
	pins, err := c.engine.ListPins(context.Background(), c.steps.run.ID)
	if err != nil {
		c.t.Error(err)
	}
	for _, pin := range pins {
		if err := c.engine.RemovePin(context.Background(), pin.Name); err != nil {
			c.t.Error(err)
		}
	}
}

// removeImages removes the images that the test has built, also those that have
// lost their name to a later build. An image can be removed only before the one
// that it was built from. Their times, in whole seconds, do not give that order.
// So it repeats until none is left.
func (c *composeEnv) removeImages() {
	docker, err := client.New(client.FromEnv)
	if err != nil {
		c.t.Error(err)
		return
	}
	defer docker.Close()
	ctx := context.Background()
	for removed := true; removed; {
		images, err := docker.ImageList(ctx, client.ImageListOptions{Filters: client.Filters{}.Add("label", "mm-orchestrator.test="+c.project)})
		if err != nil {
			c.t.Error(err)
			return
		}
		removed = false
		var refusal error
		for _, image := range images.Items {
			if _, err := docker.ImageRemove(ctx, image.ID, client.ImageRemoveOptions{Force: true, PruneChildren: true}); err != nil {
				refusal = err
				continue
			}
			removed = true
		}
		if !removed && refusal != nil {
			// Images that remain are no defect of the code under test.
			c.t.Log("images of the test remain:", refusal)
		}
	}
}

// container returns the only container of a service.
func (c *composeEnv) container(service string) compose.Container {
	c.t.Helper()
	containers, err := c.engine.Containers(c.t.Context(), c.project, service)
	if err != nil || len(containers) != 1 {
		c.t.Fatalf("containers of %s: %+v, %v", service, containers, err)
	}
	return containers[0]
}

// version returns the answer of the service.
func (c *composeEnv) version() string {
	c.t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second}
	response, err := client.Get(fmt.Sprintf("http://127.0.0.1:%d/health", c.port))
	if err != nil {
		return err.Error()
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(text))
}

// run executes the steps as a worker does: in order, and the rollback after the
// first failure.
func (c *composeEnv) run() (*Failure, store.Outcome) {
	c.t.Helper()
	for _, step := range []string{"analyze", "patch", "build", "restart", "verify"} {
		_, outcome, err := c.execute(step)
		c.checkFiles(outcome)
		var failure *Failure
		if errors.As(err, &failure) {
			c.succeed("rollback")
			return failure, outcome
		}
		if err != nil {
			c.t.Fatalf("%s: %v", step, err)
		}
	}
	return nil, store.Outcome{}
}

// rolledBack checks that web is as before, in a healthy container, and that other
// has its first container.
func (c *composeEnv) rolledBack(other string) {
	c.t.Helper()
	c.succeed("verify")
	same(c.t, "version", c.version(), "version 1")
	same(c.t, "container of other", c.container("other").ID, other)
	log := c.artifact("rollback.log")
	for _, line := range []string{`tree: as before the run \(\d files? restored, \d set aside\)`, `image: as before the run \(sha256:[^\n]*\)`, `configuration: as before the run \([0-9a-f][^\n]*\)`} {
		if !regexp.MustCompile(`(?m)^` + line + `$`).MatchString(log) {
			c.t.Errorf("rollback.log is %s\nwant the line %s", log, line)
		}
	}
}

func TestComposeRepairsAService(t *testing.T) {
	t.Parallel()
	c := newComposeBench(t)
	web, other := c.container("web"), c.container("other")
	if failure, _ := c.run(); failure != nil {
		t.Fatal(failure)
	}
	same(t, "version", c.version(), "version 2")
	same(t, "container of other", c.container("other").ID, other.ID)
	now := c.container("web")
	if now.ID == web.ID || now.ImageID == web.ImageID {
		t.Errorf("web was not replaced: %+v", now)
	}
	if now.Health != "healthy" {
		t.Errorf("web is verified but %s", now.Health)
	}
	if log := c.artifact("build.log"); !strings.HasPrefix(log, "$ docker compose --project-name "+c.project+" build web\n") {
		t.Errorf("build.log is %s", log)
	}
	if log := c.artifact("restart.log"); !strings.HasPrefix(log, "$ docker compose --project-name "+c.project+" up -d --no-deps web\n") ||
		!strings.Contains(log, c.project+"-web-1") || strings.Contains(log, c.project+"-other-1") {
		t.Errorf("restart.log is %s", log)
	}
	same(t, "patch.log", c.artifact("patch.log"), "git status --short\nM web/behaviour")
}

func TestComposeBuildFailure(t *testing.T) {
	t.Parallel()
	c := newComposeBench(t)
	web, other := c.container("web").ID, c.container("other").ID
	failure, outcome := c.run()
	if failure == nil || !strings.HasPrefix(failure.Error(), "Command docker compose --project-name "+c.project+" build web failed with code 1: ") ||
		!strings.Contains(failure.Error(), "no-such-file") || !strings.HasSuffix(failure.Error(), " (see build.log)") {
		t.Fatalf("%v", failure)
	}
	same(t, "artifacts", paths(outcome), "build_log:build.log")
	if n := strings.Count(c.artifact("build.log"), "COPY failed"); n > 1 {
		t.Errorf("the output is in the log %d times", n)
	}
	same(t, "container of web", c.container("web").ID, web)
	c.rolledBack(other)
}

func TestComposeRestartFailure(t *testing.T) {
	t.Parallel()
	c := newComposeBench(t)
	other := c.container("other").ID
	failure, outcome := c.run()
	if failure == nil || !strings.HasPrefix(failure.Error(), "Command docker compose --project-name "+c.project+" up -d --no-deps web failed with code 1: ") ||
		!strings.HasSuffix(failure.Error(), " (see restart.log)") {
		t.Fatalf("%v", failure)
	}
	same(t, "artifacts", paths(outcome), "metrics:restart.log")
	same(t, "payload", string(outcome.Payload), `{"log":"restart.log"}`)
	c.rolledBack(other)
}

func TestComposeUnhealthyService(t *testing.T) {
	t.Parallel()
	c := newComposeBench(t)
	other := c.container("other").ID
	failure, outcome := c.run()
	name := c.project + "-web-1"
	if failure == nil || failure.Error() != "Container "+name+" is unhealthy" {
		t.Fatalf("%v", failure)
	}
	same(t, "artifacts", paths(outcome), "verify_log:verify.log")
	if outcome.Payload != nil {
		t.Errorf("payload %s", outcome.Payload)
	}
	c.rolledBack(other)
}

func TestComposeServiceThatExits(t *testing.T) {
	t.Parallel()
	c := newComposeBench(t)
	other := c.container("other").ID
	failure, outcome := c.run()
	want := fmt.Sprintf(`Health check for http://127.0.0.1:%d/health was given up after \d+s\nContainer %s-web-1 is exited \(exit code 3\)\. Last lines of its log:\nNo module named 'flask'`, c.port, c.project)
	if failure == nil || !regexp.MustCompile("^"+want+"$").MatchString(failure.Error()) {
		t.Fatalf("%v, want %s", failure, want)
	}
	same(t, "artifacts", paths(outcome), "verify_log:verify.log")
	c.rolledBack(other)
}

// A service that is down is what a run is made for. If the repair does not help, the
// service is down as before, and the run is rolled back.
func TestComposeServiceThatWasDown(t *testing.T) {
	t.Parallel()
	for name, command := range map[string][]string{"stopped": {"stop", "--timeout", "1", "web"}, "killed": {"kill", "web"}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newComposeBenchOf(t, "TestComposeServiceThatExits")
			c.compose(t.Context(), command...)
			before, other := c.container("web"), c.container("other").ID
			if failure, _ := c.run(); failure == nil || !strings.Contains(failure.Error(), "No module named 'flask'") {
				t.Fatal(failure)
			}
			after := c.container("web")
			if after.State == "running" || after.State == "restarting" || after.ImageID != before.ImageID {
				t.Errorf("web is %+v, before the run %+v", after, before)
			}
			same(t, "container of other", c.container("other").ID, other)
			same(t, "behaviour", c.text("web/behaviour"), "ok version 1\n")
		})
	}
}

// TestAFailedBuildLeavesNoContainer has a step of the Dockerfile fail. The classic
// builder keeps the step's container, and the rollback removes it.
func TestAFailedBuildLeavesNoContainer(t *testing.T) {
	t.Parallel()
	c := newLayoutEnv(t, plainLayout, composePrograms(t)["newest"])
	c.file("web/Dockerfile", "FROM "+c.base()+"\nCOPY server behaviour /\nVOLUME /data\nRUN [\"/missing\"]\nLABEL mm-orchestrator.test="+c.project+"\n")
	c.fail("build")
	ids := compose.BuildContainers([]byte(c.artifact("build.log")))
	if len(ids) == 0 {
		t.Fatalf("build.log is %s", c.artifact("build.log"))
	}
	left, _, err := c.engine.InspectContainer(t.Context(), ids[len(ids)-1])
	if err != nil {
		t.Fatal(err)
	}
	if _, failure := c.restoreImage(t.Context()); failure != nil {
		t.Error(failure)
	}
	if _, _, err := c.engine.InspectContainer(t.Context(), left.ID()); !errors.Is(err, compose.ErrNotFound) {
		t.Errorf("%v. rollback.log is %s", err, c.artifact("rollback.log"))
	}
}

// TestComposeCommandsOfOtherSteps has the plan's patch and build change the service's
// container before the restart does.
func TestComposeCommandsOfOtherSteps(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ planned, instead string }{
		"patch stops it":  {`["git","status","--short"]`, `["docker","compose","--project-name","PROJECT","stop","--timeout","1","web"]`},
		"build starts it": {`"build","web"`, `"up","-d","--build","--no-deps","web"`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newComposeBenchOf(t, "TestComposeServiceThatExits")
			c.plan(strings.Replace(string(c.steps.run.Steps), test.planned, strings.ReplaceAll(test.instead, "PROJECT", c.project), 1))
			before, other := c.container("web"), c.container("other").ID
			if failure, _ := c.run(); failure == nil {
				t.Fatal("the run has succeeded")
			}
			after := c.container("web")
			if after.State != "running" || after.ImageID != before.ImageID {
				t.Errorf("web is %+v, before the run %+v\n%s", after, before, c.artifact("rollback.log"))
			}
			same(t, "container of other", c.container("other").ID, other)
		})
	}
}

func TestComposeServicesAreListedWhenOneIsMissing(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.file("docker-compose.yaml", "services: {web: {image: x}, other: {image: y}}\n")
	b.config.Compose = compose.Program{Standalone: devenv.Compose(t)}
	b.plan(`[{"name": "build", "parameters": {"command": ["docker", "compose", "--project-name", "p", "build", "ghost"]}}]`)
	failure, _ := b.fail("build")
	if !strings.Contains(failure.Error(), `Service "ghost" is not in the compose file of project p. Services there: other, web.`) {
		t.Error(failure)
	}
}

func TestComposeTestdataBelongsToTests(t *testing.T) {
	t.Parallel()
	entries, err := os.ReadDir(filepath.Join("testdata", "compose"))
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile("compose_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if entry.Name() != "server" && !strings.Contains(string(source), "func "+entry.Name()+"(") {
			t.Errorf("testdata/compose/%s belongs to no test", entry.Name())
		}
	}
}
