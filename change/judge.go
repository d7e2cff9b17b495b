package change

import (
	"path"
	"slices"
	"strings"
)

// Rules say what a run may alter.
type Rules struct {
	// Allowed says that a run may alter the file at a path of an entry.
	Allowed func(path string) bool
	// Own says that a path is written by the worker itself. May be nil for none.
	Own func(path string) bool
}

// Judge returns the differences between two states with Violation set for
// everything that a run must not alter. Side effects of git are no violations, and
// what the worker writes itself is left out.
//
// A link is judged by its own name, and never by what it points to.
func Judge(before, after *State, rules Rules) []Difference {
	all := Compare(before, after)
	if rules.Own != nil {
		all = slices.DeleteFunc(all, func(d Difference) bool { return d.Kind == EntryDiffers && rules.Own(d.Path) })
	}
	j := judgement{before: before, after: after, allowed: rules.Allowed, needed: map[string]bool{}}
	for _, state := range []*State{before, after} {
		for _, dir := range state.GitDirs {
			if dir.WorkTree != "" && dir.WorkTree != "." {
				j.repositories = append(j.repositories, dir.WorkTree)
			}
			for _, e := range dir.index {
				if dir.WorkTree == "." && e.Mode == gitlinkMode {
					j.submodules = append(j.submodules, e.Path)
				}
			}
		}
	}
	for i := range all {
		if d := &all[i]; d.Kind == EntryDiffers && !(isFolder(d.Before) && isFolder(d.After)) && !isNewFolder(d) {
			d.Violation = j.entry(d)
			j.need(d)
		}
	}
	for i := range all {
		switch d := &all[i]; {
		case d.Kind == IndexDiffers:
			d.Violation = j.index(d)
		case d.Kind == RefDiffers:
			d.Violation = "a reference of the repository"
		case isFolder(d.Before) && isFolder(d.After) || isNewFolder(d):
			d.Violation = j.folder(d)
		}
	}
	j.otherNames(all)
	return all
}

// Violations returns the differences that a run must not make.
func Violations(all []Difference) []Difference {
	var list []Difference
	for _, d := range all {
		if d.Violation != "" {
			list = append(list, d)
		}
	}
	return list
}

func isFolder(e *Entry) bool { return e != nil && e.Kind == Folder }

// isNewFolder says that a folder was made or removed where nothing else was.
func isNewFolder(d *Difference) bool {
	return d.Before == nil && isFolder(d.After) || d.After == nil && isFolder(d.Before)
}

type judgement struct {
	before, after *State
	allowed       func(string) bool
	// repositories and submodules are the work trees inside of this one.
	repositories, submodules []string
	// needed are the folders of allowed files that were made or removed.
	needed map[string]bool
}

// need notes the folders that an allowed new or removed file needs.
func (j *judgement) need(d *Difference) {
	if d.Violation != "" || d.GitDir != "" || d.Before != nil && d.After != nil {
		return
	}
	for dir := path.Dir(d.Path); dir != "." && dir != "/" && !j.needed[dir]; dir = path.Dir(dir) {
		j.needed[dir] = true
	}
}

// area returns why nothing at a path may be altered, "" if the allow-list decides.
func (j *judgement) area(at string) string {
	in := func(dir string) bool { return within(dir, at) }
	switch {
	case slices.ContainsFunc(strings.Split(at, "/"), isDotGit):
		return "in a git directory"
	case slices.ContainsFunc(j.submodules, in):
		return "in a submodule"
	case slices.ContainsFunc(j.repositories, in):
		return "in a repository inside of this one"
	}
	return ""
}

func (j *judgement) entry(d *Difference) string {
	if d.SideEffect {
		return ""
	}
	if d.GitDir != "" {
		return "in the git directory"
	}
	if why := j.area(d.Path); why != "" {
		return why
	}
	for _, e := range []*Entry{d.Before, d.After} {
		switch {
		case e == nil:
		case e.Kind != File && e.Kind != Link && e.Kind != Folder:
			return "a " + string(e.Kind)
		case e.Kind == File && e.Unread != "":
			return e.Unread
		}
	}
	switch {
	case !j.allowed(d.Path):
		return "not allow-listed"
	case d.After != nil && d.After.Kind == File && d.After.Mode&0o7000 != 0 && (d.Before == nil || d.Before.Mode&0o7000 != d.After.Mode&0o7000):
		return "gets a special permission bit"
	}
	return ""
}

func (j *judgement) folder(d *Difference) string {
	switch {
	case d.SideEffect:
		return ""
	case d.GitDir != "":
		return "in the git directory"
	case d.Before == nil || d.After == nil:
		if why := j.area(d.Path); why != "" {
			return why
		}
		if j.needed[d.Path] {
			return ""
		}
	}
	if why := j.area(d.Path); why != "" {
		return why
	}
	if j.allowed(d.Path) {
		return ""
	}
	return "a folder that is not allow-listed"
}

func (j *judgement) index(d *Difference) string {
	if dir := j.gitDir(d.GitDir); dir.WorkTree != "." {
		return "in the index of another work tree"
	}
	if slices.ContainsFunc(strings.Split(d.Path, "/"), isDotGit) {
		return "in a git directory"
	}
	before := map[int]IndexEntry{}
	for _, e := range d.IndexBefore {
		before[e.Stage] = e
		if e.Mode == gitlinkMode {
			return "a submodule in the index"
		}
	}
	for _, e := range d.IndexAfter {
		old := before[e.Stage]
		switch {
		case e.Mode == gitlinkMode:
			return "a submodule in the index"
		case e.AssumeUnchanged != old.AssumeUnchanged:
			return "assume-unchanged in the index"
		case e.SkipWorktree != old.SkipWorktree:
			return "skip-worktree in the index"
		}
	}
	for _, e := range d.IndexBefore {
		if (e.AssumeUnchanged || e.SkipWorktree) && len(d.IndexAfter) == 0 {
			return "the index hides changes of it"
		}
	}
	if !j.allowed(d.Path) {
		return "not allow-listed, but staged"
	}
	return ""
}

func (j *judgement) gitDir(name string) *GitDir {
	if dir := j.after.gitDir(name); dir != nil {
		return dir
	}
	return j.before.gitDir(name)
}

// otherNames finds allowed files that have another name which is not allowed: a
// hard link, or a path that some file systems take for the same.
func (j *judgement) otherNames(all []Difference) {
	groups := namesOf(j.after)
	var alias map[string][]string
	for i := range all {
		d := &all[i]
		if d.Kind != EntryDiffers || d.Violation != "" || d.SideEffect || d.GitDir != "" || d.After == nil {
			continue
		}
		if d.After.Kind == File && d.After.Names > 1 {
			group := groups[[2]uint64{d.After.Filesystem, d.After.Inode}]
			if uint64(len(group)) < d.After.Names {
				d.Violation = "the file has another name outside of the workspace"
				continue
			}
			for _, name := range group {
				if name != d.Path && (!j.allowed(name) || j.area(name) != "") {
					d.Violation = "the file has another name, " + name
				}
			}
		}
		if d.Before != nil {
			continue
		}
		if alias == nil {
			alias = map[string][]string{}
			for _, state := range []*State{j.before, j.after} {
				for _, e := range state.Entries {
					key := folded(e.Path)
					if !slices.Contains(alias[key], e.Path) {
						alias[key] = append(alias[key], e.Path)
					}
				}
			}
		}
		for _, name := range alias[folded(d.Path)] {
			if name != d.Path && !j.allowed(name) {
				d.Violation = "some file systems take its name for " + name
			}
		}
	}
}
