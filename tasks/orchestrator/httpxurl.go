package orchestrator

import (
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/text/unicode/norm"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// An httpxURL is a URL as httpx reads it, which accepts more than package net/url
// and repairs it: spaces and letters of any language are escaped, escapes are kept
// as they are, a host of other letters becomes ASCII, and . and .. are resolved.
type httpxURL struct {
	scheme             string
	username, password string
	// host is without brackets, port "" for the scheme's own.
	host, port string
	// target is what the request line has: path and query.
	target string
}

var (
	urlParts       = regexp.MustCompile(`^(?:([a-zA-Z][a-zA-Z0-9+.\-]*)?:)?(?://([^/?#]*))?([^?#]*)(\?[^#]*)?(?:#.*)?`)
	authorityParts = regexp.MustCompile(`^(?:(.*)@)?(\[.*\]|[^:@]*):?(.*)`)
	dottedNumbers  = regexp.MustCompile(`^[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+$`)
	bracketed      = regexp.MustCompile(`^\[.*\]$`)
	escape         = regexp.MustCompile(`%[A-Fa-f0-9]{2}`)
)

// maxURL is the length, in characters, of the longest URL that httpx accepts.
const maxURL = 65536

// parseHTTPX parses a URL. Its errors have the texts of httpx.
func parseHTTPX(text string) (httpxURL, error) {
	var u httpxURL
	if utf8.RuneCountInString(text) > maxURL {
		return u, pythonText("URL too long")
	}
	for i, r := range []rune(text) {
		if r < ' ' || r == 0x7f {
			return u, pythonText(fmt.Sprintf("Invalid non-printable ASCII character in URL, %s at position %d.", protocol.PythonRepr(string(r)), i))
		}
	}
	parts := urlParts.FindStringSubmatch(text)
	authority := authorityParts.FindStringSubmatch(parts[2])
	u.scheme = strings.ToLower(parts[1])
	userinfo := authority[1]
	var err error
	if u.host, err = httpxHost(authority[2]); err != nil {
		return u, err
	}
	if u.port, err = httpxPort(authority[3], parts[1]); err != nil {
		return u, err
	}
	path := parts[3]
	hasAuthority := userinfo != "" || u.host != "" || u.port != ""
	switch {
	case hasAuthority && path != "" && path[0] != '/':
		return u, pythonText("For absolute URLs, path must be empty or begin with '/'")
	case u.scheme == "" && !hasAuthority && strings.HasPrefix(path, "//"):
		return u, pythonText("Relative URLs cannot have a path starting with '//'")
	case u.scheme == "" && !hasAuthority && strings.HasPrefix(path, ":"):
		return u, pythonText("Relative URLs cannot have a path starting with ':'")
	case u.scheme != "" || hasAuthority:
		path = withoutDots(path)
	}
	u.username, u.password, _ = strings.Cut(quoted(userinfo, safeInUserinfo), ":")
	u.username, u.password = unquoted8(u.username), unquoted8(u.password)
	u.target = quoted(path, safeInPath)
	if u.target == "" {
		u.target = "/"
	}
	if parts[4] != "" {
		u.target += "?" + quoted(parts[4][1:], safeInQuery)
	}
	switch {
	case u.scheme == "" || u.host == "":
		return u, pythonText("Request URL is missing an 'http://' or 'https://' protocol.")
	case u.scheme != "http" && u.scheme != "https":
		return u, pythonText("Request URL has an unsupported protocol '" + u.scheme + "://'.")
	}
	return u, nil
}

// netloc is host and port as a request has them.
func (u httpxURL) netloc() string {
	host := u.host
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	if u.port != "" {
		host += ":" + u.port
	}
	return host
}

// request returns the URL for package http, which sends Opaque as it is. proxied
// says that the request line goes to a proxy, and so has the whole URL. It also has
// it for a path that begins with two slashes, before which package http would put
// the scheme alone; servers have to accept that.
func (u httpxURL) request(proxied bool) *url.URL {
	r := &url.URL{Scheme: u.scheme, Host: u.netloc(), Opaque: u.target}
	if proxied && u.scheme == "http" || strings.HasPrefix(u.target, "//") {
		r.Opaque = "//" + u.netloc() + u.target
	}
	return r
}

const unreserved = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"

var (
	safeInQuery    = printableWithout(` "#<>`)
	safeInPath     = printableWithout(" \"#<>?`{}")
	safeInUserinfo = printableWithout(" \"#<>?`{}/;=@[\\]^|")
	safeInHost     = unreserved + "!$&'()*+,;=" + "\"`{}%|\\"
)

func printableWithout(excluded string) string {
	var all strings.Builder
	for c := byte(' '); c < 0x7f; c++ {
		if strings.IndexByte(excluded, c) < 0 {
			all.WriteByte(c)
		}
	}
	return all.String()
}

// quoted escapes what is not safe, and leaves escapes.
func quoted(text, safe string) string {
	var out strings.Builder
	add := func(part string) {
		for i := range len(part) {
			if strings.IndexByte(safe, part[i]) >= 0 || strings.IndexByte(unreserved, part[i]) >= 0 {
				out.WriteByte(part[i])
			} else {
				fmt.Fprintf(&out, "%%%02X", part[i])
			}
		}
	}
	at := 0
	for _, found := range escape.FindAllStringIndex(text, -1) {
		add(text[at:found[0]])
		out.WriteString(text[found[0]:found[1]])
		at = found[1]
	}
	add(text[at:])
	return out.String()
}

// unquoted8 replaces escapes by their bytes, as UTF-8.
func unquoted8(text string) string {
	return strings.ToValidUTF8(escape.ReplaceAllStringFunc(text, func(escape string) string {
		value, _ := strconv.ParseUint(escape[1:], 16, 8)
		return string([]byte{byte(value)})
	}), "\uFFFD")
}

// withoutDots resolves the segments . and .. of a path.
func withoutDots(path string) string {
	segments := strings.Split(path, "/")
	var out []string
	found := false
	for _, segment := range segments {
		switch segment {
		case ".":
			found = true
		case "..":
			found = true
			if len(out) > 0 && (len(out) != 1 || out[0] != "") {
				out = out[:len(out)-1]
			}
		default:
			out = append(out, segment)
		}
	}
	if !found {
		return path
	}
	return strings.Join(out, "/")
}

func httpxHost(host string) (string, error) {
	switch {
	case dottedNumbers.MatchString(host):
		if _, err := netip.ParseAddr(host); err != nil {
			return "", pythonText("Invalid IPv4 address: " + protocol.PythonRepr(host))
		}
		return host, nil
	case bracketed.MatchString(host):
		inner := host[1 : len(host)-1]
		if address, err := netip.ParseAddr(inner); err != nil || !address.Is6() {
			return "", pythonText("Invalid IPv6 address: " + protocol.PythonRepr(host))
		}
		return inner, nil
	}
	for i := range len(host) {
		if host[i] >= utf8.RuneSelf {
			ascii, ok := idnaHost(strings.ToLower(host))
			if !ok {
				return "", pythonText("Invalid IDNA hostname: " + protocol.PythonRepr(host))
			}
			return ascii, nil
		}
	}
	return quoted(strings.ToLower(host), safeInHost), nil
}

// httpxPort returns the port, "" for the scheme's own. The scheme is as written:
// httpx knows the ports of schemes in lower case.
func httpxPort(text, scheme string) (string, error) {
	if text == "" {
		return "", nil
	}
	number, err := strconv.Atoi(strings.TrimSpace(text))
	if err != nil {
		return "", pythonText("Invalid port: " + protocol.PythonRepr(text))
	}
	if scheme == "http" && number == 80 || scheme == "https" && number == 443 {
		return "", nil
	}
	return strconv.Itoa(number), nil
}

// idnaHost converts a host name to ASCII as IDNA 2008 has it. It refuses what it
// does not know, such as the letters that are allowed in a context only.
func idnaHost(host string) (string, bool) {
	labels := strings.FieldsFunc(host+"\x00", func(r rune) bool { return strings.ContainsRune(".\u3002\uff0e\uff61", r) })
	last := len(labels) - 1
	labels[last] = strings.TrimSuffix(labels[last], "\x00")
	trailing := labels[last] == ""
	if trailing {
		labels = labels[:last]
	}
	for i, label := range labels {
		ascii, ok := idnaLabel(label)
		if !ok {
			return "", false
		}
		labels[i] = ascii
	}
	ascii := strings.Join(labels, ".")
	if trailing {
		ascii += "."
	}
	return ascii, len(labels) > 0 && len(ascii) <= 253
}

func idnaLabel(label string) (string, bool) {
	if !strings.ContainsFunc(label, func(r rune) bool { return r >= utf8.RuneSelf }) {
		return label, label != "" && len(label) <= 63
	}
	runes := []rune(label)
	if !norm.NFC.IsNormalString(label) || unicode.Is(unicode.M, runes[0]) || runes[0] == '-' || runes[len(runes)-1] == '-' || len(runes) > 3 && runes[2] == '-' && runes[3] == '-' {
		return "", false
	}
	for _, r := range runes {
		allowed := r == '-' || unicode.In(r, unicode.Ll, unicode.Lo, unicode.Lm, unicode.Mn, unicode.Mc, unicode.Nd)
		if !allowed || r != 'ß' && r != 'ς' && norm.NFKC.String(strings.ToLower(norm.NFKC.String(string(r)))) != string(r) {
			return "", false
		}
	}
	ascii := "xn--" + punycode(runes)
	return ascii, len(ascii) <= 63
}

// punycode encodes a label (RFC 3492).
func punycode(label []rune) string {
	const base, tMin, tMax, skew, damp = 36, 1, 26, 38, 700
	const digits = "abcdefghijklmnopqrstuvwxyz0123456789"
	var out []byte
	for _, r := range label {
		if r < utf8.RuneSelf {
			out = append(out, byte(r))
		}
	}
	basic := len(out)
	done := basic
	if basic > 0 {
		out = append(out, '-')
	}
	n, delta, bias := rune(128), 0, 72
	for done < len(label) {
		next := rune(unicode.MaxRune)
		for _, r := range label {
			if r >= n && r < next {
				next = r
			}
		}
		delta += int(next-n) * (done + 1)
		n = next
		for _, r := range label {
			if r < n {
				delta++
			}
			if r != n {
				continue
			}
			q := delta
			for k := base; ; k += base {
				t := min(max(k-bias, tMin), tMax)
				if q < t {
					break
				}
				out = append(out, digits[t+(q-t)%(base-t)])
				q = (q - t) / (base - t)
			}
			out = append(out, digits[q])
			if done == basic {
				delta /= damp
			} else {
				delta /= 2
			}
			delta += delta / (done + 1)
			k := 0
			for ; delta > (base-tMin)*tMax/2; k += base {
				delta /= base - tMin
			}
			bias = k + (base-tMin+1)*delta/(delta+skew)
			delta = 0
			done++
		}
		delta++
		n++
	}
	return string(out)
}
