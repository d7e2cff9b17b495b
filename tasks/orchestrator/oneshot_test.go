package orchestrator

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/compose"
)

// A one-shot target is healthy once it has completed, if the plan says that it has to,
// or another service waits for that.
func TestOneShotTargets(t *testing.T) {
	t.Parallel()
	const alone, awaited = "services:\n  web: {build: ./web}" + otherService, "services:\n  web: {build: ./web}\n  other: {build: ./other, depends_on: {web: {condition: service_completed_successfully}}}\n"
	for name, test := range map[string]struct {
		compose, behaviour string
		verify             map[string]any // parameters
		noDeps             bool           // the other service was started alone, so that no label says what it waits for
		failure, log       string         // parts
	}{
		"another service waits for it":       {compose: awaited, behaviour: "done 2", log: "[Service web has to complete: service other waits for that]\n"},
		"one that was started by itself":     {compose: awaited, behaviour: "done 2", noDeps: true, log: "[Service web has to complete: service other waits for that]\n"},
		"it fails":                           {compose: awaited, behaviour: "exit", failure: "web-1 is exited (exit code 3)"},
		"it does not end":                    {compose: awaited, behaviour: "ok 2", failure: "web-1 is running, and has to complete"},
		"the plan says so":                   {compose: alone, behaviour: "done 2", verify: map[string]any{"oneShot": true}},
		"nothing says so":                    {compose: alone, behaviour: "done 2", failure: "web-1 is exited (exit code 0)"},
		"nothing says so, running is enough": {compose: alone, behaviour: "done 2", verify: map[string]any{"runningIsEnough": true}, failure: "web-1 is exited (exit code 0)"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newLayoutEnv(t, layout{
				files:  map[string]string{"web/behaviour": "done", "compose.yaml": test.compose},
				change: map[string]string{"web/behaviour": test.behaviour},
				prepare: func(c *layoutEnv) {
					if test.noDeps {
						c.compose(c.t.Context(), "up", "-d", "--no-deps", "--force-recreate", "other")
					}
				},
			}, composePrograms(t)["newest"])
			c.config.StateTimeout = 10 * c.config.QuietPeriod
			var plan []map[string]any
			if err := json.Unmarshal(c.steps.run.Steps, &plan); err != nil {
				t.Fatal(err)
			}
			plan = slices.Insert(plan, 2, map[string]any{"name": "verify", "parameters": test.verify})
			text, err := json.Marshal(plan)
			if err != nil {
				t.Fatal(err)
			}
			c.plan(string(text))
			// The first web has ended, as the worker will see it too.
			awaitState(t, c, "web", "exited")
			before := c.state()
			undo := c.change()
			c.succeed("build")
			c.succeed("restart")
			if test.failure == "" {
				c.succeed("verify")
			} else if failure, _ := c.fail("verify"); !strings.Contains(failure.Error(), test.failure) {
				t.Errorf("%v\nwant %s", failure, test.failure)
			}
			if log := c.artifact("verify.log"); !strings.Contains(log, test.log) {
				t.Errorf("verify.log is %s\nwant %s", log, test.log)
			}
			undo()
			if _, failure := c.restoreImage(t.Context()); failure != nil {
				t.Fatal(failure)
			}
			c.isAsBefore(before, c.state())
		})
	}
}

// awaitState waits until the containers of a service are in a state.
func awaitState(t *testing.T, c *layoutEnv, service, state string) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		containers := c.state().Containers
		if !slices.ContainsFunc(containers, func(one compose.Container) bool { return one.Service == service && one.State != state }) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s is %s. Containers: %+v", service, state, containers)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
