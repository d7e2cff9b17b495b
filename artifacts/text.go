package artifacts

import (
	"bytes"
	"encoding/binary"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"
)

// A TextWriter converts the output of a program to text as Python's text mode
// does (docs/moonmind.md#commands), but never fails (docs/moonmind.md#c11):
//
//   - "\r\n" and a single "\r" become "\n".
//   - A byte that is not UTF-8 becomes U+FFFD.
//   - NUL, which PostgreSQL refuses, is dropped.
//
// It buffers at most three bytes. Close writes them; it does not close the next
// writer. A TextWriter must be used by one goroutine at a time.
type TextWriter struct {
	next io.Writer
	// partial is an incomplete character.
	partial []byte
	// afterCR says that the last byte was "\r", already written as "\n".
	afterCR bool
	// keepCR leaves "\r" to a lineWriter.
	keepCR bool
	out    []byte
}

// NewTextWriter returns a TextWriter that writes to next.
func NewTextWriter(next io.Writer) *TextWriter { return &TextWriter{next: next} }

// Write implements io.Writer.
func (w *TextWriter) Write(p []byte) (int, error) {
	written := 0
	for len(p) > 0 {
		part := p[:min(len(p), chunk)]
		p = p[len(part):]
		var err error
		if len(w.partial) == 0 && !w.afterCR && w.plain(part) == len(part) {
			_, err = w.next.Write(part)
		} else {
			w.partial = append(w.partial, part...)
			err = w.pass(false)
		}
		if err != nil {
			return written, err
		}
		written += len(part)
	}
	return written, nil
}

// Close writes the buffered bytes. An incomplete character becomes U+FFFD.
func (w *TextWriter) Close() error { return w.pass(true) }

func (w *TextWriter) pass(end bool) error {
	w.out = w.out[:0]
	in := w.partial
	for len(in) > 0 {
		if n := w.plain(in); n > 0 && (!w.afterCR || in[0] != '\n') {
			w.out = append(w.out, in[:n]...)
			in, w.afterCR = in[n:], false
			continue
		}
		if !end && !utf8.FullRune(in) {
			break
		}
		r, size := utf8.DecodeRune(in)
		in = in[size:]
		switch {
		case r == '\n' && w.afterCR, r == 0:
		case r == '\r' && !w.keepCR:
			w.out = append(w.out, '\n')
		default:
			w.out = utf8.AppendRune(w.out, r)
		}
		w.afterCR = r == '\r' && !w.keepCR
	}
	w.partial = append(w.partial[:0], in...)
	if len(w.out) == 0 {
		return nil
	}
	_, err := w.next.Write(w.out)
	return err
}

// plain returns how many bytes at the beginning are ASCII that stays as it is.
func (w *TextWriter) plain(text []byte) int {
	const ones, high = 0x0101010101010101, 0x8080808080808080
	cr := uint64('\r' * ones)
	if w.keepCR {
		cr = 0 // NUL, which is looked for anyway
	}
	rest := text
	for len(rest) >= 16 {
		// A byte less than 1 borrows from its highest bit. Bytes of 0x80 and more have
		// that bit already.
		one, two := binary.LittleEndian.Uint64(rest), binary.LittleEndian.Uint64(rest[8:])
		if ((one-ones)|one|((one^cr)-ones)|(two-ones)|two|((two^cr)-ones))&high != 0 {
			break
		}
		rest = rest[16:]
	}
	i := len(text) - len(rest)
	for i < len(text) && text[i] != 0 && text[i] < utf8.RuneSelf && (text[i] != '\r' || w.keepCR) {
		i++
	}
	return i
}

// A lineWriter converts line breaks as a TextWriter does. It stands behind the
// redactor, which has to see a "\r" in a secret: a progress bar rewrites its line with it.
type lineWriter struct {
	next    io.Writer
	afterCR bool
	out     []byte
}

func (w *lineWriter) Write(p []byte) (int, error) {
	text := p
	if w.afterCR || bytes.IndexByte(p, '\r') >= 0 {
		w.out = w.out[:0]
		for _, c := range p {
			switch {
			case c == '\r':
				w.out = append(w.out, '\n')
			case c != '\n' || !w.afterCR:
				w.out = append(w.out, c)
			}
			w.afterCR = c == '\r'
		}
		text = w.out
	}
	if len(text) > 0 {
		if _, err := w.next.Write(text); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// plainText converts a whole text as a TextWriter does.
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

// maxTrimmed is how much white space a trimmer buffers, in bytes. More white
// space at the end of a text is not removed.
const maxTrimmed = 64 << 10

// A trimmer removes white space at both ends of a text, as Python's str.strip
// does. Its input is the output of a TextWriter: whole characters.
type trimmer struct {
	next io.Writer
	// begun says that text other than white space has been written.
	begun bool
	// space is white space that is written once other text follows.
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
	if len(w.space) > maxTrimmed {
		if _, err := w.next.Write(w.space); err != nil {
			return 0, err
		}
		w.space = w.space[:0]
	}
	return len(p), nil
}

// Trim removes white space at both ends, as Python's str.strip does.
func Trim(text string) string { return strings.TrimFunc(text, isSpace) }

// isSpace is Python's str.isspace, which includes the four ASCII separators
// 0x1C to 0x1F.
func isSpace(r rune) bool {
	return unicode.IsSpace(r) || r >= 0x1c && r <= 0x1f
}
