package address

import (
	"slices"
	"strings"
	"unicode/utf8"
)

// unquote decodes percent-encoding as Python's urllib.parse.unquote does: an invalid
// % sequence stays, and bytes that are not UTF-8 become U+FFFD.
func unquote(text string) string {
	if !strings.Contains(text, "%") {
		return text
	}
	var out strings.Builder
	for len(text) > 0 {
		// Python decodes each run of ASCII characters separately.
		end := strings.IndexFunc(text, func(r rune) bool { return r >= utf8.RuneSelf })
		switch {
		case end < 0:
			end = len(text)
		case end == 0:
			_, size := utf8.DecodeRuneInString(text)
			out.WriteString(text[:size])
			text = text[size:]
			continue
		}
		writeUTF8(&out, unquoteBytes(text[:end]))
		text = text[end:]
	}
	return out.String()
}

func unquoteBytes(text string) []byte {
	out := make([]byte, 0, len(text))
	for i := 0; i < len(text); i++ {
		if text[i] == '%' && i+2 < len(text) {
			high, okHigh := hexDigit(text[i+1])
			low, okLow := hexDigit(text[i+2])
			if okHigh && okLow {
				out = append(out, high<<4|low)
				i += 2
				continue
			}
		}
		out = append(out, text[i])
	}
	return out
}

func hexDigit(c byte) (byte, bool) {
	switch {
	case '0' <= c && c <= '9':
		return c - '0', true
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10, true
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}

// writeUTF8 replaces each maximal truncated or invalid sequence by one U+FFFD, as
// Python and the Unicode standard do.
func writeUTF8(out *strings.Builder, text []byte) {
	for len(text) > 0 {
		r, size := utf8.DecodeRune(text)
		if r == utf8.RuneError && size == 1 {
			size = truncatedLength(text)
		}
		out.WriteRune(r)
		text = text[size:]
	}
}

// truncatedLength returns how many bytes at the start of text form a valid beginning
// of a character, at least 1.
func truncatedLength(text []byte) int {
	length, low, high := 1, byte(0x80), byte(0xBF) // of the second byte
	switch c := text[0]; {
	case 0xC2 <= c && c <= 0xDF:
		length = 2
	case 0xE0 <= c && c <= 0xEF:
		length = 3
		switch c {
		case 0xE0:
			low = 0xA0
		case 0xED:
			high = 0x9F
		}
	case 0xF0 <= c && c <= 0xF4:
		length = 4
		switch c {
		case 0xF0:
			low = 0x90
		case 0xF4:
			high = 0x8F
		}
	}
	n := 1
	for ; n < min(length, len(text)) && low <= text[n] && text[n] <= high; n++ {
		low, high = 0x80, 0xBF
	}
	return n
}

// parameter is a name=value pair of a query.
type parameter struct{ name, value string }

// parseQuery parses a query as Python's parse_qsl does: pairs without a value are
// dropped, and + is a space.
func parseQuery(query string) []parameter {
	var found []parameter
	for part := range strings.SplitSeq(query, "&") {
		name, value, _ := strings.Cut(part, "=")
		if value == "" {
			continue
		}
		found = append(found, parameter{unquote(strings.ReplaceAll(name, "+", " ")), unquote(strings.ReplaceAll(value, "+", " "))})
	}
	return found
}

// quote percent-encodes text so that every parser reads it unchanged.
func quote(text string) string { return quoteExcept(text, "") }

func quoteExcept(text, safe string) string {
	const digits = "0123456789ABCDEF"
	var out strings.Builder
	for i := 0; i < len(text); i++ {
		c := text[i]
		if 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("_.-~"+safe, c) >= 0 {
			out.WriteByte(c)
			continue
		}
		out.WriteByte('%')
		out.WriteByte(digits[c>>4])
		out.WriteByte(digits[c&15])
	}
	return out.String()
}

// unique returns the non-empty texts, sorted, each once.
func unique(texts ...string) []string {
	slices.Sort(texts)
	return slices.DeleteFunc(slices.Compact(texts), func(s string) bool { return s == "" })
}
