package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

var doctorCommand = &command{
	name:    "doctor",
	summary: "check everything that a worker needs, and say what to do about what is wrong",
	about: "Give it the environment of the Python worker, before that is replaced. It looks at broker, queue, database, tables, result backend, docker engine, compose, workspace, artifact " +
		"directory, clock and disk space, one line each: what was found and, if something is wrong, the cure. It changes nothing: it declares only what exists already.\n\n" +
		"Lines begin with ok, note (a worker runs, but look at it), FAIL, or skip (could not be checked because of a failure above). Exit code 0: no FAIL. 1: at least one.\n\n" +
		"With --json it prints {\"ok\": …, \"checks\": [{\"name\", \"status\", \"found\", \"cure\"}]}; fields may be added, none is renamed.",
	examples: []example{
		{"mm-orchestrator doctor", "can the worker be swapped in?"},
		{"mm-orchestrator doctor --json | jq '.checks[] | select(.status == \"fail\")'", "for scripts"},
	},
	topics: topics,
	run:    runDoctor,
}

// The results of a check.
const (
	statusOK   = "ok"
	statusNote = "note"
	statusFail = "fail"
	statusSkip = "skip"
)

// finding is one line of the doctor's. The JSON form is a contract.
type finding struct {
	Name   string `json:"name"`
	Status string `json:"status"`
	Found  string `json:"found"`
	Cure   string `json:"cure,omitempty"`
}

// doctor collects findings and prints each as soon as it is known.
type doctor struct {
	program  *program
	config   *configuration
	environ  environment
	redactor *artifacts.Redactor
	out      io.Writer // nil for --json
	findings []finding
}

func runDoctor(p *program, ctx context.Context, cmd *command, args []string) error {
	fs, flags := p.flags(cmd)
	asJSON := fs.Bool("json", false, "Print JSON.")
	timeout := fs.Duration("timeout", time.Minute, "How long all checks together may take.")
	if _, err := p.parse(cmd, fs, args, 0); err != nil {
		return err
	}
	c, values, err := resolve(p.env, flags)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	environ := c.ChildEnvironment(p.env)
	d := &doctor{program: p, config: c, environ: environ, redactor: artifacts.NewRedactor(append(environ, flagSecrets(values)...))}
	if !*asJSON {
		d.out = p.stdout
	}
	d.broker(ctx)
	var runs []store.ListedRun
	if db := d.database(ctx); db != nil {
		d.tables(ctx, db)
		d.results(ctx, db)
		d.clock(ctx, db)
		// Whose directories they have is looked at below; without rows there
		// is nothing to look at.
		runs, _ = db.ListRuns(ctx, store.RunFilter{Limit: 100})
		db.Close()
	}
	d.docker(ctx)
	workspace := d.workspace(ctx)
	d.compose(ctx, workspace)
	d.artifacts(runs)
	d.metrics()

	failed := 0
	for _, f := range d.findings {
		if f.Status == statusFail {
			failed++
		}
	}
	if *asJSON {
		enc := json.NewEncoder(p.stdout)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false)
		if err := enc.Encode(map[string]any{"ok": failed == 0, "checks": d.findings}); err != nil {
			return err
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d checks failed", failed, len(d.findings))
	}
	return nil
}

// add takes a finding down. Found is one line, redacted.
func (d *doctor) add(status, name, found, cure string) {
	f := finding{name, status, oneLine(d.redactor.String(found), 1000), oneLine(d.redactor.String(cure), 1000)}
	d.findings = append(d.findings, f)
	if d.out == nil {
		return
	}
	word := f.Status
	if word == statusFail {
		word = "FAIL"
	}
	fmt.Fprintf(d.out, "%-4s  %-10s  %s\n", word, f.Name, f.Found)
	if f.Cure != "" {
		fmt.Fprintf(d.out, "                  %s\n", f.Cure)
	}
}

func (d *doctor) ok(name, format string, args ...any) {
	d.add(statusOK, name, fmt.Sprintf(format, args...), "")
}

// failed takes an error down. Errors of this program hold their cure.
func (d *doctor) failed(name string, err error) {
	var cured *curedError
	if errors.As(err, &cured) {
		d.add(statusFail, name, cured.err.Error(), cured.cure)
		return
	}
	d.add(statusFail, name, err.Error(), "")
}

// quiet is a logger for parts of the program that the doctor uses.
func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// metrics says whether the address is free, or a worker answers there.
func (d *doctor) metrics() {
	if d.config.Listen == "" {
		d.add(statusNote, "health", "MM_ORCHESTRATOR_LISTEN is empty: no metrics, no health checks", "Set it to host:port")
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	answer, err := probe(ctx, "http://"+probeAddress(d.config.Listen)+"/healthz")
	switch {
	case err == nil:
		d.ok("health", "a worker answers at %s: %s", d.config.Listen, answer)
	case strings.Contains(err.Error(), "nothing listens there"):
		d.ok("health", "%s is free for the worker", d.config.Listen)
	default:
		d.add(statusNote, "health", err.Error(), "A worker on this machine needs another MM_ORCHESTRATOR_LISTEN while something else has that address")
	}
}

// clock compares this machine's clock with the database's: approvals expire
// by one and are written by the other.
func (d *doctor) clock(ctx context.Context, db *store.Store) {
	skew, err := db.Skew(ctx)
	switch {
	case err != nil:
		d.failed("clock", err)
	case skew.Abs() > 5*time.Second:
		d.add(statusNote, "clock", fmt.Sprintf("this machine's clock and the database's differ by %s", skew.Abs().Round(100*time.Millisecond)),
			"Synchronise both by NTP: durations of steps and the validity of approvals are wrong by as much")
	default:
		d.ok("clock", "differs from the database's by %s", skew.Abs().Round(time.Millisecond))
	}
}

func ownerOf(path string) (uid int, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	return fileOwner(info), nil
}
