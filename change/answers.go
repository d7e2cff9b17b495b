package change

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Answers remembers what git has answered, for as long as the files are the same that
// the answer depends on: no one can alter a file without altering its ctime or putting
// another inode in its place. Errors are not remembered. Any goroutine may use it. A nil
// *Answers remembers nothing.
type Answers struct {
	mu    sync.Mutex
	known map[string]answer
}

type answer struct{ text, stamp string }

// maxAnswers bounds what is remembered: a worker has one workspace, as a rule.
const maxAnswers = 100

// Place asks where the repository is that a folder lies in. question tells apart those
// that differ in anything else; program is the path of git, "" if that cannot change.
func (a *Answers) Place(question, dir, program string, ask func() (string, error)) (string, error) {
	return a.ask(question+"\x00"+dir, func(s *stamp) {
		s.file(program)
		s.place(dir)
	}, ask)
}

// HeadTree asks whether git can read the commit of HEAD, and its tree, in a work tree
// whose own git directory and the shared one these are.
func (a *Answers) HeadTree(own, shared string, ask func() error) error {
	_, err := a.ask("head\x00"+own, func(s *stamp) { s.head(own, shared) }, func() (string, error) { return "", ask() })
	return err
}

// Index asks something that depends only on the index of a work tree.
func (a *Answers) Index(question, own string, ask func() (string, error)) (string, error) {
	return a.ask(question+"\x00"+own, func(s *stamp) { s.file(filepath.Join(own, "index")) }, ask)
}

// treeOf asks for the tree of a commit, which is always the same.
func (a *Answers) treeOf(commit string, ask func() (string, error)) (string, error) {
	return a.ask("tree\x00"+commit, func(*stamp) {}, ask)
}

func (a *Answers) ask(question string, take func(*stamp), ask func() (string, error)) (string, error) {
	if a == nil {
		return ask()
	}
	before := newStamp(take)
	a.mu.Lock()
	known, found := a.known[question]
	a.mu.Unlock()
	if found && before.valid && known.stamp == before.text.String() {
		return known.text, nil
	}
	text, err := ask()
	if err != nil || !before.valid || newStamp(take).text.String() != before.text.String() {
		return text, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.known == nil || len(a.known) >= maxAnswers {
		a.known = map[string]answer{}
	}
	a.known[question] = answer{text, before.text.String()}
	return text, nil
}

// A stamp identifies the files that an answer depends on.
type stamp struct {
	text strings.Builder
	// now is when the stamp was begun.
	now time.Time
	// valid says that the stamp has all that counts, and that equal times prove equal
	// content, see racyTime.
	valid bool
}

func newStamp(take func(*stamp)) *stamp {
	s := &stamp{now: time.Now(), valid: true}
	take(s)
	return s
}

// file adds a file, or that there is none.
func (s *stamp) file(path string) {
	if path == "" {
		return
	}
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintf(&s.text, "%q none\n", path)
		return
	}
	if err != nil {
		s.valid = false
		return
	}
	stat, known := info.Sys().(*syscall.Stat_t)
	if !known {
		s.valid = false
		return
	}
	fmt.Fprintf(&s.text, "%q %d %d %o %d %d", path, stat.Dev, stat.Ino, info.Mode(), stat.Uid, stat.Gid)
	if !info.IsDir() { // other names in a folder do not count
		changed := changeTime(stat)
		s.valid = s.valid && changed != 0 && changed < s.now.Add(-racyTime).UnixNano()
		fmt.Fprintf(&s.text, " %d %d %d", info.Size(), info.ModTime().UnixNano(), changed)
	}
	s.text.WriteByte('\n')
}

// place adds what git looks at to find the repository of a folder.
func (s *stamp) place(dir string) {
	resolved, err := filepath.EvalSymlinks(dir)
	if err != nil {
		s.valid = false
		return
	}
	fmt.Fprintf(&s.text, "%q\n", resolved)
	for dir = resolved; ; dir = filepath.Dir(dir) {
		git := filepath.Join(dir, ".git")
		s.file(git)
		s.file(filepath.Join(dir, "HEAD")) // dir itself could be a git directory
		if info, err := os.Stat(git); err == nil {
			own := git
			if !info.IsDir() {
				own = pointer(git, "gitdir: ")
			}
			shared := own
			if common := filepath.Join(own, "commondir"); pointer(common, "") != "" {
				shared = pointer(common, "")
			}
			for _, dir := range []string{own, shared} {
				for _, name := range []string{"", "HEAD", "commondir", "config", "config.worktree", "objects", "refs"} {
					s.file(filepath.Join(dir, name))
				}
			}
			return
		}
		if dir == filepath.Dir(dir) {
			s.valid = false // not in a repository
			return
		}
	}
}

// pointer returns the path that a file of git names after a prefix, "" for none.
func pointer(file, prefix string) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	path, found := strings.CutPrefix(strings.TrimRight(string(text), "\n"), prefix)
	if !found || path == "" {
		return ""
	}
	if !filepath.IsAbs(path) {
		path = filepath.Join(filepath.Dir(file), path)
	}
	return path
}

// head adds what the commit of HEAD and its tree are read from. It is invalid if that
// may be elsewhere.
func (s *stamp) head(own, shared string) {
	s.file(filepath.Join(own, "config"))
	s.file(filepath.Join(own, "HEAD"))
	s.file(filepath.Join(shared, "config"))
	s.file(filepath.Join(shared, "packed-refs"))
	for _, name := range []string{"objects/info/alternates", "refs/replace"} {
		if _, err := os.Lstat(filepath.Join(shared, name)); !errors.Is(err, fs.ErrNotExist) {
			s.valid = false // the objects of another repository, or others than are named
			return
		}
	}
	text, err := os.ReadFile(filepath.Join(own, "HEAD"))
	if err != nil {
		s.valid = false
		return
	}
	id := strings.TrimSpace(string(text))
	if name, isName := strings.CutPrefix(id, "ref: "); isName {
		if !strings.HasPrefix(name, "refs/heads/") || !filepath.IsLocal(name) {
			s.valid = false
			return
		}
		s.file(filepath.Join(shared, name))
		if id = looseRef(filepath.Join(shared, name)); id == "" {
			id = packedRef(filepath.Join(shared, "packed-refs"), name)
		}
	}
	commit, _ := hex.DecodeString(id)
	if len(commit) != 20 && len(commit) != 32 {
		s.valid = false
		return
	}
	r := &Repository{commonDir: shared, format: "sha1"}
	s.file(r.loosePath(id))
	if tree, err := r.commitTree(id); err == nil {
		s.file(r.loosePath(tree))
	}
	packs, err := os.ReadDir(filepath.Join(shared, "objects/pack"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.valid = false
	}
	for _, pack := range packs {
		s.file(filepath.Join(shared, "objects/pack", pack.Name()))
	}
}

// looseRef returns the object that a ref's own file names, "" for none.
func looseRef(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

// packedRef returns the object that a ref names in the file of packed refs, "" for none.
func packedRef(path, name string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	for line := range bytes.Lines(text) {
		if id, found := bytes.CutSuffix(bytes.TrimRight(line, "\n"), []byte(" "+name)); found && !bytes.Contains(id, []byte(" ")) {
			return string(id)
		}
	}
	return ""
}

// commitTree returns the tree of a commit that has a file of its own.
func (r *Repository) commitTree(commit string) (string, error) {
	object, err := r.openLoose(commit)
	if err != nil {
		return "", err
	}
	defer object.close()
	if object.kind != "commit" || object.size > messageLimit*16 {
		return "", errAskGit
	}
	text, err := io.ReadAll(&object.wholeReader)
	if err != nil {
		return "", errAskGit
	}
	line, _, _ := strings.Cut(string(text), "\n")
	tree, found := strings.CutPrefix(line, "tree ")
	if !found {
		return "", errAskGit
	}
	return tree, nil
}
