package preflight

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/credential"
	"github.com/moonladderstudios/mm-orchestrator/internal/leaktest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	token = "ghp_16C7e42F292c6912E7710c838347Ae178B4a"
	key   = "sk-proj-Gh4Jt8Vq1Zn6Xc3Kw9Rb2Md7"
)

// gitHub answers as GitHub's REST API and its git server do.
type gitHub struct {
	mu sync.Mutex
	// token is the one that is accepted.
	token string
	// header and repository are those of the answer for the repository octo/widgets.
	header     http.Header
	repository string
	// status, unless 0, and body replace this answer.
	status int
	body   string
	// git and pulls are the status of the request that begins a push, and of one for a
	// pull request in which everything is missing.
	git, pulls int
	// retryAfter is that header of git's answer, "" for none.
	retryAfter string
	// stall, if set, is closed when requests may be answered.
	stall chan struct{}

	requests atomic.Int64
	seen     []string
	watch    *leaktest.Watch
}

func (g *gitHub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.requests.Add(1)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.seen = append(g.seen, r.Method+" "+r.URL.String())
	others := r.Header.Clone()
	others.Del("Authorization")
	body, _ := io.ReadAll(r.Body)
	g.watch.Text("a request", fmt.Sprintf("%s %s %v %s", r.Method, r.URL, others, body))
	if g.stall != nil {
		select {
		case <-g.stall:
		case <-r.Context().Done():
		}
		return
	}
	_, password, _ := r.BasicAuth()
	switch {
	case strings.HasPrefix(r.URL.Path, "/git/"):
		switch {
		case r.URL.String() != "/git/octo/widgets.git/info/refs?service=git-receive-pack":
			w.WriteHeader(http.StatusNotFound)
		case password != g.token:
			w.Header().Set("Www-Authenticate", `Basic realm="GitHub"`)
			w.WriteHeader(http.StatusUnauthorized)
		default:
			w.Header().Set("Content-Type", "application/x-git-receive-pack-advertisement")
			if g.retryAfter != "" {
				w.Header().Set("Retry-After", g.retryAfter)
			}
			w.WriteHeader(g.git)
			fmt.Fprint(w, strings.Repeat("001f# service=git-receive-pack\n0000", 1000))
		}
	case r.Header.Get("Authorization") != "Bearer "+g.token:
		w.WriteHeader(http.StatusUnauthorized)
		fmt.Fprint(w, `{"message":"Bad credentials","documentation_url":"https://docs.github.com/rest","status":"401"}`)
	case r.Header.Get("User-Agent") == "":
		w.WriteHeader(http.StatusForbidden)
	case r.Method == http.MethodPost && r.URL.Path == "/api/repos/octo/widgets/pulls":
		w.WriteHeader(g.pulls)
		fmt.Fprint(w, `{"message":"Invalid request.\n\n\"base\", \"head\" weren't supplied."}`)
	case r.URL.Path == "/api/repos/octo/widgets":
		for name, values := range g.header {
			w.Header()[name] = values
		}
		if g.status != 0 {
			w.WriteHeader(g.status)
			fmt.Fprint(w, g.body)
			return
		}
		fmt.Fprint(w, g.repository)
	default:
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, `{"message":"Not Found"}`)
	}
}

const may = `{"full_name":"octo/widgets","private":true,"permissions":{"admin":false,"push":true,"pull":true}}`

// program is a codex that prints as the real one, and that counts its calls.
func program(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "codex")
	// A program that another test starts meanwhile would keep the file open for writing,
	// and it could not be executed.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

const loggedIn = `case "$*" in --version) echo codex-cli 0.99.0;; "login status") echo Logged in using ChatGPT >&2;; *) exit 2;; esac`

// fixture is a checker with the servers that it asks.
type fixture struct {
	*gitHub
	t      *testing.T
	config Config
	file   string
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{t: t, gitHub: &gitHub{token: token, header: http.Header{"X-Oauth-Scopes": {"repo, workflow"}}, repository: may, git: 200, pulls: 422}}
	server := httptest.NewServer(f.gitHub)
	transport := &http.Transport{}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		server.Close()
	})
	// Files below t.TempDir are searched for the token.
	dir, err := os.MkdirTemp("", "mm-preflight-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	f.file = filepath.Join(dir, "token")
	f.watch = leaktest.Guard(t, leaktest.State{
		Secrets: map[string]string{"token": token, "key": key}, Environments: map[string][]leaktest.Program{"key": {{Name: "codex", Children: true}}},
	})
	f.write(token)
	f.config = Config{
		GitHub: f.credential("GitHub token", "file:"+f.file), API: server.URL + "/api", Git: server.URL + "/git/",
		Codex: f.credential("Codex key", "env:CODEX_KEY"), HTTP: &http.Client{Transport: transport}, Program: program(t, loggedIn), Environ: []string{"PATH=" + os.Getenv("PATH")},
	}
	return f
}

func (f *fixture) write(text string) {
	f.t.Helper()
	if err := os.WriteFile(f.file, []byte(text), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) credential(name, source string, environ ...string) *credential.Credential {
	f.t.Helper()
	parsed, err := credential.Parse(source)
	if err != nil {
		f.t.Fatal(err)
	}
	c, err := credential.New(credential.Config{Name: name, Setting: "SETTING", Source: parsed, Environ: environ})
	if err != nil {
		f.t.Fatal(err)
	}
	return c
}

func (f *fixture) checker() *Checker {
	f.t.Helper()
	c, err := New(f.config)
	if err != nil {
		f.t.Fatal(err)
	}
	return c
}

func (f *fixture) check(request Request) Report {
	f.t.Helper()
	report, err := f.checker().Check(f.t.Context(), request)
	if err != nil {
		f.t.Fatal(err)
	}
	f.watch.Text("the report", fmt.Sprintf("%+v", report))
	return report
}

var widgets = Request{Repository: "octo/widgets"}

func TestWhatIsFoundAboutTheToken(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 1, 10, 12, 0, 0, 0, time.UTC)
	fineGrained := func(f *fixture) { f.header = http.Header{} }
	for name, test := range map[string]struct {
		change func(*fixture)
		status Status
		wants  []string
	}{
		"a classic token":    {func(*fixture) {}, Valid, []string{"may push to octo/widgets", "the scopes repo, workflow"}},
		"a fine-grained one": {fineGrained, Valid, []string{"may push to octo/widgets"}},
		"public repository, narrow scope": {func(f *fixture) {
			f.header.Set("X-Oauth-Scopes", "public_repo")
			f.repository = strings.Replace(may, `"private":true`, `"private":false`, 1)
		}, Valid, []string{"the scope public_repo"}},
		"expires late":       {func(f *fixture) { f.header.Set("Github-Authentication-Token-Expiration", "2026-03-01 12:00:00 UTC") }, Valid, []string{"expires on 2026-03-01 12:00 UTC"}},
		"expires soon":       {func(f *fixture) { f.header.Set("Github-Authentication-Token-Expiration", "2026-01-12 12:00:00 -0500") }, Valid, []string{"expires on 2026-01-12 17:00 UTC, which is soon", "token"}},
		"revoked":            {func(f *fixture) { f.token = "another-token" }, Invalid, []string{"refuses the token in file:", "401: Bad credentials", "Make a new one"}},
		"no file":            {func(f *fixture) { os.Remove(f.file) }, Invalid, []string{"the GitHub token cannot be read", "does not exist"}},
		"scope missing":      {func(f *fixture) { f.header.Set("X-Oauth-Scopes", "public_repo, gist") }, ScopeMissing, []string{"has the scopes public_repo, gist, but needs repo"}},
		"no scope":           {func(f *fixture) { f.header["X-Oauth-Scopes"] = []string{""} }, ScopeMissing, []string{"has no scope, but needs repo"}},
		"read only":          {func(f *fixture) { f.repository = strings.Replace(may, `"push":true`, `"push":false`, 1) }, ScopeMissing, []string{"may read octo/widgets, but not push", "write access"}},
		"archived":           {func(f *fixture) { f.repository = strings.Replace(may, `{`, `{"archived":true,`, 1) }, ScopeMissing, []string{"archived"}},
		"no contents: write": {func(f *fixture) { fineGrained(f); f.git = 403 }, ScopeMissing, []string{"refuses a push", "Contents for read and write"}},
		"no pull requests":   {func(f *fixture) { fineGrained(f); f.pulls = 403 }, ScopeMissing, []string{"not open a pull request", "Pull requests for read and write"}},
		"cannot see it": {func(f *fixture) {
			f.status, f.body = 404, `{"message":"Not Found"}`
			f.header.Set("X-Oauth-Scopes", "gist")
		}, ScopeMissing, []string{"shows no repository octo/widgets", "It has the scope gist"}},
		"not of the token": {func(f *fixture) {
			f.status, f.body = 403, `{"message":"Resource not accessible by personal access token"}`
		}, ScopeMissing, []string{"may not use octo/widgets", "Resource not accessible", "fine-grained"}},
		"single sign-on": {func(f *fixture) {
			f.status = 403
			f.header.Set("X-Github-Sso", "required; url=https://github.com/orgs/octo/sso?a=1")
		}, ScopeMissing, []string{"single sign-on", "https://github.com/orgs/octo/sso?a=1"}},
		"rate limit": {func(f *fixture) {
			f.status = 403
			f.header.Set("X-Ratelimit-Remaining", "0")
			f.header.Set("X-Ratelimit-Reset", fmt.Sprint(now.Add(time.Minute).Unix()))
		}, Invalid, []string{"rate limit", "until 12:01:00 UTC"}},
		"secondary rate limit": {func(f *fixture) { f.status = 429; f.header.Set("Retry-After", "60") }, Invalid, []string{"rate limit", "until 12:01:00 UTC"}},
		"an outage":            {func(f *fixture) { f.status, f.body = 503, "<html>unicorn" }, Invalid, []string{"503 Service Unavailable", "later"}},
		"no GitHub":            {func(f *fixture) { f.repository = "<html>a proxy's login page" }, Invalid, []string{"200 OK", "not with a repository", "MM_ORCHESTRATOR_GITHUB_API"}},
		"a huge answer":        {func(f *fixture) { f.repository = strings.Repeat(" ", 20<<20) + may }, Invalid, []string{"200 OK", "not with a repository"}},
		"an outage of git":     {func(f *fixture) { f.git = 503 }, Invalid, []string{"/git/octo/widgets.git has failed (503 Service Unavailable)", "later"}},
		"git's limit":          {func(f *fixture) { f.git, f.retryAfter = 403, "90" }, Invalid, []string{"/git/octo/widgets.git limits the requests of the token in file:", "(403), for 1m30s", "again then"}},
		"git's other limit":    {func(f *fixture) { f.git = 429 }, Invalid, []string{"limits the requests", "(429). Try the run again then"}},
		"no git server":        {func(f *fixture) { f.config.Git = f.config.API }, ScopeMissing, []string{"refuses a push"}},
		"nobody answers":       {func(f *fixture) { f.config.API = "http://127.0.0.1:1" }, Invalid, []string{"cannot be asked", "connection refused"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			f.config.Now = func() time.Time { return now }
			test.change(f)
			found := f.check(widgets).GitHub
			if found.Status != test.status {
				t.Errorf("found %s, want %s", found.Status, test.status)
			}
			for _, want := range test.wants {
				if !strings.Contains(found.Message, want) {
					t.Errorf("message %q, want %q in it", found.Message, want)
				}
			}
		})
	}
}

// A repository's name comes from a message, so that no other address is asked for it.
func TestRepositoriesThatAreRefused(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	for _, repository := range []string{"", "octo", "octo/", "/widgets", "octo/../widgets", "octo/widgets/../other", "octo/widgets?a=1", "octo/wid gets", "octo/widgets\r\nX: y", "--upload-pack=x/y z", "octo/..", "https://evil.example/octo"} {
		if found := f.check(Request{Repository: repository}).GitHub; found.Status != Invalid {
			t.Errorf("%q: %+v", repository, found)
		}
	}
	if n := f.requests.Load(); n != 0 {
		t.Errorf("%d requests were sent: %q", n, f.seen)
	}
}

// The token goes to no other server than the one that is configured.
func TestTheTokenIsNotSentElsewhere(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	var elsewhere atomic.Int64
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { elsewhere.Add(1) }))
	defer other.Close()
	f.status = http.StatusMovedPermanently
	f.header.Set("Location", other.URL+"/repos/octo/widgets")
	if found := f.check(widgets).GitHub; found.Status != Invalid || !strings.Contains(found.Message, "another server") || elsewhere.Load() != 0 {
		t.Errorf("%+v, %d requests elsewhere", found, elsewhere.Load())
	}
	f = newFixture(t)
	git := httptest.NewServer(http.RedirectHandler(other.URL, http.StatusMovedPermanently))
	defer git.Close()
	f.config.Git = git.URL
	if found := f.check(widgets).GitHub; found.Status != Invalid || !strings.Contains(found.Message, "another server") || elsewhere.Load() != 0 {
		t.Errorf("git server: %+v, %d requests elsewhere", found, elsewhere.Load())
	}
}

func TestAServerThatDoesNotAnswerIsGivenUp(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.stall = make(chan struct{})
	f.config.Timeout = 400 * time.Millisecond
	began := time.Now()
	if found := f.check(widgets).GitHub; found.Status != Invalid || !strings.Contains(found.Message, "has not answered within 200ms") {
		t.Errorf("%+v", found)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it took %s", took)
	}
	stopping := errors.New("the worker stops")
	ctx, stop := context.WithCancelCause(t.Context())
	stop(stopping)
	if _, err := f.checker().Check(ctx, widgets); !errors.Is(err, stopping) {
		t.Errorf("error %v", err)
	}
}

// A finding counts for the next tasks, until the credential changes, a fresh check finds
// a fault, or its time is over. A fault does not count: the operator may have mended it.
func TestWhenItIsAskedAgain(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	now := time.Now()
	f.config.Now = func() time.Time { return now }
	c := f.checker()
	asks := func(what string, request Request, want bool, status Status) {
		t.Helper()
		before := f.requests.Load()
		report, err := c.Check(t.Context(), request)
		if err != nil || report.GitHub.Status != status || f.requests.Load() > before != want {
			t.Errorf("%s: %+v, %v, %d requests", what, report.GitHub, err, f.requests.Load()-before)
		}
	}
	accept := func(token string) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.token = token
	}
	asks("first", widgets, true, Valid)
	asks("second", widgets, false, Valid)
	asks("fresh", Request{Repository: "octo/widgets", Fresh: true}, true, Valid)
	f.write("another-token-0123456789")
	asks("rotated, not accepted", widgets, true, Invalid)
	asks("a fault", widgets, true, Invalid)
	accept("another-token-0123456789")
	asks("mended", widgets, true, Valid)
	asks("kept", widgets, false, Valid)
	accept("none")
	asks("revoked, not known yet", widgets, false, Valid)
	asks("revoked", Request{Repository: "octo/widgets", Fresh: true}, true, Invalid)
	asks("after a refusal", widgets, true, Invalid)
	accept("another-token-0123456789")
	asks("accepted again", widgets, true, Valid)
	now = now.Add(c.config.Keep + time.Second)
	asks("later", widgets, true, Valid)
}

// token makes an access token of Codex's login that expires at a time.
func accessToken(t *testing.T, at time.Time) string {
	t.Helper()
	part := func(v any) string {
		text, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return base64.RawURLEncoding.EncodeToString(text)
	}
	return part(map[string]string{"alg": "none"}) + "." + part(map[string]any{"exp": at.Unix()}) + ".signature"
}

func TestWhatIsFoundAboutCodex(t *testing.T) {
	t.Parallel()
	withKey := func(f *fixture) { f.config.Codex = f.credential("Codex key", "env:CODEX_KEY", "CODEX_KEY="+key) }
	login := func(until time.Duration) func(*fixture) {
		return func(f *fixture) {
			f.config.Home = f.t.TempDir()
			text := `{"OPENAI_API_KEY":null,"tokens":{"access_token":"` + accessToken(f.t, time.Now().Add(until)) + `"}}`
			if err := os.WriteFile(filepath.Join(f.config.Home, "auth.json"), []byte(text), 0o600); err != nil {
				f.t.Fatal(err)
			}
		}
	}
	for name, test := range map[string]struct {
		change func(*fixture)
		status Status
		wants  []string
	}{
		"a login":           {func(*fixture) {}, Valid, []string{"codex-cli 0.99.0, with its login: Logged in using ChatGPT"}},
		"a login for long":  {login(100 * time.Hour), Valid, []string{"with its login"}},
		"a login that ends": {login(time.Hour), ExpiresSoon, []string{"its login expires on", "must be able to write", "auth.json"}},
		"a key":             {withKey, Valid, []string{"codex-cli 0.99.0, with the key in env:CODEX_KEY"}},
		"a key in no file":  {func(f *fixture) { f.config.Codex = f.credential("Codex key", "file:/nowhere/key") }, Invalid, []string{"the Codex key cannot be read from file:/nowhere/key"}},
		"no login": {func(f *fixture) {
			f.config.Program = program(t, `[ "$1" = --version ] && echo codex-cli 0.99.0 && exit; echo Not logged in >&2; exit 1`)
		}, Invalid, []string{"has no login (exit status 1): Not logged in", "no key in env:CODEX_KEY", "run `codex login`"}},
		"no program":       {func(f *fixture) { f.config.Program = "no-such-codex" }, Invalid, []string{"there is no program no-such-codex", "npm install -g @openai/codex", "MM_ORCHESTRATOR_CODEX_PROGRAM"}},
		"a broken program": {func(f *fixture) { f.config.Program = program(t, "echo cannot find module >&2; exit 7") }, Invalid, []string{"--version does not work (exit status 7): cannot find module"}},
		"a program hangs":  {func(f *fixture) { f.config.Program = program(t, "sleep 1000"); f.config.Timeout = time.Second }, Invalid, []string{"did not end"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			test.change(f)
			report := f.check(Request{Repository: "octo/widgets", Codex: true})
			if report.Codex.Status != test.status {
				t.Errorf("found %s, want %s", report.Codex.Status, test.status)
			}
			for _, want := range test.wants {
				if !strings.Contains(report.Codex.Message, want) {
					t.Errorf("message %q, want %q in it", report.Codex.Message, want)
				}
			}
			if report.Login != (Login{Status: LoginSkipped, Message: NoVolume}) {
				t.Errorf("login %+v", report.Login)
			}
		})
	}
}

// A secret that a program prints where its text is cut leaves no part of it.
func TestTextsAreRedactedBeforeTheyAreCut(t *testing.T) {
	t.Parallel()
	const secret = "hunter2-is-not-a-good-password"
	redact := artifacts.NewRedactor([]string{"THE_PASSWORD=" + secret}).String
	for before := 150; before < 210; before += 10 {
		says := `[ "$1" = --version ] && echo codex-cli 0.99.0 && exit; echo ` + strings.Repeat("x", before) + " " + secret + `; exit 1`
		f := newFixture(t)
		f.config.Program, f.config.Redact = program(t, says), redact
		if text := f.check(Request{Repository: "octo/widgets", Codex: true}).Codex.Message; !strings.Contains(text, "xxx") || strings.Contains(text, "hunter") {
			t.Errorf("with %d bytes before the secret: %s", before, text)
		}
	}
}

// The key is not in the environment of the program that only prints its version.
func TestTheProgramGetsNoKey(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.config.Codex = f.credential("Codex key", "env:CODEX_KEY", "CODEX_KEY="+key)
	seen := filepath.Join(t.TempDir(), "environment")
	f.config.Program = program(t, "env > "+seen+"; pwd >> "+seen+"; echo codex-cli 0.99.0")
	f.check(Request{Repository: "octo/widgets", Codex: true})
	text, err := os.ReadFile(seen)
	if err != nil || strings.Contains(string(text), key) || strings.Contains(string(text), token) || !strings.Contains(string(text), os.TempDir()) {
		t.Errorf("%v: %s", err, text)
	}
}

// engine is a docker engine in which the command ends as told.
type engine struct {
	result compose.OneOffResult
	err    error
	hang   bool
	asked  []compose.OneOff
}

func (e *engine) RunOneOff(ctx context.Context, task compose.OneOff) (compose.OneOffResult, error) {
	e.asked = append(e.asked, task)
	if e.hang {
		<-ctx.Done()
		return e.result, context.Cause(ctx)
	}
	return e.result, e.err
}

func TestTheLoginOfAVolume(t *testing.T) {
	t.Parallel()
	zero, one := 0, 1
	long := strings.Repeat("word ", 200)
	for name, test := range map[string]struct {
		engine *engine
		volume string
		want   Login
	}{
		"logged in":        {&engine{result: compose.OneOffResult{Stderr: "Logged in\n  using ChatGPT\n", Stdout: "other"}}, "", Login{LoginPassed, "Logged in using ChatGPT", &zero, "Logged in\n  using ChatGPT"}},
		"nothing printed":  {&engine{}, "", Login{LoginPassed, "Codex login status check passed.", &zero, ""}},
		"not logged in":    {&engine{result: compose.OneOffResult{ExitCode: 1, Stdout: "Not logged in\n"}}, "", Login{LoginFailed, "Codex login status failed for volume 'codex_auth_0'. Re-authenticate this shard using `codex login` and retry. Details: Not logged in", &one, "Not logged in"}},
		"much is printed":  {&engine{result: compose.OneOffResult{ExitCode: 1, Stderr: long}}, "", Login{LoginFailed, "Codex login status failed for volume 'codex_auth_0'. Re-authenticate this shard using `codex login` and retry. Details: " + long[:509] + "...", &one, strings.TrimSpace(long)}},
		"it hangs":         {&engine{hang: true, result: compose.OneOffResult{Stderr: "waiting"}}, "", Login{LoginFailed, "Codex login status check timed out after 1 seconds for volume 'codex_auth_0'. Details: waiting", nil, "waiting"}},
		"engine is away":   {&engine{err: errors.New("the engine does not answer")}, "", Login{LoginFailed, "Unable to execute Codex login status for volume 'codex_auth_0': the engine does not answer", nil, ""}},
		"no image":         {&engine{err: fmt.Errorf("find image x: %w", compose.ErrNotFound)}, "", Login{LoginFailed, "Unable to execute Codex login status for volume 'codex_auth_0': find image x: " + compose.ErrNotFound.Error() + ". Make the volume with `codex login` in it, and pull the image, on the worker's docker engine", nil, ""}},
		"the run's volume": {&engine{}, "codex_auth_7", Login{LoginPassed, "Codex login status check passed.", &zero, ""}},
		"a host directory": {&engine{}, "/etc", Login{LoginFailed, "Unable to execute Codex login status for volume '/etc': it is no name of a docker volume", nil, ""}},
		"no engine":        {nil, "", Login{LoginFailed, "Unable to execute Codex login status for volume 'codex_auth_0': the worker has no docker engine: set DOCKER_HOST to one, or unset CODEX_VOLUME_NAME", nil, ""}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			f.config.Volume, f.config.LoginTimeout = "codex_auth_0", time.Second
			if test.engine != nil {
				f.config.Containers = test.engine
			}
			got := f.check(Request{Repository: "octo/widgets", Codex: true, Volume: test.volume}).Login
			same := got.Status == test.want.Status && got.Message == test.want.Message && got.Output == test.want.Output &&
				(got.ExitCode == nil) == (test.want.ExitCode == nil) && (got.ExitCode == nil || *got.ExitCode == *test.want.ExitCode)
			if !same {
				t.Errorf("got  %+v\nwant %+v", got, test.want)
			}
			if test.engine != nil && len(test.engine.asked) > 0 {
				task := test.engine.asked[0]
				if text := fmt.Sprintf("%v %v %s %s", task.Command, task.Environ, task.Image, task.Target); text != "[bash -lc codex login status] [HOME=/home/app] moonmind/spec-automation-job:latest /home/app/.codex" {
					t.Errorf("container %s", text)
				}
				if test.volume != "" && task.Volume != test.volume {
					t.Errorf("volume %s", task.Volume)
				}
			}
			if f.check(widgets).Login.Status != LoginSkipped {
				t.Error("a task that only publishes checks the login")
			}
		})
	}
}

func TestConfigsThatAreRefused(t *testing.T) {
	t.Parallel()
	for what, change := range map[string]func(*Config){
		"Config.GitHub": func(c *Config) { c.GitHub = nil },
		"Config.API":    func(c *Config) { c.API = "api.github.com" },
		"Config.Git":    func(c *Config) { c.Git = "https://user:password@github.com" },
		"Config.Home":   func(c *Config) { c.Home = "relative" },
	} {
		f := newFixture(t)
		change(&f.config)
		if _, err := New(f.config); err == nil || !strings.Contains(err.Error(), what) || strings.Contains(err.Error(), "password") {
			t.Errorf("%s: %v", what, err)
		}
	}
}
