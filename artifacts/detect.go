package artifacts

import (
	"bytes"
	"regexp"
	"strings"
)

// A detector finds secrets by what stands around them, whether or not their values are
// known. It judges a position at which its pattern's text stands, and returns the span
// to mask, which may begin later.
type detector func(text []byte, i int, end bool) (span, verdict)

// Limits of detectors in bytes, which bound what a writer buffers.
const (
	maxAuthority = 1 << 10
	maxHeader    = 8 << 10
	maxKeyBlock  = 16 << 10
	// lookBehind is how much text before a position is needed to judge it.
	lookBehind = 64
)

// detectors are the patterns of all detectors.
var detectors = []*pattern{
	{text: "://", detect: urlLogin}, {text: `:\/\/`, detect: urlLogin},
	{text: "Authorization", detect: authorization}, {text: "authorization", detect: authorization}, {text: "AUTHORIZATION", detect: authorization},
	{text: "Bearer ", detect: bearer}, {text: "bearer ", detect: bearer}, {text: "BEARER ", detect: bearer},
	{text: "Cookie:", detect: cookie}, {text: "cookie:", detect: cookie},
	{text: "-----BEGIN ", detect: privateKey},
}

// urlLogin finds the password in scheme://user:password@host. It also finds a token
// that is written instead of the user, if it is too long for a name.
func urlLogin(text []byte, i int, end bool) (span, verdict) {
	if i == 0 || text[i-1] >= 0x80 || !isWord(text[i-1]) {
		return span{}, absent
	}
	start := i + len("://")
	if text[i+1] == '\\' {
		start = i + len(`:\/\/`)
	}
	at, colon := -1, -1
	password := false // what comes after the colon is no port
	for j := start; ; j++ {
		if j == len(text) && !end && j-start < maxAuthority {
			return span{}, undecided
		}
		if j == len(text) || j-start == maxAuthority || endsAuthority[text[j]] {
			break
		}
		if mayEndAuthority[text[j]] {
			if j+1 == len(text) && !end {
				return span{}, undecided
			}
			if at >= 0 || colon < 0 || text[start] == '[' || !password && afterHost(text[colon+1:j]) || endsQuote(text[j:]) {
				break
			}
			password = true
		}
		switch text[j] {
		case '@':
			at = j
		case ':':
			if colon < 0 && at < 0 {
				colon = j
			}
		}
	}
	switch {
	case at < 0:
		return span{}, absent
	case colon < 0 && at-start >= minUserToken && !isPlaceholder(text[start:at]):
		return span{start, at}, present
	case colon < 0 || colon+1 == at || isPlaceholder(text[colon+1:at]):
		return span{}, absent
	}
	return span{colon + 1, at}, present
}

// minUserToken is from how many bytes on the user of a URL without a password is taken
// for a token, as in https://github_pat_…@github.com.
const minUserToken = 20

// endsAuthority are the bytes that no authority of a URL contains. mayEndAuthority are those
// that a password may have unescaped, and that also stand after URLs in texts and programs.
var (
	endsAuthority = func() (table [256]bool) {
		for c := range table {
			table[c] = c <= ' ' || c == 0x7f || strings.IndexByte("/?#\"`<>\\|", byte(c)) >= 0
		}
		return table
	}()
	mayEndAuthority = [256]bool{',': true, ';': true, '(': true, ')': true, '\'': true}
)

// afterHost reports whether what stands after the colon is rather the port of a host than
// the beginning of a password.
func afterHost(text []byte) bool {
	return len(text) > 0 && (len(text) <= 5 && countDigits(text) == len(text) || isPlaceholder(text))
}

// endsQuote reports whether a text begins with the end of a text in quotes.
func endsQuote(text []byte) bool {
	return text[0] == '\'' && (len(text) == 1 || strings.IndexByte(",;:)]} \t\r\n", text[1]) >= 0)
}

// placeholder matches what stands for a secret in programs and manuals: the names of
// variables, and words in brackets. Real passwords may begin like them.
var placeholder = regexp.MustCompile(`(?s)^(?:\$+\{.*\}|\$+\(.*\)|\$+[A-Z_][A-Z0-9_]*|\$[0-9]|\{.*\}|\[.*\]|<.*>|\*+|[xX]{3,}|(?:\.\.\.|…).*)$`)

// isPlaceholder reports whether a text only stands for a secret, as in programs and
// manuals, or has been masked already.
func isPlaceholder(text []byte) bool {
	return len(text) == 0 || bytes.Contains(text, []byte(Mask)) || text[0] == '%' && !isEscaped(text) || placeholder.Match(text)
}

// isEscaped reports whether a text begins with a percent-encoded byte.
func isEscaped(text []byte) bool {
	return len(text) >= 3 && text[0] == '%' && digitValue(text[1]) < 16 && digitValue(text[2]) < 16
}

// authorization finds the value of an Authorization header with a scheme.
func authorization(text []byte, i int, end bool) (span, verdict) {
	limit := i + maxHeader
	j := i + len("authorization")
	// Quotes, the separator, and quotes again, in any notation of headers.
	for j < len(text) && j < i+lookBehind && strings.IndexByte("\"'\\:= [,>", text[j]) >= 0 {
		j++
	}
	scheme := j
	for j < len(text) && j < limit && (isWord(text[j]) || text[j] == '-') {
		j++
	}
	if j == len(text) {
		return notYet(end)
	}
	if text[j] != ' ' || scheme == j || !isScheme(text[scheme:j]) {
		return span{}, absent
	}
	return credential(text, j+1, limit, end, 8)
}

func isScheme(word []byte) bool {
	switch strings.ToLower(string(word)) {
	case "basic", "bearer", "token", "digest", "apikey", "negotiate", "ntlm", "key":
		return true
	}
	return false
}

// bearer finds a token after the word Bearer.
func bearer(text []byte, i int, end bool) (span, verdict) {
	if i > 0 && isWord(text[i-1]) {
		return span{}, absent
	}
	s, v := credential(text, i+len("bearer "), i+maxHeader, end, 16)
	if v == present && !bytes.ContainsAny(text[s.from:s.to], "0123456789") {
		return span{}, absent
	}
	return s, v
}

// credential reads a token of at least least bytes.
func credential(text []byte, from, limit int, end bool, least int) (span, verdict) {
	to := from
	for to < len(text) && to < limit && (text[to] < 0x80 && isWord(text[to]) || strings.IndexByte("-._~+/=:", text[to]) >= 0) {
		to++
	}
	if to == len(text) && to < limit && !end {
		return span{}, undecided
	}
	if to-from < least {
		return span{}, absent
	}
	return span{from, to}, present
}

// cookie finds the value of a Cookie or Set-Cookie header.
func cookie(text []byte, i int, end bool) (span, verdict) {
	from := i + len("cookie:")
	for from < len(text) && text[from] == ' ' && from < i+lookBehind {
		from++
	}
	to, pair := from, false
	for to < len(text) && to < i+maxHeader && text[to] >= ' ' && strings.IndexByte("\"'`\\", text[to]) < 0 {
		pair = pair || text[to] == '='
		to++
	}
	if to == len(text) && to < i+maxHeader && !end {
		return span{}, undecided
	}
	for to > from && text[to-1] == ' ' {
		to--
	}
	if !pair {
		return span{}, absent
	}
	return span{from, to}, present
}

// privateKey finds what stands between the first and last line of a private key.
func privateKey(text []byte, i int, end bool) (span, verdict) {
	rest := text[i:]
	rest = rest[:min(len(rest), maxKeyBlock)]
	complete := end || len(rest) == maxKeyBlock
	label := rest[len("-----BEGIN "):]
	length := 0
	for length < len(label) && length < lookBehind && (label[length] >= 'A' && label[length] <= 'Z' || label[length] >= '0' && label[length] <= '9' || label[length] == ' ') {
		length++
	}
	if length == len(label) {
		return notYet(complete)
	}
	if !bytes.HasSuffix(label[:length], []byte("PRIVATE KEY")) {
		return span{}, absent
	}
	from := len("-----BEGIN ") + length
	for dashes := 0; dashes < 5; dashes++ {
		if from == len(rest) {
			return notYet(complete)
		}
		if rest[from] != '-' {
			return span{}, absent
		}
		from++
	}
	to := bytes.Index(rest[from:], []byte("-----END"))
	switch {
	case to < 0 && !complete:
		return span{}, undecided
	case to < 0 || to < minKeyBlock:
		return span{}, absent
	}
	return span{i + from, i + from + to}, present
}

// minKeyBlock is the least length of the middle of a private key, in bytes.
const minKeyBlock = 40

// notYet is the verdict on a text that has ended too soon.
func notYet(end bool) (span, verdict) {
	if end {
		return span{}, absent
	}
	return span{}, undecided
}
