// Package secret holds text that must not be printed: passwords, and URLs
// with passwords in them.
//
// A String prints as three asterisks wherever Go prints values by itself: with
// every verb of fmt, in JSON, in text marshalling and in slog. Code that
// really needs the text asks for it by name, so that `grep Reveal` finds every
// place where a secret leaves its type.
package secret

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/url"
	"regexp"
	"strings"
)

// Mask stands where a secret was. It is the mark that MoonMind's own
// redaction leaves (docs/moonmind.md#secrets).
const Mask = "***"

// String is a secret text. The zero value is the empty secret, which prints as
// the empty string, so that a missing password can be seen to be missing.
type String struct{ text string }

// New makes a secret of text.
func New(text string) String { return String{text: text} }

// Reveal returns the text itself.
func (s String) Reveal() string { return s.text }

// IsZero says that there is no text.
func (s String) IsZero() bool { return s.text == "" }

// String returns [Mask], or "" when there is no text.
func (s String) String() string {
	if s.text == "" {
		return ""
	}
	return Mask
}

// Format prints the mask for every verb and flag, %#v and %x included.
func (s String) Format(f fmt.State, verb rune) {
	if verb == 'q' || (verb == 'v' && f.Flag('#')) {
		fmt.Fprintf(f, "%q", s.String())
		return
	}
	fmt.Fprint(f, s.String())
}

// MarshalJSON writes the mask.
func (s String) MarshalJSON() ([]byte, error) { return json.Marshal(s.String()) }

// MarshalText writes the mask.
func (s String) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// LogValue logs the mask.
func (s String) LogValue() slog.Value { return slog.StringValue(s.String()) }

// port matches what follows the colon of "host:port/path@…", where no password is.
var port = regexp.MustCompile(`^[0-9]+([/?#]|$)`)

// secretOptions are query options of database and broker URLs whose values
// are secrets.
var secretOptions = map[string]bool{"password": true, "sslpassword": true}

// RedactURL returns text, a URL or several ones separated by anything, with
// the mask in place of each password. The user's name stays.
func RedactURL(text string) string {
	pieces := strings.Split(text, "://")
	for i := 1; i < len(pieces); i++ {
		pieces[i] = redactAuthority(pieces[i])
	}
	text = strings.Join(pieces, "://")
	head, query, found := strings.Cut(text, "?")
	if !found {
		return text
	}
	parts := strings.Split(query, "&")
	for i, part := range parts {
		name, _, _ := strings.Cut(part, "=")
		if plain, err := url.QueryUnescape(name); err == nil && secretOptions[strings.ToLower(plain)] {
			parts[i] = name + "=" + Mask
		}
	}
	return head + "?" + strings.Join(parts, "&")
}

// redactAuthority masks the password in "user:password@host…". It takes all up
// to the last @ of the word for the password, because a password with an
// unescaped slash makes a broken URL that is about to be shown in an error.
func redactAuthority(rest string) string {
	word := rest
	if end := strings.IndexAny(rest, " \t\r\n"); end >= 0 {
		word = rest[:end]
	}
	user, password, found := strings.Cut(word, ":")
	at := strings.LastIndex(password, "@")
	if !found || at < 0 || strings.Contains(user, "@") || port.MatchString(password) {
		return rest
	}
	return user + ":" + Mask + password[at:] + rest[len(word):]
}
