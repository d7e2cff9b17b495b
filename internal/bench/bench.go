package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// ContenderVerb is the first argument of the program when it is the process of a
// contender.
const ContenderVerb = "contender"

// Config says what to measure.
type Config struct {
	// Cases are names of cases. Defaults to all.
	Cases []string
	// Contenders are those that take part: floor, ours, celery. Defaults to all. Ours
	// always does.
	Contenders []string
	// Rounds is how often each case is measured. Defaults to 3, or 2 if Short.
	Rounds int
	// Short measures for 0.7 s instead of 1.5 s.
	Short bool
	// Seconds is how long one sample takes, if not as Short says.
	Seconds float64
	// Folder receives the report: a page, JSON and a plot.
	Folder string
	// README is a page with the marks of [readmeBegin], between which the run writes a
	// summary; "" for none.
	README string
	// Program builds the program mm-orchestrator at a path. Defaults to the build of
	// releases.
	Program func(ctx context.Context, path string) error
	// Command is the command line for the report.
	Command string
	// Output receives a line for each sample.
	Output io.Writer
}

// The contenders, in the order of the report.
const (
	floor  = "floor"
	ours   = "ours"
	celery = "celery"
)

// A Case is one thing that is measured of several contenders.
type Case struct {
	Name  string
	Title string
	// What says what is measured, and what is batched in it.
	What string
	// Contenders are those that have this case, in the order of the report.
	Contenders []string
	// Measures are the values of a sample.
	Measures []Measure

	// prepare makes pilots. It may be nil.
	prepare func(context.Context, *harness) error
	// rounds limits the rounds of a case that takes long; 0 is no limit.
	rounds  int
	measure func(context.Context, *harness, string) (Sample, error)
}

// Measure is one value of a sample.
type Measure struct {
	Name string `json:"name,omitempty"`
	Unit string `json:"unit"`
	// Lower says that less is better.
	Lower bool `json:"lower_is_better"`
	// Growth says that it is a difference, about 0 in the best case: it has no ratios and
	// no bar.
	Growth bool `json:"growth,omitempty"`
}

// Sample is what one contender did in one round.
type Sample struct {
	Values []float64 `json:"values"`
	// CPU is the processor time for each task in milliseconds, of "worker", "broker"
	// and "database". Servers in containers are left out.
	CPU map[string]float64 `json:"cpu_ms_per_task,omitempty"`
	// Database is what the database did for each task: "transactions", "WAL flushes"
	// and "WAL bytes".
	Database map[string]float64 `json:"database_per_task,omitempty"`
}

// harness is what the cases share. One goroutine uses it.
type harness struct {
	Config
	servers  *servers
	folder   string // removed at the end
	program  string // this program
	python   string
	celery   string // the path of the Celery worker's program
	seconds  float64
	sequence int // of the next sample; makes names and ids unique

	// plan is what the case "plan" needs; nil before its first sample.
	plan *planCase

	// counts are the statements of a run of a plan.
	counts []StatementCount

	// deadline is the end of the pilot that runs, or zero.
	deadline time.Time
	// seen, if set, is called for each task bench.timed of processes that start.
	seen func(time.Time)
	// transient sends messages that the broker need not write to disk.
	transient bool
	// pilots are the rates of pilots by setting and contender.
	pilots map[pilotKey]pilot
	// choices are the lines of the report about pilots.
	choices []Choice
}

// sizes are those of the cases that do not last as long as a sample.
type sizes struct {
	// log is in bytes, messages are those of the case "many-messages".
	log, messages int
	// least is how many chains and runs the medians of "chain-hop" and "plan" have at
	// least.
	least int
	// countedRuns are the runs of the case "statements".
	countedRuns int
	// queued are the runs that wait in the case "queued-runs", workers the most that run
	// there. runs are measured, and warmUpRuns come before them for each worker.
	queued, workers, runs, warmUpRuns int
	// before and after a fault of a case of recovery the tasks are counted; a kill follows
	// the other after pace.
	before, after, pace time.Duration
}

func (h *harness) sizes() sizes {
	switch {
	case h.Seconds > 0: // for tests
		return sizes{
			log: 256 << 10, messages: 500, least: 1, countedRuns: 1, queued: 1000, workers: 2, runs: 1,
			before: 500 * time.Millisecond, after: 500 * time.Millisecond, pace: 100 * time.Millisecond,
		}
	case h.Short:
		return sizes{
			log: 128 << 20, messages: 50_000, least: 3, countedRuns: 5, queued: 10_000, workers: 16, runs: 5, warmUpRuns: 2,
			before: 5 * time.Second, after: 10 * time.Second, pace: time.Second,
		}
	}
	return sizes{
		log: 1 << 30, messages: 250_000, least: 3, countedRuns: 5, queued: 100_000, workers: 16, runs: 20, warmUpRuns: 2,
		before: 20 * time.Second, after: time.Minute, pace: time.Second,
	}
}

// List prints the cases.
func List(w io.Writer) {
	for _, c := range cases() {
		fmt.Fprintf(w, "%-22s %s\n", c.Name, c.Title)
	}
}

// Run measures and writes the report. The Python environments must exist
// (`devenv run -only python`).
func Run(ctx context.Context, config Config) (err error) {
	if config.Rounds == 0 {
		config.Rounds = 3
		if config.Short {
			config.Rounds = 2
		}
	}
	chosen, err := choose(config.Cases)
	if err != nil {
		return err
	}
	h := &harness{Config: config, seconds: 1.5, pilots: map[pilotKey]pilot{}}
	if config.Short {
		h.seconds = 0.7
	}
	if config.Seconds > 0 {
		h.seconds = config.Seconds
	}
	for _, name := range config.Contenders {
		if name != floor && name != ours && name != celery {
			return fmt.Errorf("there is no contender %q; there are %s, %s, %s", name, floor, ours, celery)
		}
	}
	if h.has(celery) {
		h.python = devenv.CeleryPython(os.Getenv(devenv.EnvPythonRoot), celeryRelease)
		if _, err := os.Stat(h.python); err != nil {
			return fmt.Errorf("no Python with Celery %s: %w; run `make bench`", celeryRelease, err)
		}
	}
	if h.program, err = os.Executable(); err != nil {
		return err
	}
	if h.folder, err = os.MkdirTemp("", "mm-bench-"); err != nil {
		return err
	}
	defer os.RemoveAll(h.folder)
	if h.celery, err = writeCelery(h.folder); err != nil {
		return err
	}
	others, err := busyShare(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintln(h.Output, "starting RabbitMQ and PostgreSQL")
	if h.servers, err = startServers(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.plan.close(), h.servers.close()) }()
	report := Report{Began: time.Now().UTC().Truncate(time.Second), Command: config.Command, Rounds: config.Rounds, SecondsPerSample: h.seconds, Others: others}
	if report.Machine, err = h.machine(ctx); err != nil {
		return err
	}
	for _, c := range chosen {
		c.Contenders = slices.DeleteFunc(c.Contenders, func(name string) bool { return !h.has(name) })
		fmt.Fprintf(h.Output, "\n%s: %s\n", c.Name, c.Title)
		began := time.Now()
		samples, err := h.run(ctx, c)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil: // the others are worth having
			err = errors.Join(err, h.restoreTable(ctx))
			fmt.Fprintf(h.Output, "  failed: %v\n", err)
			report.Failures = append(report.Failures, Failure{c.Name, err.Error()})
		default:
			report.add(c, samples)
		}
		report.Took = append(report.Took, Took{c.Name, math.Round(time.Since(began).Seconds()*10) / 10})
	}
	report.Pilots, report.Statements = h.choices, h.counts
	report.Ended = time.Now().UTC().Truncate(time.Second)
	if err := report.write(config.Folder); err != nil {
		return err
	}
	if err := report.summarize(config.README); err != nil {
		return err
	}
	fmt.Fprintf(h.Output, "\n%s\nThe report is in %s.\n", report.tables(), filepath.Join(config.Folder, markdownFile))
	return report.err()
}

// has reports whether a contender takes part.
func (h *harness) has(name string) bool {
	return len(h.Contenders) == 0 || name == ours || slices.Contains(h.Contenders, name)
}

func choose(names []string) ([]Case, error) {
	all := cases()
	if len(names) == 0 {
		return all, nil
	}
	var chosen []Case
	for _, name := range names {
		i := slices.IndexFunc(all, func(c Case) bool { return c.Name == name })
		if i < 0 {
			var known []string
			for _, c := range all {
				known = append(known, c.Name)
			}
			return nil, fmt.Errorf("there is no case %q; there are %s", name, strings.Join(known, ", "))
		}
		chosen = append(chosen, all[i])
	}
	return chosen, nil
}

// run measures all rounds of a case. The contenders take turns, and each round
// begins with the next one.
func (h *harness) run(ctx context.Context, c Case) (map[string][]Sample, error) {
	if c.prepare != nil {
		if err := c.prepare(ctx, h); err != nil {
			return nil, fmt.Errorf("pilot: %w", err)
		}
	}
	samples := map[string][]Sample{}
	rounds := h.Rounds
	if c.rounds > 0 {
		rounds = min(rounds, c.rounds)
	}
	for round := range rounds {
		line := fmt.Sprintf("  round %2d", round+1)
		for i := range c.Contenders {
			name := c.Contenders[(round+i)%len(c.Contenders)]
			sample, err := c.measure(ctx, h, name)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			samples[name] = append(samples[name], sample)
			line += "   " + name
			for j, m := range c.Measures {
				line += " " + format(sample.Values[j]) + " " + strings.TrimSpace(m.Unit+" "+m.Name)
			}
		}
		fmt.Fprintln(h.Output, line)
	}
	return samples, nil
}
