package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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
	// newest is the Celery that tests use which are not about versions.
	newest = "5.7.0"
	// patience is the longest that a test waits for anything.
	patience = 90 * time.Second
)

// versions of Celery that producers and readers may have.
var versions = []string{"5.4.0", "5.5.3", "5.6.3", "5.7.0"}

// stack is everything around one worker: a vhost, a migrated database, a
// workspace, an artifact folder, and the worker process itself.
type stack struct {
	t *testing.T
	// broker and database are the servers' own addresses; the worker may be
	// given others (see stackConfig).
	broker, database string
	workspace        string
	artifacts        string
	// project is nil for a workspace without compose.
	project *sample.Project
	// extra is what the worker's environment has beyond the addresses.
	extra []string

	conn *pgx.Conn
	// worker is the one that was started last; started counts them.
	worker  *process
	started int
}

// stackConfig says what differs from an ordinary stack.
type stackConfig struct {
	// NoWorker leaves the worker to the test.
	NoWorker bool
	// Project gives the stack a compose project; Healthy commits it with the
	// dependency and starts it, otherwise it starts broken.
	Project, Healthy bool
	// Database is a server's own database in place of one on the shared server.
	Database string
	// WorkerBroker and WorkerDatabase make other addresses of the real ones
	// for the worker, for proxies.
	WorkerBroker, WorkerDatabase func(address string) string
	// Environment is added to the worker's.
	Environment []string
}

// newStack makes everything and, unless told otherwise, starts the worker.
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
	s.extra = append(workerEnvironment(t, broker, database, s.workspace), cfg.Environment...)
	if s.project != nil {
		s.extra = append(s.extra, s.project.Environment()...)
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

// makeProject makes a sample project of a name of its own and starts it.
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
		ctx, cancel := context.WithTimeout(context.Background(), patience)
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

// awaitHealth waits until the container of service api is in that health.
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

// gitWorkspace makes a work tree with one committed file.
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

// resultBackend is the address of a database as Celery wants it. The driver
// is named, since SQLAlchemy 2.1 takes psycopg 3 for a bare postgresql://.
func resultBackend(database string) string {
	return "db+postgresql+psycopg2://" + strings.TrimPrefix(database, "postgres://")
}

// workerEnvironment is the environment of a MoonMind worker container, made
// for the given servers. Nothing of this process's environment but what is
// named here reaches the worker, so that its redaction is predictable.
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
		"MM_ORCHESTRATOR_ALLOWED_PROGRAMS=ledger,flood",
		"MM_ORCHESTRATOR_LISTEN=", // tests run side by side
	}
	for _, name := range []string{"DOCKER_HOST", "GOCOVERDIR"} {
		if value, ok := os.LookupEnv(name); ok {
			environment = append(environment, name+"="+value)
		}
	}
	return environment
}

// command is mm-orchestrator with the worker's environment and workspace.
func (s *stack) command(args ...string) *exec.Cmd {
	s.t.Helper()
	program, err := workerProgram()
	if err != nil {
		s.t.Fatal(err)
	}
	command := exec.Command(program, args...)
	command.Dir = s.workspace
	command.Env = s.extra
	return command
}

// process is a running worker and what it has printed.
type process struct {
	command *exec.Cmd
	exited  chan struct{}
	err     error // set before exited is closed

	text lockedBuffer
}

// log is everything that the worker has printed so far.
func (p *process) log() string { return p.text.String() }

// lockedBuffer takes the output of a process while others read it.
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

// startWorker starts a worker and waits until it consumes. It is ended, and
// its exit code and the queue are judged, when the test ends.
func (s *stack) startWorker() {
	t := s.t
	t.Helper()
	p := &process{command: s.command("worker"), exited: make(chan struct{})}
	p.command.Env = append(slices.Clone(s.extra), fmt.Sprintf("ORCHESTRATOR_HOSTNAME=orchestrator@worker-%d", s.started))
	s.started++
	p.command.Stdout, p.command.Stderr = &p.text, &p.text
	p.command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	dieWithUs(p.command.SysProcAttr)
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
		consumers, _, err := s.queue()
		return consumers > 0, err
	})
}

// stopWorker ends a worker by SIGTERM and demands that it ends well.
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
	case <-time.After(patience):
		s.t.Error("the worker did not end on SIGTERM")
		_ = syscall.Kill(-p.command.Process.Pid, syscall.SIGKILL)
		<-p.exited
	}
}

// kill ends the worker as a power cut does, its commands not with it.
func (s *stack) kill() {
	s.t.Helper()
	if err := s.worker.command.Process.Kill(); err != nil {
		s.t.Fatal(err)
	}
	<-s.worker.exited
}

// demandEmptyQueue ends the worker, so that nothing is unacknowledged, and
// demands that no message is left.
func (s *stack) demandEmptyQueue() {
	s.t.Helper()
	s.stopWorker(s.worker)
	if _, messages, err := s.queue(); err != nil || messages != 0 {
		s.t.Errorf("%d messages are left in the queue (%v)", messages, err)
	}
}

// queue asks the broker; a missing queue has no consumers.
func (s *stack) queue() (consumers, messages int, err error) {
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

// await polls until done, and fails the test when it takes too long.
func (s *stack) await(what string, done func() (bool, error)) {
	s.t.Helper()
	await(s.t, what, done)
}

func await(t *testing.T, what string, done func() (bool, error)) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		ok, err := done()
		if err != nil {
			t.Fatalf("waiting for %s: %v", what, err)
		}
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited %s in vain for %s", patience, what)
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

// ids are the task ids in the order of the chain.
func (s submission) ids() []string {
	var ids []string
	for _, step := range []string{"analyze", "patch", "build", "restart", "verify"} {
		if id, ok := s.TaskIDs[step]; ok {
			ids = append(ids, id)
		}
	}
	return ids
}

// python runs a producer script under a version of Celery and decodes what it
// prints into document.
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

// submit lets the Python producer create and publish a run. A stack with a
// project names it and its health URL in the plan.
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

// set writes a --set option of submit_run.py.
func set(path string, value any) string {
	text, err := json.Marshal(value)
	if err != nil {
		panic(err)
	}
	return "--set=" + path + "=" + string(text)
}

// withoutDocker are options for a run that succeeds in a workspace without
// compose: its build and restart are commands of git.
func withoutDocker() []string {
	return []string{
		set("build.command", []string{"git", "--version"}),
		set("restart.command", []string{"git", "rev-parse", "HEAD"}),
		set("verify.healthcheck", nil),
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
	Args       []string        `json:"args"`
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

// read lets AsyncResult of a version of Celery read the results of tasks.
func (s *stack) read(version string, ids ...string) map[string]pythonResult {
	s.t.Helper()
	var answer struct {
		Results map[string]pythonResult `json:"results"`
	}
	s.python(version, "read_results.py", &answer, ids...)
	return answer.Results
}

// awaitRun waits until a run has ended (completed_at is set) in one of the
// statuses, and its last task is settled: its result is stored.
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

// states are a run's task states in plan order, older attempts first.
func (s *stack) states(run string) []record {
	s.t.Helper()
	return s.mustRows(`SELECT to_jsonb(t) FROM spec_workflow_task_states t WHERE orchestrator_run_id = $1 ORDER BY plan_step, attempt`, run)
}

// registered are a run's artifact rows in the order of the steps.
func (s *stack) registered(run string) []record {
	s.t.Helper()
	return s.mustRows(`SELECT to_jsonb(a) FROM orchestrator_run_artifacts a WHERE run_id = $1 ORDER BY created_at, path`, run)
}

// taskmeta are the result rows of the tasks that a run's states name and of
// those in ids, in the order of the steps.
func (s *stack) taskmeta(run string) []record {
	s.t.Helper()
	return s.mustRows(`SELECT to_jsonb(m) || jsonb_build_object(
			'args', convert_from(m.args, 'UTF8'), 'kwargs', convert_from(m.kwargs, 'UTF8'), 'result', encode(m.result, 'hex'),
			'children', convert_from(m.children, 'UTF8'), 'stamps', convert_from(m.stamps, 'UTF8'))
		FROM celery_taskmeta m WHERE convert_from(m.args, 'UTF8') LIKE '%' || $1 || '%' ORDER BY m.date_done, m.id`, run)
}

// summary is "step:status" of a run's states, with the attempt if it is not
// the first: short enough to be compared whole.
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

// files are the contents of a run's directory by relative name.
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

// lines are the lines of a file, none when it does not exist.
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
