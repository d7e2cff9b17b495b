//go:build stack

package stack

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// deployment is the compose project under test.
type deployment struct {
	t         *testing.T
	name      string
	workspace string
	// variables are set for compose, as NAME=value.
	variables []string
}

func (d *deployment) compose(args ...string) string {
	d.t.Helper()
	out, err := d.command(args...).CombinedOutput()
	if err != nil {
		d.t.Fatalf("docker compose %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func (d *deployment) command(args ...string) *exec.Cmd {
	cmd := exec.Command(devenv.Compose(d.t), append([]string{"--project-name", d.name}, args...)...)
	cmd.Dir = d.workspace
	cmd.Env = append(append(os.Environ(), "WORKSPACE_ROOT="+d.workspace), d.variables...)
	return cmd
}

// newDeployment returns a deployment of the workspace. The end of the test removes
// it, and these images, whose names begin with that of the project.
func newDeployment(t *testing.T, purpose, workspace string, images ...string) *deployment {
	t.Helper()
	d := &deployment{t: t, name: fmt.Sprintf("mm-stack-%s-%d", purpose, os.Getpid()), workspace: workspace}
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := d.command("logs", "--tail", "60", "orchestrator", "migrate").CombinedOutput()
			t.Logf("logs:\n%s", out)
		}
		if out, err := d.command("down", "--volumes", "--remove-orphans", "--timeout", "5").CombinedOutput(); err != nil {
			t.Errorf("down: %v: %s", err, out)
		}
		// Pins outlive their runs, and keep images. So do helpers of a run that hangs.
		pins, err := exec.Command("docker", "ps", "--all", "--quiet", "--filter", "label=mm-orchestrator.project="+d.name).Output()
		if ids := strings.Fields(string(pins)); err == nil && len(ids) > 0 {
			_, err = exec.Command("docker", append([]string{"rm", "--force"}, ids...)...).Output()
		}
		if err != nil {
			t.Errorf("remove the pins: %v", err)
		}
		// "down --rmi local" does not remove images of the classic builder.
		for _, image := range images {
			if out, err := exec.Command("docker", "image", "rm", d.name+image).CombinedOutput(); err != nil {
				t.Errorf("remove an image of the test: %v: %s", err, out)
			}
		}
	})
	return d
}

func (d *deployment) up() {
	d.t.Helper()
	d.compose("up", "--detach", "--wait", "--wait-timeout", "180")
}

// database is the deployment's database, as user:password@host:port/name.
func (d *deployment) database() string {
	d.t.Helper()
	return "postgres:password@" + d.compose("port", "postgres", "5432") + "/moonmind"
}

func (d *deployment) artifacts() string {
	return filepath.Join(d.workspace, "var", "artifacts", "spec_workflows")
}

// submit creates a run as MoonMind's API does, and returns its id.
func (d *deployment) submit(args ...string) string {
	d.t.Helper()
	producer := exec.CommandContext(d.t.Context(), devenv.Celery(d.t, "5.7.0"), append([]string{
		filepath.Join("..", "..", "testdata", "producers", "submit_run.py"), "--project", d.name, "--artifacts", d.artifacts(),
	}, args...)...)
	producer.Env = append(os.Environ(),
		"CELERY_BROKER_URL=amqp://moonmind:password@"+d.compose("port", "rabbitmq", "5672")+"//",
		"CELERY_RESULT_BACKEND=db+postgresql+psycopg2://"+d.database())
	var stderr bytes.Buffer
	producer.Stderr = &stderr
	out, err := producer.Output()
	if err != nil {
		d.t.Fatalf("producer: %v: %s", err, stderr.String())
	}
	var submitted struct {
		RunID string `json:"run_id"`
	}
	if err := json.Unmarshal(out, &submitted); err != nil {
		d.t.Fatalf("producer said %q: %v", out, err)
	}
	return submitted.RunID
}

// connect opens a connection to the deployment's database.
func (d *deployment) connect() *pgx.Conn {
	d.t.Helper()
	conn, err := pgx.Connect(d.t.Context(), "postgres://"+d.database())
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// await waits until a run has succeeded or was rolled back. A failed run is about to
// be.
func (d *deployment) await(conn *pgx.Conn, runID string, limit time.Duration) string {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), limit)
	defer cancel()
	status := ""
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		if err := conn.QueryRow(ctx, "SELECT status::text FROM orchestrator_runs WHERE id = $1", runID).Scan(&status); err != nil {
			d.t.Fatalf("run is %q: %v. %s", status, err, d.steps(runID))
		}
		if status == "succeeded" || status == "rolled_back" {
			return status
		}
		<-tick.C
	}
}

// steps describes the steps of a run, for messages.
func (d *deployment) steps(runID string) string {
	d.t.Helper()
	ctx := context.Background() // also after the test's time
	conn, err := pgx.Connect(ctx, "postgres://"+d.database())
	if err != nil {
		return err.Error()
	}
	defer conn.Close(ctx)
	var steps string
	if err := conn.QueryRow(ctx, `SELECT coalesce(string_agg(plan_step || ' ' || status || ' ' || coalesce(message, ''), '; '), '')
		FROM spec_workflow_task_states WHERE orchestrator_run_id = $1`, runID).Scan(&steps); err != nil {
		return err.Error()
	}
	return steps
}
