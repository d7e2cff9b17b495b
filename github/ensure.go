package github

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Want is the pull request that Ensure makes.
type Want struct {
	// Repository is owner/name. Head and Base are names of branches in it.
	Repository, Head, Base string
	// Title is shortened to 256 characters, Body to what GitHub takes.
	Title, Body string
	// Draft makes a new pull request a draft. REST cannot make one of an existing one.
	Draft  bool
	Labels []string
	// Reviewers are logins, Teams slugs of teams of the owner.
	Reviewers, Teams []string
}

// Ensured is what Ensure has found or made.
type Ensured struct {
	PullRequest
	// Created says that this call has opened it.
	Created bool
	// Notes say what could not be done, and why, such as a reviewer who cannot be asked.
	Notes []string
}

// createTries is how often a pull request is asked for whose branch GitHub does not know,
// or where it is not known whether GitHub has opened it.
const createTries = 4

// Ensure makes sure that there is a pull request of want.Head into want.Base, with these
// labels and reviewers.
//
//   - It can be repeated, also after an answer was lost: one pull request is opened.
//   - If one of that branch is open, what is missing there is added. Its base and whether
//     it is a draft stay. Its title is replaced if it is still the one that was written
//     here. Of its text, only the part between two comments is.
//   - If no pull request of that branch is open, one is opened, whatever there was before.
//   - Labels and reviewers that GitHub refuses are a note and no error: the pull request
//     is there.
func (c *Client) Ensure(ctx context.Context, want Want) (Ensured, error) {
	if err := CheckName(want.Repository); err != nil {
		return Ensured{}, &Error{Kind: Invalid, text: err.Error(), unsent: true}
	}
	s := c.session()
	want.Title = shorten(strings.Join(strings.Fields(want.Title), " "), maxTitle)
	result, err := s.findOrCreate(ctx, want)
	if err != nil {
		return Ensured{}, err
	}
	if !result.Created {
		if fields := changes(result.PullRequest, want); len(fields) > 0 {
			if result.PullRequest, err = s.update(ctx, want.Repository, result.PullRequest, fields); err != nil {
				return Ensured{}, err
			}
		}
	}
	s.label(ctx, want, &result)
	s.review(ctx, want, &result)
	if ctx.Err() != nil {
		return Ensured{}, context.Cause(ctx)
	}
	return result, nil
}

// findOrCreate returns the pull request that is open, and opens one if there is none.
func (s *session) findOrCreate(ctx context.Context, want Want) (Ensured, error) {
	var notes []string
	created := false
	for try := 1; ; try++ {
		open, err := s.listOpenPulls(ctx, want.Repository, want.Head)
		if err != nil {
			return Ensured{}, err
		}
		if len(open) > 0 {
			p := open[0]
			for _, other := range open {
				if other.Base == want.Base {
					p = other
					break
				}
			}
			return Ensured{PullRequest: p, Created: created, Notes: notes}, nil
		}
		asked := want
		asked.Body = block(want.Body, want.Title, maxBody)
		p, err := s.create(ctx, asked)
		var refused *Error
		switch {
		case err == nil:
			return Ensured{PullRequest: p, Created: true, Notes: notes}, nil
		case !errors.As(err, &refused) || try == createTries:
			return Ensured{}, explain(err, want)
		case refused.Kind == Invalid && refused.says("already exists"):
			// Another worker was faster, or the list is older than it.
		case refused.Kind == Invalid && want.Draft && refused.says("draft pull requests are not supported"):
			want.Draft = false
			notes = append(notes, "the repository has no draft pull requests: this one is ready for review")
			continue
		case refused.Kind == Invalid && (refused.isInvalid("head") || refused.says("no commits between")):
			// A branch that was just pushed may not yet be known to the API.
		case refused.Kind == Unavailable || refused.Kind == Unusable && refused.Status/100 == 2:
			// GitHub may have opened it.
			created = !refused.unsent
		default:
			return Ensured{}, explain(err, want)
		}
		if err := s.pause(ctx, time.Second<<(try-1), request{does: "open a pull request"}, refused); err != nil {
			return Ensured{}, explain(err, want)
		}
	}
}

// explain adds what to do to an error for a pull request.
func explain(err error, want Want) error {
	var refused *Error
	if !errors.As(err, &refused) || refused.Kind != Invalid {
		return err
	}
	cure := ""
	switch {
	case refused.isInvalid("head"):
		cure = fmt.Sprintf("the branch %s is not there: push it again", want.Head)
	case refused.isInvalid("base"):
		cure = fmt.Sprintf("the base branch %s does not exist: correct its setting", want.Base)
	case refused.says("no commits between"):
		cure = fmt.Sprintf("the branch %s has no commit that %s has not: there is nothing to merge", want.Head, want.Base)
	case refused.says("already exists"):
		cure = "there is one, but the list of pull requests does not show it: try again later"
	default:
		return err
	}
	explained := *refused
	explained.text += ". " + strings.ToUpper(cure[:1]) + cure[1:]
	return &explained
}

// Limits of GitHub, in characters.
const (
	maxTitle = 256
	maxBody  = 65536
)

// shorten cuts a text to a number of characters.
func shorten(text string, limit int) string {
	if runes := []rune(text); len(runes) > limit {
		return strings.TrimSpace(string(runes[:max(limit-1, 0)])) + "…"
	}
	return text
}

// The comments around what is ours of a text. The first has a digest of the title that
// was written together with it.
const (
	mark    = "<!-- mm-orchestrator:"
	markEnd = mark + "end -->"
)

var markedPart = regexp.MustCompile(`(?s)<!-- mm-orchestrator:begin title=([0-9a-f]{16}) -->.*?<!-- mm-orchestrator:end -->`)

func titleDigest(title string) string {
	sum := sha256.Sum256([]byte(title))
	return hex.EncodeToString(sum[:8])
}

// block is our part of a text, of at most limit characters.
func block(body, title string, limit int) string {
	begin := mark + "begin title=" + titleDigest(title) + " -->"
	// A text from elsewhere cannot end our part.
	body = strings.ReplaceAll(strings.TrimSpace(body), mark, "<!-- ")
	note := "\n\n(shortened)"
	if room := limit - len(begin) - len(markEnd) - 2; len([]rune(body)) > room {
		body = string([]rune(body)[:max(room-len(note), 0)])
		// The cut may be inside of a block of code.
		if fence := openFence(body); fence != "" {
			body = string([]rune(body)[:max(room-len(note)-len(fence)-1, 0)]) + "\n" + fence
		}
		body += note
	}
	return begin + "\n" + body + "\n" + markEnd
}

// openFence is the fence of a block of code that a text does not end.
func openFence(text string) string {
	fence := ""
	for line := range strings.Lines(text) {
		ticks := line[:len(line)-len(strings.TrimLeft(line, "`"))]
		switch {
		case len(ticks) < 3:
		case fence == "":
			fence = ticks
		case len(ticks) >= len(fence) && strings.TrimSpace(line) == ticks:
			fence = ""
		}
	}
	return fence
}

// changes are the fields in which an open pull request differs from what is wanted.
func changes(p PullRequest, want Want) map[string]any {
	fields := map[string]any{}
	// People who edit on GitHub's pages leave lines that end with CR LF.
	body := strings.ReplaceAll(p.Body, "\r\n", "\n")
	own := markedPart.FindStringSubmatchIndex(body)
	before, after := body, ""
	if own != nil {
		before, after = body[:own[0]], body[own[1]:]
		if body[own[2]:own[3]] == titleDigest(p.Title) && p.Title != want.Title {
			fields["title"] = want.Title
		}
	} else if strings.TrimSpace(body) != "" {
		before = strings.TrimRight(body, "\n") + "\n\n"
	}
	room := max(maxBody-len([]rune(before))-len([]rune(after)), 0)
	if room < 300 {
		return fields // somebody's text leaves no room
	}
	if wanted := before + block(want.Body, want.Title, room) + after; wanted != body {
		fields["body"] = wanted
	}
	return fields
}

// label adds the labels that are missing.
func (s *session) label(ctx context.Context, want Want, result *Ensured) {
	missing := without(want.Labels, result.Labels)
	if len(missing) == 0 {
		return
	}
	labels, err := s.addLabels(ctx, want.Repository, result.Number, missing)
	if err != nil {
		result.Notes = append(result.Notes, fmt.Sprintf("the labels %s are not set: %v", strings.Join(missing, ", "), err))
		return
	}
	result.Labels = labels
	if lost := without(missing, labels); len(lost) > 0 {
		result.Notes = append(result.Notes, fmt.Sprintf("GitHub has not set the labels %s: the token's account needs write access for that", strings.Join(lost, ", ")))
	}
}

// review asks those for a review who were not asked and have not given one.
func (s *session) review(ctx context.Context, want Want, result *Ensured) {
	people := without(want.Reviewers, result.Reviewers)
	teams := without(want.Teams, result.Teams)
	if len(people) > 0 && !result.Created {
		reviewed, err := s.listReviewers(ctx, want.Repository, result.Number)
		if err != nil {
			result.Notes = append(result.Notes, fmt.Sprintf("nobody is asked for a review: %v", err))
			return
		}
		people = without(people, reviewed)
	}
	// GitHub would refuse the whole request.
	if own := []string{result.Author}; len(without(people, own)) < len(people) {
		people = without(people, own)
		result.Notes = append(result.Notes, fmt.Sprintf("%s is not asked for a review, and is the author of the pull request", result.Author))
	}
	if len(people)+len(teams) == 0 {
		return
	}
	p, err := s.requestReviews(ctx, want.Repository, result.PullRequest, people, teams)
	if KindOf(err) == Invalid && len(people)+len(teams) > 1 {
		// One who cannot be asked must not keep the others from it.
		for _, login := range people {
			s.ask(ctx, want, result, login, []string{login}, nil)
		}
		for _, team := range teams {
			s.ask(ctx, want, result, "the team "+team, nil, []string{team})
		}
		return
	}
	result.asked(p, err, strings.Join(slices.Concat(people, teams), ", "))
}

func (s *session) ask(ctx context.Context, want Want, result *Ensured, name string, people, teams []string) {
	p, err := s.requestReviews(ctx, want.Repository, result.PullRequest, people, teams)
	result.asked(p, err, name)
}

// asked records the answer to a request for reviews.
func (e *Ensured) asked(p PullRequest, err error, names string) {
	if err != nil {
		e.Notes = append(e.Notes, fmt.Sprintf("%s cannot be asked for a review: %v", names, err))
		return
	}
	e.Reviewers, e.Teams = p.Reviewers, p.Teams
}

// without is a list without names of another one. GitHub ignores case.
func without(list, other []string) (rest []string) {
	for _, name := range list {
		same := func(o string) bool { return strings.EqualFold(name, o) }
		if name != "" && !slices.ContainsFunc(other, same) && !slices.ContainsFunc(rest, same) {
			rest = append(rest, name)
		}
	}
	return rest
}
