package change

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// gitLockNames are the lock files that make the git commands of runs fail.
var gitLockNames = []string{"index.lock", "HEAD.lock", "config.lock", "packed-refs.lock"}

// A GitLock is a lock file in a git directory. A git that is killed leaves it
// behind, and then other git commands fail.
type GitLock struct {
	Path string
	// ModTime is when git wrote to the file last.
	ModTime time.Time
	// workTree is the top of the repository's work tree.
	workTree string
	info     fs.FileInfo
}

// ListGitLocks searches the git directory of the workspace's repository, the one
// that it shares with other work trees, and those of its submodules. git runs a
// git command in the workspace, as [GitEnviron] says, and returns its trimmed
// output.
func ListGitLocks(git func(args ...string) (string, error), workspace string) ([]GitLock, error) {
	workTree, err := git("rev-parse", "--show-toplevel")
	if err != nil {
		return nil, err
	}
	own, err := git("rev-parse", "--absolute-git-dir")
	if err != nil {
		return nil, err
	}
	shared, err := git("rev-parse", "--git-common-dir")
	if err != nil {
		return nil, err
	}
	if !filepath.IsAbs(shared) {
		shared = filepath.Join(workspace, shared)
	}
	found := map[string]GitLock{}
	in := func(dir string) {
		for _, name := range gitLockNames {
			path := filepath.Join(dir, name)
			if info, err := os.Lstat(path); err == nil {
				found[path] = GitLock{Path: path, ModTime: info.ModTime(), workTree: workTree, info: info}
			}
		}
	}
	in(own)
	in(filepath.Clean(shared))
	_ = filepath.WalkDir(filepath.Join(own, "modules"), func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil || !entry.IsDir():
			return nil // skip unreadable directories
		case slices.Contains([]string{"objects", "refs", "logs", "hooks", "lfs"}, entry.Name()):
			return fs.SkipDir
		}
		in(path)
		return nil
	})
	// Submodules made by old versions of git keep their git directory in the
	// work tree.
	modules, paths := filepath.Join(workTree, ".gitmodules"), ""
	if _, err := os.Lstat(modules); err == nil {
		paths, _ = git("config", "--null", "--file", modules, "--get-regexp", `^submodule\..*\.path$`)
	}
	for entry := range strings.SplitSeq(paths, "\x00") {
		if _, path, given := strings.Cut(entry, "\n"); given && filepath.IsLocal(path) {
			in(filepath.Join(workTree, path, ".git"))
		}
	}
	list := make([]GitLock, 0, len(found))
	for _, lock := range found {
		list = append(list, lock)
	}
	slices.SortFunc(list, func(a, b GitLock) int { return strings.Compare(a.Path, b.Path) })
	return list, nil
}

// User returns the process id of a git that has the lock open, or that works in
// the work tree or in the lock's directory; 0 if there is none. known is false if
// the system does not show that: it lists no processes, or a git of another user
// runs. It never shows processes of other containers and machines.
func (l GitLock) User() (pid int, known bool) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, false
	}
	hidden := false
	dir := filepath.Dir(l.Path)
	for _, entry := range entries {
		n, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		known = true
		proc := filepath.Join("/proc", entry.Name())
		name, err := os.ReadFile(filepath.Join(proc, "comm"))
		if err != nil || !strings.HasPrefix(string(name), "git") {
			continue
		}
		at, err := os.Readlink(filepath.Join(proc, "cwd"))
		if err == nil && (Below(l.workTree, at) || Below(dir, at)) {
			return n, true
		}
		hidden = hidden || errors.Is(err, fs.ErrPermission)
		open, _ := os.ReadDir(filepath.Join(proc, "fd"))
		for _, fd := range open {
			if at, err := os.Readlink(filepath.Join(proc, "fd", fd.Name())); err == nil && at == l.Path {
				return n, true
			}
		}
	}
	return 0, known && !hidden
}

// Unchanged says that the file is still the one that was found: no other git has
// replaced it or written to it.
func (l GitLock) Unchanged() bool {
	now, err := os.Lstat(l.Path)
	return err == nil && os.SameFile(now, l.info) && now.ModTime().Equal(l.ModTime)
}

// Below says whether path is dir or lies in it.
func Below(dir, path string) bool {
	relative, err := filepath.Rel(dir, path)
	return err == nil && filepath.IsLocal(relative)
}
