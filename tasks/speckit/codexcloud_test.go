package speckit

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/codex"
	"github.com/moonladderstudios/mm-orchestrator/internal/codextest"
	"github.com/moonladderstudios/mm-orchestrator/internal/spectest"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

const cloudDiff = "diff --git a/docs/retry b/docs/retry\nnew file mode 100644\n--- /dev/null\n+++ b/docs/retry\n@@ -0,0 +1 @@\n+POST /retry\n"

// cloudChain is a chain with a stand-in of codex cloud.
type cloudChain struct {
	*chain
	stand *codextest.Cloud
}

func newCloudChain(t *testing.T, script codextest.CloudScript) *cloudChain {
	t.Helper()
	stand, err := codextest.NewCloud(t.TempDir(), script)
	if err != nil {
		t.Fatal(err)
	}
	c := &cloudChain{stand: stand}
	c.chain = newChain(t, spectest.Tasks(), func(config *Config) {
		cloud, err := codex.NewCloud(codex.CloudConfig{
			Program: stand.Program(), Environ: codex.Environment(os.Environ()), Environment: "env_1", FirstPoll: time.Millisecond, MaxPoll: 10 * time.Millisecond,
			CallLimit: 5 * time.Second, TimeLimit: 20 * time.Second, Logger: config.Logger,
		})
		if err != nil {
			t.Fatal(err)
		}
		config.TestMode = false
		config.Codex = CodexConfig{Cloud: cloud}
	})
	c.ownRun()
	return c
}

func (c *cloudChain) tasks() []codextest.CloudTask {
	c.t.Helper()
	state, err := c.stand.State()
	if err != nil {
		c.t.Fatal(err)
	}
	return state.Tasks
}

func TestCodexCloudDoesTheTask(t *testing.T) {
	t.Parallel()
	c := newCloudChain(t, codextest.CloudScript{Polls: 2, State: "READY", Diff: cloudDiff})
	c.ok(c.follow(store.SpecSubmit, c.ok(c.discover(discoverArgs{}))))
	if c.file("codex_1.patch") != cloudDiff || !strings.Contains(c.file("codex_1.jsonl"), `"status":"READY"`) {
		t.Errorf("patch is %s, log is %s", c.file("codex_1.patch"), c.file("codex_1.jsonl"))
	}
	if run := c.run(); run["codex_task_id"] != "task_e_0001" || run["codex_patch_path"] != c.path()+"/codex_1.patch" || run["status"] != "running" {
		t.Errorf("run is %v", run)
	}
	tasks := c.tasks()
	if len(tasks) != 1 || tasks[0].Branch != "main" || !strings.HasPrefix(tasks[0].Prompt, "[run "+c.runID+", attempt 1] T012") {
		t.Errorf("tasks are %+v", tasks)
	}
}

func TestWaysInWhichCodexCloudEnds(t *testing.T) {
	t.Parallel()
	signedOut := "Not signed in. Please run 'codex login' to sign in with ChatGPT, then re-run 'codex cloud'."
	for name, c := range map[string]struct {
		script codextest.CloudScript
		code   string
		tasks  int
	}{
		"no diff":                {codextest.CloudScript{State: "READY"}, "codex_no_change", 1},
		"an error":               {codextest.CloudScript{State: "ERROR"}, "codex_model_error", 1},
		"not logged in":          {codextest.CloudScript{Fail: map[string]string{"list": signedOut}}, "codex_not_logged_in", 0},
		"logged out":             {codextest.CloudScript{Fail: map[string]string{"status": signedOut}}, "codex_not_logged_in", 1},
		"a limit":                {codextest.CloudScript{Fail: map[string]string{"exec": "http error: create_task failed: POST https://chatgpt.com/backend-api/wham/tasks failed: 429 Too Many Requests; body={}"}}, "codex_limit", 0},
		"an answer that is lost": {codextest.CloudScript{State: "READY", Diff: cloudDiff, FailAfter: "http error: create_task failed: error sending request"}, "", 1},
		"a title of its own":     {codextest.CloudScript{State: "READY", Diff: cloudDiff, FailAfter: "http error: create_task failed: error sending request", Title: "Document retry"}, "codex_uncertain", 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			chain := newCloudChain(t, c.script)
			_, err := chain.follow(store.SpecSubmit, chain.ok(chain.discover(discoverArgs{})))
			if code := chain.payload(store.SpecSubmit, 1)["code"]; code != c.code && (c.code != "" || code != nil) || (c.code == "") != (err == nil) {
				t.Errorf("code is %v, error %v", code, err)
			}
			if tasks := chain.tasks(); len(tasks) != c.tasks {
				t.Errorf("%d tasks, want %d", len(tasks), c.tasks)
			}
		})
	}
}

// Wherever a worker dies, the next one finds the task and submits no second one.
func TestATaskOfCodexCloudIsSubmittedOnce(t *testing.T) {
	t.Parallel()
	for writes := 1; writes <= 3; writes++ {
		t.Run(fmt.Sprint(writes), func(t *testing.T) {
			t.Parallel()
			c := newCloudChain(t, codextest.CloudScript{Polls: 1, State: "READY", Diff: cloudDiff})
			if err := c.stand.Change(func(s *codextest.CloudState) { s.NewTask("env_1", "main", "somebody else's") }); err != nil {
				t.Fatal(err)
			}
			first := c.ok(c.discover(discoverArgs{}))
			alive, dying := c.config.Runs, c.db.Open(t, func(config *store.Config) { config.Worker = "dying@box" })
			c.config.Runs = &interrupted{Runs: dying, left: writes}
			if _, err := c.speckit().submit(c.task("submit"), contextArgs{first}); err == nil {
				t.Fatal("the task has ended")
			}
			dying.Close()
			if err := c.stand.Change(func(s *codextest.CloudState) { s.NewTask("env_1", "main", "somebody else's") }); err != nil {
				t.Fatal(err)
			}
			c.config.Runs = alive
			_, err := c.takeOver(func() (json.RawMessage, error) {
				return c.speckit().submit(c.task("submit"), contextArgs{first})
			})
			own := 0
			for _, task := range c.tasks() {
				if strings.Contains(task.Prompt, c.runID) {
					own++
				}
			}
			if err != nil || own != 1 {
				t.Errorf("%d tasks, %v", own, err)
			}
			if text, err := os.ReadFile(filepath.Join(c.root, c.path(), "codex_1.patch")); err != nil || string(text) != cloudDiff {
				t.Errorf("patch is %q, %v", text, err)
			}
		})
	}
}
