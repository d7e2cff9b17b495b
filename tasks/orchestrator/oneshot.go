package orchestrator

import (
	"context"
	"slices"

	"github.com/moonladderstudios/mm-orchestrator/compose"
)

// findOneShots finds out which services of the target are to end by themselves: other
// services wait for that. A plan with a URL wants a service that answers.
func (j *judge) findOneShots(ctx context.Context) {
	image := j.run.record.Image
	if j.check != nil || j.oneShotsSought || image == nil {
		return
	}
	j.oneShotsSought = true
	var model *compose.Model
	for _, service := range j.services {
		by := ""
		for _, c := range image.Before.Containers {
			if compose.AwaitsCompletion(c.DependsOn, service) {
				by = c.Service
			}
		}
		if by == "" && model == nil {
			model = j.run.readModel(ctx)
		}
		if by == "" {
			by = model.AwaitsCompletion(service)
		}
		if by != "" && !j.isOneShot(service) {
			j.oneShots = append(slices.Clone(j.oneShots), service)
			j.log.Line("[Service " + service + " has to complete: service " + by + " waits for that]")
		}
	}
}

// readModel reads the project of the plan's compose commands, as its files are now. It
// returns an empty one if compose does not describe it.
func (s *stepRun) readModel(ctx context.Context) *compose.Model {
	image := s.record.Image
	ask, isCompose := compose.ModelCommand(append(slices.Clone(image.Compose), "config"))
	if !isCompose {
		return &compose.Model{}
	}
	text, err := s.query(ctx, image.Workspace, ask)
	if err == nil {
		var model compose.Model
		if model, err = compose.ParseModel([]byte(text)); err == nil {
			return &model
		}
	}
	s.log.Warn("compose does not describe the project, so that it is not known whether the service is to end by itself", "error", err)
	return &compose.Model{}
}
