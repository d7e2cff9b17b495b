package change

import (
	"context"
	"slices"
	"strings"
)

// Permitted returns the differences that a run may make. The others were undone
// when they were found.
func Permitted(list []Difference) []Difference {
	return slices.DeleteFunc(slices.Clone(list), func(d Difference) bool { return d.Violation != "" || d.SideEffect })
}

// Missing returns the differences of a run that are not there now: their path is as
// it was before the run, because the run was rolled back.
func Missing(now *State, list []Difference) []Difference {
	var missing []Difference
	for _, d := range list {
		switch d.Kind {
		case EntryDiffers:
			if current := now.find(d.Path); sameEntry(current, d.Before) && !sameEntry(current, d.After) {
				missing = append(missing, d)
			}
		case IndexDiffers:
			if dir := now.gitDir(d.GitDir); dir != nil && dir.indexErr == nil && !sameIndex(indexOf(dir, d), d.IndexAfter) && sameIndex(indexOf(dir, d), d.IndexBefore) {
				missing = append(missing, d)
			}
		}
	}
	return missing
}

// indexOf returns the entries of the difference's path in an index.
func indexOf(dir *GitDir, d Difference) []IndexEntry {
	var entries []IndexEntry
	for _, e := range dir.index {
		if e.Path == pathInIndex(dir, d) {
			entries = append(entries, e)
		}
	}
	return entries
}

// pathInIndex is the difference's path as the index has it.
func pathInIndex(dir *GitDir, d Difference) string {
	if dir.WorkTree == "." || dir.WorkTree == "" {
		return d.Path
	}
	return strings.TrimPrefix(d.Path, dir.WorkTree+"/")
}

func sameIndex(a, b []IndexEntry) bool {
	return slices.EqualFunc(a, b, func(a, b IndexEntry) bool { return a.same(b) })
}

// Reapply makes the differences of a run again, as Missing returns them, of which
// now is the state as observed just now. It is the reverse of [Repository.Restore],
// and can be repeated after a kill like that. Files that were hard links of each
// other become files of their own.
//
// It returns the paths that it altered.
func (r *Repository) Reapply(ctx context.Context, now *State, list []Difference) ([]string, error) {
	after := *now
	after.Entries = slices.Clone(now.Entries)
	var entries []Difference
	indexes := map[string][]Difference{}
	for _, d := range list {
		switch d.Kind {
		case EntryDiffers:
			reverse := Difference{Kind: EntryDiffers, Path: d.Path, Before: d.After, After: d.Before}
			if d.After != nil {
				entry := *d.After
				entry.Names, entry.Filesystem, entry.Inode = 1, 0, 0 // another file may have the inode by now
				reverse.Before = &entry
			}
			after.put(d.Path, reverse.Before)
			entries = append(entries, reverse)
		case IndexDiffers:
			indexes[d.GitDir] = append(indexes[d.GitDir], d)
		}
	}
	x := &restoration{repository: r, before: &after, now: now, folders: r.folders(), fresh: map[[2]uint64]string{}}
	defer x.folders.close()
	if err := x.entries(ctx, entries); err != nil {
		return x.done, err
	}
	for name, list := range indexes {
		if err := x.reapplyIndex(ctx, name, list); err != nil {
			return x.done, err
		}
	}
	return x.done, nil
}

// put sets the entry of a path, or removes it for nil.
func (s *State) put(path string, entry *Entry) {
	at, found := slices.BinarySearchFunc(s.Entries, path, func(e Entry, path string) int { return strings.Compare(e.Path, path) })
	switch {
	case found && entry == nil:
		s.Entries = slices.Delete(s.Entries, at, at+1)
	case found:
		s.Entries[at] = *entry
	case entry != nil:
		s.Entries = slices.Insert(s.Entries, at, *entry)
	}
}

func (x *restoration) reapplyIndex(ctx context.Context, gitDir string, list []Difference) error {
	name := gitDir + "/index"
	now := x.now.gitDir(gitDir)
	if now == nil {
		return nil
	}
	if now.indexErr != nil {
		return x.failed(name, now.indexErr)
	}
	merged := slices.Clone(now.index)
	for _, d := range list {
		inside := pathInIndex(now, d)
		merged = slices.DeleteFunc(merged, func(e IndexEntry) bool { return e.Path == inside })
		merged = append(merged, d.IndexAfter...)
	}
	merged = withoutStaleStat(merged, now.index)
	if len(compareIndex(&GitDir{index: now.index}, &GitDir{index: merged})) == 0 {
		return nil
	}
	root, inside, err := x.folders.at(name)
	if err != nil {
		return x.failed(name, err)
	}
	data, err := formatIndex(merged, idBytes(x.repository.format))
	if err == nil {
		err = x.underLock(ctx, root, inside, data, x.now.find(name))
	}
	if err != nil {
		return x.failed(name, err)
	}
	x.done = append(x.done, name)
	return nil
}
