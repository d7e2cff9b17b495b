package speckit

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/internal/leaktest"
	"github.com/moonladderstudios/mm-orchestrator/internal/spectest"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// logged is a log that may be read while it is written.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// noSecretIn fails the test if a piece of the token is in a text, in any spelling.
func noSecretIn(t *testing.T, what, text string) {
	t.Helper()
	if _, piece := leaktest.NewSearch(map[string]string{"token": gitToken, "secret": "very-secret-value"}).Find(text); piece != "" {
		t.Errorf("%s has %q of a secret", what, piece)
	}
}

// Names of features and lists of tasks that somebody may write into a message or into
// the repository. Each ends with a clear error and reads nothing outside of the root.
func TestHostileFeatures(t *testing.T) {
	t.Parallel()
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "tasks"+".md"), []byte("- [ ] T666 from outside, with very-secret-value\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	must := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	const escapes = "Invalid feature_key leading to path traversal"
	for name, test := range map[string]struct {
		feature string
		prepare func(t *testing.T, c *chain)
		want    string
	}{
		"two dots":           {"..", nil, escapes},
		"out of the root":    {"../" + filepath.Base(outside), nil, escapes},
		"out in the middle":  {"a/../../b", nil, escapes},
		"many dots":          {strings.Repeat("../", 40) + "etc", nil, escapes},
		"an absolute path":   {outside, nil, ""},
		"a NUL":              {"a\x00b", nil, ""},
		"a line break":       {"a\nb", nil, ""},
		"a long name":        {strings.Repeat("x", 4096), nil, ""},
		"no such feature":    {"nothing", nil, "Spec task file not found"},
		"dots of full width": {"\uff0e\uff0e/" + filepath.Base(outside), nil, "Spec task file not found"},
		"text backwards":     {"a\u202e/../..\u202d", nil, ""},
		"escaped slashes":    {"..%2f" + filepath.Base(outside), nil, "Spec task file not found"},
		"a command":          {"$(touch hostile-feature)`id`", nil, "Spec task file not found"},
		"an option":          {"--help", nil, "Spec task file not found"},
		"a home":             {"~root", nil, "Spec task file not found"},
		"escapes":            {"\x1b[2Ja", nil, ""},
		"bytes in a name":    {"a\xff\xfe", nil, ""},
		"a link into proc":   {"proc", func(t *testing.T, c *chain) { linkedList(t, c, "proc", "/proc/self/environ") }, escapes},
		"a link to memory":   {"memory", func(t *testing.T, c *chain) { linkedList(t, c, "memory", "/proc/self/mem") }, escapes},
		"one long line": {"line", func(t *testing.T, c *chain) {
			featureDir(t, c, "line")
			must(t, os.WriteFile(filepath.Join(c.root, "specs", "line", "tasks"+".md"), append([]byte("- [ ] T1 "), bytes.Repeat([]byte("x"), 9<<20)...), 0o644))
		}, ""},
		"a link out":       {"linked", func(t *testing.T, c *chain) { must(t, os.Symlink(outside, filepath.Join(c.root, "specs", "linked"))) }, escapes},
		"a linked list":    {"list", func(t *testing.T, c *chain) { linkedList(t, c, "list", filepath.Join(outside, "tasks"+".md")) }, escapes},
		"a linked device":  {"device", func(t *testing.T, c *chain) { linkedList(t, c, "device", "/dev/zero") }, ""},
		"a link to itself": {"loop", func(t *testing.T, c *chain) { linkedList(t, c, "loop", "tasks"+".md") }, ""},
		"a directory": {"dir", func(t *testing.T, c *chain) {
			must(t, os.MkdirAll(filepath.Join(c.root, "specs", "dir", "tasks"+".md"), 0o755))
		}, ""},
		"a pipe": {"pipe", func(t *testing.T, c *chain) {
			featureDir(t, c, "pipe")
			must(t, syscall.Mkfifo(filepath.Join(c.root, "specs", "pipe", "tasks"+".md"), 0o644))
		}, ""},
		"50 MB": {"large", func(t *testing.T, c *chain) {
			featureDir(t, c, "large")
			must(t, os.WriteFile(filepath.Join(c.root, "specs", "large", "tasks"+".md"), bytes.Repeat([]byte("- [x] T001 done and long\n"), 2<<20), 0o644))
		}, ""},
		"bytes that are no text": {"bytes", func(t *testing.T, c *chain) {
			featureDir(t, c, "bytes")
			must(t, os.WriteFile(filepath.Join(c.root, "specs", "bytes", "tasks"+".md"), []byte("- [ ] T1 \xff\xfe\n"), 0o644))
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			log := &logged{}
			c := newChain(t, spectest.Tasks(), func(config *Config) { config.TestMode = false; config.Logger = slog.New(slog.NewTextHandler(log, nil)) })
			if test.prepare != nil {
				test.prepare(t, c)
			}
			_, err := c.discover(discoverArgs{FeatureKey: &test.feature})
			if err == nil || !strings.Contains(err.Error(), test.want) || len(err.Error()) > 6000 {
				t.Fatalf("error %.300v", err)
			}
			if run := c.run(); run["status"] != "failed" || run["finished_at"] == nil {
				t.Errorf("run %v", run)
			}
			state := c.state(store.SpecDiscover, 1)
			if strings.Contains(fmt.Sprint(state), "T666") || state["status"] != "failed" {
				t.Errorf("row %v", state)
			}
			noSecretIn(t, "the row", fmt.Sprint(state, c.run()))
			noSecretIn(t, "the log", log.String())
			if left, err := os.ReadDir(filepath.Join(c.root, runPath)); err == nil && len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func featureDir(t *testing.T, c *chain, name string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(c.root, "specs", name), 0o755); err != nil {
		t.Fatal(err)
	}
}

func linkedList(t *testing.T, c *chain, name, target string) {
	t.Helper()
	featureDir(t, c, name)
	if err := os.Symlink(target, filepath.Join(c.root, "specs", name, "tasks"+".md")); err != nil {
		t.Fatal(err)
	}
}

// Names of repositories that a message may have: none reaches git, a shell or a server.
func TestHostileRepositories(t *testing.T) {
	t.Parallel()
	p := newPublishChain(t)
	p.store("drei")
	before := len(p.server.Requests("GET"))
	for i, name := range []string{
		"--upload-pack=touch${IFS}x/y", "-c/y", "octo/--upload-pack=x", "octo/-x", "octo/../widgets", "octo/..", "../octo/widgets", "octo/widgets/../../etc", "octo", "octo/", "/widgets",
		"octo/widgets.git", "octo/wid gets", "octo/widgets\nother", "octo/widgets;id", "octo/$(id)", "octo/`id`", "https://evil.example/octo", "ssh://evil/x", "file:///etc", "octo/" + strings.Repeat("x", 300), "octo/wid\x00gets",
	} {
		p.exec(`UPDATE spec_workflow_runs SET status = 'running', finished_at = NULL WHERE id = $1 RETURNING id`, recordedRun)
		o, err := parseObject(p.context(1))
		if err != nil {
			t.Fatal(err)
		}
		o.set("repository", name)
		_, err = p.speckit().publish(worker.ContextWithTask(t.Context(), &worker.Task{Message: &protocol.Message{ID: fmt.Sprint("task-", i)}}), contextArgs{o.compact()})
		if err == nil || !strings.Contains(err.Error(), "does not have the form owner/name") || len(err.Error()) > 1000 {
			t.Errorf("%.80q: error %.300v", name, err)
		}
		if run := p.run(); run["status"] != "failed" {
			t.Errorf("%.80q: run %v", name, run)
		}
	}
	if after := len(p.server.Requests("GET")); after != before || len(p.pulls.wanted) > 0 {
		t.Errorf("%d requests were sent, pull requests %v", after-before, p.pulls.wanted)
	}
	p.nothingLeft()
}

// Patches that a model may make. None changes anything, and none leaves a thing behind.
func TestHostilePatches(t *testing.T) {
	t.Parallel()
	link := func(name, target string) string {
		return fmt.Sprintf("diff --git a/%[1]s b/%[1]s\nnew file mode 120000\n--- /dev/null\n+++ b/%[1]s\n@@ -0,0 +1 @@\n+%[2]s\n\\ No newline at end of file\n", name, target)
	}
	for name, patch := range map[string]string{
		"git's configuration":      newFile(".git/config"),
		"git's hooks":              newFile(".git/hooks/pre-push"),
		"git in other letters":     newFile(".GIT/hooks/pre-push"),
		"git of another directory": newFile("docs/.git/config"),
		"a short name of git":      newFile("git~1/config"),
		"an absolute path":         newFile("/tmp/hostile-patch"),
		"out of the tree":          newFile("../outside"),
		"out in the middle":        newFile("docs/../../outside"),
		"through a link":           link("way", "/tmp") + newFile("way/hostile-patch"),
		"a submodule":              "diff --git a/sub b/sub\nnew file mode 160000\n--- /dev/null\n+++ b/sub\n@@ -0,0 +1 @@\n+Subproject commit 587be6b4c3f93f93c489c0111bba5596147a26cb\n",
		"a file that is not there": "diff --git a/none b/none\n--- a/none\n+++ b/none\n@@ -1 +1 @@\n-a\n+b\n",
		"cut off":                  "diff --git a/x b/x\nnew file mode 100644\n--- /dev/null\n+++ b/x\n@@ -0,0 +1,9 @@\n+a\n",
		"no patch":                 "I am sorry, I cannot do that.\n",
		"nothing":                  "",
		"another mailbox":          "From x\nSubject: hi\n\n---\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			log := &logged{}
			p := newPublishChain(t, func(config *Config) { config.Logger = slog.New(slog.NewTextHandler(log, nil)) })
			secrets := artifacts.NewRedactor(nil)
			secrets.Add(gitToken)
			p.config.Redactor.Add(gitToken)
			p.config.Codex.Secrets = secrets
			p.storeText(patch)
			_, err := p.publish(t.Context(), "task-1", 1)
			if err == nil || len(err.Error()) > 6000 {
				t.Fatalf("error %.300v", err)
			}
			var payload map[string]any
			text, jsonErr := json.Marshal(p.payload(store.SpecPublish, 1))
			if jsonErr == nil {
				jsonErr = json.Unmarshal(text, &payload)
			}
			if jsonErr != nil || payload["message"] == "" || p.run()["status"] != "failed" || len(p.pulls.wanted) > 0 {
				t.Errorf("payload %v, run %v, pull requests %v", payload, p.run(), p.pulls.wanted)
			}
			if branches := p.git("for-each-ref", "--format=%(refname)"); branches != "refs/heads/main" {
				t.Errorf("branches are %s", branches)
			}
			if _, err := os.Lstat("/tmp/hostile-patch"); err == nil {
				t.Error("a file was written outside of the tree")
			}
			noSecretIn(t, "the log", log.String())
			p.nothingLeft()
		})
	}
}
