package orchestrator

import (
	"slices"
	"strings"
)

// A profile describes a service that MoonMind may repair
// (docs/moonmind.md#service-profiles). The API copies its values into
// plans; for a plan that lacks one, the value here is used.
type profile struct {
	service string // the compose service
	project string // the compose project
	// allowlist has globs of the files that a patch may change.
	allowlist []string
}

// ComposeProject is the compose project of every profile.
const ComposeProject = "moonmind"

var profiles = map[string]profile{
	"api": {service: "api", project: ComposeProject, allowlist: []string{
		"api_service/Dockerfile",
		"api_service/Dockerfile.*",
		"api_service/pyproject.toml",
		"api_service/poetry.lock",
		"api_service/requirements*.txt",
		"pyproject.toml",
		"poetry.lock",
	}},
	"celery-worker": {service: "celery-worker", project: ComposeProject, allowlist: []string{
		"celery_worker/Dockerfile",
		"celery_worker/Dockerfile.*",
		"celery_worker/requirements*.txt",
		"celery_worker/pyproject.toml",
		"celery_worker/poetry.lock",
	}},
	"orchestrator": {service: "orchestrator", project: ComposeProject, allowlist: []string{
		"services/orchestrator/**",
		"moonmind/workflows/orchestrator/**",
		"docker-compose*.y*ml",
		"pyproject.toml",
		"poetry.lock",
	}},
}

// findProfile looks up the target service of a run.
func findProfile(target string) (profile, *Failure) {
	if p, found := profiles[strings.ToLower(strings.TrimSpace(target))]; found {
		return p, nil
	}
	return profile{}, keyError("Service '" + target + "' is not managed by the orchestrator")
}

// Services lists the compose services that runs may repair, sorted.
func Services() []string {
	var services []string
	for _, p := range profiles {
		services = append(services, p.service)
	}
	slices.Sort(services)
	return services
}
