package change

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// An Aside is what was set aside: a version of files that a restore replaces.
type Aside struct {
	// Ref points to a tree with the files, Tree is its id. "" for nothing.
	Ref, Tree string
	// Paths are the files in it, as entries name them.
	Paths []string
	// Commands bring the files back, each in one line for a shell.
	Commands []string
}

// SetAside stores the files and links at these paths as they are now, under a ref
// of the run. Files of git directories are in the tree with "dot-git" in place of
// ".git". A repeated call keeps what an earlier one has stored under the ref,
// except where it stores the same path again.
func (r *Repository) SetAside(ctx context.Context, run, name string, now *State, paths []string) (Aside, error) {
	aside := Aside{Ref: Ref(run, name)}
	shown, _, err := r.storeContent(ctx, now, paths)
	if err != nil {
		return Aside{}, err
	}
	inGit := false
	for _, path := range paths {
		e := now.find(path)
		if e == nil || e.Blob == "" {
			continue
		}
		if _, fits := r.treeItem(e); !fits {
			shown = append(shown, treeItem{visiblePath(path), "100644", e.Blob})
			inGit = true
		}
		aside.Paths = append(aside.Paths, path)
	}
	if len(shown) == 0 {
		return Aside{}, nil
	}
	have := map[string]bool{}
	for _, item := range shown {
		have[item.path] = true
	}
	earlier, err := r.listTree(ctx, aside.Ref)
	if err != nil {
		return Aside{}, err
	}
	for _, item := range earlier {
		if !have[item.path] && !conflicts(item.path, shown) {
			shown = append(shown, item)
		}
	}
	if aside.Tree, err = r.writeTrees(ctx, buildTrees(r.format, shown)); err != nil {
		return Aside{}, err
	}
	if err := r.setRefs(ctx, map[string]string{aside.Ref: aside.Tree}); err != nil {
		return Aside{}, err
	}
	if len(aside.Paths) > 0 && !(inGit && len(shown) == 1) {
		aside.Commands = append(aside.Commands, r.restoreCommand(aside.Ref, "--worktree"))
	}
	for _, path := range aside.Paths {
		if _, fits := r.treeItem(now.find(path)); !fits {
			aside.Commands = append(aside.Commands, fmt.Sprintf("git -C %s cat-file blob %s > %s", ShellQuote(r.Top), now.find(path).Blob, ShellQuote(r.absolute(path))))
		}
	}
	return aside, nil
}

// Edits returns the edits that are not committed at these paths, compared with
// HEAD, as they are in a state: of the work tree, and of the index. A path that
// HEAD does not have has no Before.
func (r *Repository) Edits(ctx context.Context, state *State, paths []string) ([]Difference, error) {
	committed := map[string]treeItem{}
	items, err := r.listTree(ctx, "HEAD")
	if err != nil {
		return nil, err
	}
	for _, item := range items {
		committed[item.path] = item
	}
	var top *GitDir
	for i := range state.GitDirs {
		if state.GitDirs[i].WorkTree == "." {
			top = &state.GitDirs[i]
		}
	}
	var list []Difference
	for _, name := range paths {
		d := Difference{Kind: EntryDiffers, Path: name, After: state.find(name)}
		staged := Difference{Kind: IndexDiffers, Path: name}
		if item, found := committed[name]; found {
			d.Before = &Entry{Path: name, Kind: File, Mode: 0o644, Blob: item.id}
			d.Before.UID, d.Before.GID = state.owner(name)
			mode := uint32(0o100644)
			switch item.mode {
			case "100755":
				d.Before.Mode, mode = 0o755, 0o100755
			case linkMode:
				d.Before.Kind, d.Before.Mode, mode = Link, 0o777, 0o120000
			}
			staged.IndexBefore = []IndexEntry{{Path: name, Mode: mode, ID: item.id}}
		}
		if top != nil {
			staged.GitDir = top.Path
			for _, e := range top.index {
				if e.Path == name {
					staged.IndexAfter = append(staged.IndexAfter, e)
				}
			}
		}
		list = append(list, d, staged)
	}
	return list, nil
}

// findTree returns the tree that a revision stands for, "" if there is none.
func (r *Repository) findTree(ctx context.Context, revision string) (string, error) {
	var out strings.Builder
	code, err := r.git(ctx, GitCommand{Dir: r.Top, Args: []string{"rev-parse", "--verify", "--quiet", revision + "^{tree}"}, Stdout: &out, Stderr: io.Discard})
	switch {
	case err != nil:
		return "", err
	case code != 0:
		return "", nil
	}
	return strings.TrimSpace(out.String()), nil
}

// Edited returns the differences of those paths that are not as HEAD has them, in
// the work tree or in the index.
func Edited(list []Difference) []Difference {
	edited := map[string]bool{}
	for _, d := range list {
		switch {
		case d.Kind == EntryDiffers && (d.Before == nil) != (d.After == nil),
			d.Before != nil && (d.Before.Kind != d.After.Kind || d.Before.Blob != d.After.Blob || d.Before.Mode&0o100 != d.After.Mode&0o100),
			d.Kind == IndexDiffers && !sameIndex(d.IndexBefore, d.IndexAfter):
			edited[d.Path] = true
		}
	}
	return slices.DeleteFunc(slices.Clone(list), func(d Difference) bool { return !edited[d.Path] })
}

// DiffToHead writes what these paths are in a tree, compared with HEAD.
func (r *Repository) DiffToHead(ctx context.Context, tree string, paths []string, into io.Writer) error {
	items, err := r.listTree(ctx, "HEAD")
	if err != nil {
		return err
	}
	wanted := map[string]bool{}
	for _, path := range paths {
		wanted[path] = true
	}
	items = slices.DeleteFunc(items, func(item treeItem) bool { return !wanted[item.path] })
	head, err := r.writeTrees(ctx, buildTrees(r.format, items))
	if err != nil {
		return err
	}
	return r.Diff(ctx, head, tree, into)
}

// SetAsideEdits stores the edits at these paths as they are now under two refs: the
// work tree's, and, where those differ from them and from HEAD, the index's. The
// commands bring back both, also that a file was removed.
//
// all are the paths that the commands name: also those that an earlier call has set
// aside, after which the edits were taken back.
func (r *Repository) SetAsideEdits(ctx context.Context, run, name string, now *State, edits []Difference, all []string) (Aside, error) {
	var changed []string
	var staged []treeItem
	for _, d := range edits {
		if d.Kind == EntryDiffers {
			if d.After != nil {
				changed = append(changed, d.Path)
			}
			continue
		}
		for _, e := range d.IndexAfter {
			if e.Stage == 0 && e.Mode != gitlinkMode && !e.IntentToAdd {
				staged = append(staged, treeItem{e.Path, fmt.Sprintf("%o", e.Mode), e.ID})
			}
		}
	}
	aside, err := r.SetAside(ctx, run, name, now, changed)
	if err != nil {
		return Aside{}, err
	}
	if aside.Ref == "" { // only removed files: the command needs a tree without them
		aside.Ref = Ref(run, name)
		items, err := r.listTree(ctx, aside.Ref)
		if err != nil {
			return Aside{}, err
		}
		if aside.Tree, err = r.writeTrees(ctx, buildTrees(r.format, items)); err != nil {
			return Aside{}, err
		}
		if err := r.setRefs(ctx, map[string]string{aside.Ref: aside.Tree}); err != nil {
			return Aside{}, err
		}
	}
	index := aside.Ref + asideIndexEnd
	earlier, err := r.listTree(ctx, index)
	if err != nil {
		return Aside{}, err
	}
	have := map[string]bool{}
	for _, item := range staged {
		have[item.path] = true
	}
	for _, item := range earlier {
		if !have[item.path] {
			staged = append(staged, item)
		}
	}
	tree, err := r.writeTrees(ctx, buildTrees(r.format, staged))
	if err != nil {
		return Aside{}, err
	}
	if err := r.setRefs(ctx, map[string]string{index: tree}); err != nil {
		return Aside{}, err
	}
	known := map[string]bool{} // to git, once they are back
	items, err := r.listTree(ctx, "HEAD")
	if err != nil {
		return Aside{}, err
	}
	for _, item := range slices.Concat(items, staged) {
		known[item.path] = true
	}
	command := func(ref, into string, paths []string) string {
		words := make([]string, 0, len(paths))
		for _, path := range paths {
			words = append(words, ShellQuote(path))
		}
		return fmt.Sprintf("git --literal-pathspecs -C %s restore --source=%s %s -- %s", ShellQuote(r.Top), ref, into, strings.Join(words, " "))
	}
	aside.Paths = all
	aside.Commands = []string{command(aside.Ref, "--worktree", all)}
	if paths := slices.DeleteFunc(slices.Clone(all), func(path string) bool { return !known[path] }); len(paths) > 0 {
		aside.Commands = append(aside.Commands, command(index, "--staged", paths))
	}
	return aside, nil
}

// ResetEdits brings paths back to HEAD, in the work tree and in the index, as git
// reset --hard does. now is the state as observed just now.
func (r *Repository) ResetEdits(ctx context.Context, now *State, edits []Difference) error {
	var committed, added strings.Builder
	var extra []Difference
	before := &State{Format: r.format}
	for _, d := range edits {
		if d.Kind != EntryDiffers {
			continue
		}
		if d.Before != nil {
			committed.WriteString(d.Path + "\x00")
			continue
		}
		added.WriteString(d.Path + "\x00")
		extra = append(extra, d)
	}
	if committed.Len() > 0 {
		args := []string{"--literal-pathspecs", "restore", "--source=HEAD", "--staged", "--worktree", "--pathspec-from-file=-", "--pathspec-file-nul"}
		if err := r.run(ctx, GitCommand{Dir: r.Top, Args: args, Stdin: strings.NewReader(committed.String())}); err != nil {
			return err
		}
	}
	if err := r.giveBack(now, edits); err != nil {
		return err
	}
	if added.Len() == 0 {
		return nil
	}
	if err := r.run(ctx, GitCommand{Dir: r.Top, Args: []string{"update-index", "--force-remove", "-z", "--stdin"}, Stdin: strings.NewReader(added.String())}); err != nil {
		return err
	}
	if _, err := r.Restore(ctx, before, now, extra); err != nil {
		return err
	}
	folders := r.folders()
	defer folders.close()
	for _, d := range extra {
		// A folder without files is nothing to git.
		for dir := path.Dir(d.Path); dir != "."; dir = path.Dir(dir) {
			root, name, err := folders.at(dir)
			if err != nil || root.Remove(name) != nil {
				break
			}
		}
	}
	return nil
}

// owner returns who owns the file at a path, or would own a new one.
func (s *State) owner(name string) (uid, gid int) {
	if os.Geteuid() == 0 {
		for ; name != "/"; name = path.Dir(name) {
			if e := s.find(name); e != nil {
				return e.UID, e.GID
			}
			if name == "." {
				break
			}
		}
	}
	return os.Geteuid(), os.Getegid()
}

// giveBack gives files that git has written as root to their owners.
func (r *Repository) giveBack(now *State, edits []Difference) error {
	if os.Geteuid() != 0 {
		return nil
	}
	folders := r.folders()
	defer folders.close()
	for _, d := range edits {
		if d.Kind != EntryDiffers || d.Before == nil {
			continue
		}
		root, name, err := folders.at(d.Path)
		if err == nil {
			uid, gid := now.owner(d.Path)
			err = root.Lchown(name, uid, gid)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// restoreCommand returns the command that takes all files of a tree into the work
// tree or the index.
func (r *Repository) restoreCommand(ref, into string) string {
	return fmt.Sprintf("git -C %s restore --overlay --source=%s %s -- :/", ShellQuote(r.Top), ref, into)
}

// conflicts says that a path is a folder of one of the items, or lies in one.
func conflicts(path string, items []treeItem) bool {
	return slices.ContainsFunc(items, func(item treeItem) bool {
		return strings.HasPrefix(item.path, path+"/") || strings.HasPrefix(path, item.path+"/")
	})
}

// visiblePath is the path that a file of a git directory has in a tree.
func visiblePath(path string) string {
	parts := strings.Split(strings.TrimPrefix(filepath.ToSlash(path), "/"), "/")
	for i, part := range parts {
		if isDotGit(part) {
			parts[i] = "dot-git"
		}
	}
	return strings.Join(parts, "/")
}

// ShellQuote writes a text as one word of a shell.
func ShellQuote(text string) string {
	plain := func(c rune) bool {
		return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("/._-+:=@%,", c)
	}
	if text != "" && strings.IndexFunc(text, func(c rune) bool { return !plain(c) }) < 0 {
		return text
	}
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}

// listWholeTree is listTree with submodules.
func (r *Repository) listWholeTree(ctx context.Context, ref string) ([]treeItem, error) {
	out, err := r.findTree(ctx, ref)
	if err != nil || out == "" {
		return nil, err
	}
	var list strings.Builder
	if err := r.run(ctx, GitCommand{Dir: r.Top, Args: []string{"ls-tree", "-r", "-z", "--full-tree", out}, Stdout: &list}); err != nil {
		return nil, err
	}
	var items []treeItem
	for line := range strings.SplitSeq(list.String(), "\x00") {
		head, path, found := strings.Cut(line, "\t")
		fields := strings.Fields(head)
		if found && len(fields) == 3 {
			items = append(items, treeItem{path, fields[0], fields[2]})
		}
	}
	return items, nil
}

// listTree returns the files of the tree that a revision stands for; none if there
// is no such revision.
func (r *Repository) listTree(ctx context.Context, revision string) ([]treeItem, error) {
	items, err := r.listWholeTree(ctx, revision)
	return slices.DeleteFunc(items, func(item treeItem) bool { return item.mode == submoduleMode }), err
}

// Modes in a tree of what is no regular file.
const (
	linkMode      = "120000"
	submoduleMode = "160000"
)

// Trees stores two trees, with the files and links of these differences before
// and after, and returns their ids. after needs to be the state as it is now.
func (r *Repository) Trees(ctx context.Context, after *State, list []Difference) (from, to string, err error) {
	var paths []string
	var old []treeItem
	for _, d := range list {
		if d.Kind != EntryDiffers || d.GitDir != "" {
			continue
		}
		paths = append(paths, d.Path)
		if d.Before != nil && d.Before.Blob != "" {
			if item, fits := r.treeItem(d.Before); fits {
				old = append(old, item)
			}
		}
	}
	shown, _, err := r.storeContent(ctx, after, paths)
	if err != nil {
		return "", "", err
	}
	if from, err = r.writeTrees(ctx, buildTrees(r.format, old)); err != nil {
		return "", "", err
	}
	to, err = r.writeTrees(ctx, buildTrees(r.format, shown))
	return from, to, err
}

// Diff writes the difference of two trees in the form that git apply takes.
func (r *Repository) Diff(ctx context.Context, from, to string, into io.Writer) error {
	args := append(append([]string{"diff"}, GitOptions("diff")...), from, to)
	return r.run(ctx, GitCommand{Dir: r.Top, Args: args, Stdout: into})
}

// A Stored is the change of a run as it is kept: what it altered, and what of that
// it was not to alter.
type Stored struct {
	Version     int          `json:"version"`
	Differences []Difference `json:"differences"`
}

// StoreChange stores differences, with the content of after, under the ref of a
// run. It returns the id that LoadChange takes.
func (r *Repository) StoreChange(ctx context.Context, run, name string, after *State, list []Difference) (string, error) {
	var paths []string
	for _, d := range list {
		if d.Kind == EntryDiffers {
			paths = append(paths, d.Path)
		}
	}
	shown, others, err := r.storeContent(ctx, after, paths)
	if err != nil {
		return "", err
	}
	for _, item := range shown {
		others = append(others, item.id)
	}
	for _, d := range list {
		for _, e := range d.IndexAfter {
			if e.Mode != gitlinkMode {
				others = append(others, e.ID)
			}
		}
	}
	if others, err = r.present(ctx, others); err != nil {
		return "", err
	}
	text, err := json.Marshal(Stored{Version: stateVersion, Differences: list})
	if err != nil {
		return "", err
	}
	return r.storeDescription(ctx, text, "change.json", others, Ref(run, name))
}

// LoadChange returns what StoreChange has stored.
func (r *Repository) LoadChange(ctx context.Context, id string) ([]Difference, error) {
	text, err := r.readObject(ctx, id)
	if err != nil {
		return nil, err
	}
	var stored Stored
	if err := json.Unmarshal(text, &stored); err != nil {
		return nil, fmt.Errorf("the stored change %s cannot be read: %w", id, err)
	}
	if stored.Version != stateVersion {
		return nil, fmt.Errorf("the stored change %s has the version %d; this program reads %d", id, stored.Version, stateVersion)
	}
	return stored.Differences, nil
}

// SHA256 returns the SHA-256 of each object's content, in hexadecimal digits.
func (r *Repository) SHA256(ctx context.Context, ids []string) (map[string]string, error) {
	slices.Sort(ids)
	ids = slices.Compact(ids)
	sums := map[string]string{}
	err := r.readFew(ctx, ids, func(i int, _ string, _ int64, content io.Reader) error {
		sum := sha256.New()
		_, err := io.Copy(sum, content)
		sums[ids[i]] = hex.EncodeToString(sum.Sum(nil))
		return err
	})
	return sums, err
}
