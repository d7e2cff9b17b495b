package changetest

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/changetest/command"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/moonmind"
)

// succeeding is a lane whose runs succeed.
type succeeding struct {
	*Lane
	t     *testing.T
	watch *Watch
	run   string
}

func newSucceeding(t *testing.T, name string) *succeeding {
	t.Helper()
	programs, err := Build(t.Context(), "../..", t.TempDir(), devenv.Compose(t))
	if err != nil {
		t.Fatal(err)
	}
	l, err := NewLane(t.Context(), programs, t.TempDir(), fmt.Sprintf("mmrb%s%d", name, os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(t.Context()); err != nil {
			t.Error(err)
		}
	})
	return &succeeding{Lane: l, t: t}
}

// succeed makes the work tree and the containers anew, and carries a run to its end.
func (s *succeeding) succeed(kind WorkspaceKind) {
	t, ctx := s.t, s.t.Context()
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(s.worker.stop())
	must(s.project.Up(ctx))
	must(s.project.provideBase(ctx))
	must(s.engine.RemovePins(ctx, s.project.Name))
	change := s.project.Change("", "of a run that succeeds")
	plan := scenario{parameters: s.project.Plan([][]string{{"git", "status", "--short"}}), change: change}
	if kind != Deployed {
		plan.script.Turns = [][]command.Act{change}
	}
	var err error
	s.watch, err = s.project.Watch(ctx, kind, rand.New(rand.NewPCG(1, 1)), change)
	must(err)
	must(s.worker.start())
	s.run = moonmind.NewID()
	must(s.submit(ctx, s.run, s.artifacts(), plan))
	var r Result
	must(s.await(ctx, s.run, plan, &r))
	must(s.readRun(ctx, s.run, &r))
	if r.Status != "succeeded" {
		text, _ := os.ReadFile(s.worker.logPath)
		t.Fatalf("the run is %s: %s\n%s", r.Status, r.Summary, text)
	}
}

func (s *succeeding) artifacts() string { return filepath.Join(s.folder, "artifacts", s.run) }

// command runs another command of the program and returns its output and whether it
// has succeeded.
func (s *succeeding) command(args ...string) (string, bool) {
	s.t.Helper()
	c := exec.CommandContext(s.t.Context(), s.programs.Worker, args...)
	c.Env, c.Dir = s.worker.environ, s.folder
	text, err := c.CombinedOutput()
	return string(text), err == nil
}

// takenBack checks that all is as before the run.
func (s *succeeding) takenBack() {
	s.t.Helper()
	var r Result
	if err := s.readRun(s.t.Context(), s.run, &r); err != nil {
		s.t.Fatal(err)
	}
	if r.Status != "rolled_back" {
		s.t.Errorf("the run is %s: %s", r.Status, r.Summary)
	}
	differences, err := s.watch.TakenBack(s.t.Context(), EndOf(r.Summary, s.artifacts()))
	if err != nil {
		s.t.Fatal(err)
	}
	for _, line := range differences {
		s.t.Errorf("not as before: %s", line)
	}
}

// audited checks the run's audit trail as an auditor does, and that it has these kinds
// of records.
func (s *succeeding) audited(kinds ...string) {
	s.t.Helper()
	text, ok := s.command("audit", "show", s.run)
	for _, kind := range kinds {
		if !ok || !strings.Contains(text, "  "+kind+" ") {
			s.t.Errorf("audit show has no %s:\n%s", kind, text)
		}
	}
	archive := filepath.Join(s.t.TempDir(), "run.zip")
	for _, args := range [][]string{{"audit", "verify", s.run}, {"runs", "export", s.run, "-o", archive}} {
		if text, ok := s.command(args...); !ok {
			s.t.Errorf("%q: %s", args, text)
		}
	}
}

// A run that has succeeded is taken back by `runs rollback`, in every kind of work
// tree, as a failed one is.
func TestSucceededRunIsTakenBackByHand(t *testing.T) {
	t.Parallel()
	s := newSucceeding(t, "all")
	for _, kind := range []WorkspaceKind{Clean, Deployed, Beside, Submodule} {
		s.succeed(kind)
		if text, ok := s.command("runs", "rollback", s.run, "--dry-run"); !ok || !strings.Contains(text, "nothing stands in the way") {
			t.Fatalf("%s: dry run: %s", kind, text)
		}
		text, ok := s.command("runs", "rollback", s.run, "--reason", "slower than before", "--by", "ann@office")
		if !ok {
			t.Fatalf("%s: %s", kind, text)
		}
		for _, words := range []string{"had succeeded at 2", "its rollback is requested", "run " + s.run + " is rolled back\n", "  tree: as before the run (", "  image: as before the run (sha256:", "  configuration: as before the run ("} {
			if !strings.Contains(text, words) {
				t.Errorf("%s: it prints %q, without %q", kind, text, words)
			}
		}
		log, err := os.ReadFile(filepath.Join(s.artifacts(), "rollback.log"))
		if err != nil || !strings.HasPrefix(string(log), "[Rollback requested by ann@office at 2") {
			t.Errorf("%s: log %q, %v", kind, log, err)
		}
		s.takenBack()
		if text, ok := s.command("runs", "rollback", s.run); ok || !strings.Contains(text, "it is rolled back already") {
			t.Errorf("%s: again: %s", kind, text)
		}
		s.audited("run-started", "command-started", "command-ended", "file-changed", "image-pinned", "image-built", "container-replaced", "health",
			"rollback-requested", "files-changing", "file-restored", "container-changing", "container-restored", "run-ended")
		if kind == Deployed {
			s.audited("set-aside")
		}
	}
}

// What was deployed or removed since stands in the way of a rollback, and nothing is
// changed then; what somebody has edited since is set aside.
func TestWhatStandsInTheWayOfARollbackByHand(t *testing.T) {
	t.Parallel()
	s := newSucceeding(t, "way")
	refused := func(words ...string) {
		t.Helper()
		text, ok := s.command("runs", "rollback", s.run)
		for _, word := range append(words, "is not rolled back, and nothing was changed") {
			if ok || !strings.Contains(text, word) {
				t.Errorf("it prints %q, want %q", text, word)
			}
		}
	}
	s.succeed(Clean)
	// The container that is there was made two minutes after the end of the run.
	if _, err := s.pool.Exec(t.Context(), `UPDATE orchestrator_runs SET started_at = started_at - interval '2 minutes', completed_at = completed_at - interval '2 minutes' WHERE id = $1`, s.run); err != nil {
		t.Fatal(err)
	}
	refused("container "+s.watch.target()+" of service api was created at 2", "something else has deployed it")
	if _, err := s.pool.Exec(t.Context(), `UPDATE orchestrator_runs SET started_at = started_at + interval '2 minutes', completed_at = completed_at + interval '2 minutes' WHERE id = $1`, s.run); err != nil {
		t.Fatal(err)
	}
	image := s.project.Name + "-api:latest"
	docker := func(args ...string) string {
		t.Helper()
		text, err := exec.CommandContext(t.Context(), s.docker, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("docker %s: %v: %s", args, err, text)
		}
		return strings.TrimSpace(string(text))
	}
	own := docker("image", "inspect", "--format", "{{.Id}}", image)
	docker("tag", s.project.base(), image)
	refused("image name " + s.project.Name + "-api was given to another image since")
	docker("tag", own, image)
	ref := "refs/mm-orchestrator/runs/" + s.run + "/baseline"
	id, err := Git(t.Context(), s.project.Workspace, "rev-parse", ref)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Git(t.Context(), s.project.Workspace, "update-ref", "-d", ref); err != nil {
		t.Fatal(err)
	}
	refused(ref + " in the repository")
	if _, err := Git(t.Context(), s.project.Workspace, "update-ref", ref, strings.TrimSpace(id)); err != nil {
		t.Fatal(err)
	}
	if status := func() (text string) {
		if err := s.pool.QueryRow(t.Context(), `SELECT status::text FROM orchestrator_runs WHERE id = $1`, s.run).Scan(&text); err != nil {
			t.Fatal(err)
		}
		return text
	}(); status != "succeeded" {
		t.Errorf("the run is %s", status)
	}
	// Without a worker, the request is kept, and the next worker carries it out.
	if err := add(requirements, "# somebody's edit\n").In(s.project.Workspace); err != nil {
		t.Fatal(err)
	}
	if err := s.worker.stop(); err != nil {
		t.Fatal(err)
	}
	if text, ok := s.command("runs", "rollback", s.run, "--no-wait"); !ok || !strings.Contains(text, "see `mm-orchestrator runs "+s.run+"` for its end") {
		t.Errorf("without waiting: %s", text)
	}
	if err := s.worker.start(); err != nil {
		t.Fatal(err)
	}
	text, ok := s.command("runs", "rollback", s.run)
	for _, words := range []string{"its rollback was requested already, by ", "is rolled back\n", "[Edited by somebody since the run altered them, and set aside: " + requirements + "]"} {
		if !ok || !strings.Contains(text, words) {
			t.Errorf("it prints %q, without %q", text, words)
		}
	}
	s.takenBack()
	if kept, err := Git(t.Context(), s.project.Workspace, "show", "refs/mm-orchestrator/runs/"+s.run+"/aside:"+requirements); err != nil || !strings.HasSuffix(strings.TrimSpace(kept), "# somebody's edit") {
		t.Errorf("set aside: %q, %v", kept, err)
	}
}

// Edits that a run has deployed, and that its rollback has set aside, come back by
// `runs set-aside restore`, with what was staged of them. What somebody has edited
// since is not overwritten, unless it is set aside first.
func TestWhatWasSetAsideComesBackByHand(t *testing.T) {
	t.Parallel()
	s := newSucceeding(t, "aside")
	s.succeed(Deployed)
	if text, ok := s.command("runs", "set-aside"); !ok || text != "nothing is set aside\n" {
		t.Errorf("before the rollback: %q", text)
	}
	if text, ok := s.command("runs", "rollback", s.run); !ok {
		t.Fatal(text)
	}
	if text, ok := s.command("runs", "set-aside", s.run[:8]); !ok || !strings.HasPrefix(text, "run "+s.run+", in "+s.project.Workspace+"\n") ||
		!strings.Contains(text, "  aside  replaced  "+requirements+"\n") {
		t.Errorf("it lists %q", text)
	}
	edit := add(requirements, "# since\n")
	if err := edit.In(s.project.Workspace); err != nil {
		t.Fatal(err)
	}
	before, err := Take(t.Context(), s.watch.subject)
	if err != nil {
		t.Fatal(err)
	}
	if text, ok := s.command("runs", "set-aside", "restore", s.run); ok || !strings.Contains(text, "nothing was changed, because these files were edited since they were set aside: "+requirements+". Keep them, or add --overwrite") {
		t.Errorf("it prints %q", text)
	}
	after, err := Take(t.Context(), s.watch.subject)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range Differences(before, after, nil) {
		t.Errorf("the refused command has changed: %s", line)
	}
	if text, ok := s.command("runs", "set-aside", "restore", s.run, "--overwrite"); !ok || !strings.Contains(text, "edited since, and set aside as aside-2: "+requirements+"\nbrought back: "+requirements+"\n") {
		t.Errorf("it prints %q", text)
	}
	again, err := Take(t.Context(), s.watch.subject)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range Differences(s.watch.before, again, func(name string) bool {
		return !strings.HasPrefix(name, "file ") && !strings.HasPrefix(name, "git ") || strings.HasPrefix(name, "file .git")
	}) {
		t.Errorf("after the edits are back: %s", line)
	}
	var records int
	if err := s.pool.QueryRow(t.Context(), `SELECT count(*) FROM mm_orchestrator.audit WHERE record::json ->> 'kind' = 'brought-back' AND record::json ->> 'text' = 'aside: ' || $1`, requirements).Scan(&records); err != nil || records != 1 {
		t.Errorf("%d audit records of what was brought back, %v", records, err)
	}
	if text, ok := s.command("runs", "set-aside", "restore", s.run); !ok || text != "there already: "+requirements+"\n" {
		t.Errorf("again: %q", text)
	}
	if text, ok := s.command("runs", "set-aside", "restore", s.run, "aside-2", "--file", requirements); !ok || text != "brought back: "+requirements+"\n" {
		t.Errorf("the edit since: %q", text)
	}
	if text, err := os.ReadFile(filepath.Join(s.project.Workspace, requirements)); err != nil || !strings.HasSuffix(string(text), "# since\n") {
		t.Errorf("%q, %v", text, err)
	}
	for _, c := range [][]string{{"no-such"}, {"aside", "--file", "no/such"}} {
		if text, ok := s.command(append([]string{"runs", "set-aside", "restore", s.run}, c...)...); ok || !strings.Contains(text, "was set aside in run "+s.run+" under the name") && !strings.Contains(text, "was not set aside in run") {
			t.Errorf("%s: %q", c, text)
		}
	}
}
