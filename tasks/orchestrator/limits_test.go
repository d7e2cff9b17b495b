package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/policy"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// newLimitsEnv has a plan whose build runs a shell script, and a policy with limits for
// the service api, which begin in line 4 of the file.
func newLimitsEnv(t *testing.T, script string, limits ...string) *testEnv {
	t.Helper()
	b := newTestEnv(t)
	b.repository()
	b.file("svc/file", "x\n")
	b.config.Programs = []string{"do"}
	b.config.KillGrace = 200 * time.Millisecond
	b.program("do", script)
	b.program("docker", "true")
	b.limits(limits...)
	b.plan(`[{"name":"patch","parameters":{"commands":[["do","patch"]],"allowlist":["*"]}},
		{"name":"build","parameters":{"command":["do","build"]}},
		{"name":"restart","parameters":{"command":["do","restart"]}},
		{"name":"rollback","parameters":{"strategies":[{"name":"x","commands":[["do","rollback"]]}]}}]`)
	return b
}

func (b *testEnv) limits(limits ...string) {
	b.t.Helper()
	text := "services:\n  api:\n    limits:\n"
	for _, limit := range limits {
		text += "      " + limit + "\n"
	}
	var err error
	if b.config.Policy, err = policy.Parse("profiles.yaml", text); err != nil {
		b.t.Fatal(err)
	}
}

// processEnded says that a process does not run any more. Its pid is in a file of the
// workspace.
func (b *testEnv) processEnded(file string) bool {
	b.t.Helper()
	content, err := os.ReadFile(filepath.Join(b.workspace, file))
	if err != nil {
		b.t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(content)))
	if err != nil {
		b.t.Fatal(err)
	}
	return syscall.Kill(pid, 0) == syscall.ESRCH || zombie(pid)
}

func zombie(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(stat), ") Z ")
}

// background starts a process that survives a polite shell, and waits for its pid.
const background = `sh -c 'trap "" TERM HUP; echo $$ > child; while :; do sleep 60; done' & until [ -s child ]; do sleep 0.01; done
`

// Each limit ends the command with its children, and the failure says which it was.
func TestLimitsOfAStep(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		limit, script, want string
		// rule is that of the audit trail.
		rule audit.Rule
	}{
		"idle": {limit: "build: {idle: 1s}", script: background + "echo begun; sleep 60",
			want: "Command do build was ended: no output for 1s (limit idle of step build, service api, profiles.yaml:4): begun (see build.log)",
			rule: audit.Rule{Name: "limits.build.idle", Limit: "1s"}},
		"idle of every step": {limit: "everyStep: {idle: 1s}", script: background + "sleep 60",
			want: "Command do build was ended: no output for 1s (limit idle of step build, service api, profiles.yaml:4) (see build.log)",
			rule: audit.Rule{Name: "limits.everyStep.idle", Limit: "1s"}},
		"output": {limit: "build: {output: 1KiB}", script: background + "yes; sleep 60",
			want: "Command do build was ended: it wrote more than 1 KiB (limit output of step build, service api, profiles.yaml:4): ",
			rule: audit.Rule{Name: "limits.build.output", Limit: "1 KiB"}},
		"output to stderr": {limit: "build: {output: 1KiB}", script: background + "yes >&2",
			want: "Command do build was ended: it wrote more than 1 KiB (limit output of step build, service api, profiles.yaml:4): ",
			rule: audit.Rule{Name: "limits.build.output", Limit: "1 KiB"}},
		"disk": {limit: "build: {disk: 1MiB}", script: background + "dd if=/dev/zero of=svc/big bs=1k count=1028 2>/dev/null; sync svc/big; sleep 60",
			want: "Command do build was ended: workspace and artifacts have grown by ",
			rule: audit.Rule{Name: "limits.build.disk", Limit: "1 MiB"}},
		"disk by a child": {limit: "build: {disk: 1MiB}", script: "(dd if=/dev/zero of=svc/big bs=1M count=2 2>/dev/null; sync svc/big) & " + background + "sleep 60",
			want: ", more than 1 MiB (limit disk of step build, service api, profiles.yaml:4) (see build.log)",
			rule: audit.Rule{Name: "limits.build.disk", Limit: "1 MiB"}},
		"time": {limit: "build: {time: 1s}", script: background + "sleep 60",
			want: "Command do build was ended: the step took longer than 1s (limit time of step build, service api, profiles.yaml:4) (see build.log)",
			rule: audit.Rule{Name: "limits.build.time", Limit: "1s"}},
		"time of the run": {limit: "run: {time: 1s}", script: background + "sleep 60",
			want: "Command do build was ended: the steps of the run took longer than 1s (limit time of the run, service api, profiles.yaml:4) (see build.log)",
			rule: audit.Rule{Name: "limits.run.time", Limit: "1s"}},
		"output of the run": {limit: "run: {output: 1KiB}", script: background + "yes",
			want: "Command do build was ended: the commands of the run wrote more than 1 KiB (limit output of the run, service api, profiles.yaml:4): ",
			rule: audit.Rule{Name: "limits.run.output", Limit: "1 KiB"}},
		"disk of the run": {limit: "run: {disk: 1MiB}", script: background + "dd if=/dev/zero of=svc/big bs=1M count=2 2>/dev/null; sync svc/big; sleep 60",
			want: "more than 1 MiB (limit disk of the run, service api, profiles.yaml:4) (see build.log)",
			rule: audit.Rule{Name: "limits.run.disk", Limit: "1 MiB"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newLimitsEnv(t, test.script, test.limit)
			failure, _ := b.fail("build")
			if !strings.Contains(failure.Error(), test.want) {
				t.Errorf("text %s\nwant %s", failure.Error(), test.want)
			}
			if !b.processEnded("child") {
				t.Error("the command's child runs")
			}
			if log := b.artifact("build.log"); !strings.Contains(log, "(limit ") {
				t.Errorf("the log does not say it: %s", log)
			}
			b.limitInTrail(test.rule, "(limit ")
		})
	}
}

// What takes exactly the limit is within it.
func TestLimitsAreInclusive(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ limit, within, beyond string }{
		"output":            {"build: {output: 1KiB}", "head -c 1024 /dev/zero | tr '\\0' x", "head -c 1025 /dev/zero | tr '\\0' x"},
		"output, both":      {"build: {output: 1KiB}", "head -c 512 /dev/zero | tr '\\0' x; head -c 512 /dev/zero | tr '\\0' x >&2", "head -c 512 /dev/zero | tr '\\0' x; head -c 513 /dev/zero | tr '\\0' x >&2"},
		"output of the run": {"run: {output: 1KiB}", "head -c 1024 /dev/zero | tr '\\0' x", "head -c 1025 /dev/zero | tr '\\0' x"},
		"disk":              {"build: {disk: GROWNKiB}", "dd if=/dev/zero of=svc/big bs=1k count=1024 2>/dev/null; sync svc/big", "dd if=/dev/zero of=svc/big bs=1k count=1040 2>/dev/null; sync svc/big"},
		"disk of the run":   {"run: {disk: GROWNKiB}", "dd if=/dev/zero of=svc/big bs=1k count=1024 2>/dev/null; sync svc/big", "dd if=/dev/zero of=svc/big bs=1k count=1040 2>/dev/null; sync svc/big"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if strings.Contains(test.limit, "GROWN") {
				// The log is a file too: how much it takes depends on the file system.
				b := newLimitsEnv(t, test.within, "everyStep: {disk: 1GiB}")
				dirs := []string{b.workspace, b.base}
				before := diskUse(dirs)
				b.succeed("build")
				test.limit = strings.ReplaceAll(test.limit, "GROWN", strconv.FormatInt((diskUse(dirs)-before)/1024, 10))
			}
			b := newLimitsEnv(t, test.within, test.limit)
			b.succeed("build")
			b = newLimitsEnv(t, test.beyond, test.limit)
			if failure, _ := b.fail("build"); !strings.Contains(failure.Error(), "(limit ") {
				t.Error(failure)
			}
		})
	}
}

// A command that writes now and then is not idle, however long it takes.
func TestOutputResetsIdle(t *testing.T) {
	t.Parallel()
	b := newLimitsEnv(t, "for i in 1 2 3 4 5 6 7 8; do sleep 0.2; echo $i; done", "build: {idle: 1s}")
	b.succeed("build")
}

// The idle time counts from the last output, and exactly the limit is allowed.
func TestIdleIsExact(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		pauses []time.Duration // between outputs
		ended  time.Duration   // 0 if it was not ended
	}{
		{[]time.Duration{9 * time.Second, 10 * time.Second, 10 * time.Second}, 0},
		{[]time.Duration{9 * time.Second, 10*time.Second + 2}, 19*time.Second + 1},
		{[]time.Duration{11 * time.Second}, 10*time.Second + 1},
	} {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			ended := time.Duration(0)
			m := &meter{
				step: policy.StepLimits{Idle: 10 * time.Second}, now: time.Now, began: began,
				stopped: make(chan struct{}), woken: make(chan struct{}, 1), named: func(string) string { return "" },
				rule: func(string, string) audit.Rule { return audit.Rule{} },
				end:  func(error) { ended = time.Since(began) },
			}
			m.watching.Go(m.watchIdle)
			time.Sleep(time.Hour) // without a command nothing is idle
			began = time.Now()
			out, _, done := m.command(&lockedBuffer{}, &lockedBuffer{})
			for _, pause := range test.pauses {
				time.Sleep(pause)
				fmt.Fprint(out, "x")
			}
			_ = done()
			time.Sleep(time.Hour)
			close(m.stopped)
			m.watching.Wait()
			if ended != test.ended {
				t.Errorf("%v: ended after %s, want %s", test.pauses, ended, test.ended)
			}
		})
	}
}

// Output counts as the program writes it, and not what redaction makes of it. The log
// has what is within the limit.
func TestOutputCountsBeforeRedaction(t *testing.T) {
	t.Parallel()
	secret := strings.Repeat("a-secret-", 7) // 63 bytes, and the end of the line
	script := `for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do echo "$MY_TOKEN"; done; printf "$MORE"`
	b := newLimitsEnv(t, script, "build: {output: 1KiB}")
	b.config.Environ = append(b.config.Environ, "MY_TOKEN="+secret)
	b.succeed("build")
	if log := b.artifact("build.log"); len(log) > 512 {
		t.Errorf("the log has %d bytes: nothing is masked", len(log))
	}
	b.config.Environ = append(b.config.Environ, "MORE=x")
	failure, _ := b.fail("build")
	if !strings.Contains(failure.Error(), "(limit output of step build") || strings.Contains(failure.Error(), secret) {
		t.Error(failure)
	}
}

// The limits of a run count over its steps and its workers.
func TestLimitsOfARun(t *testing.T) {
	t.Parallel()
	t.Run("output", func(t *testing.T) {
		t.Parallel()
		b := newLimitsEnv(t, "head -c 400 /dev/zero | tr '\\0' x; touch svc/$1", "run: {output: 1KiB}")
		b.succeed("patch")
		b.succeed("build")
		failure, _ := b.fail("restart")
		if !strings.Contains(failure.Error(), "Command do restart was ended: the commands of the run wrote more than 1 KiB (limit output of the run, service api, profiles.yaml:4)") {
			t.Error(failure)
		}
		if used := b.recordedChange().Usage; used == nil || used.Output <= 1024 || used.Attempt != 1 {
			t.Errorf("recorded %+v", used)
		}
		// Another attempt starts anew.
		b.steps.attempt = 2
		b.succeed("build")
		b.succeed("restart")
		if used := b.recordedChange().Usage; used.Output != 800 || used.Attempt != 2 {
			t.Errorf("recorded %+v", used)
		}
	})
	t.Run("disk", func(t *testing.T) {
		t.Parallel()
		b := newLimitsEnv(t, "dd if=/dev/zero of=svc/$1 bs=1M count=1 2>/dev/null; sync svc/$1", "run: {disk: 2560KiB}")
		b.succeed("build")
		b.succeed("restart")
		failure, _ := b.fail("patch")
		if !strings.Contains(failure.Error(), "in the run, more than 2560 KiB (limit disk of the run, service api, profiles.yaml:4)") {
			t.Error(failure)
		}
	})
	t.Run("time", func(t *testing.T) {
		t.Parallel()
		b := newLimitsEnv(t, "sleep 1.5", "run: {time: 2.5s}")
		b.succeed("build")
		failure, _ := b.fail("restart")
		if !strings.Contains(failure.Error(), "the steps of the run took longer than 2.5s (limit time of the run, service api, profiles.yaml:4)") {
			t.Error(failure)
		}
	})
}

// A rollback takes nothing of the run's limits, and has its own.
func TestARollbackHasItsOwnLimits(t *testing.T) {
	t.Parallel()
	b := newLimitsEnv(t, "head -c 1500 /dev/zero | tr '\\0' x; test $1 != rollback || sleep 1.2; touch svc/$1", "run: {output: 1KiB, time: 1s, disk: 1KiB}", "everyStep: {output: 2KiB}")
	b.config.RollbackCommands = true
	if failure, _ := b.fail("build"); !strings.Contains(failure.Error(), "of the run") {
		t.Error(failure)
	}
	b.succeed("rollback")
	b.limits("rollback: {output: 1KiB}")
	if failure, _ := b.fail("rollback"); !strings.Contains(failure.Error(), "(limit output of step rollback, service api, profiles.yaml:4)") {
		t.Error(failure)
	}
}

func TestShortTexts(t *testing.T) {
	t.Parallel()
	for d, want := range map[time.Duration]string{
		10 * time.Minute: "10m", time.Hour: "1h", 90 * time.Second: "1m30s", 500 * time.Millisecond: "500ms", 100 * time.Second: "1m40s",
		10 * time.Second: "10s", 2*time.Hour + 30*time.Minute: "2h30m", 2*time.Hour + 5*time.Second: "2h0m5s", 0: "0s",
	} {
		if got := shortDuration(d); got != want {
			t.Errorf("%s is %s, want %s", d, got, want)
		}
	}
	for size, want := range map[int64]string{0: "0 bytes", 1000: "1000 bytes", 1 << 10: "1 KiB", 3 << 29: "1536 MiB", 1 << 30: "1 GiB", 1<<20 + 1: "1048577 bytes"} {
		if got := sizeText(size); got != want {
			t.Errorf("%d is %s, want %s", size, got, want)
		}
	}
}

// Names of one file count once, and so does a directory within another.
func TestDiskUse(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "a/b"), 0o755); err != nil {
		t.Fatal(err)
	}
	before := diskUse([]string{dir})
	file := filepath.Join(dir, "a/b/file")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(file, filepath.Join(dir, "other")); err != nil {
		t.Fatal(err)
	}
	for _, dirs := range [][]string{{dir}, {dir, filepath.Join(dir, "a")}, {filepath.Join(dir, "a"), dir}, {dir, filepath.Join(dir, "none")}} {
		if got := diskUse(dirs) - before; got < 1<<20 || got > 1<<20+64<<10 {
			t.Errorf("%q: grown by %d", dirs, got)
		}
	}
}

// A worker that takes a step over counts what was taken of the limits before.
func TestLimitsCountOverWorkers(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		limit, script string
		used          change.Usage
		want          string
	}{
		"time": {"run: {time: 10s}", "sleep 60", change.Usage{Attempt: 1, Time: 9 * time.Second, Step: "build"}, "(limit time of the run"},
		"output": {"run: {output: 1KiB}", "head -c 100 /dev/zero | tr '\\0' x", change.Usage{Attempt: 1, Output: 1000, Step: "build"},
			"(limit output of the run"},
		"disk": {"build: {disk: 1MiB}", "true", change.Usage{Attempt: 1, Step: "build"}, "(limit disk of step build"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newLimitsEnv(t, test.script, test.limit)
			test.used.DiskBefore = diskUse([]string{b.workspace})
			text, err := change.Record{Usage: &test.used}.Encode()
			if err != nil {
				t.Fatal(err)
			}
			b.steps.change.Record = text
			if name == "disk" {
				if err := os.WriteFile(filepath.Join(b.workspace, "of-the-worker-before"), make([]byte, 2<<20), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			b.steps.decision = store.Start{
				Claim: store.Claim{RunID: b.steps.run.ID, Step: store.StepBuild, Attempt: 1, TaskID: "task-1", Starts: 2, StartedAt: time.Now()}, Run: b.steps.run,
				Change: b.steps.change,
			}
			failure, _ := b.fail("build")
			if !strings.Contains(failure.Error(), test.want) {
				t.Error(failure)
			}
		})
	}
}

// A patch that a limit has ended is taken back like any other that has failed.
func TestAnEndedPatchIsRolledBack(t *testing.T) {
	t.Parallel()
	b := newLimitsEnv(t, "echo of the run > svc/file; echo more > svc/new; echo begun; sleep 60", "patch: {idle: 1s}", "run: {time: 1m}")
	b.git("add", ".")
	b.git("commit", "-q", "-m", "y")
	failure, _ := b.fail("patch")
	if want := "Command do patch was ended: no output for 1s (limit idle of step patch, service api, profiles.yaml:4): begun (see patch.log)"; failure.Error() != want {
		t.Errorf("text %s\nwant %s", failure, want)
	}
	if log := b.artifact("patch.log"); !strings.Contains(log, "begun\n[The command was ended: no output for 1s (limit idle of step patch, service api, profiles.yaml:4)]") {
		t.Errorf("log %s", log)
	}
	b.succeed("rollback")
	same(t, "file", b.text("svc/file"), "x\n")
	same(t, "status", b.status(), "")
}

// limitInTrail fails the test unless the trail says once that this limit was reached, and
// then that the command has ended without an exit code.
func (b *testEnv) limitInTrail(rule audit.Rule, text string) {
	b.t.Helper()
	var kinds []string
	for _, r := range b.steps.trail {
		switch {
		case r.Kind == audit.LimitReached && (*r.Rule != rule || !strings.Contains(r.Text, text)):
			b.t.Errorf("limit in the trail: %+v, %s; want %+v, %s", *r.Rule, r.Text, rule, text)
		case r.Kind == audit.CommandEnded && (r.Command.Exit != nil || r.Command.Ended == ""):
			b.t.Errorf("end in the trail: %+v", r.Command)
		}
		kinds = append(kinds, string(r.Kind))
	}
	if got := strings.Join(kinds, " "); !strings.Contains(got, "command-started limit-reached command-ended") || strings.Count(got, "limit-reached") != 1 {
		b.t.Errorf("trail has %s", got)
	}
}

// The limits that are not of the policy file are in the trail too: of the plan, of the
// setting, of the message and of the workers that may die.
func TestOtherLimitsInTheTrail(t *testing.T) {
	t.Parallel()
	t.Run("the plan", func(t *testing.T) {
		t.Parallel()
		b := newLimitsEnv(t, "sleep 60", "everyStep: {time: 1h}")
		b.plan(`[{"name":"build","parameters":{"command":["do","build"],"timeoutSeconds":0.5}}]`)
		b.fail("build")
		b.limitInTrail(audit.Rule{Name: "timeoutSeconds", Limit: "500ms"}, "the step took longer than its limit of 500ms")
	})
	t.Run("the message", func(t *testing.T) {
		t.Parallel()
		b := newLimitsEnv(t, "sleep 60", "everyStep: {time: 1h}")
		ctx, cancel := context.WithTimeoutCause(t.Context(), 500*time.Millisecond, errors.New("time limit (0.5s) exceeded"))
		defer cancel()
		o, err := New(b.config)
		if err != nil {
			t.Fatal(err)
		}
		_, err = o.Execute(ctx, Request{RunID: b.steps.run.ID, Step: "build", TaskID: "task-1"}, func(error) bool { return true })
		var failure *Failure
		if !errors.As(err, &failure) {
			t.Fatal(err)
		}
		last := b.steps.trail[len(b.steps.trail)-1]
		if last.Kind != audit.LimitReached || last.Rule.Name != "time limit of the message" || last.Text != "time limit (0.5s) exceeded" {
			t.Errorf("last record %+v", last)
		}
	})
	t.Run("the starts", func(t *testing.T) {
		t.Parallel()
		b := newLimitsEnv(t, "true", "everyStep: {time: 1h}")
		b.steps.decision = store.Start{
			Claim: store.Claim{RunID: b.steps.run.ID, Step: store.StepBuild, Attempt: 1, TaskID: "task-1", Starts: 4, StartedAt: time.Now()}, Run: b.steps.run,
		}
		b.fail("build")
		if last := b.steps.trail[len(b.steps.trail)-1]; last.Kind != audit.LimitReached || *last.Rule != (audit.Rule{Name: "MM_ORCHESTRATOR_MAX_STARTS", Limit: "3"}) {
			t.Errorf("last record %+v", last)
		}
	})
}
