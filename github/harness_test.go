package github_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/moonladderstudios/mm-orchestrator/github"
	"github.com/moonladderstudios/mm-orchestrator/internal/githubtest"
	"github.com/moonladderstudios/mm-orchestrator/internal/leaktest"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	token  = "ghp_16C7e42F292c6912E7710c838347Ae178B4a"
	second = "ghp_Zx81kQ0mNv5Lr2Tb7Yc4Ws9Dg3Hj6Pf0Ae1U"
	widget = "octo/widgets"
	branch = "speckit/014-docs/t012"
	pulls  = "/api/v3/repos/octo/widgets/pulls"
)

// tokens is a credential whose value can be replaced. before is called at each use.
type tokens struct {
	mu     sync.Mutex
	text   string
	reads  int
	before func(read int)
}

func (k *tokens) Read(context.Context) (secret.String, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.reads++
	if k.before != nil {
		k.before(k.reads)
	}
	return secret.New(k.text), nil
}

// fixture is a GitHub with a repository in which a branch is ahead of main.
type fixture struct {
	*testing.T
	server *githubtest.Server
	client *github.Client
	tokens *tokens
	config github.Config

	watch *leaktest.Watch

	mu    sync.Mutex
	waits []time.Duration
}

func newFixture(t *testing.T, change ...func(*github.Config)) *fixture {
	t.Helper()
	f := &fixture{T: t, server: githubtest.New(t), tokens: &tokens{text: token}}
	f.watch = leaktest.Guard(t, leaktest.State{Secrets: map[string]string{"token": token, "second": second}, GitHub: f.server, GitHubSecrets: []string{"token", "second"}})
	f.server.SetToken(token, githubtest.Token{Login: "bot", Scopes: []string{"repo"}})
	ctx := t.Context()
	if err := f.server.AddRepository(ctx, widget, map[string]string{"README": "widgets\n"}); err != nil {
		t.Fatal(err)
	}
	f.commit(branch)
	transport, err := f.server.Client()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(transport.CloseIdleConnections)
	f.config = github.Config{
		API: f.server.URL + "/api/v3", Token: f.tokens, HTTP: transport, Logger: slog.New(slog.NewTextHandler(io.MultiWriter(t.Output(), f.watch.Output("the log")), nil)),
		Wait: func(ctx context.Context, pause time.Duration) error {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.waits = append(f.waits, pause)
			return ctx.Err()
		},
	}
	for _, c := range change {
		c(&f.config)
	}
	if f.client, err = github.New(f.config); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fixture) commit(branch string) {
	f.Helper()
	if _, err := f.server.Commit(f.Context(), widget, branch, "change", map[string]string{"docs/" + branch: "text\n"}); err != nil {
		f.Fatal(err)
	}
}

var want = github.Want{
	Repository: widget, Head: branch, Base: "main", Title: "T012: Document the retry endpoint", Body: "What Codex says:\n\n```text\ndone\n```",
	Draft: true, Labels: []string{"codex", "Docs"}, Reviewers: []string{"jane"}, Teams: []string{"writers"},
}

func (f *fixture) collaborators() {
	f.Helper()
	if err := f.server.Set(widget, githubtest.Settings{Private: true, Labels: []string{"docs"}, Collaborators: []string{"jane", "john", "bot"}, Teams: []string{"writers"}}); err != nil {
		f.Fatal(err)
	}
}

func (f *fixture) ensure(want github.Want) github.Ensured {
	f.Helper()
	got, err := f.client.Ensure(f.Context(), want)
	if err != nil {
		f.Fatal(err)
	}
	return got
}

// fails returns the error of a call, which has no token in it.
func (f *fixture) fails(err error) *github.Error {
	f.Helper()
	own, is := err.(*github.Error)
	if !is {
		f.Fatalf("the error is %T %v, want an *Error", err, err)
	}
	f.watch.Text("the error", fmt.Sprintf("%v %+v %#v", own, own, own))
	return own
}

// only returns the one pull request that there must be.
func (f *fixture) only() githubtest.Pull {
	f.Helper()
	list := f.server.Pulls(widget)
	if len(list) != 1 {
		f.Fatalf("there are %d pull requests, want 1: %+v", len(list), list)
	}
	return list[0]
}

// writes are the requests that change something.
func (f *fixture) writes() (list []string) {
	for _, r := range f.server.Requests("") {
		if r.Method != http.MethodGet && strings.HasPrefix(r.Path, "/api/") {
			list = append(list, fmt.Sprintf("%s %s %d", r.Method, strings.TrimPrefix(r.Path, "/api/v3/repos/"+widget), r.Status))
		}
	}
	return list
}
