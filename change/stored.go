package change

import (
	"bufio"
	"bytes"
	"compress/zlib"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// What is asked most often about git's objects and refs is answered here, from the
// files that git documents. Starting git for that takes longer than all the rest of a
// look. Where the files do not suffice, git is asked as before: for objects in packs
// whose content is needed, alternates, other formats of refs, and whatever is unclear.

// fewObjects is how many objects are looked up one by one. Of more, git knows faster.
const fewObjects = 64

// errAskGit says that only git can answer.
var errAskGit = errors.New("only git can tell")

// loosePath returns the path of an object's own file.
func (r *Repository) loosePath(id string) string {
	return filepath.Join(r.commonDir, "objects", id[:min(2, len(id))], id[min(2, len(id)):])
}

// openLoose opens an object that has a file of its own. The error is errAskGit if there
// is none that can be read as git writes it.
func (r *Repository) openLoose(id string) (*looseObject, error) {
	file, err := os.Open(r.loosePath(id))
	if err != nil {
		return nil, errAskGit
	}
	unpacked, err := zlib.NewReader(bufio.NewReader(file))
	if err != nil {
		_ = file.Close()
		return nil, errAskGit
	}
	in := bufio.NewReader(unpacked)
	header, err := in.ReadString(0)
	kind, number, found := strings.Cut(strings.TrimSuffix(header, "\x00"), " ")
	size, numberErr := strconv.ParseInt(number, 10, 64)
	if err != nil || !found || numberErr != nil || size < 0 {
		_ = file.Close()
		return nil, errAskGit
	}
	return &looseObject{wholeReader: wholeReader{in: in, left: size}, kind: kind, size: size, rest: in, file: file}, nil
}

// A looseObject is an open object; Read returns its content.
type looseObject struct {
	wholeReader
	kind string
	size int64
	rest *bufio.Reader
	file *os.File
}

func (o *looseObject) close() { _ = o.file.Close() }

// finish reads what is left. It fails unless the file ends with the content, and with
// the checksum over it.
func (o *looseObject) finish() error {
	if _, err := io.Copy(io.Discard, &o.wholeReader); err != nil {
		return err
	}
	if n, err := io.Copy(io.Discard, o.rest); err != nil || n > 0 {
		return fmt.Errorf("the object's file %s is damaged", o.file.Name())
	}
	return nil
}

// readFew does what readObjects does, without git for the first objects that have files
// of their own.
func (r *Repository) readFew(ctx context.Context, ids []string, each func(i int, kind string, size int64, content io.Reader) error) error {
	for i, id := range ids {
		object, err := r.openLoose(id)
		if err != nil {
			return r.readObjects(ctx, ids[i:], func(j int, kind string, size int64, content io.Reader) error {
				return each(i+j, kind, size, content)
			})
		}
		err = each(i, object.kind, object.size, &object.wholeReader)
		if err == nil {
			err = object.finish()
		}
		object.close()
		if err != nil {
			return err
		}
	}
	return nil
}

// missingFew returns those of a few ids for which the repository has no object.
func (r *Repository) missingFew(ids []string) (absent []string, err error) {
	var packs []*packIndex
	defer func() {
		for _, p := range packs {
			_ = p.file.Close()
		}
	}()
	for _, id := range ids {
		if object, err := r.openLoose(id); err == nil {
			object.close()
			continue
		}
		if _, err := os.Lstat(r.loosePath(id)); !errors.Is(err, fs.ErrNotExist) {
			return nil, errAskGit // damaged
		}
		if packs == nil {
			if packs, err = r.openPacks(); err != nil {
				return nil, err
			}
		}
		found := false
		for _, p := range packs {
			if found, err = p.has(id); found || err != nil {
				break
			}
		}
		if err != nil {
			return nil, err
		}
		if !found {
			absent = append(absent, id)
		}
	}
	return absent, nil
}

// openPacks opens the indexes of the repository's packs. The error is errAskGit if it
// may have objects elsewhere, or if an index has another format.
func (r *Repository) openPacks() (packs []*packIndex, err error) {
	objects := filepath.Join(r.commonDir, "objects")
	for _, name := range []string{"info/alternates", "info/http-alternates"} {
		if _, err := os.Lstat(filepath.Join(objects, name)); !errors.Is(err, fs.ErrNotExist) {
			return nil, errAskGit
		}
	}
	names, err := os.ReadDir(filepath.Join(objects, "pack"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, errAskGit
	}
	packs = []*packIndex{} // not nil: they are open
	for _, entry := range names {
		base, isIndex := strings.CutSuffix(entry.Name(), ".idx")
		if !isIndex {
			continue
		}
		if _, err := os.Lstat(filepath.Join(objects, "pack", base+".pack")); err != nil {
			continue // git does not use it either
		}
		file, err := os.Open(filepath.Join(objects, "pack", entry.Name()))
		if err == nil {
			packs = append(packs, &packIndex{file: file, idSize: int64(idBytes(r.format))})
			err = packs[len(packs)-1].check()
		}
		if err != nil {
			for _, p := range packs {
				_ = p.file.Close()
			}
			return nil, errAskGit
		}
	}
	return packs, nil
}

// A packIndex is the list of a pack's objects: a header, for each first byte of an id
// how many ids begin with it or a lesser one, and the sorted ids.
type packIndex struct {
	file   *os.File
	idSize int64
}

const (
	packHeader = 8
	packIDs    = packHeader + 256*4
)

func (p *packIndex) check() error {
	var header [packHeader]byte
	if _, err := p.file.ReadAt(header[:], 0); err != nil {
		return err
	}
	if !bytes.Equal(header[:], []byte("\xfftOc\x00\x00\x00\x02")) {
		return errAskGit
	}
	return nil
}

// has says whether the pack has an object.
func (p *packIndex) has(id string) (bool, error) {
	wanted, err := hex.DecodeString(id)
	if err != nil || int64(len(wanted)) != p.idSize {
		return false, errAskGit
	}
	var counts [8]byte
	if wanted[0] == 0 {
		_, err = p.file.ReadAt(counts[4:], packHeader)
	} else {
		_, err = p.file.ReadAt(counts[:], packHeader+4*(int64(wanted[0])-1))
	}
	if err != nil {
		return false, errAskGit
	}
	low, high := int64(binary.BigEndian.Uint32(counts[:])), int64(binary.BigEndian.Uint32(counts[4:]))
	found := make([]byte, p.idSize)
	for low < high {
		middle := low + (high-low)/2
		if _, err := p.file.ReadAt(found, packIDs+middle*p.idSize); err != nil {
			return false, errAskGit
		}
		switch order := bytes.Compare(found, wanted); {
		case order == 0:
			return true, nil
		case order < 0:
			low = middle + 1
		default:
			high = middle
		}
	}
	return false, nil
}

// setRef points a ref to an object, as git does: under the ref's lock, and by a rename.
// As git with its own settings, it syncs neither the ref nor loose objects to disk.
// The error is errAskGit if git has to do that, or to say why it cannot be done.
func (r *Repository) setRef(name, id string) error {
	refs := filepath.Join(r.commonDir, "refs")
	if _, err := os.Lstat(filepath.Join(r.commonDir, "reftable")); !errors.Is(err, fs.ErrNotExist) {
		return errAskGit
	}
	owner, err := ownerOf(refs)
	if err != nil {
		return errAskGit
	}
	path := filepath.Join(r.commonDir, name)
	var made []string
	for dir := filepath.Dir(path); dir != refs; dir = filepath.Dir(dir) {
		if info, err := os.Lstat(dir); err == nil && info.IsDir() {
			break
		} else if !errors.Is(err, fs.ErrNotExist) || !Below(refs, dir) {
			return errAskGit
		}
		made = append(made, dir)
	}
	for i := len(made) - 1; i >= 0; i-- {
		// git removes empty folders of refs, at any time.
		if err := owner.mkdir(made[i]); err != nil && !errors.Is(err, fs.ErrExist) {
			return errAskGit
		}
	}
	if info, err := os.Lstat(path); err == nil && !info.Mode().IsRegular() || err != nil && !errors.Is(err, fs.ErrNotExist) {
		return errAskGit // a folder, or a symbolic ref
	} else if err == nil && info.Size() != int64(len(id)+1) {
		return errAskGit // a symbolic ref
	}
	lock := path + ".lock"
	file, err := os.OpenFile(lock, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666&owner.mode)
	if err != nil {
		return errAskGit
	}
	_, err = file.WriteString(id + "\n")
	if err == nil {
		err = owner.give(file)
	}
	if closed := file.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(lock, path)
	}
	if err != nil {
		_ = os.Remove(lock)
		return errAskGit
	}
	return nil
}
