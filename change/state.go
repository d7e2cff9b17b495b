package change

import (
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// A Kind is what a name in a folder stands for.
type Kind string

const (
	File   Kind = "file"
	Link   Kind = "link" // symbolic
	Folder Kind = "folder"
	Pipe   Kind = "pipe"
	Socket Kind = "socket"
	Device Kind = "device"
)

// An Entry is one name in a folder, as it was at a moment.
type Entry struct {
	// Path is relative to the top of the work tree, "." for the top itself. A git
	// directory that lies elsewhere has absolute paths.
	Path string `json:"path"`
	Kind Kind   `json:"kind"`
	// Mode has the 12 permission bits.
	Mode uint32 `json:"mode"`
	Size int64  `json:"size,omitempty"`
	// Blob is the id of the content, of a file as it is on disk (without git's
	// filters), or of a link's target. It is "" for other kinds, and for a file
	// whose content was not read, see Unread.
	Blob string `json:"blob,omitempty"`
	// Unread says why the content was not read: it is too large, or may not be
	// read. Size and times stand for it then.
	Unread string `json:"unread,omitempty"`
	// Target is that of a link.
	Target string `json:"target,omitempty"`
	// Device is the number of a device.
	Device uint64 `json:"device,omitempty"`
	UID    int    `json:"uid"`
	GID    int    `json:"gid"`
	// ModTime and ChangeTime are in nanoseconds since 1970.
	ModTime    int64 `json:"mtime"`
	ChangeTime int64 `json:"ctime"`
	// Names of one file have the same Filesystem and Inode. Names is how many names
	// the file has, here and elsewhere.
	Filesystem uint64 `json:"dev"`
	Inode      uint64 `json:"ino"`
	Names      uint64 `json:"names,omitempty"`

	// extends says that the file begins with the content that it had in the state
	// which it was observed against.
	extends bool
	// text is the content of a file that names objects, such as HEAD.
	text string
}

// entryJSON has an Entry's fields without its methods.
type entryJSON Entry

// MarshalJSON writes names that are not UTF-8 with escapes.
func (e Entry) MarshalJSON() ([]byte, error) {
	e.Path, e.Target = escapeName(e.Path), escapeName(e.Target)
	return json.Marshal(entryJSON(e))
}

// UnmarshalJSON reads what MarshalJSON has written.
func (e *Entry) UnmarshalJSON(data []byte) error {
	if err := json.Unmarshal(data, (*entryJSON)(e)); err != nil {
		return err
	}
	e.Path, e.Target = unescapeName(e.Path), unescapeName(e.Target)
	return nil
}

// escapeName writes bytes that JSON cannot hold, and the percent sign, as %XX.
func escapeName(name string) string {
	if utf8.ValidString(name) && !strings.Contains(name, "%") {
		return name
	}
	var out strings.Builder
	for len(name) > 0 {
		r, size := utf8.DecodeRuneInString(name)
		if r == '%' || r == utf8.RuneError && size == 1 {
			fmt.Fprintf(&out, "%%%02X", name[0])
		} else {
			out.WriteString(name[:size])
		}
		name = name[size:]
	}
	return out.String()
}

func unescapeName(name string) string {
	if !strings.Contains(name, "%") {
		return name
	}
	var out strings.Builder
	for i := 0; i < len(name); i++ {
		var b byte
		if name[i] == '%' && i+2 < len(name) {
			if _, err := fmt.Sscanf(name[i+1:i+3], "%02X", &b); err == nil {
				out.WriteByte(b)
				i += 2
				continue
			}
		}
		out.WriteByte(name[i])
	}
	return out.String()
}

// same says that nobody has changed what the name stands for. Times and inodes do
// not count, and neither does the size of a folder.
func (e Entry) same(other Entry) bool {
	if e.Kind != other.Kind || e.Mode != other.Mode || e.UID != other.UID || e.GID != other.GID {
		return false
	}
	switch e.Kind {
	case File:
		if e.Unread != "" || other.Unread != "" {
			return e.Size == other.Size && e.ModTime == other.ModTime && e.ChangeTime == other.ChangeTime
		}
		return e.Blob == other.Blob
	case Link:
		return e.Target == other.Target
	case Device:
		return e.Device == other.Device
	}
	return true
}

// A GitDir is the git directory of a repository, or of a linked work tree.
type GitDir struct {
	// Path is that of its Entry.
	Path string `json:"path"`
	// WorkTree is the path of the work tree that its index describes: "." for the
	// top. "" if it is not known.
	WorkTree string `json:"workTree"`
	// Refs has the value of each reference, HEAD included: an object id, or
	// "ref: " and the name of another. Those of this package are left out.
	Refs map[string]string `json:"refs"`

	index []IndexEntry
	// indexTree is the tree that the index makes, "" if it does not say so.
	indexTree string
	// indexErr says why there is no index to compare, nil if there is one.
	indexErr error
}

// gitDirJSON has a GitDir's fields without its methods.
type gitDirJSON GitDir

// MarshalJSON writes names that are not UTF-8 with escapes.
func (d GitDir) MarshalJSON() ([]byte, error) {
	return json.Marshal(gitDirJSON(d.withNames(escapeName)))
}

// UnmarshalJSON reads what MarshalJSON has written.
func (d *GitDir) UnmarshalJSON(data []byte) error {
	if err := json.Unmarshal(data, (*gitDirJSON)(d)); err != nil {
		return err
	}
	*d = d.withNames(unescapeName)
	return nil
}

// withNames returns a copy with other names, as change gives them.
func (d GitDir) withNames(change func(string) string) GitDir {
	d.Path, d.WorkTree = change(d.Path), change(d.WorkTree)
	refs := make(map[string]string, len(d.Refs))
	for name, value := range d.Refs {
		refs[change(name)] = change(value)
	}
	d.Refs = refs
	return d
}

// A State is a repository at a moment: its work tree, its git directory, and those
// of repositories inside.
type State struct {
	Version int       `json:"version"`
	TakenAt time.Time `json:"takenAt"`
	// Top is the absolute path of the work tree.
	Top string `json:"top"`
	// Format is the repository's object format, sha1 or sha256.
	Format string `json:"format"`
	// Tree is the id of the git tree that has the work tree's files. "" if the
	// state was only observed.
	Tree string `json:"tree,omitempty"`
	// Entries are sorted by path.
	Entries []Entry  `json:"entries"`
	GitDirs []GitDir `json:"gitDirs"`
}

// stateVersion is the version of State's JSON.
const stateVersion = 1

// find returns the entry of a path, nil for none.
func (s *State) find(path string) *Entry {
	if s == nil {
		return nil
	}
	at, found := slices.BinarySearchFunc(s.Entries, path, func(e Entry, path string) int { return strings.Compare(e.Path, path) })
	if !found {
		return nil
	}
	return &s.Entries[at]
}

// Find returns the entry of a path, nil for none.
func (s *State) Find(path string) *Entry { return s.find(path) }

// gitDir returns the git directory of that path, nil for none.
func (s *State) gitDir(path string) *GitDir {
	for i := range s.GitDirs {
		if s.GitDirs[i].Path == path {
			return &s.GitDirs[i]
		}
	}
	return nil
}

// Head returns what HEAD of the top repository is: an object id, or "ref: " and a
// name.
func (s *State) Head() string {
	for _, dir := range s.GitDirs {
		if dir.WorkTree == "." {
			return dir.Refs["HEAD"]
		}
	}
	return ""
}

// Unread lists the files whose content is too large to be kept, sorted.
func (s *State) Unread() []string {
	var list []string
	for _, e := range s.Entries {
		if e.Unread == tooLarge {
			list = append(list, e.Path)
		}
	}
	return list
}

// sortedRefs returns the names of both maps.
func sortedRefs(a, b map[string]string) []string {
	names := map[string]bool{}
	for name := range a {
		names[name] = true
	}
	for name := range b {
		names[name] = true
	}
	return slices.Sorted(maps.Keys(names))
}

// within says whether path is dir or lies in it. Both are paths of entries.
func within(dir, path string) bool {
	if dir == "." {
		return !filepath.IsAbs(path)
	}
	return path == dir || strings.HasPrefix(path, dir+"/")
}

// idBytes is the length of object ids in bytes.
func idBytes(format string) int {
	if format == "sha256" {
		return 32
	}
	return 20
}

// Tracks returns a function that says whether git tracks the file at a path, or a
// file in the folder at it.
func (s *State) Tracks() func(path string) bool {
	tracked := map[string]bool{}
	for at := range s.tracked() {
		for ; at != "." && at != "/" && !tracked[at]; at = path.Dir(at) {
			tracked[at] = true
		}
	}
	return func(path string) bool { return tracked[path] }
}

// IsRepository says that a path is the work tree of a submodule, or of another
// repository inside of this one, or lies in one.
func (s *State) IsRepository(path string) bool {
	for _, dir := range s.GitDirs {
		if dir.WorkTree != "" && dir.WorkTree != "." && within(dir.WorkTree, path) {
			return true
		}
		for _, e := range dir.index {
			if dir.WorkTree == "." && e.Mode == gitlinkMode && within(e.Path, path) {
				return true
			}
		}
	}
	return false
}
