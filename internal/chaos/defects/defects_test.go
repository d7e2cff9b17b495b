package defects

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "../../.."

const cure = "Run `make defects`: it refreshes the patch, or says what to edit (README.md of this package)."

func all(t *testing.T) []Defect {
	t.Helper()
	list, err := All()
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// A change that makes a patch stale fails here, and not only in the proof,
// which few people run.
func TestEveryPatchAppliesAndCompiles(t *testing.T) {
	t.Parallel()
	for _, d := range all(t) {
		t.Run(d.Name, func(t *testing.T) {
			t.Parallel()
			overlay, err := d.Overlay(t.Context(), module, t.TempDir())
			if err != nil {
				t.Fatalf("%v\n\t%s", err, cure)
			}
			readPackages(t, d)
			if err := d.Compile(t.Context(), module, overlay); err != nil {
				t.Errorf("%v\n\t%s", err, cure)
			}
		})
	}
}

// readPackages lets the test cache know what the build reads: all files of the
// packages, of which another may lose a name that the patch uses.
func readPackages(t *testing.T, d Defect) {
	t.Helper()
	for _, folder := range d.Packages() {
		files, err := filepath.Glob(filepath.Join(module, folder, "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("%s.patch: no Go files in %s (%v)", d.Name, folder, err)
		}
		for _, file := range files {
			if _, err := os.ReadFile(file); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// A patch must apply after other edits, as long as the lines that it changes
// exist.
func TestPatchesApplyBesideOtherEdits(t *testing.T) {
	t.Parallel()
	const patch = `near: The one is two.

diff --git a/some.go b/some.go
--- a/some.go
+++ b/some.go
@@ -1,7 +1,7 @@
 first
 second
 third
-one
+two
 fourth
 fifth
 sixth
diff --git b/new.go b/new.go
new file mode 100644
--- /dev/null
+++ b/new.go
@@ -0,0 +1 @@
+package some
`
	for name, c := range map[string]struct{ before, want string }{
		"as it was":             {"first\nsecond\nthird\none\nfourth\nfifth\nsixth\n", "first\nsecond\nthird\ntwo\nfourth\nfifth\nsixth\n"},
		"moved, others changed": {"new\nnew\nnew\nfirst\nother\nthird\none\nfourth\nother\nnew\n", "new\nnew\nnew\nfirst\nother\nthird\ntwo\nfourth\nother\nnew\n"},
		"the line is deleted":   {"first\nsecond\nthird\nthree\nfourth\nfifth\nsixth\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, err := parse("near", []byte(patch))
			if err != nil {
				t.Fatal(err)
			}
			root := t.TempDir()
			if err := os.WriteFile(filepath.Join(root, "some.go"), []byte(c.before), 0o644); err != nil {
				t.Fatal(err)
			}
			folder := t.TempDir()
			_, err = d.Overlay(t.Context(), root, folder)
			if (err != nil) != (c.want == "") {
				t.Fatalf("%v", err)
			}
			if c.want == "" {
				return
			}
			got, err := os.ReadFile(filepath.Join(folder, "tree", "some.go"))
			if err != nil || string(got) != c.want {
				t.Errorf("%v, %q, want %q", err, got, c.want)
			}
			if got, err := os.ReadFile(filepath.Join(folder, "tree", "new.go")); err != nil || string(got) != "package some\n" {
				t.Errorf("%v, %q", err, got)
			}
			if untouched, err := os.ReadFile(filepath.Join(root, "some.go")); err != nil || string(untouched) != c.before {
				t.Errorf("the module's own file became %q (%v)", untouched, err)
			}
		})
	}
}

func TestHeaderSaysWhatBreaks(t *testing.T) {
	t.Parallel()
	const diff = "\n\n--- a/some.go\n+++ b/some.go\n"
	for text, want := range map[string]string{
		"a: It is\nlate." + diff: "It is late.",
		"b: It is late." + diff:  "",
		"a: " + diff:             "",
		"a: It is late.\n\n":     "",
		diff:                     "",
	} {
		d, err := parse("a", []byte(text))
		if (err != nil) != (want == "") || err == nil && d.Breaks != want {
			t.Errorf("%q: %q, %v", text, d.Breaks, err)
		}
	}
}

func TestPackages(t *testing.T) {
	t.Parallel()
	d := Defect{Files: []string{"worker/settle.go", "store/hold.go", "worker/new.go"}}
	if got, want := d.Packages(), []string{"./store", "./worker"}; !slices.Equal(got, want) {
		t.Errorf("%s", strings.Join(got, " "))
	}
}
