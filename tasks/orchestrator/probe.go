package orchestrator

import (
	"context"
	"time"
)

// This file serves the command doctor: it finds, before there is any run, what
// would make a step fail.

// PlannedHealthURL is the health check of a service that MoonMind's API writes
// into its plans, "" for none. The API itself answers it with 404
// (docs/moonmind.md#f5).
func PlannedHealthURL(service string) string {
	if service == "api" {
		return "http://api:5000/health"
	}
	return ""
}

// PlannedHealthStatus is the status that plans expect.
const PlannedHealthStatus = 200

// ProbeHealth makes one GET request as the step verify does, with the proxies of
// environ, and returns the status of the answer. limit bounds each phase of the
// request: connect, TLS handshake, answer.
func ProbeHealth(ctx context.Context, environ []string, address string, limit time.Duration) (status int, err error) {
	answer, err := newHealthClient(environ).ask(ctx, "GET", address, limit)
	return answer.status, err
}

// SkillModule is the Python module that a plan with a skill runs by `python -m`
// in the workspace (docs/moonmind.md#skill-plans).
const SkillModule = "moonmind.workflows.orchestrator.skill_executor"

// FindSkillPython returns the path of the Python program that a plan with a skill
// would run, "" if there is none.
func FindSkillPython(environ []string, workspace string) string {
	return lookPath("python", environ, workspace)
}
