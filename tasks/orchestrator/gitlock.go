package orchestrator

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/internal/excerpt"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator/preflight"
)

// removeStaleLocks removes the lock files that a killed git of this run has left
// in the repository, before the next command of a step in which that is possible:
// one that was started before, or a rollback. By then the programs of other
// workers for this run have been killed. A lock is removed if it is from the time
// of the run and no git uses it. Any other lock may be that of somebody else: it
// stays, and the step's log says what can be done.
//
// A git in another container that began during the run cannot be seen. Its lock
// is removed, which is better than a rollback that fails.
func (s *stepRun) removeStaleLocks(ctx context.Context, log *artifacts.Log, workspace string) {
	if !s.afterKill {
		return
	}
	git := func(args ...string) (string, error) {
		var out, errs excerpt.Head
		out.Limit, errs.Limit = listLimit, messageLimit
		command := append([]string{"git"}, args...)
		code, failure := s.runner.runOwnGit(ctx, workspace, command, &out, &errs)
		switch {
		case failure != nil:
			return "", failure
		case code != 0:
			return "", exitFailure(command, code, string(errs.Kept))
		}
		return strings.TrimSpace(string(out.Kept)), nil
	}
	locks, err := change.ListGitLocks(git, workspace)
	if err != nil {
		return // no repository: the command says what it misses
	}
	for _, lock := range locks {
		pid, known := lock.User()
		switch {
		case pid != 0:
			log.Line(fmt.Sprintf("[%s is in use by git (process %d). If the next command fails because of it, retry the run when that git has ended.]", lock.Path, pid))
		case !known:
			log.Line(fmt.Sprintf("[%s exists, and this system does not show whether a git uses it. If none does, run: rm %s]", lock.Path, change.ShellQuote(lock.Path)))
		case lock.ModTime.Before(s.runStartedAt):
			log.Line(fmt.Sprintf("[%s is older than this run, and may be that of a git in another container or on another machine. If no git uses it, run: rm %s]", lock.Path, change.ShellQuote(lock.Path)))
		default:
			if !lock.Unchanged() {
				continue // another git has it now
			}
			if s.auditBefore(ctx, audit.Record{Kind: audit.FilesChanging, Text: "remove a lock file that a killed git has left: " + lock.Path}) != nil {
				return // the step ends
			}
			if err := os.Remove(lock.Path); err != nil {
				log.Line(fmt.Sprintf("[%s was left by a git that was killed, and cannot be removed: %s. Run: rm %s]", lock.Path, preflight.Reason(err), change.ShellQuote(lock.Path)))
				continue
			}
			s.audit(audit.Record{Kind: audit.FileRestored, Text: "removed a lock file that a killed git has left: " + lock.Path})
			s.log.Warn("removed a lock file that a killed git has left", "path", lock.Path)
			log.Line(fmt.Sprintf("[Removed %s, which a git that was killed has left: no git uses it.]", lock.Path))
		}
	}
}
