package change

import (
	"bufio"
	"bytes"
	"compress/zlib"
	"context"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// Objects are written here and not by git hash-object: that takes names, not open
// files, and a name can become a link between the check and the use.

func newHash(format string) hash.Hash {
	if format == "sha256" {
		return sha256.New()
	}
	return sha1.New()
}

// objectID returns the id of an object.
func objectID(format, kind string, content []byte) string {
	sum := newHash(format)
	fmt.Fprintf(sum, "%s %d\x00", kind, len(content))
	sum.Write(content)
	return hex.EncodeToString(sum.Sum(nil))
}

// errChanging says that a file changed while it was read.
var errChanging = errors.New("the file changes while it is read")

// hashBlob returns the id of a file's content. It fails with errChanging unless
// the content has exactly this size.
func hashBlob(format string, content io.Reader, size int64) (string, error) {
	sum := newHash(format)
	fmt.Fprintf(sum, "blob %d\x00", size)
	if err := copyExactly(sum, content, size); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

func copyExactly(to io.Writer, content io.Reader, size int64) error {
	n, err := io.Copy(to, io.LimitReader(content, size+1))
	if err == nil && n != size {
		err = errChanging
	}
	return err
}

// objectWriter writes loose objects. Only one goroutine may use it.
type objectWriter struct {
	format string
	dir    string // the folder "objects"
	owner  owner
}

// packers are for reuse: a new one allocates most of a megabyte, many times what is
// written.
var packers = sync.Pool{New: func() any {
	packer, err := zlib.NewWriterLevel(io.Discard, zlib.BestSpeed)
	if err != nil {
		panic(err) // there is such a level
	}
	return packer
}}

// An owner says to whom new files and folders are given: as root we would leave some
// that the repository's owner cannot write.
type owner struct {
	uid, gid int // -1 to leave that
	mode     fs.FileMode
}

// ownerOf returns the owner of a folder, with its permissions.
func ownerOf(dir string) (owner, error) {
	o := owner{uid: -1, gid: -1}
	info, err := os.Stat(dir)
	if err != nil {
		return o, err
	}
	o.mode = info.Mode().Perm()
	if stat, known := info.Sys().(*syscall.Stat_t); known && os.Geteuid() == 0 {
		o.uid, o.gid = int(stat.Uid), int(stat.Gid)
	}
	return o, nil
}

// mkdir makes a folder.
func (o owner) mkdir(dir string) error {
	if err := os.Mkdir(dir, o.mode); err != nil {
		return err
	}
	_ = os.Chmod(dir, o.mode)
	if o.uid >= 0 {
		_ = os.Chown(dir, o.uid, o.gid)
	}
	return nil
}

// give gives a file to the owner.
func (o owner) give(file *os.File) error {
	if o.uid < 0 {
		return nil
	}
	return file.Chown(o.uid, o.gid)
}

func (r *Repository) newObjectWriter() (*objectWriter, error) {
	w := &objectWriter{format: r.format, dir: filepath.Join(r.commonDir, "objects")}
	var err error
	w.owner, err = ownerOf(w.dir)
	return w, err
}

// write stores an object and returns its id. The content must have exactly this
// size.
func (w *objectWriter) write(kind string, content io.Reader, size int64) (id string, err error) {
	var random [8]byte
	_, _ = rand.Read(random[:])
	// git gc removes old files of this name.
	temporary := filepath.Join(w.dir, "tmp_obj_"+hex.EncodeToString(random[:]))
	file, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(temporary)
		}
	}()
	buffer := bufio.NewWriterSize(file, 64<<10)
	packer := packers.Get().(*zlib.Writer)
	defer packers.Put(packer)
	packer.Reset(buffer)
	sum := newHash(w.format)
	both := io.MultiWriter(packer, sum)
	fmt.Fprintf(both, "%s %d\x00", kind, size)
	err = copyExactly(both, content, size)
	if err == nil {
		err = packer.Close()
	}
	if err == nil {
		err = buffer.Flush()
	}
	if err == nil {
		err = w.owner.give(file)
	}
	if closed := file.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return "", err
	}
	id = hex.EncodeToString(sum.Sum(nil))
	folder := filepath.Join(w.dir, id[:2])
	_ = w.owner.mkdir(folder) // there is one for most ids
	return id, os.Rename(temporary, filepath.Join(folder, id[2:]))
}

func (w *objectWriter) writeBytes(kind string, content []byte) (string, error) {
	return w.write(kind, bytes.NewReader(content), int64(len(content)))
}

// missing returns those of the ids for which the repository has no object.
func (r *Repository) missing(ctx context.Context, ids []string) ([]string, error) {
	if len(ids) == 0 {
		return nil, nil
	}
	if len(ids) <= fewObjects {
		if absent, err := r.missingFew(ids); err == nil {
			return absent, nil
		}
	}
	var out bytes.Buffer
	input := strings.Join(ids, "\n") + "\n"
	if err := r.run(ctx, GitCommand{Dir: r.Top, Args: []string{"cat-file", "--batch-check=%(objectname)"}, Stdin: strings.NewReader(input), Stdout: &out}); err != nil {
		return nil, err
	}
	var list []string
	for line := range strings.Lines(out.String()) {
		if id, isMissing := strings.CutSuffix(strings.TrimSuffix(line, "\n"), " missing"); isMissing {
			list = append(list, id)
		}
	}
	return list, nil
}

// present returns those of the ids for which the repository has an object.
func (r *Repository) present(ctx context.Context, ids []string) ([]string, error) {
	missing, err := r.missing(ctx, ids)
	if err != nil {
		return nil, err
	}
	absent := map[string]bool{}
	for _, id := range missing {
		absent[id] = true
	}
	return slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return absent[id] }), nil
}

// readObjects calls each for every object, in the order of ids. each may read the
// content or leave it. The content is streamed.
func (r *Repository) readObjects(ctx context.Context, ids []string, each func(i int, kind string, size int64, content io.Reader) error) error {
	if len(ids) == 0 {
		return nil
	}
	reader, writer := io.Pipe()
	parsed := make(chan error, 1)
	go func() {
		err := parseObjects(reader, ids, each)
		// Lets git end: what it still writes is dropped.
		_, _ = io.Copy(io.Discard, reader)
		parsed <- err
	}()
	err := r.run(ctx, GitCommand{Dir: r.Top, Args: []string{"cat-file", "--batch"}, Stdin: strings.NewReader(strings.Join(ids, "\n") + "\n"), Stdout: writer})
	_ = writer.Close()
	if failed := <-parsed; failed != nil && (err == nil || !errors.Is(failed, io.ErrUnexpectedEOF)) {
		return failed
	}
	return err
}

func parseObjects(stream io.Reader, ids []string, each func(i int, kind string, size int64, content io.Reader) error) error {
	in := bufio.NewReaderSize(stream, 64<<10)
	for i, id := range ids {
		line, err := in.ReadString('\n')
		if err != nil {
			return io.ErrUnexpectedEOF
		}
		fields := strings.Fields(line)
		if len(fields) != 3 {
			return fmt.Errorf("the repository does not have the object %s any more (git says %q)", id, strings.TrimSpace(line))
		}
		size, err := strconv.ParseInt(fields[2], 10, 64)
		if err != nil {
			return fmt.Errorf("git cat-file answers %q", line)
		}
		content := &wholeReader{in: in, left: size}
		if err := each(i, fields[1], size, content); err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, content); err != nil {
			return err
		}
		if _, err := in.Discard(1); err != nil {
			return io.ErrUnexpectedEOF
		}
	}
	return nil
}

// wholeReader reads so many bytes. If its reader ends before, that is an error: half
// an object must not pass for a whole one.
type wholeReader struct {
	in   io.Reader
	left int64
}

func (w *wholeReader) Read(p []byte) (int, error) {
	if w.left == 0 {
		return 0, io.EOF
	}
	n, err := w.in.Read(p[:min(int64(len(p)), w.left)])
	if w.left -= int64(n); w.left > 0 && errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if w.left == 0 && err != nil {
		err = nil
	}
	return n, err
}

// readObject returns the content of a small object.
func (r *Repository) readObject(ctx context.Context, id string) (content []byte, err error) {
	err = r.readFew(ctx, []string{id}, func(_ int, _ string, _ int64, in io.Reader) error {
		content, err = io.ReadAll(in)
		return err
	})
	return content, err
}

// A treeItem is a file of a tree that is to be written.
type treeItem struct {
	path string // with slashes
	mode string // 100644, 100755 or 120000
	id   string
}

// tree is an object that is to be written.
type tree struct {
	id      string
	content []byte
}

// buildTrees returns the trees for the files, the top one last. Folders without
// files are not in a tree.
func buildTrees(format string, items []treeItem) []tree {
	var trees []tree
	var build func(items []treeItem, prefix int) string
	build = func(items []treeItem, prefix int) string {
		type child struct{ name, mode, id string }
		var children []child
		var names []string
		inside := map[string][]treeItem{}
		for _, item := range items {
			name, _, deeper := strings.Cut(item.path[prefix:], "/")
			if !deeper {
				children = append(children, child{name, item.mode, item.id})
				continue
			}
			if inside[name] == nil {
				names = append(names, name)
			}
			inside[name] = append(inside[name], item)
		}
		for _, name := range names {
			children = append(children, child{name, "40000", build(inside[name], prefix+len(name)+1)})
		}
		key := func(c child) string {
			if c.mode == "40000" {
				return c.name + "/"
			}
			return c.name
		}
		slices.SortFunc(children, func(a, b child) int { return strings.Compare(key(a), key(b)) })
		var content []byte
		for _, c := range children {
			id, _ := hex.DecodeString(c.id)
			content = append(content, c.mode+" "+c.name+"\x00"...)
			content = append(content, id...)
		}
		id := objectID(format, "tree", content)
		trees = append(trees, tree{id, content})
		return id
	}
	build(items, 0)
	return trees
}

// writeTrees stores the trees that the repository does not have, and returns the
// id of the top one.
func (r *Repository) writeTrees(ctx context.Context, trees []tree) (string, error) {
	var ids []string
	byID := map[string][]byte{}
	for _, t := range trees {
		ids = append(ids, t.id)
		byID[t.id] = t.content
	}
	missing, err := r.missing(ctx, ids)
	if err != nil {
		return "", err
	}
	w, err := r.newObjectWriter()
	if err != nil {
		return "", err
	}
	for _, id := range missing {
		if _, err := w.writeBytes("tree", byID[id]); err != nil {
			return "", fmt.Errorf("git's objects cannot be written: %w", err)
		}
	}
	return ids[len(ids)-1], nil
}
