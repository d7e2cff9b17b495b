package artifacts

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"unicode/utf16"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
)

// Mask is written in place of every secret.
const Mask = "***"

// shortPassword is the length in bytes below which a password from a URL is
// replaced only between its colon and its at sign. Replacing every "guest"
// because a broker URL contains guest:guest@ would make logs unreadable.
const shortPassword = 8

// sensitiveName matches the names of variables whose values are secret; the
// rule is MoonMind's (docs/moonmind.md#secrets).
var sensitiveName = regexp.MustCompile(`(?i)(?:^|[^a-z0-9])(?:token|secret|password|key|credential|auth)(?:$|[^a-z0-9])`)

// A Redactor replaces secrets by [Mask]. It is immutable and may be used by
// several goroutines. The nil Redactor knows no secrets.
//
// MoonMind's rules (docs/moonmind.md#secrets) are the minimum: the values of
// variables whose names say that they are secret, each as it is, in standard
// base64, and form-encoded. In addition, a Redactor replaces:
//
//   - the passwords in URLs of any variable (docs/moonmind.md#c19), as any
//     parser of URLs may read them;
//   - each secret in the form in which [NewTextWriter] leaves it, and without
//     the white space around it;
//   - each secret in the forms in which programs print it (see spellings).
//
// Secrets that overlap in a text are replaced by one Mask. MoonMind replaces
// one form after the other, which leaves the ends of overlapping secrets
// readable. In all other cases the result is the same.
type Redactor struct {
	// secrets by their first byte, the longest first.
	secrets [256][]string
	longest int
}

// NewRedactor returns a Redactor for the secrets in an environment of
// NAME=value strings.
func NewRedactor(environ []string) *Redactor {
	forms := map[string]struct{}{}
	add := func(secret string) {
		for _, form := range []string{secret, plainText(secret), Trim(secret), Trim(plainText(secret))} {
			for _, spelling := range spellings(form) {
				forms[spelling] = struct{}{}
			}
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
		for _, login := range address.Logins(value) {
			if len(login.Password) >= shortPassword {
				add(login.Password)
			} else {
				for _, spelling := range spellings(login.Password) {
					forms[":"+spelling+"@"] = struct{}{}
				}
			}
			if login.User != "" {
				// The header of a request with this login.
				forms[base64.StdEncoding.EncodeToString([]byte(login.User+":"+login.Password))] = struct{}{}
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

// spellings are a secret as it is and as programs write it: in base64, in
// URLs, in JSON, in Python's and the shell's quotes.
func spellings(secret string) []string {
	if secret == "" {
		return nil
	}
	query := url.QueryEscape(secret)                   // quote_plus
	component := strings.ReplaceAll(query, "+", "%20") // quote with safe=''
	path := strings.ReplaceAll(component, "%2F", "/")  // quote with its defaults
	found := []string{
		secret, base64.StdEncoding.EncodeToString([]byte(secret)), base64.URLEncoding.EncodeToString([]byte(secret)),
		query, component, path, strings.ReplaceAll(query, "%2F", "/"), url.PathEscape(secret),
		// As addresses are shown and written here, and by JavaScript.
		strings.ReplaceAll(component, "~", "%7E"), encodeURIComponent.Replace(component),
		strings.Trim(url.UserPassword("", secret).String(), ":"),
		strings.ReplaceAll(secret, "'", `'\''`),
		strings.ReplaceAll(secret, `\`, `\\`), strings.NewReplacer(`\`, `\\`, "'", `\'`).Replace(secret),
	}
	for _, form := range found {
		found = append(found, lowerEscapes(form))
	}
	for _, ascii := range []bool{false, true} {
		for _, html := range []bool{false, true} {
			text := jsonText(secret, ascii, html)
			found = append(found, text, strings.ReplaceAll(text, "/", `\/`))
		}
	}
	return found
}

// encodeURIComponent leaves what JavaScript's function leaves.
var encodeURIComponent = strings.NewReplacer("%21", "!", "%27", "'", "%28", "(", "%29", ")", "%2A", "*")

// lowerEscapes writes the digits of percent-encoding in lower case.
func lowerEscapes(text string) string {
	out := []byte(text)
	for i := 0; i+2 < len(out); i++ {
		if out[i] == '%' {
			copy(out[i+1:i+3], strings.ToLower(string(out[i+1:i+3])))
		}
	}
	return string(out)
}

// jsonText is what stands between the quotes of a JSON text: with everything
// but ASCII escaped, as Python does, and with <, > and & escaped, as Go does.
func jsonText(text string, ascii, html bool) string {
	var buffer bytes.Buffer
	encoder := json.NewEncoder(&buffer)
	encoder.SetEscapeHTML(html)
	_ = encoder.Encode(text) // a string
	quoted := strings.TrimSuffix(buffer.String(), "\n")
	quoted = quoted[1 : len(quoted)-1]
	if !ascii {
		return quoted
	}
	var out strings.Builder
	for _, r := range quoted {
		if r < 0x80 {
			out.WriteRune(r)
			continue
		}
		for _, unit := range utf16.Encode([]rune{r}) {
			fmt.Fprintf(&out, `\u%04x`, unit)
		}
	}
	return out.String()
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
