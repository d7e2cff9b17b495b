package orchestrator

import (
	"context"
	"fmt"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// answeredWithin bounds the request before the run, which the run waits for.
const answeredWithin = 2 * time.Second

// answered says whether the plan's health check has the expected answer now, before
// the run changes anything.
func (s *stepRun) answered(ctx context.Context) bool {
	check := s.plannedCheck()
	if check == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, answeredWithin)
	defer cancel()
	answer, err := s.client.ask(ctx, check.method, check.url, answeredWithin)
	return err == nil && answer.status == check.expected
}

// plannedCheck is the health check of the plan's step verify, with the configured
// URL; nil for none, or for one that makes no sense.
func (s *stepRun) plannedCheck() *healthCheck {
	params, failure := s.plan.find(store.StepVerify)
	if failure != nil {
		return nil
	}
	check, failure := params.healthCheck()
	if failure != nil || check == nil {
		return nil
	}
	if configured := s.profile.Verify.HealthURL; configured != "" {
		check.url, check.configured = configured, true
	}
	return check
}

// judgeRestored watches the service that a rollback has brought back, until it is as
// it was before the run: healthy, or sick in the same way. The plan's health check
// counts only if it had the expected answer before the run, because otherwise the
// check itself may be what made the run fail.
func (s *stepRun) judgeRestored(ctx context.Context, log *artifacts.Log) *Failure {
	image := s.record.Image
	before := []compose.Container{}
	for _, c := range image.Before.Containers {
		if image.IsTarget(c.Service) {
			before = append(before, compose.Container{
				ID: c.ID, Name: c.Name, Service: c.Service, ImageID: c.ImageID, Image: c.Image,
				State: c.State, Health: c.Health, ExitCode: c.ExitCode, StartedAt: c.StartedAt, Restarts: c.Restarts,
			})
		}
	}
	if len(before) == 0 {
		return nil // restoreImage has seen that there is none again
	}
	params, failure := s.plan.find(store.StepVerify)
	if failure != nil {
		params = parameters{} // a plan without this step
	}
	r, failure := s.requirements(params)
	if failure != nil {
		return failure
	}
	// restoreImage has compared the images; what their names stand for may differ
	// from them, as before the run.
	r.before, r.deployed, r.check = inLoops(before, image.At, r.quiet), false, nil
	if image.Answered {
		r.check = s.plannedCheck()
	}
	// The plan's time may be too short for docker's first health check. A rollback
	// that fails leaves more to do by hand than one that waits.
	r.deadline = latest(r.deadline, r.begun.Add(s.config.StateTimeout))
	v := s.judgeService(ctx, log, r)
	switch {
	case v.health == healthy:
		return nil
	case v.ended:
		return r.failed(v)
	}
	return commandError(fmt.Sprintf("Images, containers and configuration of service %s are as before the run, but the service is not: it was %s. %s",
		r.service, condition(r.before), r.failed(v).Error()))
}
