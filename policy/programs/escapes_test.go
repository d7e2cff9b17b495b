package programs

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// These refused command lines are real: git, run with them, starts a program or works
// outside of the workspace. MARK is a file outside that each of them makes, PROGRAM a
// program that makes it, and OUTSIDE a file outside whose text they print.
func TestEscapesAreReal(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		"git -c alias.x=!PROGRAM x",
		"git --config-env=alias.x=EVIL x",
		"git --config-env alias.x=EVIL x",
		"git -c core.fsmonitor=PROGRAM status",
		"git -c diff.external=PROGRAM diff",
		"git -c core.hooksPath=HOOKS checkout -b other",
		"git -c core.editor=PROGRAM commit --allow-empty",
		"git -c include.path=INCLUDED x",
		"git --exec-path=BIN x",
		"git x-of-the-repository",
		"git grep -OPROGRAM x",
		"git grep --open-files-in-pager=PROGRAM x",
		"git grep --open=PROGRAM x",
		"git difftool -y -x PROGRAM",
		"git difftool --no-prompt --extcmd=PROGRAM",
		"git bisect run PROGRAM",
		"git rebase --exec PROGRAM --root",
		"git rebase --ex PROGRAM --root",
		"git filter-branch --tree-filter PROGRAM HEAD",
		"git submodule foreach PROGRAM",
		"git fetch --upload-pack PROGRAM .",
		"git fetch --upload-p PROGRAM .",
		"git -c protocol.ext.allow=always fetch ext::PROGRAM",
		"git ls-remote --upload-pack=PROGRAM .",
		"git push --receive-pack=PROGRAM . HEAD:x",
		"git clone --upload-pack PROGRAM . copy",
		"git archive --remote=. --exec=PROGRAM HEAD",
		"git for-each-repo --config=repos.all PROGRAM",
		"git diff --output=MARK",
		"git log --output MARK",
		"git archive --output=MARK HEAD",
		"git archive -oMARK HEAD",
		"git bundle create MARK HEAD",
		"git init MARK",
		"git clone . MARK",
		"git worktree add MARK",
		"git format-patch -o MARK --root",
		"git config --file MARK a.b c",
		"git checkout-index --prefix=MARK- -a",
		"git --work-tree=OUT checkout HEAD -- file",
		"git --git-dir=OTHER log",
		"git -C OTHER log",
		"git diff --no-index OUTSIDE file",
		"git diff OUTSIDE /dev/null",
		"git blame --contents OUTSIDE file",
		"git apply --build-fake-ancestor=MARK fix.patch",
		"git hash-object -w OUTSIDE",
	} {
		t.Run(text, func(t *testing.T) {
			t.Parallel()
			top := t.TempDir()
			path := func(name string) string { return filepath.Join(top, name) }
			workspace, mark, program, outside, other := path("workspace"), path("mark"), path("bin/git-x"), path("outside"), path("other")
			environ := append(os.Environ(), "HOME="+top, "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1", "EVIL=!"+program, "FILTER_BRANCH_SQUELCH_WARNING=1",
				"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.test", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.test", "GIT_TERMINAL_PROMPT=0")
			git := func(dir string, args ...string) string {
				cmd := exec.CommandContext(t.Context(), "git", args...)
				cmd.Dir, cmd.Env = dir, environ
				out, _ := cmd.CombinedOutput() // some escapes fail, and have done their work
				return string(out)
			}
			write := func(name, text string, mode os.FileMode) {
				if err := os.MkdirAll(filepath.Dir(path(name)), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path(name), []byte(text), mode); err != nil {
					t.Fatal(err)
				}
			}
			script := "#!/bin/sh\necho x > " + mark + "\ntrue\n"
			write("bin/git-x", script, 0o755)
			write("hooks/post-checkout", script, 0o755)
			write("included", "[alias]\nx = !"+program+"\n", 0o644)
			write("outside", "text of the machine\n", 0o644)
			write("out/keep", "", 0o644)
			for _, dir := range []string{"workspace", "other"} {
				write(dir+"/file", "text x of the machine "+dir+"\n", 0o644)
				git(path(dir), "init", "-q", "-b", "main")
				git(path(dir), "add", ".")
				git(path(dir), "commit", "-q", "-m", "commit of "+dir)
				git(path(dir), "commit", "-q", "--allow-empty", "-m", "second of "+dir)
			}
			switch {
			case strings.Contains(text, "x-of-the-repository"):
				git(workspace, "config", "alias.x-of-the-repository", "!"+program)
			case strings.Contains(text, "bisect"):
				git(workspace, "commit", "-q", "--allow-empty", "-m", "third")
				git(workspace, "bisect", "start", "HEAD", "HEAD~2")
			case strings.Contains(text, "submodule"):
				git(workspace, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", other, "sub")
				git(workspace, "commit", "-q", "-m", "sub")
			case strings.Contains(text, "repos.all"):
				git(workspace, "config", "repos.all", workspace)
				git(workspace, "config", "alias."+filepath.Base(program), "!"+program)
				text = strings.ReplaceAll(text, "PROGRAM", filepath.Base(program))
			case strings.Contains(text, "diff") && !strings.Contains(text, "OUTSIDE"):
				write("workspace/file", "text x changed\n", 0o644)
			case strings.Contains(text, "fix.patch"):
				write("workspace/file", "text x changed\n", 0o644)
				write("workspace/fix.patch", git(workspace, "diff", "--full-index"), 0o644)
				git(workspace, "checkout", "-q", "file")
			}
			os.Remove(mark)
			words := strings.Fields(strings.NewReplacer("PROGRAM", program, "MARK", mark, "OUTSIDE", outside, "OTHER/", other+"/", "HOOKS", path("hooks"),
				"INCLUDED", path("included"), "BIN", path("bin"), "OUT", path("out")).Replace(text))
			for i := range words {
				words[i] = strings.ReplaceAll(words[i], "OTHER", other)
				if words[i] == "--git-dir="+other {
					words[i] += "/.git"
				}
			}
			l := line(words)
			l.Workspace = workspace
			refusal := Judge(l)
			if refusal == nil {
				t.Errorf("%q is allowed", words)
			}
			out := git(workspace, words[1:]...)
			matches, _ := filepath.Glob(mark + "*")
			_, inOut := os.Stat(path("out/file"))
			escaped := len(matches) > 0 || inOut == nil || strings.Contains(out, "text of the machine") || strings.Contains(out, "of other") ||
				strings.Contains(text, "OUTSIDE") && strings.Contains(out, "machine")
			if strings.Contains(text, "hash-object") {
				escaped = git(workspace, "cat-file", "-p", strings.TrimSpace(out)) == "text of the machine\n"
			}
			if !escaped {
				t.Errorf("%q is no escape: %s", words, out)
			}
		})
	}
}
