package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/leaktest"
)

// testTimeout is how long a test waits for an expected event.
const testTimeout = time.Minute

// slowMachine is added to promised times, because a loaded machine is slower. A
// broken promise takes far longer than this.
const slowMachine = 5 * time.Second

// buildDir is the directory for built programs; TestMain creates and removes it.
var buildDir string

// built builds the program once, on first use, and returns its path.
var built = sync.OnceValues(func() (string, error) { return build("mm-orchestrator") })

// builtForChaos is built for the program with fault points.
var builtForChaos = sync.OnceValues(func() (string, error) { return build("chaos", "-tags", "chaos") })

func build(name string, flags ...string) (string, error) {
	path := filepath.Join(buildDir, name)
	args := append([]string{"build", "-o", path, "-ldflags", "-X main.version=v0.0.0-test"}, flags...)
	out, err := exec.Command("go", append(args, ".")...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
}

func TestMain(m *testing.M) {
	var err error
	if buildDir, err = os.MkdirTemp("", "mm-orchestrator-test"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		_ = os.RemoveAll(buildDir)
		os.Exit(code)
	}))
}

// process is a running mm-orchestrator.
type process struct {
	t      *testing.T
	cmd    *exec.Cmd
	stdout lockedBuffer
	stderr lockedBuffer
	ended  chan struct{}
	code   int // valid once ended is closed
}

type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// start runs the built program with exactly this environment.
func start(t *testing.T, env environment, args ...string) *process {
	t.Helper()
	path, err := built()
	if err != nil {
		t.Fatal(err)
	}
	return startProgram(t, path, env, args...)
}

func startProgram(t *testing.T, path string, env environment, args ...string) *process {
	t.Helper()
	p := &process{t: t, cmd: exec.Command(path, args...), ended: make(chan struct{})}
	p.cmd.Env = append(environment{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir()}, env...)
	p.cmd.Dir = t.TempDir()
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	if watch, is := watches.Load(t); is {
		output := watch.(*leaktest.Watch).Output(fmt.Sprintf("the output of mm-orchestrator %q", args))
		p.cmd.Stdout, p.cmd.Stderr = io.MultiWriter(&p.stdout, output), io.MultiWriter(&p.stderr, output)
	}
	p.cmd.WaitDelay = testTimeout // whoever inherits the output
	devenv.OwnGroup(p.cmd, syscall.SIGKILL)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.ended)
		var exit *exec.ExitError
		if err := p.cmd.Wait(); errors.As(err, &exit) {
			p.code = exit.ExitCode()
		} else if err != nil {
			p.code = -1
		}
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.ended
		if t.Failed() {
			t.Logf("stdout:\n%s\nstderr:\n%s", p.stdout.String(), p.stderr.String())
		}
	})
	return p
}

// exit waits for the end and returns the exit code.
func (p *process) exit() int {
	p.t.Helper()
	select {
	case <-p.ended:
		return p.code
	case <-time.After(testTimeout):
		p.t.Fatalf("%q still runs after %s", p.cmd.Args, testTimeout)
		return 0
	}
}

func (p *process) signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// logLine waits for a line of the JSON log with this message.
func (p *process) logLine(message string) map[string]any {
	p.t.Helper()
	var found map[string]any
	eventually(p.t, "log line "+message, func() error {
		for line := range strings.Lines(p.stderr.String()) {
			var entry map[string]any
			if json.Unmarshal([]byte(line), &entry) == nil && entry["msg"] == message {
				found = entry
				return nil
			}
		}
		select {
		case <-p.ended:
			p.t.Fatalf("the program ended with %d before it logged %q", p.code, message)
		default:
		}
		return errors.New("not logged")
	})
	return found
}

// eventually polls until check returns nil.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(testTimeout)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v, after %s", what, err, testTimeout)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// testEnv is what a worker needs: a broker, a database with all tables, and a
// workspace.
type testEnv struct {
	broker, database, workspace string
}

func newTestEnv(t *testing.T) testEnv {
	t.Helper()
	s := testEnv{broker: devenv.Broker(t), database: devenv.Database(t), workspace: t.TempDir()}
	if p := start(t, s.env(), "migrate", "--shared-tables"); p.exit() != exitOK {
		t.Fatalf("migrate: exit %d", p.code)
	}
	return s
}

func (s testEnv) env() environment {
	return environment{
		"CELERY_BROKER_URL=" + s.broker,
		"MM_ORCHESTRATOR_DATABASE_URL=" + s.database,
		"CELERY_RESULT_BACKEND=db+" + strings.Replace(s.database, "postgres://", "postgresql://", 1),
		"WORKSPACE_ROOT=" + s.workspace,
		"MM_ORCHESTRATOR_LISTEN=127.0.0.1:0",
		"MM_ORCHESTRATOR_QUIET_PERIOD=200ms",
		"MM_ORCHESTRATOR_LOG_FORMAT=json",
		"MM_ORCHESTRATOR_WAIT=0",
	}
}

// submit publishes a run by a real Celery producer and returns its id.
func (s testEnv) submit(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), devenv.Celery(t, "5.7.0"), append([]string{"submit_run.py", "--artifacts", filepath.Join(s.workspace, "artifacts")}, args...)...)
	cmd.Dir = filepath.Join("..", "..", "testdata", "producers")
	cmd.Env = append(os.Environ(), "CELERY_BROKER_URL="+s.broker, "CELERY_RESULT_BACKEND=db+"+strings.Replace(s.database, "postgres://", "postgresql+psycopg2://", 1), "PYTHONDONTWRITEBYTECODE=1")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("submit_run.py: %v\n%s", err, stderr.String())
	}
	var answer struct {
		RunID string `json:"run_id"`
	}
	if err := json.Unmarshal(out, &answer); err != nil {
		t.Fatal(err)
	}
	return answer.RunID
}

// run returns a run as the command runs shows it.
func (s testEnv) run(t *testing.T, id string) runDetail {
	t.Helper()
	p := start(t, s.env(), "runs", "--json", id)
	if code := p.exit(); code != exitOK {
		t.Fatalf("runs: exit %d: %s", code, p.stderr.String())
	}
	var detail runDetail
	if err := json.Unmarshal([]byte(p.stdout.String()), &detail); err != nil {
		t.Fatal(err)
	}
	return detail
}

// withURL returns a copy of a URL, changed by change.
func withURL(t *testing.T, text string, change func(*url.URL)) string {
	t.Helper()
	u, err := url.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	change(u)
	return u.String()
}
