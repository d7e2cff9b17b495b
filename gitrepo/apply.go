package gitrepo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/internal/excerpt"
)

// Applied is what a patch makes of the clone's commit.
type Applied struct {
	// Tree is the id of the tree.
	Tree string
	// Files are those in which it differs from the commit, nil for none: the commit has
	// the change already.
	Files []string
	// Base is the commit from which the patch was made, "" if the patch does not say it.
	Base string
	// Log is what git has printed.
	Log string
}

// A ConflictError says that a patch does not fit the commit.
type ConflictError struct {
	// Commit is that of the clone, and Base that from which the patch was made, "" if
	// it is not known.
	Commit, Base string
	// Files are those that both sides have changed, or that the patch needs otherwise.
	Files []Conflict
	// Output is what git has printed.
	Output string
}

// A Conflict is a file that a patch does not fit.
type Conflict struct {
	Name string
	// Merged is the file with conflict markers, nil if there is none: one side has
	// removed the file, or it is not text.
	Merged []byte
}

func (e *ConflictError) Error() string {
	names := make([]string, len(e.Files))
	for i, file := range e.Files {
		names[i] = file.Name
	}
	if len(names) > 10 {
		names = append(names[:10], fmt.Sprintf("and %d more", len(e.Files)-10))
	}
	return fmt.Sprintf("the patch does not fit commit %.12s of the base branch: %s", e.Commit, strings.Join(names, ", "))
}

var commitID = regexp.MustCompile(`^[0-9a-f]{40}([0-9a-f]{24})?$`)

// baseOf is the commit that a patch names, "" for none.
func baseOf(patch []byte) string {
	preamble, _, _ := bytes.Cut(patch, []byte("\ndiff --git "))
	for line := range bytes.Lines(preamble) {
		if id, found := strings.CutPrefix(strings.TrimSpace(string(line)), baseLine); found && commitID.MatchString(id) {
			return id
		}
	}
	return ""
}

// Apply applies a patch to the clone's commit, three-way: what was changed on both sides
// is merged. It writes objects of git only. remote is asked for the commit from which
// the patch was made if the clone does not have it.
//
//   - The error is a *ConflictError if the patch does not fit.
//   - It wraps ErrUnusable if the patch fits nothing: it is no patch, or has names
//     outside of the tree or in .git, submodules, or links that lead out.
//   - It is a *disklimit.Error if the clone takes more than Config.MaxClone then.
func (c *Clone) Apply(ctx context.Context, remote *Remote, patch []byte) (Applied, error) {
	ctx, stop := c.Watch(ctx)
	defer stop()
	names, err := c.namesOf(ctx, patch)
	if err != nil {
		return Applied{}, err
	}
	applied := Applied{Base: baseOf(patch)}
	if applied.Base != "" {
		if err := c.need(ctx, remote, applied.Base); err != nil {
			return Applied{}, err
		}
	}
	var log bytes.Buffer
	tree, index, err := c.applyTo(ctx, c.Commit, patch, &log)
	applied.Log = log.String()
	var failed *Error
	if errors.As(err, &failed) {
		return applied, c.conflict(ctx, applied.Base, patch, names, index, failed)
	}
	if err != nil {
		return applied, err
	}
	applied.Tree = tree
	applied.Files, err = c.judge(ctx, c.Commit, tree)
	return applied, err
}

// namesOf returns the names of the files that a patch changes, and an error if one of
// them is not in the tree.
func (c *Clone) namesOf(ctx context.Context, patch []byte) ([]string, error) {
	out, err := c.git.output(ctx, command{dir: c.repository(), stdin: bytes.NewReader(patch), args: []string{"apply", "--numstat", "-z", "-"}})
	var failed *Error
	if errors.As(err, &failed) {
		return nil, fmt.Errorf("%w: it is no patch that git understands: %s", ErrUnusable, failed.Output)
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for field := range strings.SplitSeq(strings.TrimSuffix(out, "\x00"), "\x00") {
		if _, name, found := strings.Cut(field, "\t"); found {
			_, name, _ = strings.Cut(name, "\t")
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("%w: the patch changes no file", ErrUnusable)
	}
	for _, name := range names {
		if !filepath.IsLocal(name) || path.Clean(name) != name || isDotGit(name) {
			return nil, fmt.Errorf("%w: the patch changes %.200q, which is outside of the repository's files", ErrUnusable, name)
		}
	}
	return names, nil
}

// need fetches a commit that the clone does not have. A server that does not have it
// either is no error: then the patch is applied without its base.
func (c *Clone) need(ctx context.Context, remote *Remote, commit string) error {
	if has, err := c.has(ctx, commit); err != nil || has {
		return err
	}
	err := c.git.fetch(ctx, c.repository(), remote, "+"+commit+":refs/bases/"+commit, 1)
	var failed *Error
	if errors.As(err, &failed) && (strings.Contains(failed.Output, "not our ref") || strings.Contains(failed.Output, "unadvertised object")) {
		return nil
	}
	if err != nil {
		return err
	}
	return c.git.checkFiles(ctx, c.repository(), commit, c.Dir)
}

// has says that the clone has a commit.
func (c *Clone) has(ctx context.Context, commit string) (bool, error) {
	err := c.git.run(ctx, command{dir: c.repository(), args: []string{"cat-file", "-e", commit + "^{commit}"}})
	var failed *Error
	if errors.As(err, &failed) {
		return false, nil
	}
	return err == nil, err
}

// applyTo applies a patch to a commit and returns the tree. After a conflict the
// returned index has both sides; the caller removes it.
func (c *Clone) applyTo(ctx context.Context, commit string, patch []byte, log *bytes.Buffer) (tree, index string, err error) {
	index = filepath.Join(c.Dir, "apply.index")
	for _, name := range []string{index, index + ".lock"} { // of one who was killed
		if err := os.RemoveAll(name); err != nil {
			return "", "", err
		}
	}
	in := func(args ...string) command {
		return command{dir: c.repository(), index: index, args: args, messages: log}
	}
	if err := c.git.run(ctx, in("read-tree", commit)); err != nil {
		return "", "", err
	}
	apply := in("apply", "--cached", "--3way", "--whitespace=nowarn", "-")
	apply.stdin = bytes.NewReader(patch)
	if err := c.git.run(ctx, apply); err != nil {
		return "", index, err
	}
	tree, err = c.git.output(ctx, in("write-tree"))
	_ = os.Remove(index)
	return tree, "", err
}

// conflict says why a patch does not fit.
func (c *Clone) conflict(ctx context.Context, base string, patch []byte, names []string, index string, failed *Error) error {
	defer os.Remove(index)
	unmerged, err := c.git.output(ctx, command{dir: c.repository(), index: index, args: []string{"ls-files", "--unmerged", "-z"}})
	if err != nil {
		return err
	}
	// mode, id and stage of a file, by its name and stage
	stages := map[string]map[string]string{}
	var files []string
	for line := range strings.SplitSeq(unmerged, "\x00") {
		entry, name, found := strings.Cut(line, "\t")
		fields := strings.Fields(entry)
		if !found || len(fields) != 3 {
			continue
		}
		if stages[name] == nil {
			stages[name] = map[string]string{}
			files = append(files, name)
		}
		stages[name][fields[2]] = fields[1]
	}
	conflict := &ConflictError{Commit: c.Commit, Base: base, Output: failed.Output}
	if len(files) == 0 {
		// git has not tried to merge: the patch does not fit at all.
		known, err := c.has(ctx, base)
		if err != nil {
			return err
		}
		if files = names; base != "" && known {
			if files, err = c.changedOnBoth(ctx, base, patch); err != nil {
				return err
			}
		}
	}
	for _, name := range files {
		merged, err := c.merged(ctx, stages[name])
		if err != nil {
			return err
		}
		conflict.Files = append(conflict.Files, Conflict{name, merged})
	}
	return conflict
}

// changedOnBoth returns the files of a patch that the clone's commit has changed since
// the patch was made; all of them if there is none. The error wraps ErrUnusable if the
// patch does not even fit the commit from which it was made.
func (c *Clone) changedOnBoth(ctx context.Context, base string, patch []byte) ([]string, error) {
	tree, index, err := c.applyTo(ctx, base, patch, &bytes.Buffer{})
	if index != "" {
		_ = os.Remove(index)
	}
	var failed *Error
	if errors.As(err, &failed) {
		return nil, fmt.Errorf("%w: the patch does not fit the commit from which it was made: %s", ErrUnusable, failed.Output)
	}
	if err != nil {
		return nil, err
	}
	ours, err := c.judge(ctx, base, tree)
	if err != nil {
		return nil, err
	}
	theirs, err := c.changedFiles(ctx, base, c.Commit)
	if err != nil {
		return nil, err
	}
	both := slices.DeleteFunc(slices.Clone(ours), func(name string) bool { return !slices.Contains(theirs, name) })
	if len(both) == 0 {
		return ours, nil
	}
	return both, nil
}

// merged returns a file with conflict markers, nil if it cannot be made.
func (c *Clone) merged(ctx context.Context, stages map[string]string) ([]byte, error) {
	if stages["2"] == "" || stages["3"] == "" {
		return nil, nil
	}
	dir, err := os.MkdirTemp(c.Dir, "merge-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	var sides []string
	for _, stage := range []string{"2", "1", "3"} {
		blob := &excerpt.Head{Limit: maxMerged}
		if stages[stage] != "" {
			if err := c.git.run(ctx, command{dir: c.repository(), stdout: blob, args: []string{"cat-file", "blob", stages[stage]}}); err != nil {
				return nil, err
			}
		}
		if blob.Full || bytes.IndexByte(blob.Kept, 0) >= 0 {
			return nil, nil
		}
		name := filepath.Join(dir, stage)
		if err := os.WriteFile(name, blob.Kept, 0o600); err != nil {
			return nil, err
		}
		sides = append(sides, name)
	}
	var out bytes.Buffer
	err = c.git.run(ctx, command{dir: c.repository(), stdout: &out, args: append([]string{
		"merge-file", "-p", "--diff3", "-L", "base branch", "-L", "where the patch began", "-L", "patch", "--",
	}, sides...)})
	var failed *Error // its code is the number of conflicts
	if err != nil && !errors.As(err, &failed) {
		return nil, err
	}
	return out.Bytes(), nil
}

// maxMerged bounds a side of a file in conflict, in bytes.
const maxMerged = 1 << 20

// changedFiles returns the files in which two trees differ.
func (c *Clone) changedFiles(ctx context.Context, before, after string) ([]string, error) {
	out, err := c.git.output(ctx, command{dir: c.repository(), args: []string{"diff-tree", "-r", "-z", "--name-only", "--no-renames", "--end-of-options", before, after}})
	if err != nil || out == "" {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(out, "\x00"), "\x00"), nil
}

// ReadFile writes a file of a tree or a commit to w: of a link its target.
func (c *Clone) ReadFile(ctx context.Context, tree, name string, w io.Writer) error {
	return c.git.run(ctx, command{dir: c.repository(), stdout: w, args: []string{"cat-file", "blob", tree + ":" + name}})
}

// ReadFiles writes the files of a tree that are in a list to w, one after the other, each
// after a line of git's. Files that the tree does not have are left out.
func (c *Clone) ReadFiles(ctx context.Context, tree string, names []string, w io.Writer) error {
	var in bytes.Buffer
	for _, name := range names {
		if strings.Contains(name, "\n") {
			return fmt.Errorf("%w: a file's name has a line break: %q", ErrUnusable, name)
		}
		fmt.Fprintf(&in, "%s:%s\n", tree, name)
	}
	return c.git.run(ctx, command{dir: c.repository(), stdin: &in, stdout: w, args: []string{"cat-file", "--batch"}})
}

// ListFiles returns the names of those files of a tree that are in a list.
func (c *Clone) ListFiles(ctx context.Context, tree string, names []string) ([]string, error) {
	// The names go by stdin, of which there may be many: no argument is too long.
	var in, out bytes.Buffer
	for _, name := range names {
		if strings.Contains(name, "\n") {
			return nil, fmt.Errorf("%w: a file's name has a line break: %q", ErrUnusable, name)
		}
		fmt.Fprintf(&in, "%s:%s\n", tree, name)
	}
	if err := c.git.run(ctx, command{dir: c.repository(), stdin: &in, stdout: &out, args: []string{"cat-file", "--batch-check=%(objecttype)"}}); err != nil {
		return nil, err
	}
	var found []string
	for i, line := range strings.Split(strings.TrimSpace(out.String()), "\n") {
		if line == "blob" && i < len(names) {
			found = append(found, names[i])
		}
	}
	return found, nil
}
