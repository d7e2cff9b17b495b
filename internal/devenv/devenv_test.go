package devenv

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// program is the devenv command.
var program string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "devenv-test-")
	if err != nil {
		panic(err)
	}
	program = filepath.Join(dir, "devenv")
	if out, err := exec.Command("go", "build", "-o", program, "./cmd/devenv").CombinedOutput(); err != nil {
		panic(err.Error() + ": " + string(out))
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		os.RemoveAll(dir)
		os.Exit(code)
	}))
}

// given returns an environment that names every part, so that a run starts only
// the command.
func given(t *testing.T, extra ...string) []string {
	t.Helper()
	environment := append(os.Environ(), "XDG_CACHE_HOME="+t.TempDir())
	for _, name := range []string{EnvBroker, EnvBrokerAPI, EnvDatabase, EnvPythonRoot, EnvCompose} {
		environment = append(environment, name+"=given-"+name)
	}
	return append(environment, extra...)
}

// ended waits until the process does not exist or is a zombie.
func ended(t *testing.T, pid int) {
	t.Helper()
	err := until(t.Context(), 15*time.Second, nil, func(context.Context) error {
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return nil
		}
		return errors.New("still running: " + string(stat))
	})
	if err != nil {
		t.Errorf("process %d has not ended: %v", pid, err)
	}
}

// published waits until the command has written a number to file, and returns
// it.
func published(t *testing.T, file string) (number int) {
	t.Helper()
	err := until(t.Context(), 30*time.Second, nil, func(context.Context) error {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		number, err = strconv.Atoi(strings.TrimSpace(string(text)))
		return err
	})
	if err != nil {
		t.Fatalf("the command has not written %s: %v", file, err)
	}
	return number
}

func TestRunReturnsTheCommandsExitCodeAndGivesItTheServices(t *testing.T) {
	t.Parallel()
	cmd := exec.CommandContext(t.Context(), program, "run", "-only", "compose,broker", "--", "sh", "-c", "echo $MM_TEST_BROKER_URL; exit 7")
	cmd.Env = given(t)
	out, err := cmd.Output()
	if exit := new(exec.ExitError); !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("exit: %v, want 7", err)
	}
	if strings.TrimSpace(string(out)) != "given-"+EnvBroker {
		t.Errorf("the command saw the broker %q", out)
	}
}

func TestRunEndsWhatTheCommandLeavesBehind(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "pid")
	// A session of its own: the command's process group does not include it.
	cmd := exec.CommandContext(t.Context(), program, "run", "-only", "compose,broker", "--",
		"sh", "-c", "setsid sleep 600 & echo $! > "+file)
	cmd.Env = given(t)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	ended(t, published(t, file))
}

func TestKilledRunLeavesNothing(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "pid")
	cmd := exec.Command(program, "run", "-only", "compose,broker", "--", "sh", "-c", "sleep 600 & echo $! > "+file+"; wait")
	cmd.Env = given(t)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := published(t, file)
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	cmd.Wait() // killed
	ended(t, pid)
}

func TestSignalReachesTheCommand(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "pid")
	cmd := exec.Command(program, "run", "-only", "compose,broker", "--",
		"sh", "-c", "trap 'exit 9' TERM; sleep 600 & echo $! > "+file+"; wait")
	cmd.Env = given(t)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := published(t, file)
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if exit := new(exec.ExitError); !errors.As(cmd.Wait(), &exit) || exit.ExitCode() != 9 {
		t.Errorf("exit code %d, want the command's 9", cmd.ProcessState.ExitCode())
	}
	ended(t, pid)
}

func TestUnknownPartIsNamed(t *testing.T) {
	t.Parallel()
	_, err := Up(t.Context(), Config{Only: []string{"redis"}, Output: t.Output()})
	if err == nil || !strings.Contains(err.Error(), `"redis"`) {
		t.Errorf("error %v does not name the part", err)
	}
}

func TestOldComposeIsRefused(t *testing.T) {
	t.Parallel()
	for version, good := range map[string]bool{
		"1.29.2": false, "2.25.0": false, "2.26.0": true, "2.26.1-4": true, "v5.6.0": true, "dev": false, "": false, "2": false,
	} {
		if atLeast(version, oldestCompose) != good {
			t.Errorf("version %q: accepted is %v", version, !good)
		}
	}
}

func TestReplaceSwapsWholeFolders(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	target, temporary := filepath.Join(dir, "target"), filepath.Join(dir, "new")
	for folder, content := range map[string]string{target: "old", temporary: "new"} {
		if err := os.Mkdir(folder, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(folder, "file"), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := replace(temporary, target); err != nil {
		t.Fatal(err)
	}
	if content, err := os.ReadFile(filepath.Join(target, "file")); err != nil || string(content) != "new" {
		t.Errorf("target holds %q, %v", content, err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("temporary folders were not removed: %v", left)
	}
}

func TestExportsAreQuotedForTheShell(t *testing.T) {
	t.Parallel()
	e := Environment{vars: map[string]string{"A": "it's"}}
	out, err := exec.CommandContext(t.Context(), "sh", "-c", e.Exports()+`printf %s "$A"`).Output()
	if err != nil || string(out) != "it's" {
		t.Errorf("the shell read %q, %v", out, err)
	}
}

func TestDatabaseAndBrokerAreNewForEachCall(t *testing.T) {
	t.Parallel()
	if one, other := Database(t), Database(t); one == other {
		t.Errorf("%s was given twice", one)
	}
	if one, other := Broker(t), Broker(t); one == other {
		t.Errorf("%s was given twice", one)
	}
}

func TestFreePortsAreOutsideOfTheKernelsRange(t *testing.T) {
	t.Parallel()
	ports, err := FreePorts(20)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[int]bool{}
	for _, port := range ports {
		if port >= 32768 || seen[port] {
			t.Errorf("port %d of %v", port, ports)
		}
		seen[port] = true
	}
	if len(seen) != 20 {
		t.Errorf("%d ports, want 20", len(seen))
	}
}
