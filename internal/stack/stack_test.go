//go:build stack

package stack

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// otherUser is the owner of the workspace, who differs from the worker's user as
// a developer does on a real host.
const otherUser = 1000

func run(t *testing.T, dir, program string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v: %s", program, args, err, out)
	}
}

// workspace creates a git work tree with the files of the deployment.
func workspace(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	root := filepath.Join("..", "..")
	if err := os.CopyFS(filepath.Join(dir, "deploy"), os.DirFS(filepath.Join(root, "deploy"))); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"docker-compose.yaml", ".gitignore"} {
		content, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	run(t, dir, "git", "init", "--quiet")
	run(t, dir, "git", "add", ".")
	run(t, dir, "git", "-c", "user.name=test", "-c", "user.email=test@example.invalid", "commit", "--quiet", "--message", "start")
	if os.Getuid() == 0 {
		err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			return os.Lchown(path, otherUser, otherUser)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// edit changes the sample service without a commit.
func edit(t *testing.T, workspace string) {
	t.Helper()
	app := filepath.Join(workspace, "deploy", "api", "app.py")
	content, err := os.ReadFile(app)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(app, bytes.ReplaceAll(content, []byte(`b"ok\n"`), []byte(`b"repaired\n"`)), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestDeploymentCompletesARun checks that our deployment has none of the faults of
// MoonMind's (docs/moonmind.md#f3 and the following, up to
// docs/moonmind.md#f10). The worker must start from its own image, accept a
// repository that another user owns at the host's path, build and restart through
// the engine, use a health URL that exists, and write the artifacts to where the
// rows say they are.
func TestDeploymentCompletesARun(t *testing.T) {
	d := newDeployment(t, "run", workspace(t), "-api")
	d.up()
	edit(t, d.workspace)
	others := d.compose("ps", "--quiet", "rabbitmq", "postgres", "orchestrator")
	before := d.compose("ps", "--quiet", "api")

	artifacts := d.artifacts()
	run := d.submit("--service", "api", "--set", `patch.allowlist=["deploy/api/**"]`)
	conn := d.connect()
	if status := d.await(conn, run, 2*time.Minute); status != "succeeded" {
		t.Fatalf("run %s: %s", status, d.steps(run))
	}

	if after := d.compose("ps", "--quiet", "api"); after == before {
		t.Error("the service was not recreated")
	}
	if now := d.compose("ps", "--quiet", "rabbitmq", "postgres", "orchestrator"); now != others {
		t.Error("the restart of one service changed others")
	}
	answer := d.compose("exec", "-T", "api", "python3", "-c",
		"import urllib.request as u; print(u.urlopen('http://127.0.0.1:5000/healthz').read().decode())")
	if answer != "repaired" {
		t.Errorf("the service answers %q, so the edit was not deployed", answer)
	}
	for _, name := range []string{"analyze.log", "patch.diff", "build.log", "restart.log", "verify.log"} {
		found, _ := filepath.Glob(filepath.Join(artifacts, "*", name))
		if len(found) == 0 {
			t.Errorf("%s is missing on the host in %s", name, artifacts)
		}
	}
	results := 0
	if err := conn.QueryRow(t.Context(), "SELECT count(*) FROM celery_taskmeta WHERE status = 'SUCCESS'").Scan(&results); err != nil || results != 5 {
		t.Errorf("%d successful results, %v; want one for each of 5 steps", results, err)
	}
}
