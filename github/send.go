package github

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
)

const (
	// version is that of the REST API whose documentation this package follows.
	version = "2022-11-28"
	// maxAnswer bounds an answer, in bytes. A page of 30 pull requests with texts of the
	// greatest length has about 5 MiB.
	maxAnswer = 16 << 20
	// tries is how often a request is sent that was not answered.
	tries = 4
)

// A request is one to the REST API.
type request struct {
	// does says what it does, for errors: "may not <does>".
	does   string
	method string
	// path begins at the base address. Parts of it are escaped.
	path  string
	query url.Values
	// body is encoded as JSON, nil for none.
	body any
	// once says that it must not be sent again if GitHub may have done it.
	once bool
}

// A session is one call of this package, with all its requests.
type session struct {
	*Client
	// spent is the time for waits and for requests that have failed.
	spent time.Duration
}

func (c *Client) session() *session { return &session{Client: c} }

// An answer is GitHub's.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// do sends a request, and again as long as that is of use. into gets the answer's JSON,
// nil for none. The error is an *Error, or the context's cause.
func (s *session) do(ctx context.Context, r request, into any) (answer, error) {
	var refused secret.String
	secondary := 0
	for try := 1; ; try++ {
		token, err := s.config.Token.Read(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return answer{}, context.Cause(ctx)
			}
			return answer{}, &Error{Kind: Login, text: err.Error(), Err: err, unsent: true}
		}
		began := time.Now()
		a, err := s.send(ctx, r, token)
		if ctx.Err() != nil {
			return answer{}, context.Cause(ctx)
		}
		failed := &Error{}
		switch {
		case err != nil && !errors.As(err, &failed):
			return answer{}, err
		case err == nil && a.status >= 200 && a.status < 300:
			if into == nil {
				return a, nil
			}
			if err := json.Unmarshal(a.body, into); err == nil {
				return a, nil
			}
			return answer{}, s.unusable(a.status, fmt.Sprintf("its answer (%s) is not what GitHub answers", statusText(a.status)), nil)
		case err == nil:
			failed = s.refusal(r, a)
		}
		if failed.Kind == Login && refused.IsZero() {
			// The token may have been replaced while the request was on its way.
			refused = token
			if now, err := s.config.Token.Read(ctx); err == nil && now != token {
				continue
			}
		}
		var pause time.Duration
		switch {
		case failed.Kind == RateLimit:
			if pause = s.limitPause(a, secondary); a.header.Get("Retry-After") == "" {
				secondary++
			}
		case failed.Kind == Unavailable && try < tries && (!r.once || failed.unsent):
			pause = max(time.Second<<(try-1), retryAfter(a.header))
		default:
			return answer{}, failed
		}
		s.spent += time.Since(began)
		if err := s.pause(ctx, pause, r, failed); err != nil {
			return answer{}, err
		}
	}
}

// pause waits before a request is repeated. The error is failed if the wait would be
// longer than the caller's patience.
func (s *session) pause(ctx context.Context, pause time.Duration, r request, failed *Error) error {
	deadline, has := ctx.Deadline()
	if s.spent+pause > s.config.Patience || has && pause > time.Until(deadline) {
		return failed
	}
	s.spent += pause
	s.config.Logger.Warn("GitHub is asked again after a pause", "request", r.does, "pause", pause, "reason", string(failed.Kind), "error", failed.text)
	return s.config.Wait(ctx, pause)
}

// send sends a request once. The error is an *Error if there is no answer.
func (s *session) send(ctx context.Context, r request, token secret.String) (answer, error) {
	address := *s.base
	address.RawQuery = r.query.Encode()
	var body io.Reader
	if r.body != nil {
		text, err := json.Marshal(r.body)
		if err != nil {
			return answer{}, err
		}
		body = bytes.NewReader(text)
	}
	limited, cancel := context.WithTimeout(ctx, s.config.Timeout)
	defer cancel()
	request, err := http.NewRequestWithContext(limited, r.method, address.JoinPath(r.path).String(), body)
	if err != nil {
		return answer{}, errors.New("the address of the request to GitHub is not valid")
	}
	request.Header.Set("Authorization", "Bearer "+token.Reveal())
	request.Header.Set("Accept", "application/vnd.github+json")
	request.Header.Set("X-GitHub-Api-Version", version)
	request.Header.Set("User-Agent", "mm-orchestrator")
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	response, err := s.http.Do(request)
	if err != nil {
		return answer{}, s.noAnswer(err, token)
	}
	defer response.Body.Close()
	if response.ContentLength > maxAnswer {
		return answer{}, s.unusable(response.StatusCode, fmt.Sprintf("its answer has %d bytes, and at most %d are read", response.ContentLength, maxAnswer), nil)
	}
	text, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer+1))
	if err == nil {
		// A server that notices our end of the connection may still end its answer, as if it
		// were whole.
		err = limited.Err()
	}
	switch {
	case err != nil:
		return answer{}, s.noAnswer(err, token)
	case len(text) > maxAnswer:
		return answer{}, s.unusable(response.StatusCode, fmt.Sprintf("its answer has more than %d bytes", maxAnswer), nil)
	}
	// A server that repeats what it was sent must not bring the token into an error.
	return answer{response.StatusCode, response.Header, bytes.ReplaceAll(text, []byte(token.Reveal()), []byte(secret.Mask))}, nil
}

// noAnswer is the error of a request without an answer.
func (s *session) noAnswer(err error, token secret.String) *Error {
	var request *url.Error
	if errors.As(err, &request) {
		err = request.Err // the address is known, and a redirect's may have anything in it
	}
	var dial *net.OpError
	var certificate *tls.CertificateVerificationError
	switch {
	case errors.Is(err, errRedirect):
		return s.unusable(0, "it answers with a "+err.Error(), nil)
	case errors.As(err, &certificate):
		return s.unusable(0, "its certificate is not trusted: "+certificate.Error(), err)
	case errors.Is(err, context.DeadlineExceeded):
		return &Error{Kind: Unavailable, Err: context.DeadlineExceeded, text: fmt.Sprintf("GitHub at %s has not answered within %s: try again later", s.config.API, s.config.Timeout)}
	}
	text := oneLine(strings.ReplaceAll(err.Error(), token.Reveal(), secret.Mask))
	return &Error{
		Kind: Unavailable, Err: errors.New(text), unsent: errors.As(err, &dial) && dial.Op == "dial",
		text: fmt.Sprintf("GitHub at %s cannot be reached: %s. Try again once it answers", s.config.API, text),
	}
}

func (s *session) unusable(status int, why string, err error) *Error {
	return &Error{Kind: Unusable, Status: status, Err: err, text: fmt.Sprintf("GitHub at %s cannot be used: %s. Correct the address of the API, or the proxy on the way to it", s.config.API, why)}
}

// refusal is the error for an answer that is none of success.
func (s *session) refusal(r request, a answer) *Error {
	e := &Error{Status: a.status}
	var said struct {
		Message string          `json:"message"`
		Errors  json.RawMessage `json:"errors"`
	}
	isJSON := json.Unmarshal(a.body, &said) == nil
	e.Message = oneLine(said.Message)
	if json.Unmarshal(said.Errors, &e.Fields) != nil {
		e.Fields = nil
		if text := oneLine(strings.Trim(string(said.Errors), `"`)); text != "" && text != "null" {
			e.Fields = []FieldError{{Code: "custom", Message: text}}
		}
	}
	e.Scopes, e.Classic = scopes(a.header)
	// in is what GitHub has said, in brackets.
	in := strconv.Itoa(a.status)
	if e.Message != "" {
		in += ": " + e.Message
	}
	for _, field := range e.Fields {
		if text := field.String(); text != e.Message {
			in += "; " + text
		}
	}
	switch {
	case a.status == http.StatusUnauthorized:
		e.Kind = Login
		e.text = fmt.Sprintf("GitHub at %s refuses the token (%s): it has expired, was revoked or is not complete. Make a new one and put it where the setting points", s.config.API, in)
	case isLimit(a, e.Message):
		e.Kind = RateLimit
		until := ""
		if _, e.Until = limitEnds(a.header, s.config.Now()); !e.Until.IsZero() {
			until = ", until " + e.Until.UTC().Format("15:04:05 UTC")
		}
		e.text = fmt.Sprintf("GitHub's rate limit for the token is used up (%s)%s: try again then, or use the token of another account", in, until)
	case a.status == http.StatusForbidden && strings.HasPrefix(a.header.Get("X-Github-Sso"), "required"):
		e.Kind = Access
		_, address, _ := strings.Cut(a.header.Get("X-Github-Sso"), "url=")
		e.SSO = oneLine(address)
		e.text = fmt.Sprintf("the organisation wants the token to be authorised for single sign-on, to %s (%s): do it at %s", r.does, in, e.SSO)
	case a.status == http.StatusForbidden || a.status == http.StatusUnavailableForLegalReasons:
		e.Kind = Access
		e.text = fmt.Sprintf("the GitHub token may not %s (%s): a fine-grained token needs the permissions Contents and Pull requests, both for read and write, a classic one the scope repo, and its account write access", r.does, in)
		if strings.Contains(e.Message, "archived") {
			e.text = fmt.Sprintf("GitHub does not let anybody %s (%s): unarchive the repository, or choose another one", r.does, in)
		} else if accepted := oneLine(a.header.Get("X-Accepted-Github-Permissions")); accepted != "" {
			e.text += ". GitHub asks for " + accepted
		}
	case a.status == http.StatusNotFound || a.status == http.StatusGone:
		e.Kind = NotFound
		e.text = fmt.Sprintf("GitHub at %s does not let the token %s (%s): correct the name of the repository, or give the token access to it", s.config.API, r.does, in)
		if e.Classic && !slices.Contains(e.Scopes, "repo") {
			e.text += ". A private repository needs the scope repo, which the token does not have"
		}
	case a.status == http.StatusUnprocessableEntity || a.status == http.StatusBadRequest && isJSON || a.status == http.StatusConflict:
		e.Kind = Invalid
		e.text = fmt.Sprintf("GitHub refuses to %s (%s)", r.does, in)
	case a.status >= 500:
		e.Kind = Unavailable
		e.text = fmt.Sprintf("GitHub at %s has failed (%s): try again later", s.config.API, cmp.Or(e.Message, statusText(a.status)))
	default:
		return s.unusable(a.status, "it answers "+statusText(a.status), nil)
	}
	return e
}

func statusText(status int) string {
	return strings.TrimSpace(fmt.Sprintf("%d %s", status, http.StatusText(status)))
}

// isLimit says that a rate limit has refused a request. The secondary limit may have no
// header at all, only its message.
func isLimit(a answer, message string) bool {
	return a.status == http.StatusTooManyRequests || a.status == http.StatusForbidden &&
		(a.header.Get("X-Ratelimit-Remaining") == "0" || a.header.Get("Retry-After") != "" || strings.Contains(strings.ToLower(message), "rate limit"))
}

// limitPause is how long to wait for a rate limit, as GitHub's documentation says: what
// Retry-After says, else until the limit is reset, else a minute and then always twice
// as long. https://docs.github.com/rest/using-the-rest-api/best-practices-for-using-the-rest-api
func (s *session) limitPause(a answer, before int) time.Duration {
	if pause, _ := limitEnds(a.header, s.config.Now()); pause > 0 {
		return pause
	}
	return time.Minute << min(before, 10)
}

// limitEnds is how long a limit lasts and when it ends, zero if the answer does not say
// it.
func limitEnds(header http.Header, now time.Time) (time.Duration, time.Time) {
	if pause := retryAfter(header); pause > 0 {
		return pause, now.Add(pause)
	}
	reset, err := strconv.ParseInt(header.Get("X-Ratelimit-Reset"), 10, 64)
	if err != nil || header.Get("X-Ratelimit-Remaining") != "0" {
		return 0, time.Time{}
	}
	// The server's clock: ours may be wrong.
	if date, err := http.ParseTime(header.Get("Date")); err == nil {
		now = date
	}
	ends := time.Unix(reset, 0)
	return max(ends.Sub(now), 0) + time.Second, ends
}

// retryAfter is the wait that a server asks for, 0 for none.
func retryAfter(header http.Header) time.Duration {
	seconds, err := strconv.Atoi(header.Get("Retry-After"))
	if err != nil || seconds < 0 || seconds > 1<<30 {
		return 0
	}
	return time.Duration(seconds) * time.Second
}

// scopes are those of a classic token or of an OAuth app. Others have no such header.
func scopes(header http.Header) (list []string, classic bool) {
	_, classic = header["X-Oauth-Scopes"]
	for scope := range strings.SplitSeq(header.Get("X-Oauth-Scopes"), ",") {
		if scope = oneLine(scope); scope != "" {
			list = append(list, scope)
		}
	}
	return list, classic
}

// expires is when a token ends, if GitHub says so.
func expires(header http.Header) time.Time {
	for _, layout := range []string{"2006-01-02 15:04:05 MST", "2006-01-02 15:04:05 -0700", time.RFC3339} {
		if at, err := time.Parse(layout, header.Get("Github-Authentication-Token-Expiration")); err == nil {
			return at
		}
	}
	return time.Time{}
}
