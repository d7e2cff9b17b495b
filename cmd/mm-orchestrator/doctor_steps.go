package main

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator"
)

// Checks of what only some steps need. A worker can run without it, so these
// checks note problems and never fail.

// skillTimeout limits the search of a Python for MoonMind's module, which imports
// its parent packages.
const skillTimeout = 15 * time.Second

// skills checks that there is a Python that can run MoonMind's skills.
func (d *doctor) skills(ctx context.Context) []verdict {
	const consequence = "Only runs with a skill need it, and they fail without it"
	python := orchestrator.FindSkillPython(d.environ, d.config.Workspace)
	if python == "" {
		return note(consequence+": to run them, install a python that has MoonMind beside the worker", "there is no python on the PATH")
	}
	ctx, cancel := context.WithTimeout(ctx, skillTimeout)
	defer cancel()
	// The plan runs python -m, which has the workspace on its path; so has -c.
	_, err := d.output(ctx, python, "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None and 'no module named ' + sys.argv[1])", orchestrator.SkillModule)
	if err != nil {
		message := err.Error()
		if ctx.Err() != nil {
			message = fmt.Sprintf("no answer within %s", skillTimeout)
		}
		return note(consequence+": to run them, install MoonMind for this python, or put another one first on the PATH", "%s does not find MoonMind's skills: %s", python, lastLine(message))
	}
	return ok("%s finds MoonMind's skills", python)
}

// lastLine returns the last line, where Python prints the error.
func lastLine(text string) string {
	text = strings.TrimSpace(text)
	return text[strings.LastIndex(text, "\n")+1:]
}

// verify checks the health URLs that runs ask in their last step.
func (d *doctor) verify(ctx context.Context) []verdict {
	var list []verdict
	effective := d.config.Policy.With(d.config.policySettings())
	for _, name := range effective.Names() {
		found, _ := effective.Find(name, time.Now())
		service, origin := found.ComposeService, found.Origins["verify.healthURL"]
		planned, replacement := orchestrator.PlannedHealthURL(name), found.Verify.HealthURL
		target := cmp.Or(replacement, planned)
		if target == "" {
			continue // verify inspects the containers instead
		}
		cure := "Correct " + origin.String()
		if replacement == "" {
			cure = fmt.Sprintf("Set %s, which MoonMind serves; otherwise verify fails, and with it every run for %s", d.config.assign("MM_ORCHESTRATOR_HEALTH_URL", service+"=http://api:5000/healthz"), service)
		}
		shown := address.MaskURL(target)
		probeCtx, cancel := context.WithTimeout(ctx, 3*time.Second)
		status, err := orchestrator.ProbeHealth(probeCtx, d.environ, target, 2*time.Second)
		cancel()
		switch {
		case err == nil && status == orchestrator.PlannedHealthStatus:
			list = append(list, ok("health URL of %s, %s, answers %d", service, shown, status)...)
		case err == nil:
			list = append(list, note(cure, "health URL of %s, %s, answers %d instead of %d", service, shown, status, orchestrator.PlannedHealthStatus)...)
		case replacement == "":
			list = append(list, note(cure, "health URL of %s is %s, as plans say, which MoonMind's API does not serve (no answer now: %v)", service, shown, err)...)
		default:
			// The service may be stopped, or unreachable from here. Only a run
			// can tell.
			list = append(list, ok("health URL of %s is %s, no answer now (%v)", service, shown, err)...)
		}
	}
	return list
}
