package githubtest

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// apiState is what only the REST API needs. The server's mutex guards it.
type apiState struct {
	faults []*scripted
	// limits are those that tests have set, by the account's name.
	limits map[string]*limit
	// used counts requests by the account's name.
	used map[string]int
	// moved has the new names of repositories by their old ones.
	moved map[string]string
}

// limit is a primary rate limit.
type limit struct {
	remaining int
	reset     time.Time
}

// SetRateLimit sets how many requests an account has until reset. Then it has all again.
func (s *Server) SetRateLimit(login string, remaining int, reset time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.api.limits == nil {
		s.api.limits = map[string]*limit{}
	}
	s.api.limits[login] = &limit{remaining, reset}
}

// Rename gives a repository another name. GitHub redirects requests for the old one.
func (s *Server) Rename(old, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	dir := func(name string) string { return filepath.Join(s.dir, "repositories", filepath.FromSlash(name)+".git") }
	if err := os.Rename(dir(old), dir(name)); err != nil {
		return err
	}
	repo := s.repositories[strings.ToLower(old)]
	delete(s.repositories, strings.ToLower(old))
	repo.name = name
	s.repositories[strings.ToLower(name)] = repo
	if s.api.moved == nil {
		s.api.moved = map[string]string{}
	}
	s.api.moved[strings.ToLower(old)] = name
	return nil
}

func (s *Server) settings(repo *repository) Settings {
	s.mu.Lock()
	defer s.mu.Unlock()
	return repo.Settings
}

// sees says that a token, nil for none, may see a repository.
func (s *Server) sees(token *Token, repo *repository) bool {
	settings := s.settings(repo)
	switch {
	case token == nil:
		return !settings.Private
	case token.Repositories != nil && !slices.ContainsFunc(token.Repositories, func(name string) bool { return strings.EqualFold(name, repo.name) }):
		return !settings.Private
	}
	return !settings.Private || token.Scopes == nil || slices.Contains(token.Scopes, "repo")
}

// An apiCall is a request to the REST API, with what is known about it.
type apiCall struct {
	*Server
	w     http.ResponseWriter
	r     *http.Request
	token *Token
	repo  *repository
}

const docs = "https://docs.github.com/rest"

// fail answers with an error in GitHub's form.
func (c *apiCall) fail(status int, message, page string, errs ...any) {
	body := map[string]any{"message": message, "documentation_url": docs + page, "status": strconv.Itoa(status)}
	if len(errs) > 0 {
		body["errors"] = errs
	}
	c.answer(status, body)
}

func (c *apiCall) notFound() { c.fail(http.StatusNotFound, "Not Found", "") }

func (c *apiCall) answer(status int, body any) {
	c.w.Header().Set("Content-Type", "application/json; charset=utf-8")
	c.w.WriteHeader(status)
	_ = json.NewEncoder(c.w).Encode(body)
}

// fieldError is one of the errors of "Validation Failed".
func fieldError(resource, field, code, message string) map[string]string {
	e := map[string]string{"resource": resource, "code": code}
	if field != "" {
		e["field"] = field
	}
	if message != "" {
		e["message"] = message
	}
	return e
}

var mediaTypes = regexp.MustCompile(`^(\*/\*|application/(\*|json|vnd\.github(\.v3|\.[a-z-]+-preview)?(\.(raw|text|html|full))?\+json))$`)

// serveAPI answers for the REST API.
func (s *Server) serveAPI(w http.ResponseWriter, r *http.Request) {
	c := &apiCall{Server: s, w: w, r: r}
	if strings.TrimSpace(r.UserAgent()) == "" {
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprint(w, "\r\nRequest forbidden by administrative rules. Please make sure your request has a User-Agent header. Check https://developer.github.com for other possible causes.\r\n")
		return
	}
	h := w.Header()
	h.Set("X-Github-Media-Type", "github.v3; format=json")
	h.Set("X-Github-Request-Id", fmt.Sprintf("%X:%X", time.Now().UnixNano(), len(r.URL.Path)))
	h.Set("X-Github-Enterprise-Version", "3.19.0")
	if v := r.Header.Get("X-Github-Api-Version"); v != "" && v != "2022-11-28" {
		c.fail(http.StatusBadRequest, fmt.Sprintf("'%s' is not a supported version.", v), "/overview/api-versions")
		return
	}
	if accept := r.Header.Get("Accept"); accept != "" && !slices.ContainsFunc(strings.Split(accept, ","), func(kind string) bool {
		kind, _, _ = strings.Cut(kind, ";")
		return mediaTypes.MatchString(strings.TrimSpace(kind))
	}) {
		c.fail(http.StatusUnsupportedMediaType, fmt.Sprintf("Unsupported 'Accept' header: '%s'. Must accept 'application/json'.", accept), "/v3/media")
		return
	}
	if !c.login() || !c.countLimit() {
		return
	}
	if fault := s.nextFault(r); fault != nil {
		fault(w, r, func(w http.ResponseWriter, r *http.Request) {
			inner := *c
			inner.w, inner.r = w, r
			inner.route()
		})
		return
	}
	c.route()
}

// login finds the token of a request.
func (c *apiCall) login() bool {
	text, has := c.r.Header.Get("Authorization"), len(c.r.Header.Values("Authorization")) > 0
	if !has {
		return true
	}
	kind, token, _ := strings.Cut(text, " ")
	if _, password, basic := c.r.BasicAuth(); basic {
		token = password
	} else if !strings.EqualFold(kind, "bearer") && !strings.EqualFold(kind, "token") {
		token = ""
	}
	if c.token = c.Server.token(token); c.token == nil {
		c.fail(http.StatusUnauthorized, "Bad credentials", "")
		return false
	}
	h := c.w.Header()
	if c.token.Scopes != nil {
		h.Set("X-Oauth-Scopes", strings.Join(c.token.Scopes, ", "))
		h.Set("X-Accepted-Oauth-Scopes", "repo")
	}
	if !c.token.Expires.IsZero() {
		h.Set("Github-Authentication-Token-Expiration", c.token.Expires.UTC().Format("2006-01-02 15:04:05 UTC"))
	}
	return true
}

// countLimit counts a request for the primary rate limit.
func (c *apiCall) countLimit() bool {
	login, most := "", 60
	if c.token != nil {
		login, most = c.token.Login, 5000
	}
	c.mu.Lock()
	if c.api.used == nil {
		c.api.used = map[string]int{}
	}
	c.api.used[login]++
	used, reset := c.api.used[login], time.Now().Add(time.Hour)
	remaining, exceeded := max(most-used, 0), false
	if own := c.api.limits[login]; own != nil {
		if time.Now().After(own.reset) {
			delete(c.api.limits, login)
		} else {
			exceeded = own.remaining == 0
			own.remaining = max(own.remaining-1, 0)
			remaining, reset, used = own.remaining, own.reset, most-own.remaining
		}
	}
	c.mu.Unlock()
	h := c.w.Header()
	h.Set("X-Ratelimit-Limit", strconv.Itoa(most))
	h.Set("X-Ratelimit-Remaining", strconv.Itoa(remaining))
	h.Set("X-Ratelimit-Used", strconv.Itoa(used))
	h.Set("X-Ratelimit-Reset", strconv.FormatInt(reset.Unix(), 10))
	h.Set("X-Ratelimit-Resource", "core")
	if exceeded {
		c.fail(http.StatusForbidden, "API rate limit exceeded for user ID 1. If you reach out to GitHub Support for help, please include the request ID.", "/overview/rate-limits-for-the-rest-api")
	}
	return !exceeded
}

// routes are the requests that are answered, below the repository.
var routes = []struct {
	method  string
	path    *regexp.Regexp
	writes  bool
	respond func(c *apiCall, number int)
}{
	{http.MethodGet, regexp.MustCompile(`^$`), false, (*apiCall).getRepository},
	{http.MethodGet, regexp.MustCompile(`^/pulls$`), false, (*apiCall).listPulls},
	{http.MethodPost, regexp.MustCompile(`^/pulls$`), true, (*apiCall).createPull},
	{http.MethodGet, regexp.MustCompile(`^/pulls/(\d+)$`), false, (*apiCall).getPull},
	{http.MethodPatch, regexp.MustCompile(`^/pulls/(\d+)$`), true, (*apiCall).updatePull},
	{http.MethodGet, regexp.MustCompile(`^/pulls/(\d+)/reviews$`), false, (*apiCall).listReviews},
	{http.MethodPost, regexp.MustCompile(`^/pulls/(\d+)/requested_reviewers$`), true, (*apiCall).requestReviews},
	{http.MethodPost, regexp.MustCompile(`^/issues/(\d+)/labels$`), true, (*apiCall).addLabels},
}

var repositoryPath = regexp.MustCompile(`^/api/v3/(?:repos/([^/]+/[^/]+)|repositories/1/([^/]+)/([^/]+))(/.*)?$`)

func (c *apiCall) route() {
	m := repositoryPath.FindStringSubmatch(c.r.URL.Path)
	if m == nil {
		c.notFound()
		return
	}
	name, rest := m[1], m[4]
	if name == "" {
		name = m[2] + "/" + m[3]
	}
	c.mu.Lock()
	moved := c.api.moved[strings.ToLower(name)]
	c.mu.Unlock()
	if moved != "" {
		status := http.StatusMovedPermanently
		if c.r.Method != http.MethodGet {
			status = http.StatusTemporaryRedirect
		}
		address := c.URL + "/api/v3/repositories/1/" + moved + rest
		if c.r.URL.RawQuery != "" {
			address += "?" + c.r.URL.RawQuery
		}
		c.w.Header().Set("Location", address)
		c.answer(status, map[string]string{"message": "Moved Permanently", "url": address, "documentation_url": docs + "/guides/best-practices-for-using-the-rest-api#follow-redirects"})
		return
	}
	if c.repo = c.find(name); c.repo == nil || !c.sees(c.token, c.repo) {
		c.notFound()
		return
	}
	for _, route := range routes {
		m := route.path.FindStringSubmatch(rest)
		if m == nil || route.method != c.r.Method {
			continue
		}
		if route.writes && !c.mayWrite() {
			return
		}
		number := 0
		if len(m) > 1 {
			number, _ = strconv.Atoi(m[1])
			if c.pull(number) == nil {
				c.notFound()
				return
			}
		}
		route.respond(c, number)
		return
	}
	c.notFound()
}

// mayWrite answers if the token may not change the repository's pull requests.
func (c *apiCall) mayWrite() bool {
	settings := c.settings(c.repo)
	switch {
	case c.token == nil:
		c.fail(http.StatusUnauthorized, "Requires authentication", "")
	case c.token.Scopes == nil && (c.token.ReadOnly || c.token.NoPullRequests ||
		c.token.Repositories != nil && !slices.ContainsFunc(c.token.Repositories, func(name string) bool { return strings.EqualFold(name, c.repo.name) })):
		c.w.Header().Set("X-Accepted-Github-Permissions", "pull_requests=write")
		c.fail(http.StatusForbidden, "Resource not accessible by personal access token", "/pulls/pulls")
	case c.token.Scopes != nil && (c.token.ReadOnly || !slices.Contains(c.token.Scopes, "repo") && (settings.Private || !slices.Contains(c.token.Scopes, "public_repo"))):
		c.notFound()
	case settings.Archived:
		c.fail(http.StatusForbidden, "Repository was archived so is read-only.", "/pulls/pulls")
	default:
		return true
	}
	return false
}

func (c *apiCall) getRepository(int) {
	settings := c.settings(c.repo)
	body := map[string]any{
		"id": 1, "full_name": c.repo.name, "name": c.repo.name[strings.IndexByte(c.repo.name, '/')+1:], "owner": map[string]any{"login": c.owner()},
		"private": settings.Private, "archived": settings.Archived, "disabled": false, "default_branch": "main",
		"html_url": c.URL + "/" + c.repo.name, "clone_url": c.URL + "/" + c.repo.name + ".git",
	}
	if c.token != nil {
		push := !c.token.ReadOnly
		body["permissions"] = map[string]bool{"admin": false, "maintain": false, "push": push, "triage": push, "pull": true}
	}
	c.answer(http.StatusOK, body)
}

func (c *apiCall) owner() string {
	owner, _, _ := strings.Cut(c.repo.name, "/")
	return owner
}

// body decodes the body of a request into an object whose fields have these types, and
// answers if it is none. Of required fields none may be missing.
func (c *apiCall) body(types map[string]string, required ...string) (map[string]any, bool) {
	var decoded any
	if err := json.NewDecoder(c.r.Body).Decode(&decoded); err != nil {
		c.fail(http.StatusBadRequest, "Problems parsing JSON", "")
		return nil, false
	}
	body, is := decoded.(map[string]any)
	if !is {
		c.fail(http.StatusBadRequest, "Body should be a JSON object", "")
		return nil, false
	}
	var missing []string
	for _, name := range required {
		if body[name] == nil {
			missing = append(missing, fmt.Sprintf("%q", name))
		}
	}
	if len(missing) > 0 {
		verb := "wasn't"
		if len(missing) > 1 {
			verb = "weren't"
		}
		c.fail(http.StatusUnprocessableEntity, fmt.Sprintf("Invalid request.\n\n%s %s supplied.", strings.Join(missing, ", "), verb), "/pulls/pulls")
		return nil, false
	}
	for name, kind := range types {
		fits := true
		switch value := body[name].(type) {
		case nil:
		case string:
			fits = kind == "string"
		case bool:
			fits = kind == "boolean"
		case []any:
			fits = kind == "array"
			for _, element := range value {
				_, is := element.(string)
				fits = fits && is
			}
		default:
			fits = false
		}
		if !fits {
			text, _ := json.Marshal(body[name])
			c.fail(http.StatusUnprocessableEntity, fmt.Sprintf("Invalid request.\n\nFor 'properties/%s', %s is not of type %s.", name, text, kind), "/pulls/pulls")
			return nil, false
		}
	}
	return body, true
}

func (c *apiCall) invalid(page string, errs ...any) {
	c.fail(http.StatusUnprocessableEntity, "Validation Failed", page, errs...)
}
