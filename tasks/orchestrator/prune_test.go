package orchestrator

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// onOwnEngine says that DOCKER_HOST is an engine of the test's own, on which it may
// remove what it did not make.
var onOwnEngine = os.Getenv("MM_TEST_ON_OWN_ENGINE") != ""

// runOnOwnEngine runs tests of this package in another process, with an engine of
// their own that start has started.
func runOnOwnEngine(t *testing.T, start func(context.Context) (*devenv.OwnEngine, error), tests string) {
	t.Helper()
	if !everyLayout {
		t.Skip("`make test-change` runs it, with a docker engine of its own")
	}
	engine, err := start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := engine.Close(); err != nil {
			t.Error(err)
		}
	}()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run="+tests, "-test.v", "-test.timeout=60m")
	cmd.Env = append(os.Environ(), "DOCKER_HOST="+engine.Host, "MM_TEST_ON_OWN_ENGINE=yes")
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Errorf("tests on an engine of their own: %v", err)
	}
}

// TestOnTheNewestEngine runs the tests with the newest docker engine.
func TestOnTheNewestEngine(t *testing.T) {
	t.Parallel()
	if onOwnEngine {
		return
	}
	runOnOwnEngine(t, devenv.StartNewestEngine, "^(TestLayouts|TestInterruptedUpIsMended|TestARollbackThatIsKilledIsRepeated|TestOtherServicesAreBroughtBackToo|TestPruningTakesNoImageAway)$")
}

// TestPruningTakesNoImageAway removes all that docker lets an operator remove with
// one command, at each point of a run. The image of before comes back all the same,
// without a registry and without a build.
func TestPruningTakesNoImageAway(t *testing.T) {
	if !onOwnEngine { // there, no other test may run meanwhile
		t.Parallel()
		runOnOwnEngine(t, devenv.StartOwnEngine, "^TestPruningTakesNoImageAway$")
		return
	}
	// One after the other: each of them prunes the whole engine.
	for name, prune := range map[string]struct {
		commands [][]string
		saved    bool // the images are also saved as files
		lost     bool // the rollback must say that the image is gone
	}{
		"image prune":                 {commands: [][]string{{"image", "prune", "-af"}}},
		"system prune, saved":         {commands: [][]string{{"system", "prune", "-af"}}, saved: true},
		"base image gone":             {commands: [][]string{{"image", "rm", "-f", "BASE"}}},
		"pin removed and image prune": {commands: [][]string{{"container", "prune", "-f"}, {"image", "prune", "-af"}}, saved: true},
		"system prune":                {commands: [][]string{{"system", "prune", "-af"}}, lost: true},
	} {
		for _, after := range []string{"build", "restart"} {
			t.Run(name+" after "+after, func(t *testing.T) {
				c := newLayoutEnv(t, layout{files: map[string]string{
					"compose.yaml": "services:\n  web: {build: ./web, volumes: [/anonymous], depends_on: [other]}" + otherService}}, devenv.Compose(t))
				if prune.saved {
					c.config.PinDirectory = t.TempDir()
				}
				before := c.state()
				undo := c.change()
				for _, step := range []string{"build", "restart"} {
					if _, _, err := c.execute(step); err != nil && after == "restart" {
						t.Fatal(err) // after the build, the new image may be gone too
					}
					if step == after {
						for _, command := range prune.commands {
							c.docker(command...)
						}
					}
				}
				undo()
				_, failure := c.restoreImage(t.Context())
				if prune.lost && after == "restart" {
					if failure == nil || !strings.Contains(failure.Error(), "the engine has no image "+before.Of("web")[0].ImageID+" any more: somebody has removed the pin mm-orchestrator-pin-") ||
						!strings.Contains(failure.Error(), "MM_ORCHESTRATOR_PIN_DIRECTORY") {
						t.Errorf("%v", failure)
					}
					return
				}
				if failure != nil {
					t.Fatalf("%v\n%s", failure, c.artifact("rollback.log"))
				}
				c.isAsBefore(before, c.state())
			})
		}
	}
}

// docker runs the docker program.
func (c *layoutEnv) docker(args ...string) {
	c.t.Helper()
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], "BASE", c.base())
	}
	if out, err := exec.CommandContext(c.t.Context(), "docker", args...).CombinedOutput(); err != nil {
		c.t.Fatalf("docker %v: %v\n%s", args, err, out)
	}
}

// TestSavedImagesAreShared has two runs with one image: the second saves nothing.
func TestSavedImagesAreShared(t *testing.T) {
	t.Parallel()
	c := newLayoutEnv(t, plainLayout, devenv.Compose(t))
	c.config.PinDirectory = t.TempDir()
	c.succeed("build")
	first, run := c.steps.run.ID, c.steps.run.ID[:24]+"000000000001"
	t.Cleanup(func() { c.steps.run.ID = first; c.releasePins() })
	t.Cleanup(func() { c.steps.run.ID = run; c.releasePins() })
	c.steps.run.ID, c.steps.change.Record = run, nil
	c.succeed("build")
	archives, err := filepath.Glob(filepath.Join(c.config.PinDirectory, "*", "*.tar"))
	if err != nil || len(archives) != 2 {
		t.Fatalf("%v, %v", archives, err)
	}
	var files []os.FileInfo
	for _, archive := range archives {
		info, err := os.Stat(archive)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, info)
	}
	if !os.SameFile(files[0], files[1]) || files[0].Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", files[0], files[1])
	}
}
