package preflight

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/change"
)

// workTree is where git has what belongs to a work tree. It is empty if the
// workspace has none.
type workTree struct {
	top string
	// own is its git directory, shared the one that it has in common with other
	// work trees of the repository.
	own, shared string
}

// LooksAtGit look at the repository: whether the workspace is a work tree, whether
// a lock file keeps git from working, whether somebody is in the middle of a merge.
// All begin with one question to git, whose answer they share, as starting a
// program is what takes time.
func (s Subject) LooksAtGit() []Look {
	tree := &workTree{} // the first look sets it, and the others need that look
	return []Look{s.lookAtGit(tree), s.lookAtGitLocks(tree), s.lookAtGitState(tree)}
}

// slowGit is the cure for a git that gives no answer.
const slowGit = "Look for a slow or hanging file system, or a machine with too much to do"

// lookAtGit looks whether the workspace is a work tree whose repository can be read
// and written.
func (s Subject) lookAtGit(found *workTree) Look {
	return Look{Name: lookGit, At: "git in " + s.Workspace, Needs: []string{lookWorkspace}, Late: Refuse, LateCure: slowGit,
		Do: func(ctx context.Context) []Result {
			tree, results := s.workTree(ctx)
			if results != nil {
				return results
			}
			*found = tree
			for _, dir := range []string{tree.own, filepath.Join(tree.shared, "objects"), filepath.Join(tree.shared, "refs")} {
				if err := syscall.Access(dir, 2|1); err != nil {
					return refuse("Run the worker as the repository's owner, mount it writable, or change its permissions: what was before a run is kept there", "%s is not writable for user %d%s", dir, os.Getuid(), because(err))
				}
			}
			if free, err := FreeSpace(tree.shared); err == nil && free < s.DiskReserve && !sameDevice(tree.shared, s.Workspace) {
				return refuse(moreSpace, "the file system of the repository, %s, has %s free, less than the %s required by %s", tree.shared, mebibytes(free), mebibytes(s.DiskReserve), s.SettingName("MM_ORCHESTRATOR_DISK_RESERVE"))
			}
			err := s.Answers.HeadTree(tree.own, tree.shared, func() error {
				_, err := s.git(ctx, "cat-file", "-e", "HEAD^{tree}")
				return err
			})
			if err != nil {
				if _, unborn := s.git(ctx, "rev-parse", "--quiet", "--verify", "HEAD"); unborn != nil && ctx.Err() == nil {
					return note("Make a first commit", "%s has no commit that uncommitted edits could be taken back to", tree.top)
				}
				return refuse("Repair the repository: git -C "+change.ShellQuote(tree.top)+" fsck", "the commit of HEAD cannot be read in %s: %s", tree.top, s.oneLine(err.Error()))
			}
			return ok("%s is a work tree of git", tree.top)
		}}
}

// workTree asks git for the workspace's work tree. The results are nil if it has
// one.
func (s Subject) workTree(ctx context.Context) (workTree, []Result) {
	ask := func() (string, error) {
		return s.git(ctx, "rev-parse", "--show-toplevel", "--absolute-git-dir", "--git-common-dir")
	}
	var text string
	var err error
	if program := s.Find("git"); program != "" {
		text, err = s.Answers.Place("look", s.Workspace, program, ask)
	} else {
		text, err = ask() // it says that there is none
	}
	switch {
	case errors.Is(err, errNotFound):
		return workTree{}, refuse("Install git: patch and rollback need it", "git is not installed, or not on the PATH")
	case err != nil && strings.Contains(err.Error(), "not a git repository"), err != nil && strings.Contains(err.Error(), "must be run in a work tree"):
		return workTree{}, refuse("Mount the repository there, or set "+s.SettingName("WORKSPACE_ROOT")+" to its directory", "%s is not a git work tree: %s", s.Workspace, s.oneLine(err.Error()))
	case err != nil:
		return workTree{}, refuse("Repair the repository until git -C "+change.ShellQuote(s.Workspace)+" status succeeds", "git cannot use the repository of %s: %s", s.Workspace, s.oneLine(err.Error()))
	}
	lines := strings.Split(text, "\n")
	if len(lines) == 3 {
		if !filepath.IsAbs(lines[2]) {
			lines[2] = filepath.Join(s.Workspace, lines[2])
		}
		tree := workTree{lines[0], lines[1], lines[2]}
		if info, err := os.Stat(tree.top); err == nil && info.IsDir() {
			return tree, nil
		}
	}
	// Somebody has put another program in git's place, and wants runs to use it.
	return workTree{}, note("If that is not intended, put git first on the PATH", "the program git does not answer as git does in %s: what was before a run is not recorded", s.Workspace)
}

// LookAtTrust looks whether git trusts the repository without our telling it to.
func (s Subject) LookAtTrust() Look {
	return Look{Name: lookTrust, At: "git in " + s.Workspace, Needs: []string{lookGit}, After: []string{lookGitLock},
		Do: func(ctx context.Context) []Result {
			_, err := s.run(ctx, s.Workspace, s.Environ, []string{"git", "rev-parse", "--git-dir"})
			if err == nil || !strings.Contains(err.Error(), "safe.directory") {
				return ok("git trusts %s", s.Workspace)
			}
			top := s.Workspace
			if tree, results := s.workTree(ctx); results == nil {
				top = tree.top
			}
			return note("Run: git config --global --add safe.directory "+change.ShellQuote(top)+", or run the worker as its owner",
				"%s belongs to user %d, this process runs as user %d; the worker tells git to trust it, but other programs that call git will fail", top, ownerOf(top), os.Getuid())
		}}
}

// ownerOf is the user id of a path's owner, -1 if it is unknown.
func ownerOf(path string) int {
	var stat syscall.Stat_t
	if err := syscall.Stat(path, &stat); err != nil {
		return -1
	}
	return int(stat.Uid)
}

// lookAtGitLocks looks for lock files that make git commands fail. The other looks
// that run git come after it: it would take their git for the one that has the lock.
func (s Subject) lookAtGitLocks(tree *workTree) Look {
	return Look{Name: lookGitLock, At: "git in " + s.Workspace, Needs: []string{lookGit}, Late: Refuse, LateCure: slowGit,
		Do: func(ctx context.Context) []Result {
			until := time.Now().Add(s.LockPatience)
			for {
				results, busy := s.gitLocks(ctx, *tree)
				if !busy || time.Now().After(until) {
					return results
				}
				// A git that works now, such as an editor's, often ends within
				// milliseconds.
				timer := time.NewTimer(50 * time.Millisecond)
				select {
				case <-timer.C:
				case <-ctx.Done():
					timer.Stop()
					return results
				}
			}
		}}
}

// gitLocks returns the results of one search. busy says that a git uses a lock.
func (s Subject) gitLocks(ctx context.Context, tree workTree) (results []Result, busy bool) {
	if tree.top == "" {
		return ok("no repository"), false
	}
	known := map[string]string{"--show-toplevel": tree.top, "--absolute-git-dir": tree.own, "--git-common-dir": tree.shared}
	locks, err := change.ListGitLocks(func(args ...string) (string, error) {
		if answer := known[args[len(args)-1]]; answer != "" {
			return answer, nil
		}
		return s.git(ctx, args...)
	}, s.Workspace)
	if err != nil {
		return refuse("Repair the repository", "cannot search git's directories for locks: %s", s.oneLine(err.Error())), false
	}
	for _, lock := range locks {
		if s.Removable != nil && s.Removable(lock) {
			continue
		}
		age := time.Since(lock.ModTime).Round(time.Second)
		pid, known := lock.User()
		switch {
		case pid != 0 && s.LockPatience == 0:
			results = append(results, ok("%s is %s old and in use by git (process %d)", lock.Path, age, pid)...)
		case pid != 0:
			busy = true
			results = append(results, refuse("Wait until that git has ended, or end it", "%s is %s old and in use by git (process %d)", lock.Path, age, pid)...)
		case !lock.Unchanged():
			continue // that git has ended meanwhile
		case known:
			results = append(results, refuse("If no git in another container or on another machine uses it, run: rm "+change.ShellQuote(lock.Path),
				"%s is %s old, and no git process on this machine uses it: patch and rollback fail until it is removed", lock.Path, age)...)
		default:
			results = append(results, refuse("If no git uses it, run: rm "+change.ShellQuote(lock.Path),
				"%s is %s old; this system does not show whether a git process uses it: patch and rollback fail until it is removed", lock.Path, age)...)
		}
	}
	if len(results) == 0 {
		return ok("no stale lock file of git"), false
	}
	return results, busy
}

// operations are what git can be in the middle of, by a file in the git directory
// of the work tree that exists as long. The first one that is there counts: a
// rebase also has the files of a cherry-pick.
var operations = []struct{ file, name, cure string }{
	{"rebase-apply/applying", "a git am", "git am --continue, or git am --abort"},
	{"rebase-apply", "a rebase", "git rebase --continue, or git rebase --abort"},
	{"rebase-merge", "a rebase", "git rebase --continue, or git rebase --abort"},
	{"MERGE_HEAD", "a merge", "git merge --continue, or git merge --abort"},
	{"CHERRY_PICK_HEAD", "a cherry-pick", "git cherry-pick --continue, or git cherry-pick --abort"},
	{"REVERT_HEAD", "a revert", "git revert --continue, or git revert --abort"},
	{"sequencer", "a cherry-pick or revert", "git cherry-pick --continue, or git cherry-pick --quit"},
	{"BISECT_LOG", "a bisect", "git bisect reset"},
}

// lookAtGitState looks whether somebody is in the middle of a merge or the like. A
// run would deploy files with conflict markers, and the person could not continue
// where they were: a rollback that takes files back to HEAD ends a merge.
func (s Subject) lookAtGitState(tree *workTree) Look {
	return Look{Name: lookGitState, At: "git in " + s.Workspace, Needs: []string{lookGit}, After: []string{lookGitLock}, Late: Refuse, LateCure: slowGit,
		Do: func(ctx context.Context) []Result {
			if tree.top == "" {
				return ok("no repository")
			}
			for _, operation := range operations {
				if _, err := os.Lstat(filepath.Join(tree.own, operation.file)); err == nil {
					return refuse("Finish it or give it up first, in "+tree.top+": "+operation.cure, "%s is in progress in %s: a run would mix its change with it", operation.name, tree.top)
				}
			}
			text, err := s.Answers.Index("unmerged", tree.own, func() (string, error) {
				return s.git(ctx, "ls-files", "--unmerged", "--full-name", "-z", ":/")
			})
			if err != nil {
				return refuse("If that file is damaged, run: rm "+change.ShellQuote(filepath.Join(tree.own, "index"))+" && git -C "+change.ShellQuote(tree.top)+" reset (files stay as they are, what was staged is lost)", "git cannot read the index of %s: %s", tree.top, s.oneLine(err.Error()))
			}
			var paths []string
			for entry := range strings.SplitSeq(text, "\x00") {
				// One entry for each side: mode, hash, stage, a tab, the path.
				if _, path, given := strings.Cut(entry, "\t"); given && !slices.Contains(paths, path) {
					paths = append(paths, path)
				}
			}
			if len(paths) > 0 {
				return refuse("Resolve them and run git add for each, or git checkout HEAD -- for those that you do not need", "%s has conflicts that are not resolved in %s", tree.top, some(paths))
			}
			return ok("no merge or rebase in progress")
		}}
}

// some names the first of a list.
func some(names []string) string {
	const most = 5
	if len(names) > most {
		return fmt.Sprintf("%s and %d more files", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}
