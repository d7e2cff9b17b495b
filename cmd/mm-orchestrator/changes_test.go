package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

const (
	oldRun   = "0a0a0a0a-1111-4111-8111-000000000001"
	youngRun = "0b0b0b0b-1111-4111-8111-000000000002"
	asideRun = "0a0c0c0c-1111-4111-8111-000000000003"
	otherRun = "0d0d0d0d-1111-4111-8111-000000000004"
)

// gitOutput runs git in the workspace and returns its output.
func (s testEnv) gitOutput(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir, cmd.Env = s.workspace, append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1",
		"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.test", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.test")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// keptChanges makes a repository with the refs of four runs, and their records. The
// runs themselves were deleted.
func (s testEnv) keptChanges(t *testing.T) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(s.workspace, "a"), []byte("a\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	s.gitOutput(t, "init", "-q", "-b", "main")
	s.gitOutput(t, "add", ".")
	s.gitOutput(t, "commit", "-q", "-m", "x")
	for _, name := range []string{oldRun + "/baseline", oldRun + "/baseline-state", youngRun + "/baseline", asideRun + "/baseline", asideRun + "/aside", otherRun + "/baseline"} {
		s.gitOutput(t, "update-ref", "refs/mm-orchestrator/runs/"+name, "HEAD^{tree}")
	}
	for run, since := range map[string]string{oldRun: "8 days", youngRun: "1 hour", asideRun: "9 days", otherRun: "10 days"} {
		queue := "orchestrator.run"
		if run == otherRun {
			queue = "box2.run"
		}
		s.exec(t, fmt.Sprintf(`INSERT INTO mm_orchestrator.changes (run_id, queue, workspace, record, created_at, updated_at)
			VALUES ('%s', '%s', '%s', '{"version":1,"files":{},"undone":true}', now() - interval '%s', now() - interval '%s')`,
			run, queue, queue+":"+s.workspace, since, since))
	}
}

func (s testEnv) refs(t *testing.T) []string {
	t.Helper()
	return strings.Fields(s.gitOutput(t, "for-each-ref", "--format=%(refname:lstrip=3)", "refs/mm-orchestrator"))
}

func TestChanges(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	if p := start(t, s.env(), "changes"); p.exit() != exitOK || p.stdout.String() != "no changes are kept\n" {
		t.Errorf("exit %d: %s%s", p.code, p.stdout.String(), p.stderr.String())
	}
	s.keptChanges(t)
	p := start(t, s.env(), "changes")
	if p.exit() != exitOK {
		t.Fatalf("exit %d: %s", p.code, p.stderr.String())
	}
	lines := strings.Split(strings.TrimSpace(p.stdout.String()), "\n")
	if len(lines) != 5 || !strings.HasPrefix(lines[0], "RUN ") || !strings.HasPrefix(lines[1], otherRun) || !strings.HasPrefix(lines[4], youngRun) ||
		!strings.HasSuffix(lines[4], "  files, rolled back") {
		t.Errorf("%s", p.stdout.String())
	}
	p = start(t, s.env(), "changes", "--json", "0b0b")
	var line map[string]any
	if p.exit() != exitOK || json.Unmarshal([]byte(p.stdout.String()), &line) != nil {
		t.Fatalf("exit %d: %s%s", p.code, p.stdout.String(), p.stderr.String())
	}
	if line["run_id"] != youngRun || line["over"] != true || line["undone"] != true || line["kept_until"] == nil || line["workspace"] != s.workspace ||
		fmt.Sprint(line["keeps"]) != "[files]" || line["record"] == nil {
		t.Errorf("%v", line)
	}
	p = start(t, s.env(), "changes", "0b0b")
	if p.exit() != exitOK || !strings.Contains(p.stdout.String(), "workspace   "+s.workspace+"\n") {
		t.Errorf("exit %d: %s%s", p.code, p.stdout.String(), p.stderr.String())
	}
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"changes", "0a0"}, exitUsage, "too short"},
		{[]string{"changes", "ffff"}, exitFailure, "no change of a run ffff is kept"},
		{[]string{"changes", "remove"}, exitUsage, "needs the id of a run, or --over-for"},
		{[]string{"changes", "remove", "0b0b", "--over-for=1h"}, exitUsage, "not both"},
		{[]string{"changes", "remove", "--over-for=x"}, exitUsage, "it must be a duration such as 90s"},
		{[]string{"changes", "remove", "--force", "--over-for=1h"}, exitUsage, "only to one run"},
		{[]string{"changes", "remove", "0d0d"}, exitFailure, `belongs to queue "box2.run"`},
	} {
		p := start(t, s.env(), c.args...)
		if code := p.exit(); code != c.code || !strings.Contains(p.stderr.String(), c.want) {
			t.Errorf("%v: exit %d: %s%s", c.args, code, p.stdout.String(), p.stderr.String())
		}
	}
}

func TestRemoveChanges(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	s.keptChanges(t)
	all := s.refs(t)
	remove := func(want string, args ...string) string {
		t.Helper()
		p := start(t, append(s.env(), "DOCKER_HOST=tcp://127.0.0.1:1"), append([]string{"changes", "remove"}, args...)...)
		if code := p.exit(); code != exitOK || !strings.Contains(p.stdout.String(), want) {
			t.Errorf("%v: exit %d: %s%s; want %q", args, code, p.stdout.String(), p.stderr.String(), want)
		}
		return p.stdout.String()
	}
	remove("run "+oldRun+": would be removed: 2 refs, 0 pins, 0 saved images\n", "--over-for=24h", "--dry-run")
	if got := s.refs(t); !reflect.DeepEqual(got, all) {
		t.Errorf("a dry run leaves %v", got)
	}
	out := remove("run "+oldRun+": removed: 2 refs, 0 pins, 0 saved images\n", "--over-for=24h")
	if !strings.Contains(out, "run "+asideRun+": removed: 1 ref, 0 pins, 0 saved images\n  kept: refs/mm-orchestrator/runs/"+asideRun+"/aside, work that was set aside; add --set-aside to remove it\n") {
		t.Error(out)
	}
	if got, want := s.refs(t), []string{asideRun + "/aside", youngRun + "/baseline", otherRun + "/baseline"}; !reflect.DeepEqual(got, want) {
		t.Errorf("left %v, want %v", got, want)
	}
	remove("run "+youngRun+": removed: 1 ref", "0b0b")
	p := start(t, s.env(), "changes")
	if p.exit() != exitOK || !strings.Contains(strings.Join(strings.Fields(p.stdout.String()), " "), "removed by hand work that was set aside") {
		t.Errorf("exit %d: %s%s", p.code, p.stdout.String(), p.stderr.String())
	}
	remove("nothing to remove", "--over-for=24h", "--queue=empty")
	remove("run "+asideRun+": removed: 1 ref", asideRun, "--set-aside")
	remove("run "+otherRun+": removed: 1 ref", "0d0d", "--queue=box2.run")
	if got := s.refs(t); len(got) != 0 {
		t.Errorf("left %v", got)
	}
	if n := s.queryInt(t, `SELECT count(*) FROM mm_orchestrator.changes`); n != 0 {
		t.Errorf("%d records are left", n)
	}
}
