package change

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testRepository is a repository in a folder of the test's own.
type testRepository struct {
	t     testing.TB
	top   string // of the work tree
	base  string // the folder that top is in
	env   []string
	calls int
}

func newTestRepository(t testing.TB) *testRepository {
	t.Helper()
	base, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	b := &testRepository{t: t, base: base, top: filepath.Join(base, "tree")}
	b.env = []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + base, "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1",
		"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.test", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.test",
		"GIT_CONFIG_COUNT=2", "GIT_CONFIG_KEY_0=protocol.file.allow", "GIT_CONFIG_VALUE_0=always",
		"GIT_CONFIG_KEY_1=init.defaultBranch", "GIT_CONFIG_VALUE_1=main",
	}
	if err := os.Mkdir(b.top, 0o755); err != nil {
		t.Fatal(err)
	}
	return b
}

// git is a Git that runs the real program.
func (b *testRepository) git(ctx context.Context, command GitCommand) (int, error) {
	b.calls++
	cmd := exec.CommandContext(ctx, "git", command.Args...)
	cmd.Dir, cmd.Env = command.Dir, append(GitEnviron(b.env, "*"), command.Env...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = command.Stdin, command.Stdout, command.Stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	return 0, err
}

func (b *testRepository) open(options Options) *Repository {
	b.t.Helper()
	r, err := Open(b.t.Context(), b.git, b.top, options)
	if err != nil {
		b.t.Fatal(err)
	}
	return r
}

// shell runs a script in the work tree.
func (b *testRepository) shell(script string) {
	b.t.Helper()
	if out, err := b.try(script); err != nil {
		b.t.Fatalf("%s: %v\n%s", script, err, out)
	}
}

func (b *testRepository) try(script string) (string, error) {
	cmd := exec.Command("sh", "-ec", script)
	cmd.Dir, cmd.Env = b.top, append(slices.Clone(b.env), "BASE="+b.base)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// fingerprint describes the work tree and the git directories, by other means than
// the package: every name with type, permissions, owner, content and link target,
// and what git says about index, references and stashes.
func (b *testRepository) fingerprint() map[string]string {
	b.t.Helper()
	all := map[string]string{}
	inodes := map[uint64][]string{}
	err := filepath.WalkDir(b.top, func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		relative, _ := filepath.Rel(b.top, name)
		parts := strings.Split(relative, "/")
		if at := slices.Index(parts, ".git"); at >= 0 && len(parts) > at+1 {
			inside := strings.Join(parts[at+1:], "/")
			if i := strings.Index(inside, "modules/"); i == 0 {
				inside = strings.Join(parts[at+3:], "/")
			}
			switch {
			case inside == "objects" || inside == "refs" || inside == "logs/refs":
				if entry.IsDir() {
					return fs.SkipDir // described by git
				}
			case inside == "index" || inside == "packed-refs" || strings.HasPrefix(inside, "sharedindex.") || inside == "info/refs" || inside == "ORIG_HEAD" || strings.HasPrefix(inside, "logs"):
				return nil
			}
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		text := info.Mode().String()
		if stat, known := info.Sys().(*syscall.Stat_t); known {
			text += fmt.Sprintf(" %d:%d", stat.Uid, stat.Gid)
			if info.Mode().IsRegular() && stat.Nlink > 1 {
				inodes[stat.Ino] = append(inodes[stat.Ino], relative)
			}
		}
		switch {
		case info.Mode().IsRegular():
			content, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			text += fmt.Sprintf(" %q", content)
		case info.Mode()&fs.ModeSymlink != 0:
			target, _ := os.Readlink(name)
			text += " -> " + target
		}
		all[relative] = text
		return nil
	})
	if err != nil {
		b.t.Fatal(err)
	}
	for _, group := range inodes {
		all["names of "+group[0]] = strings.Join(group, " ")
	}
	dirs := []string{b.top}
	for name := range all {
		if filepath.Base(name) == ".git" && name != ".git" {
			dirs = append(dirs, filepath.Join(b.top, filepath.Dir(name)))
		}
	}
	for _, dir := range dirs {
		for _, query := range []string{
			"git ls-files --stage", "git ls-files -v", "git ls-files --debug | grep -E '^[^ ]|flags' | sed 's/.*flags/flags/'",
			"git for-each-ref --format='%(refname) %(objectname) %(symref)' | grep -v refs/mm-orchestrator || true", "cat .git/HEAD 2>/dev/null || true", "git stash list", "git worktree list",
		} {
			cmd := exec.Command("sh", "-c", query)
			cmd.Dir, cmd.Env = dir, append(slices.Clone(b.env), "GIT_OPTIONAL_LOCKS=0")
			out, _ := cmd.CombinedOutput()
			all[strings.TrimPrefix(dir, b.base)+": "+query] = string(out)
		}
	}
	return all
}

// sameFingerprint compares two fingerprints.
func sameFingerprint(t testing.TB, got, want map[string]string) {
	t.Helper()
	for _, name := range sortedRefs(got, want) {
		if got[name] != want[name] {
			t.Errorf("%s is\n%s\nwant\n%s", name, cut(got[name]), cut(want[name]))
		}
	}
}

func cut(text string) string {
	if text == "" {
		return "(nothing)"
	}
	return text[:min(len(text), 2000)]
}

// dirty fills the work tree with a commit and with all kinds of things that an
// operator may have left in it.
func (b *testRepository) dirty() {
	b.t.Helper()
	b.shell(`
git init -q .
mkdir -p svc lib docs data
printf '1\n2\n3\n4\n5\n6\n7\n8\n' > svc/pyproject.toml
printf 'FROM scratch\n' > svc/Dockerfile
printf 'a==1\n' > svc/requirements.txt
printf 'policy\n' > policy.txt
printf 'b\n' > lib/b.py
printf 'c\n' > lib/c.py
printf 'd\n' > docs/d.txt
printf 'x\n' > 'näme with space.txt'
printf 'run\n' > lib/run.sh; chmod 755 lib/run.sh
ln -s policy.txt link
ln -s ../svc lib/svc-link
printf '*.log\n.env\nbuild/\n' > .gitignore
git add . && git commit -q -m start
git branch other
git tag v1
printf 'stashed\n' >> docs/d.txt && git stash -q
# What an operator has left.
printf 'edited\n' >> lib/b.py
printf 'staged\n' >> lib/c.py && git add lib/c.py && printf 'and more\n' >> lib/c.py
printf 'new\n' > lib/new.py && git add lib/new.py
printf 'later\n' > lib/later.py && git add -N lib/later.py
git rm -q --cached docs/d.txt
printf 'untracked\n' > notes.txt
printf 'SECRET=1\n' > .env; chmod 600 .env
mkdir build && printf 'out\n' > build/out.bin && printf 'log\n' > app.log
mkdir -p empty/deeper && chmod 700 empty
chmod 600 svc/Dockerfile
chmod 711 docs
ln -s /nowhere broken
mkfifo data/pipe
printf 'twins\n' > data/one && ln data/one data/two
git update-index --assume-unchanged policy.txt
printf '#!/bin/sh\nexit 0\n' > .git/hooks/pre-commit && chmod 755 .git/hooks/pre-commit
git config user.name operator
`)
}

// withSubmodule adds a submodule and a repository that is none.
func (b *testRepository) withSubmodule() {
	b.t.Helper()
	b.shell(`
git init -q "$BASE/library" && cd "$BASE/library" && printf 'one\n' > f.txt && git add . && git commit -q -m one && cd "$OLDPWD"
git submodule --quiet add "$BASE/library" sub && git commit -q -m sub sub .gitmodules
printf 'two\n' >> sub/f.txt
git init -q vendored && printf 'v\n' > vendored/v.txt && git -C vendored add . && git -C vendored commit -q -m v && printf 'w\n' > vendored/w.txt
`)
}

// withMerge begins a merge that has a conflict.
func (b *testRepository) withMerge() {
	b.t.Helper()
	b.shell(`
git checkout -q -b theirs && printf 'theirs\n' > merged.txt && git add . && git commit -q -m theirs
git checkout -q main && printf 'ours\n' > merged.txt && git add . && git commit -q -m ours
git merge theirs >/dev/null 2>&1 || true
test -e .git/MERGE_HEAD
`)
}

// allowedIn returns a rule for globs, relative to the top.
func allowedIn(globs ...string) Rules {
	list := NewAllowList(globs)
	return Rules{Allowed: list.Matches}
}

func diffText(list []Difference) string {
	var out bytes.Buffer
	for _, d := range list {
		fmt.Fprintf(&out, "%s %s %s", d.Kind, d.Path, d.Violation)
		if d.SideEffect {
			fmt.Fprint(&out, "(side effect)")
		}
		fmt.Fprintln(&out)
	}
	return out.String()
}
