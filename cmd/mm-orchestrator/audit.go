package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

var auditCommand = &command{
	name:     "audit",
	synonyms: []string{"trail", "history", "journal"},
	summary:  "show or verify the audit trail of a run",
	about: "The audit trail of a run has one record for each thing that was done: commands, changed files, images and containers, approvals, and how steps and the run ended. Each record contains the hash of the one before, " +
		"so that an edit shows.\n\n`mm-orchestrator audit show RUN` prints it, `mm-orchestrator audit verify RUN` checks it. docs/audit.md describes the records.",
	examples: []example{
		{"mm-orchestrator audit show 6f1c2f0e", "what was done?"},
		{"mm-orchestrator audit verify 6f1c2f0e", "was the record of it altered?"},
	},
	subcommands: []*command{auditShowCommand, auditVerifyCommand},
	wordHints:   map[string]string{"check": "did you mean mm-orchestrator audit verify?", "list": "did you mean mm-orchestrator audit show?"},
	setup: func(*pflag.FlagSet) runFunc {
		return func(_ context.Context, _ *program, in input) error {
			return &usageError{"audit needs show or verify; " + seeHelp(in.parsed)}
		}
	},
}

var auditShowCommand = &command{
	name:     "show",
	args:     "RUN",
	words:    1,
	synonyms: []string{"list", "ls", "print", "cat", "view"},
	summary:  "print the audit trail of a run",
	about: "Prints one line for each record. RUN is the id of a run or its beginning, as for `mm-orchestrator runs`; of a run that was deleted, the whole id.\n\n" +
		"With --json it prints the records as they are stored, one in each line; this is what `mm-orchestrator audit verify --copy` reads. This command does not check them.",
	examples: []example{
		{"mm-orchestrator audit show 6f1c2f0e", "what was done, when and by whom"},
		{"mm-orchestrator audit show 6f1c2f0e --json > audit.jsonl", "the records, to keep them elsewhere"},
	},
	topics: []topic{topicDatabase},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &auditFlags{}
		fs.BoolVar(&f.json, "json", false, "Print the records as they are stored.")
		return f.show
	},
}

var auditVerifyCommand = &command{
	name:     "verify",
	args:     "RUN",
	words:    1,
	synonyms: []string{"check", "validate", "prove"},
	summary:  "check that the audit trail of a run was not altered",
	about: "Checks that no record of the audit trail was edited, removed, moved, repeated or cut off, and names the records that were. It compares the trail with its head, the number of its records and the last hash, which the database keeps.\n\n" +
		"Who can write to the database can write a whole trail anew. That shows only against a head from elsewhere: the worker's log has one in each line about the end of a step (audit_length and audit_head). Give it with --head.\n\n" +
		"With --copy it checks a copy, such as a file of MM_ORCHESTRATOR_AUDIT_DIR or of `mm-orchestrator runs export`, and with --head as well it needs no database. RUN is the id of a run or its beginning, as for `mm-orchestrator runs`.\n\n" +
		"Exit code 0: the trail is good. 1: it is broken, or there is none.",
	examples: []example{
		{"mm-orchestrator audit verify 6f1c2f0e", "the trail in the database"},
		{"mm-orchestrator audit verify 6f1c2f0e --copy audit.jsonl", "a copy, with the head in the database"},
	},
	topics: []topic{topicDatabase},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &auditFlags{}
		fs.StringVar(&f.head, "head", "", "A head that was noted, as `LENGTH:HASH`. Default: only that of the database.")
		fs.StringVar(&f.file, "copy", "", "Check this `file` in place of the database; - is the standard input. Default: the database.")
		fs.BoolVar(&f.json, "json", false, "Print JSON.")
		return f.verify
	},
}

type auditFlags struct {
	json       bool
	head, file string
}

// openTrail opens the database and finds the run.
func openTrail(ctx context.Context, p *program, in input) (*store.Store, string, error) {
	if len(in.words) == 0 {
		return nil, "", &usageError{commandName(in.parsed) + " needs the id of a run; " + seeHelp(in.parsed)}
	}
	wanted, err := parseRun(in)
	if err != nil {
		return nil, "", err
	}
	c, _, err := resolve(p.env, in.settings)
	if err != nil {
		return nil, "", err
	}
	db, err := openStore(ctx, store.Config{URL: c.Database().URL(), RetryFor: interactiveRetry}, c.tablesDatabase(), 0, p.reportWait)
	if err != nil {
		return nil, "", err
	}
	id, err := findRun(ctx, db, wanted)
	if whole, parseErr := store.ParseRunID(in.words[0]); errors.Is(err, store.ErrNotFound) && parseErr == nil {
		id, err = whole, nil // the trail outlives the run
	}
	if err != nil {
		err = explainSchemaError(ctx, db, err)
		db.Close()
		return nil, "", err
	}
	return db, id, nil
}

func (f *auditFlags) show(ctx context.Context, p *program, in input) (err error) {
	db, id, err := openTrail(ctx, p, in)
	if err != nil {
		return err
	}
	defer db.Close()
	defer func() { err = explainSchemaError(ctx, db, err) }()
	out := bufio.NewWriter(p.stdout)
	defer func() { err = errors.Join(err, out.Flush()) }()
	redact := p.redactor().String
	return db.ReadTrail(ctx, id, func(trail store.Trail) error {
		if f.json {
			return nil
		}
		if trail.Removed.Length > 0 {
			fmt.Fprintf(out, "records 1 to %d were removed at %s, as the retention says\n", trail.Removed.Length, clock(&trail.RemovedAt))
		}
		_, err := fmt.Fprintf(out, "%5s  %-23s  %-14s  %-19s  %s\n", "SEQ", "TIME", "STEP", "KIND", "WHAT")
		return err
	}, func(e audit.Entry) error {
		if f.json {
			_, err := fmt.Fprintf(out, "%s\n", e.Text)
			return err
		}
		r, err := audit.Decode(e.Text)
		if err != nil {
			_, err = fmt.Fprintf(out, "%5d  cannot be read: %v\n", e.Seq, err)
			return err
		}
		_, err = fmt.Fprintf(out, "%5d  %-23s  %-14s  %-19s  %s\n", e.Seq, r.At.UTC().Format("2006-01-02 15:04:05.000"), stepOf(r), oneLine(string(r.Kind), 19), oneLine(redact(r.Summary()), 200))
		return err
	})
}

// stepOf names the step of a record, with its attempt and start unless they are the
// first.
func stepOf(r audit.Record) string {
	text := oneLine(r.Step, 20)
	if r.Attempt > 1 {
		text += fmt.Sprintf(" #%d", r.Attempt)
	}
	if r.Start > 1 {
		text += fmt.Sprintf(" (%d)", r.Start)
	}
	return dash(text)
}

func (f *auditFlags) verify(ctx context.Context, p *program, in input) (err error) {
	var noted *audit.Head
	if f.head != "" {
		head, err := audit.ParseHead(f.head)
		if err != nil {
			return &usageError{"--head: " + err.Error()}
		}
		noted = &head
	}
	if f.file != "" && noted != nil {
		run := ""
		if len(in.words) == 1 {
			if run, err = store.ParseRunID(in.words[0]); err != nil {
				run = ""
			}
		}
		return f.verifyFile(p, run, func(bool) *audit.Verifier {
			v := audit.NewVerifier(run, audit.Start(), nil)
			v.Expect("--head", *noted)
			return v
		})
	}
	db, id, err := openTrail(ctx, p, in)
	if err != nil {
		return err
	}
	defer db.Close()
	defer func() { err = explainSchemaError(ctx, db, err) }()
	var v *audit.Verifier
	var trail store.Trail
	begin := func(found store.Trail) error {
		trail = found
		v = audit.NewVerifier(id, trail.Removed, &trail.Head)
		if noted != nil && noted.Length > trail.Removed.Length {
			v.Expect("--head", *noted)
		}
		if f.file != "" {
			return errFileInstead
		}
		return nil
	}
	err = db.ReadTrail(ctx, id, begin, func(e audit.Entry) error {
		v.Add(e)
		return nil
	})
	switch {
	case errors.Is(err, errFileInstead):
		return f.verifyFile(p, id, func(whole bool) *audit.Verifier {
			if !whole || trail.Removed.Length == 0 {
				return v
			}
			v := audit.NewVerifier(id, audit.Start(), &trail.Head)
			v.Expect("the head of the records that were removed", trail.Removed)
			return v
		})
	case err != nil:
		return err
	}
	return f.report(p, id, v.End())
}

// errFileInstead ends the reading of a trail of which only the head is needed.
var errFileInstead = errors.New("a file is checked")

// verifyFile checks a copy. It may be whole, also if the retention has removed the
// beginning of the trail from the database.
func (f *auditFlags) verifyFile(p *program, run string, verifier func(whole bool) *audit.Verifier) error {
	var file io.Reader = os.Stdin
	if f.file != "-" {
		opened, err := os.Open(f.file)
		if err != nil {
			return err
		}
		defer opened.Close()
		file = opened
	}
	buffered := bufio.NewReader(file)
	const first = `{"seq":1,`
	beginning, _ := buffered.Peek(len(first))
	report, err := audit.VerifyFile(buffered, verifier(string(beginning) == first))
	if err != nil {
		return err
	}
	return f.report(p, run, report)
}

// verifyReport is the output of `audit verify --json`. Scripts rely on it: fields may be
// added, none is renamed.
type verifyReport struct {
	Run     string          `json:"run,omitempty"`
	Good    bool            `json:"good"`
	Records int64           `json:"records"`
	Head    string          `json:"head"`
	First   *time.Time      `json:"first"`
	Last    *time.Time      `json:"last"`
	Faults  []verifyFinding `json:"faults"`
	More    int             `json:"more_faults,omitempty"`
}

type verifyFinding struct {
	Record int64  `json:"record"`
	To     int64  `json:"to"`
	Fault  string `json:"fault"`
	Text   string `json:"text,omitempty"`
}

// A brokenTrail is what verify has found; the report has said it all.
type brokenTrail struct{ text string }

func (e *brokenTrail) Error() string { return e.text }

func (f *auditFlags) report(p *program, run string, r audit.Report) error {
	name := "the audit trail"
	if run != "" {
		name += " of run " + run
	}
	if f.json {
		out := verifyReport{Run: run, Good: r.Good(), Records: r.Records, Head: r.Head.String(), Faults: []verifyFinding{}, More: r.More}
		if !r.First.IsZero() {
			out.First, out.Last = &r.First, &r.Last
		}
		for _, finding := range r.Findings {
			out.Faults = append(out.Faults, verifyFinding{finding.Seq, finding.To, string(finding.Fault), finding.Text})
		}
		encoder := json.NewEncoder(p.stdout)
		encoder.SetIndent("", "  ")
		if err := encoder.Encode(out); err != nil {
			return err
		}
	} else if r.Good() {
		text := fmt.Sprintf("%s is good: %d records", name, r.Records)
		if !r.First.IsZero() {
			text += fmt.Sprintf(", %s to %s", clock(&r.First), clock(&r.Last))
		}
		_, err := fmt.Fprintf(p.stdout, "%s%s\nhead %s\n", strings.ToUpper(text[:1]), text[1:], r.Head)
		return err
	}
	if r.Good() {
		return nil
	}
	texts := make([]string, len(r.Findings))
	for i, finding := range r.Findings {
		texts[i] = "\n  " + finding.String()
	}
	more := ""
	if r.More > 0 {
		more = fmt.Sprintf("\n  and %d more", r.More)
	}
	return &brokenTrail{name + " is broken:" + strings.Join(texts, "") + more}
}

// readKeepAudit reads how long audit trails are kept: for ever, or for a day at least.
func readKeepAudit(c *configuration, text string) error {
	read := readDuration(func(c *configuration) *time.Duration { return &c.KeepAudit }, 0)
	if err := read(c, text); err != nil {
		return err
	}
	if c.KeepAudit > 0 && c.KeepAudit < 24*time.Hour {
		return errors.New("it must be 24h or more, or 0 for ever")
	}
	return nil
}
