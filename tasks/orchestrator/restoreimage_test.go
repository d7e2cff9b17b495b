package orchestrator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

var errKilled = errors.New("the worker of this test was killed")

// killedEngine kills the worker after its n-th act on the engine: the act is done,
// and nothing that follows it.
type killedEngine struct {
	Engine
	left int
	kill context.CancelCauseFunc
}

func (e *killedEngine) acted(err error) error {
	if e.left--; e.left == 0 {
		e.kill(errKilled)
		return errKilled
	}
	return err
}

func (e *killedEngine) CreateContainer(ctx context.Context, name string, from compose.Inspection) (string, error) {
	id, err := e.Engine.CreateContainer(ctx, name, from)
	return id, e.acted(err)
}

func (e *killedEngine) StartContainer(ctx context.Context, id string) error {
	return e.acted(e.Engine.StartContainer(ctx, id))
}

func (e *killedEngine) StopContainer(ctx context.Context, id string) error {
	return e.acted(e.Engine.StopContainer(ctx, id))
}

func (e *killedEngine) RenameContainer(ctx context.Context, id, name string) error {
	return e.acted(e.Engine.RenameContainer(ctx, id, name))
}

func (e *killedEngine) RemoveContainer(ctx context.Context, id string) error {
	return e.acted(e.Engine.RemoveContainer(ctx, id))
}

func (e *killedEngine) TagImage(ctx context.Context, id, name string) error {
	return e.acted(e.Engine.TagImage(ctx, id, name))
}

// TestARollbackThatIsKilledIsRepeated kills the worker after each act of a rollback,
// and once during compose. The next worker brings all of it back.
func TestARollbackThatIsKilledIsRepeated(t *testing.T) {
	t.Parallel()
	for name, l := range map[string]layout{
		"through the engine": {files: map[string]string{
			"compose.yaml": "services:\n  web: {build: ./web, depends_on: [other], volumes: [/anonymous]}" + otherService}},
		"by compose": {files: map[string]string{
			"compose.yaml": "services:\n  web: {build: ./web, volumes: [/anonymous]}" + otherService}},
	} {
		if !everyLayout && name == "by compose" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newLayoutEnv(t, l, composePrograms(t)["newest"])
			before := c.state()
			killed := false
			first := 1
			if !everyLayout {
				first = 4 // the old container is gone, the new one has not its name yet
			}
			for act, finished := first, false; !finished && (everyLayout || act == first); act++ {
				c.steps.change.Record = nil
				undo := c.change()
				c.file("web/behaviour", fmt.Sprint("ok ", time.Now()))
				c.succeed("build")
				c.succeed("restart")
				undo()
				ctx, kill := context.WithCancelCause(t.Context())
				c.config.Engine = &killedEngine{Engine: c.engine, left: act, kill: kill}
				_, failure := c.restoreImage(ctx)
				kill(nil)
				c.config.Engine = c.engine
				finished = failure == nil
				killed = killed || !finished
				if _, failure := c.restoreImage(t.Context()); failure != nil {
					t.Fatalf("killed after act %d: %v\n%s", act, failure, c.artifact("rollback.log"))
				}
				if c.isAsBefore(before, c.state()); t.Failed() {
					t.Fatalf("killed after act %d:\n%s", act, c.artifact("rollback.log"))
				}
				before = c.state()
			}
			if !killed {
				t.Error("no act was seen")
			}
		})
	}
}

// TestRollbackDuringWhichComposeIsKilled ends compose at random moments of a
// rollback, with all that runs in it.
func TestRollbackDuringWhichComposeIsKilled(t *testing.T) {
	t.Parallel()
	rounds := 1
	if everyLayout {
		rounds = 12
	}
	c := newLayoutEnv(t, plainLayout, composePrograms(t)["newest"])
	before := c.state()
	for round := range rounds {
		c.steps.change.Record = nil
		undo := c.change()
		c.file("web/behaviour", fmt.Sprint("ok ", time.Now()))
		c.succeed("build")
		c.succeed("restart")
		undo()
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Duration(round+1)*1500*time.Millisecond/time.Duration(rounds), errKilled)
		_, failure := c.restoreImage(ctx)
		cancel()
		if failure != nil {
			if _, failure = c.restoreImage(t.Context()); failure != nil {
				t.Fatalf("round %d: %v\n%s", round, failure, c.artifact("rollback.log"))
			}
		}
		if c.isAsBefore(before, c.state()); t.Failed() {
			t.Fatalf("round %d:\n%s", round, c.artifact("rollback.log"))
		}
	}
}

// TestNewVolumesAreKeptAndNamed has a run that gives the service a network and a volume.
// A rollback removes the network. It keeps the volume, whose data nobody has anywhere
// else, and names it with the command that removes it.
func TestNewVolumesAreKeptAndNamed(t *testing.T) {
	t.Parallel()
	c := newLayoutEnv(t, layout{
		files: map[string]string{"compose.yaml": "services:\n  web: {build: ./web, volumes: ['old:/old']}" + otherService + "volumes: {old: {}}\n"},
		change: map[string]string{"compose.yaml": "services:\n  web: {build: ./web, networks: [default, new], volumes: ['old:/old', 'data:/data']}" + otherService +
			"networks: {new: {}}\nvolumes: {old: {}, data: {}}\n"},
	}, composePrograms(t)["newest"])
	name := c.project + "_data"
	t.Cleanup(func() {
		if out, err := exec.Command("docker", "volume", "rm", name).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	before := c.state()
	undo := c.change()
	c.succeed("build")
	c.succeed("restart")
	undo()
	if _, failure := c.restoreImage(t.Context()); failure != nil {
		t.Fatal(failure)
	}
	after := c.state()
	if !slices.Contains(after.Volumes, compose.ProjectVolume{Name: name}) {
		t.Errorf("volumes are %v", after.Volumes)
	}
	if log := c.artifact("rollback.log"); strings.Count(log, "[Volume ") != 1 ||
		!strings.Contains(log, "[Volume "+name+" was not there before the run. It is kept, since it may have data. To remove it: docker volume rm "+name+"]") {
		t.Errorf("rollback.log is %s", log)
	}
	steps := ByHand(c.steps.run.ID, c.recordedChange())
	same(t, "by hand", strings.Join(steps[len(steps)-1].Commands, "\n"), "docker volume rm "+name)
	after.Volumes = before.Volumes
	c.isAsBefore(before, after)
}

// TestEveryNameOfABuildIsTakenBack has runs whose build gives several names to its
// image, also one that no image had before.
func TestEveryNameOfABuildIsTakenBack(t *testing.T) {
	t.Parallel()
	for name, l := range map[string]layout{
		"tags": {files: map[string]string{
			"compose.yaml": "services:\n  web: {build: {context: ./web, tags: ['PROJECT/web:latest', 'PROJECT/web:prod']}}" + otherService},
			prepare: func(c *layoutEnv) { c.untag(c.project + "/web:prod") }},
		"compatibility, first deployment": {absent: true, files: map[string]string{
			".env":         "COMPOSE_COMPATIBILITY=1\n",
			"compose.yaml": "services:\n  web: {build: ./web}" + otherService},
			prepare: func(c *layoutEnv) {
				c.compose(c.t.Context(), "rm", "-sf", "web")
				c.untag(c.project + "_web")
			}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newLayoutEnv(t, l, devenv.Compose(t))
			names := func() map[string]string {
				all := map[string]string{}
				for _, name := range []string{c.project + "/web:latest", c.project + "/web:prod", c.project + "-web", c.project + "_web"} {
					image, err := c.engine.InspectImage(t.Context(), name)
					if err != nil && !errors.Is(err, compose.ErrNotFound) {
						t.Fatal(err)
					}
					all[name] = image.ID
				}
				return all
			}
			before, named := c.state(), names()
			undo := c.change()
			c.succeed("build")
			if maps.Equal(names(), named) {
				t.Fatalf("the build has named no image: %v", named)
			}
			c.succeed("restart")
			undo()
			if _, failure := c.restoreImage(t.Context()); failure != nil {
				t.Fatal(failure)
			}
			c.isAsBefore(before, c.state())
			if now := names(); !maps.Equal(now, named) {
				t.Errorf("names are %v, were %v\n%s", now, named, c.artifact("rollback.log"))
			}
		})
	}
}

func (c *layoutEnv) untag(name string) {
	c.t.Helper()
	if err := c.engine.UntagImage(c.t.Context(), name); err != nil {
		c.t.Fatal(err)
	}
}

// TestAnonymousVolumesOfTheRunGo has runs that let the engine make volumes. A rollback
// removes these and no other: neither one that the run's container has taken over from
// the one before, nor one that a container of somebody else uses too. If an operator
// takes a run back that had succeeded, they may have data.
func TestAnonymousVolumesOfTheRunGo(t *testing.T) {
	t.Parallel()
	const before, changed = "services:\n  web: {build: ./web, volumes: [/kept]%s}" + otherService, "services:\n  web: {build: ./web, volumes: [/kept, /new]%s}" + otherService
	for name, test := range map[string]struct {
		depends   string
		command   []string
		absent    bool
		used      bool
		requested bool
	}{
		"by compose":                {},
		"through the engine":        {depends: ", depends_on: [other]"},
		"renewed volumes":           {command: []string{"up", "-d", "--no-deps", "--renew-anon-volumes", "web"}},
		"no container before":       {absent: true},
		"somebody else uses it too": {used: true},
		"an operator has asked":     {requested: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newLayoutEnv(t, layout{
				files: map[string]string{"compose.yaml": fmt.Sprintf(before, test.depends)}, change: map[string]string{"compose.yaml": fmt.Sprintf(changed, test.depends)},
				command: test.command, absent: test.absent,
			}, devenv.Compose(t))
			if test.absent {
				c.compose(t.Context(), "rm", "-sfv", "web")
			}
			asBefore := c.state()
			undo := c.change()
			c.succeed("build")
			c.succeed("restart")
			kept := map[string]bool{}
			for _, container := range asBefore.Of("web") {
				kept[container.Volumes["/kept"]] = true
			}
			var made []string
			for path, volume := range c.state().Of("web")[0].Volumes {
				if !kept[volume] {
					made = append(made, volume)
				}
				if path == "/new" && test.used {
					user := "mm-test-" + c.project
					c.docker("create", "--name", user, "--volume", volume+":/used", c.base(), "none")
					t.Cleanup(func() {
						for _, args := range [][]string{{"rm", user}, {"volume", "rm", volume}} {
							if out, err := exec.Command("docker", args...).CombinedOutput(); err != nil {
								t.Errorf("docker %v: %v: %s", args, err, out)
							}
						}
					})
				}
			}
			if len(made) == 0 {
				t.Fatal("the run has made no volume")
			}
			undo()
			c.requested = test.requested
			if _, failure := c.restoreImage(t.Context()); failure != nil {
				t.Fatal(failure)
			}
			c.isAsBefore(asBefore, c.state())
			log := c.artifact("rollback.log")
			for _, volume := range made {
				exists := exec.Command("docker", "volume", "inspect", volume).Run() == nil
				if exists != (test.used || test.requested) {
					t.Errorf("volume %s exists: %t\n%s", volume, exists, log)
				}
				line := "[Volume " + volume + " was not there before the run. It is kept, since it may have data. To remove it: docker volume rm " + volume + "]"
				if strings.Contains(log, line) != exists || strings.Contains(log, "[Removing volume "+volume+": ") == test.requested {
					t.Errorf("rollback.log is %s", log)
				}
				if test.requested {
					c.docker("volume", "rm", volume)
				}
			}
		})
	}
}

// TestCopiedFilesComeBack has a service into whose containers compose copies files before
// it starts them. A container that the rollback creates without compose has them too.
func TestCopiedFilesComeBack(t *testing.T) {
	t.Parallel()
	paths := []string{"/run/secrets/secret", "/text", "/own"}
	for _, test := range []struct {
		name    string
		prepare func(*layoutEnv)
	}{
		{"running", nil},
		{"stopped", func(c *layoutEnv) { c.compose(t.Context(), "stop", "web") }},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := newLayoutEnv(t, layout{prepare: test.prepare, files: map[string]string{
				".env": "SECRET=hidden\n",
				"compose.yaml": "services:\n  web: {build: ./web, depends_on: [other], secrets: [secret], configs: [text, {source: variable, target: /own, mode: 0400, uid: '7', gid: '8'}]}" + otherService +
					"secrets: {secret: {environment: SECRET}}\nconfigs: {text: {content: shown}, variable: {environment: SECRET}}\n"},
				change: map[string]string{".env": "SECRET=other\n", "web/behaviour": "ok 2"}}, devenv.Compose(t))
			files := func() string {
				t.Helper()
				var text struct{ ID, Files json.RawMessage }
				inspection, _, err := c.engine.InspectContainer(t.Context(), c.project+"-web-1")
				if err == nil {
					inspection, err = c.engine.ReadFiles(t.Context(), inspection, append(paths, "/missing", "/run"))
				}
				if err != nil {
					t.Fatal(err)
				}
				all, err := inspection.MarshalJSON()
				if err == nil {
					err = json.Unmarshal(all, &text)
				}
				if err != nil {
					t.Fatal(err)
				}
				return string(text.Files)
			}
			before, state := files(), c.state()
			if n := strings.Count(before, `"path"`); n != len(paths) {
				t.Fatalf("compose has copied %d files: %s", n, before)
			}
			undo := c.change()
			c.succeed("build")
			c.succeed("restart")
			if files() == before {
				t.Fatal("the run has changed nothing of the files")
			}
			undo()
			if _, failure := c.restoreImage(t.Context()); failure != nil {
				t.Fatalf("%v\n%s", failure, c.artifact("rollback.log"))
			}
			c.isAsBefore(state, c.state())
			same(t, "files", files(), before)
			if log := c.artifact("rollback.log"); strings.Contains(log, "no file ") {
				t.Errorf("made twice: %s", log)
			}
		})
	}
}

// TestAContainerWithoutItsCopiedFilesIsMadeAgain: a worker may be killed after it has
// created a container, and before it has copied the files.
func TestAContainerWithoutItsCopiedFilesIsMadeAgain(t *testing.T) {
	t.Parallel()
	c := newLayoutEnv(t, layout{files: map[string]string{
		"compose.yaml": "services:\n  web: {build: ./web, depends_on: [other], configs: [text]}" + otherService + "configs: {text: {content: shown}}\n"}}, devenv.Compose(t))
	name := c.project + "-web-1"
	plain, _, err := c.engine.InspectContainer(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	before := c.state()
	undo := c.change()
	c.succeed("build")
	c.succeed("restart")
	undo()
	c.docker("rm", "-f", name)
	c.docker("tag", before.Of("web")[0].ImageID, before.Of("web")[0].Image)
	if _, err := c.engine.CreateContainer(t.Context(), name, plain); err != nil {
		t.Fatal(err)
	}
	if _, failure := c.restoreImage(t.Context()); failure != nil {
		t.Fatalf("%v\n%s", failure, c.artifact("rollback.log"))
	}
	c.isAsBefore(before, c.state())
	c.docker("cp", name+":/text", filepath.Join(t.TempDir(), "text"))
	if log := c.artifact("rollback.log"); !strings.Contains(log, "[Creating container "+name+" again: no file /text]") {
		t.Errorf("rollback.log is %s", log)
	}
}
