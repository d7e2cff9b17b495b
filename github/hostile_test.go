package github_test

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/github"
	"github.com/moonladderstudios/mm-orchestrator/internal/githubtest"
)

// rewritten is the server's own answer, in which a text is replaced.
func rewritten(before, after string) githubtest.Fault {
	return func(w http.ResponseWriter, r *http.Request, do http.HandlerFunc) {
		recorder := httptest.NewRecorder()
		do(recorder, r)
		body := recorder.Body.String()
		if !strings.Contains(body, before) {
			panic("the answer has no " + before + ": " + body)
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(recorder.Code)
		_, _ = w.Write([]byte(strings.Replace(body, before, after, 1)))
	}
}

// Answers that are about something else, as a broken cache, a wrong proxy or somebody in
// between gives them. None becomes the pull request of a run.
func TestAnswersAboutSomethingElse(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]githubtest.Fault{
		"another branch":          rewritten(`"ref":"`+branch+`"`, `"ref":"main"`),
		"another page":            rewritten(`/pull/1"`, `/pull/7"`),
		"a page that is no page":  rewritten(`"html_url":"https://`, `"html_url":"javascript://`),
		"a page with a login":     rewritten(`"html_url":"https://`, `"html_url":"https://bot:secret@`),
		"no number":               rewritten(`"number":1`, `"number":0`),
		"a number below zero":     rewritten(`"number":1`, `"number":-1`),
		"a number as text":        rewritten(`"number":1`, `"number":"1"`),
		"a list":                  func(w http.ResponseWriter, _ *http.Request, _ http.HandlerFunc) { _, _ = w.Write([]byte(`[]`)) },
		"null":                    func(w http.ResponseWriter, _ *http.Request, _ http.HandlerFunc) { _, _ = w.Write([]byte(`null`)) },
		"a page in place of JSON": githubtest.Text(200, "<html>sign in</html>"),
		"JSON that does not end": func(w http.ResponseWriter, _ *http.Request, _ http.HandlerFunc) {
			_, _ = w.Write([]byte(`{"number":1,`))
		},
		"JSON that is nested deep": func(w http.ResponseWriter, _ *http.Request, _ http.HandlerFunc) {
			_, _ = w.Write([]byte(strings.Repeat("[", 1<<20)))
		},
		"nothing": func(http.ResponseWriter, *http.Request, http.HandlerFunc) {},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			ask := github.Want{Repository: widget, Head: branch, Base: "main", Title: "Once", Body: "text"}
			// An answer to the request that opens it: the list says what was opened.
			f.server.Fail("POST "+pulls, 1, fault)
			if got, err := f.client.Ensure(t.Context(), ask); err == nil {
				if got.Number != f.only().Number || got.Head != branch || !strings.HasSuffix(got.URL, "/pull/1") || strings.Contains(got.URL, "secret") {
					t.Errorf("opened %+v", got.PullRequest)
				}
			} else {
				f.fails(err)
			}
			if len(f.server.Pulls(widget)) == 0 {
				f.ensure(ask)
			}
			// The same as an answer to the request that changes it.
			f.server.Fail("PATCH "+pulls, 9, fault)
			ask.Body = "another text"
			var refused *github.Error
			if got, err := f.client.Ensure(t.Context(), ask); !errors.As(err, &refused) {
				t.Errorf("changed %+v, %v", got.PullRequest, err)
			}
			f.only()
		})
	}
}
