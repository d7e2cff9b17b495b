package change

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// setAsideRepository has a commit, a baseline of it, and four files of somebody that
// were set aside before the work tree was brought back.
func setAsideRepository(t *testing.T) (*testRepository, *Repository) {
	t.Helper()
	b := newTestRepository(t)
	b.shell(`
git init -q .
mkdir -p lib
printf 'one\n' > lib/a.txt
printf 'run\n' > lib/run.sh; chmod 750 lib/run.sh
ln -s lib/a.txt link
printf 'gone\n' > gone.txt
git add . && git commit -q -m start`)
	r := b.open(Options{})
	if _, _, err := r.Capture(t.Context(), testRun, "baseline"); err != nil {
		t.Fatal(err)
	}
	b.shell(`
printf 'mine\r\n' > lib/a.txt; git add lib/a.txt; printf 'more\n' >> lib/a.txt
printf 'mine\n' >> lib/run.sh
rm link && ln -s /nowhere/else link
mkdir -p new/deep && printf '\000\377' > 'new/deep/ä b.bin'
rm gone.txt
printf '#!/bin/sh\n' > .git/hooks/post-commit`)
	now, err := r.Observe(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	paths := []string{"lib/a.txt", "lib/run.sh", "link", "new/deep/ä b.bin", "gone.txt"}
	edits, err := r.Edits(t.Context(), now, paths)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.SetAsideEdits(t.Context(), testRun, "aside", now, edits, paths); err != nil {
		t.Fatal(err)
	}
	if _, err := r.SetAside(t.Context(), testRun, "aside", now, []string{".git/hooks/post-commit"}); err != nil {
		t.Fatal(err)
	}
	b.shell(`git reset -q --hard && rm -rf new .git/hooks/post-commit; chmod 750 lib/run.sh`)
	return b, r
}

// bringBack lists what was set aside under a name and brings it back.
func (r *Repository) bringBackAll(t *testing.T, name string, edits ...string) (states string, done []string) {
	t.Helper()
	now, err := r.Observe(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	trees, err := r.ListSetAside(t.Context(), testRun, now, edits)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(trees, func(tree SetAsideTree) bool { return tree.Name == name })
	if i < 0 {
		t.Fatalf("%+v has no %s", trees, name)
	}
	var lines []string
	for _, f := range trees[i].Files {
		lines = append(lines, fmt.Sprintf("%s %s %s", f.Path, f.Mode, f.State))
	}
	if done, err = r.BringBack(t.Context(), now, trees[i].Files); err != nil {
		t.Fatal(err)
	}
	var paths []string
	for _, f := range trees[i].Files {
		if f.State != AsideOfGit {
			paths = append(paths, f.Path)
		}
	}
	if left, err := r.StageSetAside(t.Context(), testRun, name, now, paths); err != nil || len(left) > 0 {
		t.Fatalf("not staged: %q, %v", left, err)
	}
	return strings.Join(lines, "\n"), done
}

// What was set aside comes back as it was, byte for byte, with what was staged of it
// and what was removed; again, nothing is left to do.
func TestWhatWasSetAsideComesBack(t *testing.T) {
	t.Parallel()
	b, r := setAsideRepository(t)
	edits := []string{"lib/a.txt", "lib/run.sh", "link", "new/deep/ä b.bin", "gone.txt"}
	states, done := r.bringBackAll(t, "aside", edits...)
	if want := "dot-git/hooks/post-commit 100644 of git\nlib/a.txt 100644 replaced\nlib/run.sh 100755 replaced\nlink 120000 replaced\nnew/deep/ä b.bin 100644 replaced\ngone.txt  replaced"; states != want {
		t.Errorf("states\n%s\nwant\n%s", states, want)
	}
	if len(done) != 7 { // with two folders
		t.Errorf("altered %q", done)
	}
	for name, want := range map[string]string{"lib/a.txt": "mine\r\nmore\n", "lib/run.sh": "run\nmine\n", "new/deep/ä b.bin": "\x00\xff"} {
		if text, err := os.ReadFile(filepath.Join(b.top, name)); err != nil || string(text) != want {
			t.Errorf("%s is %q, %v", name, text, err)
		}
	}
	if info, err := os.Stat(filepath.Join(b.top, "lib/run.sh")); err != nil || info.Mode().Perm()&0o700 != 0o700 || info.Mode().Perm()&0o007 != 0 {
		t.Errorf("lib/run.sh: %v, %v", info.Mode(), err)
	}
	if target, err := os.Readlink(filepath.Join(b.top, "link")); err != nil || target != "/nowhere/else" {
		t.Errorf("link to %q, %v", target, err)
	}
	if out, err := b.try(`test ! -e gone.txt; test ! -e dot-git; git -c core.quotepath=off status --porcelain`); err != nil || out != " D gone.txt\nMM lib/a.txt\n M lib/run.sh\n M link\n?? new/\n" {
		t.Errorf("git status %q, %v", out, err)
	}
	before := b.fingerprint()
	states, done = r.bringBackAll(t, "aside", edits...)
	if strings.Count(states, "present") != 5 || len(done) != 0 {
		t.Errorf("again: altered %q, states\n%s", done, states)
	}
	sameFingerprint(t, b.fingerprint(), before)
}

// A version that is kept nowhere else is told from one that may be replaced, and can
// be set aside before it is.
func TestEditedSinceItWasSetAside(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		edit string
		want map[string]AsideState
	}{
		"nothing":             {"true", map[string]AsideState{"lib/a.txt": AsideReplaced, "link": AsideReplaced}},
		"content":             {"echo later >> lib/a.txt", map[string]AsideState{"lib/a.txt": AsideEdited, "lib/run.sh": AsideReplaced}},
		"the same content":    {`printf 'mine\r\nmore\n' > lib/a.txt`, map[string]AsideState{"lib/a.txt": AsidePresent}},
		"committed":           {"echo later >> lib/a.txt; git commit -qam later", map[string]AsideState{"lib/a.txt": AsideReplaced}},
		"a file for a link":   {"rm link; echo x > link", map[string]AsideState{"link": AsideEdited}},
		"a link for a file":   {"rm lib/a.txt; ln -s /etc/hostname lib/a.txt", map[string]AsideState{"lib/a.txt": AsideEdited}},
		"removed":             {"rm lib/a.txt", map[string]AsideState{"lib/a.txt": AsideReplaced}},
		"a folder for a file": {"rm lib/a.txt; mkdir lib/a.txt; touch lib/a.txt/x", map[string]AsideState{"lib/a.txt": AsideEdited}},
		"a link for a folder": {"rm -r lib; ln -s /tmp lib", map[string]AsideState{"lib/a.txt": AsideEdited, "lib/run.sh": AsideEdited}},
		"a new file":          {"mkdir -p new/deep; echo x > 'new/deep/ä b.bin'", map[string]AsideState{"new/deep/ä b.bin": AsideEdited}},
		"a removed file":      {"echo x >> gone.txt", map[string]AsideState{"gone.txt": AsideEdited}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, r := setAsideRepository(t)
			b.shell(c.edit)
			now, err := r.Observe(t.Context(), nil)
			if err != nil {
				t.Fatal(err)
			}
			trees, err := r.ListSetAside(t.Context(), testRun, now, []string{"gone.txt"})
			if err != nil || len(trees) != 1 {
				t.Fatalf("%+v, %v", trees, err)
			}
			for _, f := range trees[0].Files {
				if want := c.want[f.Path]; want != "" && f.State != want {
					t.Errorf("%s is %s, want %s", f.Path, f.State, want)
				}
			}
		})
	}
	b, r := setAsideRepository(t)
	b.shell("echo later >> lib/a.txt")
	for n, want := range []string{"aside-2", "aside-3"} {
		now, err := r.Observe(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		if name, err := r.SetAsideAgain(t.Context(), testRun, now, []string{"lib/a.txt"}); err != nil || name != want {
			t.Errorf("%d: set aside as %s, %v", n, name, err)
		}
	}
	r.bringBackAll(t, "aside")
	states, _ := r.bringBackAll(t, "aside-2")
	if text, err := os.ReadFile(filepath.Join(b.top, "lib/a.txt")); err != nil || string(text) != "one\nlater\n" || states != "lib/a.txt 100644 replaced" {
		t.Errorf("%q, %v, %s", text, err, states)
	}
}
