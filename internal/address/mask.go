package address

import (
	"net/url"
	"regexp"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
)

// scheme is what may be shown of an address that cannot be parsed.
var scheme = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9+.-]{0,31}$`)

// SchemeOnly shows nothing of an address but its scheme.
func SchemeOnly(text string) string {
	if text == "" {
		return ""
	}
	if before, _, found := strings.Cut(text, "://"); found && scheme.MatchString(before) {
		return before + "://" + secret.Mask
	}
	return secret.Mask
}

// MaskURL shows a URL of no special kind: without its password, and without
// the values in its query, which may be keys.
func MaskURL(text string) string {
	u, err := url.Parse(text)
	if err != nil || u.Scheme == "" || u.Opaque != "" {
		return SchemeOnly(text)
	}
	_, rest, _ := strings.Cut(text, "://")
	if end := strings.IndexAny(rest, "/?#"); end >= 0 && strings.Contains(rest[end:], "@") {
		return SchemeOnly(text)
	}
	var out strings.Builder
	out.WriteString(u.Scheme + "://")
	if u.User != nil {
		out.WriteString(quote(u.User.Username()))
		if _, has := u.User.Password(); has {
			out.WriteString(":" + secret.Mask)
		}
		out.WriteString("@")
	}
	out.WriteString(u.Host + u.EscapedPath())
	for i, p := range parseQuery(u.RawQuery) {
		out.WriteString(separator(i) + quote(p.name) + "=" + secret.Mask)
	}
	return out.String()
}

// separator stands before parameter number i of a query.
func separator(i int) string {
	if i == 0 {
		return "?"
	}
	return "&"
}

// MaskWords shows a text of which each word may be a URL, alone or behind a
// name and =; commas separate words too. A word that is no URL stays.
func MaskWords(text string) string {
	if !strings.Contains(text, "://") {
		return text
	}
	words := strings.FieldsFunc(text, func(r rune) bool { return r == ',' || r == ' ' || r == '\t' || r == '\n' })
	for i, word := range words {
		if !strings.Contains(word, "://") {
			// In a text with URLs, a word without one may be what stands
			// behind the blank or the comma of a password.
			if strings.Contains(word, "@") {
				return secret.Mask
			}
			continue
		}
		name, address, found := strings.Cut(word, "=")
		if !found || strings.Contains(name, "://") {
			name, address = "", word
		} else {
			name += "="
		}
		words[i] = name + MaskURL(address)
	}
	return strings.Join(words, ",")
}

// Login is a user's name with a password that was found in a text.
type Login struct{ User, Password string }

// anyScheme finds the beginning of each URL in a text.
var anyScheme = regexp.MustCompile(`[A-Za-z][A-Za-z0-9+.-]*://`)

// Logins finds everything in a text that some reader could take for the
// password of a URL, of whatever scheme, as it is written and as it is meant:
// for redaction, where too much does no harm.
func Logins(text string) []Login {
	var found []Login
	add := func(user, password string) {
		if password != "" {
			found = append(found, Login{user, password})
			if plain := unquote(password); plain != password {
				found = append(found, Login{unquote(user), plain})
			}
		}
	}
	starts := anyScheme.FindAllStringIndex(text, -1)
	for i, start := range starts {
		rest := text[start[1]:]
		until := rest
		if i+1 < len(starts) {
			until = text[start[1]:starts[i+1][0]]
		}
		for _, part := range unique(rest, until) {
			// Up to the last @ before the host ends, as kombu reads it; up to
			// the first, as SQLAlchemy does; and up to the very last.
			authority := part
			if end := strings.IndexAny(part, "/?#"); end >= 0 {
				authority = part[:end]
			}
			user, afterUser, _ := strings.Cut(part, ":")
			if at := strings.LastIndex(authority, "@"); at >= 0 {
				if name, password, ok := strings.Cut(authority[:at], ":"); ok {
					add(name, password)
					// urllib takes these out of every URL.
					add(name, strings.NewReplacer("\t", "", "\r", "", "\n", "").Replace(password))
				}
			}
			for _, at := range []int{strings.Index(afterUser, "@"), strings.LastIndex(afterUser, "@")} {
				if at >= 0 && !strings.ContainsAny(user, "/") {
					add(user, afterUser[:at])
				}
			}
			if _, query, ok := strings.Cut(part, "?"); ok {
				for pair := range strings.SplitSeq(query, "&") {
					name, value, _ := strings.Cut(pair, "=")
					if secretOptions[strings.ToLower(unquote(name))] {
						value, _, _ = strings.Cut(value, "#")
						add("", value)
						add("", strings.ReplaceAll(value, "+", " "))
					}
				}
			}
		}
	}
	return found
}

// secretOptions are options of addresses whose values are secrets.
var secretOptions = map[string]bool{
	"password": true, "sslpassword": true, "oauth_client_secret": true, "scram_client_key": true, "scram_server_key": true,
}
