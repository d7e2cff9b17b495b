package address

import (
	"net/url"
	"regexp"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
)

// scheme matches a scheme that may be shown of an invalid address.
var scheme = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9+.-]{0,31}$`)

// SchemeOnly masks an address except for its scheme.
func SchemeOnly(text string) string {
	if text == "" {
		return ""
	}
	if before, _, found := strings.Cut(text, "://"); found && scheme.MatchString(before) {
		return before + "://" + secret.Mask
	}
	return secret.Mask
}

// MaskURL masks the password of a URL, and the values in its query, which may be
// keys.
func MaskURL(text string) string {
	u, err := url.Parse(text)
	if (err != nil || u.Host == "") && !strings.Contains(text, "@") {
		return text // no user or password, not even in an invalid form
	}
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

// separator precedes parameter number i of a query.
func separator(i int) string {
	if i == 0 {
		return "?"
	}
	return "&"
}

// serviceName matches the name before a URL in a list.
var serviceName = regexp.MustCompile(`^\s*[A-Za-z0-9_.-]+\s*$`)

// MaskNamedURLs masks the URLs in a list of the form name=URL,name=URL. A text of
// any other form is masked completely, because a comma in a password can cause it.
func MaskNamedURLs(text string) string {
	if !strings.Contains(text, "@") && !strings.Contains(text, "?") {
		return text // no password or key, not even in an invalid form
	}
	entries := strings.Split(text, ",")
	for i, entry := range entries {
		name, address, found := strings.Cut(entry, "=")
		masked := MaskURL(address)
		if !found || !serviceName.MatchString(name) || masked == SchemeOnly(address) || !strings.HasPrefix(masked, "http") {
			return secret.Mask
		}
		entries[i] = name + "=" + masked
	}
	return strings.Join(entries, ",")
}

// Login is a user name with a password that was found in a text.
type Login struct{ User, Password string }

// anyScheme matches the beginning of a URL.
var anyScheme = regexp.MustCompile(`[A-Za-z][A-Za-z0-9+.-]*://`)

// Logins finds everything in a text that some parser could take for the password of
// a URL of any scheme, both as written and percent-decoded. It is for redaction,
// where too many matches do no harm.
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
			// A password may extend to the last @ of the authority (kombu), to the
			// first @ (SQLAlchemy), or to the last @ of the whole text.
			authority := part
			if end := strings.IndexAny(part, "/?#"); end >= 0 {
				authority = part[:end]
			}
			user, afterUser, _ := strings.Cut(part, ":")
			if at := strings.LastIndex(authority, "@"); at >= 0 {
				if name, password, ok := strings.Cut(authority[:at], ":"); ok {
					add(name, password)
					// urllib removes these from every URL.
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
