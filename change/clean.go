package change

import (
	"context"
	"encoding/binary"
	"path/filepath"
	"strings"
)

// Cleanness is what a state shows about git's lists of changes, without git. false
// means that git has to be asked.
type Cleanness struct {
	// Tracked says that git diff HEAD, git diff and git diff --cached list nothing.
	Tracked bool
	// Untracked says that git ls-files --others lists nothing.
	Untracked bool
}

// Clean says what is certain about git's lists. It decides as git does: a file is as
// in the index if inode, size and times are, and the index is as HEAD if it says that
// it has HEAD's tree. isArtifact says of paths on disk that they do not count.
func (r *Repository) Clean(ctx context.Context, state *State, isArtifact func(path string) bool) Cleanness {
	var git *GitDir
	for i := range state.GitDirs {
		switch dir := &state.GitDirs[i]; dir.WorkTree {
		case "":
		case ".":
			git = dir
		default:
			return Cleanness{} // another repository inside of this one
		}
	}
	if git == nil || git.indexErr != nil {
		return Cleanness{}
	}
	for i := range state.GitDirs {
		for name := range state.GitDirs[i].Refs {
			if strings.HasPrefix(name, "refs/replace/") {
				return Cleanness{} // git reads other objects than those that are named
			}
		}
	}
	known := make(map[string]*IndexEntry, len(git.index))
	for i := range git.index {
		known[git.index[i].Path] = &git.index[i]
	}
	file := state.find(git.Path + "/index")
	clean := Cleanness{Tracked: len(known) == len(git.index) && r.indexIsHead(ctx, state, git), Untracked: true}
	found := 0
	for i := range state.Entries {
		e := &state.Entries[i]
		if e.Kind == Folder && e.Unread != "" {
			clean.Untracked = false
		}
		if e.Kind == Folder || filepath.IsAbs(e.Path) || state.gitDirOf(e.Path) != nil {
			continue
		}
		entry := known[e.Path]
		switch {
		case entry != nil:
			found++
			clean.Tracked = clean.Tracked && file != nil && entry.isUnchanged(e, file)
		case e.Kind != File && e.Kind != Link, isArtifact(r.absolute(e.Path)):
			// git lists neither pipes nor the like
		default:
			clean.Untracked = false
		}
	}
	clean.Tracked = clean.Tracked && found == len(git.index)
	return clean
}

// isUnchanged says that git takes a file for unchanged without reading it: the index
// has its inode, size and times, and was written later. A file that was written in the
// same moment as the index could have changed without a trace.
func (e *IndexEntry) isUnchanged(file, index *Entry) bool {
	if e.Stage != 0 || e.AssumeUnchanged || e.SkipWorktree || e.IntentToAdd || e.Mode == gitlinkMode || e.Mode != gitMode(file) {
		return false
	}
	stat := func(i int) int64 { return int64(binary.BigEndian.Uint32(e.stat[4*i:])) }
	time := func(i int) int64 { return stat(i)*1e9 + stat(i+1) }
	const bits = 1<<32 - 1
	size := file.Size
	if file.Kind == Link {
		size = int64(len(file.Target))
	}
	if size == 0 && e.ID != file.Blob {
		return false // git's sign for a file that it must read
	}
	return time(0) == file.ChangeTime && time(2) == file.ModTime && stat(5) == int64(file.Inode&bits) &&
		stat(6) == int64(file.UID) && stat(7) == int64(file.GID) && stat(8) == size&bits && size < bits &&
		file.ModTime < index.ModTime && file.ChangeTime < index.ModTime
}

// gitMode is the mode that an index has for a file or link.
func gitMode(e *Entry) uint32 {
	switch {
	case e.Kind == Link:
		return 0o120000
	case e.Mode&0o100 != 0:
		return 0o100755
	}
	return 0o100644
}

// indexIsHead says that the index certainly has what the commit of HEAD has.
func (r *Repository) indexIsHead(ctx context.Context, state *State, git *GitDir) bool {
	head := git.Refs["HEAD"]
	if name, isName := strings.CutPrefix(head, "ref: "); isName {
		head = ""
		for i := range state.GitDirs { // branches are in the shared one
			if id := state.GitDirs[i].Refs[name]; id != "" && r.absolute(state.GitDirs[i].Path) == r.commonDir {
				head = id
			}
		}
	}
	if len(head) != 2*idBytes(r.format) {
		return false
	}
	tree, err := r.options.Answers.treeOf(head, func() (string, error) { return r.readTreeOf(ctx, head) })
	if err != nil {
		return false
	}
	if len(git.index) == 0 {
		return tree == objectID(r.format, "tree", nil)
	}
	return git.indexTree != "" && git.indexTree == tree
}

// readTreeOf returns the tree of a commit.
func (r *Repository) readTreeOf(ctx context.Context, commit string) (string, error) {
	if tree, err := r.commitTree(commit); err == nil {
		return tree, nil
	}
	return r.output(ctx, r.Top, "rev-parse", "--verify", "--quiet", commit+"^{tree}")
}
