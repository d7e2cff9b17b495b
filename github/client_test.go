package github_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/github"
	"github.com/moonladderstudios/mm-orchestrator/internal/githubtest"
)

func TestTheAddressOfTheAPI(t *testing.T) {
	t.Parallel()
	for server, want := range map[string]string{
		"https://github.com":               "https://api.github.com",
		"https://GitHub.com/":              "https://api.github.com",
		"https://www.github.com":           "https://api.github.com",
		"https://acme.ghe.com":             "https://api.acme.ghe.com",
		"https://github.example.com":       "https://github.example.com/api/v3",
		"https://github.example.com:8443/": "https://github.example.com:8443/api/v3",
		"http://127.0.0.1:8080":            "http://127.0.0.1:8080/api/v3",
		"github.com":                       "",
		"https://x:" + token + "@":         "",
	} {
		got, err := github.API(server)
		if got != want || (err == nil) != (want != "") || strings.Contains(fmt.Sprint(err), token) {
			t.Errorf("%s: %s, %v, want %s", server, got, err, want)
		}
	}
}

func TestNamesOfRepositories(t *testing.T) {
	t.Parallel()
	for _, name := range []string{widget, "octo/.github", "o_1/a.b-c", "octo/_", "o-c/1." + strings.Repeat("x", 100)} {
		if err := github.CheckName(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{
		"", "octo", "octo/", "/widgets", "octo//widgets", "octo/widgets/tree", "octo/.", "octo/..", "../widgets", "octo/a..b", "octo/widgets.git", "o.c/widgets",
		"-octo/widgets", "octo/-widgets", "--upload-pack=x/y", "octo/wid gets", "octo/widgets\n", "octo/wid%2egets", "octo/widgets?x=1", "octo/widgets#x", "octo@x/widgets", "octo/ümlaut",
		"octo/" + strings.Repeat("x", 146),
	} {
		if github.CheckName(name) == nil {
			t.Errorf("%q is accepted", name)
		}
	}
}

func TestConfigsThatAreRefused(t *testing.T) {
	t.Parallel()
	for api, part := range map[string]string{
		"http://github.example.com/api/v3": "must begin with https", "https://bot:pw@github.example.com": "must not have a login", "ftp://x": "begins with https", "x": "begins with https",
	} {
		if _, err := github.New(github.Config{API: api, Token: &tokens{}}); err == nil || !strings.Contains(err.Error(), part) || strings.Contains(err.Error(), "pw@") {
			t.Errorf("%s: %v", api, err)
		}
	}
}

func TestWhatATokenMayDo(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.collaborators()
	expires := time.Now().Add(240 * time.Hour).UTC().Truncate(time.Second)
	f.server.SetToken(token, githubtest.Token{Login: "bot", Scopes: []string{"repo", "workflow"}, Expires: expires})
	got, err := f.client.FindRepository(t.Context(), "Octo/Widgets")
	if err != nil || got.Name != widget || got.DefaultBranch != "main" || !got.Private || got.Archived || !got.MayPush || !got.Classic || !slices.Equal(got.Scopes, []string{"repo", "workflow"}) || !got.Expires.Equal(expires) {
		t.Errorf("a classic token: %+v, %v", got, err)
	}
	f.server.SetToken(token, githubtest.Token{Login: "bot"})
	if got, err = f.client.FindRepository(t.Context(), widget); err != nil || got.Classic || !got.Expires.IsZero() {
		t.Errorf("a fine-grained token: %+v, %v", got, err)
	}
	if err := f.client.CheckMayOpen(t.Context(), widget); err != nil {
		t.Error(err)
	}
	f.server.SetToken(token, githubtest.Token{Login: "bot", ReadOnly: true})
	if got, err = f.client.FindRepository(t.Context(), widget); err != nil || got.MayPush {
		t.Errorf("a token that may read: %+v, %v", got, err)
	}
	if err := f.client.CheckMayOpen(t.Context(), widget); github.KindOf(err) != github.Access {
		t.Error(err)
	}
	if len(f.server.Pulls(widget)) > 0 {
		t.Error("the check has opened a pull request")
	}
}

// An error says what to do, and whether it is of use to try again.
func TestErrorsInWords(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		change    func(*fixture)
		want      func(*github.Want)
		kind      github.Kind
		retryable bool
		parts     []string
	}{
		"revoked": {change: func(f *fixture) { f.server.RevokeToken(token) }, kind: github.Login, parts: []string{"401: Bad credentials", "Make a new one"}},
		"expired": {change: func(f *fixture) { f.server.SetToken(token, githubtest.Token{Expires: time.Now().Add(-time.Hour)}) }, kind: github.Login, parts: []string{"401: Bad credentials", "expired"}},
		"fine-grained, of another repository": {change: func(f *fixture) {
			f.server.SetToken(token, githubtest.Token{Login: "bot", Repositories: []string{"octo/gears"}})
		}, kind: github.Access, parts: []string{"Resource not accessible by personal access token", "Pull requests", "pull_requests=write"}},
		"fine-grained, private": {change: func(f *fixture) {
			f.collaborators()
			f.server.SetToken(token, githubtest.Token{Login: "bot", Repositories: []string{"octo/gears"}})
		}, kind: github.NotFound, parts: []string{"404: Not Found", "correct the name", "give the token access"}},
		"no permission": {change: func(f *fixture) { f.server.SetToken(token, githubtest.Token{Login: "bot", NoPullRequests: true}) }, kind: github.Access, parts: []string{"may not open a pull request of " + branch + " into main in octo/widgets (403"}},
		"scope missing": {change: func(f *fixture) {
			f.collaborators()
			f.server.SetToken(token, githubtest.Token{Login: "bot", Scopes: []string{"gist"}})
		}, kind: github.NotFound, parts: []string{"needs the scope repo"}},
		"archived": {change: func(f *fixture) {
			if err := f.server.Set(widget, githubtest.Settings{Archived: true}); err != nil {
				f.Fatal(err)
			}
		}, kind: github.Access, parts: []string{"archived so is read-only", "unarchive"}},
		"single sign-on": {change: func(f *fixture) {
			f.server.Fail("GET", 1, githubtest.Header("X-GitHub-SSO", "required; url=https://github.com/orgs/octo/sso?a=1", githubtest.Status(403, "Resource protected by organization SAML enforcement.")))
		}, kind: github.Access, parts: []string{"single sign-on", "https://github.com/orgs/octo/sso?a=1"}},
		"no repository":     {want: func(w *github.Want) { w.Repository = "octo/other" }, kind: github.NotFound, parts: []string{"octo/other", "correct the name"}},
		"no name":           {want: func(w *github.Want) { w.Repository = "octo/../user" }, kind: github.Invalid, parts: []string{"owner/name"}},
		"no branch":         {want: func(w *github.Want) { w.Head = "missing" }, kind: github.Invalid, parts: []string{"422: Validation Failed; PullRequest head is invalid", "push it again"}},
		"no base":           {want: func(w *github.Want) { w.Base = "missing" }, kind: github.Invalid, parts: []string{"PullRequest base is invalid", "correct its setting"}},
		"nothing to merge":  {want: func(w *github.Want) { w.Base = branch }, kind: github.Invalid, parts: []string{"No commits between", "nothing to merge"}},
		"no title":          {want: func(w *github.Want) { w.Title = " " }, kind: github.Invalid, parts: []string{"Issue title is missing_field"}},
		"an outage":         {change: func(f *fixture) { f.server.Fail("GET", 100, githubtest.Text(503, "<html>unicorn")) }, kind: github.Unavailable, retryable: true, parts: []string{"503 Service Unavailable", "later"}},
		"a proxy's page":    {change: func(f *fixture) { f.server.Fail("GET", 1, githubtest.Text(200, "<html>log in")) }, kind: github.Unusable, parts: []string{"200 OK", "not what GitHub answers", "Correct the address"}},
		"another program":   {change: func(f *fixture) { f.server.Fail("GET", 1, githubtest.Text(200, "[{}]")) }, kind: github.Unusable, parts: []string{"no pull request"}},
		"a teapot":          {change: func(f *fixture) { f.server.Fail("GET", 1, githubtest.Text(418, "")) }, kind: github.Unusable, parts: []string{"418"}},
		"the token is said": {change: func(f *fixture) { f.server.Fail("GET", 1, githubtest.Status(422, "what is "+token+"?\r\n\x1b[31m")) }, kind: github.Invalid, parts: []string{"what is ***?"}},
		"errors as a text": {change: func(f *fixture) {
			f.server.Fail("GET", 1, githubtest.Text(422, `{"message":"Bad","errors":"one text"}`))
		}, kind: github.Invalid, parts: []string{"Bad; one text"}},
		"errors as texts": {change: func(f *fixture) {
			f.server.Fail("GET", 1, githubtest.Text(422, `{"message":"Bad","errors":["a text"]}`))
		}, kind: github.Invalid, parts: []string{"Bad; a text"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			w := github.Want{Repository: widget, Head: branch, Base: "main", Title: "T"}
			if test.change != nil {
				test.change(f)
			}
			if test.want != nil {
				test.want(&w)
			}
			_, err := f.client.Ensure(t.Context(), w)
			got := f.fails(err)
			if got.Kind != test.kind || got.Retryable() != test.retryable {
				t.Errorf("the error is %s, retryable %v: %v", got.Kind, got.Retryable(), got)
			}
			for _, part := range test.parts {
				if !strings.Contains(got.Error(), part) {
					t.Errorf("the error lacks %q: %v", part, got)
				}
			}
			if len(f.server.Pulls(widget)) > 0 {
				t.Error("a pull request was opened")
			}
		})
	}
}

func TestRateLimitsAreWaitedFor(t *testing.T) {
	t.Parallel()
	w := github.Want{Repository: widget, Head: branch, Base: "main", Title: "T"}
	for name, test := range map[string]struct {
		faults []githubtest.Fault
		waits  []time.Duration
	}{
		"403 with Retry-After":         {[]githubtest.Fault{githubtest.SecondaryLimit(403, 7*time.Second)}, []time.Duration{7 * time.Second}},
		"429 with Retry-After":         {[]githubtest.Fault{githubtest.SecondaryLimit(429, 90*time.Second), githubtest.SecondaryLimit(429, time.Second)}, []time.Duration{90 * time.Second, time.Second}},
		"without a header":             {[]githubtest.Fault{githubtest.SecondaryLimit(403, 0), githubtest.SecondaryLimit(429, 0)}, []time.Duration{time.Minute, 2 * time.Minute}},
		"an outage that says how long": {[]githubtest.Fault{githubtest.Header("Retry-After", "20", githubtest.Status(503, "maintenance"))}, []time.Duration{20 * time.Second}},
	} {
		for _, request := range []string{"GET " + pulls, "POST " + pulls} {
			if strings.HasPrefix(request, "POST") && name == "an outage that says how long" {
				continue
			}
			t.Run(name+" "+request, func(t *testing.T) {
				t.Parallel()
				f := newFixture(t)
				for _, fault := range test.faults {
					f.server.Fail(request, 1, fault)
				}
				if got := f.ensure(w); !got.Created || !slices.Equal(f.waits, test.waits) {
					t.Errorf("created %v after waits of %v, want %v", got.Created, f.waits, test.waits)
				}
				f.only()
			})
		}
	}
}

func TestThePrimaryRateLimit(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.server.SetRateLimit("bot", 0, time.Now().Add(100*time.Second))
	f.config.Wait = func(_ context.Context, pause time.Duration) error {
		f.waits = append(f.waits, pause)
		f.server.SetRateLimit("bot", 5000, time.Now().Add(time.Hour))
		return nil
	}
	// The reset is on the server's clock.
	f.config.Now = func() time.Time { return time.Now().Add(-24 * time.Hour) }
	client, err := github.New(f.config)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.FindRepository(t.Context(), widget); err != nil || len(f.waits) != 1 || f.waits[0] < 98*time.Second || f.waits[0] > 102*time.Second {
		t.Errorf("waited %v, %v", f.waits, err)
	}
}

func TestWaitsAreBounded(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		fault    githubtest.Fault
		patience time.Duration
		deadline time.Duration
		waits    []time.Duration
	}{
		"longer than the patience":            {githubtest.SecondaryLimit(403, time.Hour), 5 * time.Minute, 0, nil},
		"longer than the patience in all":     {githubtest.SecondaryLimit(403, 2*time.Minute), 5 * time.Minute, 0, []time.Duration{2 * time.Minute, 2 * time.Minute}},
		"longer than the context":             {githubtest.SecondaryLimit(429, 2*time.Minute), time.Hour, time.Minute, nil},
		"the caller has none":                 {githubtest.SecondaryLimit(429, time.Second), -1, 0, nil},
		"a header that is no number is a min": {githubtest.Header("Retry-After", "soon", githubtest.SecondaryLimit(429, 0)), 90 * time.Second, 0, []time.Duration{time.Minute}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, func(c *github.Config) { c.Patience = test.patience })
			f.server.Fail("GET", 100, test.fault)
			ctx := t.Context()
			if test.deadline > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, test.deadline)
				defer cancel()
			}
			_, err := f.client.FindRepository(ctx, widget)
			got := f.fails(err)
			if got.Kind != github.RateLimit || !got.Retryable() || !strings.Contains(got.Error(), "rate limit") || !slices.Equal(f.waits, test.waits) {
				t.Errorf("waited %v, then %s: %v", f.waits, got.Kind, got)
			}
			if strings.HasPrefix(name, "longer than the patience") && got.Until.IsZero() {
				t.Error("the error does not say until when")
			}
		})
	}
}

func TestARequestThatIsNotAnsweredIsRepeated(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.server.Fail("GET", 1, githubtest.LoseAnswer())
	f.server.Fail("GET", 2, githubtest.Text(502, "Bad Gateway"))
	if _, err := f.client.FindRepository(t.Context(), widget); err != nil || !slices.Equal(f.waits, []time.Duration{time.Second, 2 * time.Second, 4 * time.Second}) {
		t.Errorf("waited %v, %v", f.waits, err)
	}
	f.server.Fail("GET", 100, githubtest.Text(500, ""))
	before := len(f.server.Requests("GET"))
	if _, err := f.client.FindRepository(t.Context(), widget); github.KindOf(err) != github.Unavailable || len(f.server.Requests("GET"))-before != 4 {
		t.Errorf("%d requests, %v", len(f.server.Requests("GET"))-before, err)
	}
}

func TestEveryCallEnds(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		fault githubtest.Fault
		kind  github.Kind
		part  string
	}{
		"no answer":                 {githubtest.NoAnswer(), github.Unavailable, "has not answered within 300ms"},
		"an answer that never ends": {githubtest.Slow(), github.Unavailable, "has not answered within 300ms"},
		"an answer of 100 MB":       {githubtest.Huge(100 << 20), github.Unusable, "more than 16777216 bytes"},
		"one that says so":          {githubtest.Header("Content-Length", "104857600", githubtest.Huge(1<<20)), github.Unusable, "has 104857600 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			timeout := 300 * time.Millisecond
			if test.kind == github.Unusable {
				timeout = 30 * time.Second
			}
			f := newFixture(t, func(c *github.Config) { c.Timeout, c.Patience = timeout, 100*time.Millisecond })
			f.server.Fail("GET", 100, test.fault)
			_, err := f.client.FindRepository(t.Context(), widget)
			if got := f.fails(err); got.Kind != test.kind || !strings.Contains(got.Error(), test.part) {
				t.Errorf("%s: %v", got.Kind, got)
			}
		})
	}
}

func TestTheContextEndsACall(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	stopping := errors.New("the worker stops")
	ctx, cancel := context.WithCancelCause(t.Context())
	f.server.Fail("GET", 1, func(_ http.ResponseWriter, r *http.Request, _ http.HandlerFunc) {
		cancel(stopping)
		<-r.Context().Done()
	})
	if _, err := f.client.FindRepository(ctx, widget); !errors.Is(err, stopping) {
		t.Errorf("the error is %v", err)
	}
}

func TestTheTokenIsSentToOneServerOnly(t *testing.T) {
	t.Parallel()
	f, other := newFixture(t), newFixture(t)
	for _, status := range []int{301, 302, 307, 308} {
		for _, address := range []string{other.server.URL + "/api/v3/repos/octo/widgets", "http" + strings.TrimPrefix(f.server.URL, "https") + "/x"} {
			f.server.Fail("GET", 1, githubtest.RedirectTo(status, address))
			_, err := f.client.FindRepository(t.Context(), widget)
			if got := f.fails(err); got.Kind != github.Unusable || !strings.Contains(got.Error(), "to which the token is not sent") {
				t.Errorf("%d to %s: %v", status, address, got)
			}
		}
	}
	if list := other.server.Requests(""); len(list) > 0 {
		t.Errorf("the other server has got %+v", list)
	}
	f.server.Fail("GET", 100, githubtest.RedirectTo(302, f.server.URL+"/api/v3/repos/octo/widgets"))
	if _, err := f.client.FindRepository(t.Context(), widget); github.KindOf(err) != github.Unusable {
		t.Errorf("a loop: %v", err)
	}
	// A client that does not trust the server's certificate sends nothing.
	f.config.HTTP = &http.Client{Transport: &http.Transport{}}
	client, err := github.New(f.config)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	before := len(f.server.Requests(""))
	_, err = client.FindRepository(t.Context(), widget)
	if got := f.fails(err); got.Kind != github.Unusable || !strings.Contains(got.Error(), "certificate is not trusted") || len(f.server.Requests("")) != before {
		t.Error(got)
	}
}

// GitHub redirects requests for the old name, those that write too.
func TestARenamedRepositoryIsFound(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	if err := f.server.Rename(widget, "octo/gears"); err != nil {
		t.Fatal(err)
	}
	if got, err := f.client.FindRepository(t.Context(), widget); err != nil || got.Name != "octo/gears" {
		t.Errorf("found %+v, %v", got, err)
	}
	for range 2 {
		got := f.ensure(github.Want{Repository: widget, Head: branch, Base: "main", Title: "T", Labels: []string{"codex"}})
		if got.Number != 1 || got.HeadRepository != "octo/gears" || len(got.Notes) > 0 || !slices.Equal(got.Labels, []string{"codex"}) {
			t.Errorf("got %+v", got)
		}
	}
}

func TestTheTokenIsReadAtEachUse(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	for range 3 {
		if _, err := f.client.FindRepository(t.Context(), widget); err != nil {
			t.Fatal(err)
		}
	}
	if f.tokens.reads != 3 {
		t.Errorf("the token was read %d times for 3 requests", f.tokens.reads)
	}
	// It is replaced after the first read: the request with the old one is refused.
	f.tokens.reads = 0
	f.tokens.before = func(read int) {
		if read == 2 {
			f.tokens.text = second
		}
	}
	f.server.SetToken(second, githubtest.Token{Login: "bot", Scopes: []string{"repo"}})
	f.server.RevokeToken(token)
	if _, err := f.client.FindRepository(t.Context(), widget); err != nil || len(f.waits) > 0 {
		t.Errorf("after a rotation: %v, waited %v", err, f.waits)
	}
	// The new one is refused too: no loop.
	f.server.RevokeToken(second)
	before := len(f.server.Requests("GET"))
	if _, err := f.client.FindRepository(t.Context(), widget); github.KindOf(err) != github.Login || len(f.server.Requests("GET")) != before+1 {
		t.Errorf("%v after %d requests", err, len(f.server.Requests("GET"))-before)
	}
}
