package orchestrator

import (
	"context"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/change"
)

// applyDiff applies the diff of the plan to the workspace: all of it or nothing. It
// is refused before anything is altered if it does not fit, or if it would alter
// something outside of the allow-list. It comes before the step's commands.
func (s *stepRun) applyDiff(ctx context.Context, log *artifacts.Log, f *runFiles, diff string) *Failure {
	if f == nil {
		return commandError("Plan parameter diff cannot be applied: the workspace's state of before cannot be captured: " + s.record.Files.Missing)
	}
	if s.record.Files.Applied {
		return nil
	}
	refused := func(err error) *Failure {
		if failure := f.keepChange(ctx, f.before, nil, nil); failure != nil {
			return failure
		}
		return commandError("Plan parameter diff cannot be applied, and nothing was changed: " + err.Error())
	}
	if !strings.HasSuffix(diff, "\n") {
		diff += "\n" // trimmed by whoever wrote the plan
	}
	patch, err := f.repository.PlanPatch(ctx, f.before, diff)
	if err != nil {
		return refused(err)
	}
	list := patch.Judge(f.rules())
	if violations := change.Violations(list); len(violations) > 0 {
		violation := allowListViolation(cut(f.violationText(violations)))
		s.audit(refusedRecord(audit.Refused, "allow-list", violation))
		if failure := f.keepChange(ctx, f.before, nil, nil); failure != nil {
			return failure
		}
		return violation
	}
	now, failure := f.look(ctx)
	if failure != nil {
		return failure
	}
	var names []string
	for _, d := range list {
		if !isFolder(d) {
			names = append(names, f.shownPath(d))
		}
	}
	if failure := s.auditBefore(ctx, audit.Record{Kind: audit.FilesChanging, Text: "apply the plan's diff to " + cut(strings.Join(names, ", "))}); failure != nil {
		return failure
	}
	if err := f.repository.Apply(ctx, patch, now); err != nil {
		return commandError("Plan parameter diff cannot be applied: " + err.Error())
	}
	log.Line("[Applied the plan's diff to " + cut(strings.Join(s.shown(names), ", ")) + "]")
	s.record.Files.Applied = true
	return s.saveRecord(ctx)
}
