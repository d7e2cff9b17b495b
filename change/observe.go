package change

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// racyTime is how long before the observation a file must have changed last so
// that equal times prove equal content. The kernel's clock for files has steps, of
// up to two seconds on some file systems.
const racyTime = 2 * time.Second

// maxText bounds what is read of files that name objects.
const maxText = 64 << 20

// Observe returns the state of the repository now. It stores nothing.
//
// base, if given, is an earlier state: files whose inode, size and times of
// content and inode are those of base are not read again. That is safe, since no
// program can set a file's ctime.
func (r *Repository) Observe(ctx context.Context, base *State) (*State, error) {
	w := &walk{
		repository: r, base: base, folders: r.folders(),
		state: &State{Version: stateVersion, TakenAt: time.Now().UTC(), Top: r.Top, Format: r.format},
	}
	defer w.folders.close()
	w.folders.roots = r.roots()
	for _, root := range w.folders.roots {
		path := r.entryPath(root)
		handle, _, err := w.folders.at(path)
		if err != nil {
			return nil, fmt.Errorf("%s cannot be read: %w", root, err)
		}
		info, err := handle.Lstat(".")
		if err != nil {
			return nil, fmt.Errorf("%s cannot be read: %w", root, err)
		}
		w.add(path, info, "")
		area := workArea
		if root == r.commonDir || root == r.gitDir {
			area = w.gitDir(path, w.workTreeOf(root))
		}
		if err := w.folder(ctx, handle, path, area); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(w.state.Entries, func(a, b Entry) int { return strings.Compare(a.Path, b.Path) })
	if err := w.readIndexes(ctx); err != nil {
		return nil, err
	}
	if err := w.readFiles(ctx); err != nil {
		return nil, err
	}
	w.readRefs()
	return w.state, nil
}

// Why an Entry is Unread.
const (
	mayNotBeRead = "not readable for this user"
	tooLarge     = "too large to be kept"
)

// area says how the names in a folder are treated.
type area struct {
	// git is the path of the git directory that the folder lies in, "" for none.
	git string
	// inside is the folder's path in it.
	inside string
	// nested says that the git directory is one of the work tree's folders, which
	// can be removed with all its objects: those are part of the state.
	nested bool
}

var workArea = area{}

type walk struct {
	repository *Repository
	base       *State
	folders    *folders
	state      *State
}

// workTreeOf returns the WorkTree of the repository's own git directory.
func (w *walk) workTreeOf(dir string) string {
	if dir == w.repository.gitDir {
		return "."
	}
	return "" // of other linked work trees
}

// gitDir adds a git directory.
func (w *walk) gitDir(path, workTree string) area {
	w.state.GitDirs = append(w.state.GitDirs, GitDir{Path: path, WorkTree: workTree, Refs: map[string]string{}})
	return area{git: path}
}

// isExcluded says that an absolute path is not part of the state.
func (w *walk) isExcluded(path string) bool {
	options := w.repository.options
	return options.Excluded != nil && options.Excluded(path) && !slices.ContainsFunc(options.Include, func(dir string) bool {
		return Below(dir, path) || Below(path, dir) // in it, or on the way to it
	})
}

// folder adds all names in a folder, and in those below.
func (w *walk) folder(ctx context.Context, handle *os.Root, at string, where area) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	list, err := handle.Open(".")
	if errors.Is(err, fs.ErrPermission) {
		w.state.Entries[len(w.state.Entries)-1].Unread = mayNotBeRead
		return nil
	}
	if err != nil {
		return w.unreadable(at, err)
	}
	names, err := list.Readdirnames(-1)
	_ = list.Close()
	if err != nil {
		return w.unreadable(at, err)
	}
	for _, name := range names {
		child := name
		if at != "." {
			child = at + "/" + name
		}
		if where.git != "" && skippedInGit(path.Join(where.inside, name), where.nested) || w.isExcluded(w.repository.absolute(child)) {
			continue
		}
		info, err := handle.Lstat(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return w.unreadable(child, err)
		}
		target := ""
		if info.Mode()&fs.ModeSymlink != 0 {
			if target, err = handle.Readlink(name); err != nil {
				if errors.Is(err, fs.ErrNotExist) {
					continue
				}
				return w.unreadable(child, err)
			}
		}
		w.add(child, info, target)
		if !info.IsDir() {
			continue
		}
		inner, err := handle.OpenRoot(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if errors.Is(err, fs.ErrPermission) {
			// The data of a service, for instance. This user cannot alter it either.
			w.state.Entries[len(w.state.Entries)-1].Unread = mayNotBeRead
			continue
		}
		if err != nil {
			return w.unreadable(child, err)
		}
		err = w.folder(ctx, inner, child, w.areaOf(inner, child, name, at, where))
		_ = inner.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// areaOf returns the area of a folder's content.
func (w *walk) areaOf(handle *os.Root, at, name, parent string, where area) area {
	absolute := w.repository.absolute(at)
	switch {
	case absolute == w.repository.gitDir || absolute == w.repository.commonDir:
		return w.gitDir(at, w.workTreeOf(absolute))
	case where.git == "" && name == ".git" && isGitDir(handle):
		nested := w.gitDir(at, parent)
		nested.nested = true
		return nested
	case where.git == "":
		return workArea
	}
	inside := path.Join(where.inside, name)
	if first, rest, deeper := strings.Cut(inside, "/"); deeper && (first == "modules" && isGitDir(handle) || first == "worktrees" && !strings.Contains(rest, "/")) {
		module := w.gitDir(at, w.workTreeNamed(at, handle))
		module.nested = where.nested
		return module
	}
	return area{git: where.git, inside: inside, nested: where.nested}
}

// workTreeNamed returns the path of the work tree of a submodule's git directory:
// the folder whose file .git names it. "" if there is none in the state.
func (w *walk) workTreeNamed(at string, handle *os.Root) string {
	config, err := handle.ReadFile("config")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(config)) {
		key, value, _ := strings.Cut(line, "=")
		if strings.TrimSpace(key) != "worktree" {
			continue
		}
		value = strings.Trim(strings.TrimSpace(value), `"`)
		if !filepath.IsAbs(value) {
			value = filepath.Join(w.repository.absolute(at), value)
		}
		if relative := w.repository.entryPath(value); !filepath.IsAbs(relative) {
			return relative
		}
	}
	return ""
}

// isGitDir says that a folder is a git directory, as git decides it.
func isGitDir(handle *os.Root) bool {
	objects, err := handle.Stat("objects")
	if err != nil || !objects.IsDir() {
		return false
	}
	refs, err := handle.Stat("refs")
	if err != nil || !refs.IsDir() {
		return false
	}
	_, err = handle.Lstat("HEAD")
	return err == nil
}

// skippedInGit says which names of a git directory are no part of a state. inside
// is the path in it.
func skippedInGit(inside string, nested bool) bool {
	first, rest, _ := strings.Cut(inside, "/")
	switch first {
	case "objects":
		// Objects are only ever added. What decides where git finds more of them
		// counts.
		return !nested && rest != "" && rest != "info" && rest != "info/alternates" && rest != "info/http-alternates"
	case "lfs":
		return true
	case "refs", "logs":
		return strings.HasPrefix(strings.TrimPrefix(inside, "logs/"), "refs/mm-orchestrator")
	}
	return strings.HasPrefix(first, "fsmonitor--daemon")
}

func (w *walk) unreadable(at string, err error) error {
	return fmt.Errorf("%s cannot be read, so that it could not be brought back: %w", w.repository.absolute(at), err)
}

func (w *walk) add(at string, info fs.FileInfo, target string) {
	e := Entry{Path: at, Kind: File, Mode: permissions(info.Mode()), ModTime: info.ModTime().UnixNano(), Target: target}
	if stat, known := info.Sys().(*syscall.Stat_t); known {
		e.UID, e.GID = int(stat.Uid), int(stat.Gid)
		e.ChangeTime = changeTime(stat)
		e.Filesystem, e.Inode, e.Names = uint64(stat.Dev), stat.Ino, uint64(stat.Nlink)
		e.Device = uint64(stat.Rdev)
	}
	switch mode := info.Mode(); {
	case mode.IsDir():
		e.Kind, e.Names = Folder, 0
	case mode&fs.ModeSymlink != 0:
		e.Kind = Link
	case mode&fs.ModeNamedPipe != 0:
		e.Kind = Pipe
	case mode&fs.ModeSocket != 0:
		e.Kind = Socket
	case mode&(fs.ModeDevice|fs.ModeIrregular) != 0:
		e.Kind = Device
	default:
		e.Size = info.Size()
	}
	if e.Kind != Device {
		e.Device = 0
	} else if info.Mode()&fs.ModeCharDevice != 0 {
		e.Target = "character"
	}
	if e.Kind == Link {
		e.Mode = 0o777 // of no meaning, and not the same on every system
		e.Blob = objectID(w.repository.format, "blob", []byte(target))
	}
	w.state.Entries = append(w.state.Entries, e)
}

// permissions returns the 12 permission bits as the system has them.
func permissions(mode fs.FileMode) uint32 {
	bits := uint32(mode.Perm())
	for _, special := range []struct {
		mode fs.FileMode
		bit  uint32
	}{{fs.ModeSetuid, 0o4000}, {fs.ModeSetgid, 0o2000}, {fs.ModeSticky, 0o1000}} {
		if mode&special.mode != 0 {
			bits |= special.bit
		}
	}
	return bits
}

// readIndexes parses the index of each git directory.
func (w *walk) readIndexes(ctx context.Context) error {
	for i := range w.state.GitDirs {
		dir := &w.state.GitDirs[i]
		name := dir.Path + "/index"
		if w.state.find(name) == nil {
			continue
		}
		root, inside, err := w.folders.at(name)
		if err != nil {
			return w.unreadable(name, err)
		}
		data, err := root.ReadFile(inside)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return w.unreadable(name, err)
		}
		w.repository.setIndex(ctx, dir, data)
	}
	return nil
}

// setIndex parses the index of a git directory.
func (r *Repository) setIndex(ctx context.Context, dir *GitDir, data []byte) {
	dir.index, dir.indexTree, dir.indexErr = parseIndexTree(data, idBytes(r.format))
	if errors.Is(dir.indexErr, errJoinIndex) {
		dir.index, dir.indexErr = r.joinIndex(ctx, dir.Path, data)
	}
}

// joinIndex reads an index that is split or sparse: it has git write a copy that is
// neither.
func (r *Repository) joinIndex(ctx context.Context, gitDir string, data []byte) ([]IndexEntry, error) {
	gitDir = r.absolute(gitDir)
	// In the git directory, because the second file is searched beside the first.
	copied, err := os.CreateTemp(gitDir, "mm-orchestrator-index-*.lock")
	if err != nil {
		return nil, err
	}
	defer os.Remove(copied.Name())
	_, err = copied.Write(data)
	if closed := copied.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return nil, err
	}
	err = r.run(ctx, GitCommand{Dir: gitDir, Args: []string{"-c", "index.sparse=false", "--git-dir=" + gitDir, "--work-tree=" + gitDir, "update-index", "--no-split-index", "--force-write-index"}, Env: []string{"GIT_INDEX_FILE=" + copied.Name()}})
	if err != nil {
		return nil, err
	}
	if data, err = os.ReadFile(copied.Name()); err != nil {
		return nil, err
	}
	return parseIndex(data, idBytes(r.format))
}

// tracked returns the paths that git tracks.
func (s *State) tracked() map[string]bool {
	tracked := map[string]bool{}
	for _, dir := range s.GitDirs {
		if dir.WorkTree == "" {
			continue
		}
		for _, e := range dir.index {
			tracked[path.Join(dir.WorkTree, e.Path)] = true
		}
	}
	return tracked
}

// readFiles reads the content of all files that may have changed since base.
func (w *walk) readFiles(ctx context.Context) error {
	tracked := w.state.tracked()
	var kept int64
	for i := range w.state.Entries {
		e := &w.state.Entries[i]
		if e.Kind != File {
			continue
		}
		if i%256 == 0 && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		gitDir := w.state.gitDirOf(e.Path)
		inGit := gitDir != nil
		if !tracked[e.Path] && (!inGit || strings.HasPrefix(e.Path, gitDir.Path+"/objects/")) {
			if e.Size > w.repository.options.MaxFile || kept+e.Size > w.repository.options.MaxFiles {
				e.Unread = tooLarge
				continue
			}
			kept += e.Size
		}
		base := w.base.find(e.Path)
		if base != nil && base.Kind == File && base.Blob != "" && base.Size == e.Size && base.Inode == e.Inode && base.Filesystem == e.Filesystem &&
			base.ModTime == e.ModTime && e.ChangeTime != 0 && base.ChangeTime == e.ChangeTime && base.ChangeTime < w.base.TakenAt.Add(-racyTime).UnixNano() {
			e.Blob = base.Blob
			if !inGit || !namesObjects(e.Path) {
				continue
			}
		}
		if err := w.readFile(e, base, inGit); err != nil {
			return err
		}
	}
	w.state.Entries = slices.DeleteFunc(w.state.Entries, func(e Entry) bool { return e.Kind == File && e.Blob == "" && e.Unread == "" })
	return nil
}

// readFile reads one file. If it is gone, its Blob stays "".
func (w *walk) readFile(e, base *Entry, inGit bool) error {
	root, name, err := w.folders.at(e.Path)
	if err != nil {
		return w.unreadable(e.Path, err)
	}
	for attempt := 0; ; attempt++ {
		file, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case errors.Is(err, fs.ErrPermission):
			e.Unread = mayNotBeRead
			return nil
		case err != nil:
			return w.unreadable(e.Path, err)
		}
		err = w.readOpen(e, base, inGit, file)
		_ = file.Close()
		if !errors.Is(err, errChanging) || attempt == 5 {
			if err != nil {
				return w.unreadable(e.Path, err)
			}
			return nil
		}
	}
}

func (w *walk) readOpen(e, base *Entry, inGit bool, file *os.File) error {
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return errors.New("it is replaced by another kind of file while it is read")
	}
	if stat, known := info.Sys().(*syscall.Stat_t); known {
		e.Inode, e.Names, e.ChangeTime = stat.Ino, uint64(stat.Nlink), changeTime(stat)
	}
	e.Size, e.ModTime, e.Mode = info.Size(), info.ModTime().UnixNano(), permissions(info.Mode())
	if inGit && namesObjects(e.Path) && e.Size <= maxText {
		content, err := io.ReadAll(io.LimitReader(file, e.Size+1))
		if err != nil {
			return err
		}
		if int64(len(content)) != e.Size {
			return errChanging
		}
		e.text = string(content)
		e.Blob = objectID(w.repository.format, "blob", content)
		return nil
	}
	if inGit && base != nil && base.Kind == File && base.Size < e.Size {
		id, err := hashBlob(w.repository.format, io.NewSectionReader(file, 0, base.Size), base.Size)
		if err != nil {
			return err
		}
		e.extends = id == base.Blob
	}
	e.Blob, err = hashBlob(w.repository.format, file, e.Size)
	return err
}

// gitDirOf returns the git directory that a path lies in, the innermost one; nil
// for none.
func (s *State) gitDirOf(at string) *GitDir {
	var found *GitDir
	for i := range s.GitDirs {
		if dir := &s.GitDirs[i]; within(dir.Path, at) && (found == nil || len(dir.Path) > len(found.Path)) {
			found = dir
		}
	}
	return found
}

// namesObjects says that a file of a git directory has references.
func namesObjects(at string) bool {
	return strings.Contains(at, "/refs/") && !strings.Contains(at, "/logs/refs/") || strings.HasSuffix(at, "/packed-refs") || strings.HasSuffix(at, "/HEAD") && !strings.Contains(at, "/logs/")
}

// readRefs sets the references of each git directory, from what readFiles has read.
func (w *walk) readRefs() {
	for i := range w.state.GitDirs {
		dir := &w.state.GitDirs[i]
		if packed := w.state.find(dir.Path + "/packed-refs"); packed != nil {
			for line := range strings.Lines(packed.text) {
				id, name, given := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
				if given && !strings.HasPrefix(line, "#") && !strings.HasPrefix(line, "^") && !strings.HasPrefix(name, "refs/mm-orchestrator/") {
					dir.Refs[name] = id
				}
			}
		}
	}
	for _, e := range w.state.Entries {
		if e.Kind != File && e.Kind != Link || !namesObjects(e.Path) {
			continue
		}
		dir := w.state.gitDirOf(e.Path)
		if dir == nil {
			continue
		}
		name := strings.TrimPrefix(e.Path, dir.Path+"/")
		switch {
		case name != "HEAD" && !strings.HasPrefix(name, "refs/") || strings.HasSuffix(name, ".lock"):
		case e.Kind == Link:
			dir.Refs[name] = "ref: " + e.Target
		default:
			dir.Refs[name] = strings.TrimSpace(e.text)
		}
	}
}
