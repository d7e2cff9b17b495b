package codex_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/moonladderstudios/mm-orchestrator/codex"
	"github.com/moonladderstudios/mm-orchestrator/credential"
	"github.com/moonladderstudios/mm-orchestrator/internal/codextest"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/leaktest"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const apiKey = "sk-proj-Tb5Nq2Xw8Kz4Rj7Vd9Hm3Lc6"

// What a worker has and Codex must not get.
const (
	gitToken         = "ghp_Lq6Wz1Xv8Bn4Mk9Jh2Gf7Ds3Pa5To0Ri8Uy"
	databasePassword = "Kv7Yn3Qc9Zx2"
)

type key string

func (k key) Read(context.Context) (secret.String, error) { return secret.New(string(k)), nil }

// log is a writer that tests may read while it is written.
type log struct {
	mu    sync.Mutex
	text  bytes.Buffer
	wrote chan struct{}
}

func newLog() *log { return &log{wrote: make(chan struct{}, 1)} }

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case l.wrote <- struct{}{}:
	default:
	}
	return l.text.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// repository is a folder with a repository of git.
func repository(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	git(t, dir, "init", "--quiet")
	return dir
}

func git(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "git", args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %v: %v: %s", args, err, out)
	}
	return string(out)
}

// withModel makes the real program speak to a model with a script.
func withModel(t *testing.T, script codextest.Script, change ...func(*codex.ExecConfig)) (*codex.Exec, *codextest.Model) {
	t.Helper()
	model, err := codextest.StartModel(codextest.Always(script))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(model.Close)
	home := t.TempDir()
	if err := model.WriteHome(home, "CODEX_API_KEY"); err != nil {
		t.Fatal(err)
	}
	leaktest.Guard(t, leaktest.State{
		Secrets: map[string]string{"key": apiKey, "token": gitToken, "password": databasePassword}, Model: model, ModelSecrets: []string{"key"},
		Environments: map[string][]leaktest.Program{"key": {{Name: "codex", Children: true}}},
	})
	config := codex.ExecConfig{
		Program: devenv.Codex(t), Environ: append(codex.Environment(os.Environ()), "HOME="+home), Home: home, Key: key(apiKey), Sandbox: "danger-full-access",
	}
	for _, f := range change {
		f(&config)
	}
	return program(t, config), model
}

func program(t *testing.T, config codex.ExecConfig) *codex.Exec {
	t.Helper()
	e, err := codex.NewExec(config)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestTheModelsWorkIsInTheClone(t *testing.T) {
	t.Parallel()
	e, model := withModel(t, codextest.Changes("docs/retry", "POST /retry\n"))
	dir, out := repository(t), newLog()
	result, err := e.Run(t.Context(), codex.ExecRequest{Dir: dir, Prompt: "Do the task T012.", Log: out})
	if err != nil {
		t.Fatal(err)
	}
	if result.Outcome != codex.Finished || result.Message != "I have written docs/retry." || result.TaskID == "" || !strings.Contains(out.String(), `"thread_id":"`+result.TaskID+`"`) || result.Usage.Output == 0 {
		t.Errorf("result is %+v", result)
	}
	if text, err := os.ReadFile(filepath.Join(dir, "docs/retry")); err != nil || string(text) != "POST /retry\n" {
		t.Errorf("the clone has %q, %v", text, err)
	}
	if requests := model.Requests(); requests[0].Prompt != "Do the task T012." || requests[0].Key != apiKey || model.Turns() != 1 {
		t.Errorf("%d turns, first prompt %q", model.Turns(), requests[0].Prompt)
	}
	if !strings.Contains(out.String(), `"type":"turn.completed"`) {
		t.Errorf("log is %s", out)
	}
}

// Each way in which Codex ends is told apart, with the real program.
func TestOutcomes(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		script  codextest.Script
		outcome codex.Outcome
		message string
	}{
		"nothing to do":     {codextest.None, codex.Finished, "I have changed nothing"},
		"a question":        {codextest.Question, codex.Question, "Which of the two retry endpoints shall I document?"},
		"garbage":           {codextest.Rubbish, codex.Garbage, "stream closed before response.completed"},
		"401":               {codextest.Unauthorized, codex.NotLoggedIn, "401 Unauthorized"},
		"429":               {codextest.TooManyRequests, codex.Limited, "429 Too Many Requests"},
		"limit of the plan": {codextest.AccountLimit(3600), codex.Limited, "usage limit"},
		"quota":             {codextest.Script{Failure: "insufficient_quota"}, codex.Limited, "Quota exceeded"},
		"failure":           {codextest.Script{Failure: "server_error"}, codex.ModelError, "The model has failed"},
		"500":               {codextest.Script{Status: 500, Body: "{}"}, codex.ModelError, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, model := withModel(t, c.script)
			dir := repository(t)
			result, err := e.Run(t.Context(), codex.ExecRequest{Dir: dir, Prompt: "Do it.", Log: newLog()})
			if err != nil || result.Outcome != c.outcome || !strings.Contains(result.Message, c.message) {
				t.Errorf("got %+v, %v", result, err)
			}
			if n := len(model.Requests()); n > 6 {
				t.Errorf("%d requests", n)
			}
			if left := git(t, dir, "status", "--short"); left != "" {
				t.Errorf("the clone has changed: %s", left)
			}
		})
	}
}

func TestAStallEndsTheRun(t *testing.T) {
	t.Parallel()
	e, _ := withModel(t, codextest.Script{Commands: []string{"touch begun"}, Stall: true}, func(c *codex.ExecConfig) { c.StallLimit, c.KillGrace = 8*time.Second, time.Second })
	dir := repository(t)
	result, err := e.Run(t.Context(), codex.ExecRequest{Dir: dir, Prompt: "Do it.", Log: newLog()})
	if err != nil || result.Outcome != codex.Stalled || !strings.Contains(result.Message, "MM_ORCHESTRATOR_CODEX_STALL_LIMIT") || result.TaskID == "" {
		t.Errorf("got %+v, %v", result, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "begun")); err != nil {
		t.Error(err)
	}
}

// Whoever prints does not stall, however long it takes.
func TestOutputPutsAStallOff(t *testing.T) {
	t.Parallel()
	e := program(t, codex.ExecConfig{
		Program: script(t, `for n in $(seq 50); do echo '{"type":"turn.started"}'; sleep 0.1; done; echo '{"type":"turn.completed"}'`), Environ: codex.Environment(os.Environ()), StallLimit: 4 * time.Second,
	})
	if result, err := e.Run(t.Context(), codex.ExecRequest{Dir: t.TempDir(), Log: newLog()}); err != nil || result.Outcome != codex.Finished {
		t.Errorf("got %+v, %v", result, err)
	}
}

// What the commands of the model leave running ends with Codex.
func TestNothingSurvivesARun(t *testing.T) {
	t.Parallel()
	e, _ := withModel(t, codextest.Script{Commands: []string{"(setsid sh -c 'trap \"\" TERM; echo $$ >pid; sleep 600; :' >/dev/null 2>&1 &); until test -s pid; do sleep 0.02; done"}, Stall: true},
		func(c *codex.ExecConfig) { c.KillGrace = 500 * time.Millisecond })
	dir, out := repository(t), newLog()
	ctx, stop := context.WithCancelCause(t.Context())
	stopping := errors.New("the worker stops")
	ended := make(chan error, 1)
	go func() {
		_, err := e.Run(ctx, codex.ExecRequest{Dir: dir, Prompt: "Do it.", Log: out})
		ended <- err
	}()
	for !strings.Contains(out.String(), `"status":"completed"`) {
		select {
		case <-out.wrote:
		case err := <-ended:
			t.Fatalf("ended early: %v, log %s", err, out)
		}
	}
	stop(stopping)
	if err := <-ended; !errors.Is(err, stopping) {
		t.Errorf("error is %v", err)
	}
	pid, err := os.ReadFile(filepath.Join(dir, "pid"))
	if err != nil {
		t.Fatal(err)
	}
	if stat, err := os.ReadFile("/proc/" + strings.TrimSpace(string(pid)) + "/stat"); err == nil && !bytes.Contains(stat, []byte(") Z ")) {
		t.Errorf("a process of the model still runs: %s", stat)
	}
}

// The commands of the model do not get the key in their environment, and no list of
// processes shows it or the prompt.
func TestTheKeyIsForCodexOnly(t *testing.T) {
	t.Parallel()
	e, _ := withModel(t, codextest.Script{
		Commands: []string{"env >environment; for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline; echo; done >processes 2>/dev/null"}, Message: "done",
	}, func(c *codex.ExecConfig) {
		c.Environ = codex.Environment([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir(), "DATABASE_URL=postgres://u:" + databasePassword + "@h/d", "GITHUB_TOKEN=" + gitToken})
	})
	dir := repository(t)
	const prompt = "A prompt that is on no command line."
	if result, err := e.Run(t.Context(), codex.ExecRequest{Owner: processes.Owner{Run: "run", Step: "submit"}, Dir: dir, Prompt: prompt, Log: newLog()}); err != nil || result.Outcome != codex.Finished {
		t.Fatalf("got %+v, %v", result, err)
	}
	for _, file := range []string{"environment", "processes"} {
		text, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil || len(text) == 0 {
			t.Fatalf("%s: %v", file, err)
		}
		for _, hidden := range []string{apiKey, prompt, databasePassword, gitToken} {
			if bytes.Contains(text, []byte(hidden)) {
				t.Errorf("%s has %q", file, hidden)
			}
		}
	}
	if text, _ := os.ReadFile(filepath.Join(dir, "environment")); !bytes.Contains(text, []byte(processes.Variable+"=")) {
		t.Errorf("commands of the model cannot be found by %s", processes.Variable)
	}
}

// In the sandbox the model writes only into the clone and its own directory for temporary
// files: not beside the clone, where the worker's copy of the repository is, and not into
// /tmp. It does not see the environment of codex either.
func TestTheSandboxKeepsTheModelInTheClone(t *testing.T) {
	t.Parallel()
	root, err := os.MkdirTemp("", "mm-codex-sandbox-") // t.TempDir may be anywhere
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	dir := filepath.Join(root, "tree")
	if err := os.MkdirAll(filepath.Join(root, "repository.git"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	git(t, dir, "init", "--quiet")
	e, _ := withModel(t, codextest.Script{
		Commands: []string{"echo in >inside; echo t >$TMPDIR/temporary && cp $TMPDIR/temporary seen; echo x >../repository.git/config; echo x >../beside; tr '\\0' '\\n' </proc/$PPID/environ >environ; env >>environ; echo end"}, Message: "$OUTPUT",
	}, func(c *codex.ExecConfig) { c.Sandbox = "workspace-write" })
	result, err := e.Run(t.Context(), codex.ExecRequest{Dir: dir, TempDir: filepath.Join(root, "tmp"), Prompt: "Do it.", Log: newLog()})
	if err != nil || result.Outcome != codex.Finished {
		t.Fatalf("got %+v, %v", result, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "inside")); err != nil {
		t.Skipf("this machine has no sandbox: %s", result.Message)
	}
	if _, err := os.Stat(filepath.Join(dir, "seen")); err != nil {
		t.Errorf("temporary files: %v, %s", err, result.Message)
	}
	for _, name := range []string{"repository.git/config", "beside"} {
		if _, err := os.Stat(filepath.Join(root, name)); err == nil {
			t.Errorf("the model has written %s", name)
		}
	}
	if text, err := os.ReadFile(filepath.Join(dir, "environ")); err != nil || len(text) == 0 || bytes.Contains(text, []byte(apiKey)) {
		t.Errorf("environment that the model sees: %v, %s", err, text)
	}
}

// script is a program in place of codex.
func script(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "codex")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestHostilePrograms(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		text    string
		outcome codex.Outcome
		message string
	}{
		"says nothing":         {"exit 0", codex.Garbage, "exit status 0"},
		"prints no JSON":       {"cat >/dev/null; echo Hello; echo '{}'; exit 0", codex.Garbage, "0 of its lines were events and 2 were not"},
		"an unknown option":    {"echo 'error: unexpected argument --ephemeral' >&2; exit 2", codex.ModelError, "unexpected argument --ephemeral"},
		"ends before the turn": {`echo '{"type":"thread.started","thread_id":"t"}'; exit 3`, codex.Garbage, "exit status 3"},
		"fails after the turn": {`echo '{"type":"turn.completed"}'; exit 3`, codex.Garbage, "exit status 3"},
		"killed":               {`echo '{"type":"turn.started"}'; kill -9 $$`, codex.Garbage, "signal: killed"},
		"no line end":          {`printf '{"type":"item.completed","item":{"type":"agent_message","text":"done"}}\n{"type":"turn.completed"}'`, codex.Finished, "done"},
		"a huge line":          {`head -c 30000000 /dev/zero | tr '\0' a; echo; echo '{"type":"turn.completed"}'`, codex.Finished, ""},
		"ignores SIGTERM":      {"trap '' TERM; while :; do sleep 1; done", codex.TimedOut, "MM_ORCHESTRATOR_CODEX_TIME_LIMIT"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := program(t, codex.ExecConfig{Program: script(t, c.text), Environ: codex.Environment(os.Environ()), TimeLimit: 10 * time.Second, KillGrace: 100 * time.Millisecond})
			if c.outcome == codex.TimedOut {
				e = program(t, codex.ExecConfig{Program: script(t, c.text), Environ: codex.Environment(os.Environ()), TimeLimit: time.Second, KillGrace: 100 * time.Millisecond})
			}
			result, err := e.Run(t.Context(), codex.ExecRequest{Dir: t.TempDir(), Prompt: strings.Repeat("a long prompt\n", 10_000), Log: newLog()})
			if err != nil || result.Outcome != c.outcome || !strings.Contains(result.Message, c.message) {
				t.Errorf("got %+v, %v", result, err)
			}
		})
	}
}

func TestAMissingProgramIsNamed(t *testing.T) {
	t.Parallel()
	e := program(t, codex.ExecConfig{Program: "/nonexistent/codex"})
	if _, err := e.Run(t.Context(), codex.ExecRequest{Dir: t.TempDir(), Log: newLog()}); err == nil || !strings.Contains(err.Error(), "MM_ORCHESTRATOR_CODEX_PROGRAM") {
		t.Errorf("error is %v", err)
	}
}

// counter counts what it is given.
type counter struct {
	mu sync.Mutex
	n  int64
	// end is the last that it was given.
	end string
}

func (c *counter) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n += int64(len(p))
	c.end = string(p)
	return len(p), nil
}

// 256 MiB of output need neither memory nor disk.
func TestMuchOutput(t *testing.T) {
	e := program(t, codex.ExecConfig{
		// Lines of 32 KiB, of which each is read, and one of 128 MiB.
		Program: script(t, `cat >/dev/null; yes "$(head -c 32767 /dev/zero | tr '\0' a)" | head -c 134217728; head -c 134217728 /dev/zero | tr '\0' a; echo; echo '{"type":"turn.completed"}'`),
		Environ: codex.Environment(os.Environ()), MaxLog: 1 << 20,
	})
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	out := &counter{}
	result, err := e.Run(t.Context(), codex.ExecRequest{Dir: t.TempDir(), Log: out})
	runtime.ReadMemStats(&after)
	if err != nil || result.Outcome != codex.Finished {
		t.Errorf("got %+v, %v", result, err)
	}
	if out.n > 1<<20+200 || !strings.Contains(out.end, `"dropped_bytes":267386907`) {
		t.Errorf("%d bytes in the log, at its end %q", out.n, out.end)
	}
	if grown := int64(after.TotalAlloc) - int64(before.TotalAlloc); grown > 32<<20 {
		t.Errorf("%d MiB were allocated", grown>>20)
	}
}

type noKey struct{ err error }

func (k noKey) Read(context.Context) (secret.String, error) { return secret.String{}, k.err }

// Without a key Codex uses its login; a key that cannot be read is an error, with which
// nothing is started.
func TestWithoutAKeyCodexUsesItsLogin(t *testing.T) {
	t.Parallel()
	const text = `env >environment; cat >/dev/null; echo '{"type":"turn.completed"}'`
	run := func(err error) (string, error) {
		dir := t.TempDir()
		e := program(t, codex.ExecConfig{Program: script(t, text), Environ: codex.Environment(os.Environ()), Key: noKey{err}})
		_, err = e.Run(t.Context(), codex.ExecRequest{Dir: dir, Prompt: "Do it.", Log: newLog()})
		environment, _ := os.ReadFile(filepath.Join(dir, "environment"))
		return string(environment), err
	}
	if environment, err := run(fmt.Errorf("the variable is %w", credential.ErrNotSet)); err != nil || environment == "" || strings.Contains(environment, "CODEX_API_KEY") {
		t.Errorf("without a key: %v, environment %s", err, environment)
	}
	if environment, err := run(errors.New("the file does not exist")); err == nil || environment != "" {
		t.Errorf("a key that cannot be read: %v, environment %s", err, environment)
	}
}

func TestConfigurationIsChecked(t *testing.T) {
	t.Parallel()
	for want, config := range map[string]codex.ExecConfig{
		"Sandbox":   {Sandbox: "none"},
		"Home":      {Home: "relative"},
		"Overrides": {Overrides: []string{"model"}},
	} {
		if _, err := codex.NewExec(config); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

func ExampleEnvironment() {
	fmt.Println(codex.Environment([]string{"PATH=/bin", "DATABASE_URL=postgres://…", "CARGO_HOME=/cargo"}, "CARGO_HOME"))
	// Output: [PATH=/bin CARGO_HOME=/cargo]
}
