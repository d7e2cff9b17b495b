package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/sample"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// celery is the release that the producer and the reader of results use.
const celery = "5.7.0" // also in the Makefile, target demo

// demo is the state of one demonstration. The methods that run calls set the
// fields; only one goroutine uses them.
type demo struct {
	module, folder string
	screen         *screen

	python, compose  string
	broker, database string
	project          *sample.Project
	artifacts        string
	program, service string // built from this clone
	environment      []string
	workDir          string // of the program
	worker           *exec.Cmd
	workerEnded      chan struct{}
	workerLog        string
	store            *store.Store
	// cleanup is called in reverse order at the end.
	cleanup []func(context.Context) error
}

func (d *demo) atEnd(remove func(context.Context) error) { d.cleanup = append(d.cleanup, remove) }

// cleanUp removes everything that run has created, except for the files.
func (d *demo) cleanUp(ctx context.Context) error {
	var failures []error
	for i := len(d.cleanup) - 1; i >= 0; i-- {
		failures = append(failures, d.cleanup[i](ctx))
	}
	d.cleanup = nil
	return errors.Join(failures...)
}

func (d *demo) run(ctx context.Context) error {
	for _, part := range []func(context.Context) error{
		d.check, d.build, d.prepare, d.startWorker, d.repair, d.breakAndRollBack, d.explore,
	} {
		if err := part(ctx); err != nil {
			return err
		}
	}
	return nil
}

// check finds the tools and creates a virtual host and a database.
func (d *demo) check(ctx context.Context) error {
	root := os.Getenv(devenv.EnvPythonRoot)
	d.compose = os.Getenv(devenv.EnvCompose)
	if root == "" || d.compose == "" {
		return errors.New("the environment names no Python or no docker-compose: start the demo with `make demo`")
	}
	d.python = devenv.CeleryPython(root, celery)
	engine, err := output(ctx, "docker", "version", "--format", "{{.Server.Version}}")
	if err != nil {
		return fmt.Errorf("no docker engine answers: %w", err)
	}
	composeVersion, err := output(ctx, d.compose, "version", "--short")
	if err != nil {
		return err
	}
	python, err := output(ctx, d.python, "-c", "import platform, celery; print(platform.python_version(), '· celery', celery.__version__)")
	if err != nil {
		return err
	}
	d.screen.line("checking", fmt.Sprintf("engine %s · compose %s · python %s", engine, composeVersion, python), "ok")

	var remove func(context.Context) error
	if d.broker, remove, err = devenv.NewVhost(ctx); err != nil {
		return err
	}
	d.atEnd(remove)
	if d.database, remove, err = devenv.NewDatabase(ctx); err != nil {
		return err
	}
	d.atEnd(remove)
	d.screen.line("using", fmt.Sprintf("rabbitmq %s  postgres %s", place(d.broker), place(d.database)), "")
	return nil
}

// build builds the worker and the program of the sample's containers. With an
// empty build cache it also compiles the clients of docker and PostgreSQL, which
// takes a while; the progress line therefore shows the time and the current
// package.
func (d *demo) build(ctx context.Context) error {
	d.program, d.service = filepath.Join(d.module, "bin", "mm-orchestrator"), filepath.Join(d.folder, "service")
	for _, target := range []struct{ what, out, pkg string }{
		{"the worker", d.program, "./cmd/mm-orchestrator"},
		{"the sample service", d.service, "./" + sample.ServicePackage},
	} {
		if err := d.goBuild(ctx, target.what, target.out, target.pkg); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) goBuild(ctx context.Context, what, out, pkg string) error {
	since := time.Now()
	build := exec.CommandContext(ctx, "go", "build", "-v", "-ldflags=-s -w", "-o", out, pkg)
	build.Dir, build.Env = d.module, append(os.Environ(), "CGO_ENABLED=0")
	if err := d.watch(build, "building", what); err != nil {
		return fmt.Errorf("building %s: %w", what, err)
	}
	d.screen.line("building", what+" from this clone, with go build", seconds(time.Since(since)))
	return nil
}

// watch runs a command to its end and shows the last line of its output as
// progress.
func (d *demo) watch(command *exec.Cmd, doing, what string) error {
	var output lockedBuffer
	command.Stdout, command.Stderr = &output, &output
	since := time.Now()
	ended := make(chan error, 1)
	if err := command.Start(); err != nil {
		return err
	}
	go func() { ended <- command.Wait() }()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case err := <-ended:
			if err != nil {
				return fmt.Errorf("%w: %s", err, output.text())
			}
			return nil
		case <-tick.C:
			d.screen.progress(doing, time.Since(since), what+": "+output.lastLine())
		}
	}
}

// prepare creates the sample project, starts it, and waits for its service to
// fail.
func (d *demo) prepare(ctx context.Context) error {
	since := time.Now()
	d.artifacts = filepath.Join(d.folder, "artifacts", "spec_workflows")
	work := filepath.Join(d.folder, "project")
	for _, old := range []string{work, work + ".docker", filepath.Join(d.folder, "artifacts"), filepath.Join(d.folder, "home")} {
		if err := os.RemoveAll(old); err != nil {
			return err
		}
	}
	for _, folder := range []string{d.artifacts, filepath.Join(d.folder, "home")} {
		if err := os.MkdirAll(folder, 0o755); err != nil {
			return err
		}
	}
	// The name depends on the folder only, so that the next demo finds what a
	// killed one has left behind.
	name := fmt.Sprintf("mm-demo-%x", sha256.Sum256([]byte(d.folder)))[:14]
	var err error
	d.project, err = sample.Create(ctx, sample.Config{Module: d.module, Dir: work, Name: name, Service: d.service, Compose: d.compose})
	if err != nil {
		return err
	}
	if err := d.project.Remove(ctx); err != nil {
		return err
	}
	d.atEnd(d.project.Remove)
	if err := d.project.Up(ctx); err != nil {
		return err
	}
	d.screen.line("preparing", "sample project "+name+": services api, other", seconds(time.Since(since)))
	log, err := d.await(ctx, "the service to fail", func() (string, bool, error) {
		text, err := d.project.Compose(ctx, "logs", "--no-log-prefix", "--tail", "1", "api")
		return strings.TrimSpace(text), strings.TrimSpace(text) != "", err
	})
	if err != nil {
		return err
	}
	d.screen.line("", "service api fails: "+log, "")
	return nil
}

// quietPeriod is the worker's MM_ORCHESTRATOR_QUIET_PERIOD: shorter than the
// default of 10 s, since the demo's services end at once or not at all.
const quietPeriod = "3s"

// startWorker migrates the database and starts the worker.
func (d *demo) startWorker(ctx context.Context) error {
	listen, err := freeAddress()
	if err != nil {
		return err
	}
	d.environment = append(d.project.Environment(),
		"PATH="+os.Getenv("PATH"), "HOME="+filepath.Join(d.folder, "home"),
		"CELERY_BROKER_URL="+d.broker,
		"CELERY_RESULT_BACKEND="+resultBackend(d.database),
		"MM_ORCHESTRATOR_DATABASE_URL="+d.database,
		"MM_ORCHESTRATOR_LISTEN="+listen,
		"MM_ORCHESTRATOR_QUIET_PERIOD="+quietPeriod,
		"WORKSPACE_ROOT="+d.project.Dir,
	)
	if host := os.Getenv("DOCKER_HOST"); host != "" {
		d.environment = append(d.environment, "DOCKER_HOST="+host)
	}
	d.workDir = d.project.Dir
	if err := d.migrate(ctx); err != nil {
		return err
	}
	d.atEnd(d.endWorker)
	took, err := d.launch(ctx, "worker", listen)
	if err != nil {
		return err
	}
	d.screen.line("worker", "ready on orchestrator.run, prefetch 1 · log: "+d.short(d.workerLog), seconds(took))
	return nil
}

// migrate creates the tables, and opens them.
func (d *demo) migrate(ctx context.Context) (err error) {
	since := time.Now()
	if text, err := d.command(ctx, "migrate", "--shared-tables").CombinedOutput(); err != nil {
		return fmt.Errorf("mm-orchestrator migrate: %w: %s", err, bytes.TrimSpace(text))
	}
	d.screen.line("migrating", "MoonMind's tables and ours, in a new database", seconds(time.Since(since)))
	if d.store, err = store.Open(ctx, store.Config{URL: secret.New(d.database), Worker: "demo"}); err != nil {
		return err
	}
	d.atEnd(func(context.Context) error { d.store.Close(); return nil })
	return nil
}

// launch starts a worker whose log is named like it, and waits until it answers at the
// address listen that it is ready. settings are variables in addition to d.environment.
func (d *demo) launch(ctx context.Context, name, listen string, settings ...string) (took time.Duration, err error) {
	d.workerLog = filepath.Join(d.folder, name+".log")
	log, err := os.Create(d.workerLog)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	since := time.Now()
	worker := d.command(context.WithoutCancel(ctx), "worker")
	worker.Env = append(worker.Env, settings...)
	worker.Stdout, worker.Stderr = log, log
	devenv.OwnGroup(worker, syscall.SIGKILL)
	if err := worker.Start(); err != nil {
		return 0, fmt.Errorf("starting the worker: %w", err)
	}
	ended := make(chan struct{})
	d.worker, d.workerEnded = worker, ended
	go func() {
		_ = worker.Wait()
		close(ended)
	}()
	client := &http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	_, err = d.await(ctx, "the worker to be ready", func() (string, bool, error) {
		response, err := client.Get("http://" + listen + "/readyz")
		if err != nil {
			return "", false, nil
		}
		response.Body.Close()
		return "", response.StatusCode == http.StatusOK, nil
	})
	return time.Since(since), err
}

// endWorker ends the last worker that launch has started, if any.
func (d *demo) endWorker(ctx context.Context) error {
	if d.worker == nil {
		return nil
	}
	_ = d.worker.Process.Signal(syscall.SIGTERM)
	select {
	case <-d.workerEnded:
		return nil
	case <-time.After(5 * time.Second):
		// The worker is in a step: a second signal ends the step too.
		_ = d.worker.Process.Signal(syscall.SIGTERM)
	}
	select {
	case <-d.workerEnded:
		return nil
	case <-time.After(10 * time.Second):
	case <-ctx.Done():
	}
	_ = syscall.Kill(-d.worker.Process.Pid, syscall.SIGKILL)
	<-d.workerEnded
	return errors.New("the worker did not end on SIGTERM and was killed")
}

// repair shows a run that succeeds. It adds the dependency to requirements.txt
// and does not commit it, as an agent would.
func (d *demo) repair(ctx context.Context) error {
	if err := d.project.Require(sample.Dependency); err != nil {
		return err
	}
	status, err := d.show(ctx, "api fails: no module named flask", "",
		"--set", "verify.healthcheck.timeoutSeconds=30", "--set", "verify.healthcheck.intervalSeconds=1")
	if err != nil {
		return err
	}
	if status != store.RunSucceeded {
		return fmt.Errorf("the repair ended as %s, not as succeeded; the worker's log is %s", status, d.short(d.workerLog))
	}
	return nil
}

// breakAndRollBack shows a run that fails: its change breaks the service.
func (d *demo) breakAndRollBack(ctx context.Context) error {
	if err := d.project.Commit(ctx, "the repair, kept"); err != nil {
		return err
	}
	if err := d.project.Drop("flask"); err != nil {
		return err
	}
	status, err := d.show(ctx, "drop an unused dependency", "  (a change that breaks it)",
		"--set", "verify.healthcheck.timeoutSeconds=6", "--set", "verify.healthcheck.intervalSeconds=1")
	if err != nil {
		return err
	}
	if status != store.RunRolledBack {
		return fmt.Errorf("the run ended as %s, not as rolled_back; the worker's log is %s", status, d.short(d.workerLog))
	}
	return nil
}

// explore prints where everything is and, on a terminal, waits for Ctrl-C.
func (d *demo) explore(ctx context.Context) error {
	d.screen.print("")
	d.screen.line("files", d.short(d.folder)+": artifacts/, project/, worker.log", "")
	if !d.screen.terminal {
		return nil
	}
	d.screen.print("\nTo inspect the result, in another terminal:")
	d.screen.print("  MM_ORCHESTRATOR_DATABASE_URL='" + d.database + "' " + d.short(d.program) + " runs")
	d.screen.print("  psql '" + d.database + "' -c 'table spec_workflow_task_states'")
	d.screen.print("  curl -i " + d.project.HealthURL())
	d.screen.print("To end the demo: Ctrl-C here, or `make demo-stop` elsewhere.")
	<-ctx.Done()
	return nil
}

// command returns mm-orchestrator with the worker's environment.
func (d *demo) command(ctx context.Context, args ...string) *exec.Cmd {
	command := exec.CommandContext(ctx, d.program, args...)
	command.Dir, command.Env = d.workDir, slices.Clone(d.environment)
	return command
}

// producer runs a script of testdata/producers and decodes its output.
func (d *demo) producer(ctx context.Context, document any, script string, args ...string) error {
	command := exec.CommandContext(ctx, d.python, append([]string{script}, args...)...)
	command.Dir = filepath.Join(d.module, "testdata", "producers")
	command.Env = []string{"PATH=" + os.Getenv("PATH"), "PYTHONDONTWRITEBYTECODE=1",
		"CELERY_BROKER_URL=" + d.broker, "CELERY_RESULT_BACKEND=" + resultBackend(d.database)}
	var stderr bytes.Buffer
	command.Stderr = &stderr
	text, err := command.Output()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", script, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return json.Unmarshal(text, document)
}

// await polls until done returns true, for at most a minute.
func (d *demo) await(ctx context.Context, what string, done func() (string, bool, error)) (string, error) {
	deadline := time.Now().Add(time.Minute)
	for {
		text, ok, err := done()
		if err != nil || ok {
			return text, err
		}
		if time.Now().After(deadline) {
			return "", fmt.Errorf("timeout after 1 minute: waiting for %s", what)
		}
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case <-d.workerEnded: // nil, and so never ready, before there is a worker
			return "", fmt.Errorf("the worker ended; its log is %s", d.short(d.workerLog))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// short returns a path relative to the clone.
func (d *demo) short(path string) string {
	if relative, err := filepath.Rel(d.module, path); err == nil && !strings.HasPrefix(relative, "..") {
		return relative
	}
	return path
}

// resultBackend returns the URL of a database in Celery's form. It names the
// driver, since SQLAlchemy 2.1 uses psycopg 3 for a plain postgresql://.
func resultBackend(database string) string {
	return "db+postgresql+psycopg2://" + strings.TrimPrefix(database, "postgres://")
}

func place(address string) string {
	server, err := url.Parse(address)
	if err != nil {
		return "?"
	}
	return server.Host
}

func freeAddress() (string, error) {
	ports, err := devenv.FreePorts(1)
	if err != nil {
		return "", err
	}
	return "127.0.0.1:" + strconv.Itoa(ports[0]), nil
}

func output(ctx context.Context, program string, args ...string) (string, error) {
	text, err := exec.CommandContext(ctx, program, args...).Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w", program, strings.Join(args, " "), err)
	}
	return strings.TrimSpace(string(text)), nil
}
