package protocol

import (
	"bytes"
	"encoding/json"
	"unicode/utf16"
	"unicode/utf8"
)

// textOf returns the content of a JSON string, or "" for any other value.
func textOf(text json.RawMessage) string {
	if len(text) == 0 || kindOf(text) != kindString {
		return ""
	}
	return unquoteJSON(bytes.TrimSpace(text))
}

// unquoteJSON reads a checked string with its quotes. A lone surrogate, which
// Python's strings may hold, becomes its three bytes (WTF-8), and quoteJSON
// writes it back.
func unquoteJSON(text []byte) string {
	text = text[1 : len(text)-1]
	if bytes.IndexByte(text, '\\') < 0 {
		return string(text)
	}
	out := make([]byte, 0, len(text))
	for i := 0; i < len(text); i++ {
		if text[i] != '\\' {
			out = append(out, text[i])
			continue
		}
		i++
		switch c := text[i]; c {
		case 'b':
			out = append(out, '\b')
		case 'f':
			out = append(out, '\f')
		case 'n':
			out = append(out, '\n')
		case 'r':
			out = append(out, '\r')
		case 't':
			out = append(out, '\t')
		case 'u':
			r, _ := hex4(text[i+1:])
			i += 4
			if utf16.IsSurrogate(r) {
				if i+2 < len(text) && text[i+1] == '\\' && text[i+2] == 'u' {
					if low, ok := hex4(text[i+3:]); ok {
						if pair := utf16.DecodeRune(r, low); pair != utf8.RuneError {
							out = utf8.AppendRune(out, pair)
							i += 6
							continue
						}
					}
				}
				out = append(out, 0xE0|byte(r>>12), 0x80|byte(r>>6)&0xBF, 0x80|byte(r)&0xBF)
				continue
			}
			out = utf8.AppendRune(out, r)
		default:
			out = append(out, c)
		}
	}
	return string(out)
}

// nextRune is utf8.DecodeRuneInString that also knows lone surrogates.
func nextRune(s string) (rune, int) {
	r, n := utf8.DecodeRuneInString(s)
	if r == utf8.RuneError && n == 1 && len(s) >= 3 && s[0] == 0xED && s[1]&0xE0 == 0xA0 && s[2]&0xC0 == 0x80 {
		return 0xD000 | rune(s[1]&0x3F)<<6 | rune(s[2]&0x3F), 3
	}
	return r, n
}

const hexDigits = "0123456789abcdef"

// quoteJSON writes a string as json.dumps with ensure_ascii does.
func quoteJSON(s string) json.RawMessage { return appendQuoted(make([]byte, 0, len(s)+2), s) }

func appendQuoted(out []byte, s string) []byte {
	out = append(out, '"')
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			i++
			switch {
			case c == '"' || c == '\\':
				out = append(out, '\\', c)
			case c == '\n':
				out = append(out, '\\', 'n')
			case c == '\r':
				out = append(out, '\\', 'r')
			case c == '\t':
				out = append(out, '\\', 't')
			case c == '\b':
				out = append(out, '\\', 'b')
			case c == '\f':
				out = append(out, '\\', 'f')
			case c < 0x20 || c == 0x7F:
				out = appendEscape(out, rune(c))
			default:
				out = append(out, c)
			}
			continue
		}
		r, n := nextRune(s[i:])
		i += n
		if r > 0xFFFF {
			high, low := utf16.EncodeRune(r)
			out = appendEscape(appendEscape(out, high), low)
			continue
		}
		out = appendEscape(out, r)
	}
	return append(out, '"')
}

func appendEscape(out []byte, r rune) []byte {
	return append(out, '\\', 'u', hexDigits[r>>12&15], hexDigits[r>>8&15], hexDigits[r>>4&15], hexDigits[r&15])
}
