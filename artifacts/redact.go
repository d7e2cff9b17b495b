package artifacts

import "io"

// A RedactingWriter forwards text with every secret replaced by [Mask]. It also
// finds a secret that is spread over several writes.
//
//   - It buffers only bytes that may be the beginning of a secret, at most as
//     many as the longest secret has.
//   - Close writes the buffered bytes; it does not close the next writer.
//   - It must be used by one goroutine at a time.
type RedactingWriter struct {
	redactor *Redactor
	next     io.Writer
	// pending are the buffered bytes.
	pending []byte
	// masked counts the bytes at the beginning of pending that belong to a
	// secret whose Mask has been written.
	masked int
	out    []byte
}

// Writer returns a writer that redacts text and writes it to next.
func (r *Redactor) Writer(next io.Writer) *RedactingWriter {
	if r == nil {
		r = &Redactor{}
	}
	return &RedactingWriter{redactor: r, next: next}
}

// chunk limits the memory that a large Write needs, in bytes.
const chunk = 32 << 10

// Write implements io.Writer.
func (w *RedactingWriter) Write(p []byte) (int, error) {
	if w.redactor.longest == 0 {
		return w.next.Write(p)
	}
	written := 0
	for len(p) > 0 {
		part := p[:min(len(p), chunk)]
		p = p[len(part):]
		w.pending = append(w.pending, part...)
		if err := w.pass(false); err != nil {
			return written, err
		}
		written += len(part)
	}
	return written, nil
}

// Close writes the buffered bytes.
func (w *RedactingWriter) Close() error { return w.pass(true) }

// pass writes all bytes that cannot become part of a secret. At the end of the
// text that holds for all bytes.
func (w *RedactingWriter) pass(end bool) error {
	w.out = w.out[:0]
	i := 0
scan:
	for ; i < len(w.pending); i++ {
		rest := w.pending[i:]
		reach := 0
		for _, secret := range w.redactor.secrets[rest[0]] {
			if len(secret) <= reach {
				break
			}
			if len(rest) >= len(secret) {
				if string(rest[:len(secret)]) == secret {
					reach = len(secret)
				}
			} else if !end && secret[:len(rest)] == string(rest) {
				break scan
			}
		}
		if reach > 0 {
			if i >= w.masked {
				w.out = append(w.out, Mask...)
			}
			w.masked = max(w.masked, i+reach)
		} else if i >= w.masked {
			w.out = append(w.out, rest[0])
		}
	}
	w.pending = append(w.pending[:0], w.pending[i:]...)
	w.masked = max(0, w.masked-i)
	if len(w.out) == 0 {
		return nil
	}
	_, err := w.next.Write(w.out)
	return err
}
