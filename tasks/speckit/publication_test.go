package speckit

import (
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/codex"
	"github.com/moonladderstudios/mm-orchestrator/github"
	"github.com/moonladderstudios/mm-orchestrator/gitrepo"
	"github.com/moonladderstudios/mm-orchestrator/internal/githubtest"
	"github.com/moonladderstudios/mm-orchestrator/internal/leaktest"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/internal/spectest"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/speckit/preflight"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

const (
	gitToken   = "ghp_R7dK2mX9wQ4vB1nZ8cY5tL0pJ3hG6fD2sA9e"
	patchPath  = runPath + "/codex_1.patch"
	taskBranch = "speckit/" + feature + "/t012"
)

// rotating is a token as a credential's setting gives it.
type rotating struct {
	mu   sync.Mutex
	text string
}

func (r *rotating) Read(context.Context) (secret.String, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return secret.New(r.text), nil
}

// pulls are the pull requests of a GitHub in memory.
type pulls struct {
	mu     sync.Mutex
	wanted []github.Want
	open   map[string]int
	err    error
	// after is called when a pull request was opened, before the caller knows it.
	after func()
}

func (p *pulls) Ensure(_ context.Context, want github.Want) (github.Ensured, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil {
		return github.Ensured{}, p.err
	}
	p.wanted = append(p.wanted, want)
	number, exists := p.open[want.Head]
	if !exists {
		number = len(p.open) + 1
		p.open[want.Head] = number
	}
	if p.after != nil {
		p.after()
	}
	return github.Ensured{
		PullRequest: github.PullRequest{Number: number, URL: fmt.Sprintf("https://github.example.com/octo/widgets/pull/%d", number), State: github.Open}, Created: !exists,
	}, nil
}

// publishChain is a chain whose run has a patch, and a git server behind TLS.
type publishChain struct {
	*chain
	server *githubtest.Server
	pulls  *pulls
	token  *rotating
	work   string
}

func newPublishChain(t *testing.T, change ...func(*Config)) *publishChain {
	t.Helper()
	p := &publishChain{server: githubtest.New(t), pulls: &pulls{open: map[string]int{}}, token: &rotating{text: gitToken}, work: t.TempDir()}
	p.server.SetToken(gitToken, githubtest.Token{Login: "bot", Scopes: []string{"repo"}})
	if err := p.server.AddRepository(t.Context(), "octo/widgets", map[string]string{"README": "widgets\n", "docs/api": "one\ntwo\nthree\nfour\nfive\n"}); err != nil {
		t.Fatal(err)
	}
	p.chain = newChain(t, spectest.Tasks(), append([]func(*Config){func(c *Config) {
		git, err := gitrepo.New(gitrepo.Config{Environ: append(os.Environ(), "GITHUB_TOKEN="+gitToken), CAFile: p.server.CAFile})
		if err != nil {
			t.Fatal(err)
		}
		c.TestMode = false
		c.Preflight = &findings{reports: []preflight.Report{{Codex: preflight.Finding{Status: preflight.Valid}, GitHub: preflight.Finding{Status: preflight.Valid}}}}
		c.Repositories = &Repositories{Git: git, Server: p.server.URL, Token: p.token, Dir: p.work}
		c.Publish = PublishConfig{PullRequests: p.pulls, Author: gitrepo.Person{Name: "Spec Bot", Email: "bot@example.com"}, Trailers: []string{"Reviewed-by: nobody"}, Labels: []string{"codex"}, Reviewers: []string{"jane"}, Draft: true}
	}}, change...)...)
	p.watch.Also(func(state *leaktest.State) { state.GitHub, state.GitHubSecrets = p.server, []string{"token"} })
	p.exec(`UPDATE spec_workflow_runs SET status = 'running', phase = 'submit' WHERE id = $1 RETURNING id`, recordedRun)
	return p
}

// store stores a patch as Codex's task does: it sets one line of docs/api.
func (p *publishChain) store(line string) {
	p.t.Helper()
	before := strings.Split(p.git("show", "main:docs/api"), "\n")[2]
	p.storeText(patchOf(p.git("rev-parse", "main"), before, line))
}

// patchOf is what gitrepo.Diff makes of a changed line of docs/api, without the dozens of
// processes that it takes to make a clone.
func patchOf(base, before, after string) string {
	blob := func(line string) string {
		text := "one\ntwo\n" + line + "\nfour\nfive\n"
		sum := sha1.Sum(fmt.Appendf(nil, "blob %d\x00%s", len(text), text))
		return hex.EncodeToString(sum[:])
	}
	return fmt.Sprintf("base-commit: %s\n\ndiff --git a/docs/api b/docs/api\nindex %s..%s 100644\n--- a/docs/api\n+++ b/docs/api\n@@ -1,5 +1,5 @@\n one\n two\n-%s\n+%s\n four\n five\n",
		base, blob(before), blob(after), before, after)
}

func TestThePatchOfTheTestsIsWhatADiffMakes(t *testing.T) {
	t.Parallel()
	p := newPublishChain(t)
	git, remote, err := p.attemptOf().remote()
	if err != nil {
		t.Fatal(err)
	}
	clone, err := git.Clone(t.Context(), remote, "main", filepath.Join(t.TempDir(), "clone"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(clone.Tree, "docs/api"), []byte("one\ntwo\ndrei\nfour\nfive\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	change, err := clone.Diff(t.Context())
	if want := patchOf(clone.Commit, "three", "drei"); err != nil || string(change.Patch) != want {
		t.Errorf("got %s, %v, want %s", change.Patch, err, want)
	}
}

// storeText stores a text as the patch.
func (p *publishChain) storeText(text string) {
	p.t.Helper()
	if err := os.MkdirAll(filepath.Join(p.root, runPath), 0o755); err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(p.root, patchPath), []byte(text), 0o644); err != nil {
		p.t.Fatal(err)
	}
	sum := sha256.Sum256([]byte(text))
	p.exec(`INSERT INTO workflow_artifacts (id, workflow_run_id, artifact_type, path, size_bytes, digest) VALUES (gen_random_uuid(), $1, 'codex_patch', $2, $3, $4) RETURNING id`,
		recordedRun, patchPath, len(text), "sha256:"+hex.EncodeToString(sum[:]))
}

// attemptOf is an attempt that only knows its repository.
func (p *publishChain) attemptOf() *attempt {
	s := p.speckit()
	return &attempt{Speckit: s, log: s.log, request: request{context: newObject(), task: store.SpecPublish, runID: recordedRun}, run: store.SpecRun{ID: recordedRun, Repository: "octo/widgets"}}
}

// context is that of the chain after submit, or of a retry.
func (p *publishChain) context(attempt int) json.RawMessage {
	o := newObject()
	o.set("run_id", recordedRun)
	o.set("feature_key", feature)
	o.set("artifacts_path", runPath)
	o.set("repository", "octo/widgets")
	o.set("attempt", attempt)
	o.set("retry", attempt > 1)
	task := newObject()
	task.set("taskId", "T012")
	task.set("title", "Document the retry endpoint")
	task.set("phase", "Phase 4: User Story 2")
	task.set("lineNumber", 57)
	o.set("task", task)
	o.set("codex_task_id", "thread-1")
	o.set("codex_patch_path", patchPath)
	if attempt == 1 { // a retry's message does not have it
		o.set("codex_summary", "I have done it. Fixes #1, @octocat ```")
	}
	return o.compact()
}

// publish runs the task with a task id of Celery.
func (p *publishChain) publish(ctx context.Context, taskID string, attempt int) (map[string]any, error) {
	p.t.Helper()
	s := p.speckit()
	result, err := s.publish(worker.ContextWithTask(ctx, &worker.Task{Message: &protocol.Message{ID: taskID}}), contextArgs{p.context(attempt)})
	p.watch.Text("the result", string(result))
	if err != nil {
		return nil, p.watch.Error("the error", err)
	}
	var o map[string]any
	if err := json.Unmarshal(result, &o); err != nil {
		p.t.Fatal(err)
	}
	return o, nil
}

func (p *publishChain) published(taskID string, attempt int) map[string]any {
	p.t.Helper()
	context, err := p.publish(p.t.Context(), taskID, attempt)
	if err != nil {
		p.t.Fatal(err)
	}
	return context
}

func (p *publishChain) git(args ...string) string {
	p.t.Helper()
	out, err := p.server.Git(p.t.Context(), "octo/widgets", args...)
	if err != nil {
		p.t.Fatal(err)
	}
	return out
}

// pushes counts those that the server has taken.
func (p *publishChain) pushes() int {
	n := 0
	for _, r := range p.server.Requests("POST") {
		if strings.HasSuffix(r.Path, "/git-receive-pack") {
			n++
		}
	}
	return n
}

// nothingLeft fails the test if the task has left clones.
func (p *publishChain) nothingLeft() {
	p.t.Helper()
	if left, err := os.ReadDir(p.work); err != nil || len(left) > 0 {
		p.t.Errorf("left in the directory for clones: %v, %v", left, err)
	}
}

func TestAPatchIsPublished(t *testing.T) {
	t.Parallel()
	p := newPublishChain(t)
	p.store("drei")
	context := p.published("task-1", 1)
	const url = "https://github.example.com/octo/widgets/pull/1"
	for key, want := range map[string]any{
		"branch_name": taskBranch, "pr_url": url, "codex_patch_path": patchPath, "apply_output_path": runPath + "/apply_output.json",
		"github_response_path": runPath + "/speckit_014-refresh-docs_t012_pr.json", "run_summary_path": runPath + "/run_summary.json",
	} {
		if context[key] != want {
			t.Errorf("context: %s is %v, want %v", key, context[key], want)
		}
	}
	run := p.run()
	for column, want := range map[string]any{"status": "succeeded", "phase": "complete", "branch_name": taskBranch, "pr_url": url, "codex_patch_path": patchPath} {
		if run[column] != want {
			t.Errorf("run: %s is %v, want %v", column, run[column], want)
		}
	}
	commit := p.git("rev-parse", taskBranch)
	payload := p.payload(store.SpecPublish, 1)
	for key, want := range map[string]any{
		"status": "succeeded", "message": "Pull request published", "branch": taskBranch, "prUrl": url, "patchPath": patchPath, "responsePath": context["github_response_path"],
		"applyOutputPath": context["apply_output_path"], "resumed": false, "commit": commit, "pushLogPath": runPath + "/gh_push.log",
	} {
		if payload[key] != want {
			t.Errorf("payload: %s is %v, want %v", key, payload[key], want)
		}
	}
	wantMessage := "T012: Document the retry endpoint\n\nDone by Codex for the feature 014-refresh-docs.\n\nSpec-Feature: 014-refresh-docs\nSpec-Task: T012\nSpec-Run: " + recordedRun + "\nReviewed-by: nobody"
	if message := p.git("log", "-1", "--format=%B", taskBranch); strings.TrimSpace(message) != wantMessage {
		t.Errorf("the commit says %q", message)
	}
	if people := p.git("log", "-1", "--format=%an <%ae> %cn <%ce>", taskBranch); people != "Spec Bot <bot@example.com> Spec Bot <bot@example.com>" {
		t.Errorf("the commit is of %s", people)
	}
	if changed := p.git("diff", "--name-only", "main", taskBranch); changed != "docs/api" {
		t.Errorf("changed are %s", changed)
	}
	// Files with digests, of the types that MoonMind's enum has for them.
	for kind, name := range map[string]string{
		"gh_push_log": "gh_push.log", "gh_pr_response": "speckit_014-refresh-docs_t012_pr.json", "apply_output": "apply_output.json", "pr_payload": "run_summary.json", "codex_patch": "codex_1.patch",
	} {
		rows := p.exec(`SELECT path, size_bytes, digest FROM workflow_artifacts WHERE artifact_type::text = $1`, kind)
		sum := sha256.Sum256([]byte(p.file(name)))
		if len(rows) != 1 || rows[0]["path"] != runPath+"/"+name || rows[0]["digest"] != "sha256:"+hex.EncodeToString(sum[:]) {
			t.Errorf("%s: rows %v, want one of %s", kind, rows, name)
		}
	}
	for name, parts := range map[string][]string{
		"gh_push.log":                           {"branch " + taskBranch, "commit " + commit, "outcome created", "[new branch]"},
		"apply_output.json":                     {`"hasChanges": true`, `"commit": "` + commit, `"docs/api"`, `"patchPath": "` + patchPath},
		"run_summary.json":                      {`"pullRequestUrl": "` + url, `"branch": "` + taskBranch},
		"speckit_014-refresh-docs_t012_pr.json": {`"repository": "octo/widgets"`, `"patch": "codex_1.patch"`, `"number": 1`, `"created": true`},
	} {
		for _, part := range parts {
			if text := p.file(name); !strings.Contains(text, part) {
				t.Errorf("%s lacks %s: %s", name, part, text)
			}
		}
	}
	want := p.pulls.wanted[0]
	if want.Repository != "octo/widgets" || want.Head != taskBranch || want.Base != "main" || want.Title != "T012: Document the retry endpoint" || !want.Draft || !slices.Equal(want.Labels, []string{"codex"}) || !slices.Equal(want.Reviewers, []string{"jane"}) {
		t.Errorf("the pull request is %+v", want)
	}
	for _, part := range []string{recordedRun, "`T012` `Document the retry endpoint`", "`docs/api`", "````text\nI have done it. Fixes #1, @octocat ```\n````"} {
		if !strings.Contains(want.Body, part) {
			t.Errorf("the text lacks %q: %s", part, want.Body)
		}
	}
	p.nothingLeft()
}

// stoppedAt is a database whose worker is stopped at the n-th write, before or after
// the write.
type stoppedAt struct {
	Runs
	at    int
	after bool
	stop  func()
	n     int
}

func (r *stoppedAt) WriteSpec(ctx context.Context, claim store.SpecClaim, write store.SpecWrite) error {
	r.n++
	if r.n != r.at {
		return r.Runs.WriteSpec(ctx, claim, write)
	}
	if r.after {
		if err := r.Runs.WriteSpec(ctx, claim, write); err != nil {
			return err
		}
	}
	r.stop()
	return context.Canceled
}

// A worker that is stopped at any write, before or after it, or between push or pull
// request and the record of it: the next one finds what was done, and does the rest.
func TestAPublicationGoesOnWhereItStopped(t *testing.T) {
	t.Parallel()
	for at := 1; at <= 5; at++ {
		for _, after := range []bool{false, true} {
			t.Run(fmt.Sprintf("write %d, after it %v", at, after), func(t *testing.T) {
				t.Parallel()
				p := newPublishChain(t)
				p.store("drei")
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				whole := p.config.Runs
				counted := &stoppedAt{Runs: whole, at: at, after: after, stop: cancel}
				p.config.Runs = counted
				if _, err := p.publish(ctx, "task-1", 1); err == nil {
					if counted.n < at {
						t.Skip("the task writes less often")
					}
					t.Fatal("the stopped task has succeeded")
				}
				if !after || at < 5 {
					if status := p.run()["status"]; status != "running" {
						t.Errorf("the run of a stopped worker is %s", status)
					}
				}
				p.config.Runs = whole
				// Time passes; somebody pushes to the base branch.
				if _, err := p.server.Commit(t.Context(), "octo/widgets", "main", "later", map[string]string{"other": "x\n"}); err != nil {
					t.Fatal(err)
				}
				context := p.published("task-1", 1)
				if context["branch_name"] != taskBranch || p.run()["status"] != "succeeded" {
					t.Errorf("context %v, run %v", context, p.run())
				}
				if n := p.pushes(); n != 1 {
					t.Errorf("pushed %d times, want once", n)
				}
				if len(p.pulls.open) != 1 {
					t.Errorf("pull requests are %v", p.pulls.open)
				}
				if n := p.git("rev-list", "--count", "main.."+taskBranch); n != "1" {
					t.Errorf("the branch has %s commits of its own", n)
				}
				p.nothingLeft()
			})
		}
	}
}

// The pull request exists, and the worker dies before it is recorded.
func TestAPullRequestIsOpenedOnce(t *testing.T) {
	t.Parallel()
	p := newPublishChain(t)
	p.store("drei")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	p.pulls.after = cancel
	if _, err := p.publish(ctx, "task-1", 1); err == nil {
		t.Fatal("the stopped task has succeeded")
	}
	p.pulls.after = nil
	p.published("task-1", 1)
	if len(p.pulls.open) != 1 || p.pushes() != 1 {
		t.Errorf("pull requests %v, %d pushes", p.pulls.open, p.pushes())
	}
	// Delivered once more after its end, the task does nothing.
	asked := len(p.server.Requests(""))
	p.published("task-1", 1)
	if now := len(p.server.Requests("")); now != asked || len(p.pulls.wanted) != 2 {
		t.Errorf("%d more requests, %d calls", now-asked, len(p.pulls.wanted))
	}
}

// A retry makes the same branch and commit, whatever has happened to the attempt before.
func TestARetryUsesTheStoredPatch(t *testing.T) {
	t.Parallel()
	t.Run("after the pull request was refused", func(t *testing.T) {
		t.Parallel()
		p := newPublishChain(t)
		p.store("drei")
		p.pulls.err = errors.New("GitHub refuses the labels (422): create them")
		_, err := p.publish(t.Context(), "task-1", 1)
		if err == nil || !strings.Contains(err.Error(), "the branch "+taskBranch+" is pushed, but the pull request cannot be opened: GitHub refuses the labels") {
			t.Fatalf("got %v", err)
		}
		if code := p.payload(store.SpecPublish, 1)["code"]; code != "pull_request_failed" {
			t.Errorf("code is %v", code)
		}
		p.pulls.err = nil
		before := p.git("rev-parse", taskBranch)
		p.published("task-2", 2)
		if now := p.git("rev-parse", taskBranch); now != before || p.pushes() != 1 {
			t.Errorf("the branch is at %s, was at %s, after %d pushes", now, before, p.pushes())
		}
		p.nothingLeft()
	})
	t.Run("after the base branch has moved", func(t *testing.T) {
		t.Parallel()
		p := newPublishChain(t)
		p.store("drei")
		p.published("task-1", 1)
		if _, err := p.server.Commit(t.Context(), "octo/widgets", "main", "later", map[string]string{"docs/api": "one\ntwo\nthree\nfour\nfive\nsix\n"}); err != nil {
			t.Fatal(err)
		}
		p.published("task-2", 2)
		if text, _ := p.server.Read(t.Context(), "octo/widgets", taskBranch, "docs/api"); text != "one\ntwo\ndrei\nfour\nfive\nsix" {
			t.Errorf("docs/api is %q", text)
		}
		if log := p.file("gh_push.log"); !strings.Contains(log, "outcome replaced") || len(p.pulls.open) != 1 {
			t.Errorf("the log says %s; pull requests %v", log, p.pulls.open)
		}
		if parent := p.git("rev-parse", taskBranch+"^"); parent != p.git("rev-parse", "main") {
			t.Error("the branch does not begin at the base branch")
		}
	})
	t.Run("after it was merged", func(t *testing.T) {
		t.Parallel()
		p := newPublishChain(t)
		p.store("drei")
		p.published("task-1", 1)
		p.git("update-ref", "refs/heads/main", taskBranch)
		context := p.published("task-2", 2)
		payload := p.payload(store.SpecPublish, 2)
		if payload["message"] != "Nothing to publish: main has the change already" || payload["result"] != "already_applied" || p.run()["status"] != "succeeded" {
			t.Errorf("payload %v, context %v", payload, context)
		}
		if len(p.pulls.wanted) != 1 {
			t.Errorf("pull requests %+v", p.pulls.wanted)
		}
	})
	t.Run("after a reviewer has pushed to the branch", func(t *testing.T) {
		t.Parallel()
		p := newPublishChain(t)
		p.store("drei")
		p.published("task-1", 1)
		theirs, err := p.server.Commit(t.Context(), "octo/widgets", taskBranch, "a better word", map[string]string{"docs/api": "x\n"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.server.Commit(t.Context(), "octo/widgets", "main", "later", map[string]string{"other": "x\n"}); err != nil {
			t.Fatal(err)
		}
		_, err = p.publish(t.Context(), "task-2", 2)
		if err == nil || !strings.Contains(err.Error(), "which this program has not made: merge or delete the branch") || !strings.Contains(err.Error(), "Somebody <somebody@example.com>") {
			t.Errorf("got %v", err)
		}
		if now := p.git("rev-parse", taskBranch); now != theirs {
			t.Error("the reviewer's commit was replaced")
		}
	})
	t.Run("after the branch was deleted", func(t *testing.T) {
		t.Parallel()
		p := newPublishChain(t)
		p.store("drei")
		p.published("task-1", 1)
		before := p.git("rev-parse", taskBranch)
		p.git("update-ref", "-d", "refs/heads/"+taskBranch)
		p.published("task-2", 2)
		if now := p.git("rev-parse", taskBranch); now != before {
			t.Errorf("the branch is at %s, was at %s", now, before)
		}
	})
	t.Run("after the token was rotated", func(t *testing.T) {
		t.Parallel()
		p := newPublishChain(t)
		p.store("drei")
		p.server.RevokeToken(gitToken)
		_, err := p.publish(t.Context(), "task-1", 1)
		if err == nil || !strings.Contains(err.Error(), "refuses the login") {
			t.Fatalf("got %v", err)
		}
		// The audit row has the refusal, although the check before has found no fault.
		audit := p.exec(`SELECT github_status, github_message FROM workflow_credential_audits`)[0]
		if audit["github_status"] != "invalid" || !strings.Contains(fmt.Sprint(audit["github_message"]), "refuses the login") {
			t.Errorf("the audit row is %v", audit)
		}
		p.token.text = "ghp_newnewnewnewnewnewnewnewnewnew0123456"
		p.server.SetToken(p.token.text, githubtest.Token{Login: "bot"})
		p.published("task-2", 2)
		p.nothingLeft()
	})
}

func TestAPatchThatCannotBePublished(t *testing.T) {
	t.Parallel()
	for what, c := range map[string]struct {
		prepare    func(*publishChain)
		want, code string
	}{
		"missing": {func(p *publishChain) {
			p.store("drei")
			if err := os.Remove(filepath.Join(p.root, patchPath)); err != nil {
				p.t.Fatal(err)
			}
		}, "does not exist any more: retry the run from discovery", ""},
		"changed": {func(p *publishChain) {
			p.store("drei")
			if err := os.WriteFile(filepath.Join(p.root, patchPath), []byte("x"), 0o644); err != nil {
				p.t.Fatal(err)
			}
		}, "has changed since it was recorded", ""},
		"no patch at all":    {func(p *publishChain) { p.storeText("Done!\n") }, "it is no patch that git understands", "patch_unusable"},
		"a hook":             {func(p *publishChain) { p.storeText(newFile(".git/hooks/post-checkout")) }, "outside of the repository's files", "patch_unusable"},
		"out of the tree":    {func(p *publishChain) { p.storeText(newFile("../../etc/x")) }, "outside of the repository's files", "patch_unusable"},
		"the worker's token": {func(p *publishChain) { p.store(gitToken) }, "docs/api has a credential of this worker", "change_has_secret"},
		"the login of Codex": {func(p *publishChain) {
			const token = "rt_Fz6Hs1Pd8Kw3Vq7Rm2Xk"
			home := p.t.TempDir()
			if err := os.WriteFile(filepath.Join(home, codex.LoginFile), []byte(`{"tokens": {"refresh_token": "`+token+`"}}`), 0o600); err != nil {
				p.t.Fatal(err)
			}
			p.config.Codex.Login = codex.NewLogin(home, p.config.Redactor, p.config.Codex.Secrets)
			p.store(token)
		}, "docs/api has a credential of this worker", "change_has_secret"},
		"a conflict": {func(p *publishChain) {
			p.store("drei")
			if _, err := p.server.Commit(p.t.Context(), "octo/widgets", "main", "x", map[string]string{"docs/api": "one\ntwo\ntrois\nfour\nfive\n"}); err != nil {
				p.t.Fatal(err)
			}
		}, "docs/api. Others have changed the same lines of main since Codex began. Retry the run from discovery", "apply_conflict"},
		"a protected branch": {func(p *publishChain) {
			p.store("drei")
			if err := p.server.RefusePushes("octo/widgets", "error: GH006: Protected branch update failed"); err != nil {
				p.t.Fatal(err)
			}
		}, "GH006: Protected branch update failed", "push_failed"},
		"no such base branch": {func(p *publishChain) { p.store("drei"); p.config.Repositories.Base = "nosuch" }, "has no branch nosuch: correct the base branch", "clone_failed"},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			p := newPublishChain(t)
			secrets := artifacts.NewRedactor(nil)
			secrets.Add(gitToken)
			p.config.Redactor.Add(gitToken)
			p.config.Codex.Secrets = secrets
			c.prepare(p)
			_, err := p.publish(t.Context(), "task-1", 1)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want %q", err, c.want)
			}
			payload := p.payload(store.SpecPublish, 1)
			if c.code != "" && payload["code"] != c.code {
				t.Errorf("code is %v, want %s", payload["code"], c.code)
			}
			if p.run()["status"] != "failed" || len(p.pulls.wanted) > 0 {
				t.Errorf("run %v, pull requests %v", p.run(), p.pulls.wanted)
			}
			if branches := p.git("for-each-ref", "--format=%(refname)"); branches != "refs/heads/main" {
				t.Errorf("branches are %s", branches)
			}
			switch what {
			case "a conflict":
				output := p.file("apply_output.json")
				if !strings.Contains(output, `"docs/api"`) || !strings.Contains(output, `<<<<<<< base branch\ntrois\n||||||| where the patch began\nthree\n=======\ndrei\n>>>>>>> patch`) || payload["applyOutputPath"] != runPath+"/apply_output.json" {
					t.Errorf("payload %v, file %s", payload, output)
				}
			case "a protected branch":
				if log := p.file("gh_push.log"); !strings.Contains(log, "GH006") {
					t.Errorf("the log is %s", log)
				}
			case "the worker's token":
				if err := os.Remove(filepath.Join(p.root, patchPath)); err != nil { // the test's own
					t.Fatal(err)
				}
			}
			p.nothingLeft()
		})
	}
}

// newFile is a patch with a new file.
func newFile(name string) string {
	return strings.ReplaceAll("diff --git a/NAME b/NAME\nnew file mode 100644\nindex 0000000000000000000000000000000000000000..587be6b4c3f93f93c489c0111bba5596147a26cb\n--- /dev/null\n+++ b/NAME\n@@ -0,0 +1 @@\n+x\n", "NAME", name)
}

// A git server that cannot be reached for a moment is tried again.
func TestAServerThatIsAwayForAMoment(t *testing.T) {
	t.Parallel()
	p := newPublishChain(t)
	p.store("drei")
	p.server.FailRequests("git-receive-pack", 1)
	p.published("task-1", 1)
	if n := p.git("rev-list", "--count", "main.."+taskBranch); n != "1" {
		t.Errorf("the branch has %s commits of its own", n)
	}
}

// So is one from which Codex's clone is made.
func TestACloneForCodexIsTriedAgain(t *testing.T) {
	t.Parallel()
	p := newPublishChain(t)
	p.server.FailRequests("git-upload-pack", 1)
	task := &codexTask{attempt: p.attemptOf()}
	clone, err := task.clone(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(filepath.Join(clone.Tree, "README")); err != nil || string(text) != "widgets\n" {
		t.Errorf("README of the clone is %q, %v", text, err)
	}
}

// If this machine's disk is full, the server is not blamed and not asked again.
func TestAFullDiskForClones(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		says  string
		want  string
		tries int
	}{
		"here":          {"fatal: unable to write loose object file: No space left on device", "the repository cannot be cloned: the disk with <dir> is full: free some of it, or set MM_ORCHESTRATOR_CLONE_DIR to a directory on another one (git fetch failed", 1},
		"of the server": {"remote: fatal: write error: No space left on device", "the repository cannot be cloned: the git server cannot be used for ", 3},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			program, calls := filepath.Join(dir, "git"), filepath.Join(dir, "calls")
			// A program that another test starts meanwhile would keep the file open for writing,
			// and it could not be executed.
			syscall.ForkLock.RLock()
			err := os.WriteFile(program, fmt.Appendf(nil, "#!/bin/sh\nif [ \"$1\" = fetch ]; then echo fetch >>%s; echo '%s' >&2; exit 128; fi\nexec git \"$@\"\n", calls, c.says), 0o700)
			syscall.ForkLock.RUnlock()
			if err != nil {
				t.Fatal(err)
			}
			p := newPublishChain(t)
			if p.config.Repositories.Git, err = gitrepo.New(gitrepo.Config{Program: program, Environ: os.Environ(), CAFile: p.server.CAFile}); err != nil {
				t.Fatal(err)
			}
			p.store("drei")
			_, err = p.publish(t.Context(), "task-1", 1)
			p.fails("RuntimeError", strings.ReplaceAll(c.want, "<dir>", p.work), err)
			if text, err := os.ReadFile(calls); err != nil || strings.Count(string(text), "fetch") != c.tries {
				t.Errorf("git was called %q, %v; want %d calls", text, err, c.tries)
			}
			p.nothingLeft()
		})
	}
}

func TestBranchNames(t *testing.T) {
	t.Parallel()
	seen := map[string]string{}
	for _, c := range []struct{ feature, task, want string }{
		{"014-refresh-docs", "T012", "speckit/014-refresh-docs/t012"},
		{"team/014", "T1.2", "speckit/team/014/t1.2"},
		{"a b", "T1", "speckit/a-b/t1-"},
		{"a-b", "T1", "speckit/a-b/t1"},
		{"../../etc", "T1", "speckit/etc/t1-"},
		{"--upload-pack=x", "T1", "speckit/upload-pack-x/t1-"},
		{"x.lock", "T1.lock", "speckit/x-lock/t1-lock-"},
		{"ünïcode", "T1", "speckit/n-code/t1-"},
		{"a..b", "T~1^", "speckit/a.b/t-1-"},
		{"", "", "speckit/"},
		{"@{x}", "*", "speckit/x-"},
		{strings.Repeat("long", 100), "T1", "speckit/longlong"},
		{strings.Repeat("long", 100), "T2", "speckit/longlong"},
	} {
		name := branchName("speckit/", c.feature, c.task)
		if !strings.HasPrefix(name, c.want) || (len(name) != len(c.want)) != (strings.HasSuffix(c.want, "-") || strings.HasSuffix(c.want, "/") || strings.HasSuffix(c.want, "longlong")) {
			t.Errorf("%q, %q: the branch is %s, want %s", c.feature, c.task, name, c.want)
		}
		if err := gitrepo.CheckBranch(name); err != nil {
			t.Error(err)
		}
		if other, taken := seen[name]; taken {
			t.Errorf("%q, %q has the branch of %s: %s", c.feature, c.task, other, name)
		}
		seen[name] = c.feature + " " + c.task
		if name != branchName("speckit/", c.feature, c.task) {
			t.Error("another name the second time")
		}
	}
}

// Texts of a model and of tasks.md cannot forge trailers, notify people or break tables.
func TestDescriptionsAreTame(t *testing.T) {
	t.Parallel()
	d := description{run: "r", attempt: 1, feature: "f", taskID: "T1", title: "x\nSpec-Task: T9\r\n\x1b[31m |`@all", summary: "~~~\n`````\nCloses #4 @all", files: []string{"a`b|c"}}
	if lines := strings.Split(d.message(), "\n"); lines[0] != "T1: x Spec-Task: T9 [31m |`@all" || !slices.Contains(lines, "Spec-Task: T1") || slices.Contains(lines, "Spec-Task: T9") {
		t.Errorf("the message is %q", d.message())
	}
	for _, part := range []string{"``````text\n~~~\n`````\nCloses #4 @all\n``````", "`x Spec-Task: T9 [31m ¦'@all`", "- `a'b¦c`"} {
		if !strings.Contains(d.body(), part) {
			t.Errorf("the text lacks %q: %s", part, d.body())
		}
	}
	if subject := (description{taskID: "T1", title: strings.Repeat("ü", 500)}).subject(100); len([]rune(subject)) != 100 {
		t.Errorf("the subject has %d characters", len([]rune(subject)))
	}
}

func TestPublishConfigIsValidated(t *testing.T) {
	t.Parallel()
	for want, c := range map[string]PublishConfig{
		"BranchPrefix":             {BranchPrefix: "a..b/"},
		"have the form Key: value": {Trailers: []string{"x"}},
		"form Key: value":          {Trailers: []string{"A: b\nC: d"}},
		"needs a name":             {Author: gitrepo.Person{Name: "x"}},
	} {
		if err := c.validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: got %v", c, err)
		}
	}
	if err := (PublishConfig{}).validate(); err != nil {
		t.Error(err)
	}
}
