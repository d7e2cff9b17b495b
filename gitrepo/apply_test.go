package gitrepo_test

import (
	"errors"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/gitrepo"
	"github.com/moonladderstudios/mm-orchestrator/internal/githubtest"
)

var bot = gitrepo.Person{Name: "MM Orchestrator", Email: "bot@example.com"}

// made is the patch of a change in a clone of the server's repository.
func (w *world) made(t *testing.T, files map[string]string, removed ...string) []byte {
	t.Helper()
	clone, err := w.git.Clone(t.Context(), w.remote, "main", filepath.Join(w.dir, "made"))
	if err != nil {
		t.Fatal(err)
	}
	write(t, clone.Tree, files)
	for _, name := range removed {
		if err := gitrepo.RemoveAll(filepath.Join(clone.Tree, name)); err != nil {
			t.Fatal(err)
		}
	}
	change, err := clone.Diff(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := clone.Remove(); err != nil {
		t.Fatal(err)
	}
	return change.Patch
}

// others is what somebody else pushes to main.
func (w *world) others(t *testing.T, files map[string]string) {
	t.Helper()
	if _, err := w.Commit(t.Context(), name, "main", "of somebody else", files); err != nil {
		t.Fatal(err)
	}
}

func (w *world) fetch(t *testing.T) *gitrepo.Clone {
	t.Helper()
	clone, err := w.git.Fetch(t.Context(), w.remote, "main", filepath.Join(w.dir, "publish"))
	if err != nil {
		t.Fatal(err)
	}
	return clone
}

func lines(text ...string) string { return strings.Join(text, "\n") + "\n" }

var ten = lines("1", "2", "3", "4", "5", "6", "7", "8", "9", "10")

// publish applies a patch and pushes it to a branch.
func (w *world) publish(t *testing.T, clone *gitrepo.Clone, patch []byte, branch string) (commit string, outcome gitrepo.PushOutcome, log string) {
	t.Helper()
	applied, err := clone.Apply(t.Context(), w.remote, patch)
	if err != nil {
		t.Fatal(err)
	}
	commit, err = clone.CommitTree(t.Context(), gitrepo.Commit{Tree: applied.Tree, Message: "T001: a change\n\nRun: 1", Author: bot, Committer: bot, At: time.Unix(1764272000, 0)})
	if err != nil {
		t.Fatal(err)
	}
	tip, err := clone.Tip(t.Context(), w.remote, branch)
	if err != nil {
		t.Fatal(err)
	}
	outcome, log, err = clone.Push(t.Context(), w.remote, branch, commit, tip.ID)
	if err != nil {
		t.Fatal(err)
	}
	return commit, outcome, log
}

func TestAChangeIsPublished(t *testing.T) {
	t.Parallel()
	w := newWorld(t, map[string]string{"a.txt": ten, "run.sh": "x\n", "gone": "y\n"})
	patch := w.made(t, map[string]string{"a.txt": strings.Replace(ten, "5", "five", 1), "bin": "\x00\x01", "link": "-> a.txt"}, "gone")
	clone := w.fetch(t)
	commit, outcome, log := w.publish(t, clone, patch, "speckit/001/t001")
	if outcome != gitrepo.PushCreated || !strings.Contains(log, "[new branch]") {
		t.Errorf("the push was %s: %s", outcome, log)
	}
	for what, want := range map[string]string{
		"log -1 --format=%H:%an:%ae:%cn:%ct:%s speckit/001/t001":         commit + ":MM Orchestrator:bot@example.com:MM Orchestrator:1764272000:T001: a change",
		"diff --name-status main speckit/001/t001":                       "M\ta.txt\nA\tbin\nD\tgone\nA\tlink",
		"log -1 --format=%P speckit/001/t001":                            clone.Commit,
		"for-each-ref --format=%(refname)":                               "refs/heads/main\nrefs/heads/speckit/001/t001",
		"log -1 --format=%(trailers:key=Run,valueonly) speckit/001/t001": "1",
	} {
		got, err := w.Git(t.Context(), name, strings.Fields(what)...)
		if err != nil || strings.TrimSpace(got) != want {
			t.Errorf("git %s: %q, %v; want %q", what, got, err, want)
		}
	}
	// A worker that repeats it all makes the same commit, and changes nothing.
	if err := clone.Remove(); err != nil {
		t.Fatal(err)
	}
	again, outcome, _ := w.publish(t, w.fetch(t), patch, "speckit/001/t001")
	if again != commit || outcome != gitrepo.PushUnchanged {
		t.Errorf("repeated the commit is %s (was %s), and the push was %s", again, commit, outcome)
	}
	w.noLeak(log)
}

// After the base branch has moved, the change is merged with what others have done.
func TestTheBaseBranchHasMoved(t *testing.T) {
	t.Parallel()
	for what, c := range map[string]struct {
		others map[string]string
		force  bool
		want   string // README.md on our branch; "" for no change
	}{
		"elsewhere in the file": {map[string]string{"README.md": strings.Replace(ten, "9", "nine", 1)}, false, strings.NewReplacer("2", "two", "9", "nine").Replace(ten)},
		"another file":          {map[string]string{"other": "x\n"}, false, strings.Replace(ten, "2", "two", 1)},
		"the same change":       {map[string]string{"README.md": strings.Replace(ten, "2", "two", 1)}, false, ""},
		"history was rewritten": {map[string]string{"README.md": strings.Replace(ten, "9", "nine", 1)}, true, strings.NewReplacer("2", "two", "9", "nine").Replace(ten)},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, map[string]string{"README.md": ten})
			patch := w.made(t, map[string]string{"README.md": strings.Replace(ten, "2", "two", 1)})
			w.others(t, c.others)
			if c.force {
				tree, err := w.Git(t.Context(), name, "rev-parse", "main^{tree}")
				if err != nil {
					t.Fatal(err)
				}
				root, err := w.Git(t.Context(), name, "-c", "user.name=x", "-c", "user.email=x@example.com", "commit-tree", "-m", "new root", tree)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := w.Git(t.Context(), name, "update-ref", "refs/heads/main", root); err != nil {
					t.Fatal(err)
				}
			}
			clone := w.fetch(t)
			applied, err := clone.Apply(t.Context(), w.remote, patch)
			if err != nil {
				t.Fatal(err)
			}
			if c.want == "" {
				if len(applied.Files) != 0 {
					t.Errorf("changed are %q, want nothing", applied.Files)
				}
				return
			}
			w.publish(t, clone, patch, "b")
			if text, err := w.Read(t.Context(), name, "b", "README.md"); text+"\n" != c.want {
				t.Errorf("README.md is %q, %v", text, err)
			}
		})
	}
}

func TestAConflictNamesItsFiles(t *testing.T) {
	t.Parallel()
	for what, c := range map[string]struct {
		ours, others map[string]string
		removed      []string
		noBase       bool
		want         map[string]string // a part of the file with markers
	}{
		"the same line": {map[string]string{"a": strings.Replace(ten, "5", "ours", 1), "b": "fits\n"}, map[string]string{"a": strings.Replace(ten, "5", "theirs", 1)}, nil, false,
			map[string]string{"a": "<<<<<<< base branch\ntheirs\n||||||| where the patch began\n5\n=======\nours\n>>>>>>> patch\n"}},
		"a file that was removed":      {map[string]string{"a": strings.Replace(ten, "5", "ours", 1)}, map[string]string{"a": "-"}, nil, false, map[string]string{"a": ""}},
		"a file that we remove":        {nil, map[string]string{"a": strings.Replace(ten, "5", "theirs", 1)}, []string{"a"}, false, map[string]string{"a": ""}},
		"two new files":                {map[string]string{"new": "ours\n"}, map[string]string{"new": "theirs\n"}, nil, false, map[string]string{"new": ">>>>>>> patch"}},
		"a binary file":                {map[string]string{"bin": "\x00ours"}, map[string]string{"bin": "\x00theirs"}, nil, false, map[string]string{"bin": ""}},
		"a patch that names no commit": {map[string]string{"a": strings.Replace(ten, "5", "ours", 1)}, map[string]string{"a": strings.Replace(ten, "5", "theirs", 1)}, nil, true, map[string]string{"a": ""}},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, map[string]string{"a": ten, "bin": "\x00base"})
			patch := w.made(t, c.ours, c.removed...)
			if c.noBase {
				_, rest, _ := strings.Cut(string(patch), "\n\n")
				patch = []byte(rest)
			}
			w.others(t, c.others)
			_, err := w.fetch(t).Apply(t.Context(), w.remote, patch)
			var conflict *gitrepo.ConflictError
			if !errors.As(err, &conflict) {
				t.Fatalf("got %v, want a conflict", err)
			}
			got := map[string]string{}
			for _, file := range conflict.Files {
				got[file.Name] = string(file.Merged)
			}
			if !slices.Equal(slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(c.want))) {
				t.Errorf("in conflict are %q, want %q", got, c.want)
			}
			for name, part := range c.want {
				if !strings.Contains(got[name], part) {
					t.Errorf("%s has %q, want %q", name, got[name], part)
				}
				if !strings.Contains(err.Error(), name) {
					t.Errorf("the error does not name %s: %v", name, err)
				}
			}
		})
	}
}

const patchOf = `diff --git a/%[1]s b/%[1]s
new file mode 100644
index 0000000000000000000000000000000000000000..587be6b4c3f93f93c489c0111bba5596147a26cb
--- /dev/null
+++ b/%[1]s
@@ -0,0 +1 @@
+x
`

func TestPatchesThatAreRefused(t *testing.T) {
	t.Parallel()
	of := func(name string) string { return strings.ReplaceAll(patchOf, "%[1]s", name) }
	for what, c := range map[string]struct{ patch, want string }{
		"empty":                           {"", "it is no patch"},
		"only a base":                     {"base-commit: 587be6b4c3f93f93c489c0111bba5596147a26cb\n\n", "it is no patch"},
		"garbage":                         {"I have done the task!\n", "it is no patch"},
		"a hook":                          {of(".git/hooks/pre-commit"), ".git/hooks/pre-commit"},
		"a hook in other letters":         {of(".GIT/hooks/pre-commit"), ".GIT/hooks/pre-commit"},
		"a hook of a folder":              {of("a/.git/config"), "a/.git/config"},
		"a name that HFS+ takes for .git": {of(".g\u200cit/config"), "outside of the repository's files"},
		"the short name of .git":          {of("git~1/config"), "git~1"},
		"out of the tree":                 {of("../outside"), "../outside"},
		"out of the tree later":           {of("a/../../outside"), "a/../../outside"},
		"a link out of the tree":          {strings.NewReplacer("100644", "120000", "+x\n", "+/etc\n\\ No newline at end of file\n", "587be6b4c3f93f93c489c0111bba5596147a26cb", "0000000000000000000000000000000000000001").Replace(of("l")), "l would be a symbolic link"},
		"through a link":                  {"base-commit: BASE\n\n" + strings.NewReplacer("100644", "120000", "+x\n", "+..\n\\ No newline at end of file\n").Replace(of("l")) + of("l/x"), "beyond a symbolic link"},
		"a submodule":                     {strings.NewReplacer("100644", "160000", "+x\n", "+Subproject commit 587be6b4c3f93f93c489c0111bba5596147a26cb\n").Replace(of("sub")), "sub, which is a submodule"},
		"a file that does not exist":      {"base-commit: BASE\n\ndiff --git a/nosuch b/nosuch\nindex 587be6b..257cc56 100644\n--- a/nosuch\n+++ b/nosuch\n@@ -1 +1 @@\n-x\n+y\n", "does not fit the commit from which it was made"},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, map[string]string{"a": ten})
			clone := w.fetch(t)
			applied, err := clone.Apply(t.Context(), w.remote, []byte(strings.ReplaceAll(c.patch, "BASE", clone.Commit)))
			if !errors.Is(err, gitrepo.ErrUnusable) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %+v, %v; want an error with %q", applied, err, c.want)
			}
		})
	}
}

// A branch that somebody else has changed is not overwritten.
func TestAPushReplacesOnlyWhatItExpects(t *testing.T) {
	t.Parallel()
	w := newWorld(t, map[string]string{"a": ten})
	patch := w.made(t, map[string]string{"a": "other\n"})
	clone := w.fetch(t)
	commit, _, _ := w.publish(t, clone, patch, "ours")
	other, err := clone.CommitTree(t.Context(), gitrepo.Commit{Tree: commit + "^{tree}", Message: "again", Author: bot, Committer: bot, At: time.Unix(1764272001, 0)})
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := w.Commit(t.Context(), name, "ours", "a reviewer's", map[string]string{"b": "x\n"})
	if err != nil {
		t.Fatal(err)
	}
	var refused *gitrepo.PushError
	for what, expected := range map[string]string{"another commit": commit, "no branch": ""} {
		if _, log, err := clone.Push(t.Context(), w.remote, "ours", other, expected); !errors.As(err, &refused) || !refused.Stale || !strings.Contains(log, "stale info") {
			t.Errorf("a push that expects %s: %v, %s", what, err, log)
		}
	}
	tip, err := clone.Tip(t.Context(), w.remote, "ours")
	if err != nil || tip.ID != theirs || tip.Committer.Email != "somebody@example.com" || tip.Message != "a reviewer's\n" || tip.Parents != 1 {
		t.Errorf("the tip is %+v, %v", tip, err)
	}
	if outcome, _, err := clone.Push(t.Context(), w.remote, "ours", other, theirs); err != nil || outcome != gitrepo.PushReplaced {
		t.Errorf("a push that expects what is there: %s, %v", outcome, err)
	}
	if _, _, err := clone.Push(t.Context(), w.remote, "main", other, clone.Commit); err == nil {
		t.Error("the base branch was pushed to")
	}
	if tip, err := clone.Tip(t.Context(), w.remote, "nosuch"); err != nil || tip.ID != "" {
		t.Errorf("a branch that does not exist has the tip %+v, %v", tip, err)
	}
}

// What the server says about a push that it refuses is in the error.
func TestAPushThatTheServerRefuses(t *testing.T) {
	t.Parallel()
	for what, c := range map[string]struct {
		prepare func(*testing.T, *world)
		want    string
	}{
		"a rule": {func(t *testing.T, w *world) {
			if err := w.RefusePushes(name, "error: GH013: Repository rule violations found for refs/heads/b."); err != nil {
				t.Fatal(err)
			}
		}, "GH013: Repository rule violations found"},
		"a branch in the way": {func(t *testing.T, w *world) {
			if _, err := w.Commit(t.Context(), name, "b", "x", map[string]string{"x": "y"}); err != nil {
				t.Fatal(err)
			}
		}, "refuses the push to b/c"},
		"a token that may only read": {func(_ *testing.T, w *world) { w.SetToken(token, githubtest.Token{Login: "bot", ReadOnly: true}) }, "give it write access"},
		"a token that was revoked":   {func(_ *testing.T, w *world) { w.RevokeToken(token) }, "was revoked"},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, map[string]string{"a": ten})
			patch := w.made(t, map[string]string{"a": "other\n"})
			clone := w.fetch(t)
			applied, err := clone.Apply(t.Context(), w.remote, patch)
			if err != nil {
				t.Fatal(err)
			}
			commit, err := clone.CommitTree(t.Context(), gitrepo.Commit{Tree: applied.Tree, Message: "m", Author: bot, Committer: bot, At: time.Unix(1, 0)})
			if err != nil {
				t.Fatal(err)
			}
			c.prepare(t, w)
			_, log, err := clone.Push(t.Context(), w.remote, "b/c", commit, "")
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			w.noLeak(log, err.Error())
		})
	}
}

// A token that is replaced while a run works is used from then on.
func TestARotatedTokenIsUsed(t *testing.T) {
	t.Parallel()
	w := newWorld(t, map[string]string{"a": ten})
	patch := w.made(t, map[string]string{"a": "other\n"})
	clone := w.fetch(t)
	w.RevokeToken(token)
	if _, err := clone.Tip(t.Context(), w.remote, "b"); err == nil {
		t.Fatal("a revoked token was accepted")
	}
	w.token.text = "ghp_another0123456789abcdefghijABCDEF01"
	w.SetToken(w.token.text, githubtest.Token{Login: "bot"})
	w.publish(t, clone, patch, "b")
}

func TestPeople(t *testing.T) {
	t.Parallel()
	if p, err := gitrepo.ParsePerson("Jane D. <jane@example.com>"); err != nil || p.String() != "Jane D. <jane@example.com>" {
		t.Errorf("got %v, %v", p, err)
	}
	for _, text := range []string{"", "jane@example.com", "Jane", "Jane <jane>", "Jane <a@b>\nx: y", "<a@example.com>"} {
		if p, err := gitrepo.ParsePerson(text); err == nil {
			t.Errorf("%q is %v", text, p)
		}
	}
}
