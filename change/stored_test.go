package change

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// withoutGit opens the repository so that starting git fails from then on.
func (b *testRepository) withoutGit() *Repository {
	r := b.open(Options{})
	r.git = func(_ context.Context, command GitCommand) (int, error) {
		return 0, errors.New("git was started: " + strings.Join(command.Args, " "))
	}
	return r
}

// What the package finds without git is what git says, for objects with files of their
// own, in packs and in alternates, and for those that nobody has.
func TestObjectsAreFoundAsGitFindsThem(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		script string
		askGit bool
	}{
		"files":      {script: `true`},
		"pack":       {script: `git gc -q --prune=now; test -z "$(find .git/objects -path '*/[0-9a-f][0-9a-f]/*')"`},
		"packs":      {script: `git repack -q -d; echo z >z; git add z; git commit -qm z; git repack -q -d; echo u >u; git add u`},
		"midx":       {script: `git repack -q -d; echo z >z; git add z; git commit -qm z; git repack -q -d; git multi-pack-index write`},
		"old index":  {script: `git -c pack.indexVersion=1 repack -q -a -d -F`, askGit: true},
		"alternates": {script: `git clone -q -s . "$BASE/other"; mv .git "$BASE/first"; sed -i s:tree/.git:first: "$BASE/other/.git/objects/info/alternates"; mv "$BASE/other/.git" .git`, askGit: true},
		"damaged":    {script: `f=$(find .git/objects -path '*/[0-9a-f][0-9a-f]/*' | sort | head -n 1); chmod u+w "$f"; : >"$f"`, askGit: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newTestRepository(t)
			b.shell(`git init -q; mkdir d; for i in 1 2 3 4 5 6 7 8 9; do echo $i >d/$i; done; git add .; git commit -qm one; echo x >x; git add x; git commit -qm two`)
			out, err := b.try(`git rev-list --all --objects | cut -d' ' -f1`)
			if err != nil {
				t.Fatal(err)
			}
			b.shell(c.script)
			ids := append(strings.Fields(out), strings.Repeat("0", 39)+"1", strings.Repeat("f", 40), strings.Repeat("7", 40))
			checked, err := b.try(`printf '%s\n' ` + strings.Join(ids, " ") + ` | git cat-file --batch-check='%(objectname)' 2>/dev/null`)
			if err != nil {
				t.Fatal(err)
			}
			var want []string
			for line := range strings.Lines(checked) {
				if id, isMissing := strings.CutSuffix(strings.TrimSpace(line), " missing"); isMissing {
					want = append(want, id)
				}
			}
			if !c.askGit {
				got, err := b.withoutGit().missing(t.Context(), ids)
				if err != nil || !slices.Equal(got, want) {
					t.Errorf("missing %v (%v), git says %v", got, err, want)
				}
			}
			if got, err := b.open(Options{}).missing(t.Context(), ids); err != nil || !slices.Equal(got, want) {
				t.Errorf("with git: missing %v (%v), git says %v", got, err, want)
			}
		})
	}
}

// A damaged object is an error, and never half of its content.
func TestAnObjectIsReadWholeOrNotAtAll(t *testing.T) {
	t.Parallel()
	b := newTestRepository(t)
	b.shell(`git init -q`)
	content := bytes.Repeat([]byte("some content\n"), 5000)
	r := b.withoutGit()
	w, err := r.newObjectWriter()
	if err != nil {
		t.Fatal(err)
	}
	id, err := w.writeBytes("blob", content)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := r.readObject(t.Context(), id); err != nil || !bytes.Equal(got, content) {
		t.Fatalf("read %d bytes: %v", len(got), err)
	}
	path := filepath.Join(b.top, ".git/objects", id[:2], id[2:])
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	flipped := slices.Clone(whole)
	flipped[len(flipped)-1] ^= 1
	for name, damaged := range map[string][]byte{"cut off": whole[:len(whole)-8], "checksum": flipped, "half": whole[:len(whole)/2]} {
		if err := os.WriteFile(path, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := r.readObject(t.Context(), id); err == nil && bytes.Equal(got, content) {
			t.Errorf("%s: the damage is not seen", name)
		} else if err == nil {
			t.Errorf("%s: read %d bytes without an error", name, len(got))
		}
		err := r.readFew(t.Context(), []string{id}, func(_ int, _ string, _ int64, in io.Reader) error {
			_, err := io.Copy(io.Discard, in)
			return err
		})
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// Refs that are set without git are those that git reads, and a lock of somebody else
// is respected.
func TestRefsAreSetAsGitSetsThem(t *testing.T) {
	t.Parallel()
	b := newTestRepository(t)
	b.shell(`git init -q; echo x >x; git add x; git commit -qm one; echo y >x; git commit -qam two`)
	first, second := b.output(`git rev-parse HEAD~1:`), b.output(`git rev-parse HEAD:`)
	r := b.withoutGit()
	ref := Ref(testRun, "baseline")
	set := func(id string) {
		t.Helper()
		if err := r.setRefs(t.Context(), map[string]string{ref: id}); err != nil {
			t.Fatal(err)
		}
		if got := b.output(`git rev-parse ` + ref); got != id {
			t.Errorf("git reads %s, want %s", got, id)
		}
	}
	set(first)
	set(second)
	b.shell(`git pack-refs --all --prune`)
	set(first)
	b.shell(`git fsck --strict`)
	lock := filepath.Join(b.top, ".git", ref+".lock")
	if err := os.WriteFile(lock, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := b.open(Options{}).setRefs(t.Context(), map[string]string{ref: second}); err == nil {
		t.Error("a ref was set although its lock is somebody else's")
	}
	if got := b.output(`git rev-parse ` + ref); got != first {
		t.Errorf("the ref is %s in spite of its lock", got)
	}
	if err := os.Remove(lock); err != nil {
		t.Fatal(err)
	}
	// A symbolic ref is replaced, and not what it names.
	b.shell(`git symbolic-ref ` + ref + ` refs/heads/main`)
	if err := b.open(Options{}).setRefs(t.Context(), map[string]string{ref: second}); err != nil {
		t.Fatal(err)
	}
	if got := b.output(`git rev-parse main:`); got != second {
		t.Errorf("the branch is at %s", got)
	}
	b.shell(`git fsck --strict`)
}

// output returns what a script prints, without the newline at its end.
func (b *testRepository) output(script string) string {
	b.t.Helper()
	out, err := b.try(script)
	if err != nil {
		b.t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return strings.TrimSpace(out)
}
