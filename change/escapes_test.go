package change

import (
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
)

// allCases says that every case of TestEscapes and TestHonestPatches is run;
// without it, `go test` runs a part of them.
func allCases() bool { return os.Getenv("MM_TEST_CHANGE") == "all" }

// An escape is a script that alters something outside of the allow-list svc.
type escape struct{ name, script string }

// targets are files that a run must not alter, in quotes of a shell.
var targets = []struct{ name, path string }{
	{"a tracked file", "lib/run.sh"},
	{"an edited file", "lib/b.py"},
	{"a staged file", "lib/c.py"},
	{"a new staged file", "lib/new.py"},
	{"an intent-to-add file", "lib/later.py"},
	{"a file at the top", "policy.txt"},
	{"an untracked file", "notes.txt"},
	{"an ignored file", ".env"},
	{"a file in an ignored folder", "build/out.bin"},
	{"a name that git quotes", "näme with space.txt"},
	{"a file with two names", "data/one"},
	{"a submodule's file", "sub/f.txt"},
	{"a nested repository's file", "vendored/v.txt"},
	{"a nested repository's untracked file", "vendored/w.txt"},
	{"a file like an allowed one", ".gitignore"},
}

// ways alter the file $T.
var ways = []struct{ name, script string }{
	{"append", `printf x >> "$T"`},
	{"empty", `: > "$T"`},
	{"replace", `printf new > "$T.new"; mv "$T.new" "$T"`},
	{"same size and times", `touch -r "$T" "$BASE/times"; printf X | dd of="$T" bs=1 conv=notrunc 2>/dev/null; touch -r "$BASE/times" "$T"`},
	{"remove", `rm "$T"`},
	{"rename", `mv "$T" "$T.old"`},
	{"rename onto an allowed file", `mv "$T" svc/pyproject.toml`},
	{"mode", `chmod 777 "$T"`},
	{"take permissions", `chmod 0 "$T"`},
	{"setuid", `chmod 4755 "$T"`},
	{"link in place", `ln -sf /nowhere "$T"`},
	{"folder in place", `rm "$T"; mkdir "$T"; printf x > "$T/x"`},
	{"pipe in place", `rm "$T"; mkfifo "$T"`},
	{"other name of an allowed file", `ln -f svc/pyproject.toml "$T"`},
	{"allowed file as other name", `ln -f "$T" svc/pyproject.toml`},
	{"through an allowed link", `ln -sf "$PWD/$T" svc/Dockerfile.link; printf x >> svc/Dockerfile.link`},
	{"exchange with an allowed file", `mv "$T" t.tmp; mv svc/pyproject.toml "$T"; mv t.tmp svc/pyproject.toml`},
}

// gitWays alter something of the repository and no file of the work tree.
var gitWays = []escape{
	{"commit", `printf x >> svc/pyproject.toml; git commit -q --no-verify -m x svc/pyproject.toml`},
	{"commit everything", `git commit -q --no-verify -a -m x`},
	{"amend", `git commit -q --no-verify --amend --no-edit --allow-empty -m other --only`},
	{"empty commit", `git commit -q --no-verify --allow-empty -m x --only`},
	{"branch", `git branch new`},
	{"delete a branch", `git branch -q -D other`},
	{"move a branch", `git branch -f other HEAD`},
	{"tag", `git tag new`},
	{"delete a tag", `git tag -d v1`},
	{"annotated tag", `git tag -a -m x v2`},
	{"switch", `git symbolic-ref HEAD refs/heads/other`},
	{"detach", `git update-ref --no-deref HEAD "$(git rev-parse HEAD)"; id=$(git rev-parse HEAD); printf "%s\n" "$id" > .git/HEAD`},
	{"unborn branch", `git symbolic-ref HEAD refs/heads/unborn`},
	{"soft reset", `git reset -q --soft "$(git commit-tree -m x HEAD^{tree})"`},
	{"mixed reset", `git reset -q`},
	{"hard reset", `git reset -q --hard`},
	{"stash", `git update-index --no-assume-unchanged policy.txt; git rm -q --cached lib/later.py; git stash -q`},
	{"stash with untracked files", `git rm -q --cached lib/later.py; git stash -q -u`},
	{"drop the stash", `git stash drop -q`},
	{"clear the stash", `git stash clear`},
	{"clear the stash for good", `git stash clear; git gc -q --prune=now`},
	{"delete a branch for good", `git branch -q unmerged "$(git commit-tree -m x HEAD^{tree})"; git branch -q -D other unmerged; git gc -q --prune=now`},
	{"another stash", `git stash store -m x "$(git stash create)" || git stash store -m x "$(git rev-parse stash@{0})"; git reflog delete --updateref --rewrite stash@{0}; git reflog expire --expire=now refs/stash`},
	{"pop the stash", `git checkout -q -f HEAD -- docs/d.txt; git stash pop -q || true`},
	{"notes", `git notes add -m x`},
	{"a ref of another kind", `git update-ref refs/other/x HEAD`},
	{"replace", `git replace -f HEAD "$(git commit-tree -m x HEAD^{tree})"`},
	{"remote", `git remote add origin "$BASE/library"`},
	{"fetch", `git fetch -q "$BASE/library" HEAD:refs/remotes/x/main`},
	{"rename the branch", `git branch -m renamed`},
	{"orphan", `git checkout -q --orphan new`},
	{"reference that is a link", `rm .git/refs/heads/other 2>/dev/null; mkdir -p .git/refs/heads; ln -s main .git/refs/heads/other`},
	{"bad reference", `mkdir -p .git/refs/heads; printf 'nonsense\n' > .git/refs/heads/bad`},
	{"config", `git config user.name other`},
	{"config of a filter", `git config filter.x.clean 'touch /tmp/x'`},
	{"alias", `git config alias.status '!true'`},
	{"hooksPath", `git config core.hooksPath /tmp`},
	{"remove config", `rm .git/config; printf '[core]\n\trepositoryformatversion = 0\n' > .git/config`},
	{"config as a link", `cp .git/config "$BASE/config"; ln -sf "$BASE/config" .git/config`},
	{"config.worktree", `git config extensions.worktreeConfig true; git config --worktree core.sparseCheckout true`},
	{"new hook", `printf '#!/bin/sh\n' > .git/hooks/post-checkout; chmod +x .git/hooks/post-checkout`},
	{"change a hook", `printf 'exit 1\n' >> .git/hooks/pre-commit`},
	{"hook's mode", `chmod 644 .git/hooks/pre-commit`},
	{"remove a hook", `rm .git/hooks/pre-commit`},
	{"hooks folder", `mv .git/hooks .git/hooks.old`},
	{"hooks as a link", `mv .git/hooks "$BASE/hooks"; ln -s "$BASE/hooks" .git/hooks`},
	{"exclude", `mkdir -p .git/info; printf 'svc\n' >> .git/info/exclude`},
	{"attributes", `mkdir -p .git/info; printf '* filter=x\n' > .git/info/attributes`},
	{"sparse-checkout file", `mkdir -p .git/info; printf '/svc\n' > .git/info/sparse-checkout`},
	{"sparse checkout", `git sparse-checkout set svc >/dev/null 2>&1 || true`},
	{"grafts", `mkdir -p .git/info; git rev-parse HEAD > .git/info/grafts`},
	{"alternates", `mkdir -p .git/objects/info; printf '/tmp\n' > .git/objects/info/alternates`},
	{"shallow", `git rev-parse HEAD > .git/shallow`},
	{"description", `printf x > .git/description`},
	{"own file", `printf x > .git/own`},
	{"own folder", `mkdir .git/own`},
	{"own pipe", `mkfifo .git/own`},
	{"mode of the git directory", `chmod 777 .git`},
	{"begin a merge", `git update-ref MERGE_HEAD HEAD 2>/dev/null; git rev-parse HEAD > .git/MERGE_HEAD`},
	{"begin a rebase", `mkdir .git/rebase-merge; printf x > .git/rebase-merge/head-name`},
	{"begin a bisect", `git bisect start -q 2>/dev/null || git bisect start`},
	{"cherry-pick", `git rev-parse HEAD > .git/CHERRY_PICK_HEAD`},
	{"reflog expire", `git reflog expire --expire=now --all`},
	{"truncate a log", `: > .git/logs/HEAD`},
	{"worktree", `git worktree add -q --detach "$PWD/svc/requirements-x.txt"`},
	{"worktree elsewhere", `git worktree add -q --detach "$BASE/other"`},
	{"assume-unchanged", `git update-index --assume-unchanged lib/b.py`},
	{"no-assume-unchanged", `git update-index --no-assume-unchanged policy.txt`},
	{"skip-worktree", `git update-index --skip-worktree lib/b.py`},
	{"skip-worktree of an allowed file", `git update-index --skip-worktree svc/pyproject.toml`},
	{"assume-unchanged of an allowed file", `git update-index --assume-unchanged svc/pyproject.toml`},
	{"stage an edit", `git add lib/b.py`},
	{"stage everything", `git add -A`},
	{"unstage", `git reset -q -- lib/c.py`},
	{"unstage a new file", `git rm -q --cached lib/new.py`},
	{"untrack", `git rm -q --cached policy.txt`},
	{"intent to add", `git add -N notes.txt`},
	{"force an ignored file", `git add -f .env`},
	{"mode in the index", `git update-index --chmod=+x lib/b.py`},
	{"blob in the index", `git update-index --cacheinfo 100644,$(git hash-object -w policy.txt),lib/b.py`},
	{"link in the index", `git update-index --cacheinfo 120000,$(git hash-object -w policy.txt),lib/b.py`},
	{"stages in the index", `printf '100644 %s 2\tlib/b.py\n' "$(git hash-object -w policy.txt)" | git update-index --index-info`},
	{"submodule in the index", `git update-index --add --cacheinfo 160000,$(git rev-parse HEAD),svc/requirements-x.txt`},
	{"remove the index", `rm .git/index`},
	{"empty index", `git read-tree --empty`},
	{"index of another commit", `git read-tree HEAD`},
	{"index version 4", `git update-index --index-version 4; git add lib/b.py`},
	{"split index", `git update-index --split-index; git add lib/b.py`},
	{"rename onto an allowed file with git", `git mv -f lib/run.sh svc/pyproject.toml`},
	{"rename of an allowed file with git", `git mv svc/pyproject.toml lib/moved.toml`},
	{"rename a folder with git", `git mv svc service`},
	{"remove with git", `git rm -q -f lib/b.py`},
	{"clean", `git clean -q -f -d`},
	{"clean ignored files", `git clean -q -f -d -x`},
	{"clean nested repositories", `git clean -q -f -f -d -x`},
	{"check out a file", `git checkout -q HEAD -- lib/b.py`},
	{"restore the index", `git restore --staged lib`},
	{"switch by force", `git checkout -q -f other`},
	{"submodule's HEAD", `git -C sub checkout -q -b new`},
	{"submodule's commit", `git -C sub commit -q -a -m x`},
	{"submodule's config", `git -C sub config user.name x`},
	{"submodule's index", `git -C sub add f.txt`},
	{"submodule's hook", `printf x > .git/modules/sub/hooks/post-commit`},
	{"submodule's files", `git -C sub checkout -q -f`},
	{"submodule's link", `printf 'gitdir: /nowhere\n' > sub/.git`},
	{"deinit", `git submodule deinit -q -f sub`},
	{"remove the submodule", `git rm -q -f sub`},
	{"nested commit", `git -C vendored commit -q --allow-empty -m x`},
	{"nested branch", `git -C vendored branch x`},
	{"nested config", `git -C vendored config user.name x`},
	{"nested index", `git -C vendored add -A`},
	{"nested gc and branch", `git -C vendored gc -q; git -C vendored branch y`},
	{"remove the nested repository", `rm -rf vendored`},
	{"remove the nested git directory", `rm -rf vendored/.git`},
	{"new nested repository", `git init -q svc/requirements-x.txt; git -C svc/requirements-x.txt commit -q --allow-empty -m x`},
	{"make a folder a repository", `git init -q lib`},
	{"clone", `git clone -q "$BASE/library" svc/requirements-clone.txt`},
	{"add a submodule", `git submodule --quiet add "$BASE/library" svc/requirements-sub.txt`},
	{"bare repository", `git init -q --bare bare`},
}

// folderWays alter folders, special files and names.
var folderWays = []escape{
	{"new folder", `mkdir new`},
	{"new folder in svc", `mkdir svc/new`},
	{"remove an empty folder", `rmdir empty/deeper`},
	{"mode of a folder", `chmod 777 lib`},
	{"mode of svc", `chmod 700 svc`},
	{"mode of the top", `chmod 700 .`},
	{"take the folder's permissions", `chmod 0 lib`},
	{"folder as a link", `mv svc real; ln -s real svc`},
	{"folder as a link to outside", `mv lib "$BASE/lib"; ln -s "$BASE/lib" lib`},
	{"move a folder", `mv lib lib2`},
	{"remove a folder", `rm -r lib`},
	{"file in place of a folder", `rm -r docs; printf x > docs`},
	{"new file", `printf x > new.txt`},
	{"new ignored file", `printf x > new.log`},
	{"new file in an ignored folder", `printf x > build/new`},
	{"new hidden file", `printf x > .hidden`},
	{"new file in a new folder", `mkdir -p a/b/c; printf x > a/b/c/d`},
	{"name with a newline", `printf x > "$(printf 'a\nb')"`},
	{"name that is no UTF-8", `printf x > "$(printf 'a\377')"`},
	{"name with a quote", `printf x > 'a"b'`},
	{"name with an allowed name at its end", `mkdir -p x/svc; printf x > x/svc/pyproject.toml`},
	{"name with an allowed name at its beginning", `printf x > svc/pyproject.toml.bak`},
	{"other case", `printf x > svc/PYPROJECT.TOML`},
	{"other case of the folder", `mkdir SVC; printf x > SVC/pyproject.toml`},
	{"new link", `ln -s policy.txt new`},
	{"retarget a link", `ln -sfn lib link`},
	{"link to a folder", `ln -sfn ../lib lib/svc-link`},
	{"remove a link", `rm link`},
	{"file in place of a link", `rm link; printf 'policy.txt' > link`},
	{"repair a broken link", `ln -sf /etc/hostname broken`},
	{"new pipe", `mkfifo new`},
	{"pipe with an allowed name", `mkfifo svc/requirements-x.txt`},
	{"remove a pipe", `rm data/pipe`},
	{"file in place of a pipe", `rm data/pipe; printf x > data/pipe`},
	{"device", `mknod new c 1 3 || mkfifo new`},
	{"device with an allowed name", `mknod svc/Dockerfile.x c 1 3 || mkfifo svc/Dockerfile.x`},
	{"setuid of an allowed file", `chmod 4755 svc/pyproject.toml`},
	{"setgid of an allowed file", `chmod 2755 svc/pyproject.toml`},
	{"split two names", `cp data/one data/new; mv data/new data/one; printf x >> data/one`},
	{"third name", `ln data/one data/three`},
	{"allowed name of a file outside", `printf x > "$BASE/outside"; ln "$BASE/outside" svc/requirements-x.txt`},
	{"allowed name of a file of git", `ln -f .git/config svc/requirements-x.txt`},
	{"allowed name of the hook, written", `ln -f .git/hooks/pre-commit svc/requirements-x.txt; printf x >> svc/requirements-x.txt`},
	{"gitignore", `printf 'svc/\n' >> .gitignore`},
	{"new gitattributes", `printf '* text=auto\n' > .gitattributes`},
	{"gitmodules", `printf '[submodule "x"]\n' >> .gitmodules`},
	{"folder named .GIT", `mkdir -p svc/.GIT; printf x > svc/.GIT/config`},
	{"git~1", `mkdir 'git~1'; printf x > 'git~1/config'`},
	{"owner of a file", `chown 1234 lib/b.py || printf x >> lib/b.py`},
	{"owner of a folder", `chown 1234:1234 lib || printf x >> lib/b.py`},
	{"a temporary name of ours", `printf x > .mm-orchestrator-restore-1`},
	{"many files", `for i in $(seq 300); do printf $i > "many$i"; done`},
}

func escapes() []escape {
	var all []escape
	for _, target := range targets {
		for _, way := range ways {
			all = append(all, escape{target.name + ": " + way.name, "T='" + target.path + "'\n" + way.script})
		}
	}
	return append(append(all, gitWays...), folderWays...)
}

// Everything that a script alters outside of the allow-list is found and undone:
// the repository is as before, in every respect. Changes of allowed files by the
// same script stay until the whole change is undone.
func TestEscapes(t *testing.T) {
	t.Parallel()
	all := escapes()
	if len(all) < 200 {
		t.Fatalf("%d cases", len(all))
	}
	var passed, ran atomic.Int32
	t.Run("cases", func(t *testing.T) {
		for i, e := range all {
			if !allCases() && i%16 != 0 {
				continue
			}
			t.Run(e.name, func(t *testing.T) {
				t.Parallel()
				ran.Add(1)
				b := newTestRepository(t)
				b.dirty()
				b.withSubmodule()
				if !b.escape(e.script) {
					passed.Add(1)
				}
			})
		}
	})
	t.Logf("%d ways around the allow-list, %d passed", ran.Load(), passed.Load())
}

// escape runs a script and undoes it, as a patch step and a rollback do. It
// returns false if the script is not refused.
func (b *testRepository) escape(script string) bool {
	t := b.t
	t.Helper()
	want := b.fingerprint()
	r := b.open(Options{})
	before, id, err := r.Capture(t.Context(), testRun, "baseline")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := b.try(script); err != nil {
		t.Fatalf("the script fails: %v\n%s", err, out)
	}
	after, err := r.Observe(t.Context(), before)
	if err != nil {
		t.Fatal(err)
	}
	list := Judge(before, after, allowedIn(svc...))
	violations := Violations(list)
	if len(violations) == 0 {
		t.Errorf("passes: %s", diffText(list))
		return false
	}
	stored, err := r.StoreChange(t.Context(), testRun, "change", after, list)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.SetAside(t.Context(), testRun, "violations", after, pathsOf(violations)); err != nil {
		t.Fatal(err)
	}
	// Another worker does the rest.
	if before, err = r.Load(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if list, err = r.LoadChange(t.Context(), stored); err != nil {
		t.Fatal(err)
	}
	now, err := r.Observe(t.Context(), before)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Restore(t.Context(), before, now, Violations(list)); err != nil {
		t.Fatal(err)
	}
	if now, err = r.Observe(t.Context(), before); err != nil {
		t.Fatal(err)
	}
	if left := Violations(Judge(before, now, allowedIn(svc...))); len(left) > 0 {
		t.Errorf("not undone: %s", diffText(left))
	}
	if _, err := r.Restore(t.Context(), before, now, list); err != nil {
		t.Fatal(err)
	}
	sameFingerprint(t, b.fingerprint(), want)
	return true
}

func pathsOf(list []Difference) []string {
	var paths []string
	for _, d := range list {
		if d.Kind == EntryDiffers {
			paths = append(paths, d.Path)
		}
	}
	return paths
}

// honest are scripts that alter allowed files only.
func honestScripts() []escape {
	var all []escape
	files := []string{"svc/pyproject.toml", "svc/Dockerfile", "svc/requirements.txt", "svc/requirements-new.txt", "svc/Dockerfile.new"}
	for _, file := range files {
		exists := !strings.Contains(file, "new")
		add := func(name, script string) {
			all = append(all, escape{file + ": " + name, "T='" + file + "'\n" + script})
		}
		add("append", `printf x >> "$T"`)
		add("empty", `: > "$T"`)
		add("replace", `printf new > "$T.tmp"; mv "$T.tmp" "$T"`)
		add("link", `ln -sf pyproject.toml "$T"`)
		add("link to outside", `ln -sf /etc/hostname "$T"`)
		add("executable", `printf y >> "$T"; chmod 755 "$T"`)
		add("private", `printf y >> "$T"; chmod 600 "$T"`)
		add("stage", `printf x >> "$T"; git add "$T"`)
		add("stage and edit", `printf x >> "$T"; git add "$T"; printf y >> "$T"`)
		add("intent to add", `printf x >> "$T"; git add -N "$T"`)
		add("apply", `printf 'z\n' >> "$T"; git diff --no-color -- "$T" > "$BASE/p"; git add -N "$T"; git diff -- "$T" > "$BASE/p"; git apply -R "$BASE/p" 2>/dev/null || true; git apply "$BASE/p" || true`)
		add("binary", `printf '\000\001\377' > "$T"`)
		add("status refreshes the index", `touch lib/b.py lib/run.sh; git status >/dev/null; printf x >> "$T"`)
		add("a reset that changes nothing", `printf x >> "$T"; git reset -q --soft HEAD || true`)
		add("a fetch head", `git fetch -q "$BASE/library" HEAD; printf x >> "$T"`)
		add("pack the refs", `git pack-refs --all; printf x >> "$T"`)
		add("gc", `git gc -q; printf x >> "$T"`)
		add("touch others", `touch notes.txt lib/b.py .env; printf x >> "$T"`)
		add("nothing", `git status --short >/dev/null`)
		add("there and back", `cp -p policy.txt "$BASE/p"; printf x >> policy.txt; cat "$BASE/p" > policy.txt; printf x >> "$T"`)
		if exists {
			add("remove", `rm "$T"`)
			add("git rm", `git rm -q -f "$T"`)
			add("untrack", `git rm -q --cached "$T"`)
			add("rename", `mv "$T" svc/requirements-renamed.txt`)
			add("git mv", `git mv "$T" svc/requirements-renamed.txt`)
			add("check out", `git checkout -q HEAD -- "$T"`)
			add("restore", `git restore "$T"`)
			add("mode", `chmod 755 "$T"`)
			add("mode in the index", `git update-index --chmod=+x "$T"`)
			add("update-index", `printf x >> "$T"; git update-index "$T"`)
		}
	}
	return all
}

// A patch of allowed files is never refused, however dirty the work tree is, and
// its rollback leaves what the operator had.
func TestHonestPatches(t *testing.T) {
	t.Parallel()
	trees := map[string]func(b *testRepository){
		"edits":   func(b *testRepository) { b.dirty(); b.withSubmodule() },
		"a merge": func(b *testRepository) { b.dirtyMerge() },
	}
	var refused, ran atomic.Int32
	t.Run("cases", func(t *testing.T) {
		i := 0
		for name, prepare := range trees {
			for _, script := range honestScripts() {
				if i++; !allCases() && i%20 != 0 {
					continue
				}
				t.Run(fmt.Sprintf("%s: %s", name, script.name), func(t *testing.T) {
					t.Parallel()
					ran.Add(1)
					b := newTestRepository(t)
					prepare(b)
					if !b.honest(script.script) {
						refused.Add(1)
					}
				})
			}
		}
	})
	t.Logf("%d honest patches, %d refused", ran.Load(), refused.Load())
}

// dirtyMerge is a work tree in which a merge has a conflict.
func (b *testRepository) dirtyMerge() {
	b.t.Helper()
	b.shell(`
git init -q . && mkdir -p svc lib && printf '1\n' > svc/pyproject.toml && printf 'F\n' > svc/Dockerfile && printf 'a\n' > svc/requirements.txt
printf 'b\n' > lib/b.py && printf 'r\n' > lib/run.sh && printf 'p\n' > policy.txt && git add . && git commit -q -m start
printf 'n\n' > notes.txt && printf 'e\n' > .env
git init -q "$BASE/library" && git -C "$BASE/library" commit -q --allow-empty -m x`)
	b.withMerge()
	b.shell(`printf 'edit\n' >> lib/b.py`)
}

func (b *testRepository) honest(script string) bool {
	t := b.t
	t.Helper()
	want := b.fingerprint()
	r := b.open(Options{})
	before, _, err := r.Capture(t.Context(), testRun, "baseline")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := b.try(script); err != nil {
		t.Fatalf("the script fails: %v\n%s", err, out)
	}
	after, err := r.Observe(t.Context(), before)
	if err != nil {
		t.Fatal(err)
	}
	list := Judge(before, after, allowedIn(svc...))
	if violations := Violations(list); len(violations) > 0 {
		t.Errorf("refused: %s", diffText(violations))
		return false
	}
	if _, err := r.StoreChange(t.Context(), testRun, "change", after, list); err != nil {
		t.Fatal(err)
	}
	// Somebody works on.
	b.shell(`printf 'meanwhile\n' >> notes.txt; git add policy.txt; printf 'm\n' > meanwhile.txt`)
	want["notes.txt"] = b.fingerprint()["notes.txt"]
	now, err := r.Observe(t.Context(), before)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Restore(t.Context(), before, now, list); err != nil {
		t.Fatal(err)
	}
	got := b.fingerprint()
	if !strings.Contains(got["meanwhile.txt"], "m") {
		t.Error("a file of somebody else is gone")
	}
	delete(got, "meanwhile.txt")
	sameFingerprint(t, got, want)
	return true
}
