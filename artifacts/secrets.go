package artifacts

import (
	"encoding/base64"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
)

// Mask is written in place of every secret.
const Mask = "***"

// shortPassword is the length in bytes below which a password from a URL is
// replaced only between its colon and its at sign. Replacing every "guest"
// because a broker URL contains guest:guest@ would make logs unreadable.
const shortPassword = 8

// A Redactor replaces secrets by [Mask]. It may be used by several goroutines. The nil
// Redactor knows no secrets.
//
// MoonMind's rules (docs/moonmind.md#secrets) are the minimum: the values of
// variables whose names say that they are secret, each as it is, in standard
// base64, and form-encoded. In addition (docs/moonmind.md#c19), a Redactor replaces:
//
//   - the values of variables with other names that say so, and of those that
//     [Rules] name;
//   - the passwords in URLs of any variable, as any parser of URLs may read them;
//   - what files with secrets contain, see [Redactor.Refresh];
//   - credentials that are read while the program runs, see [Redactor.Add];
//   - of secrets with several lines each line;
//   - each secret in the form in which [NewTextWriter] leaves it, and without
//     the white space around it;
//   - each secret in the forms in which programs print it: in URLs, JSON, shells, XML,
//     base64, hexadecimal, over several lines, with the control sequences of terminals
//     in it;
//   - passwords in URLs, credentials of HTTP headers and private keys that are in no
//     variable.
//
// Secrets that overlap in a text are replaced by one Mask. MoonMind replaces
// one form after the other, which leaves the ends of overlapping secrets
// readable. In all other cases the result is the same.
type Redactor struct {
	environ []string
	rules   Rules

	current atomic.Pointer[matcher]

	mu sync.Mutex
	// state says which files were read, and in which versions. Guarded by mu.
	state string
	// remembered are the secrets that files have or had, because what was started
	// with an earlier version still prints its secrets. Guarded by mu.
	remembered map[string]struct{}
	// added are the secrets of Add, the latest last. Guarded by mu.
	added []string
}

// maxAdded limits the secrets of Add that are remembered. A credential that is new for
// each use, as a vault makes them, must not make the redactor slower for ever.
const maxAdded = 256

// Rules add to what a [Redactor] takes for secret.
type Rules struct {
	// Names are names of variables whose values are secret. In them, * and ? stand
	// for other characters; case does not matter.
	Names []string
	// Files are paths of files each of whose lines is a secret. Of a line NAME=value
	// the value is one too.
	Files []string
	// Workspace is a directory whose .env and .env.* files hold variables as the
	// environment does. Empty means none.
	Workspace string
	// CommonWords are values that are masked only where they stand as a value, after
	// an equals sign or a colon, and not wherever a text has that word. With none,
	// every secret is masked everywhere, as MoonMind does.
	CommonWords []string
}

// CommonWords are words that occur in texts of all kinds and, by carelessness or as
// defaults, as values of variables whose names say that they are secret.
var CommonWords = []string{
	"admin", "auto", "basic", "bearer", "changeme", "default", "disabled", "enabled", "example", "false", "guest", "jwt", "local", "none", "null", "oauth", "off", "on",
	"password", "postgres", "root", "secret", "test", "token", "true", "user",
}

// NewRedactor returns a Redactor for the secrets in an environment of
// NAME=value strings, and for those that the rules add.
func NewRedactor(environ []string, rules ...Rules) *Redactor {
	r := &Redactor{environ: slices.Clone(environ), remembered: map[string]struct{}{}}
	for _, more := range rules {
		r.rules.Names = append(r.rules.Names, more.Names...)
		r.rules.Files = append(r.rules.Files, more.Files...)
		r.rules.CommonWords = append(r.rules.CommonWords, more.CommonWords...)
		if more.Workspace != "" {
			r.rules.Workspace = more.Workspace
		}
	}
	r.compile()
	if len(rules) > 0 {
		r.Refresh()
	}
	return r
}

// Add makes texts secret from now on: also for handlers and writers that exist. It is
// called with a credential as soon as it has been read, before anything uses it. Earlier
// values of the same credential stay secret, up to a limit.
func (r *Redactor) Add(secrets ...string) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	known := true
	for _, secret := range secrets {
		if at := slices.Index(r.added, secret); at >= 0 {
			r.added = append(slices.Delete(r.added, at, at+1), secret) // used again, so remembered longer
		} else if Trim(secret) != "" {
			r.added = append(r.added, secret)
			known = false
		}
	}
	if known {
		return
	}
	r.added = slices.Delete(r.added, 0, max(0, len(r.added)-maxAdded))
	r.compile()
}

// compile makes the matcher.
func (r *Redactor) compile() {
	f := &forms{patterns: map[string]*pattern{}, guarded: map[string]bool{}}
	for _, word := range r.rules.CommonWords {
		f.guarded[strings.ToLower(word)] = true
	}
	for _, variable := range r.environ {
		if name, value, found := strings.Cut(variable, "="); found {
			f.variable(name, value, r.rules.Names)
		}
	}
	for value := range r.remembered {
		f.secret(value)
	}
	for _, value := range r.added {
		f.secret(value)
	}
	r.current.Store(newMatcher(append(slices.Collect(maps.Values(f.patterns)), detectors...)))
}

// variable adds the secrets in the value of a variable.
func (f *forms) variable(name, value string, names []string) {
	if isSecret(name, value, names) {
		f.secret(value)
	}
	value = withScheme(name, value)
	for _, login := range address.Logins(value) {
		if len(login.Password) >= shortPassword {
			f.secret(login.Password)
			if strings.Contains(login.Password, "+") {
				// Written by urllib.parse.quote_plus, and read so by old SQLAlchemy.
				f.secret(strings.ReplaceAll(login.Password, "+", " "))
			}
		} else {
			for _, spelling := range spellings(login.Password) {
				f.put(":" + spelling + "@")
			}
		}
		if login.User != "" {
			// The header of a request with this login.
			f.put(base64.StdEncoding.EncodeToString([]byte(login.User + ":" + login.Password)))
		}
	}
	for _, token := range urlSecrets(value, names) {
		f.secret(token)
	}
}

// withScheme is the value of a variable, with a scheme if it has the address of a proxy:
// programs accept it without one.
func withScheme(name, value string) string {
	if strings.HasSuffix(strings.ToLower(name), "_proxy") && !strings.Contains(value, "://") {
		return "http://" + value
	}
	return value
}

var (
	userToken = regexp.MustCompile(`://([^/@:\s]{16,})@`)
	urlQuery  = regexp.MustCompile(`[?&]([A-Za-z0-9_.-]+)=([^&#\s]{6,})`)
	// nextURL is what stands between two URLs in a list, as in name=URL,name=URL.
	nextURL = regexp.MustCompile(`,\s*(?:[A-Za-z0-9_.-]+=)?[A-Za-z][A-Za-z0-9+.-]*://`)
)

// urlSecrets are the secrets in a URL that are no password: a token instead of the
// user, and parameters with names that say so.
func urlSecrets(value string, names []string) (found []string) {
	if !strings.Contains(value, "://") {
		return nil
	}
	for _, match := range userToken.FindAllStringSubmatch(value, -1) {
		found = append(found, match[1])
	}
	for _, one := range nextURL.Split(value, -1) {
		for _, match := range urlQuery.FindAllStringSubmatch(one, -1) {
			if !isSecret(match[1], match[2], names) {
				continue
			}
			found = append(found, match[2])
			// A comma may be part of a secret or end it.
			if before, _, cut := strings.Cut(match[2], ","); cut && len(before) >= shortPassword {
				found = append(found, before)
			}
		}
	}
	return found
}

// matcher returns the matcher in force, nil for none.
func (r *Redactor) matcher() *matcher {
	if r == nil {
		return nil
	}
	return r.current.Load()
}

// String returns the text with every secret replaced.
func (r *Redactor) String(text string) string {
	m := r.matcher()
	if m == nil || text == "" {
		return text
	}
	all := []byte(text)
	work := rooms.Get().(*room)
	defer rooms.Put(work)
	if _, _, v := m.find(work, new(nextEscape), all, 0, true, nil); v == absent {
		return text
	}
	var out strings.Builder
	w := &RedactingWriter{matcher: m, next: &out, text: all, room: work}
	// A strings.Builder does not fail.
	_ = w.Close()
	return out.String()
}

// rooms are for texts that are redacted at once.
var rooms = sync.Pool{New: func() any { return new(room) }}
