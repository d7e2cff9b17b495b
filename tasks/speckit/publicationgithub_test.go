package speckit

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/github"
	"github.com/moonladderstudios/mm-orchestrator/internal/githubtest"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// newGitHubChain is a publishChain whose pull requests are opened by the REST API.
func newGitHubChain(t *testing.T) *publishChain {
	t.Helper()
	p := newPublishChain(t)
	if err := p.server.Set("octo/widgets", githubtest.Settings{Collaborators: []string{"jane"}}); err != nil {
		t.Fatal(err)
	}
	transport, err := p.server.Client()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(transport.CloseIdleConnections)
	client, err := github.New(github.Config{
		API: p.server.URL + "/api/v3", Token: p.token, HTTP: transport, Logger: p.config.Logger,
		Wait: func(ctx context.Context, _ time.Duration) error { return context.Cause(ctx) },
	})
	if err != nil {
		t.Fatal(err)
	}
	p.config.Publish.PullRequests = client
	return p
}

// open are the pull requests that are open.
func (p *publishChain) open() (list []githubtest.Pull) {
	for _, pull := range p.server.Pulls("octo/widgets") {
		if pull.State == "open" {
			list = append(list, pull)
		}
	}
	return list
}

// other is what somebody else does to the base branch, elsewhere than the patch.
func (p *publishChain) other() {
	p.t.Helper()
	if _, err := p.server.Commit(p.t.Context(), "octo/widgets", "main", "later", map[string]string{"other": "x\n"}); err != nil {
		p.t.Fatal(err)
	}
}

func TestAPatchIsPublishedOnGitHub(t *testing.T) {
	t.Parallel()
	p := newGitHubChain(t)
	p.store("drei")
	context := p.published("task-1", 1)
	open := p.open()
	if len(open) != 1 {
		t.Fatalf("pull requests are %+v", open)
	}
	pull := open[0]
	if pull.Head != taskBranch || pull.Base != "main" || pull.Title != "T012: Document the retry endpoint" || !pull.Draft ||
		!slices.Equal(pull.Labels, []string{"codex"}) || !slices.Equal(pull.RequestedReviewers, []string{"jane"}) || !strings.Contains(pull.Body, recordedRun) {
		t.Errorf("the pull request is %+v", pull)
	}
	if url := fmt.Sprint(context["pr_url"]); !strings.HasSuffix(url, "/octo/widgets/pull/1") || p.run()["pr_url"] != url {
		t.Errorf("pr_url is %s, in the run %v", url, p.run()["pr_url"])
	}
	response := p.file("speckit_014-refresh-docs_t012_pr.json")
	for _, part := range []string{`"number": 1`, `"state": "open"`, `"created": true`, `"requested_reviewers": [`, `"head_sha": "` + p.git("rev-parse", taskBranch)} {
		if !strings.Contains(response, part) {
			t.Errorf("the response lacks %s: %s", part, response)
		}
	}
	p.nothingLeft()
}

// Whatever has happened to the pull request, a retry makes no second one beside an open
// one, and takes nothing back that somebody has done.
func TestARetryFindsThePullRequest(t *testing.T) {
	t.Parallel()
	for what, c := range map[string]struct {
		meanwhile func(*publishChain)
		// open are the numbers of the pull requests that are open afterwards.
		open  []int
		check func(*testing.T, githubtest.Pull)
	}{
		"open": {func(*publishChain) {}, []int{1}, nil},
		"edited": {func(p *publishChain) {
			p.server.Edit("octo/widgets", 1, func(pull *githubtest.Pull) {
				pull.Title, pull.Body, pull.Draft, pull.Labels = "A better title", "See the ticket.\n\n"+pull.Body+"\n\nThanks!", false, append(pull.Labels, "urgent")
			})
		}, []int{1}, func(t *testing.T, pull githubtest.Pull) {
			if pull.Title != "A better title" || pull.Draft || !slices.Contains(pull.Labels, "urgent") || !strings.HasPrefix(pull.Body, "See the ticket.") || !strings.HasSuffix(pull.Body, "Thanks!") || !strings.Contains(pull.Body, "attempt 2") || strings.Contains(pull.Body, "attempt 1") {
				t.Errorf("the pull request is %+v", pull)
			}
		}},
		"closed": {func(p *publishChain) {
			p.server.Edit("octo/widgets", 1, func(pull *githubtest.Pull) { pull.State = "closed" })
		}, []int{2}, nil},
		"merged, and the task did not end with that": {func(p *publishChain) {
			p.git("update-ref", "refs/heads/main", taskBranch)
			p.server.Edit("octo/widgets", 1, func(pull *githubtest.Pull) { pull.State, pull.Merged = "closed", true })
			p.exec(`DELETE FROM workflow_artifacts RETURNING id`)
			p.store("trois")
		}, []int{2}, nil},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			p := newGitHubChain(t)
			p.store("drei")
			p.exec(`INSERT INTO mm_orchestrator.spec_claims (run_id, task_id, task, attempt, worker, token, starts, started_at, finished_at, progress, outcome)
				VALUES ($1, 'task-0', 'submit_codex_job', 1, 'w', 1, 1, now(), now(), '{"codex": {"stage": "ended", "runs": 1, "outcome": "finished", "message": "Said at the end."}}', '{}') RETURNING run_id`, recordedRun)
			p.published("task-1", 1)
			c.meanwhile(p)
			p.other()
			context := p.published("task-2", 2)
			var numbers []int
			for _, pull := range p.open() {
				numbers = append(numbers, pull.Number)
			}
			if !slices.Equal(numbers, c.open) {
				t.Fatalf("open are %v, want %v", numbers, c.open)
			}
			if url := fmt.Sprint(context["pr_url"]); !strings.HasSuffix(url, fmt.Sprintf("/pull/%d", c.open[0])) || p.run()["pr_url"] != url {
				t.Errorf("pr_url is %s, in the run %v", url, p.run()["pr_url"])
			}
			if c.check != nil {
				c.check(t, p.open()[0])
			}
			if pull := p.open()[0]; !strings.Contains(pull.Body, "Said at the end.") {
				t.Errorf("what Codex has said is not in the text of the retry: %s", pull.Body)
			}
			if n := p.git("rev-list", "--count", "main.."+taskBranch); n != "1" {
				t.Errorf("the branch has %s commits of its own", n)
			}
			p.nothingLeft()
		})
	}
}

// Faults of GitHub: one pull request at the end, or the cure in the run's words.
func TestGitHubHasFaults(t *testing.T) {
	t.Parallel()
	const create = "POST /api/v3/repos/octo/widgets/pulls"
	for what, c := range map[string]struct {
		fault func(*publishChain)
		want  string // of the error, "" for none
	}{
		"the answer is lost":  {func(p *publishChain) { p.server.Fail(create, 1, githubtest.LoseAnswer()) }, ""},
		"a secondary limit":   {func(p *publishChain) { p.server.Fail(create, 2, githubtest.SecondaryLimit(403, time.Minute)) }, ""},
		"a server that fails": {func(p *publishChain) { p.server.Fail(create, 1, githubtest.Status(502, "Bad Gateway")) }, ""},
		"an answer of 100 MB": {func(p *publishChain) { p.server.Fail(create, 9, githubtest.Huge(100<<20)) }, "the branch " + taskBranch + " is pushed, but the pull request cannot be opened"},
		"the token may not": {func(p *publishChain) {
			p.server.Fail(create, 9, githubtest.Status(403, "Resource not accessible by personal access token"))
		}, "Pull requests"},
		"a reviewer who cannot": {func(p *publishChain) { p.config.Publish.Reviewers = []string{"stranger"} }, ""},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			p := newGitHubChain(t)
			p.store("drei")
			c.fault(p)
			_, err := p.publish(t.Context(), "task-1", 1)
			switch {
			case c.want == "" && err != nil:
				t.Fatal(err)
			case c.want == "" && len(p.server.Pulls("octo/widgets")) != 1:
				t.Errorf("pull requests are %+v", p.server.Pulls("octo/widgets"))
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("got %v, want %q", err, c.want)
			case c.want != "" && p.payload(store.SpecPublish, 1)["code"] != "pull_request_failed":
				t.Errorf("payload is %v", p.payload(store.SpecPublish, 1))
			}
			if what == "a reviewer who cannot" && !strings.Contains(p.file("speckit_014-refresh-docs_t012_pr.json"), "stranger cannot be asked for a review") {
				t.Errorf("the response does not say it: %s", p.file("speckit_014-refresh-docs_t012_pr.json"))
			}
			p.nothingLeft()
		})
	}
}
