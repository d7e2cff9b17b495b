package artifacts_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
)

const runID = "5b0e6a52-3c1d-4f0e-9b7a-6a1f2d9c4e10"

func TestTheRowDecidesWhereARunIs(t *testing.T) {
	t.Parallel()
	top := artifacts.Resolve(t.TempDir())
	here := filepath.Join(top, "shared")
	if err := os.Symlink(top, filepath.Join(top, "link")); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name     string
		config   artifacts.DirectoryConfig
		row      string
		wantRow  string
		wantDir  string
		wantText string
	}{
		{name: "shipped defaults double the path", config: artifacts.DirectoryConfig{SubPath: "var/artifacts/spec_workflows"},
			wantDir: top + "/var/artifacts/spec_workflows/var/artifacts/spec_workflows/" + runID},
		{name: "no sub-path", wantDir: top + "/var/artifacts/spec_workflows/" + runID},
		{name: "absolute sub-path inside", config: artifacts.DirectoryConfig{Base: top, SubPath: top + "/a"}, wantDir: top + "/a/" + runID},
		{name: "absolute sub-path outside", config: artifacts.DirectoryConfig{SubPath: "/etc"}, wantText: "Configured artifact root escapes the allowed base directory"},
		{name: "relative sub-path outside", config: artifacts.DirectoryConfig{SubPath: "../x"}, wantText: "Configured artifact root escapes the allowed base directory"},
		{name: "row ends in the run id", config: artifacts.DirectoryConfig{SubPath: "/etc"}, row: top + "/x/" + runID, wantDir: top + "/x/" + runID},
		{name: "row is a base", row: top + "/x", wantDir: top + "/x/" + runID},
		{name: "row through a link", row: top + "/link/x/" + runID, wantDir: top + "/x/" + runID},
		{name: "relative row", row: "x/" + runID, wantDir: top + "/x/" + runID},
		{name: "mapped", config: artifacts.DirectoryConfig{Mappings: []artifacts.PrefixMapping{{From: "/app/var", To: here}, {From: "/app", To: "/nowhere"}}},
			row: "/app/var/a/" + runID, wantRow: "/app/var/a/" + runID, wantDir: here + "/a/" + runID},
		{name: "a prefix is whole components", config: artifacts.DirectoryConfig{Mappings: []artifacts.PrefixMapping{{From: top + "/app", To: here}}},
			row: top + "/application/" + runID, wantDir: top + "/application/" + runID},
		{name: "our own root as the API sees it", config: artifacts.DirectoryConfig{Base: here, Mappings: []artifacts.PrefixMapping{{From: "/app/var", To: here}}},
			wantRow: "/app/var/" + runID, wantDir: here + "/" + runID},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			test.config.WorkingDir = top
			place, err := test.config.WithDefaults().ForRun(test.row, runID)
			if test.wantText != "" {
				var pathErr *artifacts.PathError
				if !errors.As(err, &pathErr) || err.Error() != test.wantText {
					t.Fatalf("error %v, want %s", err, test.wantText)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if test.wantRow == "" {
				test.wantRow = test.wantDir
			}
			if place.Dir != test.wantDir || place.RowPath != test.wantRow {
				t.Errorf("%+v, want row %s, directory %s", place, test.wantRow, test.wantDir)
			}
		})
	}
}

func TestMappingsAreRead(t *testing.T) {
	t.Parallel()
	got, err := artifacts.ParsePrefixMappings("/app/var=/srv/var/, /x=/y")
	if err != nil || fmt.Sprint(got) != "[{/app/var /srv/var} {/x /y}]" {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"/app", "app=/srv", "/app=srv"} {
		if _, err := artifacts.ParsePrefixMappings(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func open(t *testing.T, environ ...string) *artifacts.Run {
	t.Helper()
	run, err := artifacts.Open(filepath.Join(t.TempDir(), runID), artifacts.NewRedactor(environ))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { run.Close() })
	return run
}

// check compares a File with the file on disk.
func check(t *testing.T, run *artifacts.Run, file artifacts.File, err error, content string) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(run.Dir(), file.Path))
	if err != nil {
		t.Fatal(err)
	}
	if string(data) != content {
		t.Errorf("%s is %q, want %q", file.Path, data, content)
	}
	sum := sha256.Sum256(data)
	if file.Checksum != hex.EncodeToString(sum[:]) || file.SizeBytes != int64(len(data)) {
		t.Errorf("registered %+v, the file has %d bytes, %x", file, len(data), sum)
	}
	entries, err := os.ReadDir(filepath.Dir(filepath.Join(run.Dir(), file.Path)))
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), ".") {
			t.Errorf("temporary file %s was not removed", entry.Name())
		}
	}
}

func TestArtifactsStayInTheRunDirectory(t *testing.T) {
	t.Parallel()
	run := open(t)
	outside := t.TempDir()
	if err := os.Symlink(outside, filepath.Join(run.Dir(), "out")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(outside, "f"), filepath.Join(run.Dir(), "file")); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"/etc/passwd": "Artifact paths must be relative",
		"../x":        "Artifact path escapes the run directory",
		"a/../../x":   "Artifact path escapes the run directory",
		"":            "Artifact path escapes the run directory",
		"out/x":       "Artifact path escapes the run directory",
		"file":        "Artifact path escapes the run directory",
	} {
		if _, err := run.Write(name, "x"); err == nil || err.Error() != text {
			t.Errorf("write %q: %v, want %s", name, err, text)
		}
		if _, err := run.Log(name); err == nil || err.Error() != text {
			t.Errorf("log %q: %v, want %s", name, err, text)
		}
	}
	if entries, _ := os.ReadDir(outside); len(entries) > 0 {
		t.Errorf("files outside of the run directory: %v", entries)
	}
	file, err := run.Write("deep/er/../x.log", "inside")
	check(t, run, file, err, "inside")
	if file.Path != "deep/x.log" {
		t.Errorf("path %s", file.Path)
	}
}

func TestASymlinkIsNotARunDirectory(t *testing.T) {
	t.Parallel()
	top := t.TempDir()
	link := filepath.Join(top, runID)
	if err := os.Symlink(t.TempDir(), link); err != nil {
		t.Fatal(err)
	}
	if _, err := artifacts.Open(link, nil); err == nil || err.Error() != "Artifact run directory cannot be a symlink" {
		t.Errorf("%v", err)
	}
}

func TestADirectoryThatCannotBeCreatedIsAnError(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := artifacts.Open(filepath.Join(file, runID), nil)
	if err == nil || !strings.Contains(err.Error(), "cannot be written") || !strings.Contains(err.Error(), "MM_ORCHESTRATOR_ARTIFACT_PATH_MAP") {
		t.Errorf("%v", err)
	}
}

func TestADocumentAppearsWhenItIsFinished(t *testing.T) {
	t.Parallel()
	run := open(t, "A_TOKEN=hush")
	if _, err := run.Write("patch.diff", "old"); err != nil {
		t.Fatal(err)
	}
	document, err := run.Document("patch.diff")
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(document, "new hu")
	if data, _ := os.ReadFile(filepath.Join(run.Dir(), "patch.diff")); string(data) != "old" {
		t.Errorf("an unfinished document can be read: %q", data)
	}
	fmt.Fprint(document, "sh\r\n")
	file, err := document.Finish()
	check(t, run, file, err, "new ***\r\n")
}

func TestOutputIsLiveAndEndsInMoonMindsForm(t *testing.T) {
	t.Parallel()
	type write struct {
		stream string
		text   string
	}
	for _, test := range []struct {
		name   string
		writes []write
		live   string
		final  string
	}{
		{"stdout only", []write{{"o", "\n a\n"}, {"o", "b \n\n"}}, "$ x\na\nb", "$ x\na\nb"},
		{"stderr only", []write{{"e", "a\r\n"}, {"e", "b\n"}}, "$ x\na\nb", "$ x\na\nb"},
		{"in order", []write{{"o", "a\n"}, {"e", "b\n"}}, "$ x\na\nb", "$ x\na\nb"},
		{"stderr first", []write{{"e", "b\n"}, {"o", "a\n"}}, "$ x\nb\na", "$ x\na\nb"},
		{"mixed", []write{{"e", "b1\n"}, {"o", "a1\n"}, {"e", "b2\n"}, {"o", "a2\n"}}, "$ x\nb1\na1\n\nb2\n\na2", "$ x\na1\na2\nb1\nb2"},
		{"mixed, stdout first", []write{{"o", "a1\n"}, {"e", "b1\n"}, {"o", "a2"}}, "$ x\na1\nb1\n\na2", "$ x\na1\na2\nb1"},
		{"nothing", []write{{"o", " \n"}, {"e", "\r\n"}}, "$ x", "$ x"},
		{"secret across writes and streams", []write{{"o", "tok Qu"}, {"e", "Qush"}, {"o", "sh"}}, "$ x\ntok \n***\n***", "$ x\ntok ***\n***"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			run := open(t, "A_TOKEN=Qush")
			log, err := run.Log("build.log")
			if err != nil {
				t.Fatal(err)
			}
			log.Line("$ x")
			output := log.Output()
			for _, w := range test.writes {
				to := output.Stdout
				if w.stream == "e" {
					to = output.Stderr
				}
				fmt.Fprint(to, w.text)
			}
			if data, _ := os.ReadFile(filepath.Join(run.Dir(), "build.log")); string(data) != test.live {
				t.Errorf("while it runs: %q, want %q", data, test.live)
			}
			excerpt := output.Close()
			if got, want := excerpt.Text("build.log"), strings.TrimPrefix(strings.TrimPrefix(test.final, "$ x"), "\n"); got != want {
				t.Errorf("excerpt %q, want %q", got, want)
			}
			log.Line("end")
			file, err := log.Finish()
			check(t, run, file, err, test.final+"\nend")
		})
	}
}

func TestLongOutputIsCutWithANote(t *testing.T) {
	t.Parallel()
	for _, streams := range []string{"o", "e", "oe"} {
		run := open(t)
		log, err := run.Log("build.log")
		if err != nil {
			t.Fatal(err)
		}
		output := log.Output()
		for i := range 20000 {
			to := output.Stdout
			if streams == "e" || streams == "oe" && i > 100 {
				to = output.Stderr
			}
			fmt.Fprintf(to, "line ä %d\n", i)
		}
		excerpt := output.Close()
		text := excerpt.Text("build.log")
		if len(text) > 5000 {
			t.Errorf("%d bytes", len(text))
		}
		if !strings.HasPrefix(text, "line ä 0\n") || !strings.HasSuffix(text, "line ä 19999") ||
			!strings.Contains(text, "bytes left out, the whole output is in build.log") {
			t.Errorf("excerpt of %s is %q", streams, text)
		}
		file, err := log.Finish()
		if err != nil || file.SizeBytes < 200000 {
			t.Errorf("%+v, %v", file, err)
		}
	}
}

func TestTypesAreThoseOfMoonMind(t *testing.T) {
	t.Parallel()
	for key, want := range map[[2]string]string{
		{"patch", "x/PATCH.DIFF"}: "patch_diff",
		{"build", "skill.log"}:    "build_log",
		{"verify", "verify.log"}:  "verify_log",
		{"rollback", "r.log"}:     "rollback_log",
		{"restart", "r.log"}:      "metrics",
		{"analyze", "a.log"}:      "metrics",
		{"patch", "patch.log"}:    "metrics",
	} {
		if got := artifacts.Type(key[0], key[1]); got != want {
			t.Errorf("%v: %s, want %s", key, got, want)
		}
	}
}

func TestALogCanBeReplacedWhileItIsRead(t *testing.T) {
	t.Parallel()
	run := open(t)
	if _, err := run.Write("a.log", "first"); err != nil {
		t.Fatal(err)
	}
	reader, err := os.Open(filepath.Join(run.Dir(), "a.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	log, err := run.Log("a.log")
	if err != nil {
		t.Fatal(err)
	}
	log.Line("second")
	file, err := log.Finish()
	check(t, run, file, err, "second")
	var old bytes.Buffer
	if _, err := old.ReadFrom(reader); err != nil || old.String() != "first" {
		t.Errorf("the open file became %q, %v", old.String(), err)
	}
}

// A second worker can continue the log of a first, whether the first still
// writes or not.
func TestALogIsContinued(t *testing.T) {
	t.Parallel()
	run := open(t)
	first, err := run.Log("build.log")
	if err != nil {
		t.Fatal(err)
	}
	defer first.Discard()
	first.Line("$ build")
	size := first.Size()
	first.Line("done")
	end := first.Size()
	first.Line("never mind")

	second, err := run.Continue("build.log", size, end)
	if err != nil {
		t.Fatal(err)
	}
	first.Line("not seen")
	if text := second.Excerpt(size).Text(""); text != "done" {
		t.Errorf("excerpt %q", text)
	}
	second.Line("taken over")
	file, err := second.Finish()
	check(t, run, file, err, "$ build\ndone\ntaken over")

	third, err := run.Continue("build.log", 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	file, err = third.Finish()
	check(t, run, file, err, "$ build\ndone\ntaken over")
}

func TestOnlyALogIsContinued(t *testing.T) {
	t.Parallel()
	run := open(t)
	if _, err := run.Write("short.log", "abc"); err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("abcdef"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(secret, filepath.Join(run.Dir(), "link.log")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(run.Dir(), "pipe.log"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"short.log", "link.log", "pipe.log", "none.log"} {
		if _, err := run.Continue(name, 4, 0); !errors.Is(err, artifacts.ErrNoLog) {
			var escapes *artifacts.PathError
			if name != "link.log" || !errors.As(err, &escapes) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// The end of a log is read, and nothing that is not one of the run.
func TestTheEndOfALog(t *testing.T) {
	t.Parallel()
	run := open(t)
	if _, err := run.Write("build.log", "abcdef"); err != nil {
		t.Fatal(err)
	}
	for limit, want := range map[int64]string{3: "def", 6: "abcdef", 100: "abcdef"} {
		if text, err := run.Tail("build.log", limit); err != nil || string(text) != want {
			t.Errorf("%d: %q, %v", limit, text, err)
		}
	}
	elsewhere := t.TempDir()
	if err := os.WriteFile(filepath.Join(elsewhere, "secret"), []byte("abc"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"link.log": elsewhere + "/secret", "folder": elsewhere} {
		if err := os.Symlink(target, filepath.Join(run.Dir(), name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(run.Dir(), "pipe.log"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"link.log", "folder/secret", "../x", "pipe.log", "none.log", "."} {
		if text, err := run.Tail(name, 100); err == nil {
			t.Errorf("%s: %q", name, text)
		}
	}
}
