package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/bench/contender"
	"github.com/moonladderstudios/mm-orchestrator/internal/moonmind"
)

// planSteps is how many steps of a successful run have a message of their own. The
// rollback is recorded as skipped.
const planSteps = 5

// quietPeriod is how long verify watches a healthy service, at the least. It is
// subtracted from the time of a run.
const quietPeriod = 100 * time.Millisecond

// planCase is what runs of a plan need.
type planCase struct {
	program   string
	workspace string
	artifacts string
	environ   []string
	queue     string
	health    *http.Server
	healthURL string
}

// preparePlans builds the program, creates MoonMind's tables, and makes a workspace.
func (h *harness) preparePlans(ctx context.Context) (err error) {
	if h.plan != nil {
		return nil
	}
	c := &planCase{
		program: filepath.Join(h.folder, "mm-orchestrator"), workspace: filepath.Join(h.folder, "workspace"),
		artifacts: filepath.Join(h.folder, "artifacts"), queue: "bench-plan",
	}
	h.plan = c
	build := h.Program
	if build == nil {
		build = buildRelease
	}
	if err := build(ctx, c.program); err != nil {
		return err
	}
	for _, folder := range []string{c.workspace, c.artifacts} {
		if err := os.MkdirAll(folder, 0o755); err != nil {
			return err
		}
	}
	for _, args := range [][]string{
		{"init", "--quiet", "--initial-branch=main"},
		{"-c", "user.name=bench", "-c", "user.email=bench@localhost", "commit", "--quiet", "--allow-empty", "--message", "start"},
	} {
		git := exec.CommandContext(ctx, "git", args...)
		git.Dir, git.Env = c.workspace, append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null")
		if err := run(git); err != nil {
			return err
		}
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	c.healthURL = "http://" + listener.Addr().String() + "/"
	c.health = &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}), ReadHeaderTimeout: time.Second}
	go func() { _ = c.health.Serve(listener) }() // until close
	database, err := url.Parse(h.servers.database.URL)
	if err != nil {
		return err
	}
	password, _ := database.User.Password()
	c.environ = []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + h.folder,
		"CELERY_BROKER_URL=" + h.servers.broker.URL,
		"CELERY_RESULT_BACKEND=db+postgresql://" + database.User.String() + "@" + database.Host + database.Path,
		"POSTGRES_HOST=" + database.Hostname(), "POSTGRES_PORT=" + database.Port(), "POSTGRES_USER=" + database.User.Username(),
		"POSTGRES_PASSWORD=" + password, "POSTGRES_DB=" + database.Path[1:],
		"ORCHESTRATOR_CELERY_QUEUE=" + c.queue, "WORKSPACE_ROOT=" + c.workspace,
		"MM_ORCHESTRATOR_ALLOWED_PROGRAMS=true", "MM_ORCHESTRATOR_LISTEN=", "MM_ORCHESTRATOR_ROLLBACK=commands",
		"MM_ORCHESTRATOR_QUIET_PERIOD=" + quietPeriod.String(),
		"DOCKER_HOST=unix://" + filepath.Join(h.folder, "no-docker.sock"),
	}
	migrate := exec.CommandContext(ctx, c.program, "migrate", "--shared-tables")
	migrate.Dir, migrate.Env = c.workspace, c.environ
	if err := run(migrate); err != nil {
		return err
	}
	if err := h.servers.declare(c.queue); err != nil {
		return err
	}
	for _, statement := range []string{contender.StepTables, announceEnds} {
		if _, err := h.servers.db.Exec(ctx, statement); err != nil {
			return err
		}
	}
	return nil
}

// buildRelease builds the program as `make build` does.
func buildRelease(ctx context.Context, path string) error {
	return buildProgram(ctx, path, []string{"CGO_ENABLED=0"}, "-trimpath", "-ldflags", "-s -w")
}

func buildProgram(ctx context.Context, path string, environ []string, flags ...string) error {
	module, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	if err != nil {
		return err
	}
	build := exec.CommandContext(ctx, "go", slices.Concat([]string{"build", "-buildvcs=false", "-o", path}, flags, []string{"./cmd/mm-orchestrator"})...)
	build.Dir, build.Env = filepath.Dir(string(module)), append(os.Environ(), environ...)
	return run(build)
}

func run(command *exec.Cmd) error {
	if text, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", command, err, bytes.TrimSpace(text))
	}
	return nil
}

func (c *planCase) close() error {
	if c == nil || c.health == nil {
		return nil
	}
	return c.health.Close()
}

// steps is the plan, as MoonMind's API stores it.
func (c *planCase) steps() ([]byte, error) {
	command := []string{"true"}
	return json.Marshal([]any{
		map[string]any{"name": "analyze", "parameters": map[string]any{"instruction": "Keep going", "workspace": ".", "logArtifact": "analyze.log"}},
		map[string]any{"name": "patch", "parameters": map[string]any{"workspace": ".", "diffArtifact": "patch.diff", "commands": [][]string{command, command}}},
		map[string]any{"name": "build", "parameters": map[string]any{"logArtifact": "build.log", "command": command}},
		map[string]any{"name": "restart", "parameters": map[string]any{"logArtifact": "restart.log", "command": command}},
		map[string]any{"name": "verify", "parameters": map[string]any{"logArtifact": "verify.log", "healthcheck": map[string]any{
			"url": c.healthURL, "method": "GET", "timeoutSeconds": 5, "intervalSeconds": 0.005, "expectedStatus": 200,
		}}},
		map[string]any{"name": "rollback", "parameters": map[string]any{"logArtifact": "rollback.log", "strategies": []any{
			map[string]any{"type": "compose", "commands": [][]string{command}},
		}}},
	})
}

// plans runs one run after the other with the program.
func (h *harness) plans(ctx context.Context) (sample Sample, err error) {
	c := h.plan
	work, err := h.servers.work(ctx)
	if err != nil {
		return sample, err
	}
	p := newProcess(ours)
	command := exec.Command(c.program, "worker")
	command.Env = c.environ
	if err := p.begin(command, c.workspace); err != nil {
		return sample, err
	}
	defer p.end(&err)
	runs := 0
	one := func() (time.Duration, error) {
		runs++
		return h.oneRun(ctx, p)
	}
	for range min(2, h.sizes().least) { // to warm up
		if _, err := one(); err != nil {
			return sample, err
		}
	}
	var times []float64
	before, measured := h.usage(p), runs
	for began := time.Now(); len(times) < h.sizes().least || time.Since(began).Seconds() < h.seconds; {
		took, err := one()
		if err != nil {
			return sample, err
		}
		times = append(times, (took-quietPeriod).Seconds()*1000)
	}
	sample.CPU = h.usage(p).perTask(before, runs-measured)
	sample.Values = []float64{percentile(times, 50)}
	if err := p.stop(); err != nil {
		return sample, err
	}
	after, err := h.servers.work(ctx)
	sample.Database = after.since(work, runs)
	return sample, err
}

// announceEnds makes the database tell that a run has ended: polling would be work
// of its own.
const announceEnds = `
	CREATE FUNCTION bench_ended() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN PERFORM pg_notify('bench_ended', NEW.status::text); RETURN NULL; END $$;
	CREATE TRIGGER bench_ended AFTER UPDATE OF status ON orchestrator_runs FOR EACH ROW
	WHEN (NEW.status IN ('succeeded', 'failed', 'rolled_back')) EXECUTE FUNCTION bench_ended();
	LISTEN bench_ended`

// oneRun creates a run, publishes its message and waits until it has succeeded.
func (h *harness) oneRun(ctx context.Context, p *process) (time.Duration, error) {
	c, id := h.plan, moonmind.NewID()
	plan, err := c.steps()
	if err != nil {
		return 0, err
	}
	if _, err := moonmind.Create(ctx, h.servers.db, moonmind.Run{ID: id, Queue: c.queue, Plan: plan, ArtifactRoot: filepath.Join(c.artifacts, id)}); err != nil {
		return 0, err
	}
	_, first, err := moonmind.Chain(c.queue, id)
	if err != nil {
		return 0, err
	}
	began := time.Now()
	if err := h.servers.publish(ctx, c.queue, first); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, markTimeout, fmt.Errorf("a run has not ended after %s", markTimeout))
	defer cancel()
	notification, err := h.servers.db.WaitForNotification(ctx)
	took := time.Since(began)
	if err != nil {
		return 0, fmt.Errorf("%w: %s", errors.Join(context.Cause(ctx), err), p.output)
	}
	if notification.Payload != "succeeded" {
		return 0, fmt.Errorf("a run is %s after %s: %s", notification.Payload, took, p.output)
	}
	return took, nil
}

// floorPlans runs the same steps with what no worker can leave out, and nothing else.
func (h *harness) floorPlans(ctx context.Context) (sample Sample, err error) {
	s := setting{slots: 1, prefetch: 1, results: true, folder: h.plan.artifacts, workspace: h.plan.workspace, service: h.plan.healthURL}
	r, err := h.open(ctx, floor, how{slots: 1}, s, func(*running) error { return nil })
	if err != nil {
		return sample, err
	}
	defer r.end(&err)
	one := func() (time.Duration, error) {
		m := message(contender.Step, r.ids.new(), 3, nil, true)
		m.Headers[contender.HeaderLeft] = int32(planSteps)
		r.tasks += planSteps + 1 // the last one is a mark
		began := time.Now()
		if err := h.servers.publish(ctx, r.queue, m); err != nil {
			return 0, err
		}
		end, err := r.mark(ctx)
		return end.Sub(began), err
	}
	for range min(2, h.sizes().least) { // to warm up
		if _, err := one(); err != nil {
			return sample, err
		}
	}
	var times []float64
	before := h.usage(r.process)
	for began := time.Now(); len(times) < h.sizes().least || time.Since(began).Seconds() < h.seconds; {
		took, err := one()
		if err != nil {
			return sample, err
		}
		times = append(times, took.Seconds()*1000)
	}
	sample.CPU = h.usage(r.process).perTask(before, len(times))
	sample.Values = []float64{percentile(times, 50)}
	if err := h.finish(ctx, r, s, &sample); err != nil {
		return sample, err
	}
	for name := range sample.Database {
		sample.Database[name] *= planSteps + 1 // for each run, not each message
	}
	return sample, nil
}
