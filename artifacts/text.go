package artifacts

import (
	"bytes"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"
)

// A TextWriter turns the bytes of a program into text as Python's text mode
// would, but never fails on them (docs/moonmind.md#commands,
// docs/moonmind.md#c11): "\r\n" and a lone "\r" become "\n", a byte that is not
// UTF-8 becomes U+FFFD, NUL, which PostgreSQL refuses, is dropped.
//
// It holds back at most three bytes. Close passes them on; it does not close
// the next writer. It is for one goroutine.
type TextWriter struct {
	next io.Writer
	// partial is the beginning of a character.
	partial []byte
	// afterCR says that the last byte was "\r", already passed on as "\n".
	afterCR bool
	out     []byte
}

// NewTextWriter returns a writer of text in front of next.
func NewTextWriter(next io.Writer) *TextWriter { return &TextWriter{next: next} }

// Write implements io.Writer.
func (w *TextWriter) Write(p []byte) (int, error) {
	written := 0
	for len(p) > 0 {
		part := p[:min(len(p), chunk)]
		p = p[len(part):]
		w.partial = append(w.partial, part...)
		if err := w.pass(false); err != nil {
			return written, err
		}
		written += len(part)
	}
	return written, nil
}

// Close ends the text: the beginning of a character without its end is not
// UTF-8.
func (w *TextWriter) Close() error { return w.pass(true) }

func (w *TextWriter) pass(end bool) error {
	w.out = w.out[:0]
	in := w.partial
	for len(in) > 0 {
		if !end && !utf8.FullRune(in) {
			break
		}
		r, size := utf8.DecodeRune(in)
		in = in[size:]
		switch {
		case r == '\n' && w.afterCR, r == 0:
		case r == '\r':
			w.out = append(w.out, '\n')
		default:
			w.out = utf8.AppendRune(w.out, r)
		}
		w.afterCR = r == '\r'
	}
	w.partial = append(w.partial[:0], in...)
	if len(w.out) == 0 {
		return nil
	}
	_, err := w.next.Write(w.out)
	return err
}

// plainText is what a TextWriter makes of a whole text.
func plainText(text string) string {
	if !strings.ContainsAny(text, "\r\x00") && utf8.ValidString(text) {
		return text
	}
	var out strings.Builder
	w := NewTextWriter(&out)
	// A strings.Builder does not fail.
	_, _ = w.Write([]byte(text))
	_ = w.Close()
	return out.String()
}

// heldSpace bounds the white space that a trimmer holds back. A text that
// ends in more white space than this keeps it.
const heldSpace = 64 << 10

// A trimmer passes text on as Python's str.strip does: without white space at
// both ends. Its input is what a TextWriter writes, whole characters.
type trimmer struct {
	next io.Writer
	// begun says that something other than white space has come.
	begun bool
	// space is white space that is passed on when something follows.
	space []byte
}

func (w *trimmer) Write(p []byte) (int, error) {
	end := len(bytes.TrimRightFunc(p, isSpace))
	text, space := p[:end], p[end:]
	if !w.begun {
		text = bytes.TrimLeftFunc(text, isSpace)
		if len(text) == 0 {
			return len(p), nil
		}
		w.begun = true
	}
	if len(text) > 0 {
		if len(w.space) > 0 {
			if _, err := w.next.Write(w.space); err != nil {
				return 0, err
			}
			w.space = w.space[:0]
		}
		if _, err := w.next.Write(text); err != nil {
			return 0, err
		}
	}
	w.space = append(w.space, space...)
	if len(w.space) > heldSpace {
		if _, err := w.next.Write(w.space); err != nil {
			return 0, err
		}
		w.space = w.space[:0]
	}
	return len(p), nil
}

// Trim removes white space at both ends as Python's str.strip does.
func Trim(text string) string { return strings.TrimFunc(text, isSpace) }

// isSpace is Python's str.isspace, which also counts the four separators of
// ASCII.
func isSpace(r rune) bool {
	return unicode.IsSpace(r) || r >= 0x1c && r <= 0x1f
}
