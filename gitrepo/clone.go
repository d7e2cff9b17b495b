package gitrepo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/internal/disklimit"
)

// ErrNoClone: the directory has no clone, or one that is not complete.
var ErrNoClone = errors.New("no clone")

// ErrNoBranch: the server has no branch of this name.
var ErrNoBranch = errors.New("no such branch")

// A Clone is a copy of one branch of a repository, in a directory of its own:
//
//	repository.git   the git directory, which only this package uses
//	tree             the files, with a .git of their own. Who works on them may do
//	                 anything there, git commands included
//	clone.json       what was cloned
type Clone struct {
	// Dir is the directory, Tree the one with the files. Tree is "" for a clone without
	// files.
	Dir, Tree string
	// URL is the address from which it comes, Branch the name of the branch.
	URL, Branch string
	// Commit is the branch's newest commit at the time of the clone.
	Commit string
	// asCheckedOut are files that count as unchanged as long as they are as here.
	asCheckedOut []checkedOut
	git          *Git
}

// record is the content of clone.json.
type record struct {
	URL    string `json:"url"`
	Branch string `json:"branch"`
	Commit string `json:"commit"`
	Files  bool   `json:"files"`
	// AsCheckedOut is that of Clone.
	AsCheckedOut []checkedOut `json:"as_checked_out,omitempty"`
}

const recordName = "clone.json"

// Clone clones a branch, with its files. An empty branch means the repository's default
// branch. dir must not exist; its parent is made.
//
//   - After an error, also after a kill, dir does not exist. What is left of an earlier
//     try is removed.
//   - The error wraps ErrNoBranch if the server has no such branch; it is a
//     *RemoteError if the server could not be reached or refused, and a *disklimit.Error
//     if the clone takes more than Config.MaxClone, or its files would.
func (g *Git) Clone(ctx context.Context, remote *Remote, branch, dir string) (*Clone, error) {
	return g.clone(ctx, remote, branch, dir, true)
}

// Fetch is Clone without files: enough for Apply, CommitTree and Push.
func (g *Git) Fetch(ctx context.Context, remote *Remote, branch, dir string) (*Clone, error) {
	return g.clone(ctx, remote, branch, dir, false)
}

func (g *Git) clone(ctx context.Context, remote *Remote, branch, dir string, files bool) (_ *Clone, err error) {
	if !filepath.IsAbs(dir) {
		return nil, fmt.Errorf("gitrepo: the directory %q of a clone is not absolute", dir)
	}
	dir = filepath.Clean(dir)
	if branch != "" {
		if err := CheckBranch(branch); err != nil {
			return nil, err
		}
	}
	if _, err := os.Lstat(dir); err == nil {
		return nil, fmt.Errorf("clone into %s: it exists", dir)
	}
	part := dir + ".part"
	if err := RemoveAll(part); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(part, 0o700); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, RemoveAll(part))
		}
	}()
	ctx, stop := disklimit.Watch(ctx, part, g.config.MaxClone)
	defer stop()
	repository := filepath.Join(part, "repository.git")
	if err := g.run(ctx, command{args: []string{"init", "--quiet", "--bare", "--template=", "--initial-branch=main", repository}}); err != nil {
		return nil, err
	}
	if branch, err = g.findBranch(ctx, repository, remote, branch); err != nil {
		return nil, err
	}
	ref := "refs/heads/" + branch
	if err := g.fetch(ctx, repository, remote, "+"+ref+":"+ref, g.config.Depth); err != nil {
		return nil, err
	}
	commit, err := g.output(ctx, command{dir: repository, args: []string{"rev-parse", "--verify", "--quiet", "--end-of-options", ref + "^{commit}"}})
	if err != nil {
		return nil, err
	}
	if err := g.checkFiles(ctx, repository, commit, part); err != nil {
		return nil, err
	}
	var asCheckedOut []checkedOut
	if files {
		if err := g.checkOut(ctx, part, branch, commit); err != nil {
			return nil, err
		}
		if asCheckedOut, err = (&Clone{Dir: part, Tree: filepath.Join(part, "tree"), Commit: commit, git: g}).listCheckedOut(ctx); err != nil {
			return nil, err
		}
	}
	if err := disklimit.Check(part, g.config.MaxClone); err != nil {
		return nil, err
	}
	text, err := json.Marshal(record{URL: remote.URL, Branch: branch, Commit: commit, Files: files, AsCheckedOut: asCheckedOut})
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(part, recordName), text, 0o600); err != nil {
		return nil, err
	}
	if err := os.Rename(part, dir); err != nil {
		return nil, err
	}
	return g.Open(dir)
}

// Open returns the clone in a directory. The error is ErrNoClone if there is none.
func (g *Git) Open(dir string) (*Clone, error) {
	text, err := os.ReadFile(filepath.Join(dir, recordName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNoClone
	}
	if err != nil {
		return nil, err
	}
	var r record
	if err := json.Unmarshal(text, &r); err != nil {
		return nil, fmt.Errorf("%w: %s is not valid: %w", ErrNoClone, filepath.Join(dir, recordName), err)
	}
	c := &Clone{Dir: dir, URL: r.URL, Branch: r.Branch, Commit: r.Commit, asCheckedOut: r.AsCheckedOut, git: g}
	if r.Files {
		c.Tree = filepath.Join(dir, "tree")
	}
	return c, nil
}

// Remove removes the clone.
func (c *Clone) Remove() error { return RemoveAll(c.Dir) }

// RemoveAll removes a directory with all that is in it, also what nobody may write to.
func RemoveAll(dir string) error {
	err := os.RemoveAll(dir)
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	_ = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if entry != nil && entry.IsDir() {
			_ = os.Chmod(path, 0o700)
		}
		return nil
	})
	return os.RemoveAll(dir)
}

// repository is the git directory.
func (c *Clone) repository() string { return filepath.Join(c.Dir, "repository.git") }

// findBranch asks the server whether it has a branch, or which one is its default.
func (g *Git) findBranch(ctx context.Context, repository string, remote *Remote, branch string) (string, error) {
	args := []string{"ls-remote", "--quiet", "--symref", "--", remote.URL, "HEAD"}
	if branch != "" {
		args = append(args, "refs/heads/"+branch)
	}
	out, err := g.output(ctx, command{dir: repository, remote: remote, args: args})
	if err != nil {
		return "", remote.failed(err)
	}
	for line := range strings.SplitSeq(out, "\n") {
		value, name, _ := strings.Cut(line, "\t")
		head, isHead := strings.CutPrefix(value, "ref: refs/heads/")
		switch {
		case branch == "" && isHead && name == "HEAD":
			return head, CheckBranch(head)
		case branch != "" && name == "refs/heads/"+branch:
			return branch, nil
		}
	}
	if branch == "" {
		return "", fmt.Errorf("%w: %s has no default branch, as if it were empty: push a first commit to it, or name the base branch", ErrNoBranch, remote.URL)
	}
	return "", fmt.Errorf("%w: %s has no branch %s: correct the base branch", ErrNoBranch, remote.URL, branch)
}

// fetch gets a ref or a commit with its history down to a depth.
func (g *Git) fetch(ctx context.Context, repository string, remote *Remote, what string, depth int) error {
	args := []string{
		"fetch", "--quiet", "--no-tags", "--no-recurse-submodules", "--no-write-fetch-head", "--no-auto-maintenance",
		fmt.Sprintf("--depth=%d", depth), "--", remote.URL, what,
	}
	return remote.failed(g.run(ctx, command{dir: repository, remote: remote, args: args}))
}

// checkFiles returns a *disklimit.Error if the files of a commit would take more than a
// clone may, also if nobody wants them: trees that name the same tree many times make
// git read more names than fit into its memory, and are a few bytes for the server.
func (g *Git) checkFiles(ctx context.Context, repository, commit, dir string) error {
	limited, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	sizes := &sizes{left: g.config.MaxClone, over: func() { cancel(&disklimit.Error{Dir: dir, Limit: g.config.MaxClone}) }}
	err := g.run(limited, command{dir: repository, stdout: sizes, args: []string{"ls-tree", "-r", "--format=%(objectsize)", "--end-of-options", commit}})
	if sizes.left < 0 {
		// git may have ended by itself meanwhile.
		return &disklimit.Error{Dir: dir, Limit: g.config.MaxClone}
	}
	return err
}

// sizes adds up the lines that git prints, each the size of a file or a hyphen.
type sizes struct {
	left int64
	over func()
	line []byte
}

func (s *sizes) Write(p []byte) (int, error) {
	for _, c := range p {
		switch {
		case s.left < 0: // git is being ended
		case c != '\n':
			s.line = append(s.line, c)
		default:
			size, err := strconv.ParseInt(strings.TrimSpace(string(s.line)), 10, 64)
			if err != nil {
				size = 0 // a submodule
			}
			s.line = s.line[:0]
			// A name takes room too, also that of an empty file.
			if s.left -= max(size, 4096); s.left < 0 {
				s.over()
			}
		}
	}
	return len(p), nil
}

// Watch returns a context that ends when the clone takes more of the disk than
// Config.MaxClone, with a *disklimit.Error as its cause. It is for those who let somebody
// work on the files. stop must be called.
func (c *Clone) Watch(ctx context.Context) (_ context.Context, stop func()) {
	return disklimit.Watch(ctx, c.Dir, c.git.config.MaxClone)
}

// CheckSize returns a *disklimit.Error if the clone takes more than that now.
func (c *Clone) CheckSize() error { return disklimit.Check(c.Dir, c.git.config.MaxClone) }

// checkOut makes the files of a commit, and a repository for who works on them. That
// one reads the objects of repository.git and writes its own: the files of
// repository.git are not changed by a git command in the tree.
func (g *Git) checkOut(ctx context.Context, dir, branch, commit string) error {
	tree := filepath.Join(dir, "tree")
	own := filepath.Join(tree, ".git")
	if err := g.run(ctx, command{args: []string{"init", "--quiet", "--template=", "--initial-branch=" + branch, tree}}); err != nil {
		return err
	}
	// Relative to tree/.git/objects, so that the clone can be renamed.
	alternates := filepath.Join("..", "..", "..", "repository.git", "objects")
	if err := os.MkdirAll(filepath.Join(own, "objects", "info"), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(own, "objects", "info", "alternates"), []byte(alternates+"\n"), 0o600); err != nil {
		return err
	}
	shallow, err := os.ReadFile(filepath.Join(dir, "repository.git", "shallow"))
	if err == nil {
		err = os.WriteFile(filepath.Join(own, "shallow"), shallow, 0o600)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, args := range [][]string{
		{"update-ref", "refs/heads/" + branch, commit},
		{"read-tree", "--reset", "-u", commit},
	} {
		if err := g.run(ctx, command{dir: own, tree: tree, args: args}); err != nil {
			return err
		}
	}
	return nil
}
