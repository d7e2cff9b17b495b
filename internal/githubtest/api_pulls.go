package githubtest

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

const pullsPage = "/pulls/pulls#create-a-pull-request"

// pull returns a copy of a pull request, nil if there is none.
func (c *apiCall) pull(number int) *Pull {
	c.mu.Lock()
	defer c.mu.Unlock()
	if number < 1 || number > len(c.repo.pulls) {
		return nil
	}
	p := c.repo.pulls[number-1].copy()
	return &p
}

// change changes a pull request, and returns a copy.
func (c *apiCall) change(number int, change func(*Pull)) Pull {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.repo.pulls[number-1]
	change(p)
	return p.copy()
}

// commit is the commit of a branch, "" if there is none.
func (c *apiCall) commit(branch string) string {
	if branch == "" || strings.HasPrefix(branch, "-") {
		return ""
	}
	id, err := c.Git(c.r.Context(), c.repo.name, "rev-parse", "--verify", "--quiet", "--end-of-options", "refs/heads/"+branch)
	if err != nil {
		return ""
	}
	return id
}

// json is a pull request in GitHub's form.
func (c *apiCall) json(p Pull) map[string]any {
	user := func(login string) map[string]any { return map[string]any{"login": login, "type": "User"} }
	branch := func(name string) map[string]any {
		return map[string]any{"ref": name, "label": c.owner() + ":" + name, "sha": c.commit(name), "repo": map[string]any{"full_name": c.repo.name}, "user": user(c.owner())}
	}
	reviewers, teams, labels := []any{}, []any{}, []any{}
	for _, login := range p.RequestedReviewers {
		reviewers = append(reviewers, user(login))
	}
	for _, slug := range p.RequestedTeams {
		teams = append(teams, map[string]any{"slug": slug, "name": slug})
	}
	for i, name := range p.Labels {
		labels = append(labels, map[string]any{"id": i + 1, "name": name, "color": "ededed", "default": false})
	}
	body := map[string]any{
		"id": 1000 + p.Number, "number": p.Number, "state": p.State, "draft": p.Draft, "title": p.Title, "body": p.Body, "merged_at": nil, "closed_at": nil,
		"html_url": fmt.Sprintf("%s/%s/pull/%d", c.URL, c.repo.name, p.Number), "url": fmt.Sprintf("%s/api/v3/repos/%s/pulls/%d", c.URL, c.repo.name, p.Number),
		"head": branch(p.Head), "base": branch(p.Base), "user": user(p.Author), "labels": labels, "requested_reviewers": reviewers, "requested_teams": teams,
		"created_at": p.Created.UTC().Format(time.RFC3339), "updated_at": p.Created.UTC().Format(time.RFC3339),
	}
	if p.Body == "" {
		body["body"] = nil
	}
	if p.State == "closed" {
		body["closed_at"] = p.Created.UTC().Format(time.RFC3339)
	}
	if p.Merged {
		body["merged_at"] = p.Created.UTC().Format(time.RFC3339)
	}
	return body
}

func (c *apiCall) getPull(number int) { c.answer(http.StatusOK, c.json(*c.pull(number))) }

// listPulls answers as GitHub does: a head without its owner is no filter.
func (c *apiCall) listPulls(int) {
	query := c.r.URL.Query()
	state := query.Get("state")
	if state == "" {
		state = "open"
	}
	if state != "open" && state != "closed" && state != "all" {
		c.invalid("/pulls/pulls#list-pull-requests", fieldError("PullRequest", "state", "invalid", ""))
		return
	}
	owner, head, filters := strings.Cut(query.Get("head"), ":")
	var list []Pull
	c.mu.Lock()
	for _, p := range c.repo.pulls {
		if (state == "all" || p.State == state) && (!filters || strings.EqualFold(owner, c.owner()) && p.Head == head) && (query.Get("base") == "" || p.Base == query.Get("base")) {
			list = append(list, p.copy())
		}
	}
	c.mu.Unlock()
	if query.Get("direction") != "asc" {
		slices.Reverse(list)
	}
	size, page := 30, 1
	if n, err := strconv.Atoi(query.Get("per_page")); err == nil && n > 0 {
		size = min(n, 100)
	}
	if n, err := strconv.Atoi(query.Get("page")); err == nil && n > 0 {
		page = n
	}
	begin, end := min((page-1)*size, len(list)), min(page*size, len(list))
	if end < len(list) {
		next := url.Values{}
		for name, values := range query {
			next[name] = values
		}
		next.Set("page", strconv.Itoa(page+1))
		c.w.Header().Set("Link", fmt.Sprintf(`<%s%s?%s>; rel="next"`, c.URL, c.r.URL.Path, next.Encode()))
	}
	answer := []any{}
	for _, p := range list[begin:end] {
		answer = append(answer, c.json(p))
	}
	c.answer(http.StatusOK, answer)
}

// lengths are the errors of a title or a text that is too long.
func lengths(title, body string) (errs []any) {
	if utf8.RuneCountInString(title) > 256 {
		errs = append(errs, fieldError("Issue", "title", "custom", "title is too long (maximum is 256 characters)"))
	}
	if utf8.RuneCountInString(body) > 65536 {
		errs = append(errs, fieldError("Issue", "body", "custom", "body is too long (maximum is 65536 characters)"))
	}
	return errs
}

func (c *apiCall) createPull(int) {
	request, ok := c.body(map[string]string{"title": "string", "head": "string", "base": "string", "body": "string", "draft": "boolean", "maintainer_can_modify": "boolean"}, "base", "head")
	if !ok {
		return
	}
	title, _ := request["title"].(string)
	text, _ := request["body"].(string)
	base, _ := request["base"].(string)
	head, _ := request["head"].(string)
	draft, _ := request["draft"].(bool)
	if strings.TrimSpace(title) == "" {
		c.invalid(pullsPage, fieldError("Issue", "title", "missing_field", ""))
		return
	}
	if owner, branch, has := strings.Cut(head, ":"); has && strings.EqualFold(owner, c.owner()) {
		head = branch
	}
	headCommit, baseCommit := c.commit(head), c.commit(base)
	var errs []any
	if headCommit == "" {
		errs = append(errs, fieldError("PullRequest", "head", "invalid", ""))
	}
	if baseCommit == "" {
		errs = append(errs, fieldError("PullRequest", "base", "invalid", ""))
	}
	if errs = append(errs, lengths(title, text)...); len(errs) > 0 {
		c.invalid(pullsPage, errs...)
		return
	}
	custom := func(format string, args ...any) {
		c.invalid(pullsPage, fieldError("PullRequest", "", "custom", fmt.Sprintf(format, args...)))
	}
	if _, err := c.Git(c.r.Context(), c.repo.name, "merge-base", baseCommit, headCommit); err != nil {
		custom("The %s branch has no history in common with %s", head, base)
		return
	}
	ahead, err := c.Git(c.r.Context(), c.repo.name, "rev-list", "--count", baseCommit+".."+headCommit)
	switch {
	case err != nil:
		c.fail(http.StatusInternalServerError, "Server Error", "")
		return
	case ahead == "0":
		custom("No commits between %s and %s", base, head)
		return
	case draft && c.settings(c.repo).NoDrafts:
		custom("Draft pull requests are not supported in this repository.")
		return
	}
	c.mu.Lock()
	for _, p := range c.repo.pulls {
		if p.State == "open" && p.Head == head && p.Base == base {
			c.mu.Unlock()
			custom("A pull request already exists for %s:%s.", c.owner(), head)
			return
		}
	}
	p := &Pull{Number: len(c.repo.pulls) + 1, Title: title, Body: text, Head: head, Base: base, Draft: draft, State: "open", Author: c.token.Login, Created: time.Now()}
	c.repo.pulls = append(c.repo.pulls, p)
	made := p.copy()
	c.mu.Unlock()
	c.w.Header().Set("Location", fmt.Sprintf("%s/api/v3/repos/%s/pulls/%d", c.URL, c.repo.name, made.Number))
	c.answer(http.StatusCreated, c.json(made))
}

func (c *apiCall) updatePull(number int) {
	const page = "/pulls/pulls#update-a-pull-request"
	request, ok := c.body(map[string]string{"title": "string", "body": "string", "state": "string", "base": "string", "maintainer_can_modify": "boolean"})
	if !ok {
		return
	}
	p := *c.pull(number)
	if title, has := request["title"].(string); has {
		if p.Title = title; strings.TrimSpace(title) == "" {
			c.invalid(page, fieldError("PullRequest", "title", "missing_field", ""))
			return
		}
	}
	if body, has := request["body"].(string); has {
		p.Body = body
	}
	if state, has := request["state"].(string); has {
		if p.State = state; state != "open" && state != "closed" {
			c.invalid(page, fieldError("PullRequest", "state", "invalid", ""))
			return
		}
	}
	if base, has := request["base"].(string); has {
		if p.Base = base; c.commit(base) == "" {
			c.invalid(page, fieldError("PullRequest", "base", "invalid", ""))
			return
		}
	}
	if errs := lengths(p.Title, p.Body); len(errs) > 0 {
		c.invalid(page, errs...)
		return
	}
	// A draft is made ready by GraphQL only.
	c.answer(http.StatusOK, c.json(c.change(number, func(now *Pull) { now.Title, now.Body, now.State, now.Base = p.Title, p.Body, p.State, p.Base })))
}

func (c *apiCall) listReviews(number int) {
	list := []any{}
	for i, login := range c.pull(number).Reviewed {
		list = append(list, map[string]any{"id": i + 1, "user": map[string]any{"login": login}, "state": "COMMENTED"})
	}
	c.answer(http.StatusOK, list)
}

func texts(list any) (names []string) {
	elements, _ := list.([]any)
	for _, element := range elements {
		name, _ := element.(string)
		names = append(names, name)
	}
	return names
}

func has(list []string, name string) bool {
	return slices.ContainsFunc(list, func(other string) bool { return strings.EqualFold(other, name) })
}

func (c *apiCall) requestReviews(number int) {
	const page = "/pulls/review-requests#request-reviewers-for-a-pull-request"
	request, ok := c.body(map[string]string{"reviewers": "array", "team_reviewers": "array"})
	if !ok {
		return
	}
	p, settings := c.pull(number), c.settings(c.repo)
	people, teams := texts(request["reviewers"]), texts(request["team_reviewers"])
	if has(people, p.Author) {
		c.fail(http.StatusUnprocessableEntity, "Review cannot be requested from pull request author.", page)
		return
	}
	// GitHub asks all of them or none.
	for _, login := range people {
		if !has(settings.Collaborators, login) {
			c.fail(http.StatusUnprocessableEntity, fmt.Sprintf("Reviews may only be requested from collaborators. One or more of the users or teams you specified is not a collaborator of the %s repository.", c.repo.name), page)
			return
		}
	}
	for _, slug := range teams {
		if !has(settings.Teams, slug) {
			c.fail(http.StatusUnprocessableEntity, fmt.Sprintf("Reviews may only be requested from collaborators. One or more of the teams you specified is not a collaborator of the %s repository.", c.repo.name), page)
			return
		}
	}
	c.answer(http.StatusCreated, c.json(c.change(number, func(p *Pull) {
		for _, login := range people {
			if !has(p.RequestedReviewers, login) {
				p.RequestedReviewers = append(p.RequestedReviewers, login)
			}
		}
		for _, slug := range teams {
			if !has(p.RequestedTeams, slug) {
				p.RequestedTeams = append(p.RequestedTeams, slug)
			}
		}
	})))
}

func (c *apiCall) addLabels(number int) {
	const page = "/issues/labels#add-labels-to-an-issue"
	request, ok := c.body(map[string]string{"labels": "array"})
	if !ok {
		return
	}
	names := texts(request["labels"])
	for _, name := range names {
		switch {
		case strings.TrimSpace(name) == "":
			c.invalid(page, fieldError("Label", "name", "missing_field", ""))
			return
		case utf8.RuneCountInString(name) > 50:
			c.invalid(page, fieldError("Label", "name", "custom", "name is too long (maximum is 50 characters)"))
			return
		}
	}
	p := c.change(number, func(p *Pull) {
		for _, name := range names {
			// GitHub makes a label that the repository does not have, and knows one by its name
			// in any case.
			i := slices.IndexFunc(c.repo.Labels, func(own string) bool { return strings.EqualFold(own, name) })
			if i < 0 {
				c.repo.Labels = append(slices.Clone(c.repo.Labels), name)
			} else {
				name = c.repo.Labels[i]
			}
			if !has(p.Labels, name) {
				p.Labels = append(p.Labels, name)
			}
		}
	})
	c.answer(http.StatusOK, c.json(p)["labels"])
}
