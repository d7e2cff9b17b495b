package speckit

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/internal/codextest"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// victim is what a process needs that runs submit_codex_job and is killed.
type victim struct {
	Database, Root, Address, Work, Home string
	Context                             json.RawMessage
}

const victimVariable = "MM_TEST_SPECKIT_VICTIM"

// TestVictim is the process that TestAKilledWorkersCodexIsEnded kills.
func TestVictim(t *testing.T) {
	text := os.Getenv(victimVariable)
	if text == "" {
		t.Skip("it is run by TestAKilledWorkersCodexIsEnded")
	}
	var v victim
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatal(err)
	}
	runs, err := store.Open(t.Context(), store.Config{URL: secret.New(v.Database), Worker: "victim@box"})
	if err != nil {
		t.Fatal(err)
	}
	defer runs.Close()
	c := &codexChain{chain: &chain{t: t}, address: v.Address, work: v.Work, home: v.Home}
	config := Config{
		Runs: runs, Logger: slog.New(slog.NewTextHandler(t.Output(), nil)), Redactor: artifacts.NewRedactor(nil),
		TasksRoot: filepath.Join(v.Root, "specs"), Artifacts: artifacts.DirectoryConfig{WorkingDir: v.Root},
	}
	c.configure(t, &config, time.Minute)
	c.config = config
	_, err = c.speckit().submit(c.task("submit"), contextArgs{v.Context})
	t.Fatalf("the task has ended: %v", err)
}

// Codex of a worker that was killed ends with all that it has started before another
// worker starts it again, in a clone of its own.
func TestAKilledWorkersCodexIsEnded(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/proc/self/environ"); err != nil {
		t.Skip("it needs /proc")
	}
	reached, kept := make(chan struct{}), make(chan struct{})
	var first sync.Once
	script := codextest.Script{
		// The background process would change the patch if it lived on.
		Commands: []string{"echo 1 >>count; (setsid sh -c 'trap \"\" TERM; while :; do sleep 0.2; echo late >>count; done' >/dev/null 2>&1 &)"},
		Message:  "done",
		Before: func(done int) {
			if done == 1 {
				first.Do(func() {
					close(reached)
					<-kept
				})
			}
		},
	}
	second := codextest.Changes("docs/retry", "POST /retry\n")
	var mu sync.Mutex
	killed := false
	c := newCodexChain(t, func(codextest.Request) codextest.Script {
		mu.Lock()
		defer mu.Unlock()
		if killed {
			return second
		}
		return script
	})
	context := c.ok(c.discover(discoverArgs{}))
	text, err := json.Marshal(victim{c.db.URL, c.root, c.address, c.work, c.home, context})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestVictim$", "-test.v")
	cmd.Env = append(os.Environ(), victimVariable+"="+string(text))
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case <-reached:
	case err := <-ended:
		t.Fatalf("the victim has ended: %v: %s", err, out.String())
	}
	mu.Lock()
	killed = true
	mu.Unlock()
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	close(kept)
	<-ended
	if len(marked(c.runID)) == 0 {
		t.Error("nothing of the killed worker was running: the test shows nothing")
	}
	c.ok(c.takeOver(func() (json.RawMessage, error) {
		return c.speckit().submit(c.task("submit"), contextArgs{context})
	}))
	if left := marked(c.runID); len(left) > 0 {
		t.Errorf("still running: %v", left)
	}
	if turns := c.model.Turns(); turns != 2 {
		t.Errorf("%d runs of codex, want 2", turns)
	}
	payload := c.payload(store.SpecSubmit, 1)
	if fmt.Sprint(payload["codexRuns"]) != "2" || fmt.Sprint(payload["changedFiles"]) != "1" || payload["patchPath"] != c.path()+"/codex_1_2.patch" {
		t.Errorf("payload is %v", payload)
	}
	if text, err := os.ReadFile(filepath.Join(c.apply(c.path()+"/codex_1_2.patch"), "docs/retry")); err != nil || string(text) != "POST /retry\n" {
		t.Errorf("the patch has %q, %v", text, err)
	}
	if !strings.Contains(c.file("codex_1.jsonl"), "thread.started") {
		t.Error("the log of the killed worker's codex is lost")
	}
	c.noWorkLeft()
}

// marked are the processes that belong to a run.
func marked(run string) (list []string) {
	entries, _ := os.ReadDir("/proc")
	for _, entry := range entries {
		environ, err := os.ReadFile("/proc/" + entry.Name() + "/environ")
		if err != nil || !strings.Contains(string(environ), processes.Variable+"=") || !strings.Contains(string(environ), "/"+run+"/") {
			continue
		}
		line, _ := os.ReadFile("/proc/" + entry.Name() + "/cmdline")
		list = append(list, entry.Name()+" "+strings.ReplaceAll(string(line), "\x00", " "))
	}
	return list
}
