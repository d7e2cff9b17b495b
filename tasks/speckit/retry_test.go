package speckit

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/codex"
	"github.com/moonladderstudios/mm-orchestrator/internal/codextest"
	"github.com/moonladderstudios/mm-orchestrator/internal/githubtest"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/internal/spectest"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
	"github.com/moonladderstudios/mm-orchestrator/tasks/speckit/preflight"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

const (
	createPull = "POST /api/v3/repos/octo/widgets/pulls"
	sendPush   = "POST /octo/widgets.git/git-receive-pack"
)

// retryChain is a whole chain, with Codex Cloud, a git server and a GitHub. Its retries
// are planned by what the first attempt has left in the database.
type retryChain struct {
	*publishChain
	stand *codextest.Cloud
	runs  *store.Store
	// checks are what the preflights find.
	checks *findings
}

func newRetryChain(t *testing.T) *retryChain {
	t.Helper()
	stand, err := codextest.NewCloud(t.TempDir(), codextest.CloudScript{State: "READY", Diff: diffOf("three", "drei")})
	if err != nil {
		t.Fatal(err)
	}
	c := &retryChain{publishChain: newGitHubChain(t), stand: stand}
	cloud, err := codex.NewCloud(codex.CloudConfig{
		Program: stand.Program(), Environ: codex.Environment(os.Environ()), Environment: "env_1", FirstPoll: time.Millisecond, MaxPoll: 10 * time.Millisecond, Logger: c.config.Logger,
	})
	if err != nil {
		t.Fatal(err)
	}
	c.config.Codex = CodexConfig{Cloud: cloud}
	c.checks = &findings{reports: []preflight.Report{checkFinds(preflight.Valid)}}
	c.config.Preflight = c.checks
	// What spec retry needs besides (docs/spec-workflow.md#how-to-run-it).
	more := store.Privilege{Object: "spec_workflow_runs", Name: "UPDATE", Columns: []string{"celery_chain_id"}}
	role := c.db.Role(t, "retrier", storetest.Grants(slices.Concat(store.SpecPrivileges(nil), []store.Privilege{more})...)...)
	c.runs = c.db.Open(t, func(config *store.Config) { config.URL = secret.New(role) })
	c.exec(`UPDATE spec_workflow_runs SET status = 'pending', phase = 'discover' RETURNING id`)
	return c
}

func checkFinds(github preflight.Status) preflight.Report {
	return preflight.Report{Codex: preflight.Finding{Status: preflight.Valid}, GitHub: preflight.Finding{Status: github, Message: "as the test wants it"}}
}

// diffOf is what Codex Cloud prints: no commit stands before it.
func diffOf(before, after string) string {
	_, diff, _ := strings.Cut(patchOf("", before, after), "\n\n")
	return diff
}

// carryOut carries out a chain until a task of it fails.
func (c *retryChain) carryOut(start Start) (err error) {
	c.t.Helper()
	var result json.RawMessage
	if start.Task == TaskDiscover {
		args := discoverArgs{}
		for _, kwarg := range start.Kwargs {
			switch value := kwarg.Value.(type) {
			case int:
				args.Attempt = value
			case string:
				if kwarg.Name == "feature_key" {
					args.FeatureKey = &value
				}
			}
		}
		result, err = c.discover(args)
	} else {
		result, err = c.follow(taskNamed(start.Task), start.Args[0])
	}
	for _, name := range start.Next {
		if err == nil {
			result, err = c.follow(taskNamed(name), result)
		}
	}
	return err
}

func taskNamed(name string) store.SpecTask {
	for task, of := range names {
		if of == name {
			return task
		}
	}
	return ""
}

// begin carries out the chain of a new run.
func (c *retryChain) begin() error { return c.carryOut(c.config.NewRun(recordedRun, feature)) }

// retry retries the run as the command does, and returns the first task of the retry.
func (c *retryChain) retry(mode RetryMode) (store.SpecTask, error) {
	c.t.Helper()
	if run := c.run(); run["status"] != "failed" {
		c.t.Fatalf("the run is %s before the retry", run["status"])
	}
	var retry Retry
	if err := c.runs.RetrySpecRun(c.t.Context(), recordedRun, func(d store.SpecRunDetail) (store.SpecRetry, error) {
		var err error
		retry, err = c.config.PlanRetry(d, mode, "again", filepath.Join(c.root, runPath))
		return store.SpecRetry{From: retry.From, Attempt: retry.Attempt, ChainID: protocol.NewID()}, err
	}); err != nil {
		c.t.Fatal(err)
	}
	return retry.From, c.carryOut(retry.Start)
}

// retried fails the test unless a retry from where the run has failed succeeds.
func (c *retryChain) retried() store.SpecTask {
	c.t.Helper()
	from, err := c.retry(ResumeFailedTask)
	if err != nil || c.run()["status"] != "succeeded" {
		c.t.Fatalf("the retry from %s: %v; the run is %v", from, err, c.run())
	}
	return from
}

// asked is how often Codex was asked.
func (c *retryChain) asked() int {
	c.t.Helper()
	state, err := c.stand.State()
	if err != nil {
		c.t.Fatal(err)
	}
	return len(state.Tasks)
}

// digest is that of the recorded patch, "" for none.
func (c *retryChain) digest() string {
	c.t.Helper()
	rows := c.exec(`SELECT digest FROM workflow_artifacts WHERE path = $1 AND artifact_type = 'codex_patch'`, patchPath)
	if len(rows) == 0 {
		return ""
	}
	return fmt.Sprint(rows[0]["digest"])
}

// publishedOnce fails the test unless one branch has one commit, with the change, and one
// pull request is open.
func (c *retryChain) publishedOnce() {
	c.t.Helper()
	if branches := c.git("for-each-ref", "--format=%(refname:lstrip=2)"); branches != "main\n"+taskBranch {
		c.t.Errorf("branches are %q", branches)
	}
	if n := c.git("rev-list", "--count", "main.."+taskBranch); n != "1" || c.git("rev-parse", taskBranch+"^") != c.git("rev-parse", "main") {
		c.t.Errorf("the branch has %s commits of its own", n)
	}
	if text, err := c.server.Read(c.t.Context(), "octo/widgets", taskBranch, "docs/api"); err != nil || !strings.Contains(text, "drei") {
		c.t.Errorf("docs/api is %q, %v", text, err)
	}
	open := c.open()
	if len(open) != 1 || open[0].Head != taskBranch || !strings.HasSuffix(fmt.Sprint(c.run()["pr_url"]), fmt.Sprintf("/pull/%d", open[0].Number)) {
		c.t.Errorf("open are %+v, and the run has %v", open, c.run()["pr_url"])
	}
	c.nothingLeft()
}

func (c *retryChain) refuse(request string) {
	fault := githubtest.Text(http.StatusForbidden, "Permission denied")
	if strings.Contains(request, "/api/") {
		fault = githubtest.Status(http.StatusForbidden, "Resource not accessible by personal access token")
	}
	c.server.Fail(request, 1, fault)
}

// Whatever fails, a retry goes on from there. What was done before is not done again: with
// the patch of an earlier attempt, Codex is not asked.
func TestARetryGoesOnFromEachStage(t *testing.T) {
	t.Parallel()
	for what, test := range map[string]struct {
		cause func(*retryChain)
		cure  func(*retryChain)
		code  string
		from  store.SpecTask
		asked int
	}{
		"discovery": {func(c *retryChain) {
			if err := os.Remove(filepath.Join(c.root, "specs", feature, "tasks.md")); err != nil {
				c.t.Fatal(err)
			}
		}, func(c *retryChain) { c.writeTasks(spectest.Tasks()) }, "discover_next_phase_failed", store.SpecDiscover, 1},
		"the check before Codex": {func(c *retryChain) {
			c.checks.reports = []preflight.Report{checkFinds(preflight.Invalid), checkFinds(preflight.Valid)}
		}, nil, "submit_codex_job_failed", store.SpecSubmit, 1},
		"Codex": {func(c *retryChain) { c.script(func(s *codextest.CloudScript) { s.State = "ERROR" }) },
			func(c *retryChain) { c.script(func(s *codextest.CloudScript) { s.State = "READY" }) }, "codex_model_error", store.SpecSubmit, 2},
		"the check before publishing": {func(c *retryChain) {
			c.checks.reports = []preflight.Report{checkFinds(preflight.Valid), checkFinds(preflight.Invalid), checkFinds(preflight.Valid)}
		}, nil, "apply_and_publish_failed", store.SpecPublish, 1},
		"the clone":        {func(c *retryChain) { c.refuse("GET /octo/widgets.git/info/refs?service=git-upload-pack") }, nil, "clone_failed", store.SpecPublish, 1},
		"the push":         {func(c *retryChain) { c.refuse(sendPush) }, nil, "push_failed", store.SpecPublish, 1},
		"the pull request": {func(c *retryChain) { c.refuse(createPull) }, nil, "pull_request_failed", store.SpecPublish, 1},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			c := newRetryChain(t)
			test.cause(c)
			if err := c.begin(); err == nil {
				t.Fatal("the run has succeeded")
			}
			if code := c.payload(test.from, 1)["code"]; code != test.code {
				t.Errorf("code is %v, want %s", code, test.code)
			}
			before, asked := c.digest(), c.asked()
			if test.cure != nil {
				test.cure(c)
			}
			if from := c.retried(); from != test.from {
				t.Errorf("the retry has begun at %s, want %s", from, test.from)
			}
			if c.asked() != test.asked {
				t.Errorf("Codex was asked %d times, want %d", c.asked(), test.asked)
			}
			if test.from == store.SpecPublish {
				if before == "" || c.digest() != before || c.asked() != asked {
					t.Errorf("the recorded patch has the digest %s, and had %q", c.digest(), before)
				}
				if payload := c.payload(store.SpecPublish, 2); payload["resumed"] != true || payload["patchPath"] != patchPath {
					t.Errorf("payload is %v", payload)
				}
			}
			c.publishedOnce()
		})
	}
}

// script changes what Codex Cloud does.
func (c *retryChain) script(change func(*codextest.CloudScript)) {
	c.t.Helper()
	if err := c.stand.Change(func(s *codextest.CloudState) { change(&s.Script) }); err != nil {
		c.t.Fatal(err)
	}
}

// Without the patch that was recorded nothing is published, and the run says what to do:
// it works.
func TestARetryWithoutTheRecordedPatch(t *testing.T) {
	t.Parallel()
	for what, test := range map[string]struct {
		change func(path string) error
		want   string
	}{
		"missing":   {os.Remove, "does not exist any more: retry the run from discovery"},
		"changed":   {func(path string) error { return os.WriteFile(path, []byte(diffOf("three", "evil")), 0o644) }, "has changed since it was recorded"},
		"shortened": {func(path string) error { return os.Truncate(path, 100) }, "has changed since it was recorded"},
		"a link to the same text": {func(path string) error {
			if err := os.Rename(path, path+".moved"); err != nil {
				return err
			}
			return os.Symlink(path+".moved", path)
		}, "is not a regular file: retry the run from discovery"},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			c := newRetryChain(t)
			c.refuse(sendPush)
			if err := c.begin(); err == nil {
				t.Fatal("the run has succeeded")
			}
			if err := test.change(filepath.Join(c.root, patchPath)); err != nil {
				t.Fatal(err)
			}
			from, err := c.retry(ResumeFailedTask)
			if from != store.SpecPublish || err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), "retry the run from discovery") {
				t.Errorf("the retry from %s: %v, want %q", from, err, test.want)
			}
			if branches := c.git("for-each-ref", "--format=%(refname)"); branches != "refs/heads/main" || len(c.open()) > 0 || c.run()["status"] != "failed" {
				t.Errorf("branches %s, pull requests %+v, run %v", branches, c.open(), c.run())
			}
			if from, err := c.retry(RestartFromDiscovery); from != store.SpecDiscover || err != nil {
				t.Errorf("the retry from %s: %v", from, err)
			}
			if c.asked() != 2 || c.run()["codex_patch_path"] != runPath+"/codex_2.patch" {
				t.Errorf("Codex was asked %d times; the run is %v", c.asked(), c.run())
			}
			c.publishedOnce()
		})
	}
}

func TestARetryAfterTheBaseBranchHasMoved(t *testing.T) {
	t.Parallel()
	t.Run("elsewhere", func(t *testing.T) {
		t.Parallel()
		c := newRetryChain(t)
		c.refuse(createPull)
		if err := c.begin(); err == nil {
			t.Fatal("the run has succeeded")
		}
		c.other()
		c.retried()
		if c.asked() != 1 {
			t.Errorf("Codex was asked %d times", c.asked())
		}
		c.publishedOnce()
	})
	t.Run("at the same lines", func(t *testing.T) {
		t.Parallel()
		c := newRetryChain(t)
		c.refuse(createPull)
		if err := c.begin(); err == nil {
			t.Fatal("the run has succeeded")
		}
		before := c.git("rev-parse", taskBranch)
		if _, err := c.server.Commit(t.Context(), "octo/widgets", "main", "later", map[string]string{"docs/api": "one\ntwo\ntrois\nfour\nfive\n"}); err != nil {
			t.Fatal(err)
		}
		_, err := c.retry(ResumeFailedTask)
		if err == nil || !strings.Contains(err.Error(), "Retry the run from discovery") || c.payload(store.SpecPublish, 2)["code"] != "apply_conflict" {
			t.Errorf("got %v, payload %v", err, c.payload(store.SpecPublish, 2))
		}
		if now := c.git("rev-parse", taskBranch); now != before || len(c.open()) > 0 {
			t.Errorf("the branch is at %s, was at %s; pull requests %+v", now, before, c.open())
		}
		// Codex begins at the new commit.
		c.script(func(s *codextest.CloudScript) { s.Diff = diffOf("trois", "drei") })
		if _, err := c.retry(RestartFromDiscovery); err != nil {
			t.Fatal(err)
		}
		c.publishedOnce()
	})
}

// The worker has opened the pull request and died, and others have died after it. Before
// somebody retries the run, something happens to the pull request.
func TestARetryAfterThePullRequestWasTouched(t *testing.T) {
	t.Parallel()
	for what, test := range map[string]struct {
		meanwhile func(*retryChain)
		check     func(*testing.T, *retryChain)
	}{
		"not at all": {func(*retryChain) {}, func(t *testing.T, c *retryChain) {
			c.publishedOnce()
			if n := len(c.server.Pulls("octo/widgets")); n != 1 || c.pushes() != 1 {
				t.Errorf("%d pull requests, %d pushes", n, c.pushes())
			}
		}},
		"closed": {func(c *retryChain) {
			c.server.Edit("octo/widgets", 1, func(pull *githubtest.Pull) { pull.State = "closed" })
		}, func(t *testing.T, c *retryChain) {
			c.publishedOnce()
			if open := c.open(); len(open) != 1 || open[0].Number != 2 {
				t.Errorf("open are %+v, want a new one", open)
			}
		}},
		"merged": {func(c *retryChain) {
			c.git("update-ref", "refs/heads/main", taskBranch)
			c.server.Edit("octo/widgets", 1, func(pull *githubtest.Pull) { pull.State, pull.Merged = "closed", true })
		}, func(t *testing.T, c *retryChain) {
			if payload := c.payload(store.SpecPublish, 2); payload["result"] != "already_applied" {
				t.Errorf("payload is %v", payload)
			}
			if n := len(c.server.Pulls("octo/widgets")); n != 1 || c.pushes() != 1 {
				t.Errorf("%d pull requests, %d pushes", n, c.pushes())
			}
			c.nothingLeft()
		}},
		"edited": {func(c *retryChain) {
			c.server.Edit("octo/widgets", 1, func(pull *githubtest.Pull) {
				pull.Title, pull.Body, pull.Labels = "A better title", "See the ticket.\n\n"+pull.Body, append(pull.Labels, "urgent")
			})
		}, func(t *testing.T, c *retryChain) {
			c.publishedOnce()
			pull := c.server.Pulls("octo/widgets")[0]
			if pull.Title != "A better title" || !strings.HasPrefix(pull.Body, "See the ticket.") || !slices.Contains(pull.Labels, "urgent") || !slices.Contains(pull.Labels, "codex") || !strings.Contains(pull.Body, "attempt 2") {
				t.Errorf("the pull request is %+v", pull)
			}
		}},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			c := newRetryChain(t)
			c.openThenDie()
			test.meanwhile(c)
			if from := c.retried(); from != store.SpecPublish || c.asked() != 1 {
				t.Errorf("the retry has begun at %s, and Codex was asked %d times", from, c.asked())
			}
			test.check(t, c)
		})
	}
}

// openThenDie fails the run after its pull request was opened: the worker dies before it
// has recorded that, and so have two before it.
func (c *retryChain) openThenDie() {
	c.t.Helper()
	ctx, die := context.WithCancel(c.t.Context())
	defer die()
	c.server.Fail(createPull, 1, func(w http.ResponseWriter, r *http.Request, do http.HandlerFunc) {
		do(w, r)
		die()
	})
	submitted := c.ok(c.follow(store.SpecSubmit, c.ok(c.discover(discoverArgs{}))))
	publish := func(ctx context.Context) error {
		_, err := c.speckit().publish(worker.ContextWithTask(ctx, &worker.Task{Message: &protocol.Message{ID: "the task that kills"}}), contextArgs{submitted})
		return err
	}
	if err := publish(ctx); err == nil {
		c.t.Fatal("the task has ended")
	}
	c.exec(`UPDATE mm_orchestrator.spec_claims SET starts = 3 WHERE task_id = 'the task that kills' RETURNING starts`)
	if err := publish(c.t.Context()); err == nil || !strings.Contains(err.Error(), "was started 3 times") {
		c.t.Fatalf("got %v", err)
	}
	if n := len(c.open()); n != 1 {
		c.t.Fatalf("%d pull requests are open", n)
	}
}

func TestARetryAfterTheTokenWasRotated(t *testing.T) {
	t.Parallel()
	c := newRetryChain(t)
	c.server.RevokeToken(gitToken)
	if err := c.begin(); err == nil || !strings.Contains(err.Error(), "refuses the login") {
		t.Fatalf("got %v", err)
	}
	if audit := c.exec(`SELECT github_status FROM workflow_credential_audits`)[0]; audit["github_status"] != "invalid" {
		t.Errorf("the audit row is %v", audit)
	}
	c.token.mu.Lock()
	c.token.text = "ghp_newnewnewnewnewnewnewnewnewnew0123456"
	c.token.mu.Unlock()
	c.server.SetToken(c.token.text, githubtest.Token{Login: "bot", Scopes: []string{"repo"}})
	if from := c.retried(); from != store.SpecPublish || c.asked() != 1 {
		t.Errorf("the retry has begun at %s, and Codex was asked %d times", from, c.asked())
	}
	if audit := c.exec(`SELECT github_status FROM workflow_credential_audits`)[0]; audit["github_status"] != "valid" {
		t.Errorf("the audit row is %v", audit)
	}
	c.publishedOnce()
}
