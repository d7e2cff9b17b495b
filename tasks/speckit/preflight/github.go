package preflight

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
)

// maxAnswer bounds what is read of an answer of GitHub, in bytes.
const maxAnswer = 1 << 20

// tries is how often a request is sent that was not answered.
const tries = 3

// checkGitHub finds out whether the token may push to a repository and open a pull
// request there.
func (c *Checker) checkGitHub(ctx context.Context, request Request) Finding {
	token, err := c.config.GitHub.Read(ctx)
	switch {
	case err != nil:
		return Finding{Invalid, err.Error()}
	case request.Repository == "":
		return Finding{Invalid, "the run names no repository: set " + c.config.SettingName("GITHUB_REPOSITORY") + ", or submit the run with one"}
	case !repositoryName.MatchString(request.Repository) || strings.Contains(request.Repository, ".."):
		return Finding{Invalid, fmt.Sprintf("the repository %.100q does not have the form owner/name", request.Repository)}
	}
	key := githubKey{request.Repository, token}
	if finding, has := remembered(c, c.github, key, request.Fresh); has {
		return finding
	}
	return remember(c, c.github, key, c.askGitHub(ctx, request.Repository, token))
}

// askGitHub asks for the repository, for the right to push and for the right to open a
// pull request.
func (c *Checker) askGitHub(ctx context.Context, repository string, token secret.String) Finding {
	answer, err := c.api(ctx, http.MethodGet, "/repos/"+repository, token)
	if err != nil {
		return Finding{Invalid, fmt.Sprintf("GitHub at %s cannot be asked about %s: %v. Try the run again once it answers", c.config.API, repository, err)}
	}
	if finding, bad := c.refused(answer, repository); bad {
		return finding
	}
	var found struct {
		FullName    string `json:"full_name"`
		Private     bool   `json:"private"`
		Archived    bool   `json:"archived"`
		Disabled    bool   `json:"disabled"`
		Permissions *struct {
			Push bool `json:"push"`
		} `json:"permissions"`
	}
	if answer.status != http.StatusOK || json.Unmarshal(answer.body, &found) != nil || found.FullName == "" {
		return Finding{Invalid, fmt.Sprintf("GitHub at %s answered %s for %s, and not with a repository: correct %s", c.config.API, answer.statusText(), repository, c.config.SettingName("MM_ORCHESTRATOR_GITHUB_API"))}
	}
	scopes, classic := answer.scopes()
	needed := []string{"repo"}
	if !found.Private {
		needed = append(needed, "public_repo")
	}
	source := c.config.GitHub.Source()
	switch {
	case found.Archived, found.Disabled:
		return Finding{ScopeMissing, fmt.Sprintf("the repository %s is archived or disabled: nobody can push to it. Unarchive it, or choose another one", repository)}
	case classic && !slices.ContainsFunc(needed, func(scope string) bool { return slices.Contains(scopes, scope) }):
		return Finding{ScopeMissing, fmt.Sprintf("the GitHub token in %s has %s, but needs %s for %s: make one that has it", source, scopeText(scopes), strings.Join(needed, " or "), repository)}
	case found.Permissions != nil && !found.Permissions.Push:
		return Finding{ScopeMissing, fmt.Sprintf("the GitHub token in %s may read %s, but not push to it: give its account write access to the repository, or use the token of one that has it", source, repository)}
	}
	if finding, bad := c.askGit(ctx, repository, token); bad {
		return finding
	}
	if !classic {
		if finding, bad := c.askPulls(ctx, repository, token); bad {
			return finding
		}
	}
	message := "the GitHub token may push to " + repository
	if classic {
		message += ", with " + scopeText(scopes)
	}
	if at, known := answer.expires(); known {
		message += "; it expires on " + at.UTC().Format("2006-01-02 15:04 UTC")
		if at.Sub(c.config.Now()) < c.config.ExpiryWarning {
			message += ", which is soon: put a new one into " + source.String()
		}
	}
	return Finding{Valid, message}
}

// scopeText writes the scopes of a token.
func scopeText(scopes []string) string {
	switch len(scopes) {
	case 0:
		return "no scope"
	case 1:
		return "the scope " + scopes[0]
	}
	return "the scopes " + strings.Join(scopes, ", ")
}

// refused says why GitHub has refused a request, and what to do.
func (c *Checker) refused(a answer, repository string) (Finding, bool) {
	source := c.config.GitHub.Source()
	said := a.message()
	switch {
	case a.status == http.StatusUnauthorized:
		return Finding{Invalid, fmt.Sprintf("GitHub at %s refuses the token in %s (401%s): it has expired, was revoked or is not complete. Make a new one and put it there", c.config.API, source, said)}, true
	case a.isLimit():
		return Finding{Invalid, fmt.Sprintf("GitHub's rate limit for the token in %s is used up (%d%s)%s. Try the run again then", source, a.status, said, a.limitEnds(c.config.Now()))}, true
	case a.status == http.StatusForbidden && strings.HasPrefix(a.header.Get("X-Github-Sso"), "required"):
		_, address, _ := strings.Cut(a.header.Get("X-Github-Sso"), "url=")
		return Finding{ScopeMissing, fmt.Sprintf("the organisation of %s wants the token in %s to be authorised for single sign-on: do it at %s", repository, source, address)}, true
	case a.status == http.StatusForbidden:
		return Finding{ScopeMissing, fmt.Sprintf("the GitHub token in %s may not use %s (403%s): a fine-grained token needs the permissions Contents and Pull requests, both for read and write, a classic one the scope repo", source, repository, said)}, true
	case a.status == http.StatusNotFound:
		text := fmt.Sprintf("GitHub at %s shows no repository %s to the token in %s (404): correct its name, or give the token access to it", c.config.API, repository, source)
		if scopes, classic := a.scopes(); classic && !slices.Contains(scopes, "repo") {
			text += fmt.Sprintf(". It has %s, and needs repo for a private repository", scopeText(scopes))
		}
		return Finding{ScopeMissing, text}, true
	case a.status >= 500:
		return Finding{Invalid, fmt.Sprintf("GitHub at %s answered %s%s: try the run again later", c.config.API, a.statusText(), said)}, true
	}
	return Finding{}, false
}

// askGit asks for the list of branches that begins every push. A server gives it only to
// those that may push: this finds what a fine-grained token lacks, whose permissions no
// request shows.
func (c *Checker) askGit(ctx context.Context, repository string, token secret.String) (Finding, bool) {
	address := strings.TrimRight(c.config.Git, "/") + "/" + repository + ".git"
	answer, err := c.send(ctx, func(ctx context.Context) (*http.Request, error) {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, address+"/info/refs?service=git-receive-pack", nil)
		if err == nil {
			r.SetBasicAuth("x-access-token", token.Reveal())
		}
		return r, err
	}, 1<<10)
	source := c.config.GitHub.Source()
	switch {
	case err != nil:
		return Finding{Invalid, fmt.Sprintf("the git server at %s cannot be asked whether the token may push: %v. Try the run again once it answers", address, err)}, true
	case answer.status == http.StatusOK && answer.header.Get("Content-Type") == "application/x-git-receive-pack-advertisement":
		return Finding{}, false
	case answer.status == http.StatusUnauthorized || answer.status == http.StatusForbidden || answer.status == http.StatusNotFound:
		return Finding{ScopeMissing, fmt.Sprintf("the git server refuses a push to %s with the token in %s (%d): a fine-grained token needs the permission Contents for read and write, a classic one the scope repo", address, source, answer.status)}, true
	}
	return Finding{Invalid, fmt.Sprintf("%s answered %s and does not look like a git server that accepts pushes: correct %s", address, answer.statusText(), c.config.SettingName("MM_ORCHESTRATOR_GITHUB_URL"))}, true
}

// askPulls sends a request for a pull request in which everything is missing. GitHub
// checks the permission first: who has it gets 422, and nothing is made.
func (c *Checker) askPulls(ctx context.Context, repository string, token secret.String) (Finding, bool) {
	answer, err := c.api(ctx, http.MethodPost, "/repos/"+repository+"/pulls", token)
	if err == nil && !answer.isLimit() && (answer.status == http.StatusForbidden || answer.status == http.StatusNotFound) {
		return Finding{ScopeMissing, fmt.Sprintf("the GitHub token in %s may push to %s, but not open a pull request (%d%s): give it the permission Pull requests for read and write", c.config.GitHub.Source(), repository, answer.status, answer.message())}, true
	}
	// Any other answer says nothing about the permission.
	return Finding{}, false
}

// api sends a request to GitHub's REST API.
func (c *Checker) api(ctx context.Context, method, path string, token secret.String) (answer, error) {
	return c.send(ctx, func(ctx context.Context) (*http.Request, error) {
		var body io.Reader
		if method == http.MethodPost {
			body = strings.NewReader("{}")
		}
		r, err := http.NewRequestWithContext(ctx, method, strings.TrimRight(c.config.API, "/")+path, body)
		if err != nil {
			return nil, err
		}
		r.Header.Set("Authorization", "Bearer "+token.Reveal())
		r.Header.Set("Accept", "application/vnd.github+json")
		r.Header.Set("X-GitHub-Api-Version", "2022-11-28")
		if method == http.MethodPost {
			r.Header.Set("Content-Type", "application/json")
		}
		return r, nil
	}, maxAnswer)
}

// sendModel asks the model's API for its models.
func (c *Checker) sendModel(ctx context.Context, key secret.String) (answer, error) {
	return c.send(ctx, func(ctx context.Context) (*http.Request, error) {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimRight(c.config.ModelAPI, "/")+"/models", nil)
		if err == nil {
			r.Header.Set("Authorization", "Bearer "+key.Reveal())
		}
		return r, err
	}, 1<<10)
}

// send sends a request, again if it is not answered or the server fails. It reads at
// most limit bytes of the answer. Errors have no address with a query and no header.
func (c *Checker) send(ctx context.Context, build func(context.Context) (*http.Request, error), limit int64) (a answer, err error) {
	for try := 1; ; try++ {
		a, err = c.sendOnce(ctx, build, limit)
		if err == nil && a.status < 500 || try == tries || ctx.Err() != nil {
			return a, err
		}
		select {
		case <-ctx.Done():
			return a, err
		case <-time.After(time.Duration(try) * 500 * time.Millisecond):
		}
	}
}

func (c *Checker) sendOnce(ctx context.Context, build func(context.Context) (*http.Request, error), limit int64) (answer, error) {
	// One try must leave time for another one.
	limited, cancel := context.WithTimeout(ctx, c.config.Timeout/2)
	defer cancel()
	request, err := build(limited)
	if err != nil {
		return answer{}, errors.New("its address is not valid")
	}
	request.Header.Set("User-Agent", "mm-orchestrator")
	response, err := c.http.Do(request)
	if err != nil {
		return answer{}, whatFailed(err, c.config.Timeout)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, limit))
	if err != nil {
		return answer{}, whatFailed(err, c.config.Timeout)
	}
	return answer{response.StatusCode, response.Header, body}, nil
}

// whatFailed is the cause of an error of a request, without its address.
func whatFailed(err error, limit time.Duration) error {
	var request *url.Error
	if errors.As(err, &request) {
		err = request.Err
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("no answer within %s", limit)
	}
	return err
}

// answer is a server's.
type answer struct {
	status int
	header http.Header
	body   []byte
}

func (a answer) statusText() string {
	return strings.TrimSpace(fmt.Sprintf("%d %s", a.status, http.StatusText(a.status)))
}

// message is what GitHub says about an error, "" for nothing.
func (a answer) message() string {
	var said struct {
		Message string `json:"message"`
	}
	if json.NewDecoder(bytes.NewReader(a.body)).Decode(&said) != nil || said.Message == "" {
		return ""
	}
	text := strings.Join(strings.Fields(said.Message), " ")
	if runes := []rune(text); len(runes) > 200 {
		text = string(runes[:200]) + "…"
	}
	return ": " + text
}

// scopes are those of a classic token or of an OAuth app. Others have no such header.
func (a answer) scopes() (list []string, classic bool) {
	_, classic = a.header["X-Oauth-Scopes"]
	for scope := range strings.SplitSeq(a.header.Get("X-Oauth-Scopes"), ",") {
		if scope = strings.TrimSpace(scope); scope != "" {
			list = append(list, scope)
		}
	}
	return list, classic
}

// expires is when the token ends, if GitHub says so.
func (a answer) expires() (time.Time, bool) {
	text := a.header.Get("Github-Authentication-Token-Expiration")
	for _, layout := range []string{"2006-01-02 15:04:05 MST", "2006-01-02 15:04:05 -0700", time.RFC3339} {
		if at, err := time.Parse(layout, text); err == nil {
			return at, true
		}
	}
	return time.Time{}, false
}

// isLimit says that a rate limit has refused the request.
func (a answer) isLimit() bool {
	return a.status == http.StatusTooManyRequests ||
		a.status == http.StatusForbidden && (a.header.Get("X-Ratelimit-Remaining") == "0" || a.header.Get("Retry-After") != "" || bytes.Contains(a.body, []byte("rate limit")))
}

// limitEnds says when a limit ends, "" if GitHub does not say it.
func (a answer) limitEnds(now time.Time) string {
	if seconds, err := strconv.Atoi(a.header.Get("Retry-After")); err == nil && seconds > 0 {
		return fmt.Sprintf(", for %s", time.Duration(seconds)*time.Second)
	}
	if at, err := strconv.ParseInt(a.header.Get("X-Ratelimit-Reset"), 10, 64); err == nil && at > now.Unix() {
		return ", until " + time.Unix(at, 0).UTC().Format("15:04:05 UTC")
	}
	return ""
}
