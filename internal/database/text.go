package database

import (
	"strings"
	"unicode/utf8"
)

// Clean makes text valid for a column of type text: UTF-8 without NUL bytes.
func Clean(text string) string {
	if utf8.ValidString(text) && !strings.Contains(text, "\x00") {
		return text
	}
	return strings.ReplaceAll(strings.ToValidUTF8(text, "�"), "\x00", "")
}

// Cut cleans text and keeps at most its first characters, as counted by varchar(n).
func Cut(text string, characters int) string {
	text = Clean(text)
	if len(text) <= characters {
		return text
	}
	n := 0
	for i := range text {
		if n == characters {
			return text[:i]
		}
		n++
	}
	return text
}
