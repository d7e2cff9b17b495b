package githubtest_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/moonladderstudios/mm-orchestrator/internal/githubtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The server refuses what GitHub refuses, in GitHub's words
// (docs.github.com/rest/using-the-rest-api/troubleshooting-the-rest-api).
func TestTheAPIIsStrict(t *testing.T) {
	t.Parallel()
	s := githubtest.New(t)
	s.SetToken("valid", githubtest.Token{Login: "bot", Scopes: []string{"repo"}})
	s.SetToken("fine", githubtest.Token{Login: "bot", NoPullRequests: true, Expires: time.Now().Add(time.Hour)})
	s.SetToken("gist", githubtest.Token{Login: "bot", Scopes: []string{"gist"}})
	for name, settings := range map[string]githubtest.Settings{"octo/public": {}, "octo/private": {Private: true}} {
		if err := s.AddRepository(t.Context(), name, map[string]string{"README": "x\n"}); err != nil {
			t.Fatal(err)
		}
		if err := s.Set(name, settings); err != nil {
			t.Fatal(err)
		}
	}
	client, err := s.Client()
	if err != nil {
		t.Fatal(err)
	}
	defer client.CloseIdleConnections()
	const pulls = "POST /repos/octo/public/pulls"
	for _, test := range []struct {
		request, headers, body string
		status                 int
		parts                  []string
	}{
		{"GET /repos/octo/public", "User-Agent:", "", 403, []string{"User-Agent header"}},
		{"GET /repos/octo/public", "X-GitHub-Api-Version: 2020-01-01", "", 400, []string{"not a supported version"}},
		{"GET /repos/octo/public", "Accept: text/html", "", 415, []string{"Must accept 'application/json'"}},
		{"GET /repos/octo/public", "Accept: application/vnd.github+json", "", 200, []string{`"default_branch":"main"`, "X-Ratelimit-Limit:[60]"}},
		{"GET /repos/octo/public", "Authorization: Bearer valid", "", 200, []string{`"push":true`, "X-Oauth-Scopes:[repo]", "X-Ratelimit-Limit:[5000]", "X-Ratelimit-Reset:["}},
		{"GET /repos/octo/public", "Authorization: token valid", "", 200, nil},
		{"GET /repos/octo/public", "Authorization: Bearer fine", "", 200, []string{"Github-Authentication-Token-Expiration:["}},
		{"GET /repos/octo/public", "Authorization: valid", "", 401, []string{"Bad credentials"}},
		{"GET /repos/octo/public", "Authorization: Bearer other", "", 401, []string{`"status":"401"`}},
		{"GET /repos/octo/public/", "Authorization: Bearer valid", "", 404, nil},
		{"GET /repos/octo/private", "", "", 404, []string{`"message":"Not Found"`}},
		{"GET /repos/octo/private", "Authorization: Bearer gist", "", 404, nil},
		{pulls, "", "{}", 401, []string{"Requires authentication"}},
		{pulls, "Authorization: Bearer gist", "{}", 404, nil},
		{pulls, "Authorization: Bearer fine", "{}", 403, []string{"Resource not accessible by personal access token", "X-Accepted-Github-Permissions:[pull_requests=write]"}},
		{pulls, "Authorization: Bearer valid", "{", 400, []string{"Problems parsing JSON"}},
		{pulls, "Authorization: Bearer valid", "[]", 400, []string{"Body should be a JSON object"}},
		{pulls, "Authorization: Bearer valid", "{}", 422, []string{`Invalid request.\n\n\"base\", \"head\" weren't supplied.`}},
		{pulls, "Authorization: Bearer valid", `{"base":"main","head":1}`, 422, []string{"is not of type string"}},
		{pulls, "Authorization: Bearer valid", `{"base":"main","head":"x"}`, 422, []string{`"resource":"Issue"`, `"code":"missing_field"`, `"field":"title"`}},
		{pulls, "Authorization: Bearer valid", `{"base":"none","head":"x","title":"t"}`, 422, []string{`"field":"head"`, `"field":"base"`, `"code":"invalid"`}},
		{pulls, "Authorization: Bearer valid", `{"base":"main","head":"other:main","title":"t"}`, 422, []string{`"field":"head"`}},
		{pulls, "Authorization: Bearer valid", `{"base":"main","head":"octo:main","title":"t"}`, 422, []string{"No commits between main and main", `"code":"custom"`}},
		{"GET /repos/octo/public/pulls?state=any", "Authorization: Bearer valid", "", 422, []string{`"field":"state"`}},
		{"GET /repos/octo/public/pulls/1", "Authorization: Bearer valid", "", 404, nil},
	} {
		method, path, _ := strings.Cut(test.request, " ")
		r, err := http.NewRequestWithContext(t.Context(), method, s.URL+"/api/v3"+path, strings.NewReader(test.body))
		if err != nil {
			t.Fatal(err)
		}
		if name, value, has := strings.Cut(test.headers, ":"); has {
			r.Header[name] = []string{strings.TrimSpace(value)}
		}
		response, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(response.Body)
		response.Body.Close()
		got := fmt.Sprintf("%v %s", response.Header, body)
		if err != nil || response.StatusCode != test.status {
			t.Errorf("%s with %q and %q: %d %s, want %d", test.request, test.headers, test.body, response.StatusCode, body, test.status)
		}
		for _, part := range test.parts {
			if !strings.Contains(got, part) {
				t.Errorf("%s with %q and %q: %s lacks %s", test.request, test.headers, test.body, got, part)
			}
		}
	}
}
