package changetest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// A State is all that a run could change, as short texts by name: "file
// api_service/Dockerfile", "git . ref refs/heads/main", "container web image".
type State map[string]string

// A Subject is what a State is taken of.
type Subject struct {
	// Workspace is the top of a work tree.
	Workspace string
	// LeaveOut are paths relative to Workspace that belong to the worker: the
	// artifact root.
	LeaveOut []string
	// Engine has the project's containers; nil for a work tree alone.
	Engine *Engine
	// Project is the compose project.
	Project string
	// Repositories are the images' names without tags, e.g. "shop-web".
	Repositories []string
}

// Take takes the state of files, git, and the compose project.
func Take(ctx context.Context, subject Subject) (State, error) {
	state := State{}
	repositories, err := takeFiles(subject, state)
	if err != nil {
		return nil, fmt.Errorf("taking the state of the files: %w", err)
	}
	for _, repository := range repositories {
		if err := takeGit(ctx, subject.Workspace, repository, state); err != nil {
			return nil, fmt.Errorf("taking the state of git: %w", err)
		}
	}
	if subject.Engine == nil {
		return state, nil
	}
	if err := subject.Engine.take(ctx, subject, state); err != nil {
		return nil, fmt.Errorf("taking the state of project %s: %w", subject.Project, err)
	}
	return state, nil
}

// Differences compares two states and returns a line for each name whose text
// differs, in the order of the names. It leaves out names for which ignore returns
// true; nil ignores none.
func Differences(before, after State, ignore func(name string) bool) []string {
	names := slices.Collect(maps.Keys(before))
	for name := range after {
		if _, is := before[name]; !is {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	var lines []string
	for _, name := range names {
		if ignore != nil && ignore(name) {
			continue
		}
		was, existed := before[name]
		is, exists := after[name]
		switch {
		case !existed:
			lines = append(lines, fmt.Sprintf("%s: new: %s", name, is))
		case !exists:
			lines = append(lines, fmt.Sprintf("%s: is gone, was %s", name, was))
		case was != is:
			lines = append(lines, fmt.Sprintf("%s: was %s, is %s", name, was, is))
		}
	}
	return lines
}

// takeFiles records every file, folder, link and special file of the work tree, the
// files of .git included. It returns the folders of repositories, relative to the
// workspace.
func takeFiles(subject Subject, state State) (repositories []string, err error) {
	type inode struct{ device, number uint64 }
	linked := map[inode][]string{}
	err = filepath.WalkDir(subject.Workspace, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(subject.Workspace, path)
		if err != nil {
			return err
		}
		if slices.Contains(subject.LeaveOut, name) || ofOurs(name) {
			if entry.IsDir() {
				return filepath.SkipDir
			}
			return nil
		}
		if filepath.Base(name) == ".git" {
			repositories = append(repositories, filepath.Dir(name))
		}
		info, err := os.Lstat(path)
		if err != nil {
			return err
		}
		owner := info.Sys().(*syscall.Stat_t)
		text := fmt.Sprintf("%s %d:%d", info.Mode(), owner.Uid, owner.Gid)
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			text += " -> " + target
		case info.Mode().IsRegular():
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			sum := sha256.Sum256(content)
			text += fmt.Sprintf(" %d bytes %s", len(content), hex.EncodeToString(sum[:6]))
			if owner.Nlink > 1 {
				key := inode{owner.Dev, owner.Ino}
				linked[key] = append(linked[key], name)
			}
		}
		state["file "+name] = text
		return nil
	})
	for _, names := range linked {
		for _, name := range names {
			state["file "+name] += " = " + strings.Join(names, " = ")
		}
	}
	return repositories, err
}

// gitOwn are the parts of a .git folder that are not compared as files: objects
// that nothing refers to are no change, and takeGit compares refs and index by what
// they mean.
var gitOwn = []string{"objects", "refs", "packed-refs", "index", "logs/refs/mm-orchestrator"}

// ofOurs says that a path is such a part.
func ofOurs(name string) bool {
	inside, found := "", false
	parts := strings.Split(filepath.ToSlash(name), "/")
	for i, part := range parts {
		switch {
		case part == ".git":
			inside, found = strings.Join(parts[i+1:], "/"), true
		case found && i > 1 && parts[i-1] == "modules":
			// The repository of a submodule.
			inside = strings.Join(parts[i+1:], "/")
		}
	}
	return found && (slices.Contains(gitOwn, inside) || strings.HasPrefix(inside, "sharedindex."))
}

// Git runs git in a folder with none of the user's settings, and without a write to
// the index.
func Git(ctx context.Context, folder string, args ...string) (string, error) {
	command := exec.CommandContext(ctx, "git", append([]string{"-c", "safe.directory=*", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null"}, args...)...)
	command.Dir = folder
	command.Env = append(os.Environ(), gitEnvironment...)
	var stdout, stderr bytes.Buffer
	command.Stdout, command.Stderr = &stdout, &stderr
	if err := command.Run(); err != nil {
		return stdout.String(), fmt.Errorf("git %s in %s: %w: %s", strings.Join(args, " "), folder, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.String(), nil
}

var gitEnvironment = []string{
	"GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1", "GIT_OPTIONAL_LOCKS=0", "LC_ALL=C",
	"GIT_AUTHOR_NAME=operator", "GIT_AUTHOR_EMAIL=operator@localhost", "GIT_AUTHOR_DATE=2026-01-01T00:00:00Z",
	"GIT_COMMITTER_NAME=operator", "GIT_COMMITTER_EMAIL=operator@localhost", "GIT_COMMITTER_DATE=2026-01-01T00:00:00Z",
}

// takeGit records what git knows of one repository: refs, index entries with stages
// and flags, and what its status says.
func takeGit(ctx context.Context, workspace, repository string, state State) error {
	folder := filepath.Join(workspace, repository)
	git := func(args ...string) (string, error) { return Git(ctx, folder, args...) }
	add := func(what, text string) { state["git "+repository+" "+what] = text }

	refs, err := git("for-each-ref", "--format=%(refname) %(objectname) %(objecttype)")
	if err != nil {
		return err
	}
	for line := range strings.Lines(refs) {
		name, text, _ := strings.Cut(strings.TrimSpace(line), " ")
		if !strings.HasPrefix(name, "refs/mm-orchestrator/") {
			add("ref "+name, text)
		}
	}
	entries, err := git("ls-files", "-z", "--stage", "-v")
	if err != nil {
		return err
	}
	for entry := range strings.SplitSeq(entries, "\x00") {
		if about, path, ok := strings.Cut(entry, "\t"); ok {
			// "H 100644 <id> 0": flag, mode, content, stage.
			stage := about[len(about)-1:]
			add("index "+path+" stage "+stage, about[:len(about)-2])
		}
	}
	status, err := git("status", "--porcelain=v2", "-z", "--untracked-files=all", "--ignored=no", "--no-renames")
	if err != nil {
		return err
	}
	for i, entry := range strings.Split(status, "\x00") {
		if entry == "" || strings.HasPrefix(entry, "? ") {
			continue // files are compared anyway, and the worker's own may be there
		}
		fields := strings.Fields(entry)
		add("status "+fields[len(fields)-1], fmt.Sprintf("%.9s", entry))
		_ = i
	}
	// With an object missing, a ref or an index entry is only a name.
	if text, err := git("fsck", "--connectivity-only", "--no-dangling", "--no-progress"); err != nil || strings.TrimSpace(text) != "" {
		add("fsck", fmt.Sprintf("%s%v", text, err))
	}
	return nil
}
