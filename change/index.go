package change

import (
	"bytes"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// An IndexEntry is one entry of a git index: a path at a stage.
type IndexEntry struct {
	Path  string
	Stage int
	// Mode is git's, such as 0o100644, 0o120000 or 0o160000 (a submodule).
	Mode uint32
	// ID is the object id in hexadecimal digits.
	ID string
	// Flags that a user sets: git update-index --assume-unchanged and
	// --skip-worktree, git add --intent-to-add.
	AssumeUnchanged, SkipWorktree, IntentToAdd bool

	// stat is what git knows about the file: ctime, mtime, dev, ino, uid, gid and
	// size. It decides nothing here, and is kept when an index is written.
	stat [36]byte
}

// same says that two entries differ at most in stat data.
func (e IndexEntry) same(other IndexEntry) bool {
	e.stat, other.stat = [36]byte{}, [36]byte{}
	return e == other
}

type indexKey struct {
	path  string
	stage int
}

func (e IndexEntry) key() indexKey { return indexKey{e.Path, e.Stage} }

// Bits of an entry's flags and extended flags.
const (
	indexAssumeUnchanged = 0x8000
	indexExtended        = 0x4000
	indexStage           = 0x3000
	indexNameLength      = 0x0fff
	indexSkipWorktree    = 0x4000
	indexIntentToAdd     = 0x2000
)

// errJoinIndex says that an index does not name all files itself: it is split, and refers
// to a second file, or it is sparse, and has folders for all that is in them.
var errJoinIndex = errors.New("the index is split or sparse")

// parseIndex reads an index file, of the versions 2 to 4. idSize is the length of
// object ids in bytes. Nothing is an index without entries, as git has it.
func parseIndex(data []byte, idSize int) ([]IndexEntry, error) {
	entries, _, err := parseIndexTree(data, idSize)
	return entries, err
}

// parseIndexTree also returns the tree that the entries make, "" if the file does not
// say so: each command of git that alters an entry takes that back.
func parseIndexTree(data []byte, idSize int) (list []IndexEntry, tree string, err error) {
	if len(data) == 0 {
		return nil, "", nil
	}
	if len(data) < 12+idSize || string(data[:4]) != "DIRC" {
		return nil, "", errors.New("not an index file of git")
	}
	version, count := binary.BigEndian.Uint32(data[4:]), binary.BigEndian.Uint32(data[8:])
	if version < 2 || version > 4 {
		return nil, "", fmt.Errorf("index version %d is unknown", version)
	}
	rest := data[12 : len(data)-idSize]
	entries := make([]IndexEntry, 0, min(int(count), len(rest)/(40+idSize)+1))
	previous := ""
	cut := errors.New("the index file is cut off")
	for range count {
		if len(rest) < 42+idSize {
			return nil, "", cut
		}
		var e IndexEntry
		copy(e.stat[:24], rest[:24])
		e.Mode = binary.BigEndian.Uint32(rest[24:])
		copy(e.stat[24:], rest[28:40])
		e.ID = fmt.Sprintf("%x", rest[40:40+idSize])
		at := 40 + idSize
		flags := binary.BigEndian.Uint16(rest[at:])
		at += 2
		e.AssumeUnchanged, e.Stage = flags&indexAssumeUnchanged != 0, int(flags&indexStage)>>12
		if flags&indexExtended != 0 {
			if len(rest) < at+2 {
				return nil, "", cut
			}
			more := binary.BigEndian.Uint16(rest[at:])
			at += 2
			e.SkipWorktree, e.IntentToAdd = more&indexSkipWorktree != 0, more&indexIntentToAdd != 0
		}
		if version == 4 {
			drop, size := 0, 0
			for {
				if at >= len(rest) {
					return nil, "", cut
				}
				b := rest[at]
				at++
				size++
				drop = drop<<7 | int(b&0x7f)
				if b&0x80 == 0 {
					break
				}
				drop++
				if size > 4 {
					return nil, "", cut
				}
			}
			end := bytes.IndexByte(rest[at:], 0)
			if end < 0 || drop > len(previous) {
				return nil, "", cut
			}
			e.Path = previous[:len(previous)-drop] + string(rest[at:at+end])
			at += end + 1
		} else {
			end := bytes.IndexByte(rest[at:], 0)
			if end < 0 {
				return nil, "", cut
			}
			e.Path = string(rest[at : at+end])
			at += end
			at = (at + 8) &^ 7 // at least one NUL, up to a multiple of 8
			if at > len(rest) {
				return nil, "", cut
			}
		}
		previous = e.Path
		rest = rest[at:]
		entries = append(entries, e)
	}
	for len(rest) >= 8 {
		size := int(binary.BigEndian.Uint32(rest[4:]))
		if size < 0 || len(rest) < 8+size {
			return nil, "", cut
		}
		switch name := string(rest[:4]); {
		case name == "link" || name == "sdir":
			return nil, "", errJoinIndex
		case name == "TREE":
			tree = topTree(rest[8:8+size], idSize)
		case name[0] < 'A' || name[0] > 'Z': // git's sign for one that a reader must know
			return nil, "", fmt.Errorf("index extension %q is unknown", name)
		}
		rest = rest[8+size:]
	}
	return entries, tree, nil
}

// topTree reads the beginning of the extension TREE, which is about the top: an empty
// path, the number of entries (-1 if the tree is not known), a blank, the number of
// subtrees, a newline, the id.
func topTree(extension []byte, idSize int) string {
	name, rest, _ := bytes.Cut(extension, []byte{0})
	counts, rest, found := bytes.Cut(rest, []byte("\n"))
	if len(name) > 0 || !found || bytes.HasPrefix(counts, []byte("-")) || len(rest) < idSize {
		return ""
	}
	return fmt.Sprintf("%x", rest[:idSize])
}

// formatIndex writes an index file with these entries, and without extensions: git
// computes those again.
func formatIndex(entries []IndexEntry, idSize int) ([]byte, error) {
	entries = slices.Clone(entries)
	slices.SortFunc(entries, func(a, b IndexEntry) int {
		if order := strings.Compare(a.Path, b.Path); order != 0 {
			return order
		}
		return a.Stage - b.Stage
	})
	version := uint32(2)
	for _, e := range entries {
		if e.SkipWorktree || e.IntentToAdd {
			version = 3
		}
	}
	out := []byte("DIRC")
	out = binary.BigEndian.AppendUint32(out, version)
	out = binary.BigEndian.AppendUint32(out, uint32(len(entries)))
	for _, e := range entries {
		begin := len(out)
		out = append(out, e.stat[:24]...)
		out = binary.BigEndian.AppendUint32(out, e.Mode)
		out = append(out, e.stat[24:]...)
		var id []byte
		if _, err := fmt.Sscanf(e.ID, "%x", &id); err != nil || len(id) != idSize {
			return nil, fmt.Errorf("index entry %s has the object id %q", e.Path, e.ID)
		}
		out = append(out, id...)
		flags := uint16(e.Stage)<<12 | uint16(min(len(e.Path), indexNameLength))
		if e.AssumeUnchanged {
			flags |= indexAssumeUnchanged
		}
		more := uint16(0)
		if e.SkipWorktree {
			more |= indexSkipWorktree
		}
		if e.IntentToAdd {
			more |= indexIntentToAdd
		}
		if more != 0 {
			flags |= indexExtended
		}
		out = binary.BigEndian.AppendUint16(out, flags)
		if more != 0 {
			out = binary.BigEndian.AppendUint16(out, more)
		}
		out = append(out, e.Path...)
		for size := len(out) - begin; ; {
			out = append(out, 0)
			if size++; size%8 == 0 {
				break
			}
		}
	}
	if idSize == sha256.Size {
		sum := sha256.Sum256(out)
		return append(out, sum[:]...), nil
	}
	sum := sha1.Sum(out)
	return append(out, sum[:]...), nil
}
