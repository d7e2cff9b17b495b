package artifacts

import "io"

// A RedactingWriter passes text on with every secret replaced, also where a
// secret is cut in two by the boundary between two writes.
//
//   - It holds back at most as many bytes as the longest secret has, and only
//     those that may still become a secret.
//   - Close passes on what is held back; it does not close the next writer.
//   - It is for one goroutine.
type RedactingWriter struct {
	redactor *Redactor
	next     io.Writer
	// held may be the beginning of a secret.
	held []byte
	// masked counts the bytes at the beginning of held that belong to a
	// secret whose Mask has been written.
	masked int
	out    []byte
}

// Writer returns a writer that redacts what goes to next.
func (r *Redactor) Writer(next io.Writer) *RedactingWriter {
	if r == nil {
		r = &Redactor{}
	}
	return &RedactingWriter{redactor: r, next: next}
}

// chunk bounds the memory that one large Write takes.
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
		w.held = append(w.held, part...)
		if err := w.pass(false); err != nil {
			return written, err
		}
		written += len(part)
	}
	return written, nil
}

// Close ends the text.
func (w *RedactingWriter) Close() error { return w.pass(true) }

// pass writes everything that is decided. At the end of the text a beginning
// of a secret is just text.
func (w *RedactingWriter) pass(end bool) error {
	w.out = w.out[:0]
	i := 0
scan:
	for ; i < len(w.held); i++ {
		rest := w.held[i:]
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
	w.held = append(w.held[:0], w.held[i:]...)
	w.masked = max(0, w.masked-i)
	if len(w.out) == 0 {
		return nil
	}
	_, err := w.next.Write(w.out)
	return err
}
