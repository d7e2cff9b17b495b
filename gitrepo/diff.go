package gitrepo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"unicode"

	"github.com/moonladderstudios/mm-orchestrator/internal/disklimit"
	"github.com/moonladderstudios/mm-orchestrator/internal/excerpt"
)

// A Change is what differs between a clone's files and its commit.
type Change struct {
	// Patch is the difference, as git apply takes it: binary files, modes and renames
	// included. Its first line names the commit. It is empty if nothing differs.
	Patch []byte
	// Files are the names of the changed files, both names of a renamed one.
	Files []string
}

// baseLine begins the line of a patch with the commit from which it was made, as in
// the output of git format-patch --base. git apply ignores text before the first diff.
const baseLine = "base-commit: "

// Diff returns what differs between the files of the clone and its commit, new files
// included. Files that .gitignore names are left out.
//
//   - Nothing in tree/.git has a part in it: neither its settings nor its index, nor
//     commits that were made there.
//   - It may be repeated, and changes nothing in the tree.
//   - The error wraps ErrUnusable if the change cannot be a patch, and is a
//     *disklimit.Error if the clone takes more than Config.MaxClone.
func (c *Clone) Diff(ctx context.Context) (Change, error) {
	if c.Tree == "" {
		return Change{}, errors.New("gitrepo: Diff of a clone without files")
	}
	ctx, stop := c.Watch(ctx)
	defer stop()
	tree, err := c.treeOfFiles(ctx)
	if err == nil {
		err = c.CheckSize()
	}
	if err != nil {
		return Change{}, err
	}
	files, err := c.judge(ctx, c.Commit, tree)
	if err != nil || len(files) == 0 {
		return Change{}, err
	}
	patch, err := c.patch(ctx, c.Commit, tree)
	return Change{Patch: patch, Files: files}, err
}

// treeOfFiles returns the tree that git makes of the clone's files. Those of asCheckedOut
// count as unchanged as long as they are as there.
func (c *Clone) treeOfFiles(ctx context.Context) (string, error) {
	index := filepath.Join(c.Dir, "diff.index")
	for _, name := range []string{index, index + ".lock"} { // of one who was killed
		if err := os.RemoveAll(name); err != nil {
			return "", err
		}
	}
	defer os.Remove(index)
	in := func(args ...string) command {
		return command{dir: c.repository(), tree: c.Tree, index: index, args: args}
	}
	if err := c.git.run(ctx, in("read-tree", c.Commit)); err != nil {
		return "", err
	}
	if err := c.git.run(ctx, in("add", "--all", "--", ".")); err != nil {
		var git *Error
		if errors.As(err, &git) {
			return "", fmt.Errorf("%w: git cannot read the files: %w", ErrUnusable, err)
		}
		return "", err
	}
	tree, err := c.git.output(ctx, in("write-tree"))
	if err != nil || len(c.asCheckedOut) == 0 {
		return tree, err
	}
	sums := map[string]string{}
	for _, file := range c.asCheckedOut {
		sums[string(file.Name)] = file.SHA256
	}
	list, err := c.differences(ctx, tree, c.Commit)
	if err != nil {
		return "", err
	}
	root, err := os.OpenRoot(c.Tree)
	if err != nil {
		return "", err
	}
	defer root.Close()
	var entries bytes.Buffer
	for _, d := range list {
		if sum := sums[d.name]; sum != "" && d.mode == d.oldMode && sum == sumOf(root, d.name) {
			fmt.Fprintf(&entries, "%s %s\t%s\x00", d.mode, d.id, d.name)
		}
	}
	if entries.Len() == 0 {
		return tree, nil
	}
	restore := in("update-index", "-z", "--index-info")
	restore.stdin = &entries
	if err := c.git.run(ctx, restore); err != nil {
		return "", err
	}
	return c.git.output(ctx, in("write-tree"))
}

// A checkedOut is a file of a clone of which git makes another one than the commit's,
// although nobody has changed it: the repository has it otherwise than its .gitattributes
// say, such as with CRLF although it is text.
type checkedOut struct {
	// Name need not be UTF-8.
	Name []byte `json:"name"`
	// SHA256 is that of the file's content after the check-out.
	SHA256 string `json:"sha256"`
}

// listCheckedOut returns these files of a clone in which nobody has worked yet.
func (c *Clone) listCheckedOut(ctx context.Context) ([]checkedOut, error) {
	tree, err := c.treeOfFiles(ctx)
	if errors.Is(err, ErrUnusable) {
		return nil, nil // whoever works on the files may remove what git cannot read
	}
	if err != nil {
		return nil, err
	}
	list, err := c.differences(ctx, tree, c.Commit)
	if err != nil || len(list) == 0 {
		return nil, err
	}
	root, err := os.OpenRoot(c.Tree)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	var files []checkedOut
	for _, d := range list {
		if sum := sumOf(root, d.name); sum != "" {
			files = append(files, checkedOut{[]byte(d.name), sum})
		}
	}
	return files, nil
}

// sumOf is the SHA-256 of a regular file, "" if there is none.
func sumOf(root *os.Root, name string) string {
	info, err := root.Lstat(name)
	if err != nil || !info.Mode().IsRegular() {
		return ""
	}
	file, err := root.Open(name)
	if err != nil {
		return ""
	}
	defer file.Close()
	hash := sha256.New()
	if _, err := io.Copy(hash, file); err != nil {
		return ""
	}
	return hex.EncodeToString(hash.Sum(nil))
}

// patch returns the difference between a commit and a tree.
func (c *Clone) patch(ctx context.Context, commit, tree string) ([]byte, error) {
	large := fmt.Errorf("%w: the patch has more than %s", ErrUnusable, disklimit.Text(c.git.config.MaxPatch))
	limited, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	out := &excerpt.Head{Limit: int(c.git.config.MaxPatch), OnFull: func() { cancel(large) }}
	if err := c.git.run(limited, command{dir: c.repository(), stdout: out, args: []string{
		"diff-tree", "-r", "--patch", "--binary", "--full-index", "--find-renames", "--no-color", "--no-ext-diff", "--no-textconv", "--no-relative",
		"--src-prefix=a/", "--dst-prefix=b/", "--unified=3", "--diff-algorithm=myers", "--submodule=short", "--end-of-options", commit, tree,
	}}); err != nil {
		return nil, err
	}
	if out.Full {
		return nil, large // git has ended before it was told to
	}
	return bytes.Join([][]byte{[]byte(baseLine + commit + "\n\n"), out.Kept}, nil), nil
}

// ErrUnusable: the change cannot be published as it is.
var ErrUnusable = errors.New("the change cannot be used")

// maxTarget bounds the target of a symbolic link, in bytes.
const maxTarget = 4096

// judge returns the files in which two trees differ. The error wraps ErrUnusable if one
// of them is a submodule, or a link that leads out of the tree.
func (c *Clone) judge(ctx context.Context, before, after string) ([]string, error) {
	list, err := c.differences(ctx, before, after)
	if err != nil {
		return nil, err
	}
	var files []string
	for _, d := range list {
		name := d.name
		files = append(files, name)
		switch oldMode, mode, id := d.oldMode, d.mode, d.id; {
		case strings.Contains(name, "\n"):
			return nil, fmt.Errorf("%w: the name of the file %q has a line break: give it another name", ErrUnusable, name)
		case mode == "160000" || oldMode == "160000":
			return nil, fmt.Errorf("%w: it changes %s, which is a submodule or a repository of its own: change the submodule in its own repository, or remove the .git directory in it", ErrUnusable, name)
		case mode == "120000":
			target := &excerpt.Head{Limit: maxTarget}
			if err := c.git.run(ctx, command{dir: c.repository(), stdout: target, args: []string{"cat-file", "blob", id}}); err != nil {
				return nil, err
			}
			if inside := filepath.Join(filepath.Dir(name), string(target.Kept)); target.Full || filepath.IsAbs(string(target.Kept)) || !filepath.IsLocal(inside) || isDotGit(inside) {
				return nil, fmt.Errorf("%w: %s would be a symbolic link to %.100q, which leads out of the repository or into .git", ErrUnusable, name, target.Kept)
			}
		}
	}
	return files, nil
}

// A treeDifference is a file in which two trees differ. oldMode is that of the first one,
// mode and id are those of the second.
type treeDifference struct{ name, oldMode, mode, id string }

func (c *Clone) differences(ctx context.Context, before, after string) ([]treeDifference, error) {
	out, err := c.git.output(ctx, command{dir: c.repository(), args: []string{
		"diff-tree", "-r", "-z", "--raw", "--no-renames", "--no-abbrev", "--end-of-options", before, after,
	}})
	if err != nil {
		return nil, err
	}
	var list []treeDifference
	fields := strings.Split(out, "\x00")
	for i := 0; i+1 < len(fields); i += 2 {
		// :old mode, new mode, old id, new id, status
		entry := strings.Fields(strings.TrimPrefix(fields[i], ":"))
		if len(entry) != 5 {
			return nil, fmt.Errorf("git diff-tree printed %q", fields[i])
		}
		list = append(list, treeDifference{name: fields[i+1], oldMode: entry[0], mode: entry[1], id: entry[3]})
	}
	return list, nil
}

// isDotGit says that a path in the tree is in a directory that is .git on some file
// system: in other letters, with characters that the file system ignores, or by its
// short name.
func isDotGit(path string) bool {
	for part := range strings.SplitSeq(filepath.ToSlash(path), "/") {
		part = strings.Map(func(r rune) rune {
			if unicode.Is(unicode.Cf, r) {
				return -1 // HFS+ ignores them
			}
			return unicode.ToLower(r)
		}, part)
		part, _, _ = strings.Cut(part, ":") // NTFS: a stream of the file
		if part = strings.TrimRight(part, ". "); part == ".git" || part == "git~1" {
			return true
		}
	}
	return false
}
