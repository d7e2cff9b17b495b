package change

import (
	"fmt"
	"regexp"
	"strings"
)

// An AllowList says which files of a workspace a run may alter
// (docs/moonmind.md#allow-list).
type AllowList struct{ patterns []*regexp.Regexp }

// NewAllowList returns the list for these globs. A glob that begins with dots or
// slashes counts without them, too.
func NewAllowList(globs []string) AllowList {
	var list AllowList
	for _, glob := range globs {
		list.patterns = append(list.patterns, fnmatch(glob))
		if stripped := strings.TrimLeft(glob, "./"); stripped != glob {
			list.patterns = append(list.patterns, fnmatch(stripped))
		}
	}
	return list
}

// Matches says whether a path relative to the workspace matches a glob. It only
// compares texts: the caller resolves links in the path's folder.
func (l AllowList) Matches(path string) bool {
	for _, pattern := range l.patterns {
		if pattern != nil && pattern.MatchString(path) {
			return true
		}
	}
	return false
}

// fnmatch translates a glob as Python's fnmatch module does: "*" and "?" match
// a slash too, "[...]" is a set, "[!...]" its complement, an unclosed "[" is
// itself, and there is no escape character. It returns nil for a glob that cannot
// be compiled.
func fnmatch(glob string) *regexp.Regexp {
	var out strings.Builder
	out.WriteString(`(?s)\A`)
	runes := []rune(glob)
	for i := 0; i < len(runes); {
		r := runes[i]
		i++
		switch r {
		case '*':
			out.WriteString(`.*`)
		case '?':
			out.WriteString(`.`)
		case '[':
			end := i
			if end < len(runes) && runes[end] == '!' {
				end++
			}
			if end < len(runes) && runes[end] == ']' {
				end++
			}
			for end < len(runes) && runes[end] != ']' {
				end++
			}
			if end >= len(runes) {
				out.WriteString(`\[`)
				break
			}
			out.WriteString(charset(runes[i:end]))
			i = end + 1
		default:
			out.WriteString(regexp.QuoteMeta(string(r)))
		}
	}
	out.WriteString(`\z`)
	pattern, err := regexp.Compile(out.String())
	if err != nil {
		// Only a glob of enormous size does not compile.
		return nil
	}
	return pattern
}

// charset translates what is between the brackets of a glob. Reversed ranges are
// empty, as in Python.
func charset(set []rune) string {
	negated := set[0] == '!'
	if negated {
		set = set[1:]
	}
	var members strings.Builder
	for i := 0; i < len(set); i++ {
		low, high := set[i], set[i]
		if i+2 < len(set) && set[i+1] == '-' {
			high = set[i+2]
			i += 2
		}
		if low <= high {
			fmt.Fprintf(&members, `\x{%x}-\x{%x}`, low, high)
		}
	}
	switch {
	case members.Len() == 0 && negated:
		return `.`
	case members.Len() == 0:
		return `[^\x{0}-\x{10FFFF}]`
	case negated:
		return `[^` + members.String() + `]`
	}
	return `[` + members.String() + `]`
}
