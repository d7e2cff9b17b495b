package change

import (
	"context"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"
)

// A SetAsideTree is what was set aside under one ref of a run.
type SetAsideTree struct {
	// Name is the end of the ref's name, such as aside.
	Name, Ref string
	Files     []SetAsideFile
}

// A SetAsideFile is a version of a file that was set aside.
type SetAsideFile struct {
	// Path is relative to the top of the work tree.
	Path string
	// Mode is git's, such as 100644, and "" for a file that had been removed.
	Mode, ID string
	State    AsideState
}

// An AsideState compares what was set aside with what is in the work tree.
type AsideState string

// The states.
const (
	// AsidePresent: the work tree has this version.
	AsidePresent AsideState = "present"
	// AsideReplaced: the work tree has the version of before the run or of HEAD, another
	// one that was set aside in the run, or no file. Nothing is lost if this version takes
	// its place.
	AsideReplaced AsideState = "replaced"
	// AsideEdited: the work tree has another version, which is kept nowhere.
	AsideEdited AsideState = "edited"
	// AsideOfGit: it is a file of a git directory. SetAside has the command that brings
	// it back.
	AsideOfGit AsideState = "of git"
)

// isIndexAside says that a ref has what was staged, beside the ref without this end.
func isIndexAside(name string) bool { return strings.HasSuffix(name, asideIndexEnd) }

// asideIndexEnd ends the name of the ref that has what was staged.
const asideIndexEnd = "-index"

// ListSetAside returns what was set aside in a run, and how that compares with now.
// edits are paths that the run has deployed as edits: those of them that the tree
// does not have had been removed.
func (r *Repository) ListSetAside(ctx context.Context, run string, now *State, edits []string) ([]SetAsideTree, error) {
	refs, err := ListRefs(ctx, r.git, r.Top, run)
	if err != nil {
		return nil, err
	}
	// What may be replaced: also git has these versions.
	known := map[string]map[string]bool{}
	revisions := []string{Ref(run, "baseline"), "HEAD"}
	for _, ref := range refs {
		if ref.SetAside() {
			revisions = append(revisions, ref.Name)
		}
	}
	for _, revision := range revisions {
		items, err := r.listTree(ctx, revision)
		if err != nil {
			return nil, err
		}
		for _, item := range items {
			if known[item.path] == nil {
				known[item.path] = map[string]bool{}
			}
			known[item.path][item.id] = true
		}
	}
	var trees []SetAsideTree
	for _, ref := range refs {
		name := path.Base(ref.Name)
		if !ref.SetAside() || isIndexAside(name) {
			continue
		}
		tree := SetAsideTree{Name: name, Ref: ref.Name}
		items, err := r.listTree(ctx, ref.Name)
		if err != nil {
			return nil, err
		}
		have := map[string]bool{}
		for _, item := range items {
			have[item.path] = true
			f := SetAsideFile{Path: item.path, Mode: item.mode, ID: item.id}
			if slices.Contains(strings.Split(item.path, "/"), "dot-git") {
				f.State = AsideOfGit
			} else {
				f.State = asideState(now, f, known[item.path])
			}
			tree.Files = append(tree.Files, f)
		}
		if name == asideName {
			for _, path := range edits {
				if have[path] {
					continue
				}
				f := SetAsideFile{Path: path}
				f.State = asideState(now, f, known[path])
				tree.Files = append(tree.Files, f)
			}
		}
		trees = append(trees, tree)
	}
	return trees, nil
}

// asideState compares one file. known has the ids of versions that are kept
// elsewhere.
func asideState(now *State, f SetAsideFile, known map[string]bool) AsideState {
	for dir := path.Dir(f.Path); dir != "."; dir = path.Dir(dir) {
		if e := now.find(dir); e != nil && e.Kind != Folder {
			return AsideEdited // something else is in the place of its folder
		}
	}
	current := now.find(f.Path)
	switch {
	case current == nil && f.Mode == "":
		return AsidePresent
	case current == nil:
		return AsideReplaced
	case current.Kind == gitKind(f.Mode) && current.Blob == f.ID && (current.Kind == Link || (f.Mode == "100755") == (current.Mode&0o100 != 0)):
		return AsidePresent
	case current.Blob != "" && known[current.Blob]:
		return AsideReplaced
	}
	return AsideEdited
}

// gitKind is what a mode of a tree stands for, "" for no file.
func gitKind(mode string) Kind {
	switch mode {
	case "":
		return ""
	case linkMode:
		return Link
	}
	return File
}

// BringBack puts files that were set aside into the work tree, as they were. now is
// the state as observed just now. Like [Repository.Restore] it follows no link, never
// leaves half a file, and can be repeated after a kill. It overwrites what is there:
// see AsideEdited.
//
// It returns the paths that it altered.
func (r *Repository) BringBack(ctx context.Context, now *State, files []SetAsideFile) ([]string, error) {
	before := *now
	before.Entries = slices.Clone(now.Entries)
	var list []Difference
	made := map[string]bool{}
	for _, f := range files {
		if f.State == AsidePresent || f.State == AsideOfGit {
			continue
		}
		d := Difference{Kind: EntryDiffers, Path: f.Path, After: now.find(f.Path)}
		if f.Mode != "" {
			e, err := r.asideEntry(ctx, now, f)
			if err != nil {
				return nil, err
			}
			d.Before = e
			var missing []string
			for dir := path.Dir(f.Path); dir != "." && now.find(dir) == nil && !made[dir]; dir = path.Dir(dir) {
				missing, made[dir] = append(missing, dir), true
			}
			for _, dir := range slices.Backward(missing) {
				folder := Entry{Path: dir, Kind: Folder, Mode: 0o755}
				folder.UID, folder.GID = now.owner(dir)
				before.put(dir, &folder)
				list = append(list, Difference{Kind: EntryDiffers, Path: dir, Before: &folder})
			}
		}
		before.put(f.Path, d.Before)
		list = append(list, d)
	}
	return r.Restore(ctx, &before, now, list)
}

// asideEntry is the entry of a file that was set aside. The tree has only whether the
// file can be executed: the other permissions are those of the file in its place.
func (r *Repository) asideEntry(ctx context.Context, now *State, f SetAsideFile) (*Entry, error) {
	e := &Entry{Path: f.Path, Kind: gitKind(f.Mode), Mode: 0o644, Blob: f.ID, ModTime: time.Now().UnixNano(), Names: 1}
	if current := now.find(f.Path); current != nil && current.Kind == File {
		e.Mode = current.Mode &^ 0o111
	}
	e.UID, e.GID = now.owner(f.Path)
	switch {
	case f.Mode == "100755":
		e.Mode |= e.Mode >> 2 & 0o111
	case e.Kind == Link:
		e.Mode = 0o777
		var target strings.Builder
		err := r.readObjects(ctx, []string{f.ID}, func(_ int, _ string, _ int64, content io.Reader) error {
			_, err := io.Copy(&target, io.LimitReader(content, 4096))
			return err
		})
		if err != nil {
			return nil, err
		}
		e.Target = target.String()
	}
	return e, nil
}

// SetAsideAgain sets the present versions of these files aside, under the next name
// of the run that is free, and returns the name.
func (r *Repository) SetAsideAgain(ctx context.Context, run string, now *State, paths []string) (string, error) {
	refs, err := ListRefs(ctx, r.git, r.Top, run)
	if err != nil {
		return "", err
	}
	for n := 2; ; n++ {
		name := fmt.Sprintf("%s-%d", asideName, n)
		if slices.ContainsFunc(refs, func(ref RunRef) bool { return ref.Name == Ref(run, name) }) {
			continue
		}
		aside, err := r.SetAside(ctx, run, name, now, paths)
		if err == nil && len(aside.Paths) != len(paths) {
			err = fmt.Errorf("only %d of %d files could be set aside", len(aside.Paths), len(paths))
		}
		return name, err
	}
}

// StageSetAside stages again what was staged of these paths when they were set aside
// under a name. It leaves paths out whose entry in the index is not that of HEAD, and
// returns them. Without such a ref it does nothing.
func (r *Repository) StageSetAside(ctx context.Context, run, name string, now *State, paths []string) (left []string, err error) {
	ref := Ref(run, name) + asideIndexEnd
	found, err := r.findTree(ctx, ref)
	if err != nil || found == "" {
		return nil, err
	}
	staged, err := r.listTree(ctx, ref)
	if err != nil {
		return nil, err
	}
	had := map[string]string{}
	for _, item := range staged {
		had[item.path] = item.id
	}
	edits, err := r.Edits(ctx, now, paths)
	if err != nil {
		return nil, err
	}
	var todo strings.Builder
	for _, d := range edits {
		if d.Kind != IndexDiffers {
			continue
		}
		switch id := had[d.Path]; {
		case len(d.IndexAfter) == 1 && d.IndexAfter[0].ID == id || id == "" && len(d.IndexAfter) == 0:
		case !sameIndex(d.IndexBefore, d.IndexAfter):
			left = append(left, d.Path)
		default:
			todo.WriteString(d.Path + "\x00")
		}
	}
	if todo.Len() == 0 {
		return left, nil
	}
	args := []string{"--literal-pathspecs", "restore", "--source=" + ref, "--staged", "--pathspec-from-file=-", "--pathspec-file-nul"}
	return left, r.run(ctx, GitCommand{Dir: r.Top, Args: args, Stdin: strings.NewReader(todo.String())})
}
