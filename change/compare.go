package change

import (
	"cmp"
	"encoding/json"
	"path"
	"slices"
	"strings"
)

// A DifferenceKind says what differs.
type DifferenceKind string

const (
	// EntryDiffers: a name in a folder, of the work tree or of a git directory.
	EntryDiffers DifferenceKind = "entry"
	// IndexDiffers: the entries of one path in an index.
	IndexDiffers DifferenceKind = "index"
	// RefDiffers: a reference, or HEAD.
	RefDiffers DifferenceKind = "ref"
)

// A Difference is one thing that differs between two states.
type Difference struct {
	Kind DifferenceKind `json:"kind"`
	// Path is that of the entry, or of the file that the index entries are about,
	// or the reference's name.
	Path string `json:"path"`
	// GitDir is the git directory that the path, index or reference belongs to. ""
	// for files of the work tree.
	GitDir string `json:"gitDir,omitempty"`

	// Before and After are nil where there is no such name.
	Before *Entry `json:"before,omitempty"`
	After  *Entry `json:"after,omitempty"`
	// IndexBefore and IndexAfter are the entries of all stages.
	IndexBefore []IndexEntry `json:"indexBefore,omitempty"`
	IndexAfter  []IndexEntry `json:"indexAfter,omitempty"`
	// RefBefore and RefAfter are "" where there is no such reference.
	RefBefore string `json:"refBefore,omitempty"`
	RefAfter  string `json:"refAfter,omitempty"`

	// Violation says why the run must not alter this. "" if it may.
	Violation string `json:"violation,omitempty"`
	// SideEffect says that git alters this file by itself, such as ORIG_HEAD; or
	// that the file only holds what index and reference differences say.
	SideEffect bool `json:"sideEffect,omitempty"`
}

type differenceJSON Difference

// MarshalJSON writes names that are not UTF-8 with escapes.
func (d Difference) MarshalJSON() ([]byte, error) {
	d.Path, d.GitDir = escapeName(d.Path), escapeName(d.GitDir)
	d.RefBefore, d.RefAfter = escapeName(d.RefBefore), escapeName(d.RefAfter)
	d.IndexBefore, d.IndexAfter = escapeIndex(d.IndexBefore, escapeName), escapeIndex(d.IndexAfter, escapeName)
	return json.Marshal(differenceJSON(d))
}

// UnmarshalJSON reads what MarshalJSON has written.
func (d *Difference) UnmarshalJSON(data []byte) error {
	if err := json.Unmarshal(data, (*differenceJSON)(d)); err != nil {
		return err
	}
	d.Path, d.GitDir = unescapeName(d.Path), unescapeName(d.GitDir)
	d.RefBefore, d.RefAfter = unescapeName(d.RefBefore), unescapeName(d.RefAfter)
	d.IndexBefore, d.IndexAfter = escapeIndex(d.IndexBefore, unescapeName), escapeIndex(d.IndexAfter, unescapeName)
	return nil
}

func escapeIndex(entries []IndexEntry, escape func(string) string) []IndexEntry {
	entries = slices.Clone(entries)
	for i := range entries {
		entries[i].Path = escape(entries[i].Path)
	}
	return entries
}

// Compare returns what differs, sorted. Times do not count; what git may alter
// without a meaning, such as the order of packed references, is a SideEffect.
func Compare(before, after *State) []Difference {
	var all []Difference
	relinked := newNames(before, after)
	entry := func(b, a *Entry) {
		d := Difference{Kind: EntryDiffers, Before: b, After: a}
		d.Path = cmp.Or(b, a).Path
		for _, state := range []*State{before, after} {
			if dir := state.gitDirOf(d.Path); dir != nil && len(dir.Path) > len(d.GitDir) {
				d.GitDir = dir.Path
			}
		}
		all = append(all, d)
	}
	b, a := before.Entries, after.Entries
	for len(b) > 0 || len(a) > 0 {
		switch {
		case len(a) == 0 || len(b) > 0 && b[0].Path < a[0].Path:
			entry(&b[0], nil)
			b = b[1:]
		case len(b) == 0 || a[0].Path < b[0].Path:
			entry(nil, &a[0])
			a = a[1:]
		default:
			if !b[0].same(a[0]) || relinked[a[0].Path] {
				entry(&b[0], &a[0])
			}
			b, a = b[1:], a[1:]
		}
	}
	for _, name := range gitDirPaths(before, after) {
		one, two := before.gitDir(name), after.gitDir(name)
		if one == nil {
			one = &GitDir{Path: name, WorkTree: two.WorkTree}
		}
		if two == nil {
			two = &GitDir{Path: name, WorkTree: one.WorkTree}
		}
		all = append(all, compareIndex(one, two)...)
		for _, ref := range sortedRefs(one.Refs, two.Refs) {
			if one.Refs[ref] != two.Refs[ref] {
				all = append(all, Difference{Kind: RefDiffers, Path: ref, GitDir: name, RefBefore: one.Refs[ref], RefAfter: two.Refs[ref]})
			}
		}
	}
	markSideEffects(all, before, after)
	slices.SortStableFunc(all, func(a, b Difference) int { return strings.Compare(a.Path, b.Path) })
	return all
}

func gitDirPaths(states ...*State) []string {
	var paths []string
	for _, state := range states {
		for _, dir := range state.GitDirs {
			paths = append(paths, dir.Path)
		}
	}
	slices.Sort(paths)
	return slices.Compact(paths)
}

func compareIndex(before, after *GitDir) []Difference {
	if before.indexErr != nil || after.indexErr != nil {
		return nil // the file's content is compared
	}
	type pair struct{ before, after []IndexEntry }
	pairs := map[string]*pair{}
	at := func(name string) *pair {
		if pairs[name] == nil {
			pairs[name] = &pair{}
		}
		return pairs[name]
	}
	known := map[indexKey]IndexEntry{}
	for _, e := range before.index {
		known[e.key()] = e
	}
	changed := map[string]bool{}
	seen := 0
	for _, e := range after.index {
		old, found := known[e.key()]
		if found {
			seen++
		}
		if !found || !old.same(e) {
			changed[e.Path] = true
		}
	}
	if seen < len(known) {
		left := map[indexKey]bool{}
		for _, e := range after.index {
			left[e.key()] = true
		}
		for key := range known {
			if !left[key] {
				changed[key.path] = true
			}
		}
	}
	if len(changed) == 0 {
		return nil
	}
	for _, e := range before.index {
		if changed[e.Path] {
			p := at(e.Path)
			p.before = append(p.before, e)
		}
	}
	for _, e := range after.index {
		if changed[e.Path] {
			p := at(e.Path)
			p.after = append(p.after, e)
		}
	}
	var all []Difference
	for name, p := range pairs {
		all = append(all, Difference{Kind: IndexDiffers, Path: path.Join(after.WorkTree, name), GitDir: after.Path, IndexBefore: p.before, IndexAfter: p.after})
	}
	slices.SortFunc(all, func(a, b Difference) int { return strings.Compare(a.Path, b.Path) })
	return all
}

// markSideEffects sets SideEffect.
func markSideEffects(all []Difference, before, after *State) {
	refs := map[string]bool{}
	for _, d := range all {
		if d.Kind == RefDiffers {
			refs[d.GitDir] = true
		}
	}
	for i := range all {
		d := &all[i]
		if d.Kind != EntryDiffers || d.GitDir == "" || d.Path == d.GitDir || before.gitDir(d.GitDir) == nil || after.gitDir(d.GitDir) == nil {
			continue
		}
		inside := strings.TrimPrefix(d.Path, d.GitDir+"/")
		first, _, _ := strings.Cut(inside, "/")
		plain := (d.Before == nil || d.Before.Kind == File) && (d.After == nil || d.After.Kind == File)
		folders := (d.Before == nil || d.Before.Kind == Folder) && (d.After == nil || d.After.Kind == Folder)
		switch {
		case folders && (first == "refs" || first == "logs") && (d.Before == nil || d.After == nil):
			d.SideEffect = true
		case first == "objects" && d.Before == nil && inside != "objects/info/alternates" && inside != "objects/info/http-alternates":
			d.SideEffect = true
		case !plain:
		case inside == "index":
			one, two := before.gitDir(d.GitDir), after.gitDir(d.GitDir)
			d.SideEffect = (one == nil || one.indexErr == nil) && (two == nil || two.indexErr == nil)
		case strings.HasPrefix(inside, "sharedindex."):
			d.SideEffect = true
		case first == "refs" || inside == "packed-refs" || inside == "HEAD":
			d.SideEffect = true
		case inside == "logs/refs/stash":
		case first == "logs":
			// The next lines of a log come with every command that sets a reference to
			// what it is.
			d.SideEffect = !refs[d.GitDir] && d.After != nil && (d.Before == nil || d.After.extends)
		default:
			d.SideEffect = slices.Contains(gitsOwn, inside) || strings.HasSuffix(inside, ".lock")
		}
	}
}

// gitsOwn are files of a git directory that git writes by itself, and that decide
// nothing.
var gitsOwn = []string{"ORIG_HEAD", "FETCH_HEAD", "COMMIT_EDITMSG", "gc.log", "gc.pid", "info/refs"}

// names are the paths of each file that has more than one, by filesystem and inode.
type names map[[2]uint64][]string

func namesOf(state *State) names {
	all := names{}
	for _, e := range state.Entries {
		if e.Kind == File && e.Names > 1 {
			key := [2]uint64{e.Filesystem, e.Inode}
			all[key] = append(all[key], e.Path)
		}
	}
	return all
}

// newNames returns the paths that name one file after, but did not before.
func newNames(before, after *State) map[string]bool {
	found := map[string]bool{}
	for _, group := range namesOf(after) {
		if len(group) < 2 {
			continue
		}
		for _, one := range group {
			old := before.find(one)
			if old == nil || old.Kind != File {
				continue
			}
			for _, two := range group {
				other := before.find(two)
				if one != two && (other == nil || other.Filesystem != old.Filesystem || other.Inode != old.Inode) {
					found[one] = true
				}
			}
		}
	}
	return found
}
