package orchestrator

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/compose"
)

// networkSettings lists the networks of a project with their settings.
func (c *layoutEnv) networkSettings(state projectState) (lines []string) {
	for _, network := range state.Networks {
		lines = append(lines, fmt.Sprintf("%s internal %t, options %v, label %s", network.Name, network.Settings.Internal, network.Settings.Options, network.Settings.Labels["own"]))
	}
	return lines
}

// connections lists which container is connected to which networks that are there.
func (c *layoutEnv) connections(state projectState) (lines []string) {
	for _, container := range state.Containers {
		line := container.Name + " " + container.State
		for _, name := range slices.Sorted(maps.Keys(container.NetworkIDs)) {
			there := slices.ContainsFunc(state.Networks, func(n compose.ProjectNetwork) bool { return n.ID == container.NetworkIDs[name] })
			line += fmt.Sprintf(", %s %t", name, there)
		}
		lines = append(lines, line)
	}
	return lines
}

// TestNetworksThatARunHasChangedAreBroughtBack has a run that changes networks of the
// target. Afterwards the networks have the settings of before, and the target is
// connected to all of them.
func TestNetworksThatARunHasChangedAreBroughtBack(t *testing.T) {
	t.Parallel()
	const services = "services:\n  web: {build: ./web, networks: [front, back]%s}\n  other: {build: ./other, stop_grace_period: 1s, networks: [%s]}\n"
	const networks = "networks: {front: {%s}, back: {%s}}\n"
	for name, test := range map[string]struct {
		service, other, front, back string
		fails                       bool // the restart
	}{
		"others use the network":         {other: "back", back: "labels: {own: changed}", fails: true},
		"only the target uses it":        {other: "back", front: "internal: true, labels: {own: changed}"},
		"compose cannot make the target": {service: ", depends_on: [other]", other: "back", front: "internal: true, driver_opts: {com.docker.network.bridge.enable_icc: 'false'}"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			before := fmt.Sprintf(services, test.service, test.other)
			c := newLayoutEnv(t, layout{
				files:  map[string]string{"compose.yaml": before + fmt.Sprintf(networks, "", "")},
				change: map[string]string{"compose.yaml": before + fmt.Sprintf(networks, test.front, test.back), "web/behaviour": "ok 2"},
			}, composePrograms(t)["newest"])
			was := c.state()
			undo := c.change()
			c.succeed("build")
			if test.fails {
				c.fail("restart")
			} else {
				c.succeed("restart")
			}
			if changed := c.state(); slices.Equal(c.networkSettings(changed), c.networkSettings(was)) && slices.Equal(c.connections(changed), c.connections(was)) {
				t.Fatal("the restart has changed nothing of the networks")
			}
			undo()
			_, failure := c.restoreImage(t.Context())
			if failure != nil {
				t.Errorf("%v", failure)
			}
			after := c.state()
			same(t, "networks", strings.Join(c.networkSettings(after), "\n"), strings.Join(c.networkSettings(was), "\n"))
			same(t, "connections", strings.Join(c.connections(after), "\n"), strings.Join(c.connections(was), "\n"))
			c.othersAre(was, after)
			if t.Failed() {
				t.Logf("restart.log: %s\nrollback.log: %s", c.artifact("restart.log"), c.artifact("rollback.log"))
			}
		})
	}
}

// TestANetworkThatCannotBeBroughtBackIsNamed has somebody connect a container to a
// network that the run has changed. The rollback leaves that container alone, and
// does not say that all is as before.
func TestANetworkThatCannotBeBroughtBackIsNamed(t *testing.T) {
	t.Parallel()
	const services = "services:\n  web: {build: ./web, networks: [front, back], depends_on: [other]}\n  other: {build: ./other, stop_grace_period: 1s, networks: [back]}\n"
	c := newLayoutEnv(t, layout{
		files:  map[string]string{"compose.yaml": services + "networks: {front: {}, back: {}}\n"},
		change: map[string]string{"compose.yaml": services + "networks: {front: {internal: true}, back: {}}\n", "web/behaviour": "ok 2"},
	}, composePrograms(t)["newest"])
	undo := c.change()
	c.succeed("build")
	c.succeed("restart")
	c.docker("network", "connect", c.project+"_front", c.project+"-other-1")
	undo()
	_, failure := c.restoreImage(t.Context())
	if failure == nil || !strings.Contains(failure.Error(), "network "+c.project+"_front: other ") || !strings.Contains(failure.Error(), "Internal") {
		t.Errorf("failure is %v", failure)
	}
	if log := c.artifact("rollback.log"); !strings.Contains(log, "[Left as it is: network "+c.project+"_front is used by container "+c.project+"-other-1, which is not the run's]") {
		t.Errorf("rollback.log is %s", log)
	}
	for _, line := range c.connections(c.state()) {
		if strings.HasPrefix(line, c.project+"-web-1") {
			same(t, "target", line, fmt.Sprintf("%[1]s-web-1 running, %[1]s_back true, %[1]s_front true", c.project))
		}
	}
}
