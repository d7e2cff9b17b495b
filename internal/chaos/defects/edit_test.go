package defects

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// editing is a module with one package, and an editor of its patches.
type editing struct {
	*testing.T
	Editor
	output bytes.Buffer
}

func newEditing(t *testing.T) *editing {
	root := t.TempDir()
	e := &editing{T: t}
	e.Editor = Editor{Module: filepath.Join(root, "module"), Patches: filepath.Join(root, "patches"), Work: filepath.Join(root, "work"), Output: &e.output}
	e.put("module/go.mod", "module example.test/m\n\ngo 1.25\n")
	e.put("module/some/some.go", source)
	e.put("patches/README.md", "")
	return e
}

const source = `package some

const far = 0

func first() int { return 1 }

func second() int {
	return first() + 1
}

func third() int { return second() }
`

func (e *editing) path(name string) string { return filepath.Join(filepath.Dir(e.Module), name) }

func (e *editing) put(name, text string) {
	e.Helper()
	if err := os.MkdirAll(filepath.Dir(e.path(name)), 0o755); err != nil {
		e.Fatal(err)
	}
	if err := os.WriteFile(e.path(name), []byte(text), 0o644); err != nil {
		e.Fatal(err)
	}
}

func (e *editing) get(name string) string {
	e.Helper()
	text, err := os.ReadFile(e.path(name))
	if err != nil {
		e.Fatal(err)
	}
	return string(text)
}

// replace edits a file.
func (e *editing) replace(name, old, with string) {
	e.Helper()
	text := e.get(name)
	if strings.Count(text, old) != 1 {
		e.Fatalf("%s does not have %q once: %s", name, old, text)
	}
	e.put(name, strings.Replace(text, old, with, 1))
}

// refresh refreshes; the error, or "" for none, must contain want.
func (e *editing) refresh(want string) {
	e.Helper()
	err := e.Refresh(e.Context())
	if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
		e.Fatalf("%v, want %q; it said: %s", err, want, e.output.String())
	}
}

// withDefect makes the defect "late" in package some, with a file of its own.
func withDefect(t *testing.T) *editing {
	t.Helper()
	e := newEditing(t)
	if err := e.Open(t.Context(), "late", "It comes late.", []string{"some/some.go", "some/late.go"}); err != nil {
		t.Fatal(err)
	}
	e.replace("work/late/b/some/some.go", "first() + 1", "first() + late")
	e.put("work/late/b/some/late.go", "package some\n\nconst late = 2\n")
	e.refresh("")
	return e
}

func TestNewDefect(t *testing.T) {
	t.Parallel()
	e := withDefect(t)
	const want = `late: It comes late.

diff --git a/some/late.go b/some/late.go
new file mode 100644
--- /dev/null
+++ b/some/late.go
@@ -0,0 +1,3 @@
+package some
+
+const late = 2
diff --git a/some/some.go b/some/some.go
--- a/some/some.go
+++ b/some/some.go
@@ -5,7 +5,7 @@ const far = 0
 func first() int { return 1 }
 
 func second() int {
-	return first() + 1
+	return first() + late
 }
 
 func third() int { return second() }
`
	if got := e.get("patches/late.patch"); got != want {
		t.Errorf("the patch is\n%s\nwant\n%s", got, want)
	}
	if got := e.get("module/some/some.go"); got != source {
		t.Errorf("the module's own file became %s", got)
	}
	if left, _ := filepath.Glob(e.path("work/*")); len(left) > 0 {
		t.Errorf("%v is left", left)
	}
	if err := e.Open(t.Context(), "other", "", nil); err == nil {
		t.Error("a defect was opened that nobody has described")
	}
}

func TestRefreshFollowsEditsNearBy(t *testing.T) {
	t.Parallel()
	e := withDefect(t)
	before := e.get("patches/late.patch")
	e.replace("module/some/some.go", "const far = 0\n", "const far = 0\n\nconst farther = 0\n")
	e.refresh("")
	if got := e.get("patches/late.patch"); got != before {
		t.Errorf("an edit far away changed the patch: %s", got)
	}
	e.replace("module/some/some.go", "func third() int {", "func third() (n int) {")
	e.refresh("")
	if got := e.get("patches/late.patch"); !strings.Contains(got, "\n func third() (n int) {") {
		t.Errorf("the context is still %s", got)
	}
}

func TestStalePatchIsOpened(t *testing.T) {
	t.Parallel()
	e := withDefect(t)
	e.replace("module/some/some.go", "first() + 1", "first() + 3")
	e.refresh("1 of 1 patches need an edit")
	e.refresh(".rej")
	e.replace("work/late/b/some/some.go", "first() + 3", "first() + late")
	if err := os.Remove(e.path("work/late/b/some/some.go.rej")); err != nil {
		t.Fatal(err)
	}
	e.refresh("")
	if got := e.get("patches/late.patch"); !strings.Contains(got, "-\treturn first() + 3\n+\treturn first() + late\n") {
		t.Errorf("the patch is %s", got)
	}
}

// As make runs it: in a work tree of git, whose paths git would otherwise take
// the patch's for.
func TestEditInAWorkTreeOfGit(t *testing.T) {
	e := withDefect(t)
	t.Chdir(filepath.Dir(e.Module))
	if text, err := exec.CommandContext(t.Context(), "git", "init", "-q").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	e.Module, e.Patches, e.Work = "module", "patches", filepath.Join("var", "work")
	before := e.get("patches/late.patch")
	if err := e.Open(t.Context(), "late", "", nil); err != nil {
		t.Fatal(err)
	}
	if got := e.get("var/work/late/b/some/some.go"); !strings.Contains(got, "first() + late") {
		t.Errorf("it was opened without its change: %s", got)
	}
	e.refresh("")
	if got := e.get("patches/late.patch"); got != before {
		t.Errorf("the patch became %s", got)
	}
}

func TestResultThatDoesNotCompileIsOpened(t *testing.T) {
	t.Parallel()
	e := withDefect(t)
	e.put("module/some/other.go", "package some\n\nconst late = 5\n")
	e.refresh("1 of 1 patches need an edit")
	if !strings.Contains(e.output.String(), "late redeclared") {
		t.Errorf("it said %s", e.output.String())
	}
	e.put("work/late/b/some/late.go", "package some\n\nconst veryLate = 2\n")
	e.replace("work/late/b/some/some.go", "+ late", "+ veryLate")
	e.refresh("")
}

func TestRemovedFileIsOfTheDefect(t *testing.T) {
	t.Parallel()
	e := withDefect(t)
	e.put("module/some/other.go", "package some\n\nvar _ = third\n")
	if err := e.Open(t.Context(), "gone", "It is gone.", []string{"some/other.go"}); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(e.path("work/gone/b/some/other.go")); err != nil {
		t.Fatal(err)
	}
	e.refresh("")
	d, err := e.read("gone")
	if err != nil || len(d.Files) != 1 {
		t.Fatalf("%v, %v", d.Files, err)
	}
	folder := t.TempDir()
	overlay, err := d.Overlay(t.Context(), e.Module, folder)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(overlay)
	if err != nil || !strings.Contains(string(text), `other.go": ""`) {
		t.Errorf("%s, %v", text, err)
	}
}
