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

	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

var doctorCommand = &command{
	name:       "doctor",
	alsoCalled: []string{"check", "diagnose", "verify", "test"},
	summary:    "check everything that a worker needs, and say what to do about what is wrong",
	about: "Give it the environment of the Python worker, before that is replaced. It looks at broker, queue, database, rights and connections there, tables, result backend, " +
		"docker engine, compose, workspace, artifact directory, clock, disk space and what only a step would meet, one line each: what was found and, if something is wrong, the cure. " +
		"It changes nothing: it declares only what exists already.\n\n" +
		"Lines begin with ok, note (works, but check this), FAIL, or skip (could not be checked because of a failure above). Exit code 0: no FAIL. 1: at least one.\n\n" +
		"With --json it prints {\"ok\": …, \"checks\": [{\"name\", \"status\", \"found\", \"cure\"}]}; fields may be added, none is renamed.",
	examples: []example{
		{"mm-orchestrator doctor", "can the worker be swapped in?"},
		{"mm-orchestrator doctor --json | jq '.checks[] | select(.status == \"fail\")'", "for scripts"},
	},
	topics: topics,
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &doctorFlags{}
		fs.BoolVar(&f.json, "json", false, "Print JSON.")
		durationVar(fs, &f.timeout, "timeout", time.Minute, "How long all checks together may take.")
		return f.run
	},
}

type doctorFlags struct {
	json    bool
	timeout time.Duration
}

// The results of a check.
const (
	statusOK   = "ok"
	statusNote = "note"
	statusFail = "fail"
	statusSkip = "skip"
)

// finding is one line of the doctor's. Scripts rely on the JSON form.
type finding struct {
	Name   string `json:"name"`
	Status string `json:"status"`
	Found  string `json:"found"`
	Cure   string `json:"cure,omitempty"`
}

// A check looks at one thing. All that it finds is told under its one name, so
// that a script which watches for a name finds it whatever the result.
type check struct {
	name string
	// needs is an earlier check without whose success there is nothing to look
	// at; "" for none. The check is skipped then.
	needs string
	// look returns one verdict or more, the most important one first.
	look func(d *doctor, ctx context.Context) []verdict
}

// verdict is what a check found.
type verdict struct{ status, found, cure string }

// checks are all that doctor looks at, in the order in which they are told.
var checks = []check{
	{"broker", "", (*doctor).broker},
	{"queue", "broker", (*doctor).queue},
	{"publish", "broker", (*doctor).publish},
	{"database", "", (*doctor).database},
	{"connections", "database", (*doctor).connections},
	{"session", "connections", (*doctor).session},
	{"privileges", "database", (*doctor).privileges},
	{"tables", "privileges", (*doctor).tables},
	{"parked", "privileges", (*doctor).parked},
	{"results", "database", (*doctor).results},
	{"clock", "database", (*doctor).clock},
	{"docker", "", (*doctor).docker},
	{"workspace", "", (*doctor).workspace},
	{"git", "workspace", (*doctor).git},
	{"git-lock", "git", (*doctor).gitLock},
	{"compose", "", (*doctor).compose},
	{"services", "compose", (*doctor).services},
	{"verify", "", (*doctor).verify},
	{"skills", "workspace", (*doctor).skills},
	{"artifacts", "", (*doctor).artifacts},
	{"health", "", (*doctor).health},
}

// doctor collects findings and prints each as soon as it is known.
type doctor struct {
	program  *program
	config   *configuration
	environ  environment
	redactor *artifacts.Redactor
	out      io.Writer // nil for --json
	findings []finding

	// What earlier checks leave to later ones; nil or empty if they failed.
	inspected *worker.Inspection
	db        *store.Store
	// elsewhere is the result backend's, nil if that is db.
	elsewhere    *store.Store
	elsewhereErr error
	columns      error // what the shared tables lack
	runs         []store.ListedRun
	workTree     string // the top of the work tree that the workspace is in
	composing    compose.Program
}

func (f *doctorFlags) run(ctx context.Context, p *program, in input) error {
	c, values, err := resolve(p.env, in.settings)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	environ := c.ChildEnvironment(p.env)
	d := &doctor{program: p, config: c, environ: environ, redactor: artifacts.NewRedactor(append(environ, flagSecrets(values)...))}
	if !f.json {
		d.out = p.stdout
	}
	d.examine(ctx)

	failed := 0
	for _, f := range d.findings {
		if f.Status == statusFail {
			failed++
		}
	}
	if f.json {
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

// examine carries out all checks. Each has its line, and those that could not
// look say so.
func (d *doctor) examine(ctx context.Context) {
	defer func() {
		for _, s := range []*store.Store{d.elsewhere, d.db} {
			if s != nil {
				s.Close()
			}
		}
	}()
	useless := map[string]bool{} // checks that those which need them cannot build on
	for _, c := range checks {
		if useless[c.needs] {
			useless[c.name] = true
			d.add(c.name, verdict{statusSkip, "needs the check " + c.needs, ""})
			continue
		}
		for i, v := range c.look(d, ctx) {
			d.add(c.name, v)
			if i == 0 {
				useless[c.name] = v.status == statusFail
			}
		}
	}
}

// add takes a verdict down: one line, redacted.
func (d *doctor) add(name string, v verdict) {
	f := finding{name, v.status, oneLine(d.redactor.String(v.found), 1000), oneLine(d.redactor.String(v.cure), 1000)}
	d.findings = append(d.findings, f)
	if d.out == nil {
		return
	}
	word := f.Status
	if word == statusFail {
		word = "FAIL"
	}
	fmt.Fprintf(d.out, "%-4s  %-11s  %s\n", word, f.Name, f.Found)
	if f.Cure != "" {
		fmt.Fprintf(d.out, "                   %s\n", f.Cure)
	}
}

func ok(format string, args ...any) []verdict {
	return []verdict{{statusOK, fmt.Sprintf(format, args...), ""}}
}

func note(cure, format string, args ...any) []verdict {
	return []verdict{{statusNote, fmt.Sprintf(format, args...), cure}}
}

func fail(cure, format string, args ...any) []verdict {
	return []verdict{{statusFail, fmt.Sprintf(format, args...), cure}}
}

// failed is the verdict of an error. Errors of this program hold their cure.
func failed(err error) []verdict {
	var cured *curedError
	if errors.As(err, &cured) {
		return []verdict{{statusFail, cured.err.Error(), cured.cure}}
	}
	return []verdict{{statusFail, err.Error(), ""}}
}

// quiet is a logger for parts of the program that the doctor uses.
func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// health says whether the address is free, or a worker answers there.
func (d *doctor) health(ctx context.Context) []verdict {
	if d.config.Listen == "" {
		return note("Set it to host:port", "%s is empty: no metrics, no health checks", d.config.name("MM_ORCHESTRATOR_LISTEN"))
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	answer, err := probe(ctx, "http://"+probeAddress(d.config.Listen)+"/healthz")
	switch {
	case err == nil:
		return ok("a worker answers at %s: %s", d.config.Listen, answer)
	case strings.Contains(err.Error(), "nothing listens there"):
		return ok("%s is free for the worker", d.config.Listen)
	}
	return note("A worker on this machine needs another "+d.config.name("MM_ORCHESTRATOR_LISTEN")+" while something else has that address", "%v", err)
}

// clock compares this machine's clock with the database's: approvals expire
// by one and are written by the other.
func (d *doctor) clock(ctx context.Context) []verdict {
	skew, err := d.db.Skew(ctx)
	switch {
	case err != nil:
		return failed(err)
	case skew.Abs() > 5*time.Second:
		return note("Synchronise both by NTP: durations of steps and the validity of approvals are wrong by as much",
			"this machine's clock and the database's differ by %s", skew.Abs().Round(100*time.Millisecond))
	}
	return ok("differs from the database's by %s", skew.Abs().Round(time.Millisecond))
}

func ownerOf(path string) (uid int, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	return fileOwner(info), nil
}
