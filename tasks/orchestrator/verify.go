package orchestrator

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// A healthCheck is that of the plan, with defaults (docs/moonmind.md#the-plan).
type healthCheck struct {
	url string
	// configured says that the URL is that of the configuration, in whose query a key
	// may stand that nobody else knows.
	configured bool

	method   string
	expected int
	// timeout is in seconds.
	timeout  int
	interval time.Duration
}

// shown is the URL as rows and logs show it.
func (c healthCheck) shown() string {
	if c.configured {
		return address.MaskURL(c.url)
	}
	return shownURL(c.url)
}

// timedOut is Python's text for a service that has not answered as expected.
func (c healthCheck) timedOut() string {
	return fmt.Sprintf("Health check for %s timed out after %ds", c.shown(), c.timeout)
}

// givenUp is the text for one that cannot answer any more.
func (c healthCheck) givenUp(after time.Duration) string {
	return fmt.Sprintf("Health check for %s was given up after %s", c.shown(), after.Round(time.Second))
}

// healthCheck reads the parameter of that name. Nil means that the plan has none.
func (p parameters) healthCheck() (*healthCheck, *Failure) {
	value := p["healthcheck"]
	if falsy(value) {
		return nil, nil
	}
	mapping, isMapping := value.(map[string]any)
	if !isMapping {
		return nil, typeError("Plan parameter healthcheck must be a mapping")
	}
	given := parameters(mapping)
	var check healthCheck
	var failures [5]*Failure
	check.url, failures[0] = given.text("url", "None")
	check.method, failures[1] = given.text("method", "GET")
	check.method = strings.ToUpper(check.method)
	check.expected, failures[2] = given.whole("expectedStatus", 200)
	check.timeout, failures[3] = given.whole("timeoutSeconds", 120)
	var interval float64
	interval, failures[4] = given.number("intervalSeconds", 5)
	if failure := cmp.Or(failures[:]...); failure != nil {
		return nil, failure
	}
	if interval < 0 || interval > largest {
		return nil, valueError("sleep length must be non-negative and below 2147483648 seconds")
	}
	check.interval = time.Duration(interval * float64(time.Second))
	return &check, nil
}

// verify waits until the service is proven to be healthy, or the time is over
// (docs/moonmind.md#verify, docs/moonmind.md#c2).
//
// For a service that is healthy at once, the log has the same lines about
// attempts as the Python worker's, and then what the verdict is based on.
func (s *stepRun) verify(ctx context.Context) (success, *Failure) {
	r, failure := s.requirements(s.params)
	if failure != nil {
		return success{}, failure
	}
	name, failure := s.params.text("logArtifact", "verify.log")
	if failure != nil {
		return success{}, failure
	}
	log, err := s.dir.Log(name)
	if err != nil {
		return success{}, artifactError(err)
	}
	defer log.Discard()
	for _, note := range s.notes {
		log.Line(note)
	}
	if r.check == nil {
		log.Line("No healthcheck configured; skipping HTTP verification.")
	} else if r.urlIsConfigured {
		s.replaceURL(log, r.check)
	}
	v := s.judgeService(ctx, log, r)
	if v.health != healthy {
		failure = r.failed(v)
	}
	file, err := log.Finish()
	if err != nil {
		return success{}, artifactError(err)
	}
	if failure != nil {
		failure.files = []artifacts.File{file}
		return success{}, failure
	}
	return success{message: "Verification succeeded", files: []artifacts.File{file}}, nil
}

// failed is the failure of a step whose verdict is not healthy.
func (r requirements) failed(v verdict) *Failure {
	switch {
	case v.ended && r.check != nil:
		return commandError(fmt.Sprintf("Health check for %s was ended: %s", r.check.shown(), v.reason))
	case v.ended:
		return commandError(fmt.Sprintf("Verification of service %s was ended: %s", r.service, v.reason))
	case v.health == unproven:
		return commandError(fmt.Sprintf("Service %s is not proven to be healthy: %s", r.service, v.reason))
	}
	return commandError(v.reason)
}

// requirements returns what the target has to show, from the parameters of the
// plan's step verify.
func (s *stepRun) requirements(params parameters) (requirements, *Failure) {
	check, failure := params.healthCheck()
	if failure != nil {
		return requirements{}, failure
	}
	r := requirements{check: check, begun: s.config.Now(), quiet: s.profile.Verify.QuietPeriod}
	r.project, r.service = s.plan.target(s.profile)
	r.services = []string{r.service}
	if image := s.record.Image; image != nil {
		r.engineWasSeen, r.otherEngine = image.EngineSeen, !image.EngineSeen
		if image.EngineSeen {
			r.project = image.Project
		}
		if len(image.Services) > 0 {
			r.services, r.service = image.Services, strings.Join(image.Services, ", ")
		}
	}
	r.composed, r.deployed = s.plan.composes()
	r.runningIsEnough = !falsy(params["runningIsEnough"]) || !slices.ContainsFunc(r.services, func(service string) bool {
		return !s.runningIsEnough(service)
	})
	if !falsy(params["oneShot"]) {
		r.oneShots = r.services
	}
	r.deadline = r.begun.Add(s.config.StateTimeout)
	if check != nil {
		r.deadline = r.begun.Add(time.Duration(check.timeout) * time.Second)
		r.urlIsConfigured = s.profile.Verify.HealthURL != ""
	}
	return r, nil
}

// runningIsEnough says that the policy asks for no health check of a service.
func (s *stepRun) runningIsEnough(service string) bool {
	if service == s.profile.ComposeService {
		return s.profile.Verify.RunningIsEnough
	}
	return s.policy.RunningIsEnough(service, s.config.Now())
}

// replaceURL puts the configured URL in the place of the plan's, and says so.
func (s *stepRun) replaceURL(log *artifacts.Log, check *healthCheck) {
	planned := check.url
	check.url, check.configured = s.profile.Verify.HealthURL, true
	if check.url == planned {
		return
	}
	log.Line("Health check URL of the plan replaced by configuration: " + shownURL(planned) + " -> " + check.shown())
	s.log.Info("health check URL of the plan replaced by configuration", "plan_url", shownURL(planned), "url", check.shown())
}

// composes says whether compose commands of the plan manage the target, and
// whether they give it another image or container. A step without a command has
// one by default (docs/moonmind.md#the-plan).
func (p plan) composes() (managed, deployed bool) {
	for _, step := range []store.Step{store.StepBuild, store.StepRestart} {
		params, failure := p.find(step)
		if failure != nil {
			continue
		}
		if falsy(params["command"]) {
			managed, deployed = true, true
			continue
		}
		command, failure := parseCommand(params["command"])
		if failure != nil {
			continue
		}
		if line, isCompose := compose.ParseTarget(command); isCompose {
			managed = true
			deployed = deployed || line.Subcommand != "restart"
		}
	}
	return managed, deployed
}
