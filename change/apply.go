package change

import (
	"context"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// A Patch is what a diff makes of a state.
type Patch struct {
	before, after *State
}

// PlanPatch returns what a unified diff makes of a captured state. Names in the diff
// are relative to the top of the repository. It alters neither the work tree nor the
// index, and fails if one part of the diff does not fit.
func (r *Repository) PlanPatch(ctx context.Context, before *State, diff string) (*Patch, error) {
	index, err := os.CreateTemp(r.gitDir, "mm-orchestrator-index-*.lock")
	if err != nil {
		return nil, err
	}
	_ = index.Close()
	defer os.Remove(index.Name())
	// git takes an empty file for an index that is broken.
	if err := os.Remove(index.Name()); err != nil {
		return nil, err
	}
	defer os.Remove(index.Name() + ".lock")
	env := []string{"GIT_INDEX_FILE=" + index.Name()}
	run := func(stdin string, args ...string) (string, error) {
		var out strings.Builder
		err := r.run(ctx, GitCommand{Dir: r.Top, Args: args, Env: env, Stdin: strings.NewReader(stdin), Stdout: &out})
		return strings.TrimSpace(out.String()), err
	}
	if _, err := run("", "read-tree", before.Tree); err != nil {
		return nil, err
	}
	if _, err := run(diff, "-c", "apply.ignoreWhitespace=no", "-c", "core.autocrlf=false", "apply", "--cached", "--whitespace=nowarn", "-"); err != nil {
		return nil, err
	}
	after, err := run("", "write-tree")
	if err != nil {
		return nil, err
	}
	return r.patchTo(ctx, before, after)
}

// patchTo returns the patch from a captured state to a tree.
func (r *Repository) patchTo(ctx context.Context, before *State, tree string) (*Patch, error) {
	old, err := r.listTree(ctx, before.Tree)
	if err != nil {
		return nil, err
	}
	items, err := r.listWholeTree(ctx, tree)
	if err != nil {
		return nil, err
	}
	after := *before
	entries := map[string]Entry{}
	for _, e := range before.Entries {
		entries[e.Path] = e
	}
	have := map[string]treeItem{}
	for _, item := range old {
		have[item.path] = item
	}
	for _, item := range items {
		if item.mode == submoduleMode {
			return nil, fmt.Errorf("%s would become a submodule", item.path)
		}
		was, found := have[item.path]
		delete(have, item.path)
		if found && was == item {
			continue
		}
		e, known := entries[item.path]
		if !known {
			e = r.madeIn(entries, item.path)
			e.Mode = 0o644
		}
		e.Kind, e.Blob, e.ModTime, e.Inode, e.Names, e.Size, e.Unread = File, item.id, time.Now().UnixNano(), 0, 1, 0, ""
		switch {
		case item.mode == "120000":
			target, err := r.readObject(ctx, item.id)
			if err != nil {
				return nil, err
			}
			e.Kind, e.Mode, e.Target = Link, 0o777, string(target)
		case item.mode == "100755" && (!found || was.mode != item.mode):
			e.Mode |= e.Mode & 0o444 >> 2
		case item.mode == "100644" && (!found || was.mode != item.mode):
			e.Mode &^= 0o111
			if found && was.mode == "120000" {
				e.Mode = 0o644
			}
		}
		entries[item.path] = e
	}
	for removed := range have {
		delete(entries, removed)
	}
	// git removes folders that it has made empty.
	for removed := range have {
		for dir := path.Dir(removed); dir != "."; dir = path.Dir(dir) {
			inside := false
			for name := range entries {
				inside = inside || strings.HasPrefix(name, dir+"/")
			}
			if inside {
				break
			}
			delete(entries, dir)
		}
	}
	after.Entries = nil
	for _, e := range entries {
		after.Entries = append(after.Entries, e)
	}
	slices.SortFunc(after.Entries, func(a, b Entry) int { return strings.Compare(a.Path, b.Path) })
	return &Patch{before, &after}, nil
}

// madeIn returns a new entry with the owner of its folder, and adds the folders
// that it needs.
func (r *Repository) madeIn(entries map[string]Entry, name string) Entry {
	e := Entry{Path: name, UID: os.Geteuid(), GID: os.Getegid()}
	dir := path.Dir(name)
	folder, known := entries[dir]
	if !known && dir != "." {
		folder = r.madeIn(entries, dir)
		folder.Kind, folder.Mode = Folder, 0o755
		entries[dir] = folder
	}
	if dir == "." {
		folder = entries["."]
	}
	if os.Geteuid() == 0 {
		e.UID, e.GID = folder.UID, folder.GID
	}
	return e
}

// Judge returns what the patch alters, as the function Judge does.
func (p *Patch) Judge(rules Rules) []Difference { return Judge(p.before, p.after, rules) }

// Apply makes the patch's files. now is the state as observed just now. It can be
// repeated after a kill at any point. If somebody has altered one of the files since
// the patch was planned, it alters nothing and says so.
func (r *Repository) Apply(ctx context.Context, p *Patch, now *State) error {
	var list []Difference
	for _, d := range Compare(p.before, p.after) {
		current := now.find(d.Path)
		if !sameEntry(current, d.Before) && !sameEntry(current, d.After) {
			return fmt.Errorf("%s was altered by somebody else meanwhile", filepath.Join(r.Top, d.Path))
		}
		list = append(list, Difference{Kind: d.Kind, Path: d.Path, GitDir: d.GitDir, Before: d.After, After: d.Before})
	}
	_, err := r.Restore(ctx, p.after, now, list)
	return err
}
