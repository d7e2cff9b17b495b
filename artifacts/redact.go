package artifacts

import (
	"bytes"
	"cmp"
	"io"
	"slices"
)

// A RedactingWriter forwards text with every secret replaced by [Mask]. What it writes
// does not depend on how the text is cut into writes.
//
//   - It buffers only bytes that may be the beginning of a secret; their number has a
//     limit that depends on the longest secret only.
//   - A secret that is added to the Redactor is replaced in all that follows, also by
//     writers that exist already.
//   - Close writes the buffered bytes; it does not close the next writer.
//   - It must be used by one goroutine at a time.
type RedactingWriter struct {
	// redactor gives the matcher for each write, because secrets are added while a
	// program writes; nil for one matcher.
	redactor *Redactor
	matcher  *matcher
	next     io.Writer
	// text is the text from before up to the buffered bytes' end; from is where
	// these begin. What stands before it has been written and only helps to judge.
	text []byte
	from int
	// masked is the end of a secret whose Mask has been written.
	masked int
	// later are parts to mask that begin after from, in order.
	later []span
	// again is the length of text from which on it is worth another look, 0 for any.
	again int
	out   []byte
	room  *room
}

// Writer returns a writer that redacts text and writes it to next.
func (r *Redactor) Writer(next io.Writer) *RedactingWriter {
	return &RedactingWriter{redactor: r, matcher: r.matcher(), next: next, room: new(room)}
}

// chunk limits the memory that a large Write needs, in bytes.
const chunk = 32 << 10

// patient is the number of buffered bytes from which on the writer looks at them again
// only when they have grown by a sixteenth, or when a line has ended. A program that
// writes a long secret byte by byte would take time in the square of its length
// otherwise.
const patient = 1 << 10

// Write implements io.Writer.
func (w *RedactingWriter) Write(p []byte) (int, error) {
	if w.matcher == nil {
		return w.next.Write(p)
	}
	written := 0
	for len(p) > 0 {
		part := p[:min(len(p), chunk)]
		p = p[len(part):]
		w.text = append(w.text, part...)
		if len(w.text) >= w.again || bytes.IndexByte(part, '\n') >= 0 {
			if err := w.pass(false); err != nil {
				return written, err
			}
			w.again = 0
			if buffered := len(w.text) - w.from; buffered > patient {
				w.again = len(w.text) + buffered/16
			}
		}
		written += len(part)
	}
	return written, nil
}

// Close writes the buffered bytes.
func (w *RedactingWriter) Close() error {
	if w.matcher == nil {
		return nil
	}
	return w.pass(true)
}

// pass writes all bytes that cannot become part of a secret. At the end of the text
// that holds for all bytes.
func (w *RedactingWriter) pass(end bool) error {
	if w.redactor != nil {
		w.matcher = w.redactor.matcher()
	}
	w.out = w.out[:0]
	var escape nextEscape
	// The text of a detector may begin in what has been written.
	for i := max(0, w.from-gramSize+1); ; i++ {
		var v verdict
		i, w.later, v = w.matcher.find(w.room, &escape, w.text, i, end, w.later)
		slices.SortFunc(w.later, func(a, b span) int { return cmp.Or(a.from-b.from, b.to-a.to) })
		for len(w.later) > 0 && (w.later[0].from <= i || v == absent) {
			w.mask(w.later[0])
			w.later = slices.Delete(w.later, 0, 1)
		}
		if v != present {
			w.copy(i)
			break
		}
	}
	// Keep what helps to judge the buffered bytes.
	if drop := w.from - lookBehind; drop > 0 {
		w.text = append(w.text[:0], w.text[drop:]...)
		w.from -= drop
		w.masked = max(0, w.masked-drop)
		for k := range w.later {
			w.later[k].from -= drop
			w.later[k].to -= drop
		}
	}
	if len(w.out) == 0 {
		return nil
	}
	_, err := w.next.Write(w.out)
	return err
}

// mask writes the text before a secret, and a Mask unless the secret overlaps with one
// that is masked.
func (w *RedactingWriter) mask(s span) {
	w.copy(s.from)
	if s.from >= w.masked {
		w.out = append(w.out, Mask...)
	}
	w.masked = max(w.masked, s.to)
}

// copy writes the text up to a position, without what is masked.
func (w *RedactingWriter) copy(to int) {
	if from := max(w.from, w.masked); from < to {
		w.out = append(w.out, w.text[from:to]...)
	}
	w.from = max(w.from, to)
}
