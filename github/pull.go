package github

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// State is that of a pull request.
type State string

const (
	Open   State = "open"
	Closed State = "closed" // and not merged
	Merged State = "merged"
)

// A PullRequest is one as GitHub has it. Its JSON is what a reader needs of GitHub's.
type PullRequest struct {
	Number int `json:"number"`
	// URL is its page.
	URL   string `json:"html_url"`
	State State  `json:"state"`
	Draft bool   `json:"draft"`
	Title string `json:"title"`
	Body  string `json:"-"`
	// Head and Base are names of branches. HeadRepository is owner/name, "" if it was
	// deleted.
	Head           string `json:"head"`
	HeadCommit     string `json:"head_sha"`
	HeadRepository string `json:"head_repository"`
	Base           string `json:"base"`
	Author         string `json:"author"`
	// Labels are names, Reviewers logins and Teams slugs of those who were asked for a
	// review and have not given one.
	Labels    []string  `json:"labels"`
	Reviewers []string  `json:"requested_reviewers"`
	Teams     []string  `json:"requested_teams"`
	CreatedAt time.Time `json:"created_at"`
	UpdatedAt time.Time `json:"updated_at"`
}

// wirePull is a pull request in GitHub's JSON.
type wirePull struct {
	Number   int        `json:"number"`
	HTMLURL  string     `json:"html_url"`
	State    string     `json:"state"`
	Draft    bool       `json:"draft"`
	Title    string     `json:"title"`
	Body     string     `json:"body"`
	MergedAt *time.Time `json:"merged_at"`
	Head     wireBranch `json:"head"`
	Base     wireBranch `json:"base"`
	User     wireUser   `json:"user"`
	Labels   []struct {
		Name string `json:"name"`
	} `json:"labels"`
	Reviewers []wireUser `json:"requested_reviewers"`
	Teams     []struct {
		Slug string `json:"slug"`
	} `json:"requested_teams"`
	CreatedAt time.Time `json:"created_at"`
	UpdatedAt time.Time `json:"updated_at"`
}

type wireBranch struct {
	Ref  string `json:"ref"`
	SHA  string `json:"sha"`
	Repo *struct {
		FullName string `json:"full_name"`
	} `json:"repo"`
}

type wireUser struct {
	Login string `json:"login"`
}

// pull checks a pull request in an answer.
func (s *session) pull(a answer, w wirePull) (PullRequest, error) {
	page, err := url.Parse(w.HTMLURL)
	if err != nil || page.Host == "" || page.Scheme != "https" && page.Scheme != "http" || page.User != nil || w.Number < 1 || w.Head.Ref == "" ||
		!strings.HasSuffix(page.Path, "/pull/"+strconv.Itoa(w.Number)) {
		return PullRequest{}, s.unusable(a.status, "its answer is no pull request", nil)
	}
	p := PullRequest{
		Number: w.Number, URL: w.HTMLURL, State: State(w.State), Draft: w.Draft, Title: w.Title, Body: w.Body, Head: w.Head.Ref, HeadCommit: w.Head.SHA,
		Base: w.Base.Ref, Author: w.User.Login, Labels: []string{}, Reviewers: []string{}, Teams: []string{}, CreatedAt: w.CreatedAt, UpdatedAt: w.UpdatedAt,
	}
	if w.MergedAt != nil {
		p.State = Merged
	}
	if w.Head.Repo != nil {
		p.HeadRepository = w.Head.Repo.FullName
	}
	for _, label := range w.Labels {
		p.Labels = append(p.Labels, label.Name)
	}
	for _, user := range w.Reviewers {
		p.Reviewers = append(p.Reviewers, user.Login)
	}
	for _, team := range w.Teams {
		p.Teams = append(p.Teams, team.Slug)
	}
	return p, nil
}

// doPull sends a request whose answer is a pull request: that of a branch, with a number
// if it has one already.
func (s *session) doPull(ctx context.Context, wanted PullRequest, r request) (PullRequest, error) {
	var w wirePull
	a, err := s.do(ctx, r, &w)
	if err != nil {
		return PullRequest{}, err
	}
	p, err := s.pull(a, w)
	if err == nil && (p.Head != wanted.Head || wanted.Number != 0 && p.Number != wanted.Number) {
		// A broken cache or proxy on the way has mixed answers up.
		return PullRequest{}, s.unusable(a.status, fmt.Sprintf("its answer is about pull request %d of the branch %.100q", p.Number, p.Head), nil)
	}
	return p, err
}

func pullsPath(repository string) string { return "/repos/" + repository + "/pulls" }

func pullPath(repository string, number int) string {
	return pullsPath(repository) + "/" + strconv.Itoa(number)
}

// maxPages is how many pages of 30 pull requests of one branch are read.
const maxPages = 20

// listOpenPulls returns the pull requests of a branch of the repository itself that are
// open, the newest first.
func (s *session) listOpenPulls(ctx context.Context, repository, head string) (list []PullRequest, err error) {
	owner, _, _ := strings.Cut(repository, "/")
	for page := 1; page <= maxPages; page++ {
		var found []wirePull
		a, err := s.do(ctx, request{does: "see the pull requests of " + repository, method: http.MethodGet, path: pullsPath(repository), query: url.Values{
			"head": {owner + ":" + head}, "state": {"open"}, "sort": {"created"}, "direction": {"desc"}, "per_page": {"30"}, "page": {strconv.Itoa(page)},
		}}, &found)
		if err != nil {
			return nil, err
		}
		for _, w := range found {
			p, err := s.pull(a, w)
			if err != nil {
				return nil, err
			}
			// Forks of the owner can have a branch of that name, and GitHub leaves out a filter
			// that it does not understand. A repository that was renamed has its new name here.
			sameRepository := w.Base.Repo == nil || strings.EqualFold(p.HeadRepository, w.Base.Repo.FullName)
			if p.Head == head && sameRepository {
				list = append(list, p)
			}
		}
		if !strings.Contains(a.header.Get("Link"), `rel="next"`) {
			break
		}
	}
	return list, nil
}

// create opens a pull request.
func (s *session) create(ctx context.Context, want Want) (PullRequest, error) {
	return s.doPull(ctx, PullRequest{Head: want.Head}, request{
		does: fmt.Sprintf("open a pull request of %s into %s in %s", want.Head, want.Base, want.Repository), method: http.MethodPost, path: pullsPath(want.Repository), once: true,
		body: map[string]any{"title": want.Title, "head": want.Head, "base": want.Base, "body": want.Body, "draft": want.Draft},
	})
}

// update changes the fields of a pull request.
func (s *session) update(ctx context.Context, repository string, p PullRequest, fields map[string]any) (PullRequest, error) {
	return s.doPull(ctx, p, request{
		does: fmt.Sprintf("change pull request %d of %s", p.Number, repository), method: http.MethodPatch, path: pullPath(repository, p.Number), body: fields,
	})
}

// addLabels returns all labels of the pull request. GitHub makes those that the
// repository does not have.
func (s *session) addLabels(ctx context.Context, repository string, number int, labels []string) (names []string, err error) {
	var found []struct {
		Name string `json:"name"`
	}
	// A pull request is an issue to GitHub: labels have no other address.
	_, err = s.do(ctx, request{
		does: fmt.Sprintf("label pull request %d of %s", number, repository), method: http.MethodPost,
		path: fmt.Sprintf("/repos/%s/issues/%d/labels", repository, number), body: map[string]any{"labels": labels},
	}, &found)
	for _, label := range found {
		names = append(names, label.Name)
	}
	return names, err
}

// requestReviews asks people and teams for a review. GitHub asks all of them or none.
func (s *session) requestReviews(ctx context.Context, repository string, p PullRequest, reviewers, teams []string) (PullRequest, error) {
	body := map[string]any{}
	if len(reviewers) > 0 {
		body["reviewers"] = reviewers
	}
	if len(teams) > 0 {
		body["team_reviewers"] = teams
	}
	return s.doPull(ctx, p, request{
		does: fmt.Sprintf("ask for reviews of pull request %d of %s", p.Number, repository), method: http.MethodPost, path: pullPath(repository, p.Number) + "/requested_reviewers", body: body,
	})
}

// listReviewers returns who has reviewed a pull request.
func (s *session) listReviewers(ctx context.Context, repository string, number int) (logins []string, err error) {
	var reviews []struct {
		User wireUser `json:"user"`
	}
	_, err = s.do(ctx, request{
		does: fmt.Sprintf("see the reviews of pull request %d of %s", number, repository), method: http.MethodGet, path: pullPath(repository, number) + "/reviews", query: url.Values{"per_page": {"100"}},
	}, &reviews)
	for _, review := range reviews {
		logins = append(logins, review.User.Login)
	}
	return logins, err
}
