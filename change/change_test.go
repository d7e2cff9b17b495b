package change

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

const testRun = "11111111-2222-3333-4444-555555555555"

// svc is the allow-list of most tests.
var svc = []string{"svc/pyproject.toml", "svc/Dockerfile*", "svc/requirements*.txt"}

// A capture alters nothing that the operator has, and what it stores is the state.
func TestCaptureAltersNothing(t *testing.T) {
	t.Parallel()
	b := newTestRepository(t)
	b.dirty()
	b.withSubmodule()
	before := b.fingerprint()
	index, _ := os.ReadFile(filepath.Join(b.top, ".git/index"))
	r := b.open(Options{})
	state, id, err := r.Capture(t.Context(), testRun, "baseline")
	if err != nil {
		t.Fatal(err)
	}
	sameFingerprint(t, b.fingerprint(), before)
	if after, _ := os.ReadFile(filepath.Join(b.top, ".git/index")); string(after) != string(index) {
		t.Error("the index file was written")
	}
	loaded, err := r.Load(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	want, _ := json.Marshal(state)
	got, _ := json.Marshal(loaded)
	if string(got) != string(want) {
		t.Errorf("loaded\n%s\nwant\n%s", got, want)
	}
	if list := Compare(state, loaded); len(list) > 0 {
		t.Errorf("a loaded state differs: %s", diffText(list))
	}
	for i := range state.GitDirs {
		if !reflect.DeepEqual(state.GitDirs[i].index, loaded.GitDirs[i].index) {
			t.Errorf("index of %s differs", state.GitDirs[i].Path)
		}
	}
	// A person can use it, also after a gc.
	b.shell(`git gc -q --prune=now
rm -r svc notes.txt .env
git restore --source=refs/mm-orchestrator/runs/` + testRun + `/baseline --worktree -- svc notes.txt .env
test "$(cat .env)" = SECRET=1; test "$(cat notes.txt)" = untracked; test -f svc/pyproject.toml
git fsck --strict 2>&1 | grep -v dangling || true`)
	if out, err := b.try("git fsck --strict --no-dangling"); err != nil {
		t.Errorf("fsck: %s", out)
	}
	if out, _ := b.try("git log --all --oneline"); strings.Contains(out, "mm-orchestrator") || strings.Count(out, "\n") > 8 {
		t.Errorf("git log --all shows %s", out)
	}
}

func TestNamesThatAreNoUTF8ComeBack(t *testing.T) {
	t.Parallel()
	b := newTestRepository(t)
	b.shell("git init -q .; printf x > \"$(printf 'a\\377b')\"; printf y > \"$(printf 'new\\nline')\"; printf z > 'per%cent%41'; git add .")
	before := b.fingerprint()
	r := b.open(Options{})
	_, id, err := r.Capture(t.Context(), testRun, "baseline")
	if err != nil {
		t.Fatal(err)
	}
	b.shell("rm -f ./*; git rm -q -r --cached .")
	b.restoreAll(r, id)
	sameFingerprint(t, b.fingerprint(), before)
}

func TestRefsAndRepositoriesThatAreNoUTF8ComeBack(t *testing.T) {
	t.Parallel()
	b := newTestRepository(t)
	b.shell(`git init -q .; printf x > a; git add .; git commit -q -m x
git branch "$(printf 'caf\351')"; git branch "$(printf 'packed\351')"; git pack-refs --all; git branch "$(printf 'loose\351')"; git branch 'per%41'
git symbolic-ref HEAD "refs/heads/$(printf 'caf\351')"
nested="$(printf 'n\351')"; git init -q "$nested"; printf y > "$nested/f"; git -C "$nested" add f; git -C "$nested" commit -q -m y`)
	before := b.fingerprint()
	r := b.open(Options{})
	state, id, err := r.Capture(t.Context(), testRun, "baseline")
	if err != nil {
		t.Fatal(err)
	}
	loaded, err := r.Load(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	if list := Compare(state, loaded); len(list) > 0 {
		t.Errorf("a loaded state differs: %s", diffText(list))
	}
	b.shell(`git branch -q -D "$(printf 'loose\351')"; git symbolic-ref HEAD refs/heads/main
rm -rf "$(printf 'n\351')"`)
	b.restoreAll(r, id)
	sameFingerprint(t, b.fingerprint(), before)
}

// restoreAll brings everything back to a captured state.
func (b *testRepository) restoreAll(r *Repository, id string) {
	b.t.Helper()
	before, err := r.Load(b.t.Context(), id)
	if err != nil {
		b.t.Fatal(err)
	}
	now, err := r.Observe(b.t.Context(), before)
	if err != nil {
		b.t.Fatal(err)
	}
	if _, err := r.Restore(b.t.Context(), before, now, Compare(before, now)); err != nil {
		b.t.Fatal(err)
	}
	now, err = r.Observe(b.t.Context(), before)
	if err != nil {
		b.t.Fatal(err)
	}
	for _, d := range Compare(before, now) {
		if !d.SideEffect {
			b.t.Errorf("still differs: %s %s", d.Kind, d.Path)
		}
	}
}

func TestALargeRepositoryIsCapturedQuickly(t *testing.T) {
	t.Parallel()
	b := newTestRepository(t)
	for i := range 5000 {
		dir := filepath.Join(b.top, fmt.Sprintf("d%02d/e%02d", i%50, i%7))
		if i < 350 {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("f%04d", i)), []byte(strings.Repeat(fmt.Sprint(i, "\n"), 500)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b.shell("git init -q . && git add . && git commit -q -m x && git gc -q")
	for i := range 100 {
		if err := os.WriteFile(filepath.Join(b.top, fmt.Sprintf("untracked%d", i)), []byte(fmt.Sprint(i)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	r := b.open(Options{})
	begin := time.Now()
	state, id, err := r.Capture(t.Context(), testRun, "baseline")
	if err != nil {
		t.Fatal(err)
	}
	captured := time.Since(begin)
	calls := b.calls
	begin = time.Now()
	if _, err := r.Observe(t.Context(), state); err != nil {
		t.Fatal(err)
	}
	observed := time.Since(begin)
	begin = time.Now()
	if _, err := r.Load(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	t.Logf("capture %s with %d git commands, observe %s, load %s", captured, calls, observed, time.Since(begin))
	if calls > 12 {
		t.Errorf("a capture runs %d git commands", calls)
	}
}

// In a sparse index a folder stands for all files in it. A state has the files, and what is
// restored is an index that git can use.
func TestASparseIndexIsRestored(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]string{
		"beside the folders": `echo new >d/new; git add d/new; git rm -q --cached d/d`,
		"inside of one":      `mkdir e; echo new >e/new; git add --sparse e/new`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newTestRepository(t)
			b.shell(`git init -q; mkdir -p d e/f; echo d >d/d; echo e >e/e; echo f >e/f/f; git add .; git commit -qm one
git sparse-checkout set --cone --sparse-index d; git ls-files --sparse | grep -q '^e/$'`)
			before := b.fingerprint()
			r := b.open(Options{})
			_, id, err := r.Capture(t.Context(), testRun, "baseline")
			if err != nil {
				t.Fatal(err)
			}
			b.shell(change)
			b.restoreAll(r, id)
			sameFingerprint(t, b.fingerprint(), before)
			// Somebody else has staged a file, so that the index is written anew.
			b.shell(change + `; echo later >d/later; git add d/later`)
			baseline, err := r.Load(t.Context(), id)
			if err != nil {
				t.Fatal(err)
			}
			now, err := r.Observe(t.Context(), baseline)
			if err != nil {
				t.Fatal(err)
			}
			own := slices.DeleteFunc(Compare(baseline, now), func(d Difference) bool { return d.Path == "d/later" })
			if _, err := r.Restore(t.Context(), baseline, now, own); err != nil {
				t.Fatal(err)
			}
			b.shell(`test "$(git status --porcelain)" = "A  d/later"; git fsck --strict --no-dangling`)
		})
	}
}

func TestAnIndexThatHasToBeUnderstoodIsNotGuessed(t *testing.T) {
	t.Parallel()
	for extension, known := range map[string]bool{"ABCD": true, "abcd": false} {
		data := append([]byte("DIRC\x00\x00\x00\x02\x00\x00\x00\x00"+extension+"\x00\x00\x00\x01x"), make([]byte, 20)...)
		if _, err := parseIndex(data, 20); (err == nil) != known {
			t.Errorf("%s: %v", extension, err)
		}
	}
}
