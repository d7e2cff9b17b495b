package gitrepo_test

import (
	"bytes"
	"compress/zlib"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/gitrepo"
	"github.com/moonladderstudios/mm-orchestrator/internal/disklimit"
)

// noise is content that cannot be compressed.
func noise(size int) string {
	text := make([]byte, size)
	_, _ = rand.New(rand.NewSource(1)).Read(text)
	return string(text)
}

// A repository that takes more of the disk than a clone may is refused while it is
// cloned, with and without files, and nothing is left of it.
func TestACloneHasALimit(t *testing.T) {
	t.Parallel()
	for name, prepare := range map[string]func(t *testing.T, w *world){
		"a large history":            func(t *testing.T, w *world) { w.push(t, map[string]string{"large": noise(3 << 20)}) },
		"files that compress well":   func(t *testing.T, w *world) { w.push(t, map[string]string{"zeros": strings.Repeat("\x00", 20<<20)}) },
		"a tree with billions of it": pushBomb,
		"many files without content": func(t *testing.T, w *world) { w.push(t, empty(600)) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, map[string]string{"README.md": "hello\n"})
			prepare(t, w)
			w.git = w.open(t, gitrepo.Config{MaxClone: 2 << 20})
			for _, clone := range []func(context.Context, *gitrepo.Remote, string, string) (*gitrepo.Clone, error){w.git.Clone, w.git.Fetch} {
				_, err := clone(t.Context(), w.remote, "main", filepath.Join(w.dir, "clone"))
				var large *disklimit.Error
				if !errors.As(err, &large) || large.Limit != 2<<20 {
					t.Errorf("error %v", err)
				}
				if left, err := os.ReadDir(w.dir); err != nil || len(left) > 0 {
					t.Errorf("left behind: %v, %v", left, err)
				}
			}
		})
	}
}

func empty(n int) map[string]string {
	files := map[string]string{}
	for i := range n {
		files[fmt.Sprintf("files/%d", i)] = ""
	}
	return files
}

// push adds files to the branch main of the server.
func (w *world) push(t *testing.T, files map[string]string) {
	t.Helper()
	if _, err := w.Commit(t.Context(), name, "main", "more", files); err != nil {
		t.Fatal(err)
	}
}

// pushBomb makes a branch whose tree has ten billion files, in a few kilobytes.
func pushBomb(t *testing.T, w *world) {
	t.Helper()
	dir, err := w.Git(t.Context(), name, "rev-parse", "--absolute-git-dir")
	if err != nil {
		t.Fatal(err)
	}
	git := func(stdin string, args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "git", args...)
		cmd.Dir, cmd.Stdin = strings.TrimSpace(dir), strings.NewReader(stdin)
		cmd.Env = append(os.Environ(), "GIT_AUTHOR_NAME=m", "GIT_AUTHOR_EMAIL=m@example.com", "GIT_COMMITTER_NAME=m", "GIT_COMMITTER_EMAIL=m@example.com")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("git %s: %v: %s", args[0], err, out)
		}
		return strings.TrimSpace(string(out))
	}
	entry := "100644 blob " + git("x\n", "hash-object", "-w", "--stdin")
	for range 10 {
		var tree strings.Builder
		for i := range 10 {
			fmt.Fprintf(&tree, "%s\td%d\n", entry, i)
		}
		entry = "040000 tree " + git(tree.String(), "mktree")
	}
	git("", "update-ref", "refs/heads/main", git("", "commit-tree", "-m", "bomb", strings.Fields(entry)[2]))
}

// A server that sends without end is given up when the clone is too large.
func TestAServerThatSendsWithoutEnd(t *testing.T) {
	t.Parallel()
	w := newWorld(t, map[string]string{"README.md": "hello\n"})
	gaveUp := make(chan int, 10)
	w.Intercept(func(rw http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, "/git-upload-pack") {
			return false
		}
		body, err := io.ReadAll(r.Body)
		r.Body = io.NopCloser(bytes.NewReader(body))
		if err != nil || !bytes.Contains(body, []byte("command=fetch")) {
			return false
		}
		rw.Header().Set("Content-Type", "application/x-git-upload-pack-result")
		gaveUp <- endlessPack(rw)
		return true
	})
	w.git = w.open(t, gitrepo.Config{MaxClone: 20 << 20})
	_, err := w.git.Clone(t.Context(), w.remote, "main", filepath.Join(w.dir, "clone"))
	var large *disklimit.Error
	if !errors.As(err, &large) {
		t.Fatalf("error %v", err)
	}
	if sent := <-gaveUp; sent < 10<<20 {
		t.Errorf("only %d bytes were sent", sent)
	}
	if left, err := os.ReadDir(w.dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// endlessPack writes a pack with one file that never ends, until the other side is gone,
// and returns how much it has sent.
func endlessPack(w io.Writer) int {
	sent := 0
	packet := func(text string) bool {
		n, err := fmt.Fprintf(w, "%04x%s", len(text)+4, text)
		sent += n
		return err == nil
	}
	var pack bytes.Buffer
	pack.WriteString("PACK")
	_ = binary.Write(&pack, binary.BigEndian, []uint32{2, 1})
	pack.Write([]byte{0xbf, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01}) // a blob of terabytes
	packet("packfile\n")
	packet("\x01" + pack.String())
	pack.Reset()
	content := zlib.NewWriter(&pack)
	source, block := rand.New(rand.NewSource(1)), make([]byte, 32<<10)
	for {
		_, _ = source.Read(block)
		_, _ = content.Write(block)
		_ = content.Flush()
		if !packet("\x01" + pack.String()) {
			return sent
		}
		pack.Reset()
	}
}

// Files that somebody makes in the clone count too.
func TestAChangeHasALimit(t *testing.T) {
	t.Parallel()
	w := newWorld(t, map[string]string{"README.md": "hello\n"})
	dir := w.clone(t).Dir
	w.git = w.open(t, gitrepo.Config{MaxClone: 1 << 20})
	clone, err := w.git.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	write(t, clone.Tree, map[string]string{"large": noise(3 << 19)})
	var large *disklimit.Error
	if _, err := clone.Diff(t.Context()); !errors.As(err, &large) {
		t.Errorf("error %v", err)
	}
}
