package preflight

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv("PREFLIGHT_STOPPED") != "" {
		beStopped()
		return
	}
	goleak.VerifyTestMain(m)
}

func answers(name string, results ...Result) Look {
	return Look{Name: name, At: name, Do: func(context.Context) []Result { return results }}
}

func hangs(name string, late Status) Look {
	return Look{Name: name, At: "the " + name, Late: late, LateCure: "Mend it", Do: func(ctx context.Context) []Result {
		<-ctx.Done()
		return refuse("another", "program was killed")
	}}
}

func never() bool { return false }

func texts(results []Result) string {
	var lines []string
	for _, r := range results {
		lines = append(lines, strings.TrimSpace(fmt.Sprintf("%s %s: %s", r.Look, r.Status, r.Text())))
	}
	return strings.Join(lines, "\n")
}

func same(t *testing.T, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestResultsAreInTheOrderOfTheLooks(t *testing.T) {
	t.Parallel()
	needs := func(look Look, names ...string) Look {
		look.Needs = names
		return look
	}
	got := Run(t.Context(), time.Minute, []Look{
		needs(answers("last", ok("z")...), "first", "not here"),
		answers("first", note("c", "a")[0], ok("b")[0]),
		answers("bad", refuse("mend", "broken")...),
		needs(answers("on the bad", ok("z")...), "bad"),
		needs(answers("on that", ok("z")...), "on the bad"),
	})
	same(t, texts(got), "last ok: z\nfirst note: a. c\nfirst ok: b\nbad refuse: broken. mend\non the bad skip: needs the check bad\non that skip: needs the check on the bad")
}

// A look of After only has to have ended.
func TestALookBeginsAfterAnother(t *testing.T) {
	t.Parallel()
	ended := false // read and written without a lock: the race detector finds an overlap
	first := Look{Name: "first", Do: func(context.Context) []Result { ended = true; return refuse("mend", "broken") }}
	second := Look{Name: "second", After: []string{"first", "not here"}, Do: func(context.Context) []Result { return ok("%v", ended) }}
	same(t, texts(Run(t.Context(), time.Minute, []Look{second, first})), "second ok: true\nfirst refuse: broken. mend")
}

// Whatever hangs, Run ends within its limit, with a result of each look.
func TestHangingLooksAreLate(t *testing.T) {
	t.Parallel()
	release, left := make(chan struct{}), make(chan struct{})
	stuck := Look{Name: "stuck", At: "the kernel", Do: func(context.Context) []Result {
		defer close(left)
		<-release // as a call that no context ends
		return ok("z")
	}}
	waits := answers("waits", ok("z")...)
	waits.At, waits.Needs = "the one that waits", []string{"stuck"}
	began := time.Now()
	got := run(t.Context(), 400*time.Millisecond, never, []Look{answers("quick", ok("a")...), hangs("engine", Refuse), hangs("list", ""), stuck, waits})
	if took := time.Since(began); took < 300*time.Millisecond || took > 2*time.Second {
		t.Errorf("took %s", took)
	}
	same(t, texts(got), "quick ok: a\nengine refuse: the engine gives no answer within 0.4 s. Mend it\nlist note: the list gives no answer within 0.4 s. Mend it\n"+
		"stuck note: the kernel gives no answer within 0.4 s\nwaits note: the one that waits gives no answer within 0.4 s")
	close(release)
	<-left
}

// On a machine with too much to do, a look has more time, but not without end.
func TestABusyMachineHasMoreTime(t *testing.T) {
	t.Parallel()
	const limit = 200 * time.Millisecond
	slow := Look{Name: "slow", At: "slow", Do: func(ctx context.Context) []Result {
		select {
		case <-ctx.Done():
			return refuse("", "ended")
		case <-time.After(3 * limit / 2):
			return ok("done")
		}
	}}
	always := func() bool { return true }
	got := run(t.Context(), limit, always, []Look{slow, hangs("git", Refuse)})
	if got[0].Status != OK || !got[1].Late {
		t.Errorf("%+v", got)
	}
	// For the engine it does not wait longer.
	engine := hangs("engine", Refuse)
	engine.Remote = true
	began := time.Now()
	run(t.Context(), 10*limit, always, []Look{answers("git", ok("x")...), engine})
	if took := time.Since(began); took > 20*limit {
		t.Errorf("took %s", took)
	}
}

func TestTheEndOfTheContextEndsTheLooks(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if got := Run(ctx, time.Hour, []Look{hangs("engine", Refuse)}); !got[0].Late {
		t.Errorf("%+v", got)
	}
}

// A process that was stopped has had no time: nothing is late because of that.
func TestAStoppedProcessLosesNoTime(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self)
	cmd.Env = append(os.Environ(), "PREFLIGHT_STOPPED=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	lines.Scan() // it looks
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	<-time.After(3 * stoppedLimit)
	if err := cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(in, "answer\n"); err != nil {
		t.Fatal(err)
	}
	lines.Scan()
	same(t, lines.Text(), "slow ok: it answers")
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

const stoppedLimit = time.Second

// beStopped is the process of TestAStoppedProcessLosesNoTime.
func beStopped() {
	fmt.Println(texts(run(context.Background(), stoppedLimit, never, []Look{{Name: "slow", At: "stdin", Do: func(context.Context) []Result {
		fmt.Println("looks")
		if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
			return refuse("", "%v", err)
		}
		return ok("it answers")
	}}})))
}

func TestWhatRefusesARun(t *testing.T) {
	t.Parallel()
	late := func(results []Result) []Result {
		results[0].Late = true
		return results
	}
	for _, test := range []struct {
		name  string
		looks []Look
		want  string
	}{
		{"nothing", []Look{answers("a", ok("x")...), answers("b", note("y", "x")...)}, ""},
		{"one", []Look{answers("a", ok("x")...), answers("b", refuse("mend", "broken")...)}, "Run refused before it changed anything: broken. mend"},
		{"two, one of them twice", []Look{answers("a", refuse("mend", "broken")...), answers("b", refuse("mend", "broken")...), answers("c", refuse("", "gone")...)},
			"Run refused before it changed anything, for 2 reasons:\n- broken. mend\n- gone"},
		{"only compose reaches an engine", []Look{answers(lookEngine, refuse("start it", "no engine")...), answers(lookComposeEngine, ok("x")...)}, ""},
		{"nobody reaches an engine", []Look{answers(lookEngine, refuse("start it", "no engine")...), answers(lookComposeEngine, refuse("start", "compose has none")...)},
			"Run refused before it changed anything: compose has none. start"},
		{"compose is slow", []Look{answers(lookEngine, ok("x")...), answers(lookTarget, ok("x")...), answers(lookComposeEngine, late(refuse("", "slow"))...)}, ""},
		{"the engine answers only a ping", []Look{answers(lookEngine, ok("x")...), answers(lookTarget, late(note("", "slow"))...), answers(lookComposeEngine, late(refuse("", "slow"))...)},
			"Run refused before it changed anything: slow"},
		{"slow, and no engine to ask", []Look{answers(lookComposeEngine, late(refuse("", "slow"))...)}, "Run refused before it changed anything: slow"},
	} {
		var results []Result
		for _, look := range test.looks {
			for _, result := range look.Do(t.Context()) {
				result.Look = look.Name
				results = append(results, result)
			}
		}
		refused, _ := Refusals(results)
		got := ""
		if len(refused) > 0 {
			got = Refusal(refused)
		}
		t.Run(test.name, func(t *testing.T) { same(t, got, test.want) })
	}
}

// A secret at the place where a text is cut leaves no part of it.
func TestTextsAreRedactedBeforeTheyAreCut(t *testing.T) {
	t.Parallel()
	const secret = "hunter2-is-not-a-good-password"
	s := Subject{Redact: func(text string) string { return strings.ReplaceAll(text, secret, "[REDACTED]") }}
	for before := 450; before < 510; before++ {
		if text := s.oneLine(strings.Repeat("x", before) + " " + secret); strings.Contains(text, "hun") {
			t.Errorf("with %d bytes before the secret: %s", before, text)
		}
	}
}
