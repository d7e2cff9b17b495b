package orchestrator

import (
	"context"

	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// buildLogLimit bounds how much of a log is searched for containers of a build, in
// bytes, from its end: a build ends with the step that fails.
const buildLogLimit = 4 << 20

// removeBuildContainers removes the container in which a step of a Dockerfile has
// failed. The classic builder keeps it, with its layers, and names it in the log of the
// build. What cannot be removed is no part of the service, and fails no rollback.
func (r *imageRestore) removeBuildContainers(ctx context.Context) {
	for _, step := range []store.Step{store.StepBuild, store.StepRestart} {
		params, failure := r.plan.find(step)
		if failure != nil {
			continue
		}
		name, failure := params.text("logArtifact", string(step)+".log")
		if failure != nil {
			continue
		}
		log, err := r.dir.Tail(name, buildLogLimit)
		if err != nil {
			continue // the step has not run, or its log is gone
		}
		for _, id := range compose.BuildContainers(log) {
			removed, err := r.config.Engine.RemoveBuildContainer(ctx, id)
			if err != nil {
				r.stepRun.log.Warn("container of a failed build cannot be removed", "container", id, "error", err)
			} else if removed {
				r.log.Line("[Removed container " + id + ", in which a step of the build has failed]")
			}
		}
	}
}
