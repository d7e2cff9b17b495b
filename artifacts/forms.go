package artifacts

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"html"
	"net/url"
	"regexp"
	"strings"
	"unicode/utf16"
)

// Lengths of secrets in bytes from which more forms are masked. Those of shorter
// secrets stand in many texts by chance.
const (
	encodedFrom = 8
	lineFrom    = 8
	// cutFrom is the length of a pattern from which it is also found without its
	// first bytes, because a line break may stand between them and the rest.
	cutFrom = foldedFrom
	// wholeUpTo is the longest secret that is one pattern; of longer ones each part
	// of partLength bytes is a pattern.
	wholeUpTo, partLength = 16 << 10, 1 << 10
)

// forms collects the patterns for secrets.
type forms struct {
	patterns map[string]*pattern
	// guarded are words that are masked only as values.
	guarded map[string]bool
	// each, if set, is called with the secrets of documents instead of adding them.
	each func(secret string)
}

// put adds one spelling of a secret.
func (f *forms) put(text string) {
	if _, found := f.patterns[text]; text != "" && !found {
		f.patterns[text] = &pattern{text: text, folded: len(text) >= foldedFrom, guarded: f.guarded[strings.ToLower(text)]}
	}
}

// long adds a spelling that is also found when a line break comes after its first
// bytes.
func (f *forms) long(text string) {
	f.put(text)
	if len(text) >= cutFrom && len(text) <= wholeUpTo && strings.IndexByte(text, '\n') < 0 {
		for n := 1; n < gramSize; n++ {
			f.put(text[n:])
		}
	}
}

// secret adds all forms of a secret.
func (f *forms) secret(secret string) {
	if len(secret) > wholeUpTo {
		for from := 0; from < len(secret); from += partLength {
			f.whole(secret[from:min(from+partLength, len(secret))])
		}
	} else {
		f.whole(secret)
	}
	f.lines(secret)
	// A key in a variable often has its line breaks written as \n.
	if unescaped := strings.NewReplacer(`\r`, "", `\n`, "\n").Replace(secret); strings.Contains(secret, `\n`) {
		f.lines(unescaped)
		if len(unescaped) <= wholeUpTo {
			f.whole(unescaped)
		}
	}
	f.document(secret)
}

// lines adds each line of a secret that has several: programs print each behind a
// prefix of its own. Lines that all keys have are no secret.
func (f *forms) lines(secret string) {
	if !strings.ContainsAny(secret, "\r\n") {
		return
	}
	for line := range strings.SplitSeq(plainText(secret), "\n") {
		line = strings.TrimSpace(line)
		if len(line) >= lineFrom && !commonLine.MatchString(line) {
			f.whole(line)
		}
	}
}

// commonLine matches lines of secrets that also stand in other texts.
var commonLine = regexp.MustCompile(`^(?:-----(?:BEGIN|END) .*|[-=_*#{}\[\](),;:"'\s]*|Proc-Type: 4,ENCRYPTED|"type": ?"[a-z_]*",?|"[a-z0-9_]+": ?(?:"https?://[^"@]*"|[{\[]|true|false|null|[0-9]+),?)$`)

// document adds the secrets in a JSON document.
func (f *forms) document(text string) {
	if text = strings.TrimSpace(text); !strings.HasPrefix(text, "{") && !strings.HasPrefix(text, "[") {
		return
	}
	var value any
	if json.Unmarshal([]byte(text), &value) == nil {
		f.members("", value)
	}
}

func (f *forms) members(name string, value any) {
	switch value := value.(type) {
	case string:
		if len(value) >= minAddedSecret && isSecret(name, value, nil) {
			f.member(value)
			if name == "auth" { // of docker's config.json
				if login, err := base64.StdEncoding.DecodeString(value); err == nil {
					if _, password, found := strings.Cut(string(login), ":"); found && len(password) >= minAddedSecret {
						f.member(password)
					}
				}
			}
		}
	case map[string]any:
		for name, member := range value {
			f.members(name, member)
		}
	case []any:
		for _, member := range value {
			f.members(name, member)
		}
	}
}

func (f *forms) member(value string) {
	if f.each != nil {
		f.each(value)
		return
	}
	f.whole(value)
	f.lines(value)
}

// whole adds a text in all its spellings and encodings.
func (f *forms) whole(secret string) {
	for _, form := range []string{secret, plainText(secret), Trim(secret), Trim(plainText(secret))} {
		for _, spelling := range spellings(form) {
			f.put(spelling)
		}
		f.encodings(form)
	}
}

// encodings adds a secret in base64 and hexadecimal, alone and as a part of a larger
// text that is encoded.
func (f *forms) encodings(secret string) {
	if secret == "" {
		return
	}
	for _, alphabet := range []*base64.Encoding{base64.StdEncoding, base64.URLEncoding} {
		f.put(alphabet.EncodeToString([]byte(secret)))
		if len(secret) < encodedFrom {
			continue
		}
		for offset := range 3 {
			f.long(inBase64(alphabet.WithPadding(base64.NoPadding), secret, offset))
		}
		f.long(alphabet.WithPadding(base64.NoPadding).EncodeToString([]byte(secret)))
	}
	if len(secret) < encodedFrom {
		return
	}
	f.long(secret)
	digits := hex.EncodeToString([]byte(secret))
	f.long(digits)
	f.long(strings.ToUpper(digits))
	if len(secret) > partLength {
		return
	}
	// UTF-16 in either order of bytes, as programs of Windows write files. Secrets outside of
	// ASCII are rare.
	f.put(strings.Join(strings.Split(secret, ""), "\x00"))
	for _, separator := range []string{" ", ":", "-", ", 0x"} {
		var out strings.Builder
		for i := 0; i < len(digits); i += 2 {
			if i > 0 {
				out.WriteString(separator)
			}
			out.WriteString(digits[i : i+2])
		}
		f.put(out.String())
		f.put(strings.ReplaceAll(strings.ToUpper(out.String()), "X", "x"))
	}
}

// inBase64 are the characters of base64 that depend only on the secret, if as many
// bytes as offset says come before it in its group of three.
func inBase64(alphabet *base64.Encoding, secret string, offset int) string {
	text := alphabet.EncodeToString([]byte("\x00\x00"[:offset] + secret))
	// The first characters have bits of what comes before, the last one may have bits
	// of what comes after.
	text = text[[]int{0, 2, 3}[offset]:]
	if (offset+len(secret))%3 != 0 {
		text = text[:len(text)-1]
	}
	return text
}

// spellings are a secret as it is and as programs write it: in URLs, in JSON, in
// quotes of Python, shells and YAML, in XML. Mixtures of their escapes need not be
// listed, the matcher reads them.
func spellings(secret string) []string {
	if secret == "" {
		return nil
	}
	query := url.QueryEscape(secret)                   // quote_plus
	component := strings.ReplaceAll(query, "+", "%20") // quote with safe=''
	path := strings.ReplaceAll(component, "%2F", "/")  // quote with its defaults
	found := []string{
		secret, query, component, path, strings.ReplaceAll(query, "%2F", "/"), url.PathEscape(secret),
		// As addresses are shown and written here, and by JavaScript.
		strings.ReplaceAll(component, "~", "%7E"), encodeURIComponent.Replace(component),
		strings.Trim(url.UserPassword("", secret).String(), ":"),
		strings.ReplaceAll(secret, "'", `'\''`), strings.ReplaceAll(secret, "'", `'"'"'`), strings.ReplaceAll(secret, "'", "''"), strings.ReplaceAll(secret, `"`, `""`),
		strings.ReplaceAll(secret, "$", "$$"), // compose
		strings.ReplaceAll(secret, `\`, `\\`), strings.NewReplacer(`\`, `\\`, "'", `\'`).Replace(secret),
		html.EscapeString(secret),
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
