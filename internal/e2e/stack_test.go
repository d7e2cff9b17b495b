package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/sample"
)

const (
	queue = "orchestrator.run"
	// newest is the Celery release for tests that are not about versions.
	newest = "5.7.0"
	// waitTimeout is the limit on every wait of a test.
	waitTimeout = 90 * time.Second
)

// versions are the Celery releases that producers and readers may have.
var versions = []string{"5.4.0", "5.5.3", "5.6.3", "5.7.0"}

// stack is a worker process with its surroundings: a vhost, a migrated database,
// a workspace and an artifact folder.
type stack struct {
	t *testing.T
	// broker and database are the servers' addresses; the worker may use others
	// (see stackConfig).
	broker, database string
	workspace        string
	artifacts        string
	// project is nil for a workspace without compose.
	project *sample.Project
	// environment is the worker's environment, without its host name.
	environment []string

	conn *pgx.Conn
	// worker is the worker started last; started counts the workers.
	worker  *process
	started int
}

// stackConfig configures a stack.
type stackConfig struct {
	// NoWorker makes newStack start no worker.
	NoWorker bool
	// Project adds a compose project to the stack. Its service lacks a
	// dependency and fails, unless Healthy adds the dependency.
	Project, Healthy bool
	// Database is the URL of a database on a private server. Defaults to a new
	// database on the shared server.
	Database string
	// WorkerBroker and WorkerDatabase convert the servers' addresses to those
	// that the worker uses, such as a proxy's.
	WorkerBroker, WorkerDatabase func(address string) string
	// Environment is added to the worker's environment.
	Environment []string
}

// newStack creates a stack and, unless NoWorker is set, starts the worker.
func newStack(t *testing.T, cfg stackConfig) *stack {
	t.Helper()
	s := &stack{t: t, broker: devenv.Broker(t), database: cfg.Database, artifacts: t.TempDir()}
	if s.database == "" {
		s.database = devenv.Database(t)
	}
	if cfg.Project {
		s.makeProject(cfg.Healthy)
	} else {
		s.workspace = gitWorkspace(t)
	}
	conn, err := pgx.Connect(t.Context(), s.database)
	if err != nil {
		t.Fatal(err)
	}
	s.conn = conn
	t.Cleanup(func() { s.conn.Close(context.Background()) })

	broker, database := s.broker, s.database
	if cfg.WorkerBroker != nil {
		broker = cfg.WorkerBroker(broker)
	}
	if cfg.WorkerDatabase != nil {
		database = cfg.WorkerDatabase(database)
	}
	s.environment = append(workerEnvironment(t, broker, database, s.workspace), cfg.Environment...)
	if s.project != nil {
		s.environment = append(s.environment, s.project.Environment()...)
	}
	migrate := s.command("migrate", "--shared-tables")
	if text, err := migrate.CombinedOutput(); err != nil {
		t.Fatalf("mm-orchestrator migrate: %v\n%s", err, text)
	}
	if !cfg.NoWorker {
		s.startWorker()
	}
	return s
}

// makeProject creates a sample project with a unique name and starts it.
func (s *stack) makeProject(healthy bool) {
	t := s.t
	t.Helper()
	service, err := serviceProgram()
	if err != nil {
		t.Fatal(err)
	}
	name := "mm-e2e-" + regexp.MustCompile(`[^a-z0-9]+`).ReplaceAllString(strings.ToLower(t.Name()), "-") + "-" + strconv.Itoa(os.Getpid())
	s.project, err = sample.Create(t.Context(), sample.Config{
		Module: module, Dir: filepath.Join(t.TempDir(), "project"), Name: name, Service: service,
		Compose: devenv.Compose(t), Healthy: healthy,
	})
	if err != nil {
		t.Fatal(err)
	}
	s.workspace = s.project.Dir
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), waitTimeout)
		defer cancel()
		if err := s.project.Remove(ctx); err != nil {
			t.Errorf("removing the sample project: %v", err)
		}
	})
	if err := s.project.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	if healthy {
		s.awaitHealth("healthy")
	}
}

// awaitHealth waits until the container of service api has that health.
func (s *stack) awaitHealth(want string) sample.Container {
	s.t.Helper()
	var container sample.Container
	s.await("service api to be "+want, func() (bool, error) {
		var err error
		container, err = s.project.Container(s.t.Context(), "api")
		return container.Health() == want, err
	})
	return container
}

var serviceProgram = sync.OnceValues(func() (string, error) {
	out := filepath.Join(buildFolder, "service")
	return out, sample.BuildService(context.Background(), module, out)
})

// gitWorkspace creates a work tree with one committed file.
func gitWorkspace(t *testing.T) string {
	t.Helper()
	folder := t.TempDir()
	if err := os.Mkdir(filepath.Join(folder, "api_service"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(folder, sample.Requirements), []byte("httpx==0.28.1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	git(t, folder, "init", "--quiet", "--initial-branch=main")
	git(t, folder, "add", "--all")
	git(t, folder, "-c", "user.name=e2e", "-c", "user.email=e2e@localhost", "commit", "--quiet", "--message", "start")
	return folder
}

func git(t *testing.T, folder string, args ...string) string {
	t.Helper()
	command := exec.CommandContext(t.Context(), "git", args...)
	command.Dir = folder
	command.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null")
	text, err := command.CombinedOutput()
	if err != nil {
		t.Fatalf("git %v: %v\n%s", args, err, text)
	}
	return string(text)
}

// resultBackend returns the URL of a database in Celery's form. It names the
// driver, since SQLAlchemy 2.1 uses psycopg 3 for a plain postgresql://.
func resultBackend(database string) string {
	return "db+postgresql+psycopg2://" + strings.TrimPrefix(database, "postgres://")
}

// workerEnvironment returns the environment of a MoonMind worker container, for
// the given servers. It contains only the variables named here and none of this
// process's others, so that the worker's redaction is predictable.
func workerEnvironment(t *testing.T, broker, database, workspace string) []string {
	t.Helper()
	server, err := url.Parse(database)
	if err != nil {
		t.Fatal(err)
	}
	password, _ := server.User.Password()
	environment := []string{
		"PATH=" + linkPrograms(t) + ":" + os.Getenv("PATH"),
		"HOME=" + t.TempDir(),
		"CELERY_BROKER_URL=" + broker,
		"CELERY_RESULT_BACKEND=" + resultBackend(database),
		"POSTGRES_HOST=" + server.Hostname(),
		"POSTGRES_PORT=" + server.Port(),
		"POSTGRES_USER=" + server.User.Username(),
		"POSTGRES_PASSWORD=" + password,
		"POSTGRES_DB=" + strings.TrimPrefix(server.Path, "/"),
		"WORKSPACE_ROOT=" + workspace,
		"MM_ORCHESTRATOR_ALLOWED_PROGRAMS=record,flood,leak",
		"MM_ORCHESTRATOR_LISTEN=",         // tests run side by side
		"MM_ORCHESTRATOR_QUIET_PERIOD=1s", // tests are short
	}
	for _, name := range []string{"DOCKER_HOST", "GOCOVERDIR"} {
		if value, ok := os.LookupEnv(name); ok {
			environment = append(environment, name+"="+value)
		}
	}
	return environment
}

// command returns mm-orchestrator with the worker's environment and workspace.
func (s *stack) command(args ...string) *exec.Cmd {
	s.t.Helper()
	program, err := workerProgram()
	if err != nil {
		s.t.Fatal(err)
	}
	command := exec.Command(program, args...)
	command.Dir = s.workspace
	command.Env = s.environment
	return command
}

// process is a worker process and its output.
type process struct {
	command *exec.Cmd
	exited  chan struct{}
	err     error // set before exited is closed

	text lockedBuffer
}

// log returns everything that the worker has printed so far.
func (p *process) log() string { return p.text.String() }

// lockedBuffer receives the output of a process while other goroutines read it.
type lockedBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *lockedBuffer) Write(text []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(text)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// startWorker starts a worker and waits until it consumes. At the end of the test
// the worker is stopped, and its exit code and the queue are checked.
func (s *stack) startWorker() {
	s.t.Helper()
	s.startWorkerOf([]string{queue})
}

// startWorkerOf is startWorker for a worker of other queues, with more settings.
func (s *stack) startWorkerOf(queues []string, settings ...string) {
	t := s.t
	t.Helper()
	p := &process{command: s.command("worker"), exited: make(chan struct{})}
	p.command.Env = append(append(slices.Clone(s.environment), fmt.Sprintf("ORCHESTRATOR_HOSTNAME=orchestrator@worker-%d", s.started)), settings...)
	s.started++
	p.command.Stdout, p.command.Stderr = &p.text, &p.text
	devenv.OwnGroup(p.command, syscall.SIGKILL)
	if err := p.command.Start(); err != nil {
		t.Fatal(err)
	}
	s.worker = p
	go func() {
		p.err = p.command.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		s.stopWorker(p)
		if t.Failed() {
			log := p.log()
			t.Logf("the end of the worker's log:\n%s", log[max(0, len(log)-4<<10):])
		}
	})
	s.await("the worker to consume", func() (bool, error) {
		select {
		case <-p.exited:
			return false, fmt.Errorf("the worker ended: %w\n%s", errors.Join(p.err, errors.New("it must run")), p.log())
		default:
		}
		for _, name := range queues {
			if consumers, _, err := s.queueState(name); err != nil || consumers == 0 {
				return false, err
			}
		}
		return true, nil
	})
}

// stopWorker sends SIGTERM to a worker and checks that it exits with code 0.
func (s *stack) stopWorker(p *process) {
	s.t.Helper()
	select {
	case <-p.exited:
		return
	default:
	}
	if err := p.command.Process.Signal(syscall.SIGTERM); err != nil {
		s.t.Errorf("SIGTERM: %v", err)
	}
	select {
	case <-p.exited:
		if p.err != nil {
			s.t.Errorf("after SIGTERM the worker ended with: %v", p.err)
		}
	case <-time.After(waitTimeout):
		s.t.Error("the worker did not end on SIGTERM")
		_ = syscall.Kill(-p.command.Process.Pid, syscall.SIGKILL)
		<-p.exited
	}
}

// kill ends the worker with SIGKILL. Its commands continue.
func (s *stack) kill() {
	s.t.Helper()
	if err := s.worker.command.Process.Kill(); err != nil {
		s.t.Fatal(err)
	}
	<-s.worker.exited
}

// requireEmptyQueue stops the worker, so that no message is unacknowledged, and
// checks that the queue is empty.
func (s *stack) requireEmptyQueue() {
	s.t.Helper()
	s.stopWorker(s.worker)
	if _, messages, err := s.queue(); err != nil || messages != 0 {
		s.t.Errorf("%d messages are left in the queue (%v)", messages, err)
	}
}

// queue asks the broker for the counts of the orchestrator's queue.
func (s *stack) queue() (consumers, messages int, err error) { return s.queueState(queue) }

// queueState asks the broker for the counts of a queue. A missing one has no consumers.
func (s *stack) queueState(queue string) (consumers, messages int, err error) {
	conn, err := amqp.Dial(s.broker)
	if err != nil {
		return 0, 0, err
	}
	defer conn.Close()
	channel, err := conn.Channel()
	if err != nil {
		return 0, 0, err
	}
	state, err := channel.QueueDeclarePassive(queue, true, false, false, false, nil)
	if amqpError := (*amqp.Error)(nil); errors.As(err, &amqpError) && amqpError.Code == amqp.NotFound {
		return 0, 0, nil
	}
	return state.Consumers, state.Messages, err
}

// await polls until done returns true, and fails the test after waitTimeout.
func (s *stack) await(what string, done func() (bool, error)) {
	s.t.Helper()
	await(s.t, what, done)
}

func await(t *testing.T, what string, done func() (bool, error)) {
	t.Helper()
	deadline := time.Now().Add(waitTimeout)
	for {
		ok, err := done()
		if err != nil {
			t.Fatalf("waiting for %s: %v", what, err)
		}
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("timeout after %s: waiting for %s", waitTimeout, what)
		}
		select {
		case <-t.Context().Done():
			t.Fatalf("waiting for %s: %v", what, t.Context().Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// submission is what the Python producer prints.
type submission struct {
	RunID   string            `json:"run_id"`
	TaskIDs map[string]string `json:"task_ids"`
	Celery  string            `json:"celery"`
}

// ids returns the task ids in the order of the chain.
func (s submission) ids() []string {
	var ids []string
	for _, step := range []string{"analyze", "patch", "build", "restart", "verify"} {
		if id, ok := s.TaskIDs[step]; ok {
			ids = append(ids, id)
		}
	}
	return ids
}

// python runs a producer script with a version of Celery and decodes its output
// into document.
func (s *stack) python(version, script string, document any, args ...string) {
	s.t.Helper()
	command := exec.CommandContext(s.t.Context(), devenv.Celery(s.t, version), append([]string{script}, args...)...)
	command.Dir = filepath.Join(module, "testdata", "producers")
	command.Env = []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME"), "PYTHONDONTWRITEBYTECODE=1",
		"CELERY_BROKER_URL=" + s.broker, "CELERY_RESULT_BACKEND=" + resultBackend(s.database),
	}
	var stderr bytes.Buffer
	command.Stderr = &stderr
	text, err := command.Output()
	if err != nil {
		s.t.Fatalf("%s with celery %s: %v\n%s", script, version, err, stderr.String())
	}
	if err := json.Unmarshal(text, document); err != nil {
		s.t.Fatalf("%s printed %q: %v", script, text, err)
	}
}

// submit creates and publishes a run with the Python producer. If the stack has a
// project, the plan names it and its health URL.
func (s *stack) submit(version string, args ...string) submission {
	s.t.Helper()
	options := []string{"--artifacts", s.artifacts}
	if s.project != nil {
		options = append(options, "--project", s.project.Name, "--health-url", s.project.HealthURL())
	}
	var answer submission
	s.python(version, "submit_run.py", &answer, append(options, args...)...)
	return answer
}

// set returns a --set option of submit_run.py.
func set(path string, value any) string {
	text, err := json.Marshal(value)
	if err != nil {
		panic(err)
	}
	return "--set=" + path + "=" + string(text)
}

// withoutDocker returns options for a run that succeeds in a workspace without
// compose: its build and restart are git commands, and the test itself answers its
// health check.
func (s *stack) withoutDocker() []string {
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	s.t.Cleanup(server.Close)
	return []string{
		set("build.command", []string{"git", "--version"}),
		set("restart.command", []string{"git", "rev-parse", "HEAD"}),
		set("verify.healthcheck.url", server.URL), set("verify.healthcheck.intervalSeconds", 0.5),
		set("rollback.strategies", []any{map[string]any{"type": "git-revert", "commands": []any{[]string{"git", "reset", "--hard", "HEAD"}}}}),
	}
}

// pythonResult is one task as read_results.py prints it.
type pythonResult struct {
	Get struct {
		Value  json.RawMessage  `json:"value"`
		Raised *pythonException `json:"raised"`
	} `json:"get"`
	State      string          `json:"state"`
	Result     json.RawMessage `json:"result"`
	Stored     json.RawMessage `json:"stored"`
	Traceback  string          `json:"traceback"`
	Name       string          `json:"name"`
	Args       []any           `json:"args"`
	Kwargs     map[string]any  `json:"kwargs"`
	Worker     string          `json:"worker"`
	Retries    int             `json:"retries"`
	Queue      string          `json:"queue"`
	Successful bool            `json:"successful"`
	Failed     bool            `json:"failed"`
}

type pythonException struct {
	Class  string `json:"class"`
	Module string `json:"module"`
	Args   []any  `json:"args"`
	Text   string `json:"text"`
}

// read reads the results of tasks with AsyncResult of a version of Celery.
func (s *stack) read(version string, ids ...string) map[string]pythonResult {
	s.t.Helper()
	var answer struct {
		Results map[string]pythonResult `json:"results"`
	}
	s.python(version, "read_results.py", &answer, ids...)
	return answer.Results
}

// awaitRun waits until a run has ended (completed_at is set) and the result of
// its last task is stored.
func (s *stack) awaitRun(run string) record {
	s.t.Helper()
	var row record
	s.await("run "+run+" to end", func() (bool, error) {
		select {
		case <-s.worker.exited:
			return false, fmt.Errorf("the worker ended: %v", s.worker.err)
		default:
		}
		rows, err := s.rows(`SELECT to_jsonb(r) FROM orchestrator_runs r WHERE id = $1`, run)
		if err != nil || len(rows) != 1 {
			return false, errors.Join(err, fmt.Errorf("%d rows", len(rows)))
		}
		row = rows[0]
		if row["completed_at"] == nil {
			return false, nil
		}
		open, err := s.rows(`SELECT to_jsonb(st) FROM spec_workflow_task_states st
			LEFT JOIN celery_taskmeta m ON m.task_id = st.celery_task_id
			WHERE st.orchestrator_run_id = $1 AND st.celery_task_id IS NOT NULL
			  AND st.celery_state::text IS DISTINCT FROM m.status`, run)
		return len(open) == 0, err
	})
	return row
}

// record is a table row as JSON.
type record map[string]any

// rows runs a query that selects one JSON object per row.
func (s *stack) rows(query string, args ...any) ([]record, error) {
	rows, err := s.conn.Query(s.t.Context(), query, args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (record, error) {
		var value record
		err := row.Scan(&value)
		return value, err
	})
}

func (s *stack) mustRows(query string, args ...any) []record {
	s.t.Helper()
	rows, err := s.rows(query, args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return rows
}

// states returns a run's task states in plan order, older attempts first.
func (s *stack) states(run string) []record {
	s.t.Helper()
	return s.mustRows(`SELECT to_jsonb(t) FROM spec_workflow_task_states t WHERE orchestrator_run_id = $1 ORDER BY plan_step, attempt`, run)
}

// registered returns a run's artifact rows in the order of the steps.
func (s *stack) registered(run string) []record {
	s.t.Helper()
	return s.mustRows(`SELECT to_jsonb(a) FROM orchestrator_run_artifacts a WHERE run_id = $1 ORDER BY created_at, path`, run)
}

// taskmeta returns the result rows of a run's tasks, in the order of the steps.
func (s *stack) taskmeta(run string) []record {
	s.t.Helper()
	return s.mustRows(`SELECT to_jsonb(m) || jsonb_build_object(
			'args', convert_from(m.args, 'UTF8'), 'kwargs', convert_from(m.kwargs, 'UTF8'), 'result', encode(m.result, 'hex'),
			'children', convert_from(m.children, 'UTF8'), 'stamps', convert_from(m.stamps, 'UTF8'))
		FROM celery_taskmeta m WHERE convert_from(m.args, 'UTF8') LIKE '%' || $1 || '%' ORDER BY m.date_done, m.id`, run)
}

// summary returns "step:status" for each of a run's states, with the attempt if
// it is not the first: one short text to compare.
func summary(states []record) string {
	var words []string
	for _, state := range states {
		word := fmt.Sprintf("%s:%s", state["plan_step"], state["plan_step_status"])
		if attempt := state["attempt"].(float64); attempt != 1 {
			word += fmt.Sprintf("#%v", attempt)
		}
		words = append(words, word)
	}
	return strings.Join(words, " ")
}

// files returns the contents of the files in a run's directory, by relative name.
func (s *stack) files(run string) map[string]string {
	s.t.Helper()
	folder := filepath.Join(s.artifacts, run)
	contents := make(map[string]string)
	err := filepath.WalkDir(folder, func(path string, entry os.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		name, _ := filepath.Rel(folder, path)
		contents[name] = string(text)
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return contents
}

// lines returns the lines of a file, or none if it does not exist.
func lines(t *testing.T, path string) []string {
	t.Helper()
	file, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	text, err := io.ReadAll(file)
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(strings.Split(string(text), "\n"), func(line string) bool { return line == "" })
}
