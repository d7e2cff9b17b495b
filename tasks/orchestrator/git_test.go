package orchestrator

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Settings of the repository, the user and the environment change nothing of
// patch: the diff is one that git apply takes, no other program runs, and files
// outside the allow-list are refused.
func TestGitSettingsDecideNothing(t *testing.T) {
	t.Parallel()
	const allowed = "svc/pyproject.toml"
	type row struct {
		// settings are of the repository; BIN stands for the directory with a
		// program "other", which leaves a file "ran" there.
		settings []string
		environ  []string
		// workspace of the plan, "." unless given.
		workspace string
		// change is made after the commit. Without it, an allowed file changes.
		change func(b *testEnv)
		// refused is the failure's text, "" for a success.
		refused string
		// binary says that the diff is one of binary files.
		binary bool
	}
	edit := func(b *testEnv) { b.file(allowed, "1\n2\n3\n4\nfive\n6\n7\n8\n9\n10\n11\ntwelve\n13\n") }
	rows := map[string]row{
		"no setting":              {},
		"color.ui":                {settings: []string{"color.ui=always"}},
		"color.diff":              {settings: []string{"color.diff=always"}},
		"diff.colorMoved":         {settings: []string{"color.diff=always", "diff.colorMoved=zebra", "diff.wsErrorHighlight=all"}},
		"diff.external":           {settings: []string{"diff.external=BIN/other"}},
		"GIT_EXTERNAL_DIFF":       {environ: []string{"GIT_EXTERNAL_DIFF=BIN/other"}},
		"GIT_DIFF_OPTS":           {environ: []string{"GIT_DIFF_OPTS=--unified=0"}},
		"settings of an outer -c": {environ: []string{"GIT_CONFIG_PARAMETERS='color.ui=always' 'diff.autorefreshindex=false'"}, change: func(b *testEnv) { edit(b); touch(b, "policy.txt") }},
		"a driver's command":      {settings: []string{"diff.own.command=BIN/other"}},
		"a driver's textconv":     {settings: []string{"diff.own.textconv=BIN/other"}},
		"a driver for binaries":   {settings: []string{"diff.own.binary=true"}, binary: true},
		"diff.noprefix":           {settings: []string{"diff.noprefix=true"}},
		"diff.mnemonicPrefix":     {settings: []string{"diff.mnemonicPrefix=true"}},
		"diff.srcPrefix":          {settings: []string{"diff.srcPrefix=x/", "diff.dstPrefix=y/"}},
		"diff.context":            {settings: []string{"diff.context=0"}},
		"diff.interHunkContext":   {settings: []string{"diff.interHunkContext=50"}},
		"diff.orderFile":          {settings: []string{"diff.orderFile=/nowhere"}},
		"diff.algorithm":          {settings: []string{"diff.algorithm=patience", "diff.indentHeuristic=false", "core.abbrev=40"}},
		"core.pager":              {settings: []string{"core.pager=BIN/other", "pager.diff=BIN/other"}, environ: []string{"GIT_PAGER=BIN/other"}},
		"aliases":                 {settings: []string{"alias.diff=!BIN/other", "alias.ls-files=!BIN/other"}},
		"core.fsmonitor":          {settings: []string{"core.fsmonitor=BIN/other"}},
		"core.hooksPath":          {settings: []string{"core.hooksPath=BIN/hooks"}, change: func(b *testEnv) { edit(b); touch(b, "policy.txt") }},
		"hooks": {change: func(b *testEnv) {
			edit(b)
			touch(b, "policy.txt")
			copyProgram(b, filepath.Join(b.workspace, ".git/hooks/post-index-change"))
		}},
		"core.quotePath": {settings: []string{"core.quotePath=false"},
			change: func(b *testEnv) { b.file("pyproject.toml", "x\n"); b.file("ä\t.txt", "x\n") }, refused: "ä\t.txt is not allow-listed"},
		"diff.autoRefreshIndex":                   {settings: []string{"diff.autoRefreshIndex=false"}, change: func(b *testEnv) { edit(b); touch(b, "policy.txt") }},
		"diff.relative in a folder, allowed file": {settings: []string{"diff.relative=true"}, workspace: "svc"},
		"diff.relative in a folder, file above": {settings: []string{"diff.relative=true"}, workspace: "svc",
			change: func(b *testEnv) { b.file("policy.txt", "none\n") }, refused: "../policy.txt is not allow-listed"},
		"diff.renames": {settings: []string{"diff.renames=copies"},
			change: func(b *testEnv) { b.git("mv", "policy.txt", "pyproject.toml") }, refused: "policy.txt is not allow-listed"},
		"diff.ignoreSubmodules": {settings: []string{"diff.ignoreSubmodules=all"}, change: changeSubmodule, refused: "library is not allow-listed"},
		"submodule.NAME.ignore": {settings: []string{"submodule.library.ignore=all"}, change: changeSubmodule, refused: "library is not allow-listed"},
		"diff.submodule":        {settings: []string{"diff.submodule=log"}, change: changeSubmodule, refused: "library is not allow-listed"},
		"core.excludesFile": {settings: []string{"core.excludesFile=BIN/ignored"},
			change: func(b *testEnv) { b.file("hidden.txt", "x\n") }, refused: "hidden.txt is not allow-listed"},
		"status and submodule.recurse": {settings: []string{"status.short=true", "status.branch=true", "status.showUntrackedFiles=no", "status.relativePaths=false", "submodule.recurse=true"},
			change: func(b *testEnv) { b.file("new.txt", "x\n") }, refused: "new.txt is not allow-listed"},
		"binary file": {change: func(b *testEnv) { b.file(allowed, "\x00\x01\n") }},
	}
	var plain string
	{
		b := newTestEnv(t)
		prepareSettings(b)
		edit(b)
		b.plan(`[{"name": "patch", "parameters": {"allowlist": ["svc/pyproject.toml"]}}]`)
		b.succeed("patch")
		plain = b.artifact("patch.diff")
	}
	for name, tt := range rows {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newTestEnv(t)
			prepareSettings(b)
			for _, variable := range tt.environ {
				b.config.Environ = append(b.config.Environ, strings.ReplaceAll(variable, "BIN", b.bin))
			}
			change := tt.change
			if change == nil {
				change = edit
			}
			change(b)
			for _, setting := range tt.settings {
				key, value, _ := strings.Cut(setting, "=")
				b.git("config", key, strings.ReplaceAll(value, "BIN", b.bin))
			}
			_ = os.Remove(filepath.Join(b.bin, "ran"))
			workspace, changed := ".", allowed
			if tt.workspace != "" {
				workspace, changed = tt.workspace, strings.TrimPrefix(allowed, tt.workspace+"/")
			}
			b.plan(`[{"name": "patch", "parameters": {"workspace": "` + workspace + `", "allowlist": ["svc/pyproject.toml", "pyproject.toml"]}}]`)
			if tt.refused != "" {
				failure, _ := b.fail("patch")
				same(t, "text", failure.Error(), tt.refused)
			} else {
				_, outcome := b.succeed("patch")
				same(t, "message", outcome.Message, "Patched files: "+changed)
				if tt.change == nil && !tt.binary {
					same(t, "patch.diff", b.artifact("patch.diff"), plain)
				}
			}
			if _, err := os.Stat(filepath.Join(b.bin, "ran")); err == nil {
				t.Error("git has run another program")
			}
			if strings.Contains(tt.refused, "library") {
				return // a change inside a submodule has no diff
			}
			b.applies()
		})
	}
}

// prepareSettings commits the files of the test, with an attribute for a diff
// driver of the repository's own, and installs the program "other".
func prepareSettings(b *testEnv) {
	b.t.Helper()
	b.program("other", `echo EXTERNAL; touch "`+b.bin+`/ran"`)
	copyProgram(b, filepath.Join(b.bin, "hooks/post-index-change"))
	if err := os.WriteFile(filepath.Join(b.bin, "ignored"), []byte("hidden.txt\n"), 0o644); err != nil {
		b.t.Fatal(err)
	}
	b.file("svc/pyproject.toml", "1\n2\n3\n4\n5\n6\n7\n8\n9\n10\n11\n12\n13\n")
	b.file("policy.txt", "a\nb\nc\nd\ne\nf\n")
	b.file(".gitattributes", "*.toml diff=own\n")
	b.repository()
}

// applies checks that git apply takes the diff, and that it brings back the
// tracked files of the work tree in a copy of the commit.
func (b *testEnv) applies() {
	b.t.Helper()
	copied := filepath.Join(b.t.TempDir(), "copy")
	run := func(dir string, args ...string) string {
		cmd := exec.Command("git", args...)
		cmd.Dir = dir
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1"}
		out, err := cmd.CombinedOutput()
		if err != nil {
			b.t.Errorf("git %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	run(b.workspace, "clone", "-q", b.workspace, copied)
	diff := filepath.Join(b.base, testRun, "patch.diff")
	if text, _ := os.ReadFile(diff); string(text) == "# No changes generated" {
		return
	}
	run(copied, "apply", diff)
	for name := range strings.SplitSeq(run(b.workspace, "ls-files", "-z"), "\x00") {
		if name == "" {
			continue
		}
		want, _ := os.ReadFile(filepath.Join(b.workspace, name))
		got, _ := os.ReadFile(filepath.Join(copied, name))
		same(b.t, name+" after git apply", string(got), string(want))
	}
}

// touch changes only the time of a file.
func touch(b *testEnv, name string) {
	b.t.Helper()
	path := filepath.Join(b.workspace, name)
	info, err := os.Stat(path)
	if err != nil {
		b.t.Fatal(err)
	}
	later := info.ModTime().Add(-1e12)
	if err := os.Chtimes(path, later, later); err != nil {
		b.t.Fatal(err)
	}
}

// copyProgram installs the program "other" under another path.
func copyProgram(b *testEnv, path string) {
	b.t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		b.t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(b.bin, "other"), path); err != nil {
		b.t.Fatal(err)
	}
}

// changeSubmodule adds a submodule "library", commits it, and changes a file in it.
func changeSubmodule(b *testEnv) {
	b.t.Helper()
	library := b.t.TempDir()
	b.git("init", "-q", library)
	b.git("-C", library, "commit", "-q", "--allow-empty", "-m", "start")
	b.git("-c", "protocol.file.allow=always", "submodule", "--quiet", "add", library, "library")
	b.git("commit", "-q", "-m", "library")
	b.git("-C", "library", "commit", "-q", "--allow-empty", "-m", "next")
}
