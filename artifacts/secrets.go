package artifacts

import (
	"cmp"
	"encoding/base64"
	"net/url"
	"regexp"
	"slices"
	"strings"
)

// Mask stands in the place of every secret.
const Mask = "***"

// shortPassword is the length in bytes below which a password out of a URL is
// hidden only between its colon and its at sign: hiding every "guest" because
// a broker URL says guest:guest@ would make logs unreadable.
const shortPassword = 8

// sensitiveName is MoonMind's rule for names of variables whose values are
// secret (docs/moonmind.md#secrets).
var sensitiveName = regexp.MustCompile(`(?i)(?:^|[^a-z0-9])(?:token|secret|password|key|credential|auth)(?:$|[^a-z0-9])`)

// urlPassword finds scheme://user:password@ inside a value. The password is
// the first group; it is greedy, since an unescaped @ may stand in it.
var urlPassword = regexp.MustCompile(`[A-Za-z][A-Za-z0-9+.-]*://[^\s/?#:@]*:([^\s/?#]+)@`)

// A Redactor replaces secrets by [Mask]. It never changes after it was made
// and may be used by many goroutines. The nil Redactor knows no secrets.
//
// What is secret follows MoonMind's rules as a minimum
// (docs/moonmind.md#secrets): the values of variables with a telling name, each
// as is, in standard base64 and form-encoded. In addition: the passwords in
// URLs of any variable (docs/moonmind.md#c19), and each secret as it looks
// after [NewTextWriter] and without white space around it.
//
// Secrets that overlap in a text are hidden together by one Mask. Upstream
// replaces one form after the other, which leaves the ends of overlapping
// secrets readable; for all others the result is the same.
type Redactor struct {
	// secrets by their first byte, the longest first.
	secrets [256][]string
	longest int
}

// NewRedactor takes the secrets out of an environment of NAME=value strings.
func NewRedactor(environ []string) *Redactor {
	forms := map[string]struct{}{}
	add := func(secret string) {
		for _, form := range []string{secret, plainText(secret), Trim(secret), Trim(plainText(secret))} {
			if form == "" {
				continue
			}
			forms[form] = struct{}{}
			forms[base64.StdEncoding.EncodeToString([]byte(form))] = struct{}{}
			forms[url.QueryEscape(form)] = struct{}{}
		}
	}
	for _, variable := range environ {
		name, value, found := strings.Cut(variable, "=")
		if !found || value == "" {
			continue
		}
		if sensitiveName.MatchString(name) {
			add(value)
		}
		for _, match := range urlPassword.FindAllStringSubmatch(value, -1) {
			password := match[1]
			if decoded, err := url.PathUnescape(password); err == nil && decoded != password {
				if len(decoded) >= shortPassword {
					add(decoded)
				} else {
					forms[":"+decoded+"@"] = struct{}{}
				}
			}
			if len(password) >= shortPassword {
				add(password)
			} else {
				forms[":"+password+"@"] = struct{}{}
			}
		}
	}
	r := &Redactor{}
	for form := range forms {
		first := form[0]
		r.secrets[first] = append(r.secrets[first], form)
		r.longest = max(r.longest, len(form))
	}
	for _, list := range r.secrets {
		slices.SortFunc(list, func(a, b string) int {
			return cmp.Or(cmp.Compare(len(b), len(a)), strings.Compare(a, b))
		})
	}
	return r
}

// String returns the text with every secret replaced.
func (r *Redactor) String(text string) string {
	if r == nil || r.longest == 0 || text == "" {
		return text
	}
	var out strings.Builder
	w := r.Writer(&out)
	// A strings.Builder does not fail.
	_, _ = w.Write([]byte(text))
	_ = w.Close()
	return out.String()
}
