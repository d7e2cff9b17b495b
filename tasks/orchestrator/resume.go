package orchestrator

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// resume prepares a retry. If it does not begin with patch, the workspace must have
// the change of the run, as patch has left it. A rollback since may have taken it
// back, and then resume makes it again.
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
	case store.StepPatch:
		// Violations of an earlier attempt are no matter of this one.
		if files := s.record.Files; files != nil && files.Violated && files.ViolationsUndone {
			files.Change, files.Violated, files.ViolationsUndone = "", false, false
		}
		s.record.Undone = false // captureBaseline records it
		return nil
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
	// Without patch, the command that has made the change runs again.
	if s.record.Files != nil && !s.record.Files.WithoutPatch {
		if failure := s.resumeFiles(ctx); failure != nil {
			return failure
		}
	}
	if s.record.Files == nil && s.record.Image == nil {
		return nil // nothing is known, and nothing is to be recorded
	}
	s.record.Submission, s.record.Undone = s.submission, false
	return s.saveRecord(ctx)
}

// resumeFiles makes the change in the workspace again.
func (s *stepRun) resumeFiles(ctx context.Context) *Failure {
	if s.record.Files.Change == "" {
		return nil
	}
	f, failure := s.openFiles(ctx)
	if failure != nil {
		return failure
	}
	list, failure := f.loadChange(ctx)
	if failure != nil {
		return failure
	}
	now, failure := f.look(ctx)
	if failure != nil {
		return failure
	}
	list = change.Permitted(list)
	if drift := f.shownPaths(change.Foreign(now, list)); len(drift) > 0 {
		names := cut(strings.Join(drift, ", "))
		if !s.config.AllowDrift {
			return commandError(fmt.Sprintf("Files that the run has changed were edited since: %s. Retry the run from patch; or restore them; or set %s to true to use them as they are",
				names, s.config.SettingName("MM_ORCHESTRATOR_ALLOW_DRIFT")))
		}
		s.notes = append(s.notes, fmt.Sprintf("[Edited since the run has changed them, and used as they are: %s]", names))
		s.log.Warn("retry uses files that somebody has edited since", "files", drift)
	}
	missing := change.Missing(now, list)
	if len(missing) == 0 {
		return nil
	}
	if failure := s.look(ctx, s.record.Files.Workspace, true); failure != nil {
		return failure
	}
	// From now on a rollback has something to take back.
	s.record.Files.Restored, s.record.Undone = false, false
	s.audit(audit.Record{Kind: audit.FilesChanging, Text: "make the change of the run again, which a rollback has taken back: " + cut(strings.Join(f.shownPaths(missing), ", "))})
	if failure := s.saveRecord(ctx); failure != nil {
		return failure
	}
	if _, err := f.repository.Reapply(ctx, now, missing); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return commandError(fmt.Sprintf("The change of the run, which a rollback has taken back, cannot be made again: %s", err))
	}
	if failure := f.auditChange(ctx, missing); failure != nil {
		return failure
	}
	names := f.shownPaths(missing)
	s.notes = append(s.notes, fmt.Sprintf("[The run was rolled back; its change is made again: %s]", cut(strings.Join(names, ", "))))
	s.log.Info("change of the run made again for a retry", "files", names)
	return nil
}

// shownPaths lists what differs as messages name it, each path once.
func (f *runFiles) shownPaths(list []change.Difference) []string {
	var paths []string
	for _, d := range list {
		if path := f.clean(f.shownPath(d)); !slices.Contains(paths, path) {
			paths = append(paths, path)
		}
	}
	return paths
}
