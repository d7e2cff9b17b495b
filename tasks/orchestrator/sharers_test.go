package orchestrator

import (
	"fmt"
	"strings"
	"testing"
)

// sharingLayout has a service that uses the network of the one that runs replace.
const sharingLayout = "services:\n  web: {build: ./web}\n  app: {build: ./other, network_mode: 'service:web', environment: {PORT: '8081'}, stop_grace_period: 1s}\n"

// usesItsNetwork checks that app runs in the network of the web that is there.
func (c *layoutEnv) usesItsNetwork(state projectState) {
	c.t.Helper()
	web, app := state.Of("web"), state.Of("app")
	if len(web) != 1 || len(app) != 1 || app[0].State != "running" || len(app[0].Shares) != 1 || app[0].Shares[0] != web[0].ID {
		c.t.Errorf("web is %+v, app is %+v", web, app)
	}
}

// TestARunThatWouldCutOffAnotherServiceIsRefused has a run replace a container whose
// network another service uses. That service would have no network any more.
func TestARunThatWouldCutOffAnotherServiceIsRefused(t *testing.T) {
	t.Parallel()
	c := newLayoutEnv(t, layout{files: map[string]string{"compose.yaml": sharingLayout}}, composePrograms(t)["newest"])
	before := c.state()
	c.change()
	failure, _ := c.fail("build")
	if want := "Run refused before it changed anything: service app uses the network or processes of the container of service web, and would be cut off when that is replaced. " +
		"Have the plan replace all of them: docker compose --project-name " + c.project + " up -d --no-deps web app"; !strings.Contains(failure.Error(), want) {
		t.Errorf("failure is %v", failure)
	}
	c.isAsBefore(before, c.state())
}

// TestServicesThatShareANetworkAreReplacedTogether follows that advice, and takes the
// run back.
func TestServicesThatShareANetworkAreReplacedTogether(t *testing.T) {
	t.Parallel()
	c := newLayoutEnv(t, layout{target: "web app", files: map[string]string{"compose.yaml": sharingLayout}}, composePrograms(t)["newest"])
	before := c.state()
	c.usesItsNetwork(before)
	undo := c.change()
	c.succeed("build")
	c.succeed("restart")
	c.usesItsNetwork(c.state())
	undo()
	if _, failure := c.restoreImage(t.Context()); failure != nil {
		t.Errorf("%v", failure)
	}
	after := c.state()
	c.usesItsNetwork(after)
	if was, is := before.Of("web"), after.Of("web"); len(is) == 1 && is[0].ImageID != was[0].ImageID {
		t.Errorf("web has image %s, had %s", is[0].ImageID, was[0].ImageID)
	}
	if t.Failed() {
		t.Logf("restart.log: %s\nrollback.log: %s", c.artifact("restart.log"), c.artifact("rollback.log"))
	}
}

// TestServicesThatShareVolumesAreReplacedTogether has a run replace a service and one
// that has its volumes. Both come back, the second for the container of the first.
func TestServicesThatShareVolumesAreReplacedTogether(t *testing.T) {
	t.Parallel()
	for name, byCompose := range map[string]bool{"with compose": true, "without compose": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newLayoutEnv(t, layout{target: "app web", files: map[string]string{
				"compose.yaml": "services:\n  app: {build: ./other, volumes_from: ['web:ro'], stop_grace_period: 1s}\n  web: {build: ./web, volumes: [/anonymous]}\n"}}, composePrograms(t)["newest"])
			shown := func(state projectState) string {
				web, app := state.Of("web"), state.Of("app")
				if len(web) != 1 || len(app) != 1 || len(app[0].VolumesFrom) != 1 || app[0].VolumesFrom[0] != web[0].ID {
					t.Fatalf("web is %+v, app is %+v", web, app)
				}
				return fmt.Sprint(web[0].ImageID, web[0].Volumes, web[0].State, app[0].ImageID, app[0].Volumes, app[0].State)
			}
			before := shown(c.state())
			undo := c.change()
			c.succeed("build")
			c.succeed("restart")
			undo()
			if !byCompose {
				c.withoutCompose()
			}
			if _, failure := c.restoreImage(t.Context()); failure != nil {
				t.Errorf("%v", failure)
			}
			same(t, "both services", shown(c.state()), before)
			if t.Failed() {
				t.Logf("restart.log: %s\nrollback.log: %s", c.artifact("restart.log"), c.artifact("rollback.log"))
			}
		})
	}
}
