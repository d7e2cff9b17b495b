package chaos

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// Config is the configuration of a campaign.
type Config struct {
	// Module is the root folder of this module, where the programs are built.
	Module string
	// Folder gets all files: programs, logs, ledgers, artifacts. The evidence of
	// each failed trial stays there in a folder of its own.
	Folder string
	// Seed is that of all trials.
	Seed uint64
	// Trials is their number. Defaults to as many as reach every place where a
	// worker can be killed, or to 1 if the only kind is Rush or Mixed.
	Trials int
	// Only is the number of the only trial to run, or -1 for all.
	Only int
	// For ends the campaign early: no trial begins after this time. Zero means no
	// limit.
	For time.Duration
	// Kinds are the kinds of trials, in turn. Defaults to Kinds.
	Kinds []Kind
	// Runs is how many runs a rush or a mixed trial publishes. Defaults to 200 for
	// a rush and 100 for a mixed trial.
	Runs int
	// Defects are the names of the defects that Prove plants. Defaults to all.
	Defects []string
	// Lanes is how many trials run at the same time; most of a trial is waiting.
	// Defaults to 8: with them, half an hour on two busy cores has more than 1000
	// kills, 300 broker faults and 100 database faults.
	Lanes int
	// Output gets progress messages and the failed trials.
	Output io.Writer

	// stopAtProblem ends the campaign at the first failed trial.
	stopAtProblem bool
	programs      programs
}

// WithDefaults returns a copy with every unset field at its default.
func (c Config) WithDefaults() Config {
	if len(c.Kinds) == 0 {
		c.Kinds = Kinds
	}
	if c.Trials == 0 {
		c.Trials = trialsForAllPlaces(c.Kinds)
		if len(c.Kinds) == 1 && c.Kinds[0] == Real {
			c.Trials = realTrials
		}
		if n := specTrials(c.Kinds); n > 0 {
			c.Trials = n
		}
		if len(c.Kinds) == 1 && (c.Kinds[0] == Rush || c.Kinds[0] == Mixed) {
			c.Trials = 1
		}
	}
	if c.Runs == 0 {
		c.Runs = 200
		if !slices.Contains(c.Kinds, Rush) {
			c.Runs = 100
		}
	}
	if c.Lanes == 0 {
		c.Lanes = 8
		if slices.Contains(c.Kinds, Real) {
			c.Lanes = 4 // builds and containers need the processor
		}
		if slices.ContainsFunc(c.Kinds, Kind.isSpec) {
			c.Lanes = 6 // so does codex
		}
	}
	if c.Output == nil {
		c.Output = io.Discard
	}
	return c
}

// trialsForAllPlaces returns how many trials of the kinds reach every place.
func trialsForAllPlaces(kinds []Kind) int {
	if !slices.Contains(kinds, KillAtPoint) {
		return len(places)
	}
	number := 0
	for kinds[number%len(kinds)] != KillAtPoint || turnOf(number, kinds) < len(places)-1 {
		number++
	}
	return number + 1
}

// Validate returns an error that names the wrong field.
func (c Config) Validate() error {
	for _, kind := range c.Kinds {
		if !slices.Contains(Kinds, kind) && !slices.Contains(onRequest, kind) {
			return fmt.Errorf("there is no kind of trial %q", kind)
		}
	}
	if c.Runs < 2 {
		return fmt.Errorf("chaos: a rush and a mixed trial need 2 runs at least, not %d", c.Runs)
	}
	if c.Trials < 0 || c.Lanes < 0 || c.Module == "" || c.Folder == "" {
		return errors.New("chaos: Trials and Lanes must not be negative, Module and Folder must be given")
	}
	return nil
}

// Run runs a campaign. An error means that the campaign itself did not work; the
// report has what the trials have found.
func Run(ctx context.Context, config Config) (*Report, error) {
	config = config.WithDefaults()
	if err := config.Validate(); err != nil {
		return nil, err
	}
	if config.programs.worker == "" {
		var err error
		if config.programs, err = buildPrograms(ctx, config.Module, config.Folder, config.Kinds...); err != nil {
			return nil, err
		}
	}
	c := &campaign{config: &config, began: time.Now(), report: newReport(&config)}
	ctx, c.cancel = context.WithCancelCause(ctx)
	defer c.cancel(nil)
	shared, own := c.count()
	lanes := min(config.Lanes, shared)
	var wait sync.WaitGroup
	for i := range lanes {
		wait.Go(func() { c.work(ctx, i, false) })
	}
	if own > 0 {
		wait.Go(func() { c.work(ctx, lanes, true) })
	}
	wait.Wait()
	c.report.took = time.Since(c.began)
	if c.failed == nil && ctx.Err() != nil {
		c.report.interrupted = true
	}
	return c.report, c.failed
}

// campaign is the state of one Run.
type campaign struct {
	config *Config
	began  time.Time
	cancel context.CancelCauseFunc

	mu sync.Mutex
	// next are the numbers from which the lanes with shared servers, and the lane
	// with its own servers, look for their next trial.
	next   struct{ shared, own int }
	ended  bool
	report *Report
	failed error
}

// count returns how many of the first trials need shared servers, and how many
// servers of their own. It
// counts the trials of as many rounds of the kinds as there are lanes.
func (c *campaign) count() (shared, own int) {
	first, end := 0, min(c.config.Trials, max(c.config.Lanes, 1)*len(c.config.Kinds))
	if c.config.Only >= 0 {
		first, end = c.config.Only, c.config.Only+1
	}
	for n := first; n < end; n++ {
		if c.kind(n).needsOwnServers() {
			own++
		} else {
			shared++
		}
	}
	return shared, own
}

func (c *campaign) kind(number int) Kind { return c.config.Kinds[number%len(c.config.Kinds)] }

// nextTrial returns the number of the next trial for a lane, false for none.
func (c *campaign) nextTrial(own bool) (int, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.config.Only >= 0 {
		defer func() { c.ended = true }()
		return c.config.Only, !c.ended
	}
	next := &c.next.shared
	if own {
		next = &c.next.own
	}
	for ; *next < c.config.Trials && c.kind(*next).needsOwnServers() != own; *next++ {
	}
	if c.ended || *next >= c.config.Trials || c.config.For > 0 && time.Since(c.began) > c.config.For {
		return 0, false
	}
	*next++
	return *next - 1, true
}

func (c *campaign) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	c.failed = errors.Join(c.failed, err)
	c.cancel(err)
}

// work runs trials in one lane. After a failed trial it makes a new lane, because
// what the trial has left must not fail the next one.
func (c *campaign) work(ctx context.Context, number int, own bool) {
	var l *lane
	made := 0
	defer func() {
		if l != nil {
			c.stopLane(ctx, l)
		}
	}()
	for {
		n, ok := c.nextTrial(own)
		if !ok || ctx.Err() != nil {
			return
		}
		if l == nil {
			var err error
			made++
			if l, err = newLane(ctx, c.config, fmt.Sprintf("lane-%d-%d", number, made), own); err != nil {
				c.fail(err)
				return
			}
		}
		c.recordServers(l)
		o := l.runTrial(ctx, newTrial(c.config.Seed, n, c.config.Kinds))
		if ctx.Err() != nil {
			return
		}
		c.record(o, l)
		if len(o.problems) > 0 {
			_ = l.close(ctx)
			l = nil
		}
	}
}

// recordServers records the servers of a lane for the report.
func (c *campaign) recordServers(l *lane) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.servers = l.servers
}

// stopLane stops a lane's workers as an operator does, and checks that they leave no
// message in the queue.
func (c *campaign) stopLane(ctx context.Context, l *lane) {
	if ctx.Err() == nil {
		for _, w := range l.workers {
			if err := w.stop(); err != nil {
				c.add(problem{stuck, err.Error()})
			}
		}
		if n, err := l.waiting(); err != nil || n > 0 {
			c.add(problem{left, fmt.Sprintf("%d messages in the queue of %s after all its workers were stopped (%v)", n, l.name, err)})
		}
	}
	if err := l.close(ctx); err != nil {
		c.add(problem{harness, err.Error()})
	}
}

func (c *campaign) add(p problem) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.problems[p.class]++
	fmt.Fprintf(c.config.Output, "  %s\n", p)
}

// record adds a trial's outcome to the report and saves the evidence of a failure.
func (c *campaign) record(o *outcome, l *lane) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.add(o)
	if len(o.problems) == 0 && o.missed > 0 {
		fmt.Fprintf(c.config.Output, "trial %d did not reach a point: %s\n", o.trial.Number, o.trial)
	}
	if len(o.problems) == 0 {
		if c.report.trials%25 == 0 {
			fmt.Fprintf(c.config.Output, "%s\n", c.report.progress())
		}
		return
	}
	evidence, err := c.saveEvidence(o, l)
	if err != nil {
		fmt.Fprintf(c.config.Output, "  evidence cannot be saved: %v\n", err)
	}
	fmt.Fprintf(c.config.Output, "trial %d FAILED: %s\n", o.trial.Number, o.trial)
	for _, p := range o.problems {
		fmt.Fprintf(c.config.Output, "  %s\n", p)
	}
	fmt.Fprintf(c.config.Output, "  evidence: %s\n  again:    %s\n", evidence, c.config.again(o.trial.Number))
	if c.config.stopAtProblem {
		c.ended = true
	}
}

// again returns the command that repeats a trial.
func (c *Config) again(number int) string {
	command := fmt.Sprintf("make chaos SEED=%d TRIAL=%d", c.Seed, number)
	if !slices.Equal(c.Kinds, Kinds) {
		var kinds []string
		for _, k := range c.Kinds {
			kinds = append(kinds, string(k))
		}
		command += " KINDS=" + strings.Join(kinds, ",")
	}
	if slices.Contains(c.Kinds, Rush) || slices.Contains(c.Kinds, Mixed) {
		command += fmt.Sprintf(" RUNS=%d", c.Runs)
	}
	return command
}

// saveEvidence writes what helps to explain a failed trial into its folder.
func (c *campaign) saveEvidence(o *outcome, l *lane) (string, error) {
	folder := filepath.Join(c.config.Folder, fmt.Sprintf("failed-%d", o.trial.Number))
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return folder, err
	}
	write := func(name string, value any) error {
		text, err := json.MarshalIndent(value, "", "\t")
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(folder, name), append(text, '\n'), 0o644)
	}
	trace := &strings.Builder{}
	for _, m := range o.moments {
		fmt.Fprintf(trace, "%s %7d %-22s %s\n", time.Unix(0, m.At).UTC().Format("15:04:05.000000"), m.PID, m.Point, strings.Join(m.Subject, " "))
	}
	for _, r := range o.ledger {
		fmt.Fprintf(trace, "%s %7d ledger %-15s %s\n", time.Unix(0, r.At).UTC().Format("15:04:05.000000"), r.PID, r.Event, r.Step)
	}
	lines := strings.Split(strings.TrimSpace(trace.String()), "\n")
	slices.Sort(lines)
	errs := []error{
		write("trial.json", o.trial),
		os.WriteFile(filepath.Join(folder, "timeline.txt"), []byte(o.trial.String()+"\n"+strings.Join(lines, "\n")+"\n"), 0o644),
	}
	// The logs of Python workers too.
	logs, err := filepath.Glob(filepath.Join(l.folder, "*.log"))
	errs = append(errs, err)
	for _, log := range logs {
		errs = append(errs, os.WriteFile(filepath.Join(folder, filepath.Base(log)), []byte(tail(log, 1<<20)), 0o644))
	}
	ctx, cancel := context.WithTimeout(context.Background(), waitTimeout)
	defer cancel()
	for name, query := range map[string]string{
		"run.json":     `SELECT to_jsonb(r)::text FROM orchestrator_runs r WHERE id = $1`,
		"states.json":  `SELECT to_jsonb(s)::text FROM spec_workflow_task_states s WHERE orchestrator_run_id = $1 ORDER BY plan_step`,
		"claims.json":  `SELECT to_jsonb(c)::text FROM mm_orchestrator.claims c WHERE run_id = $1 ORDER BY started_at`,
		"results.json": `SELECT (to_jsonb(m) - 'result')::text FROM celery_taskmeta m WHERE position($1::text::bytea IN args) > 0 ORDER BY date_done`,
	} {
		if o.trial.Kind.isSpec() {
			query = strings.NewReplacer("orchestrator_runs", "spec_workflow_runs", "orchestrator_run_id", "workflow_run_id", "plan_step", "started_at",
				"mm_orchestrator.claims", "mm_orchestrator.spec_claims").Replace(query)
		}
		rows, err := l.rows(ctx, query, o.run.ID)
		errs = append(errs, err, os.WriteFile(filepath.Join(folder, name), []byte(strings.Join(rows, "\n")+"\n"), 0o644))
	}
	return folder, errors.Join(errs...)
}

// A Report has the results of a campaign.
type Report struct {
	config *Config
	took   time.Duration
	// interrupted says that the campaign was cancelled before its end.
	interrupted bool
	trials      int
	failed      []int
	kinds       map[Kind]*tally
	problems    map[class]int
	// runs counts the runs of all trials.
	runs int
	// servers has their names and versions.
	servers string
	hits    int
	// did counts the injected faults.
	did    map[action]int
	kills  int
	missed int
	// missedIn are the trials that did not reach a point.
	missedIn []int
	resumed  []time.Duration
	// slowest is the trial with the longest time from a kill.
	slowest  int
	windows  map[string][]time.Duration
	repeated int
	// wronglyIsolated counts workers that considered themselves isolated and were
	// not.
	wronglyIsolated int
	late            int
	rushes          []*rushFigures
	mixes           []*mixed
	// recoveries are those of all trials.
	recoveries []trialRecovery
	// cases counts, by case, the trials with exactly one rollback.
	cases map[string]onceOf
	// specs counts what trials of the Spec workflow had, by the name for the report.
	specs map[string]int
	// killed counts kills by place, as stages name it.
	killed map[string]int
}

type tally struct{ trials, failed, missed int }

func newReport(config *Config) *Report {
	return &Report{
		config: config, kinds: map[Kind]*tally{}, problems: map[class]int{}, windows: map[string][]time.Duration{},
		cases:  map[string]onceOf{},
		did:    map[action]int{},
		killed: map[string]int{},
		specs:  map[string]int{},
	}
}

// Failed returns the numbers of the failed trials.
func (r *Report) Failed() []int { return r.failed }

// Interrupted says that the campaign was cancelled before its end.
func (r *Report) Interrupted() bool { return r.interrupted }

// Problems counts the problems that trials have found, each class of a trial once.
func (r *Report) Problems() int {
	n := 0
	for _, count := range r.problems {
		n += count
	}
	return n
}

func (r *Report) add(o *outcome) {
	r.trials++
	t := r.kinds[o.trial.Kind]
	if t == nil {
		t = &tally{}
		r.kinds[o.trial.Kind] = t
	}
	t.trials++
	t.missed += o.missed
	if r.missed += o.missed; o.missed > 0 {
		r.missedIn = append(r.missedIn, o.trial.Number)
	}
	if len(o.problems) > 0 {
		t.failed++
		r.failed = append(r.failed, o.trial.Number)
		seen := map[class]bool{}
		for _, p := range o.problems {
			if !seen[p.class] {
				r.problems[p.class]++
			}
			seen[p.class] = true
		}
	}
	if o.rushFigures != nil {
		r.rushes = append(r.rushes, o.rushFigures)
	}
	if o.mixed != nil {
		r.mixes = append(r.mixes, o.mixed)
	}
	if o.trial.Kind == Rollback {
		counts := r.cases[o.trial.Case]
		switch {
		case o.missed > 0:
			counts.notReached++
		default:
			counts.of++
		}
		if o.missed == 0 && o.rolledBackOnce {
			counts.once++
		}
		r.cases[o.trial.Case] = counts
	}
	r.addSpec(o)
	r.hits += len(o.hits)
	r.runs += 1 + len(o.others)
	if o.rushFigures != nil {
		r.runs += o.rushFigures.runs + o.rushFigures.beside - 1
	}
	if o.mixed != nil {
		r.runs += o.mixed.runs - 1
	}
	for _, h := range o.hits {
		r.did[h.stage.Do]++
		if h.stage.Do != kill {
			continue
		}
		r.kills++
		if h.stage.Point != "" {
			r.killed[h.stage.place()]++
		}
	}
	if worst(o.resumed) > worst(r.resumed) {
		r.slowest = o.trial.Number
	}
	r.resumed = append(r.resumed, o.resumed...)
	r.repeated += o.repeated
	r.wronglyIsolated += o.wronglyIsolated()
	r.late += o.late
	for _, back := range o.recoveries {
		r.recoveries = append(r.recoveries, trialRecovery{back, o.trial.Number})
	}
	for _, w := range o.windows {
		r.windows[w.step] = append(r.windows[w.step], w.took)
	}
}

func (r *Report) progress() string {
	return fmt.Sprintf("%4d trials, %d failed, %d kills, %d other faults; lost %d, stuck %d, doubled %d, wrong %d, altered %d, left %d",
		r.trials, len(r.failed), r.kills, r.hits-r.kills, r.problems[lost], r.problems[stuck], r.problems[doubled], r.problems[wrong], r.problems[altered], r.problems[left])
}

// Print writes the report.
func (r *Report) Print(w io.Writer) {
	fmt.Fprintf(w, "\nseed %d, %s\n%s\n\n", r.config.Seed, r.took.Round(time.Second), r.progress())
	fmt.Fprintf(w, "%-16s %8s %8s %12s\n", "kind", "trials", "failed", "not reached")
	var shown []Kind
	for _, kind := range slices.Concat(Kinds, onRequest) {
		if t := r.kinds[kind]; t != nil && !slices.Contains(shown, kind) {
			shown = append(shown, kind)
			fmt.Fprintf(w, "%-16s %8d %8d %12d\n", kind, t.trials, t.failed, t.missed)
		}
	}
	for _, name := range rollbackCases {
		if counts, ok := r.cases[name]; ok {
			fmt.Fprintf(w, "rolled back exactly once after %-26s %s\n", name+":", counts)
		}
	}
	for _, figures := range r.rushes {
		figures.print(w)
	}
	for _, figures := range r.mixes {
		figures.print(w)
	}
	fmt.Fprintln(w)
	r.printTable(w)
	for _, n := range r.failed {
		fmt.Fprintf(w, "failed: %s\n", r.config.again(n))
	}
}
