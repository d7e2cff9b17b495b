package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// An Error is one thing that is wrong in a file.
type Error struct {
	File string
	// Line and Column count from 1. They are 0 if the whole file is meant.
	Line, Column int
	// Field is the path of the field, "" for none.
	Field string
	// Problem says what is wrong, Cure what to do.
	Problem, Cure string
}

func (e *Error) Error() string {
	place := e.File
	if e.Line > 0 {
		place = fmt.Sprintf("%s:%d:%d", e.File, e.Line, e.Column)
	}
	text := place + ": "
	if e.Field != "" {
		text += e.Field + ": "
	}
	text += e.Problem
	if e.Cure != "" {
		text += ". " + e.Cure
	}
	return text
}

// Errors are all things that are wrong in a file, in the order of its lines.
type Errors []*Error

func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i, one := range e {
		lines[i] = one.Error()
	}
	return strings.Join(lines, "\n")
}

func (e Errors) sort() {
	slices.SortStableFunc(e, func(a, b *Error) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
}

// nearest returns the name most similar to word, "" if none is. Dashes, underscores
// and case do not count: allow_list is allowList.
func nearest(word string, names []string) string {
	best, least := "", 4
	for _, name := range names {
		d := Distance(plain(word), plain(name))
		if strings.HasPrefix(plain(name), plain(word)) && len(word) >= 3 {
			d = min(d, 1)
		}
		if d < least && d <= (len(word)+2)/3 {
			best, least = name, d
		}
	}
	return best
}

func plain(name string) string {
	if len(name) > 64 {
		name = name[:64]
	}
	return strings.NewReplacer("-", "", "_", "", " ", "").Replace(strings.ToLower(name))
}

// Distance is the edit distance, in which swapped neighbours count once. It serves to
// guess which name a mistyped one was meant to be.
func Distance(a, b string) int {
	d := make([][]int, len(a)+1)
	for i := range d {
		d[i] = make([]int, len(b)+1)
		d[i][0] = i
		for j := range d[i] {
			if i == 0 {
				d[i][j] = j
				continue
			}
			if j == 0 {
				continue
			}
			differs := 1
			if a[i-1] == b[j-1] {
				differs = 0
			}
			d[i][j] = min(d[i-1][j]+1, d[i][j-1]+1, d[i-1][j-1]+differs)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				d[i][j] = min(d[i][j], d[i-2][j-2]+1)
			}
		}
	}
	return d[len(a)][len(b)]
}

// quoted shows a text of the file in a message.
func quoted(text string) string {
	if runes := []rune(text); len(runes) > 60 {
		text = string(runes[:60]) + "…"
	}
	return fmt.Sprintf("%q", text)
}

// oneOf writes "a, b or c".
func oneOf(words []string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	return strings.Join(words[:len(words)-1], ", ") + " or " + words[len(words)-1]
}
