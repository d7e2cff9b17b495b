package changetest

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The variables of `make test-change`.
const (
	envAll   = "MM_TEST_CHANGE"       // "all": every case, not only a choice
	envSeed  = "MM_TEST_CHANGE_SEED"  // seed of the cases
	envCase  = "MM_TEST_CHANGE_CASE"  // numbers of the only cases to run, separated by commas
	envLanes = "MM_TEST_CHANGE_LANES" // cases at the same time
	// envFolder keeps all files, the evidence of differences among them.
	envFolder = "MM_TEST_CHANGE_FOLDER"
)

// chosen is how many cases an ordinary test run has.
const chosen = 22

// Whatever fails and in whatever state the work tree was, after the rollback all
// must be as before the run, and nothing of the operator's may be lost.
func TestEveryChangeIsTakenBack(t *testing.T) {
	t.Parallel()
	c := Campaign{Name: fmt.Sprintf("mmct%d", os.Getpid()), Folder: os.Getenv(envFolder), Seed: 1, Lanes: 4, For: 90 * time.Second, Output: progress{t}}
	if c.Folder == "" {
		c.Folder = t.TempDir()
	}
	compose := devenv.Compose(t)
	number := func(name string, value int) int {
		if text := os.Getenv(name); text != "" {
			var err error
			if value, err = strconv.Atoi(text); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		return value
	}
	all := os.Getenv(envAll) == "all"
	cases := chosen
	if all {
		cases, c.For = Cases, 0
	}
	for n := range cases {
		c.Numbers = append(c.Numbers, n)
	}
	c.Seed, c.Lanes = uint64(number(envSeed, 1)), number(envLanes, 4)
	if text := os.Getenv(envCase); text != "" {
		c.Numbers, c.For = nil, 0
		for text := range strings.SplitSeq(text, ",") {
			n, err := strconv.Atoi(text)
			if err != nil {
				t.Fatal(err)
			}
			c.Numbers = append(c.Numbers, n)
		}
	}
	var err error
	if c.Programs, err = Build(t.Context(), "../..", t.TempDir(), compose); err != nil {
		t.Fatal(err)
	}
	report, err := c.Run(t.Context())
	report.Print(c.Output)
	if err != nil {
		t.Fatal(err)
	}
	for _, result := range report.Results {
		if len(result.Differences) > 0 {
			t.Errorf("%s\n    again: make test-change CASE=%d SEED=%d", result.Case, result.Case.Number, result.Case.Seed)
		}
	}
	if median := report.MedianRollback(); median > 10*time.Second {
		t.Errorf("the median of the rollbacks is %s, want at most 10s", median)
	}
	if all && len(report.Results) < 500 && os.Getenv(envCase) == "" {
		t.Errorf("%d cases, want 500 at least", len(report.Results))
	}
}

// progress writes whole lines to the test's log.
type progress struct{ t *testing.T }

func (p progress) Write(text []byte) (int, error) {
	p.t.Log(strings.TrimRight(string(text), "\n"))
	return len(text), nil
}

var _ io.Writer = progress{}

// The table must have every fault in every workspace with every disturbance, and the
// choice of an ordinary test run every one of them at least once.
func TestTheTableIsComplete(t *testing.T) {
	t.Parallel()
	type combination struct {
		step        string
		fault       Fault
		workspace   WorkspaceKind
		disturbance Disturbance
	}
	seen := map[combination]bool{}
	some := map[string]bool{}
	for n := range Cases {
		c := NewCase(1, n)
		seen[combination{c.Step, c.Fault, c.Workspace, c.Disturbance}] = true
		if n < chosen {
			some[c.Step+string(c.Fault)], some[string(c.Workspace)], some[string(c.Disturbance)] = true, true, true
		}
	}
	if len(seen) != Cases || Cases < 500 {
		t.Errorf("%d cases have %d combinations, want as many, and 500 at least", Cases, len(seen))
	}
	if want := len(faults) + len(WorkspaceKinds) + len(Disturbances); len(some) != want {
		t.Errorf("the first %d cases have %d of the %d faults, workspaces and disturbances", chosen, len(some), want)
	}
}

// A case that is repeated by itself must be the same case.
func TestCasesComeFromSeedAndNumber(t *testing.T) {
	t.Parallel()
	for n := range 50 {
		one, other := NewCase(7, n), NewCase(7, n)
		if one != other || one.random().Uint64() != other.random().Uint64() {
			t.Errorf("%s is %s the second time", one, other)
		}
	}
}

// A state that misses a change proves nothing: each of these must be a difference,
// and the files that it names must be among those changed.
func TestStateShowsEveryChange(t *testing.T) {
	t.Parallel()
	git := func(t *testing.T, folder string, args ...string) {
		t.Helper()
		if _, err := Git(t.Context(), folder, args...); err != nil {
			t.Fatal(err)
		}
	}
	must := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		change func(t *testing.T, folder string)
		want   string
	}{
		"content":   {func(t *testing.T, f string) { must(t, writeFile(filepath.Join(f, "a"), "other", 0o644)) }, "file a"},
		"mode":      {func(t *testing.T, f string) { must(t, os.Chmod(filepath.Join(f, "a"), 0o600)) }, "file a"},
		"folder":    {func(t *testing.T, f string) { must(t, os.Mkdir(filepath.Join(f, "empty"), 0o755)) }, "file empty"},
		"ignored":   {func(t *testing.T, f string) { must(t, writeFile(filepath.Join(f, "x.ignored"), "x", 0o644)) }, "file x.ignored"},
		"link":      {func(t *testing.T, f string) { must(t, os.Symlink("a", filepath.Join(f, "link"))) }, "file link"},
		"hard link": {func(t *testing.T, f string) { must(t, os.Link(filepath.Join(f, "a"), filepath.Join(f, "c"))) }, "file a"},
		"staged": {func(t *testing.T, f string) {
			must(t, writeFile(filepath.Join(f, "a"), "other", 0o644))
			git(t, f, "add", "a")
		}, "git . index a stage 0"},
		"flag":   {func(t *testing.T, f string) { git(t, f, "update-index", "--skip-worktree", "a") }, "git . index a stage 0"},
		"branch": {func(t *testing.T, f string) { git(t, f, "branch", "other") }, "git . ref refs/heads/other"},
		"head":   {func(t *testing.T, f string) { git(t, f, "checkout", "--quiet", "--detach") }, "file .git/HEAD"},
		"config": {func(t *testing.T, f string) { git(t, f, "config", "a.b", "c") }, "file .git/config"},
		"hook":   {func(t *testing.T, f string) { must(t, writeFile(filepath.Join(f, ".git/hooks/x"), "x", 0o755)) }, "file .git/hooks/x"},
		"lock":   {func(t *testing.T, f string) { must(t, writeFile(filepath.Join(f, ".git/index.lock"), "", 0o644)) }, "file .git/index.lock"},
		"stash": {func(t *testing.T, f string) {
			must(t, writeFile(filepath.Join(f, "a"), "other", 0o644))
			git(t, f, "stash", "--quiet")
		}, "git . ref refs/stash"},
		"intent to add": {func(t *testing.T, f string) {
			must(t, writeFile(filepath.Join(f, "n"), "n", 0o644))
			git(t, f, "add", "--intent-to-add", "n")
		}, "git . index n stage 0"},
		"missing object": {func(t *testing.T, f string) {
			must(t, os.RemoveAll(filepath.Join(f, ".git/objects")))
			must(t, os.Mkdir(filepath.Join(f, ".git/objects"), 0o755))
		}, "git . fsck"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			folder := t.TempDir()
			for file, text := range map[string]string{"a": "a", "b": "b", ".gitignore": "*.ignored\n"} {
				must(t, writeFile(filepath.Join(folder, file), text, 0o644))
			}
			git(t, folder, "init", "--quiet", "--initial-branch=main")
			git(t, folder, "add", "--all")
			git(t, folder, "commit", "--quiet", "--message", "start")
			before, err := Take(t.Context(), Subject{Workspace: folder})
			must(t, err)
			again, err := Take(t.Context(), Subject{Workspace: folder})
			must(t, err)
			if lines := Differences(before, again, nil); len(lines) > 0 {
				t.Fatalf("taking the state changes it: %q", lines)
			}
			c.change(t, folder)
			after, err := Take(t.Context(), Subject{Workspace: folder})
			if name != "missing object" {
				must(t, err)
			} else if err != nil {
				return // git refuses to work there
			}
			lines := Differences(before, after, nil)
			if !slices.ContainsFunc(lines, func(line string) bool { return strings.HasPrefix(line, c.want+":") }) {
				t.Errorf("differences %q, want one of %s", lines, c.want)
			}
		})
	}
}
