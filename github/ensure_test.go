package github_test

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/github"
	"github.com/moonladderstudios/mm-orchestrator/internal/githubtest"
)

func TestAPullRequestIsOpened(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.collaborators()
	got := f.ensure(want)
	if !got.Created || got.Number != 1 || got.URL != f.server.URL+"/octo/widgets/pull/1" || got.State != github.Open || !got.Draft || len(got.Notes) > 0 {
		t.Errorf("got %+v", got)
	}
	p := f.only()
	if p.Title != want.Title || p.Head != branch || p.Base != "main" || !p.Draft || p.Author != "bot" || !strings.Contains(p.Body, want.Body) {
		t.Errorf("GitHub has %+v", p)
	}
	// The repository has the label docs, and codex is made.
	if !slices.Equal(p.Labels, []string{"codex", "docs"}) || !slices.Equal(p.RequestedReviewers, []string{"jane"}) || !slices.Equal(p.RequestedTeams, []string{"writers"}) {
		t.Errorf("GitHub has labels %v, reviewers %v, teams %v", p.Labels, p.RequestedReviewers, p.RequestedTeams)
	}
	text, err := json.Marshal(got.PullRequest)
	for _, part := range []string{`"number":1`, `"head":"` + branch + `"`, `"labels":["codex","docs"]`, `"requested_reviewers":["jane"]`, `"state":"open"`} {
		if err != nil || !strings.Contains(string(text), part) {
			t.Errorf("as JSON it is %s, %v, without %s", text, err, part)
		}
	}
	for _, r := range f.server.Requests("/api/") {
		if r.Header.Get("Authorization") != "Bearer "+token || r.Header.Get("X-Github-Api-Version") != "2022-11-28" || r.Header.Get("User-Agent") != "mm-orchestrator" {
			t.Errorf("%s has the header %v", r.Path, r.Header)
		}
	}
}

func TestARepetitionChangesNothing(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.collaborators()
	f.ensure(want)
	before := f.writes()
	// GitHub keeps a review, and no longer lists its author as asked.
	f.server.Edit(widget, 1, func(p *githubtest.Pull) {
		p.RequestedReviewers, p.Reviewed = nil, []string{"Jane"}
		p.Body = strings.ReplaceAll(p.Body, "\n", "\r\n")
	})
	for range 2 {
		if got := f.ensure(want); got.Created || got.Number != 1 || len(got.Notes) > 0 {
			t.Errorf("got %+v", got)
		}
	}
	if after := f.writes(); !slices.Equal(before, after) {
		t.Errorf("a repetition has written %v", after[len(before):])
	}
}

func TestWhatSomebodyHasChangedStays(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.collaborators()
	f.ensure(want)
	f.commit("release")
	next := want
	next.Title, next.Body, next.Labels, next.Reviewers = "T012: Document all endpoints", "Second attempt.", []string{"codex", "second"}, []string{"jane", "john"}
	// Nobody has changed the title, so it is ours.
	f.ensure(next)
	if p := f.only(); p.Title != next.Title || !strings.Contains(p.Body, "Second attempt.") || strings.Contains(p.Body, "What Codex says") || !slices.Equal(p.Labels, []string{"codex", "docs", "second"}) || !slices.Equal(p.RequestedReviewers, []string{"jane", "john"}) {
		t.Errorf("GitHub has %+v", p)
	}
	f.server.Edit(widget, 1, func(p *githubtest.Pull) {
		p.Title, p.Base, p.Draft, p.Labels = "Somebody's title", "release", false, append(p.Labels, "keep")
		p.Body = "Read this first.\r\n\r\n" + p.Body + "\r\n\r\nCloses #7"
	})
	next.Title, next.Body = "Third", "Third attempt."
	got := f.ensure(next)
	p := f.only()
	if p.Title != "Somebody's title" || p.Base != "release" || p.Draft || !slices.Contains(p.Labels, "keep") || got.Title != p.Title {
		t.Errorf("GitHub has %+v", p)
	}
	if !strings.HasPrefix(p.Body, "Read this first.") || !strings.HasSuffix(p.Body, "Closes #7") || !strings.Contains(p.Body, "Third attempt.") || strings.Contains(p.Body, "Second") {
		t.Errorf("the text is %q", p.Body)
	}
	// Without our comments the text is somebody's, and ours is added.
	f.server.Edit(widget, 1, func(p *githubtest.Pull) { p.Body = "All mine." })
	for range 2 {
		f.ensure(next)
	}
	if p := f.only(); !strings.HasPrefix(p.Body, "All mine.\n\n") || strings.Count(p.Body, "Third attempt.") != 1 {
		t.Errorf("the text is %q", p.Body)
	}
}

func TestAPullRequestThatEnded(t *testing.T) {
	t.Parallel()
	for _, state := range []github.State{github.Closed, github.Merged} {
		t.Run(string(state), func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			f.ensure(github.Want{Repository: widget, Head: branch, Base: "main", Title: "First"})
			f.server.Edit(widget, 1, func(p *githubtest.Pull) { p.State, p.Merged = "closed", state == github.Merged })
			before := f.server.Pulls(widget)[0]
			got := f.ensure(github.Want{Repository: widget, Head: branch, Base: "main", Title: "Second", Labels: []string{"late"}})
			if got.Number != 2 || !got.Created || got.State != github.Open {
				t.Errorf("got %+v", got)
			}
			if after := f.server.Pulls(widget)[0]; !reflect.DeepEqual(before, after) {
				t.Errorf("the one that has ended was %+v, is %+v", before, after)
			}
		})
	}
}

func TestALostAnswerOpensNoSecondOne(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]githubtest.Fault{
		"connection cut": githubtest.LoseAnswer(), "502 of a proxy": githubtest.Text(502, "<html>Bad Gateway"), "a page in place of the answer": githubtest.Text(200, "<html>please log in"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			f.server.Fail("POST "+pulls, 1, fault)
			if got := f.ensure(github.Want{Repository: widget, Head: branch, Base: "main", Title: "Once"}); got.Number != 1 || !got.Created {
				t.Errorf("got %+v", got)
			}
			f.only()
			if !slices.Equal(f.waits, []time.Duration{time.Second}) {
				t.Errorf("waited %v", f.waits)
			}
		})
	}
}

func TestTwoWorkersOpenOne(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	var all sync.WaitGroup
	for range 6 {
		all.Go(func() {
			got, err := f.client.Ensure(t.Context(), github.Want{Repository: widget, Head: branch, Base: "main", Title: "Once"})
			if err != nil || got.Number != 1 {
				t.Errorf("got %+v, %v", got, err)
			}
		})
	}
	all.Wait()
	f.only()
}

func TestReviewersWhoCannotBeAsked(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.collaborators()
	all := want
	all.Reviewers, all.Teams = []string{"Bot", "stranger", "john"}, []string{"nobody", "writers"}
	got := f.ensure(all)
	p := f.only()
	if !slices.Equal(p.RequestedReviewers, []string{"john"}) || !slices.Equal(p.RequestedTeams, []string{"writers"}) || !slices.Equal(got.Reviewers, []string{"john"}) {
		t.Errorf("GitHub has %+v", p)
	}
	notes := strings.Join(got.Notes, "\n")
	for _, part := range []string{"bot is not asked for a review, and is the author", "stranger cannot be asked", "not a collaborator of the octo/widgets repository", "the team nobody cannot be asked"} {
		if !strings.Contains(notes, part) {
			t.Errorf("the notes lack %q: %s", part, notes)
		}
	}
	// A label that GitHub refuses does not undo the pull request.
	all.Labels = []string{strings.Repeat("x", 51)}
	if got := f.ensure(all); !strings.Contains(strings.Join(got.Notes, "\n"), "name is too long (maximum is 50 characters)") {
		t.Errorf("the notes are %q", got.Notes)
	}
}

func TestARepositoryWithoutDrafts(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	if err := f.server.Set(widget, githubtest.Settings{NoDrafts: true}); err != nil {
		t.Fatal(err)
	}
	got := f.ensure(github.Want{Repository: widget, Head: branch, Base: "main", Title: "T", Draft: true})
	if got.Draft || f.only().Draft || len(got.Notes) != 1 || !strings.Contains(got.Notes[0], "no draft pull requests") {
		t.Errorf("got %+v", got)
	}
}

func TestLongTextsAreShortened(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	long := github.Want{Repository: widget, Head: branch, Base: "main", Title: strings.Repeat("ä title ", 100), Body: "Intro\n\n```text\n" + strings.Repeat("märchen\n", 20000) + "<!-- mm-orchestrator:end -->\n```"}
	f.ensure(long)
	p := f.only()
	if len([]rune(p.Title)) > 256 || len([]rune(p.Body)) > 65536 || !strings.HasSuffix(p.Body, "\n```\n\n(shortened)\n<!-- mm-orchestrator:end -->") {
		t.Errorf("title of %d, text of %d characters that ends with %q", len([]rune(p.Title)), len([]rune(p.Body)), p.Body[len(p.Body)-80:])
	}
	before := f.writes()
	f.ensure(long)
	// A model that writes our comment does not end our part.
	long.Body = "a <!-- mm-orchestrator:end --> b"
	f.ensure(long)
	f.ensure(long)
	if p := f.only(); strings.Count(p.Body, "mm-orchestrator:end") != 1 || !strings.Contains(p.Body, "a <!-- end --> b") || len(f.writes()) != len(before)+1 {
		t.Errorf("the text is %q after %v", p.Body, f.writes())
	}
}

// Of several pull requests of the branch it is the one into the base that counts, on
// whatever page it is.
func TestMoreThanAPageOfPullRequests(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	for i := 1; i <= 31; i++ {
		if got := f.ensure(github.Want{Repository: widget, Head: branch, Base: "main", Title: fmt.Sprint("try ", i)}); got.Number != i {
			t.Fatalf("got %+v", got)
		}
		f.server.Edit(widget, i, func(p *githubtest.Pull) { p.Head = "elsewhere" })
	}
	for i := 1; i <= 31; i++ {
		f.server.Edit(widget, i, func(p *githubtest.Pull) {
			p.Head = branch
			if i > 1 {
				p.Base = fmt.Sprint("base-", i)
			}
		})
	}
	if got := f.ensure(github.Want{Repository: widget, Head: branch, Base: "main", Title: "again"}); got.Number != 1 || got.Created {
		t.Errorf("got %+v", got)
	}
}
