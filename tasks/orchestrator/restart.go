package orchestrator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/compose"
)

// othersPatience is how long a restart waits for other services to become healthy
// again if the plan gives no restartTimeoutSeconds: their checks may need the target.
const othersPatience = 60 * time.Second

// restart replaces the service's container, and no other
// (docs/moonmind.md#restart). It succeeds only if the engine shows that.
func (s *stepRun) restart(ctx context.Context) (success, *Failure) {
	command, failure := s.commandParameter(compose.UpCommand(s.profile.ComposeProject, s.profile.ComposeService))
	if failure != nil {
		return success{}, failure
	}
	timeout, failure := s.params.whole("restartTimeoutSeconds", 0)
	if failure != nil {
		return success{}, failure
	}
	file, failure := s.runCommandStep(ctx, commandStep{
		command: command, log: "restart.log",
		before: func(log *artifacts.Log) *Failure { return s.beforeRestart(ctx, log) },
		after: func(log *artifacts.Log) *Failure {
			return s.proveRestart(ctx, log, command, time.Duration(timeout)*time.Second)
		},
	})
	if failure != nil {
		return success{}, failure
	}
	message := "Restart command issued"
	if timeout != 0 {
		message += fmt.Sprintf(" (timeout %ds)", timeout)
	}
	return success{message: message, files: []artifacts.File{file}, payload: logPayload{file.Path}}, nil
}

// beforeCommand makes sure that what a command of patch does to images and containers
// can be taken back.
func (s *stepRun) beforeCommand(ctx context.Context, log *artifacts.Log, command []string) *Failure {
	switch containers, images := compose.MayChange(command); {
	case containers:
		return s.beforeRestart(ctx, log)
	case images:
		return s.pinImage(ctx)
	}
	return nil
}

// beforeRestart makes sure that the restart can be taken back, and mends what an
// interrupted one has left.
func (s *stepRun) beforeRestart(ctx context.Context, log *artifacts.Log) *Failure {
	if failure := s.pinImage(ctx); failure != nil {
		return failure
	}
	image := s.record.Image
	if image == nil || !image.EngineSeen || s.journal.skipped > 0 {
		return nil // nothing can be seen, or an earlier worker has run the command
	}
	if image.RestartBegun == nil || image.Compared {
		now := s.config.Now().UTC()
		image.RestartBegun, image.LastRestart, image.Compared = cmp.Or(image.RestartBegun, &now), &now, false
		if failure := s.saveRecord(ctx); failure != nil {
			return failure
		}
	}
	if s.record.Helper.ActsIn(string(s.step), s.journal.claim.Attempt) {
		return nil // it may be running the command now, and mends what it has left itself
	}
	if err := s.mendContainers(ctx, log); err != nil {
		return commandError("What an interrupted restart has left cannot be mended: " + err.Error())
	}
	return nil
}

// mendContainers removes or renames the containers that an interrupted `docker
// compose up` has left of the target.
func (s *stepRun) mendContainers(ctx context.Context, log *artifacts.Log) error {
	image := s.record.Image
	return s.untilEngineAnswers(ctx, func() error {
		now, err := s.config.Engine.Project(ctx, image.Project)
		if err != nil {
			return err
		}
		for _, repair := range change.ProjectOf(now).Repairs(image.IsTarget) {
			if err := s.repair(ctx, log, repair); err != nil {
				return err
			}
		}
		return nil
	})
}

// nameContainers gives the target's containers their names, if compose has left a
// temporary one: it starts a container that an interrupted `docker compose up` had
// created, without renaming it. The engine may create that container after
// mendContainers has looked, since the request of a command that was killed goes on.
func (s *stepRun) nameContainers(ctx context.Context, log *artifacts.Log, now change.Project) error {
	for _, repair := range now.Repairs(s.record.Image.IsTarget) {
		if repair.Name == "" {
			continue
		}
		if err := s.untilEngineAnswers(ctx, func() error { return s.repair(ctx, log, repair) }); err != nil {
			return err
		}
	}
	return nil
}

func (s *stepRun) repair(ctx context.Context, log *artifacts.Log, repair change.Repair) error {
	if failure := s.auditBefore(ctx, audit.Record{Kind: audit.ContainerChanging, Text: repair.String()}); failure != nil {
		return failure
	}
	var err error
	if repair.Name == "" {
		err = s.config.Engine.RemoveContainer(ctx, repair.Container.ID)
	} else {
		err = s.config.Engine.RenameContainer(ctx, repair.Container.ID, repair.Name)
	}
	if err == nil {
		log.Line("[" + repair.String() + "]")
	}
	return err
}

// proveRestart returns a failure unless the command has replaced the target's
// containers and no others.
func (s *stepRun) proveRestart(ctx context.Context, log *artifacts.Log, command []string, patience time.Duration) *Failure {
	image := s.record.Image
	if image == nil || !image.EngineSeen {
		return nil
	}
	patience = cmp.Or(patience, othersPatience)
	deadline := s.config.Now().Add(patience)
	pause := backoff{next: 100 * time.Millisecond, most: time.Second}
	seen := false
	for {
		now, err := s.projectNow(ctx)
		if err != nil {
			return notProven(err)
		}
		if !seen {
			s.auditContainers(image.Before, now)
			seen = true
		}
		changes, touched, appeared := image.OtherChanges(now, false)
		if len(changes) > 0 {
			return s.othersChanged(ctx, changes, touched, appeared)
		}
		if changes, _, _ = image.OtherChanges(now, true); len(changes) == 0 {
			image.Compared = true
			image.AddAnonymous(now) // a further attempt may replace these containers
			if failure := s.saveRecord(ctx); failure != nil {
				return failure
			}
			if err := s.nameContainers(ctx, log, now); err != nil {
				return notProven(err)
			}
			return s.proveReplacement(ctx, log, command, now)
		}
		// Only the health of others is left, which may depend on the target.
		if !pause.wait(ctx, s.config.Now, deadline) {
			if cause := context.Cause(ctx); cause != nil {
				return notProven(cause)
			}
			return s.othersChanged(ctx, changes, nil, nil)
		}
	}
}

func notProven(err error) *Failure {
	return commandError("It cannot be shown that the restart has replaced the service's container and no other: " + err.Error())
}

// projectNow returns what the engine has of the project.
func (s *stepRun) projectNow(ctx context.Context) (change.Project, error) {
	var project compose.Project
	err := s.untilEngineAnswers(ctx, func() (err error) {
		project, err = s.config.Engine.Project(ctx, s.record.Image.Project)
		return err
	})
	return change.ProjectOf(project), err
}

// othersChanged is the failure of a restart that has changed other services. It
// records them, so that a rollback puts them right, and nothing that somebody else
// has changed.
func (s *stepRun) othersChanged(ctx context.Context, changes, touched, appeared []string) *Failure {
	image := s.record.Image
	image.AddOthers(touched, appeared)
	image.Compared = true
	if failure := s.saveRecord(ctx); failure != nil {
		return failure
	}
	return commandError(fmt.Sprintf("Restart of %s changed other services of project %s too: %s", image.Describe(), image.Project, strings.Join(changes, ", ")))
}

// proveReplacement returns a failure unless the target's containers are new ones, of
// the images that their names stand for now.
func (s *stepRun) proveReplacement(ctx context.Context, log *artifacts.Log, command []string, now change.Project) *Failure {
	image := s.record.Image
	line, isCompose := compose.ParseTarget(command)
	if !isCompose || !slices.Contains([]string{"up", "create", "restart", "start", "scale"}, line.Subcommand) || line.DryRun {
		return nil
	}
	for _, c := range now.Containers {
		if owner := image.CutOff(c, now); owner != "" && image.IsTarget(c.Service) {
			return commandError(fmt.Sprintf("After the restart, container %s uses the network or processes of container %s, which was removed: name both services in the plan's restart", c.Name, owner))
		}
	}
	wanted := map[string]string{}
	for _, container := range now.Containers {
		if !image.IsTarget(container.Service) || !change.CanBeNamed(container.Image) || wanted[container.Image] != "" {
			continue
		}
		var found compose.Image
		err := s.untilEngineAnswers(ctx, func() (err error) {
			found, err = s.config.Engine.InspectImage(ctx, container.Image)
			return err
		})
		if err != nil && !errors.Is(err, compose.ErrNotFound) {
			return notProven(err)
		}
		wanted[container.Image] = found.ID
	}
	done := image.Replaced(now, wanted)
	switch {
	case len(done.Missing) > 0:
		return commandError(fmt.Sprintf("After the restart, project %s has no container of service %s", image.Project, strings.Join(done.Missing, ", ")))
	case len(done.Stale) > 0:
		c := done.Stale[0]
		return commandError(fmt.Sprintf("After the restart, container %s still runs image %s; %s is %s now. "+
			"The command of the plan does not replace the container: `docker compose up` without --no-recreate does", c.Name, shortImage(c.ImageID), c.Image, shortImage(wanted[c.Image])))
	case done.New > 0 || len(done.Same) == 0:
		return nil
	}
	c := done.Same[0]
	if line.Subcommand == "restart" || line.Subcommand == "start" {
		if before, _ := image.Before.ByID(c.ID); !c.StartedAt.Equal(before.StartedAt) {
			return nil
		}
	}
	if !s.mustReplace() {
		log.Line(fmt.Sprintf("[Nothing to replace: container %s runs image %s in its present configuration already]", c.Name, shortImage(c.ImageID)))
		return nil
	}
	return commandError(fmt.Sprintf("The restart has replaced nothing: container %s is the one from before the run, with image %s. "+
		"What the run has changed is neither in the image nor in the service's configuration. If the service reads it only when it starts, add --force-recreate to the plan's restart command",
		c.Name, shortImage(c.ImageID)))
}

// mustReplace says that the run deploys something that the containers of before
// cannot have: its own commands have altered files, or an earlier attempt of the run
// was rolled back. Edits that were there before the run may have been deployed
// before it too.
func (s *stepRun) mustReplace() bool {
	files := s.record.Files
	return s.record.Image.Again || files != nil && files.Altered && !files.Edits
}

// shortImage is an image id as docker shows it.
func shortImage(id string) string {
	algorithm, digest, found := strings.Cut(id, ":")
	if !found {
		return id
	}
	return algorithm + ":" + digest[:min(12, len(digest))]
}
