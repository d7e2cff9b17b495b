package gitrepo_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/gitrepo"
)

// Settings and variables of the worker's user or machine would make git run programs,
// hide changes or talk to another server. None of them reaches git.
func TestTheWorkersOwnSettingsDoNotCount(t *testing.T) {
	t.Parallel()
	w := newWorld(t, map[string]string{"README.md": "one\n", ".gitattributes": "* filter=evil diff=evil merge=evil\n", "docs/a": "x\n"})
	home := t.TempDir()
	ran := filepath.Join(t.TempDir(), "ran")
	run := "touch " + ran
	hooks := filepath.Join(home, "hooks")
	files := map[string]string{
		".gitconfig": fmt.Sprintf("[include]\n\tpath = %[1]s/more\n[core]\n\tfsmonitor = %[2]q\n\thooksPath = %[3]s\n\tpager = %[2]q\n\tsshCommand = %[2]q\n\teditor = %[2]q\n\tgitProxy = %[2]q\n", home, run, hooks) +
			fmt.Sprintf("[filter \"evil\"]\n\tclean = %[1]q\n\tsmudge = %[1]q\n\trequired = true\n[diff \"evil\"]\n\ttextconv = %[1]q\n\tcommand = %[1]q\n[merge \"evil\"]\n\tdriver = %[1]q\n[diff]\n\texternal = %[1]q\n", run) +
			fmt.Sprintf("[credential]\n\thelper = \"!%[1]s\"\n[gpg]\n\tprogram = %[1]q\n[commit]\n\tgpgSign = true\n[push]\n\tgpgSign = true\n[url \"ext::sh -c %% \"]\n\tinsteadOf = https://\n[protocol]\n\tallow = always\n[uploadpack]\n\tpackObjectsHook = %[1]q\n[http]\n\tproxy = http://127.0.0.1:1\n\tsslVerify = false\n", run),
		"more": fmt.Sprintf("[alias]\n\tfetch = \"!%[1]s\"\n[core]\n\taskPass = %[1]q\n", run),
	}
	for _, hook := range []string{"pre-commit", "post-checkout", "post-index-change", "pre-push", "reference-transaction", "post-commit", "prepare-commit-msg"} {
		files["hooks/"+hook] = "#!/bin/sh\n" + run + "\n"
	}
	write(t, home, files)
	for name := range files {
		if err := os.Chmod(filepath.Join(home, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	elsewhere := t.TempDir()
	environ := append(os.Environ(), "HOME="+home, "XDG_CONFIG_HOME="+home, "GIT_CONFIG="+home+"/.gitconfig", "GIT_CONFIG_GLOBAL="+home+"/.gitconfig", "GIT_CONFIG_SYSTEM="+home+"/.gitconfig",
		"GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=core.fsmonitor", "GIT_CONFIG_VALUE_0="+run, "GIT_CONFIG_PARAMETERS='core.fsmonitor'='"+run+"'",
		"GIT_DIR="+elsewhere, "GIT_WORK_TREE="+elsewhere, "GIT_INDEX_FILE="+elsewhere+"/index", "GIT_OBJECT_DIRECTORY="+elsewhere, "GIT_ALTERNATE_OBJECT_DIRECTORIES="+elsewhere, "GIT_NAMESPACE=evil", "GIT_COMMON_DIR="+elsewhere,
		"GIT_SSH="+ran, "GIT_SSH_COMMAND="+run, "GIT_ASKPASS="+ran, "SSH_ASKPASS="+ran, "GIT_PROXY_COMMAND="+ran, "GIT_EXTERNAL_DIFF="+run, "GIT_EDITOR="+run, "GIT_PAGER="+run, "PAGER="+run, "GIT_EXEC_PATH="+elsewhere,
		"GIT_TEMPLATE_DIR="+home, "GIT_SSL_NO_VERIFY=1", "GIT_TRACE="+ran, "GIT_TRACE_CURL="+ran, "GIT_CURL_VERBOSE=1", "GIT_TRACE2_EVENT="+ran, "GIT_ALLOW_PROTOCOL=ext:file", "GIT_REPLACE_REF_BASE=refs/evil/", "GIT_QUARANTINE_PATH="+elsewhere)
	var err error
	if w.git, err = gitrepo.New(gitrepo.Config{CAFile: w.CAFile, Environ: environ, Run: w.seen.run}); err != nil {
		t.Fatal(err)
	}
	clone := w.clone(t)
	write(t, clone.Tree, map[string]string{"docs/a": "changed\n", "new": "new\n"})
	change, err := clone.Diff(t.Context())
	if err != nil || strings.Join(change.Files, " ") != "docs/a new" {
		t.Fatalf("changed are %q, %v", change.Files, err)
	}
	applied, err := clone.Apply(t.Context(), w.remote, change.Patch)
	if err != nil {
		t.Fatal(err)
	}
	who := gitrepo.Person{Name: "Bot", Email: "bot@example.com"}
	commit, err := clone.CommitTree(t.Context(), gitrepo.Commit{Tree: applied.Tree, Message: "x", Author: who, Committer: who, At: time.Unix(1_000_000_000, 0)})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := clone.Push(t.Context(), w.remote, "speckit/x", commit, ""); err != nil {
		t.Fatal(err)
	}
	if text, err := w.Read(t.Context(), name, "speckit/x", "docs/a"); err != nil || strings.TrimSpace(text) != "changed" {
		t.Errorf("the branch has %q, %v", text, err)
	}
	if _, err := os.Lstat(ran); err == nil {
		t.Error("a program of the worker's settings was run, or git has written where its variables say")
	}
	if left, err := os.ReadDir(elsewhere); err != nil || len(left) > 0 {
		t.Errorf("git has written elsewhere: %v, %v", left, err)
	}
}

// Addresses and branches with which git would run a program, read a file or take an
// option.
func TestHostileAddressesAndBranches(t *testing.T) {
	t.Parallel()
	git, err := gitrepo.New(gitrepo.Config{})
	if err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{
		"ext::sh -c id", "ext::sh%20-c%20id", "fd::3", "file:///etc", "/etc", "../x", "git://host/x", "http://host/x", "ftp://host/x", "helper::https://host/x", "-oProxyCommand=id", "--upload-pack=id",
		"ssh://-oProxyCommand=id/x", "ssh://-oProxyCommand=id@host/x", "ssh://host/-x", "ssh://git:secret@host/x", "host:x", "git@host:x", "https://user@host/x", "https://user:secret@host/x", "https://@host/x",
		"https://host", "https://host/", "https://host/a/../../b.git", "https://host/x.git/../..", "https://host/%2e%2e/x", "https://host/x?a=b", "https://host/x#a", "https://host/x\n", "https://host/ x", "https://ho\x00st/x", "https:///x", "https://-host/x", "https:host/x", "HTTPS://host/..", "",
	} {
		if remote, err := git.Remote(address, nil); err == nil {
			t.Errorf("%q is accepted as %s", address, remote.URL)
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: the error has the password: %v", address, err)
		}
	}
	for _, branch := range []string{
		"-", "--", "-f", "@", "@{", "@{-1}", "a@{0}", "..", "a..b", "a...b", ".", ".a", "a/.b", "a.lock", "a.lock/b", "a/", "/a", "a//b", "a.", "a b", "a\tb", "a\nb", "a\x00b", "a\x1b[2J", "a:b", "a^", "a~1", "a?", "a*", "[a]", `a\b`,
		"refs/heads/a", "HEAD", strings.Repeat("a", 300), strings.Repeat("a/", 200) + "a", "a\u202eb\xff",
	} {
		if err := gitrepo.CheckBranch(branch); err == nil {
			t.Errorf("the branch %q is accepted", branch)
		} else if len(err.Error()) > 600 || strings.ContainsAny(err.Error(), "\n\x00\x1b") {
			t.Errorf("the error of %q is not printable: %q", branch, err)
		}
	}
}

// Names in a patch that are .git on some file system, or lead out of the tree.
func TestHostileNamesInPatches(t *testing.T) {
	t.Parallel()
	w := newWorld(t, map[string]string{"README.md": "one\n"})
	clone, err := w.git.Fetch(t.Context(), w.remote, "main", filepath.Join(w.dir, "clone"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{
		".git/config", ".GIT/config", ".Git/hooks/pre-push", "a/.git/config", "git~1/config", "GIT~1/config", ".g\u200cit/config", ".git\u200d/config", "\ufeff.git/config", ".git./config", ".git /config", ".git::$INDEX_ALLOCATION/config", ".git:x/config",
		"/etc/passwd", "../x", "a/../../x", "./x", "a//x", "a/./b",
	} {
		quoted := `"b/` + strings.NewReplacer("\\", `\\`, `"`, `\"`).Replace(file) + `"`
		patch := fmt.Sprintf("diff --git \"a/%[1]s\" %[2]s\nnew file mode 100644\n--- /dev/null\n+++ %[2]s\n@@ -0,0 +1 @@\n+x\n", file, quoted)
		if applied, err := clone.Apply(t.Context(), w.remote, []byte(patch)); err == nil {
			t.Errorf("%q is applied: %q", file, applied.Files)
		}
	}
	for name, target := range map[string]string{"absolute": "/etc/passwd", "out": "../../x", "git": ".git/config", "proc": "/proc/self/environ", "upper": ".GIT/hooks", "long": strings.Repeat("a/", 3000)} {
		patch := fmt.Sprintf("diff --git a/%[1]s b/%[1]s\nnew file mode 120000\n--- /dev/null\n+++ b/%[1]s\n@@ -0,0 +1 @@\n+%[2]s\n\\ No newline at end of file\n", name, target)
		if applied, err := clone.Apply(t.Context(), w.remote, []byte(patch)); err == nil {
			t.Errorf("a link to %.40q is applied: %q", target, applied.Files)
		}
	}
}
