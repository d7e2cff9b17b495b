package orchestrator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator/preflight"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// clockTolerance is how far the clocks of the engine, of workers and of the database
// may differ when times of them are compared.
const clockTolerance = 5 * time.Second

// RollbackMessage is the [store.RollbackMessage] of a requested rollback.
func (o *Orchestrator) RollbackMessage(run store.Run, rootTaskID, parentTaskID string) (string, protocol.Delivery, error) {
	return o.rollbackMessage(run, rootTaskID, parentTaskID)
}

// RollbackObstacles says what in the workspace and in the engine stands in the way of
// rolling back a run that has ended, each in a sentence without a full stop. changes
// are all that the store knows of the queue; that of the run is one of them.
//
//   - Edits that somebody has made since are none: the rollback sets them aside.
//   - A container of the run's target that was created after the run, but not by the
//     rollback of a later run, is one: somebody has deployed something since.
//   - It only looks. An error says that it could not, and why.
func (o *Orchestrator) RollbackObstacles(ctx context.Context, run store.Run, changes []store.Change) ([]string, error) {
	i := slices.IndexFunc(changes, func(c store.Change) bool { return c.RunID == run.ID })
	if i < 0 || changes[i].Record == nil || run.CompletedAt == nil {
		return nil, nil // the store says it
	}
	record, err := change.Decode(changes[i].Record)
	if err != nil {
		return nil, err
	}
	switch {
	case record.Undone:
		return []string{"a rollback has taken back what it has changed"}, nil
	case o.config.RollbackCommands:
		return []string{fmt.Sprintf("%s is set to commands: the plan's own commands would bring the files to HEAD, and not to what they were before the run", o.config.SettingName("MM_ORCHESTRATOR_ROLLBACK"))}, nil
	}
	obstacles, err := o.filesObstacles(ctx, run.ID, record.Files)
	if err != nil {
		return nil, err
	}
	more, err := o.imageObstacles(ctx, *run.CompletedAt, record.Image, changes)
	return append(obstacles, more...), err
}

// filesObstacles looks whether the repository still has what the record names.
func (o *Orchestrator) filesObstacles(ctx context.Context, runID string, files *change.Files) ([]string, error) {
	switch {
	case files == nil:
		return nil, nil
	case files.Missing != "":
		return []string{"the workspace could not be captured before it: " + files.Missing}, nil
	}
	if _, err := os.Stat(files.Top); err != nil {
		return nil, fmt.Errorf("workspace %s cannot be used: %s. Run this where the worker runs", files.Top, preflight.Reason(err))
	}
	refs, err := change.ListRefs(ctx, o.runner.of(processes.Owner{}).git, files.Top, runID)
	if err != nil && !errors.Is(err, change.ErrNotInRepository) {
		return nil, err
	}
	have := map[string]bool{}
	for _, ref := range refs {
		have[ref.Name] = true
	}
	wanted := []string{change.Ref(runID, baselineRef), change.Ref(runID, baselineRef+"-state")}
	if files.Change != "" {
		wanted = append(wanted, change.Ref(runID, changeRef))
	}
	var obstacles []string
	for _, ref := range wanted {
		if !have[ref] {
			obstacles = append(obstacles, fmt.Sprintf("%s in the repository %s is gone", ref, files.Top))
		}
	}
	return obstacles, nil
}

// imageObstacles looks whether the run's containers and image names are still its own,
// and whether the engine has the images of before.
func (o *Orchestrator) imageObstacles(ctx context.Context, completed time.Time, image *change.Image, changes []store.Change) ([]string, error) {
	if image == nil || !image.Ready && image.EngineSeen {
		return nil, nil
	}
	if !image.EngineSeen {
		return []string{"the docker engine could not be read when it began to change images"}, nil
	}
	project, err := o.config.Engine.Project(ctx, image.Project)
	if err != nil {
		return nil, err
	}
	var obstacles []string
	add := func(format string, args ...any) {
		if text := fmt.Sprintf(format, args...); !slices.Contains(obstacles, text) {
			obstacles = append(obstacles, text)
		}
	}
	for _, c := range project.Containers {
		if !image.IsTarget(c.Service) {
			continue
		}
		if c.Created.After(completed.Add(clockTolerance)) && !madeByRollback(c, changes) {
			add("container %s of service %s was created at %s, after the run: something else has deployed it", c.Name, c.Service, c.Created.UTC().Format(time.RFC3339))
			continue
		}
		if _, known := image.NameBefore(c.Image); !known || !change.CanBeNamed(c.Image) {
			continue
		}
		found, err := o.config.Engine.InspectImage(ctx, c.Image)
		if err != nil && !errors.Is(err, compose.ErrNotFound) {
			return nil, err
		}
		if err == nil && found.ID != c.ImageID {
			add("image name %s was given to another image since: a rollback would take that from it", c.Image)
		}
	}
	for _, before := range image.Before.Containers {
		if !image.IsTarget(before.Service) || before.ImageID == "" {
			continue
		}
		_, err := o.config.Engine.InspectImage(ctx, before.ImageID)
		if err == nil {
			continue
		}
		if !errors.Is(err, compose.ErrNotFound) {
			return nil, err
		}
		saved := slices.ContainsFunc(image.Pins, func(pin change.Pin) bool {
			if pin.ImageID != before.ImageID || pin.Archive == "" {
				return false
			}
			_, err := os.Stat(pin.Archive)
			return err == nil
		})
		if !saved {
			add("image %s of before the run (%s) is gone from the engine, and is not saved in a file", before.ImageID, cmp.Or(before.Image, before.Service))
		}
	}
	return obstacles, nil
}

// madeByRollback says that a container was created while a later run went on that was
// rolled back: it is as that run has found it.
func madeByRollback(c compose.Container, changes []store.Change) bool {
	return slices.ContainsFunc(changes, func(other store.Change) bool {
		if other.RunStatus != store.RunRolledBack || c.Created.Before(other.CreatedAt.Add(-clockTolerance)) || c.Created.After(other.LastAt.Add(clockTolerance)) {
			return false
		}
		record, err := change.Decode(other.Record)
		return err == nil && record.Undone && record.Image != nil && record.Image.IsTarget(c.Service)
	})
}
