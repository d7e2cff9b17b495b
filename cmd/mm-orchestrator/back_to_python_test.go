package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// pythonWorker is Celery's worker with a substitute for MoonMind's task.
type pythonWorker struct {
	t      *testing.T
	cmd    *exec.Cmd
	output *lockedBuffer
}

func (s testEnv) python(t *testing.T) pythonWorker {
	t.Helper()
	script, err := filepath.Abs(filepath.Join("..", "..", "internal", "chaos", "testdata", "python_worker.py"))
	if err != nil {
		t.Fatal(err)
	}
	w := pythonWorker{t: t, cmd: exec.Command(devenv.Celery(t, "5.7.0"), script, "python@box"), output: &lockedBuffer{}}
	w.cmd.Dir = s.workspace
	w.cmd.Env = append(os.Environ(), "CELERY_BROKER_URL="+s.broker, "CELERY_RESULT_BACKEND=db+"+strings.Replace(s.database, "postgres://", "postgresql+psycopg2://", 1), "PYTHONDONTWRITEBYTECODE=1")
	w.cmd.Stdout, w.cmd.Stderr = w.output, w.output
	devenv.OwnGroup(w.cmd, syscall.SIGKILL)
	if err := w.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-w.cmd.Process.Pid, syscall.SIGKILL)
		_ = w.cmd.Wait()
		if t.Failed() {
			t.Logf("python:\n%s", w.output.String())
		}
	})
	return w
}

// stop requests a warm shutdown by SIGTERM, as docker does, calls meanwhile, and waits
// until the worker has ended.
func (w pythonWorker) stop(meanwhile func()) {
	w.t.Helper()
	if err := w.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		w.t.Fatal(err)
	}
	eventually(w.t, "the Python worker stops", func() error {
		if !strings.Contains(w.output.String(), "Warm shutdown") {
			return errors.New("it does not say so")
		}
		return nil
	})
	meanwhile()
	ended := make(chan error, 1)
	go func() { ended <- w.cmd.Wait() }()
	select {
	case <-ended:
	case <-time.After(testTimeout):
		w.t.Fatalf("the Python worker still runs after %s", testTimeout)
	}
}

// From a Python worker to ours and back, with runs that share a workspace: no step is
// lost, and none runs twice.
func TestFromPythonWorkerToOursAndBack(t *testing.T) {
	t.Parallel()
	for _, end := range []string{"stopped in order", "killed"} {
		t.Run(end, func(t *testing.T) {
			t.Parallel()
			s := newTestEnv(t)
			dir := t.TempDir()
			ledger, hold := filepath.Join(dir, "ledger"), filepath.Join(dir, "hold")
			ledgerEntries := func(what string) (list []string) {
				text, _ := os.ReadFile(ledger)
				for line := range bytes.Lines(text) {
					if words := strings.Fields(string(line)); words[0] == what {
						list = append(list, words[1]+" "+words[2])
					}
				}
				return list
			}
			closeGate := func() {
				if err := os.WriteFile(hold, nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			openGate := func() {
				if err := os.Remove(hold); err != nil {
					t.Fatal(err)
				}
			}
			var want []string
			for i := range 9 {
				args := []string{"--without=analyze", "--without=patch", "--without=verify", "--without=rollback"}
				for _, step := range []string{"build", "restart"} {
					want = append(want, fmt.Sprintf("r%d %s", i, step))
					args = append(args, fmt.Sprintf(`--set=%s.command=["sh", "-c", "cd %s; echo begin r%d %s >>ledger; while [ -e hold ]; do sleep 0.02; done; echo end r%d %s >>ledger"]`, step, dir, i, step, i, step))
				}
				s.submit(t, args...)
			}

			// Python's worker runs a few steps, one of them while it stops.
			python := s.python(t)
			eventually(t, "Python has run a few steps", func() error {
				if n := len(ledgerEntries("end")); n < 2 {
					return fmt.Errorf("%d", n)
				}
				return nil
			})
			closeGate()
			python.stop(openGate)
			byPython := len(ledgerEntries("end"))
			if byPython > 8 {
				t.Fatalf("Python has run %d steps before it stopped: the test needs nine runs that go on", byPython)
			}

			// Ours has one run in the workspace, and parks the other eight.
			closeGate()
			worker := start(t, append(s.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sh"), "worker", "--concurrency=2")
			worker.logLine("worker ready")
			s.waitForParked(t, 8)
			eventually(t, "a step of ours runs", func() error {
				if n := len(ledgerEntries("begin")); n != byPython+1 {
					return fmt.Errorf("%d were started", n)
				}
				return nil
			})
			if end == "killed" {
				_ = worker.cmd.Process.Kill()
				worker.exit()
				openGate()
				p := start(t, s.env(), "parked", "return")
				if code := p.exit(); code != exitOK || !strings.Contains(p.stdout.String(), "8 messages returned to queue orchestrator.run, 0 still parked") {
					t.Fatalf("parked return: exit %d: %s%s", code, p.stdout.String(), p.stderr.String())
				}
			} else {
				worker.signal(syscall.SIGTERM)
				worker.logLine("stopping: running steps may finish; a second signal cancels them")
				openGate()
				if code := worker.exit(); code != exitOK {
					t.Errorf("exit code %d", code)
				}
				if n := worker.logLine("worker has stopped")["returned"]; n != 8.0 {
					t.Errorf("%v messages were returned", n)
				}
			}
			if n := s.queryInt(t, `SELECT count(*) FROM mm_orchestrator.parked`); n != 0 {
				t.Errorf("%d messages are parked", n)
			}

			// The schema is removed, and the Python worker finishes the runs.
			if p := start(t, s.env(), "migrate", "--remove"); p.exit() != exitOK {
				t.Errorf("migrate --remove: exit %d: %s", p.code, p.stderr.String())
			}
			python = s.python(t)
			eventually(t, "Python has done the rest", func() error {
				if n := s.queryInt(t, `SELECT count(*) FROM celery_taskmeta WHERE status = 'SUCCESS'`); n < len(want) {
					return fmt.Errorf("%d of %d results", n, len(want))
				}
				return nil
			})
			python.stop(func() {})
			got, started := ledgerEntries("end"), ledgerEntries("begin")
			slices.Sort(got)
			slices.Sort(started)
			if !slices.Equal(got, want) {
				t.Errorf("steps that ended: %q\nwant %q", got, want)
			}
			// The one that was killed has started twice.
			if n := len(started); end == "killed" && n != len(want)+1 || end != "killed" && n != len(want) {
				t.Errorf("%d steps have started: %q", n, started)
			}
			if n := s.queryInt(t, `SELECT count(*) FROM celery_taskmeta`); n != len(want) {
				t.Errorf("%d results, want %d", n, len(want))
			}
			if n := s.queryInt(t, `SELECT count(*) FROM spec_workflow_task_states WHERE plan_step_status = 'succeeded'`); n != len(want) {
				t.Errorf("%d steps have succeeded, want %d", n, len(want))
			}
			if left := s.queue(t).take("orchestrator.run"); len(left) != 0 {
				t.Errorf("%d messages are left in the queue", len(left))
			}
		})
	}
}
