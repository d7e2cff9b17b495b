//go:build stack

package stack

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// otherUser is the owner of the workspace, who differs from the worker's user as
// a developer does on a real host.
const otherUser = 1000

// deployment is the compose project under test.
type deployment struct {
	t         *testing.T
	name      string
	workspace string
}

func (d deployment) compose(args ...string) string {
	d.t.Helper()
	out, err := d.command(args...).CombinedOutput()
	if err != nil {
		d.t.Fatalf("docker compose %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func (d deployment) command(args ...string) *exec.Cmd {
	cmd := exec.Command(devenv.Compose(d.t), append([]string{"--project-name", d.name}, args...)...)
	cmd.Dir = d.workspace
	cmd.Env = append(os.Environ(), "WORKSPACE_ROOT="+d.workspace)
	return cmd
}

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
	d := deployment{t: t, name: fmt.Sprintf("mm-stack-%d", os.Getpid()), workspace: workspace(t)}
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := d.command("logs", "--tail", "40", "worker", "migrate").CombinedOutput()
			t.Logf("logs:\n%s", out)
		}
		if out, err := d.command("down", "--volumes", "--timeout", "5").CombinedOutput(); err != nil {
			t.Errorf("down: %v: %s", err, out)
		}
		// "down --rmi local" does not remove images of the classic builder.
		if out, err := exec.Command("docker", "image", "rm", d.name+"-api").CombinedOutput(); err != nil {
			t.Errorf("remove the sample's image: %v: %s", err, out)
		}
	})
	d.compose("up", "--detach", "--wait", "--wait-timeout", "180")
	edit(t, d.workspace)
	others := d.compose("ps", "--quiet", "rabbitmq", "postgres", "worker")
	before := d.compose("ps", "--quiet", "api")

	database := "postgres:password@" + d.compose("port", "postgres", "5432") + "/moonmind"
	artifacts := filepath.Join(d.workspace, "var", "artifacts", "spec_workflows")
	producer := exec.CommandContext(t.Context(), devenv.Celery(t, "5.7.0"),
		filepath.Join("..", "..", "testdata", "producers", "submit_run.py"),
		"--service", "api", "--project", d.name, "--artifacts", artifacts,
		"--set", `patch.allowlist=["deploy/api/**"]`)
	producer.Env = append(os.Environ(),
		"CELERY_BROKER_URL=amqp://moonmind:password@"+d.compose("port", "rabbitmq", "5672")+"//",
		"CELERY_RESULT_BACKEND=db+postgresql+psycopg2://"+database)
	var stderr bytes.Buffer
	producer.Stderr = &stderr
	out, err := producer.Output()
	if err != nil {
		t.Fatalf("producer: %v: %s", err, stderr.String())
	}
	var submitted struct {
		RunID string `json:"run_id"`
	}
	if err := json.Unmarshal(out, &submitted); err != nil {
		t.Fatalf("producer said %q: %v", out, err)
	}

	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, "postgres://"+database)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	status := ""
	for tick := time.NewTicker(200 * time.Millisecond); status != "succeeded"; <-tick.C {
		if err := conn.QueryRow(ctx, "SELECT status::text FROM orchestrator_runs WHERE id = $1", submitted.RunID).Scan(&status); err != nil {
			t.Fatalf("run is %q: %v", status, err)
		}
		if status == "failed" || status == "rolled_back" {
			var steps string
			conn.QueryRow(ctx, "SELECT string_agg(plan_step || ' ' || status || ' ' || coalesce(message, ''), '; ') FROM spec_workflow_task_states").Scan(&steps)
			t.Fatalf("run %s: %s", status, steps)
		}
	}

	if after := d.compose("ps", "--quiet", "api"); after == before {
		t.Error("the service was not recreated")
	}
	if now := d.compose("ps", "--quiet", "rabbitmq", "postgres", "worker"); now != others {
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
	if err := conn.QueryRow(ctx, "SELECT count(*) FROM celery_taskmeta WHERE status = 'SUCCESS'").Scan(&results); err != nil || results != 5 {
		t.Errorf("%d successful results, %v; want one for each of 5 steps", results, err)
	}
}
