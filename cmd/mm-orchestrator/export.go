package main

import (
	"archive/zip"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"html/template"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode"

	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

var exportCommand = &command{
	name:     "export",
	args:     "RUN",
	words:    1,
	synonyms: []string{"archive", "download", "save", "dump", "zip"},
	summary:  "write all about a run to one archive",
	about: "Writes a zip archive with all that is known about a run: its rows, its artifacts and its audit trail, and a page index.html that shows them in a browser without a network. README.txt says how to check the archive without this program.\n\n" +
		"Each artifact is compared with the checksum in its row, and a difference is told. Secrets are removed again from all texts, since the settings may know more of them than when the artifact was written; the page says which artifacts that has altered. " +
		"Run it where the run's artifacts are, with the worker's settings; without them the archive has everything else.\n\n" +
		"RUN is the id of a run or its beginning, as for `mm-orchestrator runs`.\n\n" +
		"Exit code 0: the archive is complete and all in it is as recorded. 1: something is missing or differs; the archive is written and says what.",
	examples: []example{
		{"mm-orchestrator runs export 6f1c2f0e", "to run-ID.zip in the current directory"},
		{"mm-orchestrator runs export 6f1c2f0e -o - | ssh archive 'cat > run.zip'", "to another machine"},
	},
	topics: []topic{topicDatabase, topicFiles, topicSecrets},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &exportFlags{}
		fs.StringVarP(&f.output, "output", "o", "", "Write to this `file`, which must not exist; - is the standard output. Default: run-ID.zip.")
		return f.run
	},
}

type exportFlags struct{ output string }

func (f *exportFlags) run(ctx context.Context, p *program, in input) (err error) {
	db, id, err := openTrail(ctx, p, in)
	if err != nil {
		return err
	}
	defer db.Close()
	defer func() { err = explainSchemaError(ctx, db, err) }()
	c, _, err := resolve(p.env, in.settings)
	if err != nil {
		return err
	}
	detail, err := db.FindRunDetail(ctx, id)
	if err != nil {
		return err
	}
	// With mistakes in it, the policy file adds no secrets; its path is no setting of this
	// command.
	c.Policy, _ = environmentPolicy(p.env)
	e := &exporter{ctx: ctx, db: db, detail: detail, redactor: p.redactorOf(c.redaction()), names: map[string]bool{}, now: time.Now().UTC()}
	if place, err := c.artifactDirectory().WithDefaults().ForRun(detail.Run.ArtifactRoot, id); err == nil {
		e.dir = place.Dir
	}
	name := cmp.Or(f.output, "run-"+id+".zip")
	if name == "-" {
		if err := e.write(p.stdout); err != nil {
			return err
		}
		return e.problems()
	}
	if err := e.writeFile(name); err != nil {
		return err
	}
	fmt.Fprintf(p.stdout, "run %s is written to %s\n", id, name)
	return e.problems()
}

// An exporter writes the archive of a run.
type exporter struct {
	ctx      context.Context
	db       *store.Store
	detail   store.RunDetail
	redactor *artifacts.Redactor
	// dir is the run's directory.
	dir string
	now time.Time

	zip *zip.Writer
	// names are those that are taken, in lower case.
	names map[string]bool
	sums  strings.Builder
	files []exportedFile
	trail exportedTrail
}

// An exportedFile is an artifact in the archive.
type exportedFile struct {
	artifactLine
	// Link is its name in the archive, "" if it is not there.
	Link string
	// State says how it compares with its row; Good that it does not differ.
	State string
	Good  bool
}

type exportedTrail struct {
	Report audit.Report
	Known  bool
	// Masked are records from whose copy a secret was removed.
	Masked []int64
}

// writeFile writes the archive under a name that does not exist, whole or not at all.
func (e *exporter) writeFile(name string) (err error) {
	if _, err := os.Lstat(name); err == nil {
		return fmt.Errorf("%s exists: remove it, or name another file with --output", name)
	}
	file, err := os.CreateTemp(filepath.Dir(name), ".run-*.zip") // only this user may read it
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(file.Name())
		}
	}()
	defer file.Close()
	if err := e.write(file); err != nil {
		return err
	}
	if err := errors.Join(file.Sync(), file.Close()); err != nil {
		return err
	}
	return os.Rename(file.Name(), name)
}

// problems is the error about what is missing or differs.
func (e *exporter) problems() error {
	var texts []string
	for _, f := range e.files {
		if !f.Good {
			texts = append(texts, fmt.Sprintf("\n  artifact %s: %s", oneLine(f.Path, 80), f.State))
		}
	}
	for _, finding := range e.trail.Report.Findings {
		texts = append(texts, "\n  audit trail: "+finding.String())
	}
	if n := len(e.trail.Masked); n > 0 {
		texts = append(texts, fmt.Sprintf("\n  audit trail: %d records have secrets that were not known when they were written, the first is record %d. They are removed from the copy, so that it cannot be verified", n, e.trail.Masked[0]))
	}
	if len(texts) == 0 {
		return nil
	}
	return errors.New("the archive is written, and not all in it is as recorded:" + strings.Join(texts, ""))
}

// write writes the archive. Nothing is kept in memory that grows with an artifact or
// with the trail.
func (e *exporter) write(to io.Writer) error {
	e.zip = zip.NewWriter(to)
	steps := []func() error{e.writeArtifacts, e.writeRows, e.writeTrail, e.writeIndex, e.writeReadme}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	if err := e.add("SHA256SUMS", func(w io.Writer) error {
		_, err := io.WriteString(w, e.sums.String())
		return err
	}); err != nil {
		return err
	}
	return e.zip.Close()
}

// add writes one file of the archive, below a folder that is named after the run.
func (e *exporter) add(name string, write func(io.Writer) error) error {
	if err := e.ctx.Err(); err != nil {
		return err
	}
	entry, err := e.zip.CreateHeader(&zip.FileHeader{Name: "run-" + e.detail.Run.ID + "/" + name, Method: zip.Deflate, Modified: e.now})
	if err != nil {
		return err
	}
	sum := sha256.New()
	if err := write(io.MultiWriter(entry, sum)); err != nil {
		return fmt.Errorf("%s of the archive: %w", name, err)
	}
	e.names[strings.ToLower(name)] = true
	fmt.Fprintf(&e.sums, "%s  %s\n", hex.EncodeToString(sum.Sum(nil)), name)
	return nil
}

func (e *exporter) writeArtifacts() error {
	show := runPrinter{redactor: e.redactor}.detail(e.detail)
	for i, line := range show.Artifacts {
		f := exportedFile{artifactLine: line}
		if err := e.writeArtifact(&f, e.detail.Artifacts[i]); err != nil {
			return err
		}
		e.files = append(e.files, f)
	}
	return nil
}

// writeArtifact copies one artifact, and compares it with its row. Only an error of the
// archive ends the export.
func (e *exporter) writeArtifact(f *exportedFile, row store.RegisteredArtifact) error {
	file, err := e.open(row.Path)
	if err != nil {
		f.State = "not exported: " + err.Error()
		return nil
	}
	defer file.Close()
	name := e.freeName(f.Path)
	source := &countedReader{reader: file, sum: sha256.New()}
	written := sha256.New()
	err = e.add(name, func(w io.Writer) error {
		redacting := e.redactor.Writer(io.MultiWriter(w, written))
		buffer := make([]byte, 64<<10)
		if _, err := io.CopyBuffer(struct{ io.Writer }{redacting}, source, buffer); err != nil && source.err == nil {
			return err
		}
		return redacting.Close()
	})
	if err != nil {
		return err
	}
	f.Link = name
	got, copied := hex.EncodeToString(source.sum.Sum(nil)), hex.EncodeToString(written.Sum(nil))
	switch {
	case source.err != nil:
		f.State = "cannot be read to its end: " + source.err.Error()
	case row.Checksum != "" && got != row.Checksum:
		f.State = fmt.Sprintf("differs from its row: it has %d bytes and the SHA-256 %s", source.size, got)
	case row.SizeBytes != source.size:
		f.State = fmt.Sprintf("differs from its row: it has %d bytes", source.size)
	case copied != got:
		f.State, f.Good = "as recorded; secrets were removed from the copy", true
	default:
		f.State, f.Good = "as recorded", true
	}
	return nil
}

// open opens a file below the run's directory, whatever links there are.
func (e *exporter) open(name string) (*os.File, error) {
	if e.dir == "" {
		return nil, errors.New("the run's directory is not known")
	}
	root, err := os.OpenRoot(e.dir)
	if err != nil {
		return nil, errors.New("the run's directory cannot be read here: " + reasonOf(err))
	}
	defer root.Close()
	if !filepath.IsLocal(name) {
		return nil, errors.New("its path is not within the run's directory")
	}
	file, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, errors.New(reasonOf(err))
	}
	if info, err := file.Stat(); err != nil || !info.Mode().IsRegular() {
		file.Close()
		return nil, errors.New("it is not a file")
	}
	return file, nil
}

// reasonOf is an error of a file without the path.
func reasonOf(err error) string {
	var cause *fs.PathError
	if errors.As(err, &cause) {
		err = cause.Err
	}
	return err.Error()
}

// countedReader counts what is read, and remembers an error.
type countedReader struct {
	reader io.Reader
	sum    hash.Hash
	size   int64
	err    error
}

func (r *countedReader) Read(p []byte) (int, error) {
	n, err := r.reader.Read(p)
	r.sum.Write(p[:n])
	r.size += int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		r.err = err
	}
	return n, err
}

// plainText are the extensions that a browser shows as text or offers to save. A file
// with another one, such as .html, gets .txt: it may come from anybody.
var plainText = []string{".log", ".txt", ".diff", ".patch", ".jsonl"}

// freeName returns a name in the archive for an artifact: relative, without "..", without
// characters that some file system refuses, and used once.
func (e *exporter) freeName(artifact string) string {
	var parts []string
	for _, part := range strings.FieldsFunc(artifact, func(r rune) bool { return r == '/' || r == '\\' }) {
		part = strings.Map(func(r rune) rune {
			if unicode.IsLetter(r) || unicode.IsDigit(r) || strings.ContainsRune("._-+=@", r) {
				return r
			}
			return '_'
		}, part)
		part = strings.TrimRight(strings.TrimLeft(part, "."), ".")
		if runes := []rune(part); len(runes) > 80 {
			part = string(runes[len(runes)-80:])
		}
		if part != "" {
			parts = append(parts, part)
		}
	}
	if len(parts) > 8 {
		parts = parts[len(parts)-8:]
	}
	name := path.Join(append([]string{"artifacts"}, parts...)...)
	if len(parts) == 0 {
		name = "artifacts/unnamed"
	}
	if !slices.Contains(plainText, strings.ToLower(path.Ext(name))) {
		name += ".txt"
	}
	ext := path.Ext(name)
	for free, n := name, 2; ; n++ {
		if !e.names[strings.ToLower(free)] {
			return free
		}
		free = fmt.Sprintf("%s-%d%s", strings.TrimSuffix(name, ext), n, ext)
	}
}

// exportedRows is rows.json.
type exportedRows struct {
	runDetail
	// Snapshot and Plan are the columns metrics_snapshot and steps.
	Snapshot json.RawMessage `json:"metrics_snapshot"`
	Plan     json.RawMessage `json:"plan"`
}

func (e *exporter) rows() exportedRows {
	return exportedRows{runPrinter{redactor: e.redactor}.detail(e.detail), e.redactJSON(e.detail.Snapshot), e.redactJSON(e.detail.Run.Steps)}
}

// redactJSON removes secrets from JSON. If that leaves no JSON, it becomes a text.
func (e *exporter) redactJSON(text json.RawMessage) json.RawMessage {
	if len(text) == 0 {
		return json.RawMessage("null")
	}
	redacted := e.redactor.String(string(text))
	if !json.Valid([]byte(redacted)) {
		quoted, _ := json.Marshal(redacted) // a text always encodes
		return quoted
	}
	return json.RawMessage(redacted)
}

func (e *exporter) writeRows() error {
	return e.add("rows.json", func(w io.Writer) error { return runPrinter{out: w}.json(e.rows()) })
}

// writeTrail writes the audit trail as it is stored, and checks it.
func (e *exporter) writeTrail() error {
	id := e.detail.Run.ID
	var v *audit.Verifier
	var head audit.Head
	err := e.db.ReadTrail(e.ctx, id, func(trail store.Trail) error {
		head, v = trail.Head, audit.NewVerifier(id, trail.Removed, &trail.Head)
		return nil
	}, func(audit.Entry) error { return errFileInstead })
	switch {
	case errors.Is(err, store.ErrNotFound):
		return nil
	case err != nil && !errors.Is(err, errFileInstead):
		return err
	}
	err = e.add("audit.jsonl", func(w io.Writer) error {
		return e.db.ReadTrail(e.ctx, id, func(trail store.Trail) error {
			head, v = trail.Head, audit.NewVerifier(id, trail.Removed, &trail.Head)
			return nil
		}, func(entry audit.Entry) error {
			v.Add(entry)
			_, err := w.Write(append(e.withoutSecrets(entry), '\n'))
			return err
		})
	})
	if err != nil {
		return err
	}
	e.trail.Report, e.trail.Known = v.End(), true
	return e.add("audit.head", func(w io.Writer) error {
		_, err := fmt.Fprintln(w, head)
		return err
	})
}

// withoutSecrets returns the text of a record. It is not that of the trail if a secret is
// in it that was not known when it was recorded.
func (e *exporter) withoutSecrets(entry audit.Entry) []byte {
	r, err := audit.Decode(entry.Text)
	if err != nil {
		return []byte(e.redactor.String(string(entry.Text)))
	}
	before, err := r.Body()
	if err != nil {
		return []byte(e.redactor.String(string(entry.Text)))
	}
	r.Redact(e.redactor.String)
	if after, err := r.Body(); err != nil || !bytes.Equal(before, after) {
		e.trail.Masked = append(e.trail.Masked, r.Seq)
		return audit.Join(r.Seq, r.Prev, after)
	}
	return entry.Text
}

//go:embed export.html
var indexText string

// maxShown bounds the records that the page shows.
const maxShown = 5000

// An indexRecord is a row of the page's table of the trail.
type indexRecord struct {
	Seq              int64
	At               time.Time
	Step, Kind, What string
}

type indexPage struct {
	runDetail
	Exported  time.Time
	Failed    *stepLine // the first step that has failed
	Plan      string
	Files     []exportedFile
	Approvals []indexRecord
	Trail     exportedTrail
	// Records yields the records; Hidden counts those that are not shown.
	Records func(yield func(indexRecord) bool)
	Hidden  func() int64
}

var indexTemplate = template.Must(template.New("index").Funcs(template.FuncMap{
	"at": func(t any) string {
		switch t := t.(type) {
		case time.Time:
			return t.UTC().Format("2006-01-02 15:04:05")
		case *time.Time:
			return clock(t)
		}
		return "-"
	},
	"exactly": func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05.000") },
	"took":    took,
	"size": func(n int64) string {
		switch {
		case n >= 10<<20:
			return fmt.Sprintf("%d MiB", n>>20)
		case n >= 10<<10:
			return fmt.Sprintf("%d KiB", n>>10)
		case n == 1:
			return "1 byte"
		}
		return fmt.Sprintf("%d bytes", n)
	},
	"short": func(text string) string { return text[:min(len(text), 12)] },
}).Parse(indexText))

func (e *exporter) writeIndex() error {
	rows := e.rows()
	var plan strings.Builder
	if text, err := json.MarshalIndent(rows.Plan, "", "  "); err == nil {
		plan.Write(text)
	}
	page := indexPage{runDetail: rows.runDetail, Exported: e.now, Plan: plan.String(), Files: e.files, Trail: e.trail}
	if i := slices.IndexFunc(page.Steps, func(s stepLine) bool { return s.Status == "failed" }); i >= 0 {
		page.Failed = &stepLine{Step: page.Steps[i].Step, Message: oneLine(page.Steps[i].Message, 300)}
	}
	shown, failed := int64(0), error(nil)
	page.Hidden = func() int64 { return max(0, e.trail.Report.Records-shown) }
	page.Records = func(yield func(indexRecord) bool) {
		failed = e.eachRecord(func(r audit.Record) bool {
			shown++
			return yield(e.indexRecord(r)) && shown < maxShown
		})
	}
	if e.trail.Known {
		err := e.eachRecord(func(r audit.Record) bool {
			if r.Approval != nil || r.By != "" {
				page.Approvals = append(page.Approvals, e.indexRecord(r))
			}
			return len(page.Approvals) < 200
		})
		if err != nil {
			return err
		}
	} else {
		page.Records = func(func(indexRecord) bool) {}
	}
	return e.add("index.html", func(w io.Writer) error { return cmp.Or(indexTemplate.Execute(w, page), failed) })
}

func (e *exporter) indexRecord(r audit.Record) indexRecord {
	return indexRecord{r.Seq, r.At, stepOf(r), string(r.Kind), e.redactor.String(r.Summary())}
}

// eachRecord calls do with the records that can be read, until it returns false.
func (e *exporter) eachRecord(do func(audit.Record) bool) error {
	err := e.db.ReadTrail(e.ctx, e.detail.Run.ID, func(store.Trail) error { return nil }, func(entry audit.Entry) error {
		if r, err := audit.Decode(entry.Text); err == nil && !do(r) {
			return errFileInstead
		}
		return nil
	})
	if errors.Is(err, errFileInstead) {
		return nil
	}
	return err
}

const readmeText = `Run %s of service %s, exported at %s UTC.

index.html   shows the run in a browser. It needs no network.
rows.json    the run's rows in the database: run, newest attempt of each step,
             artifacts, metrics_snapshot, plan.
artifacts/   the run's artifacts. Secrets are removed; index.html says which of
             them differ from what was recorded.
audit.jsonl  the audit trail: one record of JSON in each line.
audit.head   the number of records and the last hash, as the database has them.
SHA256SUMS   checksums of all files here.

To check the files:

    sha256sum -c SHA256SUMS

To check the audit trail without mm-orchestrator: the hash of a record is the
SHA-256 of the hash before it, in hex, and the record's line without its end.
Each record repeats the hash before it as "prev". In a shell, this prints the
head, which must be that of audit.head, and no other line:

    prev=%s n=0
    while IFS= read -r line; do
      case $line in *'"prev":"'$prev'"'*) ;; *) echo "record $((n+1)) is broken" ;; esac
      prev=$(printf '%%s%%s' "$prev" "$line" | sha256sum | cut -c1-64); n=$((n+1))
    done < audit.jsonl
    echo "$n:$prev"

With mm-orchestrator:

    mm-orchestrator audit verify %[1]s --copy audit.jsonl --head "$(cat audit.head)"

A head that was noted elsewhere says more than the one in this archive: the
worker's log has one at each end of a step, as audit_length and audit_head.
`

func (e *exporter) writeReadme() error {
	return e.add("README.txt", func(w io.Writer) error {
		_, err := fmt.Fprintf(w, readmeText, e.detail.Run.ID, oneLine(e.redactor.String(e.detail.Run.TargetService), 80), e.now.Format("2006-01-02 15:04:05"), audit.Genesis)
		return err
	})
}
