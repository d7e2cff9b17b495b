package preflight

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/github"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
)

// tries is how often a request is sent that was not answered.
const tries = 3

// expiryWarning is how long before its end a token expires soon.
const expiryWarning = 7 * 24 * time.Hour

// checkGitHub finds out whether the token may push to a repository and open a pull
// request there.
func (c *Checker) checkGitHub(ctx context.Context, request Request) Finding {
	token, err := c.config.GitHub.Read(ctx)
	switch {
	case err != nil:
		return Finding{Invalid, err.Error()}
	case request.Repository == "":
		return Finding{Invalid, "the run names no repository: set " + c.config.SettingName("GITHUB_REPOSITORY") + ", or submit the run with one"}
	case github.CheckName(request.Repository) != nil:
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
	client := c.api.With(token)
	found, err := client.FindRepository(ctx, repository)
	if err != nil {
		return c.refused(err, repository)
	}
	needed := []string{"repo"}
	if !found.Private {
		needed = append(needed, "public_repo")
	}
	source := c.config.GitHub.Source()
	switch {
	case found.Archived, found.Disabled:
		return Finding{ScopeMissing, fmt.Sprintf("the repository %s is archived or disabled: nobody can push to it. Unarchive it, or choose another one", repository)}
	case found.Classic && !slices.ContainsFunc(needed, func(scope string) bool { return slices.Contains(found.Scopes, scope) }):
		return Finding{ScopeMissing, fmt.Sprintf("the GitHub token in %s has %s, but needs %s for %s: make one that has it", source, scopeText(found.Scopes), strings.Join(needed, " or "), repository)}
	case !found.MayPush:
		return Finding{ScopeMissing, fmt.Sprintf("the GitHub token in %s may read %s, but not push to it: give its account write access to the repository, or use the token of one that has it", source, repository)}
	}
	if finding, bad := c.askGit(ctx, repository, token); bad {
		return finding
	}
	if !found.Classic {
		var refused *github.Error
		// Any other answer says nothing about the permission.
		if err := client.CheckMayOpen(ctx, repository); errors.As(err, &refused) && (refused.Kind == github.Access || refused.Kind == github.NotFound) {
			return Finding{ScopeMissing, fmt.Sprintf("the GitHub token in %s may push to %s, but not open a pull request (%s): give it the permission Pull requests for read and write", source, repository, said(refused))}
		}
	}
	message := "the GitHub token may push to " + repository
	if found.Classic {
		message += ", with " + scopeText(found.Scopes)
	}
	if !found.Expires.IsZero() {
		message += "; it expires on " + found.Expires.UTC().Format("2006-01-02 15:04 UTC")
		if found.Expires.Sub(c.config.Now()) < expiryWarning {
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

// said is the status and the message of a refusal.
func said(e *github.Error) string {
	if e.Message == "" {
		return statusText(e.Status)
	}
	return fmt.Sprintf("%d: %s", e.Status, e.Message)
}

// refused says why GitHub does not show the repository, and what to do.
func (c *Checker) refused(err error, repository string) Finding {
	source := c.config.GitHub.Source()
	var e *github.Error
	if !errors.As(err, &e) {
		// The time for the whole check is over.
		return Finding{Invalid, fmt.Sprintf("GitHub at %s has not answered about %s within %s: try the run again once it answers", c.config.API, repository, c.config.Timeout)}
	}
	switch e.Kind {
	case github.Login:
		return Finding{Invalid, fmt.Sprintf("GitHub at %s refuses the token in %s (%s): it has expired, was revoked or is not complete. Make a new one and put it there", c.config.API, source, said(e))}
	case github.RateLimit:
		until := ""
		if !e.Until.IsZero() {
			until = ", until " + e.Until.UTC().Format("15:04:05 UTC")
		}
		return Finding{Invalid, fmt.Sprintf("GitHub's rate limit for the token in %s is used up (%s)%s. Try the run again then", source, said(e), until)}
	case github.Access:
		if e.SSO != "" {
			return Finding{ScopeMissing, fmt.Sprintf("the organisation of %s wants the token in %s to be authorised for single sign-on: do it at %s", repository, source, e.SSO)}
		}
		return Finding{ScopeMissing, fmt.Sprintf("the GitHub token in %s may not use %s (%s): a fine-grained token needs the permissions Contents and Pull requests, both for read and write, a classic one the scope repo", source, repository, said(e))}
	case github.NotFound:
		text := fmt.Sprintf("GitHub at %s shows no repository %s to the token in %s (%d): correct its name, or give the token access to it", c.config.API, repository, source, e.Status)
		if e.Classic && !slices.Contains(e.Scopes, "repo") {
			text += fmt.Sprintf(". It has %s, and needs repo for a private repository", scopeText(e.Scopes))
		}
		return Finding{ScopeMissing, text}
	case github.Unusable:
		if e.Status != 0 {
			return Finding{Invalid, fmt.Sprintf("GitHub at %s answered %s for %s, and not with a repository: correct %s", c.config.API, statusText(e.Status), repository, c.config.SettingName("MM_ORCHESTRATOR_GITHUB_API"))}
		}
	}
	return Finding{Invalid, fmt.Sprintf("%s cannot be asked for: %v", repository, err)}
}

// askGit asks for the list of branches that begins every push. A server gives it only to
// those that may push: this finds what a fine-grained token lacks, whose permissions no
// request shows.
func (c *Checker) askGit(ctx context.Context, repository string, token secret.String) (Finding, bool) {
	address := github.RepositoryURL(c.config.Git, repository)
	answer, err := c.send(ctx, c.http, address+"/info/refs?service=git-receive-pack", func(r *http.Request) { r.SetBasicAuth("x-access-token", token.Reveal()) })
	source := c.config.GitHub.Source()
	switch {
	case err != nil:
		return Finding{Invalid, fmt.Sprintf("the git server at %s cannot be asked whether the token may push: %v. Try the run again once it answers", address, err)}, true
	case answer.status == http.StatusOK && answer.contentType == "application/x-git-receive-pack-advertisement":
		return Finding{}, false
	// GitHub's limits for git may be a 403 too, which says nothing about the token then.
	case answer.status == http.StatusTooManyRequests || answer.status == http.StatusForbidden && answer.retryAfter != "":
		return Finding{Invalid, fmt.Sprintf("the git server at %s limits the requests of the token in %s (%d)%s. Try the run again then", address, source, answer.status, answer.howLong())}, true
	case answer.status >= http.StatusInternalServerError:
		return Finding{Invalid, fmt.Sprintf("the git server at %s has failed (%s): try the run again later", address, statusText(answer.status))}, true
	case answer.status == http.StatusUnauthorized || answer.status == http.StatusForbidden || answer.status == http.StatusNotFound:
		return Finding{ScopeMissing, fmt.Sprintf("the git server refuses a push to %s with the token in %s (%d): a fine-grained token needs the permission Contents for read and write, a classic one the scope repo", address, source, answer.status)}, true
	}
	return Finding{Invalid, fmt.Sprintf("%s answered %s and does not look like a git server that accepts pushes: correct %s", address, statusText(answer.status), c.config.SettingName("MM_ORCHESTRATOR_GITHUB_URL"))}, true
}

// send asks for an address, again if that is not answered or the server fails. Errors
// have no address and no header. logIn adds the credential.
func (c *Checker) send(ctx context.Context, client *http.Client, address string, logIn func(*http.Request)) (a answer, err error) {
	for try := 1; ; try++ {
		a, err = c.sendOnce(ctx, client, address, logIn)
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

func (c *Checker) sendOnce(ctx context.Context, client *http.Client, address string, logIn func(*http.Request)) (answer, error) {
	// One try must leave time for another one.
	limited, cancel := context.WithTimeout(ctx, c.config.Timeout/2)
	defer cancel()
	request, err := http.NewRequestWithContext(limited, http.MethodGet, address, nil)
	if err != nil {
		return answer{}, errors.New("its address is not valid")
	}
	logIn(request)
	request.Header.Set("User-Agent", "mm-orchestrator")
	response, err := client.Do(request)
	if err != nil {
		return answer{}, whatFailed(err, c.config.Timeout)
	}
	defer response.Body.Close()
	return answer{response.StatusCode, response.Header.Get("Content-Type"), response.Header.Get("Retry-After")}, nil
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

// answer is a server's. Its body is not read: the status says enough.
type answer struct {
	status                  int
	contentType, retryAfter string
}

// howLong says for how long a server that limits requests does so, "" if it does not tell.
func (a answer) howLong() string {
	seconds, err := time.ParseDuration(a.retryAfter + "s")
	if err != nil {
		return ""
	}
	return fmt.Sprintf(", for %s", seconds)
}

func statusText(status int) string {
	return strings.TrimSpace(fmt.Sprintf("%d %s", status, http.StatusText(status)))
}
