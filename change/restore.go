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

// A file is written under a temporary name and renamed. After a kill, the next
// Restore removes what is left of this name.
const temporaryPrefix = ".mm-orchestrator-restore-"

// syncLimit is how many files at most are forced to the disk one by one.
const syncLimit = 200

// Restore brings what differs back to what it was before, and nothing else. now is
// the state as observed just now.
//
//   - It can be repeated after a kill at any point: what is as before already is
//     left alone.
//   - It follows no link, and writes to nothing outside of the repository.
//   - What others have altered since the run did is overwritten: see Foreign and
//     SetAside. Files that git writes by itself are left alone then.
//
// It returns the paths and references that it altered.
func (r *Repository) Restore(ctx context.Context, before, now *State, list []Difference) ([]string, error) {
	x := &restoration{repository: r, before: before, now: now, folders: r.folders(), fresh: map[[2]uint64]string{}}
	defer x.folders.close()
	var entries []Difference
	indexes, refs := map[string][]Difference{}, map[string][]Difference{}
	for _, d := range list {
		switch {
		case d.Kind == IndexDiffers:
			indexes[d.GitDir] = append(indexes[d.GitDir], d)
		case d.Kind == RefDiffers:
			refs[d.GitDir] = append(refs[d.GitDir], d)
		case d.SideEffect && r.isRaw(&d):
			// Comes with the index and the references.
		case d.SideEffect && !sameEntry(now.find(d.Path), d.After):
			// Written by another git since.
		default:
			entries = append(entries, d)
		}
	}
	for _, dir := range gitDirPaths(before, now) {
		if len(refs[dir]) > 0 {
			more, err := x.refs(ctx, dir, refs[dir])
			if err != nil {
				return x.done, err
			}
			entries = append(entries, more...)
		}
	}
	if err := x.entries(ctx, entries); err != nil {
		return x.done, err
	}
	// Last: a git that runs meanwhile would write what it finds of the files into
	// the index.
	for _, dir := range gitDirPaths(before, now) {
		if len(indexes[dir]) > 0 {
			if err := x.index(ctx, dir, indexes[dir]); err != nil {
				return x.done, err
			}
		}
	}
	return x.done, nil
}

// isRaw says that an entry only holds an index or references.
func (r *Repository) isRaw(d *Difference) bool {
	inside := strings.TrimPrefix(d.Path, d.GitDir+"/")
	return inside == "index" || strings.HasPrefix(inside, "sharedindex.") || inside == "packed-refs" || inside == "HEAD" || strings.HasPrefix(inside, "refs/")
}

func sameEntry(a, b *Entry) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.same(*b)
}

// Foreign returns the differences whose path is now neither as before the run nor
// as after it: somebody else has altered it since.
func Foreign(now *State, list []Difference) []Difference {
	var foreign []Difference
	for _, d := range list {
		if d.Kind != EntryDiffers || d.SideEffect || isFolder(d.Before) && isFolder(now.find(d.Path)) {
			continue
		}
		if current := now.find(d.Path); !sameEntry(current, d.Before) && !sameEntry(current, d.After) {
			foreign = append(foreign, d)
		}
	}
	return foreign
}

// Remaining returns those of the differences that are not as before now.
func Remaining(before, now *State, list []Difference) []Difference {
	type key struct {
		kind         DifferenceKind
		path, gitDir string
	}
	left := map[key]bool{}
	for _, d := range Compare(before, now) {
		if !d.SideEffect {
			left[key{d.Kind, d.Path, d.GitDir}] = true
		}
	}
	var remaining []Difference
	for _, d := range list {
		if left[key{d.Kind, d.Path, d.GitDir}] {
			remaining = append(remaining, d)
		}
	}
	return remaining
}

type restoration struct {
	repository  *Repository
	before, now *State
	folders     *folders
	done        []string
	// fresh has a restored path for each file that has several names, by filesystem
	// and inode of before.
	fresh map[[2]uint64]string
}

func (x *restoration) failed(at string, err error) error {
	return fmt.Errorf("%s cannot be restored: %w", x.repository.absolute(at), err)
}

// entries restores names in folders.
func (x *restoration) entries(ctx context.Context, list []Difference) error {
	var todo []Difference
	for _, d := range list {
		if !sameEntry(x.now.find(d.Path), d.Before) || x.unlinked(d.Before) {
			todo = append(todo, d)
		}
	}
	slices.SortStableFunc(todo, func(a, b Difference) int { return strings.Compare(a.Path, b.Path) })
	todo = slices.CompactFunc(todo, func(a, b Difference) bool { return a.Path == b.Path })
	if err := x.makeUsable(todo); err != nil {
		return err
	}
	for _, d := range slices.Backward(todo) {
		current := x.now.find(d.Path)
		if current == nil || d.Before != nil && d.Before.Kind == current.Kind {
			continue
		}
		if err := x.remove(d, current); err != nil {
			return x.failed(d.Path, err)
		}
	}
	var contents []Difference
	for _, d := range todo {
		if d.Before == nil {
			continue
		}
		hasContent, err := x.make(d.Path, d.Before)
		if err != nil {
			return x.failed(d.Path, err)
		}
		if hasContent {
			contents = append(contents, d)
		}
	}
	if err := x.contents(ctx, contents); err != nil {
		return err
	}
	for _, d := range slices.Backward(todo) {
		if d.Before == nil {
			continue
		}
		if err := x.attributes(d.Path, d.Before); err != nil {
			return x.failed(d.Path, err)
		}
	}
	for _, d := range todo {
		x.done = append(x.done, d.Path)
	}
	return nil
}

// unlinked says that the file of an entry had other names, and the entry's path is
// no longer one of them.
func (x *restoration) unlinked(e *Entry) bool {
	if e == nil || e.Kind != File || e.Names < 2 {
		return false
	}
	current := x.now.find(e.Path)
	return current != nil && (current.Inode != e.Inode || current.Filesystem != e.Filesystem) && len(x.group(e)) > 1
}

// group returns all paths of the file that an entry of before names.
func (x *restoration) group(e *Entry) []string {
	var group []string
	for i := range x.before.Entries {
		if other := &x.before.Entries[i]; other.Kind == File && other.Inode == e.Inode && other.Filesystem == e.Filesystem {
			group = append(group, other.Path)
		}
	}
	return group
}

// makeUsable gives folders their modes of before, so that their names can be
// reached, and removes the temporary files of a Restore that was killed.
func (x *restoration) makeUsable(todo []Difference) error {
	seen := map[string]bool{}
	for _, d := range todo {
		if current := x.now.find(d.Path); isFolder(current) && isFolder(d.Before) {
			if err := x.attributes(d.Path, d.Before); err != nil {
				return x.failed(d.Path, err)
			}
		}
		dir := path.Dir(d.Path)
		if seen[dir] || d.Path == "." {
			continue
		}
		seen[dir] = true
		root, inside, err := x.folders.at(dir)
		if err != nil {
			continue // the folder is to be made
		}
		folder, err := root.Open(inside)
		if err != nil {
			continue
		}
		names, _ := folder.Readdirnames(-1)
		_ = folder.Close()
		for _, name := range names {
			if strings.HasPrefix(name, temporaryPrefix) {
				_ = root.Remove(path.Join(inside, name))
			}
		}
	}
	return nil
}

func (x *restoration) remove(d Difference, current *Entry) error {
	root, name, err := x.folders.at(d.Path)
	if err != nil {
		return err
	}
	if x.now.gitDir(d.Path) != nil && x.before.gitDir(d.Path) == nil {
		return root.RemoveAll(name) // a repository that the run has made
	}
	err = root.Remove(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case current.Kind == Folder && errors.Is(err, syscall.ENOTEMPTY) && d.Before == nil:
		return nil // somebody else has put something into it
	}
	return err
}

// make restores a name that is no file, or has a file with the right content
// already. It returns true for a file whose content must be written.
func (x *restoration) make(at string, e *Entry) (bool, error) {
	root, name, err := x.folders.at(at)
	if err != nil {
		return false, err
	}
	current := x.now.find(at)
	if current != nil && current.Kind != e.Kind {
		current = nil
	}
	switch e.Kind {
	case Folder:
		if current != nil {
			return false, nil
		}
		err := root.Mkdir(name, 0o700)
		if errors.Is(err, fs.ErrExist) {
			if info, failed := root.Lstat(name); failed == nil && info.IsDir() {
				err = nil
			}
		}
		return false, err
	case Link:
		temporary := temporaryPath(name)
		if err := root.Symlink(e.Target, temporary); err != nil {
			return false, err
		}
		return false, root.Rename(temporary, name)
	case Pipe, Socket, Device:
		if current != nil && e.Kind != Device {
			return false, nil
		}
		return false, x.makeSpecial(root, name, at, e)
	}
	if current != nil && current.Blob == e.Blob && e.Blob != "" && !x.unlinked(e) {
		return false, nil // only attributes differ
	}
	if e.Blob == "" {
		if current != nil {
			return false, fmt.Errorf("its content of before the run was not kept, because the file is %s", e.Unread)
		}
		return false, fmt.Errorf("it was removed, and its content was not kept, because the file was %s", e.Unread)
	}
	return true, nil
}

func (x *restoration) makeSpecial(root *os.Root, name, at string, e *Entry) error {
	// There is no call for this below an open folder: the parent must be a folder.
	if parent, err := root.Lstat(path.Dir(name)); err != nil || !parent.IsDir() {
		return errors.New("its folder is no folder any more")
	}
	if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	kind := map[Kind]uint32{Pipe: syscall.S_IFIFO, Socket: syscall.S_IFSOCK, Device: syscall.S_IFBLK}[e.Kind]
	if e.Kind == Device && e.Target == "character" {
		kind = syscall.S_IFCHR
	}
	return makeNode(x.repository.absolute(at), kind|0o600, e.Device)
}

func temporaryPath(name string) string {
	return filepath.Join(filepath.Dir(name), fmt.Sprintf("%s%d", temporaryPrefix, time.Now().UnixNano()))
}

// contents writes the files whose content differs.
func (x *restoration) contents(ctx context.Context, list []Difference) error {
	var written []Difference
	var ids []string
	var linked []Difference
	for _, d := range list {
		if d.Before.Names > 1 && x.source(d.Before, list) != "" {
			linked = append(linked, d)
			continue
		}
		if d.Before.Names > 1 {
			key := [2]uint64{d.Before.Filesystem, d.Before.Inode}
			if x.fresh[key] != "" && !x.inPlace(d) {
				linked = append(linked, d)
				continue
			}
			x.fresh[key] = d.Path
		}
		written = append(written, d)
		ids = append(ids, d.Before.Blob)
	}
	err := x.repository.readObjects(ctx, ids, func(i int, kind string, _ int64, content io.Reader) error {
		d := written[i]
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if kind != "blob" {
			return x.failed(d.Path, fmt.Errorf("object %s is a %s", d.Before.Blob, kind))
		}
		if err := x.write(d, content, len(written) <= syncLimit); err != nil {
			return x.failed(d.Path, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, d := range linked {
		from := x.source(d.Before, nil)
		if from == "" {
			from = x.fresh[[2]uint64{d.Before.Filesystem, d.Before.Inode}]
		}
		if err := x.link(from, d.Path); err != nil {
			return x.failed(d.Path, err)
		}
	}
	return nil
}

// source returns a name that the file of an entry still has, and that is not among
// those to be written.
func (x *restoration) source(e *Entry, list []Difference) string {
	for _, name := range x.group(e) {
		if name == e.Path || slices.ContainsFunc(list, func(d Difference) bool { return d.Path == name }) {
			continue
		}
		current := x.now.find(name)
		if current != nil && current.Kind == File && current.Inode == e.Inode && current.Filesystem == e.Filesystem && current.Blob == e.Blob {
			return name
		}
	}
	return ""
}

// inPlace says that a file must be written without a new inode: it has other
// names, which are to have the content too.
func (x *restoration) inPlace(d Difference) bool {
	current := x.now.find(d.Path)
	return current != nil && current.Kind == File && current.Names > 1 && current.Inode == d.Before.Inode && current.Filesystem == d.Before.Filesystem
}

func (x *restoration) write(d Difference, content io.Reader, sync bool) error {
	root, name, err := x.folders.at(d.Path)
	if err != nil {
		return err
	}
	inPlace := x.inPlace(d)
	target, flags := name, os.O_WRONLY|os.O_TRUNC|syscall.O_NOFOLLOW
	if !inPlace {
		target, flags = temporaryPath(name), os.O_WRONLY|os.O_CREATE|os.O_EXCL
	}
	file, err := root.OpenFile(target, flags, 0o600)
	if inPlace && errors.Is(err, fs.ErrPermission) && root.Chmod(name, 0o600) == nil {
		file, err = root.OpenFile(target, flags, 0o600)
	}
	if err != nil {
		return err
	}
	_, err = io.Copy(file, content)
	if err == nil {
		err = setAttributes(file, d.Before)
	}
	if err == nil && sync {
		err = file.Sync()
	}
	if closed := file.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = root.Chtimes(target, time.Time{}, time.Unix(0, d.Before.ModTime))
	}
	if err == nil && !inPlace {
		err = root.Rename(target, name)
	}
	if err != nil && !inPlace {
		_ = root.Remove(target)
	}
	return err
}

// link makes a path another name of a file.
func (x *restoration) link(from, to string) error {
	root, source, err := x.folders.at(from)
	if err != nil {
		return err
	}
	other, name, err := x.folders.at(to)
	if err != nil {
		return err
	}
	if root != other {
		return errors.New("it was the same file as " + from + ", in another folder")
	}
	temporary := temporaryPath(name)
	if err := root.Link(source, temporary); err != nil {
		return err
	}
	err = root.Rename(temporary, name)
	_ = root.Remove(temporary) // left by a rename onto the same file
	return err
}

// setAttributes sets owner and permissions. Owner first: a change of it takes
// special bits away.
func setAttributes(file *os.File, e *Entry) error {
	if info, err := file.Stat(); err != nil {
		return err
	} else if stat, known := info.Sys().(*syscall.Stat_t); known && (int(stat.Uid) != e.UID || int(stat.Gid) != e.GID) {
		if err := file.Chown(e.UID, e.GID); err != nil {
			return err
		}
	}
	return file.Chmod(fileMode(e.Mode))
}

// attributes sets owner, permissions and times of a name.
func (x *restoration) attributes(at string, e *Entry) error {
	root, name, err := x.folders.at(at)
	if err != nil {
		return err
	}
	info, err := root.Lstat(name)
	if err != nil {
		return err
	}
	if stat, known := info.Sys().(*syscall.Stat_t); known && (int(stat.Uid) != e.UID || int(stat.Gid) != e.GID) {
		if err := root.Lchown(name, e.UID, e.GID); err != nil {
			return err
		}
	}
	if e.Kind == Link {
		return nil
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		return errors.New("it is replaced by a link while it is restored")
	}
	if permissions(info.Mode()) != e.Mode {
		if err := root.Chmod(name, fileMode(e.Mode)); err != nil {
			return err
		}
	}
	if e.Kind == File && info.ModTime().UnixNano() != e.ModTime {
		return root.Chtimes(name, time.Time{}, time.Unix(0, e.ModTime))
	}
	return nil
}

// fileMode is the reverse of permissions.
func fileMode(bits uint32) fs.FileMode {
	mode := fs.FileMode(bits & 0o777)
	if bits&0o4000 != 0 {
		mode |= fs.ModeSetuid
	}
	if bits&0o2000 != 0 {
		mode |= fs.ModeSetgid
	}
	if bits&0o1000 != 0 {
		mode |= fs.ModeSticky
	}
	return mode
}

// lockTimeout is how long Restore waits for a git that writes the index.
const lockTimeout = 5 * time.Second

// index restores entries of an index. If that makes it the index of before, the
// file of before is written, with all that git knows about the files.
func (x *restoration) index(ctx context.Context, gitDir string, list []Difference) error {
	name := gitDir + "/index"
	before, now := x.before.gitDir(gitDir), x.now.gitDir(gitDir)
	if before == nil || now == nil {
		return nil // the whole git directory was made or removed
	}
	if now.indexErr != nil {
		return x.failed(name, now.indexErr)
	}
	merged := slices.Clone(now.index)
	for _, d := range list {
		inside := d.Path
		if before.WorkTree != "." && before.WorkTree != "" {
			inside = strings.TrimPrefix(d.Path, before.WorkTree+"/")
		}
		merged = slices.DeleteFunc(merged, func(e IndexEntry) bool { return e.Path == inside })
		for _, e := range before.index {
			if e.Path == inside {
				merged = append(merged, e)
			}
		}
	}
	merged = withoutStaleStat(merged, now.index)
	if len(compareIndex(&GitDir{index: now.index}, &GitDir{index: merged})) == 0 {
		return nil
	}
	file := x.before.find(name)
	whole := len(compareIndex(&GitDir{index: before.index}, &GitDir{index: merged})) == 0
	root, inside, err := x.folders.at(name)
	if err != nil {
		return x.failed(name, err)
	}
	if whole && file == nil {
		if err := root.Remove(inside); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return x.failed(name, err)
		}
		x.done = append(x.done, name)
		return nil
	}
	var data []byte
	if whole {
		data, err = x.repository.readObject(ctx, file.Blob)
	} else {
		data, err = formatIndex(merged, idBytes(x.repository.format))
	}
	if err == nil {
		err = x.underLock(ctx, root, inside, data, file)
	}
	if err != nil {
		return x.failed(name, err)
	}
	x.done = append(x.done, name)
	return nil
}

// withoutStaleStat lets git look again at files whose entries were put back.
func withoutStaleStat(merged, now []IndexEntry) []IndexEntry {
	known := map[indexKey]IndexEntry{}
	for _, e := range now {
		known[e.key()] = e
	}
	for i, e := range merged {
		if old, found := known[e.key()]; !found || !old.same(e) {
			merged[i].stat = [36]byte{}
		}
	}
	return merged
}

// underLock writes a file as git does, so that no git writes it meanwhile.
func (x *restoration) underLock(ctx context.Context, root *os.Root, name string, data []byte, like *Entry) error {
	lock := name + ".lock"
	deadline := time.Now().Add(lockTimeout)
	for {
		file, err := root.OpenFile(lock, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
		if errors.Is(err, fs.ErrExist) && time.Now().Before(deadline) {
			select {
			case <-time.After(50 * time.Millisecond):
				continue
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		if err != nil {
			return err
		}
		_, err = file.Write(data)
		if err == nil && like != nil {
			err = setAttributes(file, like)
		}
		if err == nil {
			err = file.Sync()
		}
		if closed := file.Close(); err == nil {
			err = closed
		}
		if err == nil {
			err = root.Rename(lock, name)
		}
		if err != nil {
			_ = root.Remove(lock)
		}
		return err
	}
}

// refs restores references. If that makes all of them those of before, it returns
// the files that hold them, to be restored as they were; otherwise it sets each.
func (x *restoration) refs(ctx context.Context, gitDir string, list []Difference) ([]Difference, error) {
	before, now := x.before.gitDir(gitDir), x.now.gitDir(gitDir)
	if before == nil || now == nil {
		return nil, nil // the whole git directory was made or removed
	}
	merged := map[string]string{}
	for name, value := range now.Refs {
		merged[name] = value
	}
	for _, d := range list {
		delete(merged, d.Path)
		if d.RefBefore != "" {
			merged[d.Path] = d.RefBefore
		}
	}
	equal := true
	for _, name := range sortedRefs(merged, before.Refs) {
		equal = equal && merged[name] == before.Refs[name]
	}
	if equal {
		var files []Difference
		for _, d := range Compare(x.before, x.now) {
			if d.Kind == EntryDiffers && d.GitDir == gitDir && x.repository.isRaw(&d) && !strings.Contains(strings.TrimPrefix(d.Path, gitDir+"/"), "index") {
				files = append(files, d)
			}
		}
		return files, nil
	}
	var input strings.Builder
	for _, d := range list {
		if now.Refs[d.Path] == d.RefBefore {
			continue
		}
		x.done = append(x.done, d.Path)
		target, symbolic := strings.CutPrefix(d.RefBefore, "ref: ")
		switch {
		case symbolic:
			if err := x.repository.run(ctx, GitCommand{Dir: x.repository.absolute(gitDir), Args: []string{"--git-dir=" + x.repository.absolute(gitDir), "symbolic-ref", d.Path, target}}); err != nil {
				return nil, x.failed(d.Path, err)
			}
		case d.RefBefore == "":
			fmt.Fprintf(&input, "delete %s\n", d.Path)
		default:
			fmt.Fprintf(&input, "update %s %s\n", d.Path, d.RefBefore)
		}
	}
	err := x.repository.run(ctx, GitCommand{
		Dir:   x.repository.absolute(gitDir),
		Args:  []string{"--git-dir=" + x.repository.absolute(gitDir), "-c", "core.logAllRefUpdates=false", "update-ref", "--no-deref", "--stdin"},
		Stdin: strings.NewReader(input.String()),
	})
	if err != nil {
		return nil, x.failed(gitDir, err)
	}
	return nil, nil
}
