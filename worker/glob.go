package worker

import (
	"slices"
	"unicode/utf8"
)

// glob is a pattern of Python's fnmatch, with which Celery's routes match the
// names of tasks: "*" is any text, "?" any character, "[a-c]" one of these and
// "[!a-c]" any other. path.Match differs: it has "^" for "!", an escape character,
// and a separator.
type glob []globPart

// globPart matches any text (star), or one character: one that is in a range, or
// if negated is set one that is in none.
type globPart struct {
	star    bool
	negated bool
	ranges  [][2]rune
}

// newGlob follows Python's fnmatch.translate step by step, also for sets that make
// little sense, such as "[z-a]".
func newGlob(pattern string) glob {
	var g glob
	text := []rune(pattern)
	for i := 0; i < len(text); i++ {
		switch c := text[i]; c {
		case '*':
			g = append(g, globPart{star: true})
		case '?':
			g = append(g, globPart{negated: true})
		case '[':
			if end := setEnd(text, i+1); end >= 0 {
				g = append(g, globSet(text[i+1:end]))
				i = end
				continue
			}
			fallthrough // without an end it is a character
		default:
			g = append(g, globPart{ranges: [][2]rune{{c, c}}})
		}
	}
	return g
}

// setEnd returns the index of the bracket that ends the set that begins at i, or
// -1. A bracket that is the first character belongs to the set.
func setEnd(text []rune, i int) int {
	if i < len(text) && text[i] == '!' {
		i++
	}
	if i < len(text) && text[i] == ']' {
		i++
	}
	for ; i < len(text); i++ {
		if text[i] == ']' {
			return i
		}
	}
	return -1
}

func globSet(set []rune) globPart {
	// The set is cut at each hyphen that makes a range. The character before and
	// the character after one cannot be part of another range.
	var chunks [][]rune
	start, at := 0, 1
	if set[0] == '!' {
		at = 2
	}
	for ; at < len(set); at++ {
		if set[at] == '-' {
			chunks = append(chunks, slices.Clone(set[start:at]))
			start = at + 1
			at += 2
		}
	}
	if rest := set[start:]; len(rest) > 0 {
		chunks = append(chunks, slices.Clone(rest))
	} else {
		chunks[len(chunks)-1] = append(chunks[len(chunks)-1], '-')
	}
	// A range whose end is before its start is empty.
	for k := len(chunks) - 1; k > 0; k-- {
		before := chunks[k-1]
		if last := len(before) - 1; before[last] > chunks[k][0] {
			chunks[k-1] = slices.Concat(before[:last], chunks[k][1:])
			chunks = slices.Delete(chunks, k, k+1)
		}
	}
	// Only now does Python look for "!".
	var part globPart
	if len(chunks[0]) > 0 && chunks[0][0] == '!' {
		part.negated, chunks[0] = true, chunks[0][1:]
	}
	for k, chunk := range chunks {
		for _, c := range chunk {
			part.ranges = append(part.ranges, [2]rune{c, c})
		}
		switch {
		case k == 0:
		case len(chunks[k-1]) == 0: // after "!" a hyphen is a character
			part.ranges = append(part.ranges, [2]rune{'-', '-'})
		default:
			before := chunks[k-1]
			part.ranges = append(part.ranges, [2]rune{before[len(before)-1], chunk[0]})
		}
	}
	return part
}

func (p globPart) matches(c rune) bool {
	return p.negated != slices.ContainsFunc(p.ranges, func(r [2]rune) bool { return r[0] <= c && c <= r[1] })
}

// match reports whether the pattern matches the whole name.
func (g glob) match(name string) bool {
	// star is the last star that was passed, and from the rest of the name that
	// it does not match yet. An earlier star never needs another try.
	part, star := 0, -1
	var from string
	for name != "" || part < len(g) {
		switch {
		case part < len(g) && g[part].star:
			star, from = part, name
			part++
			continue
		case part < len(g) && name != "":
			if c, size := utf8.DecodeRuneInString(name); g[part].matches(c) {
				part, name = part+1, name[size:]
				continue
			}
		}
		if star < 0 || from == "" {
			return false
		}
		_, size := utf8.DecodeRuneInString(from)
		from = from[size:]
		part, name = star+1, from
	}
	return true
}
