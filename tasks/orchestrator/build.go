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

// build builds the service's image (docs/moonmind.md#build).
func (s *stepRun) build(ctx context.Context) (success, *Failure) {
	command, failure := s.commandParameter(compose.BuildCommand(s.profile.project, s.profile.service))
	if failure != nil {
		return success{}, failure
	}
	file, failure := s.runSingleCommand(ctx, "build.log", command, func() *Failure { return nil })
	if failure != nil {
		return success{}, failure
	}
	return success{message: "Build completed", files: []artifacts.File{file}, payload: logPayload{file.Path}}, nil
}

// restart replaces the service's container, and no other
// (docs/moonmind.md#restart).
func (s *stepRun) restart(ctx context.Context) (success, *Failure) {
	command, failure := s.commandParameter(compose.UpCommand(s.profile.project, s.profile.service))
	if failure != nil {
		return success{}, failure
	}
	timeout, failure := s.params.whole("restartTimeoutSeconds", 0)
	if failure != nil {
		return success{}, failure
	}
	others := s.listOtherContainers(ctx, command)
	file, failure := s.runSingleCommand(ctx, "restart.log", command, func() *Failure { return others.changed(ctx) })
	if failure != nil {
		return success{}, failure
	}
	message := "Restart command issued"
	if timeout != 0 {
		message += fmt.Sprintf(" (timeout %ds)", timeout)
	}
	return success{message: message, files: []artifacts.File{file}, payload: logPayload{file.Path}}, nil
}

// otherContainers are the containers of a project that a restart must not touch.
type otherContainers struct {
	run              *stepRun
	project, service string
	// before are the container ids by service; nil when they are not known.
	before map[string][]string
}

// listOtherContainers records which containers the project has besides the
// target's, for changed to compare. It records none without an engine, or if the
// command is not compose's up of one service.
func (s *stepRun) listOtherContainers(ctx context.Context, command []string) otherContainers {
	b := otherContainers{run: s}
	line, isCompose := compose.ParseTarget(command)
	if s.journal.found != nil {
		// The command has ended under an earlier worker. Only that one knew the
		// containers of before.
		s.log.Warn("cannot check that only the target was restarted: an earlier worker ran the command and did not end the step")
		return b
	}
	if s.config.Engine == nil || !isCompose || line.Subcommand != "up" || line.Service() == "" || line.Project == "" {
		return b
	}
	b.project, b.service = line.Project, line.Service()
	before, err := b.list(ctx)
	if err != nil {
		s.log.Warn("cannot check that only the target is restarted", "error", err)
		return b
	}
	b.before = before
	return b
}

func (b otherContainers) list(ctx context.Context) (map[string][]string, error) {
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

// changed returns a failure if a container of another service was replaced.
func (b otherContainers) changed(ctx context.Context) *Failure {
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
				replaced = append(replaced, fmt.Sprintf("%s (container %.12s was removed)", service, id))
			}
		}
	}
	if len(replaced) == 0 {
		return nil
	}
	slices.Sort(replaced)
	return commandError(fmt.Sprintf("Restart of service %s changed other services of project %s too: %s", b.service, b.project, strings.Join(replaced, ", ")))
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
	output := limitedBuffer{limit: serviceListLimit}
	code, unlisted := s.runner.run(ctx, workspace, line.ServicesCommand(), &output, &limitedBuffer{}, nil)
	if unlisted != nil || code != 0 || output.full {
		return
	}
	services := compose.ParseServices(string(output.kept))
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

// limitedBuffer keeps the beginning of what is written to it and never fails.
type limitedBuffer struct {
	kept  []byte
	limit int
	// full says that bytes beyond the limit were dropped.
	full bool
}

func (b *limitedBuffer) Write(p []byte) (int, error) {
	keep := p[:min(len(p), b.limit-len(b.kept))]
	b.full = b.full || len(keep) < len(p)
	b.kept = append(b.kept, keep...)
	return len(p), nil
}
