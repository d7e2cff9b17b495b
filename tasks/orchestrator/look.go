package orchestrator

import (
	"context"
	"time"
)

// What a worker's steps would meet, for those who look before there is a run.

// PlannedHealthURL is what MoonMind's API writes into its plans as the health
// check of a service, "" for none. The API itself answers it with 404
// (docs/moonmind.md#f5).
func PlannedHealthURL(service string) string {
	if service == "api" {
		return "http://api:5000/health"
	}
	return ""
}

// PlannedHealthStatus is the status that plans expect.
const PlannedHealthStatus = 200

// AskHealth makes one request as the step verify does, with the proxies of
// this environment. limit bounds each phase.
func AskHealth(ctx context.Context, environ []string, address string, limit time.Duration) (status int, err error) {
	return newHealthClient(environ).status(ctx, "GET", address, limit)
}

// SkillModule is the Python module that plans with a skill run, by `python -m`
// in the workspace (docs/moonmind.md#skill-plans).
const SkillModule = "moonmind.workflows.orchestrator.skill_executor"

// FindSkillPython returns the program that such a plan would run, "" if there
// is none.
func FindSkillPython(environ []string, workspace string) string {
	return lookPath("python", environ, workspace)
}
