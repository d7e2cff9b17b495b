//go:build unix

package processes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// trees are scripts that start processes which try to survive them. Each writes
// the pids of these to $PIDS.
var trees = map[string]string{
	"children": `sleep 600 & echo $! >>"$PIDS"; sleep 600 & echo $! >>"$PIDS"`,
	"ignores SIGTERM": `trap '' TERM
		sh -c 'trap "" TERM; echo $$ >>"$PIDS"; while :; do sleep 600; done' &
		until [ -s "$PIDS" ]; do sleep 0.01; done`,
	"a session of its own": `setsid sh -c 'echo $$ >>"$PIDS"; sleep 600 & echo $! >>"$PIDS"; wait' &
		until [ "$(wc -l <"$PIDS")" -ge 2 ]; do sleep 0.01; done`,
	"a daemon": `(setsid sh -c 'trap "" TERM; setsid sh -c "echo \$\$ >>\"$PIDS\"; exec sleep 600" </dev/null >/dev/null 2>&1 &' &)
		until [ -s "$PIDS" ]; do sleep 0.01; done`,
}

// hidden starts a daemon with an empty environment. It can be found only as an
// orphan that this process has adopted.
const hidden = `env -i PIDS="$PIDS" PATH="$PATH" setsid sh -c 'sh -c "echo \$\$ >>\"$PIDS\"; exec sleep 600" </dev/null >/dev/null 2>&1 &'
	until [ -s "$PIDS" ]; do sleep 0.01; done`

// An ending is how the script of runTree ends.
type ending int

const (
	// byItself: the script exits, and leaves its processes behind.
	byItself ending = iota
	// byContext: the context ends when all processes run.
	byContext
)

// runTree runs a script of trees to its end and returns the pids of its
// processes, and what the Runner has logged.
func runTree(t *testing.T, script string, how ending) (pids []int, log *bytes.Buffer) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "pids")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if how == byContext {
		script += "\necho complete; wait; sleep 600"
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out := &watcher{seen: make(chan struct{})}
	log = &bytes.Buffer{}
	r := Runner{Grace: 200 * time.Millisecond, Logger: slog.New(slog.NewTextHandler(log, nil))}
	cmd := exec.Command("sh", "-c", script)
	cmd.Env = append(os.Environ(), "PIDS="+file)
	cmd.Stdout = out
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx, Owner{"run", "build"}, cmd, nil) }()
	if how == byContext {
		<-out.seen
		cancel()
	}
	err := <-ended
	if how == byItself && err != nil {
		t.Errorf("error for a program that has exited with 0: %v", err)
	}
	text, _ := os.ReadFile(file)
	for _, word := range strings.Fields(string(text)) {
		pid, err := strconv.Atoi(word)
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	if len(pids) == 0 {
		t.Fatal("the script has started no processes")
	}
	return pids, log
}

// A watcher closes seen when "complete" was written to it.
type watcher struct {
	mu   sync.Mutex
	text bytes.Buffer
	once sync.Once
	seen chan struct{}
}

func (w *watcher) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.text.Write(p)
	if strings.Contains(w.text.String(), "complete") {
		w.once.Do(func() { close(w.seen) })
	}
	return len(p), nil
}

func alive(pid int) bool {
	p, exists := readProcess(pid)
	return exists && !p.zombie
}

func noneAlive(t *testing.T, pids []int) {
	t.Helper()
	for _, pid := range pids {
		if alive(pid) {
			p, _ := readProcess(pid)
			t.Errorf("process %d (%s) survives", pid, p.name)
			_ = p.send(9)
		}
	}
}

// This process does not adopt orphans here: the mark in the environment is what
// finds them.
func TestNothingSurvivesAProgram(t *testing.T) {
	t.Parallel()
	for name, script := range trees {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, how := range []ending{byContext, byItself} {
				pids, log := runTree(t, script, how)
				noneAlive(t, pids)
				if log.Len() > 0 {
					t.Errorf("logged: %s", log)
				}
			}
		})
	}
}

// inChild returns the command that runs this test once more, in a process of
// its own: there the children of other tests do not interfere.
func inChild(t *testing.T, environ ...string) *exec.Cmd {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "-test.run", "^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), append(environ, "TMPDIR="+t.TempDir())...)
	return cmd
}

// isChild is set in the environment of inChild's process.
const isChild = "PROCESSES_TEST_INSIDE"

func TestAProgramThatWasEndedHasNotSucceeded(t *testing.T) {
	for name, script := range map[string]string{
		"it exits with 0 on SIGTERM":               `trap 'exit 0' TERM; echo complete; while :; do sleep 0.01; done`,
		"it exits with 0 when its child is killed": `trap '' TERM; sleep 600 & echo complete; wait`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cause := errors.New("the worker stops")
			ctx, stop := context.WithCancelCause(t.Context())
			out := &watcher{seen: make(chan struct{})}
			cmd := exec.Command("sh", "-c", script)
			cmd.Stdout = out
			go func() {
				<-out.seen
				stop(cause)
			}()
			r := Runner{Grace: 50 * time.Millisecond, Logger: slog.New(slog.DiscardHandler)}
			err := r.Run(ctx, Owner{"run", "build"}, cmd, nil)
			var exit *exec.ExitError
			if !errors.Is(err, cause) && !errors.As(err, &exit) {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestOrphansAreFoundAndReaped(t *testing.T) {
	if os.Getenv(isChild) == "" {
		t.Parallel()
		if out, err := inChild(t, isChild+"=1").CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	stop, err := Adopt(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	scripts := []string{hidden}
	for _, script := range trees {
		scripts = append(scripts, script)
	}
	for _, script := range scripts {
		for _, how := range []ending{byContext, byItself} {
			pids, _ := runTree(t, script, how)
			noneAlive(t, pids)
		}
	}
	deadline := time.Now().Add(time.Minute)
	for {
		zombies := 0
		for _, p := range list() {
			if p.parent == os.Getpid() {
				zombies++
			}
		}
		if zombies == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d zombies were not reaped", zombies)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// The end of one step's program leaves the processes of another step's alone.
func TestProgramsOfTwoStepsAreDistinguished(t *testing.T) {
	if os.Getenv(isChild) == "" {
		t.Parallel()
		if out, err := inChild(t, isChild+"=1").CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	stop, err := Adopt(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	ctx, cancel := context.WithCancel(t.Context())
	file := filepath.Join(t.TempDir(), "pids")
	out := &watcher{seen: make(chan struct{})}
	cmd := exec.Command("sh", "-c", strings.ReplaceAll(trees["a daemon"], "$PIDS", file)+"\n"+strings.ReplaceAll(hidden, "$PIDS", file+"2")+"\necho complete; wait; sleep 600")
	cmd.Stdout = out
	ended := make(chan error, 1)
	go func() { ended <- Runner{Grace: time.Second}.Run(ctx, Owner{"one", "build"}, cmd, nil) }()
	<-out.seen
	pids, _ := runTree(t, trees["children"], byItself)
	noneAlive(t, pids)
	var other []int
	for _, name := range []string{file, file + "2"} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil {
			t.Fatal(err)
		}
		if !alive(pid) {
			t.Errorf("process of the other program in %s was ended", name)
		}
		other = append(other, pid)
	}
	cancel()
	<-ended
	noneAlive(t, other)
}

// The kernel ends the program of a killed worker. The next worker ends the rest
// of its processes, and leaves those of a living worker, and those without a
// mark, alone.
func TestLeftoversOfAKilledWorkerAreEnded(t *testing.T) {
	if os.Getenv(isChild) != "" {
		cmd := exec.Command("sh", "-c", trees["a daemon"]+"\n"+trees["a session of its own"]+`
			echo $$ >"$PIDS.program"; exec sleep 600`)
		_ = Runner{}.Run(context.Background(), Owner{"4b7c", "build"}, cmd, nil)
		return
	}
	t.Parallel()
	file := filepath.Join(t.TempDir(), "pids")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	start := func(pids string) *exec.Cmd {
		if err := os.WriteFile(pids, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := inChild(t, isChild+"=1", "PIDS="+pids)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	killed, living := start(file), start(file+"-living")
	read := func(name string) (pids []int) {
		t.Helper()
		deadline := time.Now().Add(time.Minute)
		for time.Now().Before(deadline) {
			program, _ := os.ReadFile(name + ".program")
			if strings.HasSuffix(string(program), "\n") {
				text, _ := os.ReadFile(name)
				for _, word := range strings.Fields(string(text) + string(program)) {
					pid, _ := strconv.Atoi(word)
					pids = append(pids, pid)
				}
				return pids
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Fatal("the script has started no processes")
		return nil
	}
	leftovers, ofLiving := read(file), read(file+"-living")
	program := leftovers[len(leftovers)-1]

	unmarked := exec.Command("sleep", "600")
	unmarked.Env = []string{Variable + "=1/2/3", "PATH=" + os.Getenv("PATH")}
	if err := unmarked.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, cmd := range []*exec.Cmd{unmarked, living} {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
		EndLeftovers(slog.New(slog.DiscardHandler))
		noneAlive(t, ofLiving)
	})

	_ = killed.Process.Kill()
	_ = killed.Wait()
	deadline := time.Now().Add(5 * time.Second)
	for alive(program) {
		if time.Now().After(deadline) {
			t.Fatal("the program survives its worker")
		}
		time.Sleep(time.Millisecond)
	}
	var log bytes.Buffer
	count := EndLeftovers(slog.New(slog.NewTextHandler(&log, nil)))
	noneAlive(t, leftovers)
	if strings.Count(log.String(), "\n") != count {
		t.Errorf("%d ended, log:\n%s", count, &log)
	}
	worker := fmt.Sprintf("worker_pid=%d", killed.Process.Pid)
	for line := range strings.Lines(log.String()) {
		if strings.Contains(line, worker) && !(strings.Contains(line, "run_id=4b7c") && strings.Contains(line, "step=build")) {
			t.Errorf("the log line does not name run and step: %s", line)
		}
	}
	if !strings.Contains(log.String(), worker) {
		// Workers in tests of other packages end leftovers too.
		t.Log("another worker of this machine has ended the leftovers first")
	}
	mustLive := func(pids ...int) {
		t.Helper()
		for _, pid := range pids {
			if !alive(pid) {
				t.Errorf("process %d of a living worker, or without a mark, was ended", pid)
			}
		}
	}
	mustLive(append(ofLiving, unmarked.Process.Pid)...)

	// Now the living worker has lost its claim: another one has taken the step over.
	discard := slog.New(slog.DiscardHandler)
	EndOtherWorkersPrograms(discard, "another run")
	mustLive(append(ofLiving, unmarked.Process.Pid)...)
	if EndOtherWorkersPrograms(discard, "4b7c") == 0 {
		t.Error("no program of the other worker was ended")
	}
	noneAlive(t, ofLiving)
	mustLive(unmarked.Process.Pid)
}

// KillWhen kills a program that has had its SIGTERM and uses its grace.
func TestKillDuringTheGrace(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	now := make(chan struct{})
	out := &watcher{seen: make(chan struct{})}
	cmd := exec.Command("sh", "-c", `trap 'echo complete' TERM; echo $$; while :; do sleep 1; done`)
	cmd.Stdout = &firstLine{then: cancel, next: out}
	ended := make(chan error, 1)
	go func() { ended <- Runner{Grace: time.Hour}.Run(KillWhen(ctx, now), Owner{"run", "build"}, cmd, nil) }()
	<-out.seen // the script has got its SIGTERM
	close(now)
	select {
	case err := <-ended:
		if err == nil || ExitCode(cmd.ProcessState) != -9 {
			t.Errorf("error %v, exit code %d, want -9", err, ExitCode(cmd.ProcessState))
		}
	case <-time.After(time.Minute):
		t.Fatal("the program survives")
	}
}

// firstLine calls a function at the first output.
type firstLine struct {
	then func()
	next io.Writer
}

func (f *firstLine) Write(p []byte) (int, error) {
	f.then()
	return f.next.Write(p)
}

func TestMarksThatCannotBeTrustedAreRefused(t *testing.T) {
	t.Parallel()
	me := self()
	if me.dead() {
		t.Error("this process counts as dead")
	}
	if m, ok := parseMark(me.String() + "/run/build/7"); !ok || m.worker != me || m.run != "run" || m.step != "build" {
		t.Errorf("%+v %v", m, ok)
	}
	for _, text := range []string{"", "x", "1.2.3", "1.2/run/build/1", ".2.3/run/build/1", "1.0.3/r/b/1", "1.-5.3/r/b/1", "1.2.0/r/b/1", "1.2.x/r/b/1", "1.2.3/r/b"} {
		if _, ok := parseMark(text); ok {
			t.Errorf("%q was taken for a mark", text)
		}
	}
	elsewhere := workerProcess{"1", identity{1 << 30, 5}}
	if elsewhere.dead() {
		t.Error("a process of another pid namespace counts as dead")
	}
	ended := me
	ended.started++
	if !ended.dead() {
		t.Error("another process with the same pid was taken for the worker")
	}
}

func TestStatIsParsedWithAnyName(t *testing.T) {
	t.Parallel()
	line := "42 (a) b (c) S 7 8 9 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 123456 1 1"
	if p, ok := parseStat([]byte(line)); !ok || p.pid != 42 || p.parent != 7 || p.group != 8 || p.started != 123456 || p.name != "a) b (c" {
		t.Errorf("%+v %v", p, ok)
	}
	for _, bad := range []string{"", "42", "42 (x", ") (", "42 (x) S 1 2", "x (y) S 7 8 9 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 123456"} {
		if _, ok := parseStat([]byte(bad)); ok {
			t.Errorf("%q was parsed", bad)
		}
	}
}

// Run reports the end of a program while its children are still alive and keep
// its output open.
func TestTheEndIsReportedAtOnce(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "pids")
	cmd := exec.Command("sh", "-c", `sleep 600 & echo $! >"$PIDS"; echo output; exit 3`)
	cmd.Env = append(os.Environ(), "PIDS="+file)
	var out bytes.Buffer
	cmd.Stdout = &out
	var pid, reported int
	err := Runner{}.Run(t.Context(), Owner{"run", "build"}, cmd, func(code int) {
		reported = code
		text, _ := os.ReadFile(file)
		pid, _ = strconv.Atoi(strings.TrimSpace(string(text)))
		if !alive(pid) {
			t.Error("reported after the child was ended")
		}
	})
	var exit *exec.ExitError
	if !errors.As(err, &exit) || reported != 3 || out.String() != "output\n" {
		t.Errorf("error %v, reported exit code %d, output %q", err, reported, &out)
	}
	noneAlive(t, []int{pid})
}

// What a program has left is a child of this process, so that the question for
// children finds it: dead or alive, of its group or not, with or without a mark.
func TestADescendantIsNeverOverlooked(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux can answer the question")
	}
	if os.Getenv(isChild) == "" {
		t.Parallel()
		if hasNoDescendants() {
			t.Error("a process that does not adopt knows about its descendants")
		}
		if out, err := inChild(t, isChild+"=1").CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	if err := becomeSubreaper(); err != nil {
		t.Fatal(err)
	}
	adopting.Store(true) // without what reaps
	if !hasNoDescendants() {
		t.Error("a process without a child has descendants")
	}
	for _, script := range []string{"sleep 600 &", "exit 0 &", "setsid sh -c 'sleep 600 & exit' &", "env -i sh -c 'sleep 600 & exit'"} {
		out, err := exec.Command("sh", "-c", "("+script+") >/dev/null 2>&1; echo $$").Output()
		if err != nil {
			t.Fatal(err)
		}
		if hasNoDescendants() {
			t.Errorf("what %q has left (%s) is overlooked", script, out)
		}
		for !hasNoDescendants() {
			for _, p := range list() {
				if p.parent == os.Getpid() {
					_ = p.send(9)
				}
			}
			var status syscall.WaitStatus
			_, _ = syscall.Wait4(-1, &status, 0, nil)
		}
	}
}

// BenchmarkRun has the price of a program that does nothing, in a process that adopts.
func BenchmarkRun(b *testing.B) {
	stop, err := Adopt(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	defer func() { stop(); adopting.Store(false) }()
	for b.Loop() {
		if err := (Runner{}).Run(b.Context(), Owner{"run", "build"}, exec.Command("true"), nil); err != nil {
			b.Fatal(err)
		}
	}
}
