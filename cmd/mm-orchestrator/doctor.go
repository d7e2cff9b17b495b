package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"time"

	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/policy"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator/preflight"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

var doctorCommand = &command{
	name:     "doctor",
	synonyms: []string{"check", "runDoctor", "verify", "test"},
	summary:  "check everything that a worker needs, and say how to fix what is wrong",
	about: "Checks broker, queue, database with its privileges and connections, tables, result backend, docker engine, compose, workspace, artifact directory, clock and disk space, " +
		"and notes problems that would fail a later step. If the worker runs the Spec workflow, it also checks what `mm-orchestrator spec preflight` checks, and the tasks root. Run it in the Python worker's environment before you replace that worker. Each line says what was found and, if something is wrong, how to fix it. " +
		"It changes nothing: it declares only a queue or exchange that exists already.\n\n" +
		"Lines begin with ok, note (works, but check this), FAIL, or skip (not checked, because a check above failed). Exit code 0: no FAIL. 1: at least one FAIL.\n\n" +
		"With --json it prints {\"ok\": …, \"checks\": [{\"name\", \"status\", \"found\", \"cure\"}]}; fields may be added, none is renamed.",
	examples: []example{
		{"mm-orchestrator doctor", "can a worker run in this environment?"},
		{"mm-orchestrator doctor --json | jq '.checks[] | select(.status == \"fail\")'", "only the failed checks, as JSON"},
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

// finding is one line of the doctor's output. Scripts rely on its JSON form.
type finding struct {
	Name   string `json:"name"`
	Status string `json:"status"`
	Found  string `json:"found"`
	Cure   string `json:"cure,omitempty"`
}

// check is one check of the doctor. All its findings have its name, so that
// scripts find them whatever the result.
type check struct {
	name string
	// needs is an earlier check, or "". If that one failed or was skipped, this
	// one is skipped.
	needs string
	// steps says that it is about the steps of runs, which a worker that runs only the
	// Spec workflow does not carry out.
	steps bool
	// run returns one or more verdicts, the most important one first.
	run func(d *doctor, ctx context.Context) []verdict
}

// verdict is one result of a check.
type verdict struct{ status, found, cure string }

// checks are all checks, in the order of the output.
var checks = []check{
	{"broker", "", false, (*doctor).broker},
	{"queue", "broker", false, (*doctor).queue},
	{"publish", "broker", false, (*doctor).publish},
	{"database", "", false, (*doctor).database},
	{"connections", "database", false, (*doctor).connections},
	{"session", "connections", false, (*doctor).session},
	{"privileges", "database", false, (*doctor).privileges},
	{"tables", "privileges", false, (*doctor).tables},
	{"parked", "privileges", true, (*doctor).parked},
	{"pause", "privileges", true, (*doctor).pause},
	{"results", "database", false, (*doctor).results},
	{"clock", "database", false, (*doctor).clock},
	{"policy", "", true, (*doctor).policy},
	{"docker", "", true, (*doctor).docker},
	{"workspace", "", true, look("workspace")},
	{"git", "", true, (*doctor).git},
	{"git-lock", "", true, look("git-lock")},
	{"git-state", "", true, look("git-state")},
	{"compose", "", true, look("compose", "compose-engine")},
	{"services", "policy", true, look("services")},
	{"verify", "policy", true, (*doctor).verify},
	{"skills", "workspace", true, (*doctor).skills},
	{"artifacts", "", true, (*doctor).artifacts},
	{"disk", "", true, look("disk")},
	{"spec", "", false, (*doctor).spec},
	{"health", "", false, (*doctor).health},
}

// doctor collects findings and prints each as soon as it is known.
type doctor struct {
	program  *program
	config   *configuration
	environ  environment
	redactor *artifacts.Redactor
	out      io.Writer // nil for --json
	findings []finding

	// Results of earlier checks that later ones use; nil or empty if the earlier
	// check failed.
	inspected *worker.Inspection
	db        *store.Store
	// resultsDB is the result backend, nil if db is.
	resultsDB      *store.Store
	resultsErr     error
	missingColumns error // missing columns of the shared tables
	runs           []store.ListedRun

	// looked has what the looks have found, by their names; engineErr is why there is
	// no client of the docker engine.
	looked    map[string][]preflight.Result
	engineErr error
	// policyErr is what is wrong with the policy file.
	policyErr error
}

func (f *doctorFlags) run(ctx context.Context, p *program, in input) error {
	c, values, err := resolve(p.env, in.settings)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	policyErr := c.loadPolicy() // first: the redactor needs it
	if policyErr != nil {
		c.Policy = policy.Default()
	}
	environ := c.ChildEnvironment(p.env)
	d := &doctor{
		program: p, config: c, environ: environ, policyErr: policyErr,
		redactor: artifacts.NewRedactor(withoutSources(append(slices.Clone(environ), flagSecrets(values)...)), c.redaction()),
	}
	if !f.json {
		d.out = p.stdout
	}
	if !c.Spec.Only {
		d.look(ctx)
	}
	d.runChecks(ctx)

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

// runChecks runs all checks in order. Every check adds at least one finding;
// skipped ones say so.
func (d *doctor) runChecks(ctx context.Context) {
	defer func() {
		for _, s := range []*store.Store{d.resultsDB, d.db} {
			if s != nil {
				s.Close()
			}
		}
	}()
	unusable := map[string]bool{} // failed and skipped checks
	for _, c := range checks {
		if unusable[c.needs] {
			unusable[c.name] = true
			d.add(c.name, verdict{statusSkip, "needs the check " + c.needs, ""})
			continue
		}
		if c.steps && d.config.Spec.Only {
			d.add(c.name, verdict{statusOK, "not needed: the worker runs only the Spec workflow", ""})
			continue
		}
		for i, v := range c.run(d, ctx) {
			d.add(c.name, v)
			if i == 0 {
				unusable[c.name] = v.status == statusFail || v.status == statusSkip
			}
		}
	}
}

// add records a verdict, redacted, and prints it.
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

// failed is the verdict for an error, with its cure if it has one.
func failed(err error) []verdict {
	var cured *curedError
	if errors.As(err, &cured) {
		return []verdict{{statusFail, cured.err.Error(), cured.cure}}
	}
	return []verdict{{statusFail, err.Error(), ""}}
}

// discardLogger is for commands that use parts of the worker and print their own
// messages.
func discardLogger() *slog.Logger { return slog.New(slog.DiscardHandler) }

// health checks that the listen address is free, or that a worker answers there.
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
	case errors.Is(err, errNothingListens):
		return ok("%s is free for the worker", d.config.Listen)
	}
	return note("If another program uses that address, set "+d.config.name("MM_ORCHESTRATOR_LISTEN")+" to a free one", "%v", err)
}

// clock compares this machine's clock with the database's, because timestamps of
// runs and approvals come from both.
func (d *doctor) clock(ctx context.Context) []verdict {
	skew, err := d.db.Skew(ctx)
	switch {
	case err != nil:
		return failed(err)
	case skew.Abs() > 5*time.Second:
		return note("Synchronise both by NTP: step durations and the expiry of approvals are wrong by the difference",
			"the clocks of this machine and of the database differ by %s", skew.Abs().Round(100*time.Millisecond))
	}
	return ok("differs from the database's clock by %s", skew.Abs().Round(time.Millisecond))
}
