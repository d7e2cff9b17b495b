package orchestrator

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"syscall"

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
	for step, name := range map[store.Step]string{store.StepBuild: "build.log", store.StepRestart: "restart.log"} {
		params, failure := r.plan.find(step)
		if failure == nil {
			name, failure = params.text("logArtifact", name)
		}
		if failure != nil {
			continue
		}
		for _, id := range compose.BuildContainers(r.endOfLog(name)) {
			removed, err := r.config.Engine.RemoveBuildContainer(ctx, id)
			if err != nil {
				r.stepRun.log.Warn("container of a failed build cannot be removed", "container", id, "error", err)
			} else if removed {
				r.log.Line("[Removed container " + id + ", in which a step of the build has failed]")
			}
		}
	}
}

// endOfLog returns the end of a log of the run, nothing if there is none.
func (s *stepRun) endOfLog(name string) []byte {
	if !filepath.IsLocal(name) {
		return nil
	}
	file, err := os.OpenFile(filepath.Join(s.dir.Dir(), name), os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	defer file.Close()
	if info, err := file.Stat(); err == nil && info.Mode().IsRegular() && info.Size() > buildLogLimit {
		_, _ = file.Seek(-buildLogLimit, io.SeekEnd)
	}
	text, _ := io.ReadAll(io.LimitReader(file, buildLogLimit))
	return text
}
