package artifacts

import (
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"unicode/utf8"
)

// The two streams of a program.
const (
	stdout = iota
	stderr
)

// An Output writes the two output streams of a program to a log.
//
// While the program runs, the log shows its output in the order of arrival.
// Once the program has ended, [Output.Close] puts the log into MoonMind's form:
// trimmed stdout, a line break, trimmed stderr (docs/moonmind.md#commands).
// That needs a second pass over the log if the program mixed its streams.
// Memory does not grow with the output.
type Output struct {
	// Stdout and Stderr may be written by one goroutine each. They never
	// fail.
	Stdout, Stderr io.Writer

	streams [2]*stream
	log     *Log

	mu sync.Mutex
	// begin is the offset in the log at which the output starts.
	begin int64
	// first is the stream that was written to first; firstEnd is the offset at
	// which the other stream begins. From begin to firstEnd the log has only
	// text of first.
	first, last int
	firstEnd    int64
	mixed       bool
	// spools are temporary files with the text after firstEnd, by stream.
	spools [2]*os.File
}

// stream carries one output stream from the program to the log.
type stream struct {
	output  *Output
	which   int
	text    *TextWriter
	redact  *RedactingWriter
	excerpt excerpt
}

// Output returns an [Output] that appends a program's output to the log.
func (l *Log) Output() *Output { return newOutput(l, l.run.redactor) }

// NewCapture returns an Output without a log: it keeps only the [Excerpt].
func NewCapture(redactor *Redactor) *Output { return newOutput(nil, redactor) }

func newOutput(l *Log, redactor *Redactor) *Output {
	redactor.Refresh() // an earlier command may have written secrets into files
	o := &Output{log: l, first: -1}
	for which := range o.streams {
		s := &stream{output: o, which: which}
		s.redact = redactor.Writer(&lineWriter{next: s})
		s.text = &TextWriter{next: &trimmer{next: s.redact}, keepCR: true}
		o.streams[which] = s
	}
	o.Stdout, o.Stderr = o.streams[stdout].text, o.streams[stderr].text
	return o
}

// Write appends text of one stream, already sanitised and redacted.
func (s *stream) Write(p []byte) (int, error) {
	o := s.output
	o.mu.Lock()
	defer o.mu.Unlock()
	s.excerpt.add(p)
	if o.log == nil {
		return len(p), nil
	}
	switch {
	case o.first < 0:
		o.log.breakLine()
		o.first, o.begin = s.which, o.log.size
	case !o.mixed && s.which != o.first:
		o.mixed, o.firstEnd = true, o.log.size
	}
	if o.mixed {
		if s.which != o.last {
			o.log.breakLine()
		}
		o.spool(s.which, p)
	}
	o.last = s.which
	return appender{o.log}.Write(p)
}

func (o *Output) spool(which int, p []byte) {
	if o.log.err != nil {
		return
	}
	if o.spools[which] == nil {
		if o.spools[which], o.log.err = o.log.run.spool(); o.log.err != nil {
			return
		}
	}
	_, o.log.err = o.spools[which].Write(p)
}

// Close ends both streams and puts the log into its final form. The caller
// calls it once the program has ended. Close returns an excerpt of the output
// for an error text.
func (o *Output) Close() Excerpt {
	for _, s := range o.streams {
		// Streams do not fail.
		_ = s.text.Close()
		_ = s.redact.Close()
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	inOrder := !o.mixed || o.first == stdout && o.spools[stdout] == nil
	if !inOrder && o.log.err == nil {
		o.log.err = o.sort()
	}
	for _, spool := range o.spools {
		if spool != nil {
			spool.Close()
		}
	}
	return Excerpt{stdout: o.streams[stdout].excerpt, stderr: o.streams[stderr].excerpt}
}

// sort replaces the log by a copy in which stdout comes before stderr.
func (o *Output) sort() error {
	l := o.log
	file, temporary, err := l.run.temporary(l.name)
	if err != nil {
		return err
	}
	sorted := &Log{run: l.run, name: l.name, file: file, hash: sha256.New()}
	copyInto := func(from io.ReaderAt, begin, end int64) {
		if _, err := io.Copy(appender{sorted}, io.NewSectionReader(from, begin, end-begin)); err != nil && sorted.err == nil {
			sorted.err = err
		}
	}
	copyInto(l.file, 0, o.begin)
	for which := range o.streams {
		if which == stderr {
			sorted.breakLine()
		}
		if which == o.first {
			copyInto(l.file, o.begin, o.firstEnd)
		}
		if spool := o.spools[which]; spool != nil {
			size, err := spool.Seek(0, io.SeekEnd)
			if err != nil && sorted.err == nil {
				sorted.err = err
			}
			copyInto(spool, 0, size)
		}
	}
	if sorted.err == nil {
		sorted.err = l.run.root.Rename(temporary, l.name)
	}
	if sorted.err != nil {
		file.Close()
		_ = l.run.root.Remove(temporary)
		return sorted.err
	}
	l.file.Close()
	l.file, l.hash, l.size, l.begun = sorted.file, sorted.hash, sorted.size, sorted.begun
	return nil
}

// excerptLimit is the limit on the text of an [Excerpt], in bytes.
const excerptLimit = 4 << 10

// excerpt keeps the beginning and the end of one stream.
type excerpt struct {
	head  []byte
	tail  []byte
	total int64
}

// Write implements io.Writer.
func (e *excerpt) Write(p []byte) (int, error) {
	e.add(p)
	return len(p), nil
}

func (e *excerpt) add(p []byte) {
	e.total += int64(len(p))
	e.head = append(e.head, p[:min(len(p), excerptLimit-len(e.head))]...)
	if len(p) > excerptLimit {
		p = p[len(p)-excerptLimit:]
	}
	e.tail = append(e.tail, p...)
	if len(e.tail) > 2*excerptLimit {
		e.tail = append(e.tail[:0], e.tail[len(e.tail)-excerptLimit:]...)
	}
}

// An Excerpt is the part of a program's output that an error text quotes: all
// of it, or its beginning and end with a note in between
// (docs/moonmind.md#c10). It is redacted.
type Excerpt struct{ stdout, stderr excerpt }

// Empty reports whether the output was only white space.
func (e Excerpt) Empty() bool { return e.stdout.total+e.stderr.total == 0 }

// Text returns the excerpt. whole names the file with the complete output, for
// the note; "" means that there is none.
func (e Excerpt) Text(whole string) string {
	total := e.stdout.total + e.stderr.total
	if e.stdout.total > 0 && e.stderr.total > 0 {
		total++
	}
	head := joinNonEmpty(string(e.stdout.head), string(e.stderr.head))
	if total <= excerptLimit {
		return head
	}
	const half = excerptLimit / 2
	if e.stdout.total > half {
		head = string(e.stdout.head)
	}
	tail := string(e.stderr.tail)
	if len(tail) < half {
		tail = joinNonEmpty(string(e.stdout.tail), tail)
	}
	head, tail = cutBack(head, half), cutFront(tail, half)
	if whole != "" {
		whole = ", the whole output is in " + whole
	}
	return fmt.Sprintf("%s\n… %d bytes left out%s …\n%s", head, total-int64(len(head)+len(tail)), whole, tail)
}

func joinNonEmpty(a, b string) string {
	if a == "" || b == "" {
		return a + b
	}
	return a + "\n" + b
}

// cutBack keeps at most limit bytes of the beginning, without cutting a
// character.
func cutBack(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	for limit > 0 && !utf8.RuneStart(text[limit]) {
		limit--
	}
	return text[:limit]
}

// cutFront keeps at most limit bytes of the end, without cutting a character.
func cutFront(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	text = text[len(text)-limit:]
	for len(text) > 0 && !utf8.RuneStart(text[0]) {
		text = text[1:]
	}
	return text
}

// Type returns the label of the enum orchestratorrunartifacttype under which a
// step's file is registered (docs/moonmind.md#artifact-types).
func Type(step, path string) string {
	if strings.EqualFold(filepath.Ext(path), ".diff") {
		return "patch_diff"
	}
	switch step {
	case "build":
		return "build_log"
	case "verify":
		return "verify_log"
	case "rollback":
		return "rollback_log"
	}
	return "metrics"
}
