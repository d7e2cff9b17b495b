package orchestrator

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/compose"
)

// build makes the service's image (docs/moonmind.md#build).
func (s *stepRun) build(ctx context.Context) (done, *Failure) {
	command, failure := s.commandParameter(compose.BuildCommand(s.profile.project, s.profile.service))
	if failure != nil {
		return done{}, failure
	}
	file, failure := s.runLogged(ctx, "build.log", command, func() *Failure { return nil })
	if failure != nil {
		return done{}, failure
	}
	return done{message: "Build completed", files: []artifacts.File{file}, payload: logPayload{file.Path}}, nil
}

// restart replaces the service's container, and only that
// (docs/moonmind.md#restart).
func (s *stepRun) restart(ctx context.Context) (done, *Failure) {
	command, failure := s.commandParameter(compose.UpCommand(s.profile.project, s.profile.service))
	if failure != nil {
		return done{}, failure
	}
	timeout, failure := s.params.whole("restartTimeoutSeconds", 0)
	if failure != nil {
		return done{}, failure
	}
	bystanders := s.watchBystanders(ctx, command)
	file, failure := s.runLogged(ctx, "restart.log", command, func() *Failure { return bystanders.changed(ctx) })
	if failure != nil {
		return done{}, failure
	}
	message := "Restart command issued"
	if timeout != 0 {
		message += fmt.Sprintf(" (timeout %ds)", timeout)
	}
	return done{message: message, files: []artifacts.File{file}, payload: logPayload{file.Path}}, nil
}

// bystanders are the containers of a project that a restart must not touch.
type bystanders struct {
	run              *stepRun
	project, service string
	// before are the container ids by service; nil when they are not known.
	before map[string][]string
}

// watchBystanders notes which containers the project has besides the target.
// Without an engine, or for another command than compose's up of one service,
// nothing is watched.
func (s *stepRun) watchBystanders(ctx context.Context, command []string) bystanders {
	b := bystanders{run: s}
	line, isCompose := compose.ParseTarget(command)
	if s.journal.found != nil {
		// The command has ended under a worker that is gone, and with it what
		// it knew of the time before.
		s.log.Warn("cannot check that only the target was restarted: the worker that did it has not ended the step")
		return b
	}
	if s.config.Engine == nil || !isCompose || line.Subcommand != "up" || line.Service == "" || line.Project == "" {
		return b
	}
	b.project, b.service = line.Project, line.Service
	before, err := b.list(ctx)
	if err != nil {
		s.log.Warn("cannot watch that only the target is restarted", "error", err)
		return b
	}
	b.before = before
	return b
}

func (b bystanders) list(ctx context.Context) (map[string][]string, error) {
	containers, err := b.run.config.Engine.Containers(ctx, b.project, "")
	if err != nil {
		return nil, err
	}
	ids := map[string][]string{}
	for _, container := range containers {
		if container.Service != b.service {
			ids[container.Service] = append(ids[container.Service], container.ID)
		}
	}
	return ids, nil
}

// changed fails when a container of another service was replaced.
func (b bystanders) changed(ctx context.Context) *Failure {
	if len(b.before) == 0 {
		return nil
	}
	after, err := b.list(ctx)
	if err != nil {
		b.run.log.Warn("cannot check that only the target was restarted", "error", err)
		return nil
	}
	var replaced []string
	for service, ids := range b.before {
		for _, id := range ids {
			if !slices.Contains(after[service], id) {
				replaced = append(replaced, fmt.Sprintf("%s (container %.12s is gone)", service, id))
			}
		}
	}
	if len(replaced) == 0 {
		return nil
	}
	slices.Sort(replaced)
	return commandError(fmt.Sprintf("Restart of service %s changed other services of project %s too: %s", b.service, b.project, strings.Join(replaced, ", ")))
}

// serviceListLimit bounds the list of services that is read, in bytes.
const serviceListLimit = 64 << 10

// serviceListTime bounds how long compose is asked for them.
const serviceListTime = 10 * time.Second

// explain adds to the failure of a compose command what its own output leaves
// open: that the project has no such service, and which it has.
func (s *stepRun) explain(ctx context.Context, workspace string, command []string, failure *Failure) {
	line, isCompose := compose.ParseTarget(command)
	if !isCompose || line.Service == "" || ctx.Err() != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, serviceListTime)
	defer cancel()
	output := limitedBuffer{limit: serviceListLimit}
	code, unlisted := s.runner.run(ctx, workspace, line.ServicesCommand(), &output, &limitedBuffer{}, nil)
	if unlisted != nil || code != 0 || output.full {
		return
	}
	services := compose.ParseServices(string(output.kept))
	if len(services) == 0 || slices.Contains(services, line.Service) {
		return
	}
	project := line.Project
	if project == "" {
		project = "in " + workspace
	}
	failure.Arg += fmt.Sprintf("\nService %q is not in the compose file of project %s. Services there: %s. The plan was made for another project, or COMPOSE_FILE points elsewhere",
		line.Service, project, strings.Join(services, ", "))
}

// limitedBuffer keeps the beginning of what is written to it and never fails.
type limitedBuffer struct {
	kept  []byte
	limit int
	// full says that something was left out.
	full bool
}

func (b *limitedBuffer) Write(p []byte) (int, error) {
	keep := p[:min(len(p), b.limit-len(b.kept))]
	b.full = b.full || len(keep) < len(p)
	b.kept = append(b.kept, keep...)
	return len(p), nil
}
