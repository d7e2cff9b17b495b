//go:build stack

package stack

import (
	"flag"
	"fmt"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

var kills = flag.Int("kills", 4, "how many helpers are killed, each at a random moment of a run for the worker's own service")

// override makes the workspace's own Dockerfile that of the worker's image.
const override = `services:
  orchestrator:
    build: {context: services/orchestrator}
`

const dockerfile = "FROM mm-orchestrator:local\nLABEL version="

// selfDeployment is a deployment whose runs build and replace the worker's own
// service.
type selfDeployment struct {
	*deployment
	conn *pgx.Conn
	// version counts the versions of the worker's image.
	version int
}

func newSelfDeployment(t *testing.T, purpose string) *selfDeployment {
	t.Helper()
	dir := workspace(t)
	write(t, filepath.Join(dir, "docker-compose.override.yaml"), override)
	write(t, filepath.Join(dir, "services", "orchestrator", "Dockerfile"), dockerfile+"1\n")
	d := &selfDeployment{deployment: newDeployment(t, purpose, dir, "-api", "-orchestrator"), version: 1}
	d.variables = []string{"ORCHESTRATOR_IMAGE=" + d.name + "-orchestrator", "MM_ORCHESTRATOR_HELPER_WINDOW=25s"}
	d.commit()
	d.compose("build", "orchestrator")
	d.up()
	d.conn = d.connect()
	return d
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (d *selfDeployment) commit() {
	d.t.Helper()
	git := []string{"-c", "safe.directory=*", "-c", "user.name=test", "-c", "user.email=test@example.invalid"}
	run(d.t, d.workspace, "git", append(git, "add", ".")...)
	run(d.t, d.workspace, "git", append(git, "commit", "--quiet", "--allow-empty", "--message", "version")...)
}

// edit writes the next version of the worker's image, with these further lines in
// its Dockerfile.
func (d *selfDeployment) edit(lines ...string) {
	d.t.Helper()
	d.version++
	write(d.t, filepath.Join(d.workspace, "services", "orchestrator", "Dockerfile"), fmt.Sprint(dockerfile, d.version, "\n", strings.Join(lines, "\n"), "\n"))
}

// A workerContainer is the worker's container as docker shows it.
type workerContainer struct{ id, image, version, state string }

// worker returns the only container of the worker's service.
func (d *selfDeployment) worker() workerContainer {
	d.t.Helper()
	ids := strings.Fields(d.docker("ps", "--all", "--quiet", "--no-trunc", "--filter", "label=com.docker.compose.project="+d.name, "--filter", "label=com.docker.compose.service=orchestrator"))
	if len(ids) != 1 {
		d.t.Fatalf("containers of the worker's service: %v", ids)
	}
	fields := strings.Split(d.docker("inspect", "--format", "{{.Image}}|{{index .Config.Labels \"version\"}}|{{.State.Status}}|{{.Name}}", ids[0]), "|")
	if fields[3] != "/"+d.name+"-orchestrator-1" {
		d.t.Errorf("the worker's container is called %s", fields[3])
	}
	return workerContainer{ids[0], fields[0], fields[1], fields[2]}
}

func (d *selfDeployment) docker(args ...string) string {
	d.t.Helper()
	out, err := exec.Command("docker", args...).CombinedOutput()
	if err != nil {
		d.t.Fatalf("docker %v: %v: %s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// helpers lists the helper containers of a run.
func (d *selfDeployment) helpers(run string) []string {
	d.t.Helper()
	return strings.Fields(d.docker("ps", "--all", "--filter", "label=mm-orchestrator.helper="+run, "--format", "{{.Names}}"))
}

func (d *selfDeployment) artifact(run, name string) string {
	d.t.Helper()
	text, err := os.ReadFile(filepath.Join(d.artifacts(), run, name))
	if err != nil {
		d.t.Error(err)
	}
	return string(text)
}

// in returns the deployment for a subtest. Versions continue in both.
func (d *selfDeployment) in(t *testing.T) *selfDeployment {
	deployment := *d.deployment
	deployment.t = t
	return &selfDeployment{deployment: &deployment, conn: d.conn, version: d.version}
}

// check checks the end of a run: which version runs, that it works, and that
// nothing is left beside it.
func (d *selfDeployment) check(run string, version int) {
	d.t.Helper()
	now := d.worker()
	if now.version != fmt.Sprint(version) || now.state != "running" {
		d.t.Errorf("the worker is %+v, want version %d, running. %s", now, version, d.steps(run))
	}
	if left := d.helpers(run); len(left) > 0 {
		d.t.Errorf("helpers remain: %v", left)
	}
	image := d.docker("image", "inspect", "--format", "{{.Id}}", d.name+"-orchestrator")
	if image != now.image {
		d.t.Errorf("the image name of the service is %s, its container runs %s", image, now.image)
	}
	for deadline := time.Now().Add(time.Minute); ; {
		health := d.docker("inspect", "--format", "{{.State.Health.Status}}", now.id)
		if health == "healthy" {
			return
		}
		if time.Now().After(deadline) {
			d.t.Fatalf("the worker is %s", health)
		}
	}
}

// TestOwnServiceIsReplaced lets a run replace the container of the worker that
// carries it out.
func TestOwnServiceIsReplaced(t *testing.T) {
	d := newSelfDeployment(t, "own")
	before := d.worker()
	others := d.compose("ps", "--quiet", "rabbitmq", "postgres", "api")
	d.edit()
	run := d.submit("--service", "orchestrator")
	if status := d.await(d.conn, run, 3*time.Minute); status != "succeeded" {
		t.Fatalf("run %s: %s", status, d.steps(run))
	}
	if d.worker().id == before.id {
		t.Error("the worker's container was not replaced")
	}
	if now := d.compose("ps", "--quiet", "rabbitmq", "postgres", "api"); now != others {
		t.Error("others were replaced too")
	}
	d.check(run, 2)
	if log := d.artifact(run, "restart.log"); !strings.Contains(log, "up -d --no-deps orchestrator") || !strings.Contains(log, d.name+"-orchestrator-1") {
		t.Errorf("restart.log: %s", log)
	}
	d.commit()

	for name, lines := range map[string][]string{
		"a version that exits at once":         {`ENTRYPOINT ["false"]`},
		"a version that is no worker":          {`ENTRYPOINT ["sh", "-c", "sleep 1000000"]`},
		"a version whose program is not there": {`ENTRYPOINT ["/no/such/program"]`},
	} {
		t.Run(name, func(t *testing.T) {
			d := d.in(t)
			before := d.worker()
			d.edit(lines...)
			run := d.submit("--service", "orchestrator")
			if status := d.await(d.conn, run, 4*time.Minute); status != "rolled_back" {
				t.Fatalf("run %s: %s", status, d.steps(run))
			}
			d.check(run, 2)
			if now := d.worker(); now.image != before.image {
				t.Errorf("the worker runs image %s, was %s", now.image, before.image)
			}
			t.Logf("restart.log:\n%s", d.artifact(run, "restart.log"))
			t.Logf("rollback.log:\n%s", d.artifact(run, "rollback.log"))
		})
	}
	t.Run("a version that is not healthy", func(t *testing.T) {
		d := d.in(t)
		d.edit()
		run := d.submit("--service", "orchestrator", "--set", `verify.healthcheck={"url": "http://api:5000/no-such-page", "timeoutSeconds": 3, "intervalSeconds": 1}`)
		if status := d.await(d.conn, run, 4*time.Minute); status != "rolled_back" {
			t.Fatalf("run %s: %s", status, d.steps(run))
		}
		d.check(run, 2)
		t.Logf("rollback.log:\n%s", d.artifact(run, "rollback.log"))
	})
}

// TestHelperIsKilled kills the helper, its standby or the worker at random moments
// of runs for the worker's own service. Each run must end, with the new version or
// the old one running.
func TestHelperIsKilled(t *testing.T) {
	d := newSelfDeployment(t, "kill")
	version := 1
	for trial := range *kills {
		worker := d.worker()
		d.edit()
		run := d.submit("--service", "orchestrator")
		helper := d.awaitHelper(run)
		victim := []string{helper, worker.id, helper, helper + "-standby"}[trial%4]
		wait := time.Duration(mathrand.Int64N(int64(5 * time.Second)))
		timer := time.NewTimer(wait)
		<-timer.C
		// It may have ended already.
		out, err := exec.Command("docker", "kill", victim).CombinedOutput()
		t.Logf("trial %d: killed %s %s after the helper's creation: %v %s", trial, victim, wait, err, strings.TrimSpace(string(out)))
		status := d.await(d.conn, run, 4*time.Minute)
		if status == "succeeded" {
			version = d.version
			d.commit()
		}
		d.check(run, version)
		t.Logf("trial %d: %s", trial, status)
	}
}

// awaitHelper waits for the helper of a run, and returns its name.
func (d *selfDeployment) awaitHelper(run string) string {
	d.t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); <-tick.C {
		for _, helper := range d.helpers(run) {
			if !strings.HasSuffix(helper, "-standby") {
				return helper
			}
		}
	}
	d.t.Fatalf("no helper for run %s: %s", run, d.steps(run))
	return ""
}
