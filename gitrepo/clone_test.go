package gitrepo_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/gitrepo"
	"github.com/moonladderstudios/mm-orchestrator/internal/githubtest"
)

// Whoever works on the clone finds an ordinary repository without a remote.
func TestACloneIsARepositoryOfItsOwn(t *testing.T) {
	t.Parallel()
	w := newWorld(t, map[string]string{"README.md": "one\n", "src/main.go": "package main\n"})
	clone := w.clone(t)
	if text, err := os.ReadFile(filepath.Join(clone.Tree, "src/main.go")); string(text) != "package main\n" {
		t.Errorf("src/main.go has %q, %v", text, err)
	}
	head, err := w.Git(t.Context(), name, "rev-parse", "main")
	if err != nil || clone.Commit != head {
		t.Errorf("the clone is at %s, the server at %s, %v", clone.Commit, head, err)
	}
	if status := inTree(t, clone.Tree, "status", "--short", "--branch"); status != "## main" {
		t.Errorf("git status says %q", status)
	}
	if remotes := inTree(t, clone.Tree, "remote"); remotes != "" {
		t.Errorf("the clone has the remotes %q", remotes)
	}
	again, err := w.git.Open(clone.Dir)
	if err != nil || again.Commit != clone.Commit || again.Tree != clone.Tree || again.Branch != "main" {
		t.Errorf("opened again it is %+v, %v", again, err)
	}
	if _, err := w.git.Open(w.dir); !errors.Is(err, gitrepo.ErrNoClone) {
		t.Errorf("an empty directory is opened with %v", err)
	}
	w.noLeak()
	if err := clone.Remove(); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(w.dir); len(left) != 0 {
		t.Errorf("%v is left behind", left)
	}
}

func TestTheDefaultBranchIsTheServers(t *testing.T) {
	t.Parallel()
	w := newWorld(t, map[string]string{"a": "1\n"})
	if _, err := w.Commit(t.Context(), name, "trunk", "second", map[string]string{"a": "2\n"}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Server.Git(t.Context(), name, "symbolic-ref", "HEAD", "refs/heads/trunk"); err != nil {
		t.Fatal(err)
	}
	clone, err := w.git.Clone(t.Context(), w.remote, "", filepath.Join(w.dir, "clone"))
	if err != nil || clone.Branch != "trunk" {
		t.Errorf("cloned %+v, %v", clone, err)
	}
}

// Each change comes back by git apply, whatever was done in the clone's own .git.
func TestADiffHasEveryChange(t *testing.T) {
	t.Parallel()
	binary := string([]byte{0, 1, 2, 0xff, 0xfe, 0, 10, 13}) + strings.Repeat("\x00x", 2000)
	w := newWorld(t, map[string]string{
		"README.md": "one\n", "old/name.txt": strings.Repeat("the same line\n", 30), "gone.txt": "x\n", "run.sh": "#!/bin/sh\n", "crlf.txt": "a\r\nb\r\n",
		"image.bin": "\x00\x01\x02", ".gitignore": "*.tmp\n", ".gitattributes": "*.go diff=golang filter=lfs\n*.lfs filter=lfs diff=lfs merge=lfs -text\n", "space é.txt": "1\n",
		"data.lfs": "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n",
	})
	clone := w.clone(t)
	if change, err := clone.Diff(t.Context()); err != nil || len(change.Patch) != 0 || len(change.Files) != 0 {
		t.Errorf("a clone without a change differs by %q, %v", change.Patch, err)
	}
	write(t, clone.Tree, map[string]string{
		"README.md": "two\n", "new/deep/file.go": "package file\n", "image.bin": binary, "crlf.txt": "a\r\nc\r\n", "left.tmp": "ignored", "link": "-> new/deep", "space é.txt": "2\n", "empty": "",
	})
	for _, step := range []func() error{
		func() error {
			return os.Rename(filepath.Join(clone.Tree, "old/name.txt"), filepath.Join(clone.Tree, "renamed.txt"))
		},
		func() error { return os.Remove(filepath.Join(clone.Tree, "gone.txt")) },
		func() error { return os.Chmod(filepath.Join(clone.Tree, "run.sh"), 0o755) },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	// A model may commit, and set what it likes.
	ran := filepath.Join(w.dir, "ran")
	inTree(t, clone.Tree, "add", "README.md")
	inTree(t, clone.Tree, "commit", "--quiet", "-m", "mine")
	for _, setting := range []string{"core.fsmonitor", "filter.lfs.clean", "filter.lfs.smudge", "filter.lfs.process", "diff.golang.textconv", "diff.external"} {
		inTree(t, clone.Tree, "config", setting, "touch "+ran+"; cat")
	}
	inTree(t, clone.Tree, "config", "core.excludesFile", filepath.Join(clone.Tree, "all"))
	write(t, clone.Tree, map[string]string{".git/hooks/pre-commit": "#!/bin/sh\ntouch " + ran + "\n", ".git/info/exclude": "new\n", ".git/info/attributes": "* binary\n"})

	change, err := clone.Diff(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"README.md", "crlf.txt", "empty", "gone.txt", "image.bin", "link", "new/deep/file.go", "old/name.txt", "renamed.txt", "run.sh", "space é.txt"}
	if slices.Sort(change.Files); !slices.Equal(change.Files, want) {
		t.Errorf("changed are %q, want %q", change.Files, want)
	}
	again, err := clone.Diff(t.Context())
	if err != nil || !bytes.Equal(again.Patch, change.Patch) {
		t.Errorf("a second diff is another one, %v", err)
	}
	if !bytes.Contains(change.Patch, []byte("rename from old/name.txt\nrename to renamed.txt\n")) {
		t.Errorf("the patch has no rename: %s", change.Patch)
	}
	if _, err := os.Stat(ran); err == nil {
		t.Error("a program of the clone's own settings was run")
	}

	// Elsewhere the patch makes the same files.
	other, err := w.git.Clone(t.Context(), w.remote, "main", filepath.Join(w.dir, "other"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "git", "apply", "--index", "--whitespace=nowarn")
	cmd.Dir, cmd.Stdin = other.Tree, bytes.NewReader(change.Patch)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("git apply: %v: %s", err, out)
	}
	applied, err := other.Diff(t.Context())
	if err != nil || !bytes.Equal(applied.Patch, change.Patch) {
		t.Errorf("applied elsewhere the change is %s, %v", applied.Patch, err)
	}
	if text, _ := os.ReadFile(filepath.Join(other.Tree, "image.bin")); string(text) != binary {
		t.Error("the binary file is another one")
	}
	if text, _ := os.ReadFile(filepath.Join(other.Tree, "data.lfs")); !strings.HasPrefix(string(text), "version https://git-lfs") {
		t.Errorf("the pointer of git LFS has become %q", text)
	}
}

// A file that the repository has otherwise than its .gitattributes say is changed only if
// somebody has changed it.
func TestADiffHasOnlyWhatSomebodyHasChanged(t *testing.T) {
	t.Parallel()
	files := map[string]string{
		"a.bat": "one\r\ntwo\r\n", "b.bat": "one\r\ntwo\r\n", "gone.bat": "one\r\n", "moved.bat": "one\r\ntwo\r\nthree\r\n", "mode.bat": "one\r\n", "unix.bat": "one\r\ntwo\r\n", "link.bat": "one\r\n", "\xff.bat": "one\r\n",
		"id.txt": "$Id: somebody's $\n", "README.md": "one\n",
	}
	w := newWorld(t, files)
	if _, err := w.Commit(t.Context(), name, "main", "attributes", map[string]string{".gitattributes": "*.bat text eol=crlf\nid.txt ident\n"}); err != nil {
		t.Fatal(err)
	}
	clone := w.clone(t)
	if change, err := clone.Diff(t.Context()); err != nil || len(change.Files) != 0 || len(change.Patch) != 0 {
		t.Errorf("without a change %q differ, %v: %s", change.Files, err, change.Patch)
	}
	write(t, clone.Tree, map[string]string{"README.md": "two\n", "b.bat": "one\r\nthree\r\n", "unix.bat": "one\ntwo\n", "new.bat": "one\r\n"})
	for _, err := range []error{
		os.Remove(filepath.Join(clone.Tree, "gone.bat")),
		os.Rename(filepath.Join(clone.Tree, "moved.bat"), filepath.Join(clone.Tree, "to.bat")),
		os.Chmod(filepath.Join(clone.Tree, "mode.bat"), 0o755),
		os.Remove(filepath.Join(clone.Tree, "link.bat")), os.Symlink("a.bat", filepath.Join(clone.Tree, "link.bat")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	opened, err := w.git.Open(clone.Dir) // as another worker does
	if err != nil {
		t.Fatal(err)
	}
	change, err := opened.Diff(t.Context())
	want := []string{"README.md", "b.bat", "gone.bat", "link.bat", "mode.bat", "moved.bat", "new.bat", "to.bat", "unix.bat"}
	if slices.Sort(change.Files); err != nil || !slices.Equal(change.Files, want) {
		t.Errorf("changed are %q, want %q, %v", change.Files, want, err)
	}
	if applied, err := clone.Apply(t.Context(), w.remote, change.Patch); err != nil || !slices.Equal(applied.Files, want) {
		t.Errorf("the patch changes %q, %v", applied.Files, err)
	}
}

// What a branch cannot have, or must not, is refused with the file's name.
func TestADiffRefusesWhatLeadsOutOfTheTree(t *testing.T) {
	t.Parallel()
	for what, c := range map[string]struct {
		files map[string]string
		want  string
	}{
		"an absolute link":            {map[string]string{"l": "-> /etc/passwd"}, `l would be a symbolic link to "/etc/passwd"`},
		"a link up":                   {map[string]string{"a/l": "-> ../../x"}, `a/l would be a symbolic link`},
		"a link to .git":              {map[string]string{"a/l": "-> ../.GIT/config"}, `a/l would be a symbolic link`},
		"a repository in the tree":    {map[string]string{"sub/f": "x", "sub/.git/HEAD": "ref: refs/heads/main\n"}, "sub"},
		"a name with a line break":    {map[string]string{"a/b\nc": "x"}, `the file "a/b\nc" has a line break`},
		"a name that is .git on NTFS": {map[string]string{"git~1/config": "x"}, "git~1"},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, map[string]string{"README.md": "one\n"})
			clone := w.clone(t)
			write(t, clone.Tree, c.files)
			if strings.Contains(what, "repository") {
				if err := gitrepo.RemoveAll(filepath.Join(clone.Tree, "sub/.git")); err != nil {
					t.Fatal(err)
				}
				inTree(t, filepath.Join(clone.Tree, "sub"), "init", "--quiet")
				inTree(t, filepath.Join(clone.Tree, "sub"), "add", "f")
				inTree(t, filepath.Join(clone.Tree, "sub"), "commit", "--quiet", "-m", "x")
			}
			change, err := clone.Diff(t.Context())
			if !errors.Is(err, gitrepo.ErrUnusable) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("the diff has %q, %v; want an error with %q", change.Files, err, c.want)
			}
		})
	}
}

func TestALargePatchIsRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t, map[string]string{"README.md": "one\n"})
	w.git = w.open(t, gitrepo.Config{MaxPatch: 10_000})
	clone := w.clone(t)
	write(t, clone.Tree, map[string]string{"big": strings.Repeat("line\n", 5000)})
	if _, err := clone.Diff(t.Context()); !errors.Is(err, gitrepo.ErrUnusable) || !strings.Contains(err.Error(), "more than 9.766 KiB") {
		t.Errorf("got %v", err)
	}
}

// A submodule is neither fetched nor a change.
func TestSubmodulesStayEmpty(t *testing.T) {
	t.Parallel()
	w := newWorld(t, map[string]string{"README.md": "one\n"})
	ran := filepath.Join(w.dir, "ran")
	if _, err := w.Commit(t.Context(), name, "main", "modules", map[string]string{
		".gitmodules": "[submodule \"x\"]\n\tpath = sub\n\turl = ext::sh -c touch% " + ran + "\n\tupdate = !touch " + ran + "\n",
	}); err != nil {
		t.Fatal(err)
	}
	head, _ := w.Git(t.Context(), name, "rev-parse", "main")
	index := "GIT_INDEX_FILE=" + filepath.Join(w.dir, "index")
	git := func(args ...string) string {
		cmd := exec.CommandContext(t.Context(), "git", args...)
		dir, err := w.Git(t.Context(), name, "rev-parse", "--absolute-git-dir")
		if err != nil {
			t.Fatal(err)
		}
		cmd.Env = append(os.Environ(), index, "GIT_DIR="+dir, "GIT_AUTHOR_NAME=m", "GIT_AUTHOR_EMAIL=m@example.com", "GIT_COMMITTER_NAME=m", "GIT_COMMITTER_EMAIL=m@example.com")
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("git %v: %v", args, err)
		}
		return strings.TrimSpace(string(out))
	}
	git("read-tree", head)
	git("update-index", "--add", "--cacheinfo", "160000,"+head+",sub")
	git("update-ref", "refs/heads/main", git("commit-tree", "-p", head, "-m", "sub", git("write-tree")))

	clone := w.clone(t)
	if entries, err := os.ReadDir(filepath.Join(clone.Tree, "sub")); err != nil || len(entries) != 0 {
		t.Errorf("the submodule has %v, %v", entries, err)
	}
	write(t, clone.Tree, map[string]string{"README.md": "two\n"})
	change, err := clone.Diff(t.Context())
	if err != nil || !slices.Equal(change.Files, []string{"README.md"}) {
		t.Errorf("changed are %q, %v", change.Files, err)
	}
	if _, err := os.Stat(ran); err == nil {
		t.Error("a command of .gitmodules was run")
	}
}

func TestAddressesThatAreNotUsed(t *testing.T) {
	t.Parallel()
	git, err := gitrepo.New(gitrepo.Config{})
	if err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{
		"--upload-pack=touch /tmp/x", "-uhttps://h/x", "ext::sh -c id", "fd::17", "https::https://h/x", "file:///etc", "http://h/x", "git://h/x", "/tmp/x", "../x", "git@github.com:o/n.git",
		"https://user:" + token + "@github.com/o/n.git", "https://" + token + "@github.com/o/n.git", "ssh://git:pw@h/x", "ssh://-oProxyCommand=id/x", "ssh://-x@h/x", "https://github.com/", "https://github.com/--upload-pack=x",
		"https://github.com/../x", "https:///x", "https://h/x?y", "https://h/x#y", "https://h/x\n--upload-pack=y", "https://h/a b", "",
	} {
		if remote, err := git.Remote(address, &stored{token}); err == nil {
			t.Errorf("%q is used as %+v", address, remote)
		} else if strings.Contains(err.Error(), token) {
			t.Errorf("the error has the token: %v", err)
		}
	}
	plain, err := gitrepo.New(gitrepo.Config{Schemes: []string{"http"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := plain.Remote("http://github.example.com/o/n.git", &stored{token}); err == nil {
		t.Error("a token would be sent over http to another machine")
	}
	for _, address := range []string{"http://127.0.0.1:8080/o/n.git", "http://localhost/o/n.git"} {
		if remote, err := plain.Remote(address, &stored{token}); err != nil || remote.Token == nil {
			t.Errorf("%s: %+v, %v", address, remote, err)
		}
	}
	for _, address := range []string{"https://github.com/o/n.git", "https://ghe.example.com:8443/o/n", "ssh://git@github.com/o/n.git"} {
		if _, err := git.Remote(address, &stored{token}); err != nil {
			t.Errorf("%s: %v", address, err)
		}
	}
}

func TestBranchNamesAreGits(t *testing.T) {
	t.Parallel()
	for _, branch := range []string{
		"", "-x", "--upload-pack=x", "a..b", "a b", "a~1", "a^", "a:b", "a?", "a*", "a[", `a\b`, "a\x7f", "a\n", "/a", "a/", "a//b", ".a", "a/.b", "a.lock", "a.lock/b", "a.", "@", "a@{1}", "HEAD", "\xff", strings.Repeat("x", 300),
	} {
		if gitrepo.CheckBranch(branch) == nil {
			t.Errorf("%q is accepted", branch)
		}
	}
	for _, branch := range []string{"main", "a/b-c_d", "feature/ü", "x@y", "001-login/t001"} {
		if err := gitrepo.CheckBranch(branch); err != nil {
			t.Error(err)
		}
		if err := exec.CommandContext(t.Context(), "git", "check-ref-format", "refs/heads/"+branch).Run(); err != nil {
			t.Errorf("git does not accept %s", branch)
		}
	}
}

// A clone that fails leaves nothing, and says what to do.
func TestACloneThatFails(t *testing.T) {
	t.Parallel()
	for what, c := range map[string]struct {
		prepare func(*testing.T, *world)
		branch  string
		refusal gitrepo.Refusal
		want    string
	}{
		"no such branch":          {nil, "nosuch", "", "has no branch nosuch: correct the base branch"},
		"a branch like an option": {nil, "--upload-pack=x", "", "git does not accept it"},
		"a revoked token":         {func(_ *testing.T, w *world) { w.RevokeToken(token) }, "main", gitrepo.RefusedLogin, "the token has expired, was revoked or is not complete"},
		"no such repository":      {func(t *testing.T, w *world) { w.remote = w.address(t, w.URL+"/moonladder/other.git") }, "main", gitrepo.RefusedNotFound, "correct its name"},
		"no access": {func(_ *testing.T, w *world) {
			w.Intercept(func(rw http.ResponseWriter, _ *http.Request) bool {
				http.Error(rw, "no", http.StatusForbidden)
				return true
			})
		}, "main", gitrepo.RefusedAccess, "give it write access"},
		"a server that is away": {func(t *testing.T, w *world) {
			if err := w.Close(); err != nil {
				t.Error(err)
			}
		}, "main", gitrepo.Unreachable, "look whether it can be reached"},
		"an empty repository": {func(t *testing.T, w *world) {
			if err := w.AddRepository(t.Context(), "moonladder/empty", nil); err != nil {
				t.Fatal(err)
			}
			w.remote = w.address(t, w.URL+"/moonladder/empty.git")
		}, "", "", "push a first commit to it"},
		"a redirect to another server": {func(t *testing.T, w *world) {
			thief := githubtest.New(t)
			w.Intercept(func(rw http.ResponseWriter, r *http.Request) bool {
				http.Redirect(rw, r, thief.URL+r.URL.RequestURI(), http.StatusFound)
				return true
			})
			t.Cleanup(func() {
				for _, request := range thief.Requests("") {
					if request.Header.Get("Authorization") != "" {
						t.Error("the token was sent to another server")
					}
				}
			})
		}, "main", gitrepo.Unreachable, ""},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, map[string]string{"README.md": "one\n"})
			if c.prepare != nil {
				c.prepare(t, w)
			}
			_, err := w.git.Clone(t.Context(), w.remote, c.branch, filepath.Join(w.dir, "deep", "clone"))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want an error with %q", err, c.want)
			}
			var refused *gitrepo.RemoteError
			if errors.As(err, &refused) != (c.refusal != "") || refused != nil && refused.Refusal != c.refusal {
				t.Errorf("the error %v has not the refusal %q", err, c.refusal)
			}
			if left, _ := os.ReadDir(filepath.Join(w.dir, "deep")); len(left) != 0 {
				t.Errorf("%v is left behind", left)
			}
			w.noLeak(err.Error())
		})
	}
}

// A server that sends nothing more does not hold a worker for ever.
func TestAServerThatStalls(t *testing.T) {
	t.Parallel()
	w := newWorld(t, map[string]string{"README.md": "one\n"})
	released := make(chan struct{})
	w.Intercept(func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, "git-upload-pack") {
			select {
			case <-released:
			case <-r.Context().Done():
			}
			return true
		}
		return false
	})
	defer close(released)
	w.git = w.open(t, gitrepo.Config{StallTimeout: time.Second, Timeout: 30 * time.Second})
	_, err := w.git.Clone(t.Context(), w.remote, "main", filepath.Join(w.dir, "clone"))
	var refused *gitrepo.RemoteError
	if !errors.As(err, &refused) || refused.Refusal != gitrepo.Unreachable {
		t.Errorf("got %v", err)
	}
}

// A worker that is told to stop stops git, and leaves no half clone.
func TestACloneThatIsStopped(t *testing.T) {
	t.Parallel()
	w := newWorld(t, map[string]string{"README.md": "one\n"})
	ctx, cancel := context.WithCancelCause(t.Context())
	stopping := errors.New("stopping")
	w.Intercept(func(_ http.ResponseWriter, r *http.Request) bool {
		cancel(stopping)
		<-r.Context().Done()
		return true
	})
	git, err := gitrepo.New(gitrepo.Config{CAFile: w.CAFile, Environ: os.Environ()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := git.Clone(ctx, w.remote, "main", filepath.Join(w.dir, "clone")); !errors.Is(err, stopping) {
		t.Errorf("got %v", err)
	}
	if left, _ := os.ReadDir(w.dir); len(left) != 0 {
		t.Errorf("%v is left behind", left)
	}
}

// What a killed worker has left of a clone does not disturb the next.
func TestARestOfAnEarlierCloneIsRemoved(t *testing.T) {
	t.Parallel()
	w := newWorld(t, map[string]string{"README.md": "one\n"})
	write(t, filepath.Join(w.dir, "clone.part"), map[string]string{"tree/secret": "x", "repository.git/HEAD.lock": ""})
	clone := w.clone(t)
	if _, err := os.Stat(filepath.Join(clone.Tree, "secret")); err == nil {
		t.Error("the clone has a file of an earlier one")
	}
	if _, err := w.git.Clone(t.Context(), w.remote, "main", clone.Dir); err == nil {
		t.Error("a clone was made over another one")
	}
}

// A server may say so much that git's messages are cut. Half of a secret is none that a
// redactor knows.
func TestNoPartOfASecretIsLeftWhereMessagesAreCut(t *testing.T) {
	t.Parallel()
	w := newWorld(t, map[string]string{"a": "a"})
	const secret = "hunter2-is-not-a-good-password"
	for limit := 16<<10 - 20; limit < 16<<10; limit += 5 {
		program := filepath.Join(t.TempDir(), "git")
		script := fmt.Sprintf("#!/bin/sh\nhead -c %d /dev/zero | tr '\\0' x >&2\necho ' %s' >&2\nexit 1\n", limit-1, secret)
		if err := os.WriteFile(program, []byte(script), 0o700); err != nil {
			t.Fatal(err)
		}
		git := w.open(t, gitrepo.Config{Program: program, Redact: func(text string) string { return strings.ReplaceAll(text, secret, "[REDACTED]") }})
		remote, err := git.Remote(w.remote.URL, w.token)
		if err != nil {
			t.Fatal(err)
		}
		_, err = git.Clone(t.Context(), remote, "main", filepath.Join(t.TempDir(), "clone"))
		var failed *gitrepo.Error
		if !errors.As(err, &failed) {
			t.Fatalf("a clone by a git that fails: %v", err)
		}
		if !strings.Contains(failed.Output, "xxx") || strings.Contains(failed.Output, "hunter") {
			t.Errorf("with %d bytes before the secret: …%s", limit, failed.Output[max(0, len(failed.Output)-40):])
		}
	}
}
