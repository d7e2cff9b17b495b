package artifacts

import (
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
)

// A File is a finished artifact as it is registered
// (docs/moonmind.md#artifact-paths).
type File struct {
	// Path is relative to the run directory.
	Path string
	// Checksum is bare lower-case SHA-256 hex.
	Checksum string
	// SizeBytes is the length of the file.
	SizeBytes int64
}

// A Run is an open run directory. Nothing that is done through it leaves the
// directory, whatever names and symbolic links say.
type Run struct {
	dir      string
	root     *os.Root
	redactor *Redactor
}

// Open makes the run directory if need be and opens it. It fails if the
// directory is a symbolic link or cannot be written, so that a step does not
// find out when its work is done (docs/moonmind.md#f7).
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
	r := &Run{dir: dir, root: root, redactor: redactor}
	probe, err := r.spool()
	if err != nil {
		root.Close()
		return nil, notWritable(dir, err)
	}
	probe.Close()
	return r, nil
}

func notWritable(dir string, err error) error {
	var cause *fs.PathError
	if errors.As(err, &cause) {
		err = cause.Err
	}
	return fmt.Errorf("artifact directory %s cannot be written: %w. Mount the API's artifact directory here, or say with MM_ORCHESTRATOR_ARTIFACT_PATH_MAP where it is", dir, err)
}

// Dir is the directory in our file system.
func (r *Run) Dir() string { return r.dir }

// Close releases the directory.
func (r *Run) Close() error { return r.root.Close() }

// name checks the name of an artifact and makes the directories above it.
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

// place puts a new, empty file under a free name of the same directory.
func (r *Run) temporary(name string) (*os.File, string, error) {
	temporary := filepath.Join(filepath.Dir(name), "."+filepath.Base(name)+"."+rand.Text())
	file, err := r.root.OpenFile(temporary, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	return file, temporary, err
}

// spool returns a file without a name, which ends with its last descriptor.
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

// Log starts a text artifact that can be read while it is written. A file
// that had the name stays whole for whoever has it open.
func (r *Run) Log(name string) (*Log, error) {
	name, err := r.name(name)
	if err != nil {
		return nil, err
	}
	file, temporary, err := r.temporary(name)
	if err != nil {
		return nil, fmt.Errorf("artifact %s: %w", name, err)
	}
	return r.appear(&Log{run: r, name: name, file: file, hash: sha256.New()}, temporary)
}

// appear gives a log its name.
func (r *Run) appear(log *Log, temporary string) (*Log, error) {
	if err := r.root.Rename(temporary, log.name); err != nil {
		log.file.Close()
		_ = r.root.Remove(temporary)
		return nil, fmt.Errorf("artifact %s: %w", log.name, err)
	}
	return log, nil
}

// ErrNoLog says that there is no log to go on with.
var ErrNoLog = errors.New("no log to go on with")

// Continue goes on with a log that a worker has begun and not finished. It is
// a copy, hashed on the way: should that worker still write, it writes to a
// file that nobody sees any more.
//
// What the caller knows of it: it has at least so many bytes, and what comes
// after end, unless that is 0, is not wanted. ErrNoLog if there is no such
// file.
func (r *Run) Continue(name string, least, end int64) (*Log, error) {
	name, err := r.name(name)
	if err != nil {
		return nil, err
	}
	// No device and no pipe, which could be waited for endlessly.
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
		end = info.Size() // as it is now: it may grow
	}
	_, err = io.Copy(appender{log}, io.NewSectionReader(begun, 0, end))
	if err = cmp.Or(err, log.err); err != nil {
		file.Close()
		_ = r.root.Remove(temporary)
		return nil, fmt.Errorf("artifact %s: %w", name, err)
	}
	return r.appear(log, temporary)
}

// Write makes an artifact out of a text at once: sanitised, redacted, and
// never seen half.
func (r *Run) Write(name, text string) (File, error) {
	document, err := r.Document(name)
	if err != nil {
		return File{}, err
	}
	// Errors stay with the document until Finish.
	_, _ = io.WriteString(document, text)
	return document.Finish()
}

// A Document is a text artifact that appears when it is finished. Raw bytes
// of a program may be written to it; they are sanitised and redacted.
type Document struct {
	log       *Log
	temporary string
	redact    *RedactingWriter
	text      *TextWriter
}

// Document starts a text artifact that appears under its name when it is
// finished.
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
	redact := r.redactor.Writer(appender{log})
	return &Document{log: log, temporary: temporary, redact: redact, text: NewTextWriter(redact)}, nil
}

// Write implements io.Writer. It always succeeds; Finish tells.
func (d *Document) Write(p []byte) (int, error) { return d.text.Write(p) }

// Size is the number of bytes that have reached the file.
func (d *Document) Size() int64 { return d.log.size }

// Finish ends the document and gives it its name.
func (d *Document) Finish() (File, error) {
	// Errors stay with the log.
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

// Discard ends the document without leaving anything. After Finish it does
// nothing.
func (d *Document) Discard() {
	if d.log.file != nil {
		d.log.Discard()
		_ = d.log.run.root.Remove(d.temporary)
	}
}

// A Log is a text artifact in the making: lines, and the output of programs.
// Everything in it is sanitised and redacted. It is for one goroutine, except
// for the two streams of an [Output].
//
// Writing never fails: the first error is kept, and [Log.Finish] reports it,
// so that a full disk does not cut a program short in its work.
type Log struct {
	run  *Run
	name string
	file *os.File
	hash hash.Hash
	size int64
	err  error
}

// Path is the name of the artifact, relative to the run directory.
func (l *Log) Path() string { return l.name }

// Size is the number of bytes that were written.
func (l *Log) Size() int64 { return l.size }

// Excerpt is what an error text can tell of the log from an offset in bytes
// on, without a line break at its beginning.
func (l *Log) Excerpt(offset int64) Excerpt {
	var e excerpt
	reader := io.NewSectionReader(l.file, offset, max(0, l.size-offset))
	begin := make([]byte, 1)
	if n, _ := reader.ReadAt(begin, 0); n == 1 && begin[0] == '\n' {
		_, _ = reader.Seek(1, io.SeekStart)
	}
	// What cannot be read is left out of the text.
	_, _ = io.Copy(&e, reader)
	return Excerpt{stdout: e}
}

// Line adds a text, which may have several lines, after a line break unless
// it is the first.
func (l *Log) Line(text string) {
	l.breakLine()
	_, _ = appender{l}.Write([]byte(l.run.redactor.String(plainText(text))))
}

func (l *Log) breakLine() {
	if l.size > 0 {
		_, _ = appender{l}.Write([]byte{'\n'})
	}
}

// Finish ends the file. Its checksum was made on the way.
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

// Discard closes the file and leaves it as it is. After Finish it does
// nothing.
func (l *Log) Discard() {
	if l.file != nil {
		l.file.Close()
		l.file = nil
	}
}

// appender puts clean text at the end of a log.
type appender struct{ log *Log }

func (a appender) Write(p []byte) (int, error) {
	l := a.log
	if l.err == nil {
		if _, l.err = l.file.Write(p); l.err == nil {
			l.hash.Write(p)
			l.size += int64(len(p))
		}
	}
	return len(p), nil
}
