package orchestrator

import (
	"cmp"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// diffPlan is a plan whose patch has a diff.
func diffPlan(t testing.TB, diff, more string) string {
	t.Helper()
	text, err := json.Marshal(diff)
	if err != nil {
		t.Fatal(err)
	}
	return `[{"name": "patch", "parameters": {"diff": ` + string(text) + more + `}}, {"name": "rollback"}]`
}

// diffOf returns the diff that git makes of what a script alters in the workspace,
// and takes that back.
func (b *testEnv) diffOf(script string) string {
	b.t.Helper()
	out := filepath.Join(b.t.TempDir(), "diff")
	b.shell(`git stash -q -u && cp -a . "` + out + `.tree" && git stash pop -q --index
cd "` + out + `.tree"
` + script + `
git add -A && git diff --cached --binary -M HEAD > "` + out + `"`)
	text, err := os.ReadFile(out)
	if err != nil {
		b.t.Fatal(err)
	}
	return string(text)
}

func TestADiffIsAppliedWholeOrNotAtAll(t *testing.T) {
	t.Parallel()
	const requirements = `echo two >> api_service/requirements.txt`
	for name, tt := range map[string]struct {
		// script makes the diff; diff is one that no git makes.
		script, diff string
		// want is the beginning of the failure, "" for a success.
		want string
		// message is that of the success.
		message string
	}{
		"edit":                  {script: requirements, message: "Patched files: api_service/requirements.txt"},
		"new file":              {script: "echo x > api_service/requirements-new.txt", message: "Patched files: api_service/requirements-new.txt"},
		"new file in a folder":  {script: "mkdir -p api_service/requirements-d; echo x > api_service/requirements-d/a.txt", message: "Patched files: api_service/requirements-d/a.txt"},
		"remove":                {script: "rm api_service/requirements.txt", message: "Patched files: api_service/requirements.txt"},
		"mode":                  {script: "chmod 755 api_service/Dockerfile", message: "Patched files: api_service/Dockerfile"},
		"link":                  {script: "ln -sf Dockerfile api_service/requirements.txt", message: "Patched files: api_service/requirements.txt"},
		"binary":                {script: `printf '\000\001\377\012' > api_service/requirements.txt`, message: "Patched files: api_service/requirements.txt"},
		"rename":                {script: "git mv api_service/requirements.txt api_service/requirements-2.txt", message: "Patched files: api_service/requirements-2.txt, api_service/requirements.txt"},
		"several":               {script: requirements + "; echo x >> api_service/Dockerfile", message: "Patched files: api_service/Dockerfile, api_service/requirements.txt"},
		"name that git quotes":  {script: "echo x > 'api_service/requirements ä\t.txt'", message: "Patched files: api_service/requirements ä\t.txt"},
		"another file":          {script: "echo x > other.txt", want: "other.txt is not allow-listed"},
		"allowed and another":   {script: requirements + "; echo x > other.txt", want: "other.txt is not allow-listed"},
		"rename from elsewhere": {script: "git mv README api_service/requirements-2.txt", want: "README is not allow-listed"},
		"rename to elsewhere":   {script: "git mv api_service/requirements.txt kept.txt", want: "kept.txt is not allow-listed"},
		"mode of another":       {script: "chmod 755 README", want: "README is not allow-listed"},
		"does not fit": {diff: "--- a/api_service/requirements.txt\n+++ b/api_service/requirements.txt\n@@ -1 +1 @@\n-other\n+x\n",
			want: "Plan parameter diff cannot be applied, and nothing was changed: git apply failed with code 1: error: patch failed: api_service/requirements.txt:1"},
		"half of it fits": {diff: "--- a/api_service/Dockerfile\n+++ b/api_service/Dockerfile\n@@ -1 +1 @@\n-FROM scratch\n+FROM x\n--- a/api_service/requirements.txt\n+++ b/api_service/requirements.txt\n@@ -1 +1 @@\n-other\n+x\n",
			want: "Plan parameter diff cannot be applied, and nothing was changed: "},
		"out of the repository":     {diff: "--- /dev/null\n+++ b/../x\n@@ -0,0 +1 @@\n+x\n", want: "Plan parameter diff cannot be applied, and nothing was changed: git apply failed with code"},
		"absolute":                  {diff: "--- /dev/null\n+++ /tmp/x\n@@ -0,0 +1 @@\n+x\n", want: "tmp is not allow-listed; tmp/x is not allow-listed"},
		"git's folder":              {diff: "--- /dev/null\n+++ b/.git/hooks/x\n@@ -0,0 +1 @@\n+x\n", want: "Plan parameter diff cannot be applied, and nothing was changed: git apply failed with code"},
		"git's folder in capitals":  {diff: "--- /dev/null\n+++ b/.GIT/hooks/x\n@@ -0,0 +1 @@\n+x\n", want: "Plan parameter diff cannot be applied, and nothing was changed: git apply failed with code"},
		"no diff":                   {diff: "hello", want: "Plan parameter diff cannot be applied, and nothing was changed: git apply failed with code 128: error: No valid patches in input"},
		"submodule":                 {diff: "diff --git a/api_service/requirements-s.txt b/api_service/requirements-s.txt\nnew file mode 160000\nindex 0000000..1111111\n--- /dev/null\n+++ b/api_service/requirements-s.txt\n@@ -0,0 +1 @@\n+Subproject commit 1111111111111111111111111111111111111111\n", want: "Plan parameter diff cannot be applied, and nothing was changed: api_service/requirements-s.txt would become a submodule"},
		"through a link":            {diff: "diff --git a/api_service/requirements-l.txt b/api_service/requirements-l.txt\nnew file mode 120000\n--- /dev/null\n+++ b/api_service/requirements-l.txt\n@@ -0,0 +1 @@\n+/tmp\n\\ No newline at end of file\n--- /dev/null\n+++ b/api_service/requirements-l.txt/x\n@@ -0,0 +1 @@\n+x\n", want: "Plan parameter diff cannot be applied, and nothing was changed: "},
		"an ignored file":           {diff: "--- a/.env\n+++ b/.env\n@@ -1 +1 @@\n-SECRET=1\n+SECRET=2\n", want: ".env is not allow-listed"},
		"an untracked file's edits": {diff: "--- a/notes.txt\n+++ b/notes.txt\n@@ -1 +1 @@\n-mine\n+yours\n", want: "notes.txt is not allow-listed"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newDirty(t)
			b.file(".git/info/exclude", ".env\n")
			b.file(".env", "SECRET=1\n")
			b.git("config", "apply.whitespace", "error-all")
			b.git("config", "core.autocrlf", "input")
			diff := tt.diff
			if tt.script != "" {
				diff = b.diffOf(tt.script)
			}
			before := b.status()
			b.plan(diffPlan(t, diff, ""))
			if tt.want != "" {
				failure, _ := b.fail("patch")
				if !strings.HasPrefix(failure.Error(), tt.want) {
					t.Errorf("%s, want %s", failure.Error(), tt.want)
				}
				same(t, "status", b.status(), before)
			} else {
				_, outcome := b.succeed("patch")
				same(t, "message", outcome.Message, tt.message)
			}
			b.succeed("rollback")
			same(t, "status", b.status(), before)
			same(t, "file", b.text("api_service/requirements.txt"), "one\n")
			same(t, "notes.txt", b.text("notes.txt"), "mine\n")
		})
	}
}

// The diff applies to the workspace with somebody's uncommitted edits, and comes
// before the commands.
func TestADiffAppliesToAnEditedFile(t *testing.T) {
	t.Parallel()
	b := newDirty(t)
	b.file("api_service/requirements.txt", "one\nedited\n")
	b.plan(diffPlan(t, "--- a/api_service/requirements.txt\n+++ b/api_service/requirements.txt\n@@ -1,2 +1,3 @@\n one\n edited\n+patched\n", `, "commands": [["do", "echo command >> api_service/requirements.txt"]]`))
	b.succeed("patch")
	same(t, "file", b.text("api_service/requirements.txt"), "one\nedited\npatched\ncommand\n")
	same(t, "log", b.artifact("patch.log"), "[Applied the plan's diff to api_service/requirements.txt]\ndo echo command >> api_service/requirements.txt")
	b.succeed("rollback")
	same(t, "file", b.text("api_service/requirements.txt"), "one\nedited\n")
}

// A diff that git has made of files to which it gives CRLF in the work tree has LF. It
// applies as by git apply, and the files keep CRLF.
func TestADiffOfFilesWithCarriageReturns(t *testing.T) {
	t.Parallel()
	const diff = "--- a/api_service/requirements.txt\n+++ b/api_service/requirements.txt\n@@ -1,2 +1,3 @@\n one\n-two\n+zwei\n+three\n"
	for name, tt := range map[string]struct {
		attributes, autocrlf string
		// before and diff default to two lines with CRLF, and the diff above.
		before, diff string
		// after is the file's content after the patch, "" if the diff is refused, and more
		// that of others, "-" for none.
		after string
		more  map[string]string
	}{
		"eol=crlf":              {attributes: "*.txt eol=crlf\n", after: "one\r\nzwei\r\nthree\r\n"},
		"text":                  {attributes: "*.txt text\n", after: "one\r\nzwei\r\nthree\r\n"},
		"autocrlf":              {autocrlf: "true", after: "one\r\nzwei\r\nthree\r\n"},
		"autocrlf=input":        {autocrlf: "input", after: "one\r\nzwei\r\nthree\r\n"},
		"no newline at the end": {attributes: "*.txt eol=crlf\n", diff: "--- a/api_service/requirements.txt\n+++ b/api_service/requirements.txt\n@@ -1,2 +1,2 @@\n one\n-two\n+zwei\n\\ No newline at end of file\n", after: "one\r\nzwei"},
		"renamed, and a new one": {
			attributes: "*.txt text eol=crlf\n",
			diff: "diff --git a/api_service/requirements.txt b/api_service/requirements-2.txt\nsimilarity index 50%\nrename from api_service/requirements.txt\nrename to api_service/requirements-2.txt\n--- a/api_service/requirements.txt\n+++ b/api_service/requirements-2.txt\n@@ -1,2 +1,2 @@\n one\n-two\n+zwei\n" +
				"diff --git a/api_service/requirements-n.txt b/api_service/requirements-n.txt\nnew file mode 100644\n--- /dev/null\n+++ b/api_service/requirements-n.txt\n@@ -0,0 +1 @@\n+new\n",
			after: "-", more: map[string]string{"api_service/requirements-2.txt": "one\r\nzwei\r\n", "api_service/requirements-n.txt": "new\r\n"},
		},
		"as they are":    {},
		"-text":          {attributes: "*.txt -text\n", autocrlf: "true"},
		"another filter": {attributes: "*.txt text filter=lfs\n"},
		"mixed":          {attributes: "*.txt text\n", before: "one\r\ntwo\n"},
		"another line":   {attributes: "*.txt text\n", before: "one\r\nother\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newDirty(t)
			before := cmp.Or(tt.before, "one\r\ntwo\r\n")
			b.file(".gitattributes", tt.attributes)
			if tt.autocrlf != "" {
				b.git("config", "core.autocrlf", tt.autocrlf)
			}
			b.file("api_service/requirements.txt", before)
			b.shell("git add .gitattributes api_service && git commit -q -m carriage-returns")
			b.plan(diffPlan(t, cmp.Or(tt.diff, diff), ""))
			if tt.after == "" {
				failure, _ := b.fail("patch")
				if !strings.HasPrefix(failure.Error(), "Plan parameter diff cannot be applied, and nothing was changed: git apply failed with code 1: error: patch failed: api_service/requirements.txt:1") {
					t.Error(failure)
				}
			} else {
				b.succeed("patch")
				if tt.after != "-" {
					same(t, "file", b.text("api_service/requirements.txt"), tt.after)
				}
				for name, want := range tt.more {
					same(t, name, b.text(name), want)
				}
			}
			b.succeed("rollback")
			same(t, "file after the rollback", b.text("api_service/requirements.txt"), before)
			for name := range tt.more {
				if _, err := os.Lstat(filepath.Join(b.workspace, name)); err == nil {
					t.Errorf("%s is left", name)
				}
			}
		})
	}
}
