package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// resume prepares a retry that does not begin with patch: the workspace must have
// the change of the run, as patch has left it. A rollback since has taken it back,
// and then resume makes it again.
//
// It acts once for each chain of steps, in the first of them: what somebody edits
// while a chain runs is not the retry's business. It does not compare all of the
// workspace, only the files that the run has altered.
func (s *stepRun) resume(ctx context.Context) *Failure {
	if s.journal.claim.Attempt == 1 || s.record.Submission == s.submission {
		return nil
	}
	undone := s.record.Undone || s.record.Image != nil && s.record.Image.Restored
	switch s.step {
	case store.StepVerify:
		if undone {
			return commandError("The run was rolled back, so that the service is as before the run: there is nothing of the run to verify. Retry the run from build, or from patch")
		}
		return nil
	case store.StepRestart:
		if _, failure := s.plan.find(store.StepBuild); undone && failure == nil && s.record.Image != nil {
			return commandError("The run was rolled back, and with it the image that its build had made: a restart would start the image of before. Retry the run from build, or from patch")
		}
	case store.StepBuild:
	default:
		return nil
	}
	if s.record.Files != nil {
		if failure := s.resumeFiles(ctx, *s.record.Files); failure != nil {
			return failure
		}
	}
	if s.record.Files == nil && s.record.Image == nil {
		return nil // nothing is known, and nothing is to be recorded
	}
	s.record.Submission = s.submission
	return s.saveRecord(ctx)
}

// resumeFiles makes the change in the workspace again.
func (s *stepRun) resumeFiles(ctx context.Context, files change.Files) *Failure {
	if files.Change == "" {
		return nil
	}
	failed := func(err error) *Failure {
		if cause := context.Cause(ctx); cause != nil {
			return commandError("The step was ended before it could look for the change of the run: " + cause.Error())
		}
		return commandError(fmt.Sprintf("The workspace cannot be compared with what the run has changed before: %s. Retry the run from patch", err))
	}
	repository, err := change.Open(ctx, s.runner.git, files.Workspace, s.captureOptions())
	if err != nil {
		return failed(err)
	}
	list, err := repository.LoadChange(ctx, files.Change)
	if err != nil {
		return failed(err)
	}
	base, err := repository.Load(ctx, files.Baseline)
	if err != nil {
		return failed(err)
	}
	now, err := repository.Observe(ctx, base)
	if err != nil {
		return failed(err)
	}
	list = change.Permitted(list)
	if drift := change.Foreign(now, list); len(drift) > 0 {
		if names := pathsOf(drift); !s.config.AllowDrift {
			return commandError(fmt.Sprintf("Files that the run has changed were edited since: %s. Retry the run from patch; or restore them; or set %s to true to use them as they are",
				strings.Join(names, ", "), s.config.SettingName("MM_ORCHESTRATOR_ALLOW_DRIFT")))
		}
		s.notes = append(s.notes, fmt.Sprintf("[Edited since the run has changed them, and used as they are: %s]", strings.Join(pathsOf(drift), ", ")))
		s.log.Warn("retry uses files that somebody has edited since", "files", pathsOf(drift))
	}
	missing := change.Missing(now, list)
	if len(missing) == 0 {
		return nil
	}
	// From now on a rollback has something to take back.
	s.record.Undone = false
	if failure := s.saveRecord(ctx); failure != nil {
		return failure
	}
	done, err := repository.Reapply(ctx, now, missing)
	if err != nil {
		return commandError(fmt.Sprintf("The change of the run, which a rollback has taken back, cannot be made again: %s", errors.Join(err, context.Cause(ctx))))
	}
	s.notes = append(s.notes, fmt.Sprintf("[The run was rolled back; its change is made again: %s]", strings.Join(pathsOf(missing), ", ")))
	s.log.Info("change of the run made again for a retry", "files", done)
	return nil
}

// pathsOf lists the files that differ, each once.
func pathsOf(list []change.Difference) []string {
	var paths []string
	seen := map[string]bool{}
	for _, d := range list {
		if !seen[d.Path] {
			seen[d.Path] = true
			paths = append(paths, d.Path)
		}
	}
	return paths
}

// captureOptions say which part of the repository belongs to the state of the
// workspace.
func (s *stepRun) captureOptions() change.Options {
	return change.Options{MaxFile: s.config.BaselineFileLimit, MaxFiles: s.config.BaselineLimit}
}
