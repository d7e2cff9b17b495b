package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/excerpt"
)

// build builds the service's image (docs/moonmind.md#build), after the image of
// before has been pinned.
func (s *stepRun) build(ctx context.Context) (success, *Failure) {
	command, failure := s.commandParameter(compose.BuildCommand(s.profile.ComposeProject, s.profile.ComposeService))
	if failure != nil {
		return success{}, failure
	}
	file, failure := s.runCommandStep(ctx, commandStep{
		command: command, log: "build.log",
		before: func(log *artifacts.Log) *Failure {
			if containers, _ := compose.MayChange(command); containers {
				return s.beforeRestart(ctx, log)
			}
			return s.pinImage(ctx)
		},
		after: func(log *artifacts.Log) *Failure {
			s.noteUnchangedImages(ctx, log)
			return nil
		},
	})
	if failure != nil {
		return success{}, failure
	}
	return success{message: "Build completed", files: []artifacts.File{file}, payload: logPayload{file.Path}}, nil
}

// noteUnchangedImages writes to the log which images a build that succeeded has left
// as they were.
func (s *stepRun) noteUnchangedImages(ctx context.Context, log *artifacts.Log) {
	if s.record.Image == nil || !s.record.Image.EngineSeen {
		return
	}
	for _, name := range s.record.Image.Names {
		now, err := s.config.Engine.InspectImage(ctx, name.Name)
		switch {
		case err != nil && !errors.Is(err, compose.ErrNotFound):
			s.log.Warn("cannot check whether the build has made a new image", "error", err)
			return
		case now.ID == "" && name.ID == "":
			log.Line("[There is no image " + name.Name + " after the build either]")
		case now.ID == name.ID:
			log.Line("[The build has made no new image: " + name.Name + " is " + name.ID + " as before]")
		default:
			s.audit(audit.Record{Kind: audit.ImageBuilt, Image: &audit.Image{Name: name.Name, Before: name.ID, After: now.ID}})
		}
	}
}

// serviceListLimit bounds how much explain reads of compose's list of services,
// in bytes.
const serviceListLimit = 64 << 10

// serviceListTimeout bounds the command that lists them.
const serviceListTimeout = 10 * time.Second

// explain adds to the failure of a compose command what compose's output does not
// say: that the project has no such service, and which ones it has.
func (s *stepRun) explain(ctx context.Context, workspace string, command []string, failure *Failure) {
	line, isCompose := compose.ParseTarget(command)
	if !isCompose || line.Service() == "" || ctx.Err() != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, serviceListTimeout)
	defer cancel()
	output := excerpt.Head{Limit: serviceListLimit}
	code, unlisted := s.runner.forOwn().run(ctx, workspace, line.ServicesCommand(), &output, &excerpt.Head{}, nil)
	if unlisted != nil || code != 0 || output.Full {
		return
	}
	services := compose.ParseServices(string(output.Kept))
	if len(services) == 0 || slices.Contains(services, line.Service()) {
		return
	}
	project := line.Project
	if project == "" {
		project = "in " + workspace
	}
	failure.Arg += fmt.Sprintf("\nService %q is not in the compose file of project %s. Services there: %s. The plan was made for another project, or COMPOSE_FILE points elsewhere",
		line.Service(), project, strings.Join(services, ", "))
}
