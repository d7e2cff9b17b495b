package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

// `make demo` must show a repair and a rollback step by step, and leave nothing
// in the engine. Without a terminal it prints plain lines.
func TestDemoShowsARepairAndARollback(t *testing.T) {
	t.Parallel()
	text, err := demo(t, t.TempDir()).CombinedOutput()
	if err != nil {
		t.Fatalf("demo: %v\n%s", err, text)
	}
	for _, pattern := range []string{
		`(?m)^worker +ready on orchestrator\.run, prefetch 1 `,
		`(?m)^producer +celery 5\.7\.0 submitted run [0-9a-f]{8} `,
		`(?m)^  analyze +✓ `,
		`(?m)^  patch +✓ .*api_service/requirements\.txt  \+1 −0$`,
		`(?m)^  build +✓ .*api → sha256:[0-9a-f]{6} +\(was sha256:[0-9a-f]{6}\)$`,
		`(?m)^  restart +✓ .*only api was recreated$`,
		`(?m)^  verify +✓ .*200 from http://127\.0\.0\.1:\d+/health on attempt \d+, then 3s without a fault$`,
		`(?m)^succeeded in \d+\.\d s$`,
		`(?m)^  service +api: container [0-9a-f]{12} running, healthy; GET .*: 200 OK$`,
		`(?m)^  results +celery_taskmeta: 5 × SUCCESS, read back by AsyncResult in celery 5\.7\.0$`,
		`(?m)^  verify +✗ .*Health check for .* timed out after 6s`,
		`(?m)ModuleNotFoundError: No module named 'flask'$`,
		`(?m)^  rollback +✓ .*files as committed, image as before$`,
		`(?m)^rolled back in \d+\.\d s$`,
		`(?m)^  results +celery_taskmeta: 5 × SUCCESS, 1 × FAILURE, read back .*; get\(\) raises CommandExecutionError: Health check `,
	} {
		if !regexp.MustCompile(pattern).Match(text) {
			t.Errorf("the demo did not print %s", pattern)
		}
	}
	if bytes.ContainsRune(text, '\x1b') {
		t.Error("the demo prints terminal codes to a pipe")
	}
	if t.Failed() {
		t.Logf("%s", text)
	}
	requireNoSampleOf(t, text)
}

// Ctrl-C in the middle of the demo must end everything that it has started.
func TestDemoLeavesNothingOnCtrlC(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	command := demo(t, folder)
	var text lockedBuffer
	command.Stdout, command.Stderr = &text, &text
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- command.Wait() }()
	await(t, "the demo's first run", func() (bool, error) { return strings.Contains(text.String(), "submitted run"), nil })
	if err := command.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := <-exited; err != nil {
		t.Errorf("after SIGINT the demo ended with: %v\n%s", err, text.String())
	}
	requireNoSampleOf(t, []byte(text.String()))
}

func demo(t *testing.T, folder string) *exec.Cmd {
	t.Helper()
	program := filepath.Join(t.TempDir(), "demo")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", program, "./internal/demo")
	build.Dir = module
	if text, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the demo: %v\n%s", err, text)
	}
	return exec.Command(program, "-folder", folder)
}

// requireNoSampleOf checks that the engine has nothing of the demo that printed
// text.
func requireNoSampleOf(t *testing.T, text []byte) {
	t.Helper()
	name := regexp.MustCompile(`mm-demo-[0-9a-f]{6}`).Find(text)
	if name == nil {
		t.Fatalf("the demo does not name its project:\n%s", text)
	}
	for what, args := range map[string][]string{
		"containers": {"ps", "--all", "--quiet", "--filter", "label=com.docker.compose.project=" + string(name)},
		"images":     {"image", "ls", "--all", "--quiet", "--filter", "label=mm-orchestrator.sample=" + string(name)},
		"networks":   {"network", "ls", "--quiet", "--filter", "label=com.docker.compose.project=" + string(name)},
	} {
		command := exec.CommandContext(t.Context(), "docker", args...)
		command.Env = os.Environ()
		if left, err := command.Output(); err != nil || len(left) > 0 {
			t.Errorf("%s that the demo left: %q (%v)", what, left, err)
		}
	}
}
