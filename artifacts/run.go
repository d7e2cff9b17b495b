package artifacts

import (
	"bufio"
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// A File describes a finished artifact as it is registered in the database
// (docs/moonmind.md#artifact-paths).
type File struct {
	// Path is relative to the run directory.
	Path string
	// Checksum is bare lower-case SHA-256 hex.
	Checksum string
	// SizeBytes is the size of the file.
	SizeBytes int64
}

// A Run is an open run directory. Its methods cannot read or write outside of
// the directory, whatever the names and symbolic links are.
type Run struct {
	dir      string
	root     *os.Root
	redactor *Redactor
}

// Open opens the run directory, and creates it if it does not exist. It fails
// if the directory is a symbolic link, not writable or full, so that a step fails
// before its work and not after it (docs/moonmind.md#f7).
func Open(dir string, redactor *Redactor) (*Run, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, notWritable(dir, err)
	}
	named, err := os.Lstat(dir)
	if err != nil {
		return nil, notWritable(dir, err)
	}
	if named.Mode()&fs.ModeSymlink != 0 {
		return nil, &PathError{"Artifact run directory cannot be a symlink"}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, notWritable(dir, err)
	}
	opened, err := root.Stat(".")
	if err != nil || !os.SameFile(named, opened) {
		root.Close()
		return nil, &PathError{"Artifact run directory cannot be a symlink"}
	}
	redactor.Refresh()
	r := &Run{dir: dir, root: root, redactor: redactor}
	probe, err := r.spool()
	if err == nil {
		// A full disk still takes empty files.
		_, err = probe.Write(make([]byte, 4096))
		probe.Close()
	}
	if err != nil {
		root.Close()
		return nil, notWritable(dir, err)
	}
	return r, nil
}

func notWritable(dir string, err error) error {
	var cause *fs.PathError
	if errors.As(err, &cause) {
		err = cause.Err
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("artifact directory %s cannot be written: %w. Free space there", dir, err)
	}
	return fmt.Errorf("artifact directory %s cannot be written: %w. Mount the API's artifact directory here, or set MM_ORCHESTRATOR_ARTIFACT_PATH_MAP to where it is mounted", dir, err)
}

// Dir returns the path of the directory.
func (r *Run) Dir() string { return r.dir }

// Close releases the directory.
func (r *Run) Close() error { return r.root.Close() }

// name checks the name of an artifact and creates its parent directories.
func (r *Run) name(name string) (string, error) {
	if filepath.IsAbs(name) {
		return "", &PathError{"Artifact paths must be relative"}
	}
	name = filepath.Clean(name)
	if !filepath.IsLocal(name) || name == "." || strings.ContainsRune(name, 0) {
		return "", &PathError{"Artifact path escapes the run directory"}
	}
	if !inside(Resolve(r.dir), Resolve(filepath.Join(r.dir, name))) {
		return "", &PathError{"Artifact path escapes the run directory"}
	}
	if parent := filepath.Dir(name); parent != "." {
		if err := r.root.MkdirAll(parent, 0o755); err != nil {
			return "", fmt.Errorf("artifact %s: %w", name, err)
		}
	}
	return name, nil
}

// temporary creates an empty file under an unused name in the same directory.
func (r *Run) temporary(name string) (*os.File, string, error) {
	temporary := filepath.Join(filepath.Dir(name), "."+filepath.Base(name)+"."+rand.Text())
	file, err := r.root.OpenFile(temporary, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	return file, temporary, err
}

// spool returns a temporary file without a name; closing it removes it.
func (r *Run) spool() (*os.File, error) {
	file, name, err := r.temporary("spool")
	if err != nil {
		return nil, err
	}
	if err := r.root.Remove(name); err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// WriteExact writes a file that is no artifact, whole or not at all, and without
// redaction: what is written must have passed it already.
func (r *Run) WriteExact(name string, write func(io.Writer) error) error {
	name, err := r.name(name)
	if err != nil {
		return err
	}
	file, temporary, err := r.temporary(name)
	if err != nil {
		return fmt.Errorf("file %s: %w", name, err)
	}
	defer file.Close()
	buffered := bufio.NewWriter(file)
	if err = write(buffered); err == nil {
		err = errors.Join(buffered.Flush(), file.Sync())
	}
	if err == nil {
		err = r.root.Rename(temporary, name)
	}
	if err != nil {
		r.root.Remove(temporary)
	}
	return err
}

// Tail returns the end of an artifact, at most limit bytes.
func (r *Run) Tail(name string, limit int64) ([]byte, error) {
	name, err := r.name(name)
	if err != nil {
		return nil, err
	}
	file, err := r.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe is not waited for
	if err != nil {
		return nil, fmt.Errorf("artifact %s: %w", name, err)
	}
	defer file.Close()
	info, err := file.Stat()
	if err == nil {
		_, err = file.Seek(max(0, info.Size()-limit), io.SeekStart)
	}
	if err != nil {
		return nil, fmt.Errorf("artifact %s: %w", name, err)
	}
	return io.ReadAll(io.LimitReader(file, limit))
}

// Log starts a text artifact that can be read while it is written. It replaces
// an earlier file of that name; a reader that has that file open can read it to
// its end.
func (r *Run) Log(name string) (*Log, error) {
	name, err := r.name(name)
	if err != nil {
		return nil, err
	}
	file, temporary, err := r.temporary(name)
	if err != nil {
		return nil, fmt.Errorf("artifact %s: %w", name, err)
	}
	return r.publish(&Log{run: r, name: name, file: file, hash: sha256.New()}, temporary)
}

// publish gives a log its name.
func (r *Run) publish(log *Log, temporary string) (*Log, error) {
	if err := r.root.Rename(temporary, log.name); err != nil {
		log.file.Close()
		_ = r.root.Remove(temporary)
		return nil, fmt.Errorf("artifact %s: %w", log.name, err)
	}
	return log, nil
}

// ErrNoLog says that [Run.Continue] found no log to continue.
var ErrNoLog = errors.New("there is no log to continue")

// Continue continues a log that another worker has begun and not finished. It
// works on a copy that replaces the file: if the other worker still writes, it
// writes to a file that has no name any more.
//
// The log must have at least least bytes. If end is not 0, the text after that
// offset is dropped. The error is [ErrNoLog] if there is no such file.
func (r *Run) Continue(name string, least, end int64) (*Log, error) {
	name, err := r.name(name)
	if err != nil {
		return nil, err
	}
	// Only a regular file: opening a pipe or device could block for ever.
	if info, err := r.root.Lstat(name); err != nil || !info.Mode().IsRegular() || info.Size() < least {
		return nil, ErrNoLog
	}
	begun, err := r.root.Open(name)
	if err != nil {
		return nil, ErrNoLog
	}
	defer begun.Close()
	info, err := begun.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Size() < least {
		return nil, ErrNoLog
	}
	file, temporary, err := r.temporary(name)
	if err != nil {
		return nil, fmt.Errorf("artifact %s: %w", name, err)
	}
	log := &Log{run: r, name: name, file: file, hash: sha256.New()}
	if end == 0 || end > info.Size() {
		end = info.Size() // the size at this moment: the file may still grow
	}
	_, err = io.Copy(appender{log}, io.NewSectionReader(begun, 0, end))
	if err = cmp.Or(err, log.err); err != nil {
		file.Close()
		_ = r.root.Remove(temporary)
		return nil, fmt.Errorf("artifact %s: %w", name, err)
	}
	return r.publish(log, temporary)
}

// Write creates an artifact from a text, sanitised and redacted. Readers see
// the whole file or none.
func (r *Run) Write(name, text string) (File, error) {
	document, err := r.Document(name)
	if err != nil {
		return File{}, err
	}
	// The document keeps the error, and Finish returns it.
	_, _ = io.WriteString(document, plainText(text))
	return document.Finish()
}

// A Document is a text artifact that readers see only once it is finished. The
// output of a program may be written to it unchanged: it sanitises and redacts
// the bytes. It keeps "\r", which belongs to the content of files in a diff.
type Document struct {
	log       *Log
	temporary string
	redact    *RedactingWriter
	text      *TextWriter
}

// Document starts a text artifact that gets its name in [Document.Finish].
func (r *Run) Document(name string) (*Document, error) {
	name, err := r.name(name)
	if err != nil {
		return nil, err
	}
	file, temporary, err := r.temporary(name)
	if err != nil {
		return nil, fmt.Errorf("artifact %s: %w", name, err)
	}
	log := &Log{run: r, name: name, file: file, hash: sha256.New()}
	r.redactor.Refresh()
	redact := r.redactor.Writer(appender{log})
	return &Document{log: log, temporary: temporary, redact: redact, text: &TextWriter{next: redact, keepCR: true}}, nil
}

// Write implements io.Writer. It never fails: [Document.Finish] returns the
// first error.
func (d *Document) Write(p []byte) (int, error) { return d.text.Write(p) }

// Size returns the number of bytes written to the file.
func (d *Document) Size() int64 { return d.log.size }

// Finish ends the document and gives it its name.
func (d *Document) Finish() (File, error) {
	// The log keeps the error; its Finish returns it.
	_ = d.text.Close()
	_ = d.redact.Close()
	file, err := d.log.Finish()
	if err == nil {
		err = d.log.run.root.Rename(d.temporary, d.log.name)
	}
	if err != nil {
		_ = d.log.run.root.Remove(d.temporary)
		return File{}, err
	}
	return file, nil
}

// Discard removes an unfinished document. After Finish it does nothing.
func (d *Document) Discard() {
	if d.log.file != nil {
		d.log.Discard()
		_ = d.log.run.root.Remove(d.temporary)
	}
}

// A Log is an unfinished text artifact: lines, and the output of programs. It
// sanitises and redacts everything. It must be used by one goroutine at a time;
// the two streams of an [Output] are an exception.
//
// Writing never fails, so that a full disk does not interrupt a program. The
// log keeps the first error, and [Log.Finish] returns it.
type Log struct {
	run  *Run
	name string
	file *os.File
	hash hash.Hash
	size int64
	// begun is the offset up to which the system has been asked to write to disk.
	begun int64
	err   error
	// lost is the beginning of what could not be written.
	lost []byte
}

// maxLost bounds what a log that cannot be written keeps in memory.
const maxLost = 16 << 10

// Path returns the name of the artifact, relative to the run directory.
func (l *Log) Path() string { return l.name }

// Size returns the number of bytes written.
func (l *Log) Size() int64 { return l.size }

// Lost returns what could not be written, sanitised and redacted, and at most the first
// 16 KiB of it: a text that is too important to end with the disk's space.
func (l *Log) Lost() string { return string(l.lost) }

// Excerpt returns an excerpt, for an error text, of the log from an offset in
// bytes on. A line break at the offset is left out.
func (l *Log) Excerpt(offset int64) Excerpt {
	var e excerpt
	reader := io.NewSectionReader(l.file, offset, max(0, l.size-offset))
	begin := make([]byte, 1)
	if n, _ := reader.ReadAt(begin, 0); n == 1 && begin[0] == '\n' {
		_, _ = reader.Seek(1, io.SeekStart)
	}
	// After a read error the excerpt is merely shorter.
	_, _ = io.Copy(&e, reader)
	return Excerpt{stdout: e}
}

// Line appends a text, which may have several lines. It writes a line break
// before it, except at the beginning of the log.
func (l *Log) Line(text string) {
	l.breakLine()
	_, _ = appender{l}.Write([]byte(l.run.redactor.String(plainText(text))))
}

func (l *Log) breakLine() {
	if l.size > 0 {
		_, _ = appender{l}.Write([]byte{'\n'})
	}
}

// Finish syncs and closes the file, or returns the first error of the log.
func (l *Log) Finish() (File, error) {
	if l.err == nil {
		l.err = l.file.Sync()
	}
	if err := l.file.Close(); l.err == nil {
		l.err = err
	}
	l.file = nil
	if l.err != nil {
		return File{}, fmt.Errorf("artifact %s in %s: %w", l.name, l.run.dir, l.err)
	}
	return File{Path: l.name, Checksum: hex.EncodeToString(l.hash.Sum(nil)), SizeBytes: l.size}, nil
}

// Discard closes the file and keeps what is in it. After Finish it does
// nothing.
func (l *Log) Discard() {
	if l.file != nil {
		l.file.Close()
		l.file = nil
	}
}

// appender appends sanitised and redacted text to a log.
type appender struct{ log *Log }

func (a appender) Write(p []byte) (int, error) {
	l := a.log
	written := 0
	if l.err == nil {
		if written, l.err = l.file.Write(p); l.err == nil {
			l.hash.Write(p)
			l.size += int64(len(p))
			if l.size-l.begun >= writeBehind {
				startWriting(l.file, l.begun, l.size-l.begun)
				l.begun = l.size
			}
			return len(p), nil
		}
	}
	rest := p[written:]
	l.lost = append(l.lost, rest[:min(len(rest), maxLost-len(l.lost))]...)
	return len(p), nil
}

// writeBehind is how much of a log at most waits to be written to disk. Without a limit,
// the Sync at the end of a long log would find all of it still in the system's cache, and
// keep the disk busy for seconds, while the database's commits wait for it too.
const writeBehind = 8 << 20
