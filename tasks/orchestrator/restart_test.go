package orchestrator

import (
	"context"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/compose"
)

var plainLayout = layout{files: map[string]string{"compose.yaml": "services:\n  web: {build: ./web}" + otherService}}

func TestRestartMustReplaceTheContainer(t *testing.T) {
	t.Parallel()
	c := newLayoutEnv(t, plainLayout, composePrograms(t)["newest"])
	before := c.state()
	up := []string{"up", "-d", "--no-deps", "web"}

	// A run that deploys nothing new.
	c.succeed("build")
	if log := c.artifact("build.log"); !strings.Contains(log, "[The build has made no new image: "+c.project+"-web is sha256:") {
		t.Errorf("build.log is %s", log)
	}
	c.succeed("restart")
	if log := c.artifact("restart.log"); !strings.Contains(log, "[Nothing to replace: container "+c.project+"-web-1 runs image sha256:") {
		t.Errorf("restart.log is %s", log)
	}
	c.isAsBefore(before, c.state())

	// A command that leaves the container as it is.
	undo := c.change()
	c.succeed("build")
	c.setPlan([]string{"build", "web"}, slices.Insert(slices.Clone(up), 1, "--no-recreate"))
	failure, _ := c.fail("restart")
	if !strings.HasPrefix(failure.Error(), "After the restart, container "+c.project+"-web-1 still runs image sha256:") {
		t.Error(failure)
	}

	// A repeat of a restart that has replaced it: the record knows the containers of
	// before.
	c.setPlan([]string{"build", "web"}, up)
	c.succeed("restart")
	c.succeed("restart")
	if c.container("web").ID == before.Of("web")[0].ID {
		t.Error("web was not replaced")
	}

	// A retry after a rollback, with a command that does nothing.
	undo()
	if _, failure := c.restoreImage(t.Context()); failure != nil {
		t.Fatal(failure)
	}
	c.isAsBefore(before, c.state())
	failure, _ = c.fail("restart")
	if !strings.HasPrefix(failure.Error(), "The restart has replaced nothing: container "+c.project+"-web-1 is the one from before the run") {
		t.Error(failure)
	}
	if _, failure := c.restoreImage(t.Context()); failure != nil {
		t.Fatal(failure)
	}
	c.isAsBefore(before, c.state())
}

// TestOtherServicesAreBroughtBackToo has a plan without --no-deps: compose replaces
// the dependency too, whose configuration has changed, and starts one that had
// never run. They are brought back, also if nobody has compared them after the
// command.
func TestOtherServicesAreBroughtBackToo(t *testing.T) {
	t.Parallel()
	file := "services:\n  web: {build: ./web, depends_on: [other, job]}\n  job: {build: ./other}\n  other: {build: ./other, stop_grace_period: 1s, environment: {LEVEL: info}}\n"
	changed := strings.Replace(file, "info", "debug", 1)
	for name, test := range map[string]struct {
		file   string   // of the run
		killed bool     // the worker, between the command and its proof
		failed []string // what the failure of the restart says
		logged []string // what the rollback says
	}{
		"the restart compares": {file: changed, failed: []string{"Restart of service web changed other services of project PROJECT too: ", "job (container ", " is new)", "other (container ", " was removed)"}},
		"the worker is killed before it compares": {file: changed, killed: true,
			logged: []string{"[The restart has failed or was cut off. Other services were changed since it began, and are brought back too: ", "job (container ", " is new)", "other (container ", " was removed)"}},
		"the command fails": {file: strings.Replace(changed, "web: {", "web: {command: [/missing], ", 1), failed: []string{"failed with code 1"},
			logged: []string{"Other services were changed since it began, and are brought back too: ", "job (container "}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newLayoutEnv(t, layout{
				files: map[string]string{"compose.yaml": file}, command: []string{"up", "-d", "web"},
				change:  map[string]string{"web/behaviour": "ok 2", "compose.yaml": test.file},
				prepare: func(c *layoutEnv) { c.compose(c.t.Context(), "rm", "-sf", "job") },
			}, composePrograms(t)["newest"])
			before := c.state()
			undo := c.change()
			c.succeed("build")
			if test.killed {
				ctx, kill := context.WithCancelCause(t.Context())
				c.steps.record = func(context.Context) error { kill(errKilled); return nil }
				c.executeIn(ctx, "restart")
				c.steps.record = nil
			} else {
				failure, _ := c.fail("restart")
				for _, part := range test.failed {
					if part = strings.ReplaceAll(part, "PROJECT", c.project); !strings.Contains(failure.Error(), part) {
						t.Errorf("%s is not in: %v", part, failure)
					}
				}
			}
			undo()
			if _, failure := c.restoreImage(t.Context()); failure != nil {
				t.Fatal(failure)
			}
			for _, part := range test.logged {
				if log := c.artifact("rollback.log"); !strings.Contains(log, part) {
					t.Errorf("%s is not in rollback.log: %s", part, log)
				}
			}
			c.layout.target = "web other job"
			c.isAsBefore(before, c.state())
		})
	}
}

// TestADependencyThatComposeCannotMakeIsBroughtBack has a plan without --no-deps, of
// which compose replaces a dependency with dependencies of its own. Compose cannot make
// its container of before, and the container is gone.
func TestADependencyThatComposeCannotMakeIsBroughtBack(t *testing.T) {
	t.Parallel()
	file := "services:\n  web: {build: ./web, depends_on: [other]}\n  other: {build: ./other, stop_grace_period: 1s, environment: {LEVEL: info}, depends_on: [third]}\n  third: {build: ./other, stop_grace_period: 1s}\n"
	c := newLayoutEnv(t, layout{
		files: map[string]string{"compose.yaml": file}, command: []string{"up", "-d", "web"},
		change: map[string]string{"web/behaviour": "ok 2", "compose.yaml": strings.Replace(file, "info", "debug", 1)},
	}, composePrograms(t)["newest"])
	before := c.state()
	undo := c.change()
	c.succeed("build")
	c.fail("restart")
	undo()
	if _, failure := c.restoreImage(t.Context()); failure != nil {
		t.Errorf("%v", failure)
	}
	c.layout.target = "web other"
	c.isAsBefore(before, c.state())
}

// TestOrphansComeBack has compose remove an orphan. The rollback makes it again, and
// does not have compose remove it once more.
func TestOrphansComeBack(t *testing.T) {
	t.Parallel()
	for name, web := range map[string]string{"back by compose": "{build: ./web}", "back by the engine": "{build: ./web, depends_on: [other]}"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			services := "services:\n  never: {image: x, profiles: [never]}\n  web: " + web + otherService
			c := newLayoutEnv(t, layout{
				files: map[string]string{"compose.yaml": services + "  a-job: {build: ./other, stop_grace_period: 1s}\n"},
			}, composePrograms(t)["newest"])
			c.file("compose.yaml", services)
			c.file(".env", "COMPOSE_REMOVE_ORPHANS=true\n")
			before := c.state()
			undo := c.change()
			c.succeed("build")
			if failure, _ := c.fail("restart"); !strings.Contains(failure.Error(), "a-job (container ") {
				t.Fatal(failure)
			}
			undo()
			if _, failure := c.restoreImage(t.Context()); failure != nil {
				t.Errorf("%v", failure)
			}
			c.layout.target = "web a-job"
			c.isAsBefore(before, c.state())
			log := c.artifact("rollback.log")
			if n := strings.Count(log, "[Creating container "+c.project+"-a-job-1 again: "); n != 1 {
				t.Errorf("the orphan was created %d times: %s", n, log)
			}
		})
	}
}

// TestWhatCannotComeBackKeepsNothingElseAway has compose remove an orphan, whose pin
// somebody has removed. The rollback says so, and brings the target back all the same.
func TestWhatCannotComeBackKeepsNothingElseAway(t *testing.T) {
	t.Parallel()
	services := "services:\n  web: {build: ./web, depends_on: [other]}" + otherService
	c := newLayoutEnv(t, layout{
		files: map[string]string{"compose.yaml": services + "  a-job: {build: ./other, stop_grace_period: 1s}\n"},
	}, composePrograms(t)["newest"])
	c.file("compose.yaml", services)
	before := c.state()
	undo := c.change()
	c.config.Environ = append(c.config.Environ, "COMPOSE_REMOVE_ORPHANS=true")
	c.succeed("build")
	if failure, _ := c.fail("restart"); !strings.Contains(failure.Error(), "a-job (container ") {
		t.Fatal(failure)
	}
	undo()
	record, err := change.Decode(c.steps.change.Record)
	if err != nil {
		t.Fatal(err)
	}
	for _, pin := range record.Image.Pins {
		if pin.Service == "a-job" {
			c.docker("rm", pin.Name)
		}
	}
	if _, failure := c.restoreImage(t.Context()); failure == nil || !strings.Contains(failure.Error(), "container "+c.project+"-a-job-1") {
		t.Errorf("failure is %v", failure)
	}
	if was, is := before.Of("web"), c.state().Of("web"); len(is) != 1 || is[0].ImageID != was[0].ImageID || is[0].State != "running" {
		t.Errorf("web is %+v, was %+v. rollback.log: %s", is, was, c.artifact("rollback.log"))
	}
}

// TestABuildThatStartsIsARestart has a plan whose build is docker compose up, and that
// ends before its restart. The network that it has made goes, as after a restart.
func TestABuildThatStartsIsARestart(t *testing.T) {
	t.Parallel()
	c := newLayoutEnv(t, layout{
		files:  map[string]string{"compose.yaml": "services:\n  web: {build: ./web}" + otherService},
		change: map[string]string{"compose.yaml": "services:\n  web: {build: ./web, networks: [default, new]}" + otherService + "networks: {new: {}}\n", "web/behaviour": "ok 2"},
	}, composePrograms(t)["newest"])
	up := []string{"up", "-d", "--build", "--no-deps", "web"}
	c.setPlan(up, up)
	before := c.state()
	undo := c.change()
	c.succeed("build")
	undo()
	if _, failure := c.restoreImage(t.Context()); failure != nil {
		t.Errorf("%v", failure)
	}
	c.isAsBefore(before, c.state())
}

// TestAReplicaThatWasStoppedIsNotStarted has a service of which one container runs and
// one was stopped. A rollback makes the second again without a start.
func TestAReplicaThatWasStoppedIsNotStarted(t *testing.T) {
	t.Parallel()
	c := newLayoutEnv(t, layout{
		files:   map[string]string{"compose.yaml": "services:\n  web: {build: ./web, scale: 2}" + otherService},
		prepare: func(c *layoutEnv) { c.docker("stop", "--time", "1", c.project+"-web-2") },
	}, composePrograms(t)["newest"])
	before := c.state()
	undo := c.change()
	c.succeed("build")
	c.succeed("restart")
	undo()
	if _, failure := c.restoreImage(t.Context()); failure != nil {
		t.Errorf("%v", failure)
	}
	after := c.state()
	c.isAsBefore(before, after)
	if web := after.Of("web"); len(web) != 2 || web[0].State != "running" || !web[1].StartedAt.IsZero() {
		t.Errorf("web is %+v. rollback.log: %s", web, c.artifact("rollback.log"))
	}
}

// TestInterruptedUpIsMended kills `docker compose up` at random moments. Its repeat
// must then succeed, or its rollback.
func TestInterruptedUpIsMended(t *testing.T) {
	t.Parallel()
	rounds := 2
	if everyLayout {
		rounds = 25
	}
	for version, program := range composePrograms(t) {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			c := newLayoutEnv(t, layout{files: map[string]string{
				"compose.yaml": "services:\n  web: {build: ./web, volumes: [/anonymous]}" + otherService}}, program)
			left := map[string]int{}
			var longest time.Duration
			for round := range rounds {
				// The engine may have carried out a request of the killed command only
				// after the rollback. Mended containers are what the round begins with.
				if _, failure := c.restoreImage(t.Context()); failure != nil {
					t.Fatal(failure)
				}
				c.steps.change.Record = nil
				before := c.state()
				undo := c.change()
				c.file("web/behaviour", "ok "+time.Now().String())
				c.succeed("build")
				started := time.Now()
				// The first round shows how long the command takes.
				c.interruptUp(time.Duration(rand.Int64N(int64(longest) + 1)))
				if round == 0 {
					longest = 2 * time.Second
				} else {
					longest = max(longest, time.Since(started))
				}
				left[c.whatIsLeft(before)]++
				if round%2 == 0 {
					c.succeed("restart")
					after := c.state()
					c.othersAre(before, after)
					web := after.Of("web")
					if len(web) != 1 || web[0].Name != c.project+"-web-1" || web[0].State != "running" || web[0].ImageID == before.Of("web")[0].ImageID ||
						web[0].Volumes["/anonymous"] != before.Of("web")[0].Volumes["/anonymous"] {
						t.Errorf("web is %+v", web)
					}
				}
				undo()
				if _, failure := c.restoreImage(t.Context()); failure != nil {
					t.Fatalf("%v\n%s", failure, c.artifact("rollback.log"))
				}
				c.isAsBefore(before, c.state())
				if t.Failed() {
					t.Fatalf("round %d, interrupted as %v\n%s", round, left, c.artifact("rollback.log"))
				}
			}
			t.Logf("interrupted `up` left: %v", left)
		})
	}
}

// TestARestartLeavesNoTemporaryName has a container with the name that compose leaves if
// it finds, and only starts, what an interrupted `up` had created.
func TestARestartLeavesNoTemporaryName(t *testing.T) {
	t.Parallel()
	c := newLayoutEnv(t, plainLayout, composePrograms(t)["newest"])
	before := c.state()
	old := before.Of("web")[0]
	c.change()
	c.succeed("build")
	c.steps.record = func(ctx context.Context) error { // after the command
		c.steps.record = nil
		return c.engine.RenameContainer(ctx, c.container("web").ID, change.TemporaryName(old.ID, old.Name))
	}
	c.succeed("restart")
	if web := c.container("web"); web.Name != old.Name || web.ID == old.ID {
		t.Errorf("web is %+v", web)
	}
	if log := c.artifact("restart.log"); !strings.Contains(log, "[Renamed container "+change.TemporaryName(old.ID, old.Name)+" to "+old.Name+": ") {
		t.Errorf("restart.log is %s", log)
	}
}

// interruptUp starts the plan's restart command and kills it after a time; at once
// for a time of 0, which still lets it begin.
func (c *layoutEnv) interruptUp(after time.Duration) {
	c.t.Helper()
	cmd := exec.Command(c.program, slices.Concat(c.prefix[2:], []string{"up", "-d", "--no-deps", "web"})...)
	cmd.Dir, cmd.Env = c.workspace, c.config.Environ
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	timer := time.AfterFunc(after, func() { cmd.Process.Signal(os.Kill) })
	cmd.Wait()
	timer.Stop()
}

// whatIsLeft describes the target after an interrupted `up`.
func (c *layoutEnv) whatIsLeft(before projectState) string {
	var parts []string
	for _, container := range c.state().Of("web") {
		part := "new"
		if _, found := change.ProjectOf(before.Project).ByID(container.ID); found {
			part = "old"
		}
		if _, temporary := change.FinalName(container.Name); temporary {
			part += " (temporary name)"
		}
		parts = append(parts, part+" "+container.State)
	}
	slices.Sort(parts)
	return strings.Join(parts, ", ")
}

// TestAnEngineThatComposeDoesNotUse lets a run go on without knowing its containers:
// nothing is recorded of them, and a rollback is left to the plan's commands.
func TestAnEngineThatComposeDoesNotUse(t *testing.T) {
	t.Parallel()
	api, foreign := strings.Repeat("aa", 32), strings.Repeat("bb", 32)
	known := []compose.Container{{ID: api, Service: "api", State: "running"}}
	for name, test := range map[string]struct {
		docker     string
		containers []compose.Container
		err        error
		warning    string
		seen       bool
		// answered: the engine has answered before.
		answered bool
	}{
		"the same":            {docker: composeStandIn + "\ncase \"$*\" in *' ps '*) echo " + api + ";; esac", containers: known, seen: true},
		"no container at all": {docker: composeStandIn, seen: true},
		"another engine":      {docker: composeStandIn + "\ncase \"$*\" in *' ps '*) echo " + foreign + ";; esac", containers: known, warning: "it has container bbbbbbbbbbbb, which the worker's engine does not know"},
		"an empty engine":     {docker: composeStandIn, containers: known, warning: "it has no container of project moonmind"},
		"no configuration":    {docker: "echo hello", containers: known, warning: "is not a configuration"},
		"no list":             {docker: composeStandIn + "\ncase \"$*\" in *' ps '*) echo hello;; esac", containers: known, warning: "prints no list of containers"},
		"an old compose":      {docker: "case \"$*\" in *--format*|*' ps '*) echo unknown flag >&2; exit 16;; esac\n" + composeStandIn, containers: known, warning: "unknown flag", answered: true},
		"no engine":           {docker: composeStandIn, err: compose.ErrUnreachable, warning: "docker engine is unreachable"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newTestEnv(t)
			b.program("docker", test.docker)
			engine := &fakeEngine{containers: func(int, string) ([]compose.Container, error) { return test.containers, test.err }}
			b.config.Engine = engine
			if test.answered {
				b.config.Engine = knownEngine{engine}
			}
			b.plan(`[{"name": "build"}]`)
			b.succeed("build")
			record, err := change.Decode(b.steps.change.Record)
			if err != nil || record.Image == nil || record.Image.EngineSeen != test.seen || record.Image.Ready != test.seen {
				t.Fatalf("%s, %v", b.steps.change.Record, err)
			}
			if warned := strings.Contains(b.logged.String(), "so a rollback runs the plan's commands"); warned == test.seen || !strings.Contains(b.logged.String(), test.warning) {
				t.Errorf("logged: %s", b.logged)
			}
			o, err := New(b.config)
			if err != nil {
				t.Fatal(err)
			}
			if reason := (&stepRun{Orchestrator: o, record: record}).imageByCommands(); (reason == "") != test.seen {
				t.Errorf("the plan's commands roll back because: %q", reason)
			}
		})
	}
}

var _ Engine = (*compose.Engine)(nil)

// TestContainersThatAnOperatorRunsFromTheImage has containers that docker run has made
// from an image that compose has built: they have compose's labels from the image, and
// are no containers of the service to compose. A run neither fails for them nor touches
// them.
func TestContainersThatAnOperatorRunsFromTheImage(t *testing.T) {
	t.Parallel()
	c := newLayoutEnv(t, layout{files: map[string]string{
		"web/Dockerfile":   "LABEL com.docker.compose.project=PROJECT com.docker.compose.service=web\n",
		"other/Dockerfile": "LABEL com.docker.compose.project=PROJECT com.docker.compose.service=other\n",
		"compose.yaml":     "services:\n  web: {build: ./web}" + otherService,
	}}, composePrograms(t)["newest"])
	before := c.state()
	byHand := func(name, service string) {
		c.docker("run", "--detach", "--name", c.project+name, "--network", c.project+"_default", c.project+"-"+service)
		t.Cleanup(func() {
			if out, err := exec.Command("docker", "rm", "--force", c.project+name).CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	byHand("-before", "web")
	undo := c.change()
	c.succeed("build")
	byHand("-meanwhile", "web")
	byHand("-meanwhile-other", "other")
	c.succeed("restart")
	undo()
	if _, failure := c.restoreImage(t.Context()); failure != nil {
		t.Errorf("%v", failure)
	}
	c.isAsBefore(before, c.state())
	for _, name := range []string{"-before", "-meanwhile", "-meanwhile-other"} {
		if _, found, err := c.engine.InspectContainer(t.Context(), c.project+name); err != nil || found.State != "running" || found.Restarts > 0 {
			t.Errorf("%s is %+v, %v", name, found, err)
		}
	}
	if t.Failed() {
		t.Logf("restart.log: %s\nrollback.log: %s", c.artifact("restart.log"), c.artifact("rollback.log"))
	}
}

// TestHookContainersOfARunGo has a pre_start hook that fails: compose keeps its
// container. It is none of the service's, and is removed with the rollback, by compose or
// without it.
func TestHookContainersOfARunGo(t *testing.T) {
	t.Parallel()
	for name, byCompose := range map[string]bool{"with compose": true, "without compose": false} {
		t.Run(name, func(t *testing.T) { t.Parallel(); testHookContainers(t, byCompose) })
	}
}

func testHookContainers(t *testing.T, byCompose bool) {
	c := newLayoutEnv(t, layout{
		files:  map[string]string{"hook": "done", "compose.yaml": "services:\n  web: {build: ./web, pre_start: [{command: [/server], volumes: ['./hook:/behaviour:ro']}]}" + otherService},
		change: map[string]string{"hook": "exit", "web/behaviour": "ok 2"},
	}, composePrograms(t)["newest"])
	before := c.state()
	undo := c.change()
	c.succeed("build")
	c.fail("restart")
	if hooks := c.state().Hooks; len(hooks) != 1 || hooks[0].Service != "web" || hooks[0].State != "exited" {
		t.Errorf("containers of hooks are %+v", hooks)
	}
	undo()
	if !byCompose {
		c.withoutCompose()
	}
	if _, failure := c.restoreImage(t.Context()); failure != nil {
		t.Errorf("%v", failure)
	}
	after := c.state()
	c.isAsBefore(before, after)
	if len(after.Hooks) > 0 {
		t.Errorf("containers of hooks are %+v", after.Hooks)
	}
	if t.Failed() {
		t.Logf("restart.log: %s\nrollback.log: %s", c.artifact("restart.log"), c.artifact("rollback.log"))
	}
}
